// Products of a block of rows with packed matrices, and the activations of a probe.
#pragma once

#include "guide.h"
#include "matmul_tile_simd.h"

namespace dreamreader {
namespace {

constexpr int kLanes = kWidth<float>;
constexpr int kPanel = 2 * kLanes;                     // columns
constexpr int kRows = DR_VECTOR_BYTES == 64 ? 12 : 6;  // accumulators stay in 32 or 16 registers
constexpr int64_t kDepth = 256;  // products summed before the sum is added to a larger one

// c [kRows, kPanel] +- a [kRows, depth] b [depth, kPanel]
template <bool kMinus>
DR_INLINE void multiply_tile(const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                             int64_t ldc) {
  VF sums[kRows][2] = {};
  const float* three[kRows / 3];  // addresses of every third row: the others are within reach
#pragma GCC unroll 4
  for (int r = 0; r < kRows / 3; ++r) three[r] = a + 3 * r * lda;
  add_products(
      sums, 0, depth, 1, [&](int64_t i, int r) { return three[r / 3][r % 3 * lda + i]; },
      [&](int64_t i, int half) { return load_vector<VF>(b + i * kPanel + half * kLanes); });
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* at = c + r * ldc + half * kLanes;
      const VF before = load_vector<VF>(at);
      store_vector(at, kMinus ? before - sums[r][half] : before + sums[r][half]);
    }
  }
}

// c [rows, matrix.columns] +- a [rows, matrix.depth] times the matrix; rows a multiple of kRows.
// The part of a panel that is in use stays in the first cache for all rows.
template <bool kMinus>
__attribute__((noinline)) void multiply(const float* a, int64_t lda, const GuideMatrix& matrix,
                                        int64_t rows, float* c, int64_t ldc) {
  for (int64_t column = 0; column < matrix.columns; column += kPanel) {
    const float* panel = matrix.packed + column * matrix.depth;
    for (int64_t i = 0; i < matrix.depth; i += kDepth) {
      const int64_t depth = matrix.depth - i < kDepth ? matrix.depth - i : kDepth;
      for (int64_t r = 0; r < rows; r += kRows)
        multiply_tile<kMinus>(a + r * lda + i, lda, panel + i * kPanel, depth, c + r * ldc + column,
                              ldc);
    }
  }
}

void pack(const GuideMatrix& matrix, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel;
    const int64_t n = matrix.columns - column < kPanel ? matrix.columns - column : kPanel;
    const float* source = matrix.source + column * matrix.stride_column;
    float* to = matrix.packed + column * matrix.depth;
    for (int64_t i = 0; i < matrix.depth; ++i, source += matrix.stride_depth, to += kPanel) {
      for (int64_t j = 0; j < n; ++j) to[j] = source[j * matrix.stride_column];
      for (int64_t j = n; j < kPanel; ++j) to[j] = 0;
    }
  }
}

struct Activated {
  VF value, slope;
};

DR_INLINE VF exponential(VF x) {  // e^x for x <= 0
  return exp2_lanes(x, VF{} + 0x1.715476p+0f, VF{});
}
DR_INLINE VF magnitude(VF x) { return bits_as<VF>(bits_as<VU>(x) & 0x7fffffffu); }

DR_INLINE Activated relu(VF a) {
  const VF zero{}, one = zero + 1.0f;
  return {a > 0.0f ? a : (a != a ? a : zero), a > 0.0f ? one : zero};
}

// With the share Phi(a) of the normal distribution below a, value a Phi and slope Phi + a phi. The
// share beyond |a| is e^(-a^2/2) t P(t), t = 1 / (1 + 0.46 |a| / sqrt(2)): P is fitted to the
// scaled error function with an error of 5e-9.
DR_INLINE Activated gelu(VF a) {
  constexpr float p[] = {0x1.799ac0p-4f, -0x1.db2e0ap-2f, 0x1.7b1ea8p-1f, -0x1.04c9c0p-2f,
                         0x1.98574ep-2f, 0x1.cc2d08p-3f,  0x1.0ce5f6p-2f};
  const VF one = VF{} + 1.0f, t = one / (one + magnitude(a) * 0.32526912f);
  VF y = VF{} + p[0];
#pragma GCC unroll 8
  for (int i = 1; i < 7; ++i) y = y * t + p[i];
  const VF density = exponential(-0.5f * a * a), beyond = 0.5f * (y * t) * density;
  const VF share = a > 0.0f ? one - beyond : beyond;
  return {a * share, share + a * density * 0.3989422804f};
}

DR_INLINE Activated silu(VF a) {
  const VF one = VF{} + 1.0f, e = exponential(-magnitude(a));
  const VF share = (a > 0.0f ? one : e) / (one + e);
  return {a * share, share * (one + a * (one - share))};
}

}  // namespace
}  // namespace dreamreader
