// The register-tiled product that the operators share, and how two bfloat16 lie in a word of it.
#pragma once

#include "simd.h"

namespace dreamreader {
namespace {

// acc + a b in the lanes of V; b is a vector, or one number for all lanes.
struct Products {
  template <typename V, typename B>
  static inline __attribute__((always_inline)) V add(V acc, V a, B b) {
    return acc + a * b;
  }
};

#if defined(__AVX512F__)
// Words hold two bfloat16, whose products AVX512_BF16 adds with half the instructions. Written as
// assembly, since it is chosen when the processor has it.
struct PairProducts {
  static inline __attribute__((always_inline)) VF add(VF acc, VF a, float b) {
    const VF both = VF{} + b;
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(both));
    return acc;
  }
};
#endif

// acc[i][j] += left(k, i) right(k, j) for k = first, first + step, ... below last. `right` gives
// vectors, `left` vectors or numbers; the accumulators have to fit into the registers, with one row
// of `right`.
template <typename Add = Products, typename V, int kRows, int kColumns, typename Left,
          typename Right>
DR_INLINE void add_products(V (&acc)[kRows][kColumns], int64_t first, int64_t last, int64_t step,
                            Left left, Right right) {
  for (int64_t k = first; k < last; k += step) {
    V b[kColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) b[j] = right(k, j);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto a = left(k, i);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; ++j) acc[i][j] = Add::add(acc[i][j], b[j], a);
    }
  }
}

}  // namespace
}  // namespace dreamreader
