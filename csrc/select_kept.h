// What threads keep of a matrix that is shown in blocks of columns, and how it comes out row by
// row.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "op.h"
#include "select_keys.h"

namespace dreamreader {

template <typename Key>
class KeptEntries {
 public:
  struct Segment {         // of a row in a block
    int64_t at;            // where its entries are
    uint32_t kept, equal;  // how many, and how many are equal to a bound
    bool looked_at;
  };

  KeptEntries(int64_t rows, int64_t blocks)
      : rows_(rows), blocks_(blocks), segments_(size_t(rows * blocks)) {}

  void reserve(int64_t room) {
    if (room_ >= room) return;
    room_ = room;
    keys_ = allocate<Key>(size_t(room));
    columns_ = allocate<int32_t>(size_t(room));
  }
  void clear() {
    used_ = 0;
    full_ = false;
  }

  const Segment& segment(int64_t row, int64_t block) const {
    return segments_[size_t(block * rows_ + row)];
  }
  const Key* keys(const Segment& segment) const { return keys_.get() + segment.at; }
  const Key* all() const { return keys_.get(); }
  int64_t used() const { return used_; }
  bool full() const {
    return full_;
  }  // there was no room for all: entries are lost, counts are not

  // look(row, found) puts entries of the row where `found` says and returns its segment, whose
  // place is filled in here; what it did not look at stays as it is. At most `limit` entries in
  // all.
  template <typename Look>
  void add(int64_t block, int64_t columns, int64_t limit, int threads, const Look& look) {
    constexpr int64_t kPiece = 1 << 16;  // entries that a thread looks at before it hands them over
    const int64_t grain = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, columns));
    share(rows_, grain, threads, [&](int64_t first, int64_t last) {
      const size_t most = size_t((last - first) * columns);
      Key* keys = static_cast<Key*>(scratch(most * (sizeof(Key) + sizeof(int32_t)) + 64));
      auto* names = reinterpret_cast<int32_t*>(keys + (most + 1) / 2 * 2);
      int64_t found = 0;
      std::vector<Segment> mine(size_t(last - first));
      for (int64_t row = first; row < last; ++row) {
        Segment& here = mine[size_t(row - first)];
        here = look(row, SelectFound<Key>{keys + found, names + found});
        here.at = found;
        if (here.looked_at) found += here.kept;
      }
      const int64_t at = used_.fetch_add(found);
      for (int64_t row = first; row < last; ++row) {
        const Segment& here = mine[size_t(row - first)];
        if (!here.looked_at) continue;
        Segment& to = segments_[size_t(block * rows_ + row)];
        to = here;
        to.at += at;
      }
      if (at + found > std::min(limit, room_)) {
        full_ = true;
        return;
      }
      std::memcpy(keys_.get() + at, keys, size_t(found) * sizeof(Key));
      std::memcpy(columns_.get() + at, names, size_t(found) * sizeof(int32_t));
    });
  }

  // Calls visit(row) on the threads.
  template <typename Visit>
  void for_rows(int threads, const Visit& visit) const {
    const int64_t grain = std::max<int64_t>(1, rows_ / (8 * std::max(1, threads)));
    share(rows_, grain, threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) visit(row);
    });
  }

  // Writes `selected[row]` entries of every row: those above `cut` and the first of those equal to
  // it; all of the row's where cut is 0. Returns how many there are in all.
  int64_t emit(const SelectOut& out, const std::vector<int64_t>& selected, Key cut,
               const std::vector<int64_t>& ties, Key inf, int threads) const {
    out.row_ptr[0] = 0;
    for (int64_t row = 0; row < rows_; ++row)
      out.row_ptr[row + 1] = out.row_ptr[row] + selected[size_t(row)];
    const bool fits = !full_ && out.row_ptr[rows_] <= out.slots;
    const int64_t total = fits ? out.row_ptr[rows_] : 0;
    auto* values = static_cast<Key*>(out.values);
    if (fits)
      for_rows(threads, [&](int64_t row) {
        int64_t to = out.row_ptr[row], take = cut ? ties[size_t(row)] : 0;
        const int64_t end = out.row_ptr[row + 1];
        for (int64_t block = 0; block < blocks_ && to < end; ++block) {
          const Segment& here = segment(row, block);
          const Key* found = keys(here);
          const int32_t* names = columns_.get() + here.at;
          for (uint32_t i = 0; i < here.kept && to < end; ++i) {
            if (found[i] < cut || (found[i] == cut && take-- <= 0)) continue;
            out.columns[to] = names[i];
            values[to++] = value_of(found[i], inf);
          }
        }
      });
    std::fill(out.columns + total, out.columns + out.slots, -1);
    std::fill(values + total, values + out.slots, Key{0});
    return out.row_ptr[rows_];
  }

 private:
  const int64_t rows_, blocks_;
  std::vector<Segment> segments_;
  Memory<Key> keys_;
  Memory<int32_t> columns_;
  int64_t room_ = 0;
  std::atomic<int64_t> used_{0};
  std::atomic<bool> full_{false};
};

}  // namespace dreamreader
