// How packed rows are read: blocks of features of one place, for kernels that are compiled once per
// instruction set.
#pragma once

#include "pack_cpu.h"
#include "simd.h"

namespace dreamreader {
namespace {

template <typename W>
DR_INLINE void subtract(Block<W>& from, const Block<W>& block) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) from.v[i] -= block.v[i];
}

// Features that lie next to one another are read where they are. While one place is read, the next
// is fetched: rows that are apart in memory are no stream to the processor.
template <typename T>
class Dense {
 public:
  using W = typename Work<T>::type;
  static constexpr int kStrip = 8 * kBlock<W>;  // features that are worked on together
  static constexpr int kRows = 1;               // rows that are

  explicit Dense(const PackJob& job) : job_(job) {}

  DR_HD void until(int64_t place) { end_ = place; }
  DR_HD Block<W> at(int64_t place, int64_t d, int64_t n) const {
    if (place + 1 < end_) {
      const T* next = row(job_.x, place + 1) + d;
      constexpr int kLine = 64 / int(sizeof(T));
#pragma GCC unroll 4
      for (int i = 0; i < kBlock<W>; i += kLine) __builtin_prefetch(next + i);
    }
    Block<W> v = load<W>(row(job_.x, place) + d, n);
    if (job_.minus.data) subtract(v, load<W>(row(job_.minus, place) + d, n));
    return v;
  }

 private:
  DR_HD const T* row(const StridedRows& x, int64_t place) const {
    return row_at<T>(x, job_.places[2 * place], job_.places[2 * place + 1]);
  }

  const PackJob& job_;
  int64_t end_ = 0;
};

// Others are copied, a tile of places and features at a time. The places are read one after the
// other for each feature: there they share cache lines, while lines of several features that are
// a power of two apart push each other out.
template <typename T>
class Tiled {
 public:
  using W = typename Work<T>::type;
  static constexpr int kStrip = kBlock<W>;
  static constexpr int kRows = kPackTile;

  explicit Tiled(const PackJob& job) : job_(job) {}

  DR_HD void until(int64_t place) { end_ = place; }  // the tile may hold places below this one
  DR_HD Block<W> at(int64_t place, int64_t d, int64_t n) {
    if (d != d_ || place < first_ || place >= last_) fill(place, d, n);
    Block<W> v = load<W>(x_[place - first_], n);
    if (job_.minus.data) subtract(v, load<W>(minus_[place - first_], n));
    return v;
  }

 private:
  void fill(int64_t place, int64_t d, int64_t n) {
    first_ = place;
    last_ = end_ - place < kPackTile ? end_ : place + kPackTile;
    d_ = d;
    copy(x_, job_.x, n);
    if (job_.minus.data) copy(minus_, job_.minus, n);
  }

  void copy(T (*to)[kBlock<W>], const StridedRows& x, int64_t n) const {
    int64_t offsets[kPackTile];
    const int count = int(last_ - first_);
    for (int i = 0; i < count; ++i) {
      const int32_t* at = job_.places + 2 * (first_ + i);
      offsets[i] = row_offset(x, at[0], at[1]);
    }
    for (int64_t f = 0; f < n; ++f) {
      const T* from = static_cast<const T*>(x.data) + (d_ + f) * x.stride_channel;
      const int64_t ahead = f + 2 < n ? 2 * x.stride_channel : 0;
      for (int i = 0; i < count; ++i) {
        if (i % 4 == 0) __builtin_prefetch(from + offsets[i] + ahead);
        to[i][f] = from[offsets[i]];
      }
    }
  }

  const PackJob& job_;
  int64_t first_ = 0, last_ = 0, end_ = 0, d_ = -1;
  T x_[kPackTile][kBlock<W>], minus_[kPackTile][kBlock<W>];
};

}  // namespace
}  // namespace dreamreader
