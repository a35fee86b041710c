// Selection of the largest entries of a matrix: what the rules share.
//
//   key(x) = bits of x, as an unsigned integer, where x > 0 or +inf; NaN: one key above all others;
//            0 for everything else, which is never selected.
//
// Keys are compared in the tensor's own dtype, so that no rounding decides. Of equal keys those at
// the smallest flat index (batch) or column (row) are selected.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace dreamreader {

template <typename Key>
constexpr Key kNanKey = Key(~Key{0}) >> 1;
template <typename Key>
constexpr int kSelectLanes = 64 / int(sizeof(Key));  // a line of memory is compared at once

// One row, or the part of it in a block of columns.
template <typename Key>
struct SelectRow {
  const Key* x;  // bits of the entries
  int64_t columns;
  int32_t first;        // column of the first of them
  const uint8_t* pool;  // a bit for each entry that takes part, or null: all do
};

// The entries that were found: ascending columns. There must be room for all of the row.
template <typename Key>
struct SelectFound {
  Key* keys;
  int32_t* columns;
};

template <typename Key>
struct SelectWidthKernels {
  // Appends the entries above the bound, and the first `ties` of those equal to it. Returns how
  // many, and in `equal` how many are equal to it, 0 for a bound of 0.
  int64_t (*collect)(const SelectRow<Key>& row, Key bound, Key inf, int64_t ties,
                     SelectFound<Key> found, int64_t* equal);
  // The same above a bound of its own for each column; none may be kNanKey.
  int64_t (*collect_each)(const SelectRow<Key>& row, const Key* bounds, Key inf,
                          SelectFound<Key> found);
  // Largest keys of groups x kSelectLanes disjoint sets of entries; the others belong to none.
  // Entries that are negative NaN may be missed.
  void (*maxima)(const Key* x, int64_t columns, Key inf, int64_t groups, Key* largest);
  // The k-th largest of n keys, 1 <= k <= n.
  Key (*kth)(const Key* keys, int64_t n, int64_t k);
};

struct SelectKernels {
  SelectWidthKernels<uint16_t> bits16;
  SelectWidthKernels<uint32_t> bits32;
  SelectWidthKernels<uint64_t> bits64;
};

DR_KERNELS(SelectKernels, select)

}  // namespace dreamreader
