// CPU side of the low-rank edit: from tensors to a job, how rows are cut into pieces, and adding up
// the sums of all pieces. At the foot its bindings.
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "low_rank_cpu.h"
#include "op.h"

namespace dreamreader {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // of the rows of one tensor that are worked on together
constexpr int64_t kPieceBytes = 256 << 10;  // of a piece of the forward pass, at least
constexpr int64_t kPieceRows = 128;         // of a piece that has sums of its own, at least
constexpr int64_t kPieces = 64;             // with sums of their own, about, at most
constexpr int64_t kSumBytes = 64 << 20;     // of all these sums, about, at most

void require_like(const TensorView& x, const TensorView& other) {
  require(same_shape(x, other) && float_type(x, "low_rank") == float_type(other, "low_rank"),
          "low_rank: x, its result and their gradients differ in shape or dtype");
}

struct Tables {
  TensorView down, bias, up, strength, index;
};

template <typename W>
LowRank<W> program_of(const TensorView& x, const Tables& t) {
  constexpr int kBits = 8 * sizeof(W);
  require(
      t.down.dims() == 3 && t.down.size(2) == x.size(2) && t.down.is(kDLFloat, kBits) &&
          dense(t.down) && t.up.dims() == 3 && t.up.size(0) == t.down.size(0) &&
          t.up.size(1) == t.down.size(1) && t.up.size(2) == x.size(2) && t.up.is(kDLFloat, kBits) &&
          dense(t.up),
      "low_rank: down and up must be dense [adapters, rank, width] in the arithmetic type of x");
  require(t.down.size(1) >= 1 && t.down.size(1) <= kMaxRank, "low_rank: rank out of range");
  require(t.bias.dims() == 2 && t.bias.size(0) == t.down.size(0) &&
              t.bias.size(1) == t.down.size(1) && t.bias.is(kDLFloat, kBits) && dense(t.bias),
          "low_rank: bias must be dense [adapters, rank] in the arithmetic type of x");
  require(t.strength.dims() == 2 && t.strength.size(0) == x.size(0) &&
              t.strength.size(1) == x.size(1) && t.strength.is(kDLFloat, kBits),
          "low_rank: strength must be [entries, tokens] in the arithmetic type of x");
  require(t.index.dims() == 1 && t.index.size(0) == x.size(0) && t.index.is(kDLInt, 64),
          "low_rank: index must be int64 [entries]");
  for (const TensorView* each : {&x, &t.down, &t.bias, &t.up, &t.strength, &t.index})
    require(each->device().type == kDLCPU, "low_rank_cpu: a tensor is not in CPU memory");
  const auto values = [](const TensorView& t) { return reinterpret_cast<const W*>(t.data()); };
  return {x.size(0),
          x.size(1),
          x.size(2),
          t.down.size(1),
          t.down.size(0),
          values(t.down),
          values(t.bias),
          values(t.up),
          values(t.strength),
          t.strength.stride(0),
          t.strength.stride(1),
          reinterpret_cast<const int64_t*>(t.index.data()),
          t.index.stride(0)};
}

// Entries ordered by adapter.
template <typename W>
std::vector<int64_t> ordered(const LowRank<W>& p) {
  std::vector<int64_t> order(size_t(p.entries));
  std::iota(order.begin(), order.end(), 0);
  require(order.empty() || p.adapters > 0,
          "low_rank: there is no adapter: down, bias and up are empty");
  for (int64_t entry : order)
    require(adapter_of(p, entry) >= 0, "low_rank: an index is outside the table of adapters");
  std::stable_sort(order.begin(), order.end(), [&](int64_t one, int64_t other) {
    return adapter_of(p, one) < adapter_of(p, other);
  });
  return order;
}

// Depends on shape and index alone, so that sums do not depend on the threads.
template <typename W>
std::vector<LowRankPiece> pieces_of(const LowRank<W>& p, const std::vector<int64_t>& order,
                                    int64_t rows) {
  std::vector<LowRankPiece> pieces;
  for (size_t first = 0, last; first < order.size(); first = last) {
    const int64_t adapter = adapter_of(p, order[first]);
    last = first + 1;
    while (last < order.size() && adapter_of(p, order[last]) == adapter) ++last;
    const int64_t begin = int64_t(first) * p.tokens, end = int64_t(last) * p.tokens;
    const int64_t parts = std::max<int64_t>(1, (end - begin + rows - 1) / rows);
    const int64_t each = (end - begin + parts - 1) / parts;
    for (int64_t row = begin; row < end; row += each)
      pieces.push_back({adapter, row, std::min(row + each, end), nullptr, nullptr, nullptr});
  }
  return pieces;
}

// Asks for huge pages where the result lies: the first touch of 64 MiB in pages of 4 KiB takes
// longer than the edit itself.
void expect_writes(const TensorView& out) {
  constexpr int64_t kPage = 2 << 20;
  const StridedRows rows = rows_of(out, "low_rank");
  const int64_t bytes = values_in(rows) * size_of(rows.dtype);
  const auto begin = (reinterpret_cast<uintptr_t>(out.data()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(out.data()) + uintptr_t(bytes)) / kPage * kPage;
  if (dense(out) && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

struct Call {
  LowRankJob job;
  void (*run)(const LowRankJob&, void*, int64_t, int64_t);
};

template <typename W>
void run(Call& call, const LowRank<W>& p, const std::vector<int64_t>& order,
         const std::vector<LowRankPiece>& pieces, int64_t tensors, int threads) {
  const int64_t row = std::max<int64_t>(1, p.width) * int64_t(sizeof(W)) * tensors;
  call.job.block = std::clamp<int64_t>(kBlockBytes / row / 4 * 4, 8, kLowRankBlock);
  call.job.program = &p;
  call.job.order = order.data();
  call.job.pieces = pieces.data();
  const size_t bytes = size_t(low_rank_scratch(call.job.block, p.width, p.rank)) * sizeof(W);
  share(int64_t(pieces.size()), 1, threads,
        [&](int64_t first, int64_t last) { call.run(call.job, scratch(bytes), first, last); });
}

template <typename W>
void forward(const TensorView& x, const TensorView& out, const Tables& tables, int threads) {
  const LowRank<W> p = program_of<W>(x, tables);
  if (p.entries * p.tokens * p.width == 0) return;
  const std::vector<int64_t> order = ordered(p);
  const int64_t rows = std::max<int64_t>(kLowRankBlock, kPieceBytes / (p.width * 4));
  const std::vector<LowRankPiece> pieces = pieces_of(p, order, rows);
  if (x.data() != out.data()) expect_writes(out);
  Call call{};
  call.job.x = rows_of(x, "low_rank");
  call.job.out = rows_of(out, "low_rank");
  call.run = low_rank_kernels().forward[call.job.x.dtype];
  py::gil_scoped_release release;
  run(call, p, order, pieces, 1, threads);
}

void low_rank_cpu(py::handle x, py::handle out, py::handle down, py::handle bias, py::handle up,
                  py::handle strength, py::handle index, int threads) {
  const TensorView in(x), to(out);
  const Tables tables{TensorView(down), TensorView(bias), TensorView(up), TensorView(strength),
                      TensorView(index)};
  require(in.dims() == 3, "low_rank: x must be [entries, tokens, width]");
  require_like(in, to);
  require_apart(to, "low_rank");
  require(to.device().type == kDLCPU, "low_rank_cpu: a tensor is not in CPU memory");
  by_work(float_type(in, "low_rank"), [&]<typename W>(W) { forward<W>(in, to, tables, threads); });
}

// Where the gradients go; those that nobody asked for are null.
template <typename W>
struct Sums {
  W *down, *bias, *up;
};

// Gives every piece memory for its sums: the first of an adapter the result itself, the others
// parts of `rest`.
template <typename W>
void place_sums(const LowRank<W>& p, const Sums<W>& to, std::vector<LowRankPiece>& pieces,
                std::unique_ptr<W[]>& rest) {
  const int64_t table = p.rank * p.width;
  const int64_t size = (to.down ? table + p.rank : 0) + (to.up ? table : 0);
  rest = std::make_unique_for_overwrite<W[]>(size_t(int64_t(pieces.size()) * size));
  W* next = rest.get();
  int64_t before = -1;
  for (LowRankPiece& piece : pieces) {
    const bool own = piece.adapter == before;
    before = piece.adapter;
    const auto take = [&](W* result, int64_t length) -> W* {
      if (!result) return nullptr;
      if (!own) return result + piece.adapter * length;
      next += length;
      return next - length;
    };
    piece.d_down = take(to.down, table);
    piece.d_bias = take(to.bias, p.rank);
    piece.d_up = take(to.up, table);
  }
}

// Adds the sums of the pieces to those of the first piece of their adapter, in order.
template <typename W>
struct Adding {
  const LowRank<W>& p;
  const std::vector<LowRankPiece>& pieces;

  void add(void* LowRankPiece::* sums, int64_t from, int64_t to) const {
    const LowRankPiece* first = nullptr;
    for (const LowRankPiece& piece : pieces) {
      if (!first || first->adapter != piece.adapter) {
        first = &piece;
        continue;
      }
      const W* part = static_cast<const W*>(piece.*sums);
      W* total = static_cast<W*>(first->*sums);
      for (int64_t i = from; part && i < to; ++i) total[i] += part[i];
    }
  }

  void operator()(int64_t first, int64_t last) const {
    const int64_t width = p.width;
    add(&LowRankPiece::d_down, first * width, last * width);
    add(&LowRankPiece::d_up, first * width, last * width);
    add(&LowRankPiece::d_bias, first, last);
  }
};

template <typename W>
void clear_unused(const LowRank<W>& p, const Sums<W>& to, const std::vector<LowRankPiece>& pieces) {
  std::vector<bool> used(size_t(p.adapters), false);
  for (const LowRankPiece& piece : pieces) used[size_t(piece.adapter)] = true;
  const int64_t table = p.rank * p.width;
  for (int64_t i = 0; i < p.adapters; ++i) {
    if (used[size_t(i)]) continue;
    if (to.down) std::fill_n(to.down + i * table, table, W(0));
    if (to.bias) std::fill_n(to.bias + i * p.rank, p.rank, W(0));
    if (to.up) std::fill_n(to.up + i * table, table, W(0));
  }
}

template <typename W>
void backward(Call& call, const TensorView& x, const Tables& tables, const Sums<W>& to,
              int threads) {
  const LowRank<W> p = program_of<W>(x, tables);
  const std::vector<int64_t> order = ordered(p);
  const int64_t sums = std::max<int64_t>(1, p.rank * p.width * 2 * int64_t(sizeof(W)));
  const int64_t most = std::max<int64_t>(1, std::min(kPieces, kSumBytes / sums));
  const int64_t rows = std::max(kPieceRows, (p.entries * p.tokens + most - 1) / most);
  std::vector<LowRankPiece> pieces = pieces_of(p, order, rows);
  std::unique_ptr<W[]> rest;
  place_sums(p, to, pieces, rest);
  call.run = low_rank_kernels().backward[call.job.x.dtype];
  py::gil_scoped_release release;
  clear_unused(p, to, pieces);
  if (pieces.empty()) return;
  run(call, p, order, pieces, 2, threads);
  if (pieces.size() > 1) share(p.rank, 1, threads, Adding<W>{p, pieces});
}

// A gradient of a table, null where it is empty because nobody asked for it.
template <typename W>
W* sums_of(const TensorView& sums, const TensorView& table) {
  if (sums.dims() == 1 && sums.size(0) == 0) return nullptr;
  bool same = sums.dims() == table.dims() && dense(sums) && sums.is(kDLFloat, 8 * sizeof(W)) &&
              sums.device().type == kDLCPU;
  for (int i = 0; same && i < sums.dims(); ++i) same = sums.size(i) == table.size(i);
  require(same, "low_rank_backward: a gradient is not dense or unlike its table");
  static W nothing;  // tensors without elements have no memory
  return sums.data() ? reinterpret_cast<W*>(sums.data()) : &nothing;
}

void low_rank_backward_cpu(py::handle grad, py::handle x, py::handle down, py::handle bias,
                           py::handle up, py::handle strength, py::handle index, py::handle dx,
                           py::handle d_down, py::handle d_bias, py::handle d_up,
                           py::handle d_strength, int threads) {
  const TensorView g(grad), in(x), to(dx), to_down(d_down), to_bias(d_bias), to_up(d_up),
      to_strength(d_strength);
  const Tables t{TensorView(down), TensorView(bias), TensorView(up), TensorView(strength),
                 TensorView(index)};
  require(in.dims() == 3, "low_rank: x must be [entries, tokens, width]");
  require_like(in, g);
  require(g.device().type == kDLCPU && to.device().type == kDLCPU,
          "low_rank_cpu: a tensor is not in CPU memory");
  Call call{};
  call.job.x = rows_of(in, "low_rank");
  call.job.grad = rows_of(g, "low_rank");
  if (to.dims() != 1 || to.size(0)) {
    require_like(in, to);
    require_apart(to, "low_rank");
    expect_writes(to);
    call.job.out = rows_of(to, "low_rank");
  }
  by_work(call.job.x.dtype, [&]<typename W>(W) {
    const Sums<W> sums{sums_of<W>(to_down, t.down), sums_of<W>(to_bias, t.bias),
                       sums_of<W>(to_up, t.up)};
    require(!sums.down == !sums.bias, "low_rank_backward: d_down and d_bias go together");
    call.job.d_strength = sums_of<W>(to_strength, t.strength);
    backward<W>(call, in, t, sums, threads);
  });
}

Bind bind_low_rank([](py::module_& m) {
  m.def("low_rank_cpu", &low_rank_cpu);
  m.def("low_rank_backward_cpu", &low_rank_backward_cpu);
});

}  // namespace
}  // namespace dreamreader
