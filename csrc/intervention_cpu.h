// What the CPU kernel of the intervention program offers for each instruction set.
#pragma once

#include "cpu.h"
#include "intervention.h"

namespace dreamreader {

// Rows of one call. `program` is a Program<double> for f64 activations and a Program<float>
// otherwise.
struct InterventionJob {
  StridedRows in, out;
  const void* program;
  int64_t begin, end;  // channels that any step touches
  void* prepared;      // subspace engine: what its pieces share
  bool amx;            // whether the processor has it and may use it
  bool stream;         // results are too large for the caches
  int64_t run;         // plane engine: tokens of an item, at most kPlaneTokens
  int32_t* seen;       // where bits of Seen are added, from several threads; or null
};

// Works on items first .. last - 1.
using InterventionEngine =
    ByType<void(const InterventionJob& job, void* scratch, int64_t first, int64_t last)>;

constexpr int64_t kLaneBytes =
    128;  // one group of tokens of the column engine: 32 floats or 16 doubles

constexpr int64_t kPlaneTokens = 1024;  // one run of tokens of the plane engine, at most

constexpr int64_t kSubspaceBlock = 64;  // rows that the subspace engine works on together

// rows: an item is one row; channels must be dense and no step may project out more than one
// vector. columns: an item is one group of kLaneBytes / sizeof(W) tokens of one batch row; any
// strides, any step. planes: an item is one run of tokens of one batch row; tokens must be dense,
// and steps one of steer, scale, clamp, fill, clamp_component and project of one vector. subspace:
// an item is one row; any strides, one projection without a mask.
struct InterventionKernels {
  InterventionEngine rows, columns, planes, subspace;
  int64_t (*prepared_bytes[2])(int64_t vectors, int64_t width);  // f32, f64
  void (*prepare[2])(const InterventionJob& job);
};

DR_KERNELS(InterventionKernels, intervention)

}  // namespace dreamreader
