// CPU side of the products of sparse rows: their entries by column, and how work is shared out. At
// the foot the bindings.
#include "sparse_product.h"

#include <algorithm>
#include <string>
#include <vector>

#include "op.h"

namespace dreamreader {
namespace {

constexpr int64_t kGrainBytes = 256 << 10;    // of the matrix that one piece of work reads, about
constexpr int64_t kStreamedBytes = 16 << 20;  // a result from which on caches hold none of it
constexpr int64_t kSortPieces = 16, kSortEntries = 1 << 14;

bool dense_vector(const TensorView& t, uint8_t code, int bits) {
  return t.dims() == 1 && t.is(code, bits) && dense(t) && t.device().type == kDLCPU;
}

// Entries whose pointers and columns are safe to follow.
SparseEntries entries_of(const TensorView& row_ptr, const TensorView& columns, int64_t width) {
  require(dense_vector(row_ptr, kDLInt, 64) && row_ptr.size(0) >= 1,
          "sparse product: row_ptr must be dense int64 [rows + 1]");
  require(dense_vector(columns, kDLInt, 32), "sparse product: columns must be dense int32 [slots]");
  const SparseEntries found{reinterpret_cast<const int64_t*>(row_ptr.data()),
                            reinterpret_cast<const int32_t*>(columns.data()), row_ptr.size(0) - 1,
                            columns.size(0)};
  const int64_t last = found.first[found.count];
  if (last > found.slots)
    throw std::invalid_argument("sparse product: row_ptr counts " + std::to_string(last) +
                                " entries, there is room for " + std::to_string(found.slots) +
                                "; select them again with more slots");
  bool ascending = found.first[0] >= 0;
  for (int64_t i = 0; i < found.count; ++i) ascending &= found.first[i] <= found.first[i + 1];
  require(ascending, "sparse product: row_ptr must ascend from 0");
  int32_t largest = -1;
  for (int64_t e = 0; e < last; ++e) largest = std::max(largest, found.index[e]);
  if (largest >= width)
    throw std::invalid_argument("sparse product: an entry has column " + std::to_string(largest) +
                                ", there are " + std::to_string(width) + " columns");
  return found;
}

StridedRows matrix_of(const TensorView& x) {
  const StridedRows found = rows_of(x, "sparse product");
  require(x.dims() == 2 && x.device().type == kDLCPU && found.stride_channel == 1,
          "sparse product: a matrix must be [rows, d] with dense rows");
  return found;
}

// Whether `x` is of the arithmetic type of an element type.
bool is_wide(const TensorView& x, DType type) {
  return x.is(kDLFloat, type == DType::f64 ? 64 : 32);
}

const void* values_of(const TensorView& values, const SparseEntries& entries, DType type) {
  require(values.dims() == 1 && values.size(0) == entries.slots && dense(values) &&
              is_wide(values, type) && values.device().type == kDLCPU,
          "sparse product: values must be dense [slots] of the type that is computed in");
  return values.data();
}

// Entries of every column in ascending order of rows: a stable counting sort.
template <typename W>
struct ByColumn {
  std::vector<int64_t> first;  // [width + 1]
  Memory<int32_t> row;
  Memory<int64_t> slot;  // where it came from
  Memory<W> values;
};

// Rows are cut into pieces that depend on the shape alone; each counts and places its own entries.
template <typename W>
ByColumn<W> by_column(const SparseEntries& entries, const W* values, int64_t width, int threads) {
  const int64_t total = entries.first[entries.count];
  const int64_t pieces = std::clamp<int64_t>(total / kSortEntries, 1, kSortPieces);
  const auto piece_begin = [&](int64_t piece) {
    return std::lower_bound(entries.first, entries.first + entries.count, total * piece / pieces) -
           entries.first;
  };
  ByColumn<W> sorted{std::vector<int64_t>(size_t(width) + 1), allocate<int32_t>(size_t(total)),
                     allocate<int64_t>(size_t(total)), allocate<W>(size_t(total))};
  std::vector<int64_t> places(size_t(pieces * width));  // [piece, column]
  const auto each_piece = [&](const auto& visit) {
    share(pieces, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        int64_t* own = places.data() + piece * width;
        const int64_t last = piece + 1 < pieces ? piece_begin(piece + 1) : entries.count;
        for (int64_t i = piece_begin(piece); i < last; ++i)
          for (int64_t e = entries.first[i]; e < entries.first[i + 1]; ++e)
            if (entries.index[e] >= 0) visit(i, e, own[entries.index[e]]);
      }
    });
  };
  each_piece([](int64_t, int64_t, int64_t& count) { ++count; });
  int64_t at = 0;
  for (int64_t column = 0; column < width; ++column) {
    sorted.first[size_t(column)] = at;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t count = places[size_t(piece * width + column)];
      places[size_t(piece * width + column)] = at;
      at += count;
    }
  }
  sorted.first[size_t(width)] = at;
  each_piece([&](int64_t i, int64_t e, int64_t& place) {
    sorted.row.get()[place] = int32_t(i);
    sorted.slot.get()[place] = e;
    sorted.values.get()[place++] = values[e];
  });
  return sorted;
}

