// Bindings of the selections: of a tensor that exists, and of products that come block by block.
#include "select.h"

#include <algorithm>
#include <string>
#include <vector>

#include "op.h"
#include "selector.h"

namespace dreamreader {
namespace {

constexpr int64_t kColumns = 1 << 15;  // of a block; a row of it fits the second cache

int64_t blocks_of(int64_t columns) {
  return std::max<int64_t>(1, (columns + kColumns - 1) / kColumns);
}

void expect_matrix(const TensorView& x, const char* message) {
  require(x.dims() == 2 && (x.size(1) <= 1 || x.stride(1) == 1) && x.device().type == kDLCPU,
          message);
}

SelectBlock block_of(const TensorView& x, int64_t first, int64_t columns) {
  const int64_t bytes = size_of(float_type(x, "select"));
  return {x.data() + first * bytes, x.stride(0), columns, int32_t(first), nullptr};
}

template <typename T>
T* row_of(const TensorView& t, int64_t size, uint8_t code, const char* message) {
  require(t.dims() == 1 && t.size(0) == size && t.is(code, int(sizeof(T)) * 8) && dense(t) &&
              t.device().type == kDLCPU,
          message);
  return reinterpret_cast<T*>(t.data());
}

SelectOut out_of(int64_t rows, DType type, const TensorView& values, const TensorView& row_ptr,
                 const TensorView& columns) {
  require(values.dims() == 1 && float_type(values, "select") == type && dense(values) &&
              values.device().type == kDLCPU,
          "select: values must be dense, in the dtype of x");
  const int64_t slots = values.size(0);
  constexpr auto wrong = "select: row_ptr must be int64 [rows + 1], columns int32 [slots]";
  return {row_of<int64_t>(row_ptr, rows + 1, kDLInt, wrong),
          row_of<int32_t>(columns, slots, kDLInt, wrong), values.data(), slots, nullptr};
}

void* scalar_of(const TensorView& t, DType type) {
  require(t.dims() == 0 && float_type(t, "select") == type && t.device().type == kDLCPU,
          "select: the threshold must be [], in the dtype of x");
  return t.data();
}

// A bit for each of the columns, set for those in an ascending list.
std::vector<uint8_t> bits_of(py::handle pool, int64_t width) {
  const TensorView view(pool);
  const int64_t size = view.dims() == 1 ? view.size(0) : -1;
  const auto* columns =
      row_of<int32_t>(view, size, kDLInt, "select: the pool must be dense int32 [columns]");
  std::vector<uint8_t> bits(size_t(width / 8 + 8), 0);
  for (int64_t i = 0; i < size; ++i) {
    require(columns[i] >= 0 && columns[i] < width && (i == 0 || columns[i - 1] < columns[i]),
            "select: columns of the pool must ascend, from 0 to below the width of x");
    bits[size_t(columns[i] / 8)] |= uint8_t(1 << columns[i] % 8);
  }
  return bits;
}

void select_whole(Selector& selector, const TensorView& x, const uint8_t* pool,
                  const SelectOut& out, int threads) {
  const int64_t width = x.size(1);
  SelectBlock whole = block_of(x, 0, width);
  whole.pool = pool;
  selector.sample(whole, x.size(0), 1.0, threads);
  do {
    selector.begin(threads);
    for (int64_t i = 0; i < blocks_of(width); ++i) {
      const int64_t first = i * kColumns;
      SelectBlock block = block_of(x, first, std::min(kColumns, width - first));
      if (pool) block.pool = pool + first / 8;
      selector.add(i, block, threads);
    }
  } while (!selector.done(threads));
  selector.emit(out, threads);
}

void topk_cpu(py::handle x, int64_t k, py::handle values, py::handle row_ptr, py::handle columns,
              int threads) {
  const TensorView in(x);
  expect_matrix(in, "topk: x must be [rows, columns], dense in a row, in CPU memory");
  const DType type = float_type(in, "topk");
  const SelectOut out =
      out_of(in.size(0), type, TensorView(values), TensorView(row_ptr), TensorView(columns));
  require(k >= 1 && out.slots >= in.size(0) * k, "topk: there must be k slots for each row");
  py::gil_scoped_release release;
  select_whole(*select_rows(type, in.size(0), k), in, nullptr, out, threads);
}

void batch_topk_cpu(py::handle x, int64_t count, py::handle pool, py::handle values,
                    py::handle row_ptr, py::handle columns, py::handle threshold, int threads) {
  const TensorView in(x);
  expect_matrix(in, "batch_topk: x must be [rows, columns], dense in a row, in CPU memory");
  const DType type = float_type(in, "batch_topk");
  SelectOut out =
      out_of(in.size(0), type, TensorView(values), TensorView(row_ptr), TensorView(columns));
  out.threshold = scalar_of(TensorView(threshold), type);
  require(count >= 1 && out.slots >= count, "batch_topk: there must be `count` slots, 1 or more");
  std::vector<uint8_t> bits;
  if (!pool.is_none()) bits = bits_of(pool, in.size(1));
  py::gil_scoped_release release;
  select_whole(*select_batch(type, in.size(0), blocks_of(in.size(1)), count), in,
               bits.empty() ? nullptr : bits.data(), out, threads);
}

const float* thresholds_of(const TensorView& t, int64_t width, bool* each) {
  *each = t.dims() == 1;
  require(t.is(kDLFloat, 32) && dense(t) && t.device().type == kDLCPU &&
              (t.dims() == 0 || (t.dims() == 1 && (width < 0 || t.size(0) == width))),
          "threshold_select: the threshold must be dense float32, [] or [columns]");
  return reinterpret_cast<const float*>(t.data());
}

void threshold_select_cpu(py::handle x, py::handle threshold, py::handle values, py::handle row_ptr,
                          py::handle columns, int threads) {
  const TensorView in(x), bounds(threshold);
  expect_matrix(in, "threshold_select: x must be [rows, columns], dense in a row, in CPU memory");
  const DType type = float_type(in, "threshold_select");
  const SelectOut out =
      out_of(in.size(0), type, TensorView(values), TensorView(row_ptr), TensorView(columns));
  bool each = false;
  const float* own = thresholds_of(bounds, in.size(1), &each);
  py::gil_scoped_release release;
  select_whole(*select_above(type, in.size(0), blocks_of(in.size(1)), out.slots, own, each), in,
               nullptr, out, threads);
}

// A selection whose blocks come from Python, as dense [rows, columns of the block].
class BlockSelector {
 public:
  BlockSelector(const std::string& rule, py::handle like, int64_t rows, int64_t blocks,
                int64_t count, py::object threshold)
      : type_(float_type(TensorView(like), "encode_select")),
        rows_(rows),
        blocks_(blocks),
        threshold_(std::move(threshold)) {
    require(rows >= 0 && blocks >= 1 && count >= 1, "encode_select: sizes must be 1 or more");
    least_slots_ = rule == "topk" ? rows * count : rule == "batch_topk" ? count : 0;
    if (rule == "topk") {
      selector_ = select_rows(type_, rows, count);
    } else if (rule == "batch_topk") {
      selector_ = select_batch(type_, rows, blocks, count);
    } else {
      const TensorView bounds(threshold_);
      bool each = false;
      const float* own = thresholds_of(bounds, -1, &each);
      width_ = each ? bounds.size(0) : -1;
      selector_ = select_above(type_, rows, blocks, count, own, each);
    }
  }

