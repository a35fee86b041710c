// The k largest entries of each row.
//
// The k-th largest of the maxima of disjoint groups of columns bounds the k-th largest entry from
// below, so only entries that reach it are kept. Of later blocks of columns only what is above the
// k-th largest so far: a tie there comes behind those that are kept.
#include <algorithm>
#include <cstring>

#include "select_keys.h"

namespace dreamreader {
namespace {

template <typename Key>
class RowSelection : public Selector {
 public:
  RowSelection(Key inf, int64_t rows, int64_t k)
      : rows_(rows),
        k_(k),
        inf_(inf),
        kept_(size_t(rows), 0),
        keys_(allocate<Key>(size_t(rows * k))),
        columns_(allocate<int32_t>(size_t(rows * k))) {}

  void add(int64_t, const SelectBlock& entries, int threads) override {
    const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, entries.columns));
    share(rows_, grain, threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) add_row(row, row_of<Key>(entries, row));
    });
  }

  void emit(const SelectOut& out, int threads) override {
    out.row_ptr[0] = 0;
    for (int64_t row = 0; row < rows_; ++row)
      out.row_ptr[row + 1] = out.row_ptr[row] + kept_[size_t(row)];
    auto* values = static_cast<Key*>(out.values);
    share(rows_, std::max<int64_t>(1, 4096 / k_), threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t to = out.row_ptr[row], n = kept_[size_t(row)];
        std::memcpy(out.columns + to, columns_.get() + row * k_, size_t(n) * sizeof(int32_t));
        for (int64_t i = 0; i < n; ++i) values[to + i] = value_of(keys_.get()[row * k_ + i], inf_);
      }
    });
    const int64_t total = out.row_ptr[rows_];
    std::fill(out.columns + total, out.columns + out.slots, -1);
    std::fill(values + total, values + out.slots, Key{0});
  }

 private:
  void add_row(int64_t row, const SelectRow<Key>& entries);
  Key bound_of(const SelectRow<Key>& entries, Key* room) const;

  const int64_t rows_, k_;
  const Key inf_;
  std::vector<int64_t> kept_;  // of each row, ascending columns
  Memory<Key> keys_;
  Memory<int32_t> columns_;
};

// At least k entries of the row are as large; 0 where groups would be too small to tell.
template <typename Key>
Key RowSelection<Key>::bound_of(const SelectRow<Key>& entries, Key* room) const {
  constexpr int64_t kLanes = kSelectLanes<Key>;
  const int64_t lines = entries.columns / kLanes;
  const int64_t groups = std::max<int64_t>(8, (4 * k_ + kLanes - 1) / kLanes);
  if (2 * groups > lines) return 0;
  const auto& kernels = kernels_of(Key{});
  kernels.maxima(entries.x, entries.columns, inf_, groups, room);
  return kernels.kth(room, groups * kLanes, k_);
}

template <typename Key>
void RowSelection<Key>::add_row(int64_t row, const SelectRow<Key>& entries) {
  const auto& kernels = kernels_of(Key{});
  const size_t most = size_t(k_ + entries.columns);
  Key* keys = static_cast<Key*>(scratch(most * (sizeof(Key) + sizeof(int32_t)) + 64));
  auto* columns = reinterpret_cast<int32_t*>(keys + (most + 1) / 2 * 2);
  Key* own_keys = keys_.get() + row * k_;
  int32_t* own_columns = columns_.get() + row * k_;
  int64_t& held = kept_[size_t(row)];
  const bool whole = held == k_;
  // Of ties with the bound the first k are enough, and none where k entries came before.
  const Key bound = whole ? *std::min_element(own_keys, own_keys + k_) : bound_of(entries, keys);
  int64_t equal = 0;
  const int64_t found =
      kernels.collect(entries, bound, inf_, whole ? 0 : k_, {keys + held, columns + held}, &equal);
  std::memcpy(keys, own_keys, size_t(held) * sizeof(Key));
  std::memcpy(columns, own_columns, size_t(held) * sizeof(int32_t));
  const int64_t n = held + found;
  if (n <= k_) {
    std::memcpy(own_keys + held, keys + held, size_t(found) * sizeof(Key));
    std::memcpy(own_columns + held, columns + held, size_t(found) * sizeof(int32_t));
    held = n;
    return;
  }
  const Key cut = kth_largest(keys, n, k_, 1);
  int64_t ties = k_;
  for (int64_t i = 0; i < n; ++i) ties -= keys[i] > cut;
  int64_t to = 0;
  for (int64_t i = 0; to < k_; ++i) {
    if (keys[i] < cut || (keys[i] == cut && ties-- <= 0)) continue;
    own_keys[to] = keys[i];
    own_columns[to++] = columns[i];
  }
  held = k_;
}

}  // namespace

std::unique_ptr<Selector> select_rows(DType type, int64_t rows, int64_t k) {
  return make_selector<RowSelection>(type, rows, k);
}

}  // namespace dreamreader
