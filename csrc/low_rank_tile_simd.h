// The two loops that the low-rank edit and its gradient are made of, on rows in the arithmetic type:
// dots of rows with rows, and rows plus combinations of rows.
#pragma once

#include "low_rank_cpu.h"
#include "simd.h"

namespace dreamreader {
namespace {

// Accumulators fill about half of the registers: 4 x 4 vectors of AVX-512, else 4 x 2.
constexpr int kTileRows = 4;
constexpr int kTileVectors = DR_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kDotsTile = 512;  // values of a row that are read for all ranks at once

template <typename W>
using VectorOf = typename Lanes<W>::V;

// The first n lanes, n < kWidth; the others are 0.
template <typename W>
DR_INLINE VectorOf<W> load_part(const W* p, int64_t n) {
  W part[kWidth<W>] = {};
  __builtin_memcpy(part, p, std::size_t(n) * sizeof(W));
  return load_lanes(part);
}
template <typename W, typename T>
DR_INLINE void store_part(T* p, VectorOf<W> v, int64_t n) {
  T part[kWidth<W>];
  store_lanes(part, v);
  __builtin_memcpy(p, part, std::size_t(n) * sizeof(T));
}

template <typename W>
DR_INLINE W lane_sum(VectorOf<W> v) {
#pragma GCC unroll 4
  for (int half = kWidth<W> / 2; half > 0; half /= 2) {
    typename Lanes<W>::I other;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<W>; ++i) other[i] = (i + half) % kWidth<W>;
    v += DR_SHUFFLE(v, other);
  }
  return v[0];
}

// sums[i][k] += lanes of <row i, table k> over the values from .. to - 1, for kRanks tables.
template <typename W, int kRanks>
DR_INLINE void dots_tile(const W* const* rows, const W* table, int64_t width, int64_t from,
                         int64_t to, W* sums, int64_t rank) {
  using V = VectorOf<W>;
  V acc[kTileRows][kRanks] = {};
  int64_t d = from;
  for (; d + kWidth<W> <= to; d += kWidth<W>) {
    V x[kTileRows];
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) x[i] = load_lanes(rows[i] + d);
#pragma GCC unroll 4
    for (int k = 0; k < kRanks; ++k) {
      const V a = load_lanes(table + k * width + d);
#pragma GCC unroll 4
      for (int i = 0; i < kTileRows; ++i) acc[i][k] += x[i] * a;
    }
  }
  if (d < to) {
    for (int k = 0; k < kRanks; ++k) {
      const V a = load_part(table + k * width + d, to - d);
      for (int i = 0; i < kTileRows; ++i) acc[i][k] += load_part(rows[i] + d, to - d) * a;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < kRanks; ++k) {
      W* sum = sums + (i * rank + k) * kWidth<W>;
      store_lanes(sum, load_lanes(sum) + acc[i][k]);
    }
}

// z[i, k] = <row i, table k> for `count` rows and all ranks. Rows are taken by fours; those beyond
// the last repeat it. sums: kTileRows * rank vectors.
template <typename W>
static void dots(const W* const* rows, int64_t count, const W* table, int64_t width, int64_t rank,
                 W* sums, W* z) {
  for (int64_t first = 0; first < count; first += kTileRows) {
    const W* four[kTileRows];
    for (int i = 0; i < kTileRows; ++i) four[i] = rows[first + i < count ? first + i : count - 1];
    __builtin_memset(sums, 0, std::size_t(kTileRows * rank) * DR_VECTOR_BYTES);
    for (int64_t from = 0; from < width; from += kDotsTile) {
      const int64_t to = width - from < kDotsTile ? width : from + kDotsTile;
      int64_t k = 0;
      for (; k + kTileVectors <= rank; k += kTileVectors)
        dots_tile<W, kTileVectors>(four, table + k * width, width, from, to,
                                   sums + k * kWidth<W>, rank);
      for (; k < rank; ++k)
        dots_tile<W, 1>(four, table + k * width, width, from, to, sums + k * kWidth<W>, rank);
    }
    const int64_t left = count - first < kTileRows ? count - first : int64_t(kTileRows);
    for (int64_t i = 0; i < left * rank; ++i)
      z[first * rank + i] = lane_sum<W>(load_lanes(sums + i * kWidth<W>));
  }
}

// out[i] = base[i] + sum over k of coef[i row_step + k k_step] b[k], values from .. to - 1, for
// kRows rows. Summed apart from base: the terms are smaller than it, and so are their rounding
// errors.
template <typename T, int kRows, typename W>
DR_INLINE void mix_tile(const W* coef, int64_t row_step, int64_t k_step, int64_t count,
                        const W* const* b, const W* const* base, T* const* out, int64_t from,
                        int64_t to) {
  using V = VectorOf<W>;
  constexpr int64_t kStep = kTileVectors * kWidth<W>;
  int64_t d = from;
  for (; d + kStep <= to; d += kStep) {
    V acc[kRows][kTileVectors] = {};
    for (int64_t k = 0; k < count; ++k) {
      V row[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) row[v] = load_lanes(b[k] + d + v * kWidth<W>);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const V c = coef[i * row_step + k * k_step] - V{};
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) acc[i][v] += c * row[v];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; v += 2) {
        const W* p = base[i] + d + v * kWidth<W>;
        store_pair(out[i] + d + v * kWidth<W>, load_lanes(p) + acc[i][v],
                   load_lanes(p + kWidth<W>) + acc[i][v + 1]);
      }
  }
  for (; d < to; d += kWidth<W>) {
    const int64_t n = to - d < kWidth<W> ? to - d : int64_t(kWidth<W>);
    for (int i = 0; i < kRows; ++i) {
      V acc{};
      for (int64_t k = 0; k < count; ++k)
        acc += (coef[i * row_step + k * k_step] - V{}) * load_part(b[k] + d, n);
      store_part<W>(out[i] + d, load_part(base[i] + d, n) + acc, n);
    }
  }
}

// mix_tile for any number of rows.
template <typename T, typename W>
static void mix(int64_t rows, const W* coef, int64_t row_step, int64_t k_step, int64_t count,
                const W* const* b, const W* const* base, T* const* out, int64_t from, int64_t to) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    mix_tile<T, 4, W>(coef + i * row_step, row_step, k_step, count, b, base + i, out + i, from, to);
  coef += i * row_step;
  if (rows - i == 3) mix_tile<T, 3, W>(coef, row_step, k_step, count, b, base + i, out + i, from, to);
  if (rows - i == 2) mix_tile<T, 2, W>(coef, row_step, k_step, count, b, base + i, out + i, from, to);
  if (rows - i == 1) mix_tile<T, 1, W>(coef, row_step, k_step, count, b, base + i, out + i, from, to);
}

}  // namespace
}  // namespace dreamreader