  void sample(py::handle rows, double part, int threads) {
    const TensorView in = checked(rows);
    require(part > 0 && part <= 1, "encode_select: a sample is a part of all rows");
    py::gil_scoped_release release;
    selector_->sample(block_of(in, 0, in.size(1)), in.size(0), part, threads);
  }
  void begin(int threads) { selector_->begin(threads); }
  void add(int64_t block, py::handle x, int64_t first, int threads) {
    const TensorView in = checked(x);
    require(block >= 0 && block < blocks_ && in.size(0) == rows_ && first >= 0 &&
                first + in.size(1) <= (width_ < 0 ? INT32_MAX : width_),
            "encode_select: a block has other rows or columns than were announced");
    py::gil_scoped_release release;
    SelectBlock entries = block_of(in, 0, in.size(1));
    entries.first = int32_t(first);
    selector_->add(block, entries, threads);
  }
  bool done(int threads) {
    py::gil_scoped_release release;
    return selector_->done(threads);
  }
  void emit(py::handle values, py::handle row_ptr, py::handle columns, py::handle threshold,
            int threads) {
    SelectOut out =
        out_of(rows_, type_, TensorView(values), TensorView(row_ptr), TensorView(columns));
    out.threshold = scalar_of(TensorView(threshold), type_);
    require(out.slots >= least_slots_, "encode_select: there are too few slots");
    py::gil_scoped_release release;
    selector_->emit(out, threads);
  }

 private:
  TensorView checked(py::handle x) const {
    const TensorView in(x);
    expect_matrix(in, "encode_select: a block must be [rows, columns], dense in a row");
    require(float_type(in, "encode_select") == type_, "encode_select: blocks have one dtype");
    return in;
  }

  const DType type_;
  const int64_t rows_, blocks_;
  int64_t width_ = -1, least_slots_ = 0;
  py::object threshold_;
  std::unique_ptr<Selector> selector_;
};

Bind bind_select([](py::module_& m) {
  m.def("topk_cpu", &topk_cpu);
  m.def("batch_topk_cpu", &batch_topk_cpu);
  m.def("threshold_select_cpu", &threshold_select_cpu);
  py::class_<BlockSelector>(m, "BlockSelector")
      .def(py::init<const std::string&, py::handle, int64_t, int64_t, int64_t, py::object>())
      .def("sample", &BlockSelector::sample)
      .def("begin", &BlockSelector::begin)
      .def("add", &BlockSelector::add)
      .def("done", &BlockSelector::done)
      .def("emit", &BlockSelector::emit);
});

}  // namespace
}  // namespace dreamreader
