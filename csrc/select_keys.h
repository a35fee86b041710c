// Keys of a tensor's dtype on the host: the kernels for their width, and the k-th largest of many.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "dtype.h"
#include "op.h"
#include "select.h"
#include "selector.h"

namespace dreamreader {

inline const SelectWidthKernels<uint16_t>& kernels_of(uint16_t) { return select_kernels().bits16; }
inline const SelectWidthKernels<uint32_t>& kernels_of(uint32_t) { return select_kernels().bits32; }
inline const SelectWidthKernels<uint64_t>& kernels_of(uint64_t) { return select_kernels().bits64; }

// A selection for the keys of this type: make(inf) gives one, where inf are the bits of infinity.
template <template <typename> class Selection, typename... Args>
std::unique_ptr<Selector> make_selector(DType type, Args... args) {
  switch (type) {
    case DType::f16:
      return std::make_unique<Selection<uint16_t>>(uint16_t{0x7c00}, args...);
    case DType::bf16:
      return std::make_unique<Selection<uint16_t>>(uint16_t{0x7f80}, args...);
    case DType::f32:
      return std::make_unique<Selection<uint32_t>>(uint32_t{0x7f800000}, args...);
    case DType::f64:
      break;
  }
  return std::make_unique<Selection<uint64_t>>(uint64_t{0x7ff} << 52, args...);
}

template <typename Key>
Key value_of(Key key, Key inf) {  // the bits of the value: every NaN is the same quiet one
  return key > inf ? Key(inf | ((inf & -inf) >> 1)) : key;
}

template <typename Key>
SelectRow<Key> row_of(const SelectBlock& block, int64_t row) {
  return {static_cast<const Key*>(block.x) + row * block.stride, block.columns, block.first,
          block.pool};
}

// Of n keys, 1 <= k <= n: by a histogram of their upper bits, then among those of one bin.
template <typename Key>
Key kth_largest(const Key* keys, int64_t n, int64_t k, int threads) {
  constexpr int64_t kFew = 4096;
  if (n <= kFew) return kernels_of(Key{}).kth(keys, n, k);
  constexpr int kBins = 1 << 15, kShift = int(sizeof(Key)) * 8 - 16;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n >> 15));
  const int64_t each = (n + parts - 1) / parts;
  std::vector<int64_t> counts(size_t(parts * kBins));
  share(parts, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      int64_t* mine = counts.data() + part * kBins;
      for (int64_t i = part * each, end = std::min(n, i + each); i < end; ++i)
        ++mine[keys[i] >> kShift];
    }
  });
  int64_t above = 0, bin = kBins;
  for (int64_t here = 0; above + here < k;) {
    above += here;
    here = 0;
    --bin;
    for (int64_t part = 0; part < parts; ++part) here += counts[size_t(part * kBins + bin)];
  }
  if constexpr (kShift == 0) return Key(bin);
  std::vector<Key> rest;
  for (int64_t i = 0; i < n; ++i)
    if (keys[i] >> kShift == Key(bin)) rest.push_back(keys[i]);
  const auto at = rest.begin() + (k - above - 1);
  std::nth_element(rest.begin(), at, rest.end(), std::greater<Key>());
  return *at;
}

}  // namespace dreamreader
