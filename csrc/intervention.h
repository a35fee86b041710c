// The intervention program: formulas and packed tables, shared by the CPU and the CUDA kernel.
//
// A program is an ordered list of steps. Each changes the channels begin .. end - 1 (and among them
// those of its mask) of every row of x [rows, tokens, width]; a row is one (row, token) pair. With
// s the strength of the step:
//
//   steer            x + s v                           scale   x (1 + s (f - 1)),  f = lo
//   clamp_component  x + s (clamp(c, lo, hi) - c) v    clamp   x + s (clamp(x, lo, hi) - x)
//   project          x - s V'V x                       fill    x + s (v - x)
//   renorm           x (1 + s (|x0| / |x| - 1))        patch   x + s (source[index] - x)
//
// c = <x, v>, x0 = the row on entry of the program; sums run over the selected channels of the step
// only. s = 0: the step does not touch the row; a row without any step keeps its
// bits. s = 1: clamp, fill and patch give their target exactly and fill and patch do not let x (NaN
// included) through. Arithmetic in W (float; double for double x), one rounding at the end. No
// torch, no pybind11 here.
#pragma once

#include <cstdint>

#include "rows.h"

namespace dreamreader {

constexpr int kMaxSteps = 32;  // the limits of dreamreader/ops/intervention_program.py
constexpr int kMaxSources = 8;
constexpr int kMaxSubspace = 64;

enum Kind : int32_t { kSteer, kScale, kClamp, kClampComponent, kProject, kFill, kPatch, kRenorm };

// One step as ops/intervention_program.py packs it; -1 where a table is not used.
struct Step {
  int32_t kind;
  int32_t one_sided;   // project: remove positive components only
  int32_t vector;      // first row in Program::vectors
  int32_t count;       // rows there (m)
  int32_t begin, end;  // channel range
  int32_t mask;        // row in Program::masks, inside the range
  int32_t limit;       // row in Program::limits
  int32_t source;      // number in Program::sources
};

// What a patch reads: data [entries, width] and index [rows, tokens].
struct Source {
  const void* data;
  DType dtype;
  int64_t entries, stride_entry, stride_channel;
  const int64_t* index;
  int64_t index_stride_row, index_stride_token;
};

// The whole program by value: fits in kernel parameters (below 4 KB). W is the arithmetic type.
template <typename W>
struct Program {
  int32_t count;
  Step steps[kMaxSteps];
  const W* strength;  // [count, rows, tokens], any strides (0 where it does not vary)
  int64_t strength_step, strength_row, strength_token;
  const W* vectors;      // [V, width], rows dense; 0 outside the channels of their step
  const W* limits;       // [L, 2, rows], dense: lo then hi
  const uint8_t* masks;  // [M, width], dense: 0 or 1
  Source sources[kMaxSources];
};

// What a program did, told by the pass that did it. Only of results in memory of their own.
enum Seen : int32_t {
  kChanged = 1,     // a value is another one
  kOverflowed = 2,  // half precision: what was written has a value that is not finite
  kNotFinite = 4,   // and what was read there had one already
};

template <typename W>
DR_HD W strength_of(const Program<W>& p, int step, int64_t row, int64_t token) {
  return p.strength[step * p.strength_step + row * p.strength_row + token * p.strength_token];
}

// lo (which = 0) or hi (which = 1) of a step for one row; lo is the factor of scale.
template <typename W>
DR_HD W limit_of(const Program<W>& p, const Step& step, int which, int64_t row, int64_t rows) {
  return p.limits[(step.limit * int64_t{2} + which) * rows + row];
}

// Entry of the source that a row takes, or -1 if the index does not exist (the row then becomes
// NaN).
DR_HD int64_t entry_of(const Source& source, int64_t row, int64_t token) {
  const int64_t entry =
      source.index[row * source.index_stride_row + token * source.index_stride_token];
  return entry >= 0 && entry < source.entries ? entry : -1;
}

// Bounds x; comparisons with NaN are false, so NaN stays.
template <typename W>
DR_HD W clamp_value(W x, W lo, W hi) {
  return x < lo ? lo : (x > hi ? hi : x);
}

// x + s (target - x), exactly the target at s = 1.
template <typename W>
DR_HD W blend(W x, W target, W s) {
  return s == W(1) ? target : x + s * (target - x);
}

// Factor of scale, exactly f at s = 1.
template <typename W>
DR_HD W scale_factor(W f, W s) {
  return s == W(1) ? f : W(1) + s * (f - W(1));
}

// Multiple of v that clamp_component adds, given c = <x, v>.
template <typename W>
DR_HD W component_shift(W c, W lo, W hi, W s) {
  return s * (clamp_value(c, lo, hi) - c);
}

// Multiple of v_j that project subtracts, given c_j = <x, v_j>; NaN stays.
template <typename W>
DR_HD W component_removed(W c, bool one_sided, W s) {
  return one_sided && c < W(0) ? W(0) : s * c;
}

// Factor of renorm, given the norms now and on entry; a zero row stays.
template <typename W>
DR_HD W renorm_factor(W now, W before, W s) {
  return now == W(0) ? W(1) : scale_factor(before / now, s);
}

}  // namespace dreamreader

#ifdef DREAMREADER_CUDA
#include <cuda_runtime_api.h>

namespace dreamreader {

// Runs the program from in to out (in place when their data agree) on the stream of the current
// device, asynchronously. Program<float> for f16, bf16 and f32 activations, Program<double> for
// f64. Out of place, untouched rows and channels are copied, and bits of Seen are added to *seen on
// the device unless it is null.
cudaError_t launch_intervention(const StridedRows& in, const StridedRows& out,
                                const Program<float>& program, cudaStream_t stream,
                                int32_t* seen = nullptr);
cudaError_t launch_intervention(const StridedRows& in, const StridedRows& out,
                                const Program<double>& program, cudaStream_t stream,
                                int32_t* seen = nullptr);

}  // namespace dreamreader
#endif