// Whole rows, as written memory is cheapest in long pieces; but where one i has so many entries
// that it would hold up all the others, strips of columns that threads share. No result depends on
// it.
int64_t strip_of(const SparseSums& job, int threads) {
  const SparseEntries& entries = job.entries;
  int64_t most = 0;
  for (int64_t i = 0; i < entries.count; ++i)
    most = std::max(most, entries.first[i + 1] - entries.first[i]);
  const int64_t fair = entries.slots / (8 * threads) + 1;
  const int64_t each = job.matrix.width / ((most + fair - 1) / fair + 1);
  return most <= fair ? kSparseStrip : std::clamp<int64_t>(each / 64 * 64, 64, kSparseStrip);
}

// Shares the weighted sums out.
void run_sums(SparseSums& job, DType type, int threads) {
  const int64_t d = job.matrix.width, count = job.entries.count;
  if (d == 0 || count == 0) return;
  const int64_t strips = (d + job.strip - 1) / job.strip;
  const int64_t entries = std::max<int64_t>(1, job.entries.first[count] / count);
  const int64_t bytes = entries * std::min(d, job.strip) * size_of(type);
  const auto run = sparse_product_kernels().sums[type];
  share(strips * count, std::max<int64_t>(1, kGrainBytes / bytes), threads,
        [&](int64_t first, int64_t last) { run(job, first, last); });
}

// Checks and sets what the result needs.
void set_out(SparseSums& job, const TensorView& out, DType type) {
  job.wide = is_wide(out, type);
  require(
      out.dims() == 2 && out.size(0) == job.entries.count && out.size(1) == job.matrix.width &&
          dense(out) && out.device().type == kDLCPU &&
          (job.wide || float_type(out, "sparse product") == type),
      "sparse product: out must be dense [rows, d] of the type of the matrix or the one that is "
      "computed in");
  job.out = out.data();
}

void sparse_decode_cpu(py::handle row_ptr, py::handle columns, py::handle values, py::handle weight,
                       py::object bias, py::handle out, int threads) {
  const TensorView pointers(row_ptr), indices(columns), numbers(values), table(weight), to(out);
  const DType type = float_type(table, "sparse product");
  SparseSums job{};
  job.matrix = matrix_of(table);
  job.entries = entries_of(pointers, indices, job.matrix.tokens);
  job.values = values_of(numbers, job.entries, type);
  if (!bias.is_none()) {
    const TensorView start(bias);
    require(start.dims() == 1 && start.size(0) == job.matrix.width && dense(start) &&
                is_wide(start, type) && start.device().type == kDLCPU,
            "sparse product: bias must be dense [d] of the type that is computed in");
    job.start = start.data();
  }
  job.strip = kSparseStrip;
  set_out(job, to, type);
  py::gil_scoped_release release;
  run_sums(job, type, threads);
}

void sparse_outer_cpu(py::handle row_ptr, py::handle columns, py::handle values, py::handle rows,
                      py::handle out, int threads) {
  const TensorView pointers(row_ptr), indices(columns), numbers(values), table(rows), to(out);
  const DType type = float_type(table, "sparse product");
  require(to.dims() == 2, "sparse product: out must be [width, d]");
  const int64_t width = to.size(0);
  const SparseEntries entries = entries_of(pointers, indices, width);
  SparseSums job{};
  job.matrix = matrix_of(table);
  require(job.matrix.tokens == entries.count && entries.count <= INT32_MAX,
          "sparse product: there must be one row for each row of the entries, below 2^31");
  const void* own = values_of(numbers, entries, type);
  job.entries.count = width;
  set_out(job, to, type);
  job.streamed = width * job.matrix.width * size_of(type) >= kStreamedBytes;
  py::gil_scoped_release release;
  by_work(type, [&](auto zero) {
    const auto sorted = by_column(entries, static_cast<const decltype(zero)*>(own), width, threads);
    job.entries = {sorted.first.data(), sorted.row.get(), width, sorted.first[size_t(width)]};
    job.values = sorted.values.get();
    job.strip = strip_of(job, threads);
    run_sums(job, type, threads);
  });
}

