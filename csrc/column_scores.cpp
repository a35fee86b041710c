// CPU side of the scores of columns: how the work is cut, and scores from sums. At the foot its
// binding.
#include "column_scores.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "op.h"

namespace dreamreader {
namespace {

enum class Score { l2, l2_squared, entropy, entropy_low };

Score score_of(const std::string& name) {
  if (name == "l2") return Score::l2;
  if (name == "l2_squared") return Score::l2_squared;
  if (name == "entropy") return Score::entropy;
  require(name == "entropy_low", "column_scores: score is l2, l2_squared, entropy or entropy_low");
  return Score::entropy_low;
}

double score(Score which, double first, double second) {
  if (which == Score::l2) return std::sqrt(first);
  if (which == Score::l2_squared) return first;
  if (first == 0) return 0;
  const double entropy = std::log(first) - second / first;
  return which == Score::entropy ? entropy : 1 / (1 + entropy);
}

void column_scores_cpu(py::handle x, const std::string& name, py::handle scores, int threads) {
  const TensorView in(x), out(scores);
  require(in.dims() == 2 && (in.size(1) <= 1 || in.stride(1) == 1),
          "column_scores: x must be [rows, columns], dense in a row");
  require(out.dims() == 1 && out.size(0) == in.size(1) && out.is(kDLFloat, 32) && dense(out),
          "column_scores: scores must be dense float32 [columns]");
  for (const TensorView* each : {&in, &out})
    require(each->device().type == kDLCPU, "column_scores_cpu: a tensor is not in CPU memory");
  const Score which = score_of(name);
  const DType type = float_type(in, "column_scores");
  ColumnScoresJob job{};
  job.x = in.data();
  job.rows = in.size(0);
  job.columns = in.size(1);
  job.stride_row = in.stride(0);
  auto* to = reinterpret_cast<float*>(out.data());
  py::gil_scoped_release release;
  job.tiles = (job.columns + kScoresTile - 1) / kScoresTile;
  // Depends on the shape alone: at most 16 pieces, of 64 rows or more.
  job.piece_rows = std::max<int64_t>(64, (job.rows + 15) / 16);
  job.pieces = std::max<int64_t>(1, (job.rows + job.piece_rows - 1) / job.piece_rows);
  const bool logs = which == Score::entropy || which == Score::entropy_low;
  const size_t size = size_t(job.pieces * job.columns);
  std::vector<double> first(size), second(logs ? size : 0);
  job.first = first.data();
  job.second = second.data();
  const ColumnScoresKernels& kernels = column_scores_kernels();
  const auto run = (logs ? kernels.logs : kernels.squares)[type];
  share(job.pieces * job.tiles, 1, threads,
        [&](int64_t begin, int64_t end) { run(job, begin, end); });
  for (int64_t c = 0; c < job.columns; ++c) {
    double one = 0, two = 0;
    for (int64_t piece = 0; piece < job.pieces; ++piece) {
      one += first[size_t(piece * job.columns + c)];
      if (logs) two += second[size_t(piece * job.columns + c)];
    }
    to[c] = float(score(which, one, two));
  }
}

Bind bind_column_scores([](py::module_& m) { m.def("column_scores_cpu", &column_scores_cpu); });

}  // namespace
}  // namespace dreamreader
