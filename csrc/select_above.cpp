// Entries above a threshold, one for all columns or one for each.
#include <cmath>
#include <limits>

#include "select_kept.h"

namespace dreamreader {
namespace {

// The largest number of a type that is not above a positive finite one, as bits.
uint16_t floor_bits(float x, uint16_t inf) {
  if (inf == 0x7f80) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return uint16_t(bits >> 16);
  }
  if (x >= 65504.0f) return 0x7bff;
  int exponent;
  std::frexp(x, &exponent);
  const int power = std::max(exponent - 11, -24);  // of the last bit
  const auto steps = uint32_t(std::ldexp(x, -power));
  return uint16_t(steps + (uint32_t(power + 24) << 10));
}
uint32_t floor_bits(float x, uint32_t) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
uint64_t floor_bits(float x, uint64_t) {
  const double wide = x;
  uint64_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  return bits;
}

template <typename Key>
class AboveSelection : public Selector {
 public:
  AboveSelection(Key inf, int64_t rows, int64_t blocks, int64_t slots, const float* thresholds,
                 bool each)
      : rows_(rows),
        blocks_(blocks),
        slots_(slots),
        inf_(inf),
        thresholds_(thresholds),
        each_(each),
        kept_(rows, blocks) {
    kept_.reserve(slots);
  }

  void add(int64_t block, const SelectBlock& entries, int threads) override {
    std::vector<Key> bounds(static_cast<size_t>(entries.columns));
    for (int64_t c = 0; c < entries.columns; ++c) {
      const float threshold = thresholds_[each_ ? entries.first + c : 0];
      // Nothing but NaN is above infinity, and above what cannot be compared.
      bounds[size_t(c)] = !(threshold < std::numeric_limits<float>::infinity()) ? inf_
                          : threshold > 0 ? floor_bits(threshold, inf_)
                                          : Key{0};
    }
    const auto collect = kernels_of(Key{}).collect_each;
    kept_.add(block, entries.columns, slots_, threads, [&](int64_t row, SelectFound<Key> found) {
      const int64_t n = collect(row_of<Key>(entries, row), bounds.data(), inf_, found);
      return typename KeptEntries<Key>::Segment{0, uint32_t(n), 0, true};
    });
  }

  void emit(const SelectOut& out, int threads) override {
    std::vector<int64_t> selected(size_t(rows_), 0);
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t row = 0; row < rows_; ++row)
        selected[size_t(row)] += kept_.segment(row, block).kept;
    kept_.emit(out, selected, 0, {}, inf_, threads);
  }

 private:
  const int64_t rows_, blocks_, slots_;
  const Key inf_;
  const float* thresholds_;
  const bool each_;
  KeptEntries<Key> kept_;
};

}  // namespace

std::unique_ptr<Selector> select_above(DType type, int64_t rows, int64_t blocks, int64_t slots,
                                       const float* thresholds, bool each) {
  return make_selector<AboveSelection>(type, rows, blocks, slots, thresholds, each);
}

}  // namespace dreamreader