void sparse_dots_cpu(py::handle row_ptr, py::handle columns, py::handle rows, py::handle weight,
                     py::handle out, int threads) {
  const TensorView pointers(row_ptr), indices(columns), left(rows), table(weight), to(out);
  const DType type = float_type(table, "sparse product");
  SparseDots job{};
  job.matrix = matrix_of(table);
  job.left = matrix_of(left);
  job.entries = entries_of(pointers, indices, job.matrix.tokens);
  require(job.left.dtype == type && job.left.width == job.matrix.width &&
              job.left.tokens == job.entries.count,
          "sparse product: rows must be [rows, d] of the type of the weight");
  require(to.dims() == 1 && to.size(0) == job.entries.slots && dense(to) && is_wide(to, type) &&
              to.device().type == kDLCPU,
          "sparse product: out must be dense [slots] of the type that is computed in");
  job.out = to.data();
  const int64_t count = job.entries.count, total = job.entries.first[count];
  py::gil_scoped_release release;
  const int64_t bytes =
      size_of(type) * job.matrix.width * std::max<int64_t>(1, total / std::max<int64_t>(1, count));
  std::fill_n(to.data(), size_t(job.entries.slots) * (type == DType::f64 ? 8 : 4), 0);
  const auto run = sparse_product_kernels().dots[type];
  share(count, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes)), threads,
        [&](int64_t first, int64_t last) { run(job, first, last); });
}

void sparse_decode_backward_cpu(py::handle grad, py::handle row_ptr, py::handle columns,
                                py::handle values, py::handle weight, py::handle d_values,
                                py::handle d_weight, int threads) {
  const TensorView g(grad), pointers(row_ptr), indices(columns), numbers(values), table(weight);
  const TensorView to_values(d_values), to_weight(d_weight);
  SparseBoth job{};
  SparseSums& sums = job.sums;
  sums.matrix = matrix_of(g);
  job.weight = matrix_of(table);
  const DType type = sums.matrix.dtype;
  const int64_t width = job.weight.tokens, d = job.weight.width;
  const SparseEntries entries = entries_of(pointers, indices, width);
  require(sums.matrix.tokens == entries.count && entries.count <= INT32_MAX &&
              sums.matrix.width == d && job.weight.dtype == type && d <= kSparseStrip,
          "sparse product: grad must be [rows, d] of the type of the weight, d at most 8192");
  const void* own = values_of(numbers, entries, type);
  values_of(to_values, entries, type);
  job.dots = to_values.data();
  sums.entries.count = width;
  set_out(sums, to_weight, type);
  sums.streamed = width * d * size_of(type) >= kStreamedBytes;
  py::gil_scoped_release release;
  std::fill_n(to_values.data(), size_t(entries.slots) * (type == DType::f64 ? 8 : 4), 0);
  by_work(type, [&](auto zero) {
    const auto sorted = by_column(entries, static_cast<const decltype(zero)*>(own), width, threads);
    sums.entries = {sorted.first.data(), sorted.row.get(), width, sorted.first[size_t(width)]};
    sums.values = sorted.values.get();
    job.slot = sorted.slot.get();
    const auto run = sparse_product_kernels().both[type];
    const int64_t bytes =
        size_of(type) * d * (1 + sums.entries.slots / std::max<int64_t>(1, width));
    share(width, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes)), threads,
          [&](int64_t first, int64_t last) { run(job, first, last); });
  });
}

template <typename W>
void add_by_column(const SparseEntries& entries, const void* values, void* out, int64_t width) {
  W* sums = static_cast<W*>(out);
  std::fill_n(sums, width, W(0));
  for (int64_t e = entries.first[0]; e < entries.first[entries.count]; ++e)
    if (entries.index[e] >= 0) sums[entries.index[e]] += static_cast<const W*>(values)[e];
}

void sparse_column_sums_cpu(py::handle row_ptr, py::handle columns, py::handle values,
                            py::handle out) {
  const TensorView pointers(row_ptr), indices(columns), numbers(values), to(out);
  require(to.dims() == 1 && dense(to) && to.device().type == kDLCPU,
          "sparse product: out must be dense [width]");
  const DType type = float_type(to, "sparse product");
  const int64_t width = to.size(0);
  const SparseEntries entries = entries_of(pointers, indices, width);
  const void* own = values_of(numbers, entries, type);
  require(is_wide(to, type), "sparse product: sums are of the type that is computed in");
  py::gil_scoped_release release;
  by_work(type, [&](auto zero) { add_by_column<decltype(zero)>(entries, own, to.data(), width); });
}

Bind bind_sparse_product([](py::module_& m) {
  m.def("sparse_decode_cpu", &sparse_decode_cpu);
  m.def("sparse_dots_cpu", &sparse_dots_cpu);
  m.def("sparse_outer_cpu", &sparse_outer_cpu);
  m.def("sparse_decode_backward_cpu", &sparse_decode_backward_cpu);
  m.def("sparse_column_sums_cpu", &sparse_column_sums_cpu);
});

}  // namespace
}  // namespace dreamreader
