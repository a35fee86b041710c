// Rows of an activation as dense rows in the arithmetic type, and back.
#pragma once

#include "low_rank_tile_simd.h"

namespace dreamreader {
namespace {

struct Place {
  int64_t entry, token;
};

template <typename T>
DR_INLINE T* row_at(const LowRankRows& rows, Place at) {
  return static_cast<T*>(rows.data) + row_offset(rows, at.entry, at.token);
}

// Whether the kernel can work in the memory of the rows.
template <typename T>
DR_INLINE bool direct(const LowRankRows& rows) {
  return __is_same(T, typename Work<T>::type) && rows.stride_channel == 1;
}

template <typename T, typename W>
DR_INLINE void gather_row(const T* from, int64_t stride, int64_t begin, int64_t width, W* to) {
  for (int64_t c = begin; c < width; c += kBlock<W>) {
    const int64_t n = width - c < kBlock<W> ? width - c : int64_t(kBlock<W>);
    T part[kBlock<W>];
    const T* dense = stride == 1 ? from + c : part;
    for (int64_t i = 0; stride != 1 && i < n; ++i) part[i] = from[(c + i) * stride];
    store(to + c, load<W>(dense, n), n);
  }
}

template <typename T, typename W>
DR_INLINE void scatter_row(const W* from, int64_t begin, int64_t width, T* to, int64_t stride) {
  for (int64_t c = begin; c < width; c += kBlock<W>) {
    const int64_t n = width - c < kBlock<W> ? width - c : int64_t(kBlock<W>);
    T part[kBlock<W>];
    store(part, load<W>(from + c, n), n);
    for (int64_t i = 0; i < n; ++i) to[(c + i) * stride] = part[i];
  }
}

// Tokens that follow each other in memory, from the row `first` of a block on.
DR_INLINE int64_t run_of(const LowRankRows& rows, const Place* places, int64_t first,
                         int64_t count) {
  int64_t n = 1;
  while (rows.stride_token == 1 && first + n < count &&
         places[first + n].entry == places[first].entry &&
         places[first + n].token == places[first].token + n)
    ++n;
  return n;
}

// Squares of kWidth tokens and channels go through registers, the rest value by value.
template <typename T>
static void gather_runs(const LowRankRows& rows, const Place* places, int64_t count, int64_t width,
                        float* const* to) {
  constexpr int kSide = kWidth<float>;
  const int64_t whole = width / kSide * kSide;
  for (int64_t first = 0, n; first < count; first += n) {
    n = run_of(rows, places, first, count);
    const T* from = row_at<T>(rows, places[first]);
    const int64_t squares = n / kSide * kSide;
    for (int64_t c = 0; c < whole; c += kSide)
      for (int64_t t = 0; t < squares; t += kSide) {
        VF square[kSide];
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i)
          square[i] = load_lanes(from + t + (c + i) * rows.stride_channel);
        transpose_lanes(square);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) store_lanes(to[first + t + i] + c, square[i]);
      }
    for (int64_t t = 0; t < n; ++t)
      gather_row(from + t * rows.stride_token, rows.stride_channel, t < squares ? whole : 0, width,
                 to[first + t]);
  }
}

template <typename T>
static void scatter_runs(const LowRankRows& rows, const Place* places, int64_t count, int64_t width,
                         float* const* from) {
  constexpr int kSide = kWidth<float>;
  const int64_t whole = width / kSide * kSide;
  for (int64_t first = 0, n; first < count; first += n) {
    n = run_of(rows, places, first, count);
    T* to = row_at<T>(rows, places[first]);
    const int64_t squares = n / kSide * kSide;
    for (int64_t c = 0; c < whole; c += kSide)
      for (int64_t t = 0; t < squares; t += kSide) {
        VF square[kSide];
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) square[i] = load_lanes(from[first + t + i] + c);
        transpose_lanes(square);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i)
          store_lanes(to + t + (c + i) * rows.stride_channel, square[i]);
      }
    for (int64_t t = 0; t < n; ++t)
      scatter_row(from[first + t], t < squares ? whole : 0, width, to + t * rows.stride_token,
                  rows.stride_channel);
  }
}

// Points `to` at the rows: where they are, or at copies in scratch.
template <typename T, typename W>
DR_INLINE void gather(const LowRankRows& rows, const Place* places, int64_t count, int64_t width,
                      W* scratch, W** to) {
  const int64_t pitch = low_rank_pitch(width);
  for (int64_t i = 0; i < count; ++i) to[i] = scratch + i * pitch;
  if constexpr (__is_same(T, W)) {
    if (direct<T>(rows)) {
      for (int64_t i = 0; i < count; ++i) to[i] = row_at<T>(rows, places[i]);
      return;
    }
  }
  if constexpr (__is_same(W, float)) {
    if (rows.stride_token == 1 && rows.stride_channel != 1)
      return gather_runs<T>(rows, places, count, width, to);
  }
  for (int64_t i = 0; i < count; ++i)
    gather_row(row_at<T>(rows, places[i]), rows.stride_channel, 0, width, to[i]);
}

template <typename T, typename W>
DR_INLINE void scatter(const LowRankRows& rows, const Place* places, int64_t count, int64_t width,
                       W* const* from) {
  if constexpr (__is_same(W, float)) {
    if (rows.stride_token == 1) return scatter_runs<T>(rows, places, count, width, from);
  }
  for (int64_t i = 0; i < count; ++i)
    scatter_row(from[i], 0, width, row_at<T>(rows, places[i]), rows.stride_channel);
}

// The bits of one row.
template <typename T>
DR_INLINE void copy_row(const LowRankRows& from, const LowRankRows& to, Place at, int64_t width) {
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
