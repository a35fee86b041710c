// The product of bfloat16 rows with a packed matrix on the tiles of AMX, sixteen times as fast as
// fused multiply-adds of float32. Products are exact and summed in float32; numbers below 2^-126
// count as 0.
#pragma once

#include "simd.h"

#if defined(__AVX512F__)

namespace dreamreader {
namespace {

constexpr int64_t kAmxRows = 32;  // two tiles of rows by two tiles of columns at a time
constexpr int64_t kAmxColumns = 32;
constexpr int64_t kAmxDepth = 32;  // bfloat16 in a row of a tile

DR_INLINE int64_t amx_whole(int64_t n) { return (n + 31) / 32 * 32; }

// The tiles of this thread while it lives; then they are again what they were.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } own;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(own));
  }
  ~AmxTiles() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  AmxTiles(const AmxTiles&) = delete;

 private:
  struct alignas(64) {
    uint8_t bytes[64];
  } before_;
};

// A matrix [depth, columns] for amx_multiply, both whole: for 32 columns after the other and in
// each for 32 of the depth two tiles, whose rows hold pairs of the depth for 16 columns.
//
// From the rows of its transpose: row(c) has `depth` values of column c.
template <typename Row>
DR_INLINE void amx_pack_columns(bf16* packed, int64_t depth, int64_t columns, Row row) {
  for (int64_t c = 0; c < columns; c += kAmxColumns)
    for (int64_t k = 0; k < depth; k += kAmxDepth)
      for (int half = 0; half < 2; ++half, packed += 512) {
        VF pairs[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) pairs[i] = load_vector<VF>(row(c + 16 * half + i) + k);
        transpose_lanes(pairs);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store_vector(packed + 32 * i, pairs[i]);
      }
}

// From its own rows: row(k) has `columns` values.
template <typename Row>
DR_INLINE void amx_pack_rows(bf16* packed, int64_t depth, int64_t columns, Row row) {
  for (int64_t c = 0; c < columns; c += kAmxColumns)
    for (int64_t k = 0; k < depth; k += kAmxDepth)
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 16; ++i, packed += 32) {
          const VH lower = load_vector<VH>(row(k + 2 * i) + c + 16 * half);
          const VH upper = load_vector<VH>(row(k + 2 * i + 1) + c + 16 * half);
          store_vector(packed, __builtin_convertvector(upper, VU) << 16 |
                                   __builtin_convertvector(lower, VU));
        }
}

// put(c, part): columns c .. c + 31 of a [32, depth] times the packed matrix as part [32][32].
// Rows of a are `pitch` elements apart. Needs AmxTiles.
template <typename Put>
DR_INLINE void amx_multiply(const bf16* a, int64_t pitch, const bf16* packed, int64_t depth,
                            int64_t columns, Put put) {
  alignas(64) float part[kAmxRows][kAmxColumns];
  for (int64_t c = 0; c < columns; c += kAmxColumns) {
    asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" : : :);
    for (int64_t k = 0; k < depth; k += kAmxDepth, packed += 1024) {
      const bf16 *upper = a + k, *lower = upper + 16 * pitch;
      asm volatile(
          "tileloadd (%2,%4,1), %%tmm6\n tileloadd (%0,%5,1), %%tmm4\n"
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tileloadd (%3,%4,1), %%tmm7\n"
          "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n tileloadd (%1,%5,1), %%tmm5\n"
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3"
          :
          : "r"(upper), "r"(lower), "r"(packed), "r"(packed + 512), "r"(int64_t{64}), "r"(2 * pitch)
          : "memory");
    }
    asm volatile(
        "tilestored %%tmm0, (%0,%4,1)\n tilestored %%tmm1, (%1,%4,1)\n"
        "tilestored %%tmm2, (%2,%4,1)\n tilestored %%tmm3, (%3,%4,1)"
        :
        : "r"(&part[0][0]), "r"(&part[0][16]), "r"(&part[16][0]), "r"(&part[16][16]),
          "r"(int64_t{4 * kAmxColumns})
        : "memory");
    put(c, part);
  }
}

}  // namespace
}  // namespace dreamreader

#endif
