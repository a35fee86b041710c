// Rows of an activation as rows of a panel in the arithmetic type, and back.
#pragma once

#include "low_rank_tile_simd.h"

namespace dreamreader {
namespace {

struct Place {
  int64_t entry, token;
};

template <typename T>
DR_INLINE T* row_at(const StridedRows& rows, Place at) {
  return row_at<T>(rows, at.entry, at.token);
}

// n <= kBlock channels of a row, the rest of `to` up to whole vectors 0.
template <typename T, typename W>
DR_INLINE void gather_block(const T* from, int64_t stride, int64_t n, W* to) {
  if (stride == 1 && n == kBlock<W>) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i)
      store_lanes(to + i * kWidth<W>, load_lanes(from + i * kWidth<W>));
    return;
  }
  T part[kBlock<W>];
  for (int64_t i = 0; i < n; ++i) part[i] = from[i * stride];
  const Block<W> block = load<W>(part, n);
  for (int i = 0; i < kVectors && i * kWidth<W> < n; ++i)
    store_lanes(to + i * kWidth<W>, block.v[i]);
}

template <typename T, typename W>
DR_INLINE void scatter_block(const W* from, int64_t n, T* to, int64_t stride) {
  T part[kBlock<W>];
  store(part, load<W>(from, n), n);
  for (int64_t i = 0; i < n; ++i) to[i * stride] = part[i];
}

// Channels d .. of one row, block by block: run(channel, channels of the block, its place in the
// panel).
template <typename W, typename Run>
DR_INLINE void each_block(const Panel<W>& panel, int64_t row, int64_t begin, int64_t width,
                          Run run) {
  for (int64_t c = begin; c < width;) {
    const int64_t in_tile = c % kTile,
                  left = width - c < kTile - in_tile ? width - c : kTile - in_tile;
    const int64_t n = left < kBlock<W> ? left : int64_t(kBlock<W>);
    run(c, n, panel.at(row, c - in_tile) + in_tile);
    c += n;
  }
}

// Tokens that follow each other in memory, from the row `first` of a block on.
DR_INLINE int64_t run_of(const StridedRows& rows, const Place* places, int64_t first,
                         int64_t count) {
  int64_t n = 1;
  while (rows.stride_token == 1 && first + n < count &&
         places[first + n].entry == places[first].entry &&
         places[first + n].token == places[first].token + n)
    ++n;
  return n;
}

// Squares of kWidth tokens and channels go through registers, the rest value by value.
template <bool kScatter, typename T>
static void move_runs(const StridedRows& rows, const Place* places, int64_t count, int64_t width,
                      const Panel<float>& panel) {
  constexpr int kSide = kWidth<float>;
  const int64_t whole = width / kSide * kSide;
  for (int64_t first = 0, n; first < count; first += n) {
    n = run_of(rows, places, first, count);
    T* data = row_at<T>(rows, places[first]);
    const int64_t squares = n / kSide * kSide;
    for (int64_t c = 0; c < whole; c += kSide)
      for (int64_t t = 0; t < squares; t += kSide) {
        VF square[kSide];
        T* outside = data + t + c * rows.stride_channel;
        float* inside = panel.at(first + t, c / kTile * kTile) + c % kTile;
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i)
          square[i] = kScatter ? load_lanes(inside + i * kTile)
                               : load_lanes(outside + i * rows.stride_channel);
        transpose_lanes(square);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i)
          if constexpr (kScatter)
            store_lanes(outside + i * rows.stride_channel, square[i]);
          else
            store_lanes(inside + i * kTile, square[i]);
      }
    for (int64_t t = 0; t < n; ++t) {
      T* row = data + t * rows.stride_token;
      each_block(panel, first + t, t < squares ? whole : 0, width,
                 [&](int64_t c, int64_t n, float* inside) {
                   T* outside = row + c * rows.stride_channel;
                   if constexpr (kScatter)
                     scatter_block(inside, n, outside, rows.stride_channel);
                   else
                     gather_block(outside, rows.stride_channel, n, inside);
                 });
    }
  }
}

template <typename T, typename W>
DR_INLINE void gather(const StridedRows& rows, const Place* places, int64_t count, int64_t width,
                      const Panel<W>& panel) {
  if constexpr (__is_same(W, float)) {
    if (rows.stride_token == 1 && rows.stride_channel != 1)
      return move_runs<false, T>(rows, places, count, width, panel);
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* row = row_at<T>(rows, places[i]);
    each_block(panel, i, 0, width, [&](int64_t c, int64_t n, W* inside) {
      gather_block(row + c * rows.stride_channel, rows.stride_channel, n, inside);
    });
  }
}

template <typename T, typename W>
DR_INLINE void scatter(const StridedRows& rows, const Place* places, int64_t count, int64_t width,
                       const Panel<W>& panel) {
  if constexpr (__is_same(W, float)) {
    if (rows.stride_token == 1) return move_runs<true, T>(rows, places, count, width, panel);
  }
  for (int64_t i = 0; i < count; ++i) {
    T* row = row_at<T>(rows, places[i]);
    each_block(panel, i, 0, width, [&](int64_t c, int64_t n, W* inside) {
      scatter_block(inside, n, row + c * rows.stride_channel, rows.stride_channel);
    });
  }
}

// The bits of one row.
template <typename T>
DR_INLINE void copy_row(const StridedRows& from, const StridedRows& to, Place at, int64_t width) {
  if (!to.data || from.data == to.data) return;
  const T* source = row_at<T>(from, at);
  T* target = row_at<T>(to, at);
  if (from.stride_channel == 1 && to.stride_channel == 1) {
    __builtin_memcpy(target, source, std::size_t(width) * sizeof(T));
    return;
  }
  for (int64_t c = 0; c < width; ++c)
    target[c * to.stride_channel] = source[c * from.stride_channel];
}

}  // namespace
}  // namespace dreamreader
