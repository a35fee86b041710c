// Moments of labelled rows for one instruction set; compiled once for each (CMakeLists.txt sets
// DR_ISA).
#include "doubles_simd.h"
#include "moments.h"

namespace dreamreader {
namespace {

template <typename T>
constexpr int kLine = 64 / int(sizeof(T));  // features in a cache line
constexpr int kRun = 8;  // rows whose sum enters the accumulators at once: one access for all
constexpr int64_t kStrip = 640;  // features whose sums are worked on together

// Adds `width` features of kRows rows to the accumulators. Meanwhile the same features are fetched
// `ahead` elements further, into the second cache: into the first, which holds the accumulators, it
// is a third slower.
template <typename T, int kRows, bool kSquares>
DR_INLINE void add_rows(const T* const* rows, int64_t ahead, const double* shift, double* total,
                        double* square, int64_t width) {
  int64_t d = 0;
  for (; d + kLine<T> <= width; d += kLine<T>) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[r] + d + ahead, 0, 2);
#pragma GCC unroll 16
    for (int64_t e = d; e < d + kLine<T>; e += kDoubles) {
      const VD s = load_doubles(shift + e);
      VD sum = load_doubles(rows[0] + e) - s, squares = sum * sum;
#pragma GCC unroll 8
      for (int r = 1; r < kRows; ++r) {
        const VD x = load_doubles(rows[r] + e) - s;
        sum += x;
        if constexpr (kSquares) squares += x * x;
      }
      store_lanes(total + e, load_doubles(total + e) + sum);
      if constexpr (kSquares) store_lanes(square + e, load_doubles(square + e) + squares);
    }
  }
  for (; d < width; d += kDoubles) {
    const int64_t n = width - d < kDoubles ? width - d : kDoubles;
    const std::size_t bytes = std::size_t(n) * sizeof(double);
    double s[kDoubles] = {}, sum[kDoubles] = {}, squares[kDoubles] = {};
    __builtin_memcpy(s, shift + d, bytes);
    __builtin_memcpy(sum, total + d, bytes);
    if constexpr (kSquares) __builtin_memcpy(squares, square + d, bytes);
    for (int r = 0; r < kRows; ++r) {
      T values[kDoubles] = {};
      __builtin_memcpy(values, rows[r] + d, std::size_t(n) * sizeof(T));
      const VD x = load_doubles(values) - load_doubles(s);
      store_lanes(sum, load_doubles(sum) + x);
      if constexpr (kSquares) store_lanes(squares, load_doubles(squares) + x * x);
    }
    __builtin_memcpy(total + d, sum, bytes);
    if constexpr (kSquares) __builtin_memcpy(square + d, squares, bytes);
  }
}

constexpr int64_t kSorted = 256;  // labels; of more, few rows of a block share one

// The rows begin .. end - 1 that have a label, up to kSorted labels ordered by it; returns how
// many.
DR_INLINE int64_t ordered(const MomentsJob& job, int64_t begin, int64_t end, int64_t* order) {
  int64_t starts[kSorted + 1], count = 0;
  const bool sorted = job.count <= kSorted;
  for (int64_t label = 0; sorted && label <= job.count; ++label) starts[label] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = job.labels[row * job.stride_label];
    if (label < 0) continue;
    if (sorted) {
      ++starts[label + 1];
    } else {
      order[count] = row;
    }
    ++count;
  }
  if (!sorted) return count;
  for (int64_t label = 1; label < job.count; ++label) starts[label] += starts[label - 1];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = job.labels[row * job.stride_label];
    if (label >= 0) order[starts[label]++] = row;
  }
  return count;
}

// Adds the rows order[0] .. order[count - 1], which have one label, from feature d on.
template <typename T, bool kSquares>
DR_INLINE void add_label(const MomentsJob& job, const int64_t* order, int64_t count, int64_t sums,
                         int64_t d, int64_t width) {
  const bool dense = job.x.stride_channel == 1;
  const int64_t ahead = dense ? kMomentsBlock * job.x.stride_token : 0;
  const T* x = row_at<T>(job.x, 0, 0) + d * job.x.stride_channel;
  double* total = job.total + sums + d;
  double* square = kSquares ? job.square + sums + d : nullptr;
  T part[kRun][kStrip];
  for (int64_t at = 0; at < count;) {
    const int64_t left = count - at;
    const int step = left >= 8 ? 8 : (left >= 4 ? 4 : (left >= 2 ? 2 : 1));
    const T* rows[kRun] = {};
    for (int r = 0; r < step; ++r) {
      const T* row = x + order[at + r] * job.x.stride_token;
      rows[r] = dense ? row : part[r];
      for (int64_t e = 0; !dense && e < width; ++e) part[r][e] = row[e * job.x.stride_channel];
    }
    switch (step) {
      case 8:
        add_rows<T, 8, kSquares>(rows, ahead, job.shift + d, total, square, width);
        break;
      case 4:
        add_rows<T, 4, kSquares>(rows, ahead, job.shift + d, total, square, width);
        break;
      case 2:
        add_rows<T, 2, kSquares>(rows, ahead, job.shift + d, total, square, width);
        break;
      default:
        add_rows<T, 1, kSquares>(rows, ahead, job.shift + d, total, square, width);
    }
    at += step;
  }
}

// One piece of rows, features from .. to - 1. A block of rows is read strip by strip: then the sums
// of a few labels stay in the first cache, and the block, fetched a block ago, is in the second.
template <typename T, bool kSquares>
void run_tile(const MomentsJob& job, int64_t piece, int64_t from, int64_t to) {
  int64_t last = (piece + 1) * job.piece_rows;
  if (last > job.x.tokens) last = job.x.tokens;
  for (int64_t begin = piece * job.piece_rows; begin < last; begin += kMomentsBlock) {
    const int64_t end = begin + kMomentsBlock < last ? begin + kMomentsBlock : last;
    int64_t order[kMomentsBlock];
    const int64_t count = ordered(job, begin, end, order);
    for (int64_t d = from; d < to; d += kStrip) {
      const int64_t width = to - d < kStrip ? to - d : kStrip;
      for (int64_t at = 0, next; at < count; at = next) {
        const int64_t label = job.labels[order[at] * job.stride_label];
        next = at + 1;
        while (next < count && job.labels[order[next] * job.stride_label] == label) ++next;
        const int64_t sums = (piece * job.count + label) * job.x.width;
        add_label<T, kSquares>(job, order + at, next - at, sums, d, width);
      }
    }
  }
}

template <typename T>
void run_moments(const MomentsJob& job, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; ++item) {
    const int64_t piece = item / job.tiles, d = item % job.tiles * kMomentsTile;
    const int64_t width = job.x.width - d < kMomentsTile ? job.x.width - d : kMomentsTile;
    for (int64_t label = 0; label < job.count; ++label) {
      const int64_t at = (piece * job.count + label) * job.x.width + d;
      __builtin_memset(job.total + at, 0, std::size_t(width) * sizeof(double));
      if (job.square) __builtin_memset(job.square + at, 0, std::size_t(width) * sizeof(double));
    }
    if (job.square) {
      run_tile<T, true>(job, piece, d, d + width);
    } else {
      run_tile<T, false>(job, piece, d, d + width);
    }
  }
}

}  // namespace

namespace DR_ISA {

extern const MomentsKernels moments;
const MomentsKernels moments = {DR_BY_TYPE(run_moments)};

}  // namespace DR_ISA
}  // namespace dreamreader
