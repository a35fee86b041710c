// The two loops that the low-rank edit and its gradient are made of: dots of rows with rows, and
// rows plus combinations of rows.
//
// Rows lie in panels, in the arithmetic type: tile by tile of kTile channels, in each tile row by
// row, zeros behind the last channel up to whole vectors. Rows of an activation themselves are
// often a multiple of 4 KiB apart and would share the same few lines of the first cache.
#pragma once

#include "low_rank_cpu.h"
#include "matmul_tile_simd.h"

namespace dreamreader {
namespace {

// Accumulators fill about half of the registers: 4 x 4 vectors of AVX-512, else 4 x 2.
constexpr int kTileVectors = DR_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kTile = kLowRankTile;
constexpr int64_t kDotsTiles = 4;  // tiles of a row that are read for all ranks at once

template <typename W>
using VectorOf = typename Lanes<W>::V;

// Channels of the tile that begins at d, as whole vectors.
template <typename W>
DR_INLINE int64_t tile_width(int64_t width, int64_t d) {
  const int64_t n = width - d < kTile ? width - d : kTile;
  return (n + kWidth<W> - 1) / kWidth<W> * kWidth<W>;
}

// Sums of the lanes of `count` vectors. (From shuffles in a loop GCC 12 makes code that builds
// their index vectors each time.)
template <typename W>
DR_INLINE void lane_sums(const W* vectors, int64_t count, W* sums) {
  for (int64_t i = 0; i < count; ++i) {
    W total = 0;
    for (int l = 0; l < kWidth<W>; ++l) total += vectors[i * kWidth<W> + l];
    sums[i] = total;
  }
}
#if defined(__AVX2__)
DR_INLINE __m128 folded(const float* vector) {
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm256_loadu_ps(vector), _mm256_loadu_ps(vector + 8));
#else
  const __m256 half = _mm256_loadu_ps(vector);
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
DR_INLINE void lane_sums(const float* vectors, int64_t count, float* sums) {
  constexpr int n = kWidth<float>;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    __m128 a = folded(vectors + i * n), b = folded(vectors + (i + 1) * n);
    __m128 c = folded(vectors + (i + 2) * n), d = folded(vectors + (i + 3) * n);
    a = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    c = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_storeu_ps(sums + i, _mm_add_ps(_mm_movelh_ps(a, c), _mm_movehl_ps(c, a)));
  }
  for (; i < count; ++i) {
    const __m128 a = folded(vectors + i * n);
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    sums[i] = _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
}
#endif

// One panel: `rows` rows have memory in each tile.
template <typename W>
struct Panel {
  W* data;
  int64_t rows;

  W* at(int64_t row, int64_t d) const { return data + d * rows + row * kTile; }  // d: of a tile
};

// Rows and tables whose products stay in registers: a table is read once for all these rows, since
// it comes from the second cache.
constexpr int kDotRows = DR_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kDotTables = 2;

// sums[i][k] += lanes of <row i, table k>, channels from .. to - 1, for kTables tables from the
// first on.
template <typename W, int kTables>
DR_INLINE void dots_tile(const Panel<W>& x, const int64_t (&rows)[kDotRows], const Panel<W>& tables,
                         int64_t first, int64_t width, int64_t from, int64_t to, W* sums,
                         int64_t rank) {
  VectorOf<W> acc[kTables][kDotRows] = {};
  for (int64_t d = from; d < to; d += kTile) {
    const W* row[kDotRows];
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) row[i] = x.at(rows[i], d);
    const W* table = tables.at(first, d);
    add_products(
        acc, 0, tile_width<W>(width, d), kWidth<W>,
        [&](int64_t c, int k) { return load_lanes(table + k * kTile + c); },
        [&](int64_t c, int i) { return load_lanes(row[i] + c); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kDotRows; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < kTables; ++k) {
      W* sum = sums + (i * rank + first + k) * kWidth<W>;
      store_lanes(sum, load_lanes(sum) + acc[k][i]);
    }
}

// z[i, k] = <row i, table k> for `count` rows and all tables. Rows are taken kDotRows at a time;
// those beyond the last repeat it. sums: kDotRows * rank vectors.
template <typename W>
static void dots(const Panel<W>& x, int64_t count, const Panel<W>& tables, int64_t width, W* sums,
                 W* z) {
  const int64_t rank = tables.rows;
  for (int64_t first = 0; first < count; first += kDotRows) {
    const int64_t left = count - first < kDotRows ? count - first : int64_t(kDotRows);
    int64_t rows[kDotRows];
    for (int i = 0; i < kDotRows; ++i) rows[i] = first + (i < left ? i : left - 1);
    __builtin_memset(sums, 0, std::size_t(kDotRows * rank) * DR_VECTOR_BYTES);
    for (int64_t from = 0; from < width; from += kDotsTiles * kTile) {
      const int64_t end = from + kDotsTiles * kTile, to = width < end ? width : end;
      int64_t k = 0;
      for (; k + kDotTables <= rank; k += kDotTables)
        dots_tile<W, kDotTables>(x, rows, tables, k, width, from, to, sums, rank);
      for (; k < rank; ++k) dots_tile<W, 1>(x, rows, tables, k, width, from, to, sums, rank);
    }
    lane_sums(sums, left * rank, z + first * rank);
  }
}

// Rows that the next block will read, fetched into the second cache a little with every result:
// while the rows of this block are combined, memory would otherwise wait.
struct Ahead {
  const char* rows[2 * kLowRankBlock];
  int64_t count = 0;
  int64_t row = 0, byte = 0;  // what comes next, within the tile
  int64_t begin = 0, end = 0;

  void tile(int64_t from, int64_t to) {  // bytes of a row
    row = 0;
    byte = begin = from;
    end = to;
  }

  inline __attribute__((always_inline)) void step() {
    if (row >= count) return;
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) __builtin_prefetch(rows[row] + byte + line * 64, 0, 2);
    byte += 256;
    if (byte >= end) {
      byte = begin;
      ++row;
    }
  }
};

// What combinations are added to, and where the results go: back into the panel ...
template <typename W>
struct IntoPanel {
  W* tile;
  Ahead& ahead;

