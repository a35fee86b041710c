// Plane engine: feature maps [B, C, H, W] seen as [B, H*W, C]. A run of tokens is swept channel by
// channel, in memory order: once for each component that a step needs, and once to write. What came
// before a component is computed again rather than kept.
#pragma once

#include "intervention_columns_simd.h"

namespace dreamreader {
namespace {

template <std::size_t bytes>
struct Unsigned {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};

// Tokens first .. first + count - 1 of batch row b.
template <typename T>
struct Run {
  using W = typename Work<T>::type;
  using Bits = typename Unsigned<sizeof(T)>::type;
  using V = typename Lanes<W>::V;
  const InterventionJob& job;
  const Program<W>& p;
  W* strengths;  // [steps][kPlaneTokens]
  int64_t b, first, count;
  bool whole;                               // every token has work
  Bits work[kPlaneTokens];                  // all bits set: some step touches the token
  int8_t blocks[kPlaneTokens / kBlock<W>];  // tokens with work: all (1), none (0), some (-1)
  W lo[kMaxSteps], hi[kMaxSteps];

  // The steps that concern one channel.
  struct Concerned {
    int count = 0, steps[kMaxSteps];
  };

  void prepare() {
    __builtin_memset(work, 0, sizeof(work));
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.steps[i];
      lo[i] = step.limit >= 0 ? limit_of(p, step, 0, b, job.in.entries) : W(0);
      hi[i] = step.limit >= 0 ? limit_of(p, step, 1, b, job.in.entries) : W(0);
      for (int64_t j = 0; j < kPlaneTokens; ++j) {
        const W s = j < count ? strength_of(p, i, b, first + j) : W(0);
        strengths[i * kPlaneTokens + j] = s;
        if (s != W(0)) work[j] = Bits(-1);
      }
    }
    whole = true;
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      const int64_t n = valid(d);
      int64_t busy = 0;
      for (int64_t j = d; j < d + n; ++j) busy += work[j] != 0;
      blocks[d / kBlock<W>] = busy == n ? 1 : (busy == 0 ? 0 : -1);
      whole &= busy == n;
    }
    for (int i = 0; i < p.count; ++i)
      if (p.steps[i].kind == kProject || p.steps[i].kind == kClampComponent) add_component(i);
  }

  int64_t valid(int64_t d) const { return count - d < kBlock<W> ? count - d : int64_t(kBlock<W>); }

  const T* read_at(int64_t c) const {
    return row_at<T>(job.in, b, 0) + c * job.in.stride_channel + first;
  }
  T* write_at(int64_t c) const {
    return row_at<T>(job.out, b, 0) + c * job.out.stride_channel + first;
  }

  bool concerns(const Step& step, int64_t c) const {
    return c >= step.begin && c < step.end &&
           (step.mask < 0 || p.masks[step.mask * job.in.width + c]);
  }

  // Those of the first `before` steps.
  Concerned of_channel(int64_t c, int before) const {
    Concerned found;
    for (int i = 0; i < before; ++i)
      if (concerns(p.steps[i], c)) found.steps[found.count++] = i;
    return found;
  }

