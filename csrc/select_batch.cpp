// The K largest of all entries.
//
// A bound is guessed from a sample. One look at the matrix keeps what is above it and counts, row
// by row, what is equal to it. Counting proves the result:
//   K or more above:              the K-th is found among what was kept;
//   K reached with equal ones:    the bound is the K-th, and rows whose ties are taken are looked
//   at
//                                 once more;
//   neither:                      another bound, between those known to be too low and too high.
#include <algorithm>
#include <cmath>

#include "select_kept.h"

namespace dreamreader {
namespace {

constexpr int64_t kAll = 1 << 16;  // of so few entries no sample is taken
constexpr int kGuesses = 3;        // after which the range of bounds is halved

template <typename Key>
class BatchSelection : public Selector {
 public:
  BatchSelection(Key inf, int64_t rows, int64_t blocks, int64_t count)
      : rows_(rows), blocks_(blocks), count_(count), inf_(inf), kept_(rows, blocks) {}

  void sample(const SelectBlock& x, int64_t rows, double part, int threads) override;

  void begin(int threads) override {
    if (again_) return;
    guess(threads);
    kept_.clear();
  }

  void add(int64_t block, const SelectBlock& entries, int threads) override {
    const auto collect = kernels_of(Key{}).collect;
    // In the first look there stays room for the ties of the second.
    const int64_t limit = room_ + (again_ ? count_ : 0);
    kept_.add(block, entries.columns, limit, threads, [&](int64_t row, SelectFound<Key> found) {
      int64_t* take = again_ ? &take_[size_t(row)] : nullptr;
      if (again_ && *take < 0) return Segment{};
      int64_t equal = 0;
      const SelectRow<Key> mine = row_of<Key>(entries, row);
      const int64_t n = collect(mine, bound_, inf_, again_ ? *take : 0, found, &equal);
      if (again_) *take = std::max<int64_t>(0, *take - equal);
      return Segment{0, uint32_t(n), uint32_t(equal), true};
    });
  }

  bool done(int threads) override;

  void emit(const SelectOut& out, int threads) override {
    const int64_t total = kept_.emit(out, selected_, cut_, take_, inf_, threads);
    if (out.threshold)
      *static_cast<Key*>(out.threshold) = total < count_ ? Key{0} : value_of(smallest_, inf_);
  }

 private:
  using Segment = typename KeptEntries<Key>::Segment;

  void guess(int threads);
  void refine(int threads);
  void take_ties(int64_t ties, const std::vector<int64_t>& equal);

  const int64_t rows_, blocks_, count_;
  const Key inf_;
  KeptEntries<Key> kept_;
  std::vector<Key> sample_;
  double rate_ = 1, rank_ = double(kAll);  // of the bound in the sample
  int guesses_ = 0;
  int64_t room_ = 0;
  Key bound_ = 0, least_ = 0, most_ = kNanKey<Key>;  // the right bound is one from least_ to most_
  bool again_ = false;                    // this look is for ties, in rows whose take_ is 0 or more
  std::vector<int64_t> take_, selected_;  // of each row: how many ties, and how many in all
  Key cut_ = 0;                           // of what was kept those above it are selected, and ties
  Key smallest_ = 0;
};

// Half a line of memory now and then, at places that follow no period: from all rows, so that one
// of large values counts for what it is.
template <typename Key>
void BatchSelection<Key>::sample(const SelectBlock& x, int64_t rows, double part, int threads) {
  constexpr int64_t kUnit = 32 / int64_t(sizeof(Key)), kDraws = 128;
  constexpr double kMostDraws = 1 << 16;
  if (double(rows) * double(x.columns) / part <= double(kAll)) return;
  const int64_t units = std::max<int64_t>(1, x.columns / kUnit);  // of a row
  const int64_t width = std::min(x.columns, kUnit);
  const double wanted = std::clamp(1024.0 / double(count_), 1.0 / 2048, 1.0 / 16);
  const int64_t step = std::max(
      {int64_t{1}, int64_t(part / wanted), int64_t(double(units) * double(rows) / kMostDraws)});
  const int64_t draws = units * rows / step, pieces = (draws + kDraws - 1) / kDraws;
  std::vector<std::vector<Key>> found(static_cast<size_t>(pieces));
  share(pieces, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      std::vector<Key>& mine = found[size_t(piece)];
      mine.resize(size_t(kDraws * width));
      Key* to = mine.data();
      const Key* from[kDraws];
      int64_t columns[kDraws];
      const int64_t start = piece * kDraws, n = std::min(kDraws, draws - start);
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t jitter = (uint64_t(start + i) * 0x9e3779b97f4a7c15u) >> 32;
        const int64_t unit = (start + i) * step + int64_t(jitter * uint64_t(step) >> 32);
        const int64_t row = unit / units;
        columns[i] = (unit - row * units) * kUnit;
        from[i] = row_of<Key>(x, row).x + columns[i];
        __builtin_prefetch(from[i]);
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < width; ++c) {  // without branches, which nothing could foresee
          const Key bits = from[i][c], magnitude = bits & kNanKey<Key>;
          const int64_t column = columns[i] + c;
          const bool nan = magnitude > inf_;
          bool taken = nan | ((bits == magnitude) & (magnitude != 0));
          if (x.pool) taken &= x.pool[column / 8] >> column % 8 & 1;
          *to = nan ? kNanKey<Key> : magnitude;
          to += taken;
        }
      mine.resize(size_t(to - mine.data()));
    }
  });
  for (const auto& each : found) sample_.insert(sample_.end(), each.begin(), each.end());
  rate_ = part / double(step);
  // Neighbours in memory are drawn together, so the number varies more than that of single entries.
  const double expected = double(count_) * rate_;
  rank_ = 1.05 * expected + 6 * std::sqrt(expected) + 4;
}