  template <int n>
  inline __attribute__((always_inline)) void put(int64_t row, int64_t c,
                                                 const VectorOf<W> (&v)[n]) const {
    ahead.step();
    W* p = tile + row * kTile + c;
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i)
      store_lanes(p + i * kWidth<W>, load_lanes(p + i * kWidth<W>) + v[i]);
  }
};

// ... or, rounded, to the rows of a tensor.
template <typename T>
struct IntoRows {
  using W = typename Work<T>::type;
  const W* tile;
  T* const* rows;
  int64_t d, width;
  Ahead& ahead;

  template <int n>
  inline __attribute__((always_inline)) void put(int64_t row, int64_t c,
                                                 const VectorOf<W> (&v)[n]) const {
    ahead.step();
    const W* p = tile + row * kTile + c;
    T* to = rows[row] + d + c;
    if constexpr (n > 1) {
#pragma GCC unroll 4
      for (int i = 0; i < n; i += 2)
        store_pair(to + i * kWidth<W>, load_lanes(p + i * kWidth<W>) + v[i],
                   load_lanes(p + (i + 1) * kWidth<W>) + v[i + 1]);
    } else {
      T part[kWidth<W>];
      store_lanes(part, load_lanes(p) + v[0]);
      const int64_t left = width - d - c < kWidth<W> ? width - d - c : int64_t(kWidth<W>);
      __builtin_memcpy(to, part, std::size_t(left) * sizeof(T));
    }
  }
};

// Adds sum over k of coef[i row_step + k k_step] b[k] to kRows rows i, n channels of a tile; `b` is
// the tile of the combined rows. Summed apart from what it is added to: the terms are smaller, and
// so are their rounding errors. `dense` channels are known to exist in full.
template <int kRows, typename W, typename Into>
DR_INLINE void mix_tile(const W* coef, int64_t row_step, int64_t k_step, int64_t count, const W* b,
                        const Into& into, int64_t row, int64_t dense, int64_t n) {
  using V = VectorOf<W>;
  constexpr int64_t kStep = kTileVectors * kWidth<W>;
  const auto coefficient = [&](int64_t k, int i) { return coef[i * row_step + k * k_step]; };
  int64_t c = 0;
  for (; c + kStep <= dense; c += kStep) {
    V acc[kRows][kTileVectors] = {};
    add_products(acc, 0, count, 1, coefficient,
                 [&](int64_t k, int v) { return load_lanes(b + k * kTile + c + v * kWidth<W>); });
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) into.put(row + i, c, acc[i]);
  }
  for (; c < n; c += kWidth<W>) {
    V acc[kRows][1] = {};
    add_products(acc, 0, count, 1, coefficient,
                 [&](int64_t k, int) { return load_lanes(b + k * kTile + c); });
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) into.put(row + i, c, acc[i]);
  }
}

// mix_tile for any number of rows.
template <typename W, typename Into>
static void mix(int64_t rows, const W* coef, int64_t row_step, int64_t k_step, int64_t count,
                const W* b, const Into& into, int64_t dense, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    mix_tile<4>(coef + i * row_step, row_step, k_step, count, b, into, i, dense, n);
  coef += i * row_step;
  if (rows - i == 3) mix_tile<3>(coef, row_step, k_step, count, b, into, i, dense, n);
  if (rows - i == 2) mix_tile<2>(coef, row_step, k_step, count, b, into, i, dense, n);
  if (rows - i == 1) mix_tile<1>(coef, row_step, k_step, count, b, into, i, dense, n);
}

}  // namespace
}  // namespace dreamreader
