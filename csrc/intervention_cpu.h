// What the CPU kernel of the intervention program offers for each instruction set.
#pragma once

#include "intervention.h"

namespace dreamreader {

// Rows of one call. `program` is a Program<double> for f64 activations and a Program<float>
// otherwise.
struct InterventionJob {
  Activation in, out;
  const void* program;
  int64_t begin, end;  // channels that any step touches
  int32_t* seen;       // where bits of Seen are added, from several threads; or null
};

// What a program did, told by the pass that did it. Only of results in memory of their own.
enum Seen : int32_t {
  kChanged = 1,      // a value is another one
  kOverflowed = 2,   // half precision: what was written has a value that is not finite
  kNotFinite = 4,    // and what was read there had one already
};

// Works on items first .. last - 1; scratch holds scratch_bytes(job).
struct InterventionEngine {
  void (*run)(const InterventionJob& job, void* scratch, int64_t first, int64_t last);
};

constexpr int64_t kLaneBytes =
    128;  // one group of tokens of the column engine: 32 floats or 16 doubles

constexpr int64_t kPlaneTokens = 512;  // one run of tokens of the plane engine

// rows: an item is one row; channels must be dense and no step may project out more than one
// vector. columns: an item is one group of kLaneBytes / sizeof(W) tokens of one batch row; any
// strides, any step. planes: an item is one run of tokens of one batch row; tokens must be dense,
// and steps one of steer, scale, clamp and fill.
struct InterventionKernels {
  InterventionEngine rows[4], columns[4], planes[4];  // by DType
};

namespace portable {
extern const InterventionKernels intervention;
}
#if defined(__x86_64__)
namespace avx2 {
extern const InterventionKernels intervention;
}
namespace avx512 {
extern const InterventionKernels intervention;
}
#endif

}  // namespace dreamreader