  // The next channel comes from other pages, where the processor does not look ahead.
  static inline __attribute__((always_inline)) void prefetch(const T* next) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < kBlock<W> * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(next) + byte, 1);
  }

  // Step i on the tokens of a block.
  void apply(int i, int64_t c, int64_t d, Block<W>& y) const {
    const Step& step = p.steps[i];
    const V one = W(1) - V{}, low = lo[i] - V{}, high = hi[i] - V{};
    const V v = (step.vector >= 0 ? p.vectors[step.vector * job.in.width + c] : W(0)) - V{};
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) {
      const V s = load_lanes(strengths + i * kPlaneTokens + d + k * kWidth<W>), now = y.v[k];
      V target = v;  // of kFill
      if (step.kind == kSteer || step.kind == kProject || step.kind == kClampComponent) {
        target = now + s * v;
      } else if (step.kind == kScale) {
        target = now * (s == one ? low : one + s * (low - one));
      } else {
        if (step.kind == kClamp) target = now < low ? low : (now > high ? high : now);
        target = s == one ? target : now + s * (target - now);
      }
      y.v[k] = s != V{} ? target : now;
    }
  }

  // Replaces the strengths of step i by the multiples of its vector that it adds.
  void add_component(int i) {
    const Step& step = p.steps[i];
    const W* v = p.vectors + step.vector * job.in.width;
    W totals[kPlaneTokens] = {};
    for (int64_t from = step.begin; from < step.end; from += kSummed) {
      const int64_t to = step.end - from < kSummed ? step.end : from + kSummed;
      Concerned earlier[kSummed];
      for (int64_t c = from; c < to; ++c) earlier[c - from] = of_channel(c, i);
      for (int64_t d = 0; d < count; d += kBlock<W>) {
        if (!blocks[d / kBlock<W>]) continue;
        Block<W> part = splat(W(0));
        for (int64_t c = from; c < to; ++c) {
          if (!concerns(step, c)) continue;
          const T* x = read_at(c) + d;
          prefetch(x + kSummed * job.in.stride_channel);
          Block<W> y = load<W>(x, valid(d));
          const Concerned& steps = earlier[c - from];
          for (int k = 0; k < steps.count; ++k) apply(steps.steps[k], c, d, y);
          const V factor = v[c] - V{};
#pragma GCC unroll 16
          for (int k = 0; k < kVectors; ++k) part.v[k] += y.v[k] * factor;
        }
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) {
          W* total = totals + d + k * kWidth<W>;
          store_lanes(total, load_lanes(total) + part.v[k]);
        }
      }
    }
    W* s = strengths + i * kPlaneTokens;
    for (int64_t j = 0; j < count; ++j) {
      if (s[j] == W(0)) continue;
      s[j] = step.kind == kProject ? -component_removed(totals[j], step.one_sided, s[j])
                                   : component_shift(totals[j], lo[i], hi[i], s[j]);
    }
  }

  // Writes y where some step touches the token; the others keep their bits.
  static inline __attribute__((always_inline)) void merge(const T* from, T* to, const Bits* mask,
                                                          const Block<W>& y, int64_t n) {
    typedef Bits Group __attribute__((vector_size(DR_VECTOR_BYTES)));
    constexpr int64_t kGroup = DR_VECTOR_BYTES / int64_t(sizeof(T));
    T fresh[kBlock<W>];
    store(fresh, y, kBlock<W>);
    int64_t j = 0;
    for (; j + kGroup <= n; j += kGroup) {
      const Group which = load_vector<Group>(mask + j);
      store_vector(to + j, (load_vector<Group>(fresh + j) & which) |
                               (load_vector<Group>(from + j) & ~which));
    }
    for (; j < n; ++j) to[j] = mask[j] ? fresh[j] : from[j];
  }

  void channel(int64_t c, Witness<T>& witness) const {
    const Concerned concerned = of_channel(c, p.count);
    const T* from = read_at(c);
    T made[kPlaneTokens], *const out = write_at(c);  // made: where results go past the caches
    T* to = job.stream && job.in.data != job.out.data ? made : out;
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      const int64_t n = valid(d);
      const int touched = concerned.count ? blocks[d / kBlock<W>] : 0;
      if (touched == 0 && from != to)
        __builtin_memcpy(to + d, from + d, std::size_t(n) * sizeof(T));
      if (touched == 0) continue;
      prefetch(from + job.in.stride_channel + d);
      Block<W> y = load<W>(from + d, n);
      for (int i = 0; i < concerned.count; ++i) apply(concerned.steps[i], c, d, y);
      if (touched == 1 || sizeof(T) == sizeof(W))  // unrounded lanes keep their bits
        store(to + d, y, n);
      else
        merge(from + d, to + d, work + d, y, n);
    }
    if (job.seen && concerned.count) look(from, to, witness);
    if (to != out) copy_past_caches(out, to, std::size_t(count) * sizeof(T));
  }

  void look(const T* from, const T* to, Witness<T>& witness) const {
    if (whole) return witness.look(from, to, count);
    if (!witness.asks(to, count)) return;
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      Bits before[kBlock<W>], after[kBlock<W>];
      const int64_t n = valid(d);
      __builtin_memcpy(before, from + d, std::size_t(n) * sizeof(T));
      __builtin_memcpy(after, to + d, std::size_t(n) * sizeof(T));
      for (int64_t j = 0; j < n; ++j) {  // of tokens without work nothing is told
        before[j] &= work[d + j];
        after[j] &= work[d + j];
      }
      witness.look(reinterpret_cast<T*>(before), reinterpret_cast<T*>(after), n);
    }
  }
};

template <typename T>
static void run_planes(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const Program<W>& p = *static_cast<const Program<W>*>(job.program);
  Witness<T> witness(job.seen);
  const int64_t runs = (job.in.tokens + job.run - 1) / job.run;
  for (int64_t item = first; item < last; ++item) {
    const int64_t token = item % runs * job.run, left = job.in.tokens - token;
    Run<T> run{job,         p,     static_cast<W*>(scratch),
               item / runs, token, left < job.run ? left : job.run,
               true,        {},    {},
               {},          {}};
    run.prepare();
    for (int64_t c = 0; c < job.in.width; ++c) run.channel(c, witness);
  }
  if (job.stream) end_past_caches();
}

}  // namespace
}  // namespace dreamreader
