// CPU side of the moments: how rows are cut into pieces, and adding the pieces up. At the foot its
// binding.
#include "moments.h"

#include <algorithm>
#include <memory>

#include "op.h"

namespace dreamreader {
namespace {

// Depends on the shape alone. A piece of less than 64 blocks is not worth its own sums.
void divide(MomentsJob& job) {
  const int64_t bytes = std::max<int64_t>(1, job.count * job.x.width * 2 * int64_t(sizeof(double)));
  const int64_t most = std::min(
      {kMomentsPieces / job.tiles, job.x.tokens / (64 * kMomentsBlock), kMomentsBytes / bytes});
  const int64_t blocks = (job.x.tokens + kMomentsBlock - 1) / kMomentsBlock;
  const int64_t each = (blocks + std::max<int64_t>(1, most) - 1) / std::max<int64_t>(1, most);
  job.piece_rows = std::max<int64_t>(1, each) * kMomentsBlock;
  job.pieces = std::max<int64_t>(1, (job.x.tokens + job.piece_rows - 1) / job.piece_rows);
}

void add_up(const double* parts, int64_t pieces, double* sums, int64_t size) {
  std::copy_n(parts, size, sums);
  for (int64_t piece = 1; piece < pieces; ++piece)
    for (int64_t i = 0; i < size; ++i) sums[i] += parts[piece * size + i];
}

void run_cpu(MomentsJob job, int64_t* seen, int threads) {
  std::fill(seen, seen + job.count, 0);
  for (int64_t row = 0; row < job.x.tokens; ++row) {
    const int64_t label = job.labels[row * job.stride_label];
    require(label < job.count, "moments: a label is outside the table");
    if (label >= 0) ++seen[label];
  }
  const int64_t size = job.count * job.x.width;
  if (size == 0) return;
  job.tiles = (job.x.width + kMomentsTile - 1) / kMomentsTile;
  divide(job);
  double *total = job.total, *square = job.square;
  std::unique_ptr<double[]> totals, squares;  // every piece begins by writing zeros to its own
  if (job.pieces > 1) {
    totals = std::make_unique_for_overwrite<double[]>(size_t(job.pieces * size));
    job.total = totals.get();
    if (square) {
      squares = std::make_unique_for_overwrite<double[]>(size_t(job.pieces * size));
      job.square = squares.get();
    }
  }
  const auto run = moments_kernels().run[job.x.dtype];
  share(job.pieces * job.tiles, 1, threads,
        [&](int64_t first, int64_t last) { run(job, first, last); });
  if (job.pieces == 1) return;
  add_up(totals.get(), job.pieces, total, size);
  if (square) add_up(squares.get(), job.pieces, square, size);
}

bool dense_doubles(const TensorView& t, int64_t features) {
  return t.dims() == 2 && t.size(1) == features && t.is(kDLFloat, 64) && dense(t);
}

void moments_cpu(py::handle x, py::handle labels, py::handle shift, py::handle seen,
                 py::handle total, py::handle square, int threads) {
  const TensorView in(x), names(labels), from(shift), counts(seen), sums(total), squares(square);
  require(in.dims() == 2, "moments: x must be [rows, features]");
  const int64_t rows = in.size(0), features = in.size(1);
  require(names.dims() == 1 && names.size(0) == rows && names.is(kDLInt, 64),
          "moments: labels must be int64 [rows]");
  require(from.dims() == 1 && from.size(0) == features && from.is(kDLFloat, 64) &&
              (features <= 1 || from.stride(0) == 1),
          "moments: shift must be dense float64 [features]");
  require(
      counts.dims() == 1 && counts.is(kDLInt, 64) && (counts.size(0) <= 1 || counts.stride(0) == 1),
      "moments: counts must be dense int64 [labels]");
  require(dense_doubles(sums, features) && sums.size(0) == counts.size(0) &&
              dense_doubles(squares, features) &&
              (squares.size(0) == 0 || squares.size(0) == counts.size(0)),
          "moments: sums must be dense float64 [labels, features]");
  for (const TensorView* each : {&in, &names, &from, &counts, &sums, &squares})
    require(each->device().type == kDLCPU, "moments_cpu: a tensor is not in CPU memory");
  MomentsJob job{};
  job.x = rows_of(in, "moments");
  job.labels = reinterpret_cast<const int64_t*>(names.data());
  job.stride_label = names.stride(0);
  job.count = counts.size(0);
  job.shift = reinterpret_cast<const double*>(from.data());
  job.total = reinterpret_cast<double*>(sums.data());
  job.square = squares.size(0) ? reinterpret_cast<double*>(squares.data()) : nullptr;
  py::gil_scoped_release release;
  run_cpu(job, reinterpret_cast<int64_t*>(counts.data()), threads);
}

Bind bind_moments([](py::module_& m) { m.def("moments_cpu", &moments_cpu); });

}  // namespace
}  // namespace dreamreader
