// CPU side of guidance by a probe: which rows are moved, tables and packed matrices, and how rows
// are divided. At the foot its binding.
#include "guide.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "op.h"

namespace dreamreader {
namespace {

const float* data_of(const TensorView& t) { return reinterpret_cast<const float*>(t.data()); }

// Rows of scratch memory are a cache line longer than they need, so that those of a power of two
// do not share their places in the cache.
int64_t guide_ld(int64_t size, int64_t panel) { return (size + panel - 1) / panel * panel + 16; }

int64_t guide_scratch(const GuideJob& job) {  // floats for each row of a block
  return job.ld_row + 5 * job.ld + job.ld_second;
}

// Everything that a job points to.
struct Tables {
  std::vector<int64_t> rows;
  std::vector<float> strength, bias, second_bias, head;
  std::vector<Memory<float>> packed;
};

void list_rows(const TensorView& strength, Tables& tables) {
  for (int64_t b = 0; b < strength.size(0); ++b)
    for (int64_t t = 0; t < strength.size(1); ++t) {
      const float s = data_of(strength)[b * strength.stride(0) + t * strength.stride(1)];
      if (s == 0.0f) continue;
      tables.rows.push_back(b * strength.size(1) + t);
      tables.strength.push_back(s);
    }
}

// [rows, ld] of a table with `size` columns, zeros beyond them.
std::vector<float> padded(const float* from, int64_t rows, int64_t stride_row, int64_t size,
                          int64_t stride, int64_t ld) {
  std::vector<float> found(size_t(rows * ld));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < size; ++i) found[row * ld + i] = from[row * stride_row + i * stride];
  return found;
}

// c W for every batch entry, [batch, ld]: the gradient for the last hidden layer.
std::vector<float> heads(const TensorView& c, const TensorView& weight, int64_t ld) {
  std::vector<float> found(size_t(c.size(0) * ld));
  std::vector<double> sums(size_t(weight.size(1)));
  for (int64_t b = 0; b < c.size(0); ++b) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t k = 0; k < c.size(1); ++k) {
      const double factor = data_of(c)[b * c.stride(0) + k * c.stride(1)];
      const float* row = data_of(weight) + k * weight.stride(0);
      for (size_t j = 0; j < sums.size(); ++j) sums[j] += factor * row[j * weight.stride(1)];
    }
    std::copy(sums.begin(), sums.end(), found.begin() + b * ld);
  }
  return found;
}

void add_matrix(GuideJob& job, Tables& tables, GuideMatrices which, const TensorView& from,
                bool turned, int64_t panel) {
  GuideMatrix& matrix = job.matrices[which];
  const int rows = turned ? 1 : 0, columns = 1 - rows;
  matrix = {data_of(from),     from.size(rows),      from.size(columns),
            from.stride(rows), from.stride(columns), nullptr};
  const int64_t panels = (matrix.columns + panel - 1) / panel;
  tables.packed.push_back(allocate<float>(size_t(panels * panel * matrix.depth)));
  matrix.packed = tables.packed.back().get();
}

void pack_all(const GuideJob& job, const GuideKernels& chosen, int threads) {
  for (const GuideMatrix& matrix : job.matrices) {
    if (!matrix.packed) continue;
    const int64_t panels = (matrix.columns + chosen.panel - 1) / chosen.panel;
    const int64_t bytes = chosen.panel * matrix.depth * int64_t(sizeof(float));
    share(panels, grain_of(panels, bytes, threads), threads,
          [&](int64_t first, int64_t last) { chosen.pack(matrix, first, last); });
  }
}

constexpr int64_t kScratchFloats = 128 << 10;  // of a block, about half of a core's second cache
constexpr int64_t kSerial = 1 << 16;           // products of a call that one thread does alone

// Rows of a block; what a row gets does not depend on it.
int64_t block_of(const GuideJob& job, int64_t tile, int threads) {
  const int64_t fair = (job.count + threads - 1) / std::max(threads, 1);
  const int64_t most =
      std::min({fair + tile - 1, kScratchFloats / guide_scratch(job), kGuideBlock});
  return std::max<int64_t>(most / tile, 1) * tile;
}

void check(const std::vector<TensorView>& weights, const std::vector<TensorView>& biases,
           const TensorView& x, const TensorView& gram, const TensorView& c,
           const TensorView& strength) {
  require(x.dims() == 3, "guide: x must be [batch, tokens, width]");
  require(weights.size() >= 1 && weights.size() <= 3 && biases.size() == weights.size(),
          "guide: 1 to 3 layers, each with a bias");
  int64_t inputs = x.size(2);
  for (size_t n = 0; n < weights.size(); ++n) {
    const TensorView &w = weights[n], &b = biases[n];
    require(w.is(kDLFloat, 32) && w.dims() == 2 && w.size(1) == inputs,
            "guide: a weight must be float32 [outputs, inputs]");
    inputs = w.size(0);
    require(b.is(kDLFloat, 32) && b.dims() == (n ? 1 : 3) && b.size(n ? 0 : 2) == inputs &&
                (n || (b.size(0) == x.size(0) && b.size(1) == 1)),
            "guide: a bias must be float32 [outputs], that of the first [batch, 1, outputs]");
  }
  require(c.is(kDLFloat, 32) && c.dims() == 2 && c.size(0) == x.size(0) && c.size(1) == inputs,
          "guide: coefficients must be float32 [batch, labels]");
  require(strength.is(kDLFloat, 32) && strength.dims() == 2 && strength.size(0) == x.size(0) &&
              strength.size(1) == x.size(1),
          "guide: strength must be float32 [batch, tokens]");
  const int64_t hidden = weights[0].size(0);
  require(gram.is(kDLFloat, 32) && gram.dims() == 2 && gram.size(0) == gram.size(1) &&
              (gram.size(0) == hidden || gram.size(0) == 0),
          "guide: gram must be float32 [hidden, hidden] or [0, 0]");
}

