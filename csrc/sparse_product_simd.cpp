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
  W values[kRows];
  int count;
};

template <typename T>
DR_INLINE const T* row_of(const SparseMatrix& matrix, int64_t row) {
  return reinterpret_cast<const T*>(matrix.data) + row * matrix.stride;
}

// The next rows from entry e on, which moves on with them; `most` of them at most.
template <typename T, typename W>
DR_INLINE void gather(Group<T, W>& group, const SparseEntries& entries, const SparseMatrix& matrix,
                      const W* values, int64_t& e, int64_t end, int most, int64_t column) {
  group.count = 0;
  for (; e < end && group.count < most; ++e) {
    const int64_t index = entries.index[e];
    if (index < 0) continue;
    group.rows[group.count] = row_of<T>(matrix, index) + column;
    if (values) group.values[group.count] = values[e];
    ++group.count;
  }
  for (int r = 0; r < most; ++r) {  // of the next i too: it follows in memory
    const int64_t ahead = e + r < entries.slots ? entries.index[e + r] : 0;
    group.next[r] = row_of<T>(matrix, ahead < 0 ? 0 : ahead) + column;
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

template <typename T, typename W>
DR_INLINE void add_group(const Group<T, W>& group, W* sums, int64_t width) {
  switch (group.count) {
    case 8:
      return add_rows<8>(group, sums, width);
    case 7:
      return add_rows<7>(group, sums, width);
    case 6:
      return add_rows<6>(group, sums, width);
    case 5:
      return add_rows<5>(group, sums, width);
    case 4:
      return add_rows<4>(group, sums, width);
    case 3:
      return add_rows<3>(group, sums, width);
    case 2:
      return add_rows<2>(group, sums, width);
    case 1:
      return add_rows<1>(group, sums, width);
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

template <typename T>
void run_sums(const SparseSums& job, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const int64_t columns = job.matrix.d;
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
      add_group(group, sums, width);
    }
    const int64_t at = i * columns + column;
    if (job.wide) {
      give(sums, rounded, width, reinterpret_cast<W*>(job.out) + at, job.streamed);
    } else {
      T* part = reinterpret_cast<T*>(rounded);
      give(sums, part, width, reinterpret_cast<T*>(job.out) + at, job.streamed);
    }
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
    const T* left = row_of<T>(job.left, i);
    const int64_t end = job.entries.first[i + 1];
    for (int64_t e = job.entries.first[i]; e < end;) {
      Group<T, W> group;
      const int64_t begin = e;
      gather(group, job.entries, job.matrix, static_cast<const W*>(nullptr), e, end, kDots, 0);
      W dots[kDots] = {};
      if (group.count == kDots) {
        dot_rows<kDots>(group, left, job.matrix.d, dots);
      } else {
        for (int r = 0; r < group.count; ++r) {
          Group<T, W> one = group;
          one.rows[0] = group.rows[r];
          dot_rows<1>(one, left, job.matrix.d, dots + r);
        }
      }
      for (int64_t at = begin, r = 0; at < e; ++at)
        if (job.entries.index[at] >= 0) out[at] = dots[r++];
    }
  }
}

}  // namespace

namespace DR_ISA {

extern const SparseProductKernels sparse_product;
const SparseProductKernels sparse_product = {
    {run_sums<f16>, run_sums<bf16>, run_sums<float>, run_sums<double>},
    {run_dots<f16>, run_dots<bf16>, run_dots<float>, run_dots<double>}};

}  // namespace DR_ISA
}  // namespace dreamreader
