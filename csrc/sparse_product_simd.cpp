// Products of sparse rows for one instruction set; compiled once for each (CMakeLists.txt sets
// DR_ISA).
#include "simd.h"
#include "sparse_product.h"

namespace dreamreader {
namespace {

constexpr int kRows = 8;  // of the matrix in flight

// Rows of a matrix that are worked on together, and those that follow them.
template <typename T, typename W>
struct Group {
  const T* rows[kRows];
  const T* next[kRows];
  W values[kRows] = {};
  int count;
};

// The next rows from entry e on, which moves on with them; `most` of them at most.
template <typename T, typename W>
DR_INLINE void gather(Group<T, W>& group, const SparseEntries& entries, const StridedRows& matrix,
                      const W* values, int64_t& e, int64_t end, int most, int64_t column) {
  group.count = 0;
  for (; e < end && group.count < most; ++e) {
    const int64_t index = entries.index[e];
    if (index < 0) continue;
    group.rows[group.count] = row_at<const T>(matrix, 0, index) + column;
    if (values) group.values[group.count] = values[e];
    ++group.count;
  }
  for (int r = 0; r < most; ++r) {  // of the next i too: it follows in memory
    const int64_t ahead = e + r < entries.slots ? entries.index[e + r] : 0;
    group.next[r] = row_at<const T>(matrix, 0, ahead < 0 ? 0 : ahead) + column;
  }
}

// Into the second cache: the first holds the sums.
template <typename T, typename W>
DR_INLINE void prefetch(const T* p) {
#pragma GCC unroll 4
  for (int i = 0; i < kBlock<W> * int(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i, 0, 2);
}

template <int kCount, typename T, typename W>
DR_INLINE void add_rows(const Group<T, W>& group, W* sums, int64_t width) {
  for (int64_t d = 0; d < width; d += kBlock<W>) {
    Block<W> sum = load<W>(sums + d, kBlock<W>);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      prefetch<T, W>(group.next[r] + d);
      const Block<W> row = load<W>(group.rows[r] + d, width - d);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) sum.v[i] += row.v[i] * group.values[r];
    }
    store(sums + d, sum, kBlock<W>);
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// call(Count<count>) for a count from 1 to kMost; the largest, which is the usual one, first.
template <int kMost, typename Call>
DR_INLINE void with_count(int count, Call call) {
  if (count == kMost) {
    call(Count<kMost>{});
  } else if constexpr (kMost > 1) {
    with_count<kMost - 1>(count, call);
  }
}

// Rounds sums to T and writes them.
template <typename T, typename W>
DR_INLINE void give(const W* sums, T* rounded, int64_t width, T* out, bool streamed) {
  T* to = streamed ? rounded : out;
  for (int64_t d = 0; d < width; d += kBlock<W>)
    store(to + d, load<W>(sums + d, kBlock<W>), width - d);
  if (streamed) copy_past_caches(out, rounded, std::size_t(width) * sizeof(T));
}

// Sums as the part of the result from element `at` on.
template <typename T, typename W>
DR_INLINE void write(const SparseSums& job, int64_t at, int64_t width, const W* sums, W* scratch) {
  if (job.wide) {
    give(sums, scratch, width, reinterpret_cast<W*>(job.out) + at, job.streamed);
  } else {
    T* rounded = reinterpret_cast<T*>(scratch);
    give(sums, rounded, width, reinterpret_cast<T*>(job.out) + at, job.streamed);
  }
}

template <typename T>
void run_sums(const SparseSums& job, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const int64_t columns = job.matrix.width;
  const W* values = static_cast<const W*>(job.values);
  const W* start = static_cast<const W*>(job.start);
  alignas(64) W sums[kSparseStrip];
  alignas(64) W rounded[kSparseStrip];
  for (int64_t item = first; item < last; ++item) {
    const int64_t i = item % job.entries.count, column = item / job.entries.count * job.strip;
    const int64_t width = columns - column < job.strip ? columns - column : job.strip;
    const int64_t whole = (width + kBlock<W> - 1) / kBlock<W> * kBlock<W>;
    for (int64_t d = 0; d < whole; d += kBlock<W>)
      store(sums + d, start ? load<W>(start + column + d, width - d) : Block<W>{}, kBlock<W>);
    const int64_t end = job.entries.first[i + 1];
    for (int64_t e = job.entries.first[i]; e < end;) {
      Group<T, W> group;
      gather(group, job.entries, job.matrix, values, e, end, kRows, column);
      with_count<kRows>(group.count,
                        [&](auto n) { add_rows<decltype(n)::value>(group, sums, width); });
    }
    write<T>(job, i * columns + column, width, sums, rounded);
  }
  if (job.streamed) end_past_caches();
}

constexpr int kDots = DR_VECTOR_BYTES == 64 ? 4 : 1;  // sums of blocks that fit the registers

template <int kCount, typename T, typename W>
DR_INLINE void dot_rows(const Group<T, W>& group, const T* left, int64_t width, W* dots) {
  Block<W> sums[kCount] = {};
  for (int64_t d = 0; d < width; d += kBlock<W>) {
    const Block<W> x = load<W>(left + d, width - d);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      prefetch<T, W>(group.next[r] + d);
      const Block<W> row = load<W>(group.rows[r] + d, width - d);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) sums[r].v[i] += row.v[i] * x.v[i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) dots[r] = sum(sums[r]);
}

template <typename T>
void run_dots(const SparseDots& job, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  W* out = static_cast<W*>(job.out);
  for (int64_t i = first; i < last; ++i) {
    const T* left = row_at<const T>(job.left, 0, i);
    const int64_t end = job.entries.first[i + 1];
    for (int64_t e = job.entries.first[i]; e < end;) {
      Group<T, W> group;
      const int64_t begin = e;
      gather(group, job.entries, job.matrix, static_cast<const W*>(nullptr), e, end, kDots, 0);
      W dots[kDots] = {};
      if (group.count == kDots) {
        dot_rows<kDots>(group, left, job.matrix.width, dots);
      } else {
        for (int r = 0; r < group.count; ++r) {
          Group<T, W> one = group;
          one.rows[0] = group.rows[r];
          dot_rows<1>(one, left, job.matrix.width, dots + r);
        }
      }
      for (int64_t at = begin, r = 0; at < e; ++at)
        if (job.entries.index[at] >= 0) out[at] = dots[r++];
    }
  }
}

// Adds weighted rows to the sums, and gives the dot of each with `left`.
template <int kCount, typename T, typename W>
DR_INLINE void add_and_dot(const Group<T, W>& group, const T* left, W* sums, int64_t width,
                           W* dots) {
  Block<W> products[kCount] = {};
  for (int64_t d = 0; d < width; d += kBlock<W>) {
    Block<W> sum = load<W>(sums + d, kBlock<W>);
    const Block<W> x = load<W>(left + d, width - d);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      prefetch<T, W>(group.next[r] + d);
      const Block<W> row = load<W>(group.rows[r] + d, width - d);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        products[r].v[i] += row.v[i] * x.v[i];
        sum.v[i] += row.v[i] * group.values[r];
      }
    }
    store(sums + d, sum, kBlock<W>);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) dots[r] = sum(products[r]);
}

template <typename T>
void run_both(const SparseBoth& job, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const SparseSums& own = job.sums;
  const SparseEntries& entries = own.entries;
  const int64_t width = own.matrix.width;
  const W* values = static_cast<const W*>(own.values);
  alignas(64) W sums[kSparseStrip];
  alignas(64) W rounded[kSparseStrip];
  for (int64_t i = first; i < last; ++i) {
    for (int64_t d = 0; d < width; d += kBlock<W>) store(sums + d, Block<W>{}, kBlock<W>);
    const T* left = row_at<const T>(job.weight, 0, i);
    if (i + 1 < entries.count && entries.first[i + 1] < entries.first[i + 2])
      for (int64_t d = 0; d < width; d += kBlock<W>)
        prefetch<T, W>(row_at<const T>(job.weight, 0, i + 1) + d);
    const int64_t end = entries.first[i + 1];
    for (int64_t e = entries.first[i]; e < end;) {
      Group<T, W> group;
      const int64_t* slot = job.slot + e;
      W dots[kDots] = {};
      gather(group, entries, own.matrix, values, e, end, kDots, 0);
      with_count<kDots>(group.count, [&](auto n) {
        add_and_dot<decltype(n)::value>(group, left, sums, width, dots);
      });
      for (int r = 0; r < group.count; ++r) static_cast<W*>(job.dots)[slot[r]] = dots[r];
    }
    write<T>(own, i * width, width, sums, rounded);
  }
  if (own.streamed) end_past_caches();
}

}  // namespace

namespace DR_ISA {

extern const SparseProductKernels sparse_product;
const SparseProductKernels sparse_product = {DR_BY_TYPE(run_sums), DR_BY_TYPE(run_dots),
                                             DR_BY_TYPE(run_both)};

}  // namespace DR_ISA
}  // namespace dreamreader