void fill_tables(GuideJob& job, Tables& tables, const std::vector<TensorView>& weights,
                 const std::vector<TensorView>& biases, const TensorView& gram, const TensorView& c,
                 int64_t panel) {
  job.layers = int(weights.size());
  job.hidden = weights[0].size(0);
  job.second = job.layers == 3 ? weights[1].size(0) : 0;
  job.ld_row = guide_ld(job.x.width, panel);
  job.ld = guide_ld(job.hidden, panel);
  job.ld_second = job.second ? guide_ld(job.second, panel) : 0;
  job.ld_head = job.layers == 3 ? job.ld_second : job.ld;
  const TensorView& b = biases[0];
  tables.bias = padded(data_of(b), c.size(0), b.stride(0), job.hidden, b.stride(2), job.ld);
  tables.head = job.layers == 1
                    ? padded(data_of(c), c.size(0), c.stride(0), job.hidden, c.stride(1), job.ld)
                    : heads(c, weights.back(), job.ld_head);
  add_matrix(job, tables, kUp, weights[0], false, panel);
  if (job.layers > 1) add_matrix(job, tables, kDown, weights[0], true, panel);
  if (gram.size(0)) add_matrix(job, tables, kGram, gram, false, panel);
  if (job.layers == 3) {
    const TensorView& second = biases[1];
    tables.second_bias = padded(data_of(second), 1, 0, job.second, second.stride(0), job.ld_second);
    add_matrix(job, tables, kForth, weights[1], true, panel);
    add_matrix(job, tables, kBack, weights[1], false, panel);
  }
  job.rows = tables.rows.data();
  job.strength = tables.strength.data();
  job.count = int64_t(tables.rows.size());
  job.bias = tables.bias.data();
  job.second_bias = tables.second_bias.data();
  job.head = tables.head.data();
}

// Writes the rows of strength other than 0 of `out`; the others are not visited. `gram` may be
// empty for a single step without a trust region.
void guide_cpu(py::handle x, py::handle out, const std::vector<py::object>& weights,
               const std::vector<py::object>& biases, py::handle gram, int activation,
               py::handle coefficients, py::handle strength, double gamma, int64_t iterations,
               double trust, int threads) {
  const TensorView in(x), to(out), g(gram), c(coefficients), s(strength);
  const std::vector<TensorView> w(weights.begin(), weights.end());
  const std::vector<TensorView> b(biases.begin(), biases.end());
  check(w, b, in, g, c, s);
  require(same_shape(to, in), "guide: out must be like x");
  const DType dtype = float_type(in, "guide");
  require(float_type(to, "guide") == dtype && dtype != DType::f64,
          "guide: x and out must be of one type, float32, bfloat16 or float16");
  for (const TensorView* each : {&in, &to, &g, &c, &s, &w[0], &b[0]})
    require(each->device().type == kDLCPU, "guide_cpu: a tensor is not in CPU memory");
  require(activation >= 0 && activation <= 2, "guide: an unknown activation");
  require(iterations >= 1 && iterations <= INT32_MAX, "guide: iterations must be 1 .. 2147483647");
  const bool needs_gram = trust < __builtin_inf() || (w.size() > 1 && iterations > 1);
  require(!needs_gram || g.size(0) == w[0].size(0), "guide: gram is needed and missing");
  if (in.size(0) * in.size(1) * in.size(2) == 0) return;
  GuideJob job{};
  Tables tables;
  list_rows(s, tables);
  if (tables.rows.empty()) return;
  job.x = rows_of(in, "guide");
  job.out = rows_of(to, "guide");
  job.iterations = int(iterations);
  job.activation = GuideActivation(activation);
  job.gamma = gamma;
  job.trust = trust;
  const GuideKernels& chosen = guide_kernels();
  fill_tables(job, tables, w, b, g, c, chosen.panel);
  const int team = job.count * job.x.width * job.hidden < kSerial ? 1 : std::max(threads, 1);
  job.block = block_of(job, chosen.tile, team);
  const auto run = chosen.run[dtype];
  py::gil_scoped_release release;
  pack_all(job, chosen, team);
  const int64_t blocks = (job.count + job.block - 1) / job.block;
  std::atomic<int64_t> next{0};
  // A worker takes blocks until there are no more, so that its scratch memory is made once.
  share(std::min<int64_t>(team, blocks), 1, team, [&](int64_t, int64_t) {
    const Memory<float> scratch = allocate<float>(size_t(job.block * guide_scratch(job)));
    for (int64_t first; (first = next.fetch_add(job.block, std::memory_order_relaxed)) < job.count;)
      run(job, scratch.get(), first, std::min(first + job.block, job.count));
  });
}

Bind bind_guide([](py::module_& m) { m.def("guide_cpu", &guide_cpu); });

}  // namespace
}  // namespace dreamreader
