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

// place(r, c): where the square of rows r .. r + 31 and columns c .. c + 31 of a [rows, depth]
// times the packed matrix goes, its rows `ld` floats apart; put(r, c): it is there. Rows of a are
// `pitch` elements apart; all sizes whole. Needs AmxTiles. Each 32 columns of the matrix are used
// for all rows before the next, since the second cache gives them as slowly as the tiles take them.
template <typename To, typename Put>
DR_INLINE void amx_multiply(const bf16* a, int64_t rows, int64_t pitch, const bf16* packed,
                            int64_t depth, int64_t columns, int64_t ld, To place, Put put) {
  for (int64_t c = 0; c < columns; c += kAmxColumns, packed += depth * kAmxColumns) {
    for (int64_t r = 0; r < rows; r += kAmxRows) {
      const bf16 *upper = a + r * pitch, *lower = upper + 16 * pitch, *matrix = packed;
      asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" : : :);
      for (int64_t k = 0; k < depth; k += kAmxDepth, matrix += 1024) {
        asm volatile(
            "tileloadd (%2,%4,1), %%tmm6\n tileloadd (%0,%5,1), %%tmm4\n"
            "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tileloadd (%3,%4,1), %%tmm7\n"
            "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n tileloadd (%1,%5,1), %%tmm5\n"
            "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3"
            :
            : "r"(upper + k), "r"(lower + k), "r"(matrix), "r"(matrix + 512), "r"(int64_t{64}),
              "r"(2 * pitch)
            : "memory");
      }
      float *const above = place(r, c), *const below = above + 16 * ld;
      asm volatile(
          "tilestored %%tmm0, (%0,%4,1)\n tilestored %%tmm1, (%1,%4,1)\n"
          "tilestored %%tmm2, (%2,%4,1)\n tilestored %%tmm3, (%3,%4,1)"
          :
          : "r"(above), "r"(above + 16), "r"(below), "r"(below + 16), "r"(4 * ld)
          : "memory");
      put(r, c);
    }
  }
}

}  // namespace
}  // namespace dreamreader

#endif
