// Packing of rows for one instruction set; compiled once for each (CMakeLists.txt sets DR_ISA).
#include "pack_cpu.h"
#include "pack_read_simd.h"
#include "pack_store_simd.h"

namespace dreamreader {
namespace {

// Rows of one job, read as Source has them. Values pass from reading to storing through the first
// cache, so that not every pair of types needs its own code.
template <typename Source>
class Packer {
 public:
  using W = typename Source::W;
  explicit Packer(const PackJob& job) : job_(job), storing_(storing<W>(job.stored)), source_(job) {}

  void run(int64_t first, int64_t last) {
    int64_t odd = 0;
    last_ = last;
    for (int64_t row = first; row < last; row += Source::kRows)
      odd += pack(row, last - row < Source::kRows ? last : row + Source::kRows);
    if (odd && job_.not_finite) __atomic_fetch_add(job_.not_finite, odd, __ATOMIC_RELAXED);
  }

 private:
  struct Seen {
    Largest<W> pooled, values, finite;
  };

  // Returns how many of the rows are not finite. With a scale, values are formed twice: a second
  // look at what is in the cache needs no memory for them.
  int64_t pack(int64_t first, int64_t last) {
    Seen seen[Source::kRows] = {};
    each_strip(first, last, seen, [&](int64_t row, int64_t d, int64_t n) {
      if (storing_.most == 0) storing_.put(values_, n, 1, job_.out, row * job_.x.width + d);
    });
    int64_t odd = 0;
    for (int64_t row = first; row < last; ++row) {
      const Seen& of = seen[row - first];
      odd += !of.values.below(storing_.overflow) || !of.pooled.below(W(__builtin_inf()));
      if (storing_.most != 0) job_.scales[row] = scale_of(of.finite.value());
    }
    if (storing_.most != 0) {
      each_strip(first, last, seen, [&](int64_t row, int64_t d, int64_t n) {
        storing_.put(values_, n, W(job_.scales[row]), job_.out, row * job_.x.width + d);
      });
    }
    return odd;
  }

  float scale_of(W finite) const {
    const W scale = finite / W(storing_.most);
    const float narrow = scale > W(__FLT_MAX__) ? __FLT_MAX__ : float(scale);
    return narrow == 0 ? 1.0f : narrow;
  }

  template <typename F>
  DR_HD void each_strip(int64_t first, int64_t last, Seen* seen, F run) {
    for (int64_t d = 0; d < job_.x.width; d += Source::kStrip) {
      const int64_t left = job_.x.width - d, n = left < Source::kStrip ? left : Source::kStrip;
      for (int64_t row = first; row < last; ++row) {
        read(row, d, n, seen[row - first]);
        run(row, d, n);
      }
    }
  }

  // values_ = features d .. d + n - 1 of a row, and zeros up to the end of a block.
  __attribute__((noinline)) void read(int64_t row, int64_t d, int64_t n, Seen& seen) {
    const bool alone = job_.pool == Pool::none, mean = job_.pool == Pool::mean;
    const int64_t begin = alone ? row : job_.groups[row];
    const int64_t end = alone ? row + 1 : job_.groups[row + 1];
    source_.until(alone ? last_ : end);
    for (int64_t e = 0; e < n; e += kBlock<W>) {
      const int64_t width = n - e < kBlock<W> ? n - e : kBlock<W>;
      Block<W> v = source_.at(begin, d + e, width);
      if (mean) {
        for (int64_t place = begin + 1; place < end; ++place)
          add(v, source_.at(place, d + e, width));
        divide(v, W(end - begin));
      } else if (!alone) {
        seen.pooled.see(v);
        for (int64_t place = begin + 1; place < end; ++place) {
          const Block<W> other = source_.at(place, d + e, width);
          seen.pooled.see(other);
          raise(v, other);
        }
      }
      if (!alone) add(v, Block<W>{});  // zeros are +0
      seen.values.see(v);
      if (storing_.most != 0) seen.finite.template see<true>(v);
      store(values_ + e, v, kBlock<W>);
    }
  }

  static DR_HD void add(Block<W>& to, const Block<W>& block) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) to.v[i] += block.v[i];
  }
  static DR_HD void divide(Block<W>& block, W by) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) block.v[i] /= by;
  }
  static DR_HD void raise(Block<W>& to, const Block<W>& block) {  // a NaN stays
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i)
      to.v[i] = (block.v[i] > to.v[i]) | (block.v[i] != block.v[i]) ? block.v[i] : to.v[i];
  }

  const PackJob& job_;
  const Storing<W>& storing_;
  Source source_;
  int64_t last_ = 0;
  W values_[Source::kStrip];
};

template <typename T>
void run_pack(const PackJob& job, int64_t first, int64_t last) {
  if (job.x.stride_channel == 1 && (!job.minus.data || job.minus.stride_channel == 1))
    Packer<Dense<T>>(job).run(first, last);
  else
    Packer<Tiled<T>>(job).run(first, last);
}

}  // namespace

namespace DR_ISA {

extern const PackKernels pack;
const PackKernels pack = {DR_BY_TYPE(run_pack)};

}  // namespace DR_ISA
}  // namespace dreamreader