template <typename Key>
void BatchSelection<Key>::guess(int threads) {
  const int64_t size = int64_t(sample_.size());
  rank_ = std::min(rank_, size ? double(size + 1) : double(kAll) * rate_);  // and with it the room
  const int64_t rank = std::max<int64_t>(1, int64_t(rank_));
  Key bound = rank > size ? Key{0} : kth_largest(sample_.data(), size, rank, threads);
  if (guesses_++ >= kGuesses || bound < least_ || bound > most_)
    bound = Key(least_ + (most_ - least_) / 2);
  bound_ = bound;
  room_ = std::max(room_, count_ + 4096 + 2 * int64_t(rank_ / rate_));
  kept_.reserve(room_ + count_);
}

template <typename Key>
bool BatchSelection<Key>::done(int threads) {
  selected_.assign(size_t(rows_), 0);
  std::vector<int64_t> equal(size_t(rows_), 0);
  int64_t above = 0, equals = 0;
  for (int64_t block = 0; block < blocks_; ++block)
    for (int64_t row = 0; row < rows_; ++row) {
      const Segment& here = kept_.segment(row, block);
      selected_[size_t(row)] += here.kept;
      equal[size_t(row)] += here.equal;
      above += here.kept;
      equals += here.equal;
    }
  if (again_) {
    smallest_ = bound_;
    return true;
  }
  if (above >= count_ && !kept_.full()) {
    refine(threads);
    return true;
  }
  if (kept_.full()) {  // there is room for more than are wanted
    least_ = Key(bound_ + 1);
    rank_ *= std::min(0.9, 1.2 * double(count_) / double(above));
    return false;
  }
  if (bound_ == 0) return true;  // fewer than are wanted: all of them
  if (above + equals < count_) {
    most_ = Key(bound_ - 1);
    rank_ *= std::max(1.5, 1.3 * double(count_) / double(std::max<int64_t>(1, above + equals)));
    return false;
  }
  take_ties(count_ - above, equal);
  for (int64_t& each : take_)
    if (each == 0) each = -1;
  again_ = true;
  return false;
}

// First come, first served.
template <typename Key>
void BatchSelection<Key>::take_ties(int64_t ties, const std::vector<int64_t>& equal) {
  take_.resize(size_t(rows_));
  for (int64_t row = 0; row < rows_; ++row) {
    take_[size_t(row)] = std::min(ties, equal[size_t(row)]);
    ties -= take_[size_t(row)];
  }
}

template <typename Key>
void BatchSelection<Key>::refine(int threads) {
  cut_ = smallest_ = kth_largest(kept_.all(), kept_.used(), count_, threads);
  std::vector<int64_t> equal(static_cast<size_t>(rows_));
  kept_.for_rows(threads, [&](int64_t row) {
    int64_t above = 0, equals = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      const Segment& here = kept_.segment(row, block);
      const Key* keys = kept_.keys(here);
      for (uint32_t i = 0; i < here.kept; ++i) {
        above += keys[i] > cut_;
        equals += keys[i] == cut_;
      }
    }
    selected_[size_t(row)] = above;
    equal[size_t(row)] = equals;
  });
  int64_t above = 0;
  for (const int64_t each : selected_) above += each;
  take_ties(count_ - above, equal);
  for (int64_t row = 0; row < rows_; ++row) selected_[size_t(row)] += take_[size_t(row)];
}

}  // namespace

std::unique_ptr<Selector> select_batch(DType type, int64_t rows, int64_t blocks, int64_t count) {
  return make_selector<BatchSelection>(type, rows, blocks, count);
}

}  // namespace dreamreader
