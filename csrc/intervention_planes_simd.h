// Plane engine: feature maps [B, C, H, W] seen as [B, H*W, C]. A run of tokens is swept channel by
// channel, in memory order: once for each component that a step needs, and once to write. What came
// before a component is computed again rather than kept.
#pragma once

#include "intervention_columns_simd.h"

namespace dreamreader {
namespace {

// Tokens first .. first + count - 1 of batch row b.
template <typename T>
struct Run {
  using W = typename Work<T>::type;
  using Bits = typename Unsigned<sizeof(T)>::type;
  using V = typename Lanes<W>::V;
  const InterventionJob& job;
  const Program<W>& p;
  // With 0 behind the last token:
  W* strengths;    // [steps][kPlaneTokens]
  Bits* work;      // all bits set: some step touches the token
  int8_t* blocks;  // tokens with work: all (1), none (0), some (-1)
  int64_t b = 0, first = 0, count = 0;
  W lo[kMaxSteps], hi[kMaxSteps];

  Run(const InterventionJob& job, void* scratch)
      : job(job),
        p(*static_cast<const Program<W>*>(job.program)),
        strengths(static_cast<W*>(scratch)),
        work(reinterpret_cast<Bits*>(strengths + p.count * kPlaneTokens)),
        blocks(reinterpret_cast<int8_t*>(work + kPlaneTokens)) {}

  // The steps that concern one channel.
  struct Concerned {
    int count = 0, steps[kMaxSteps];
  };

  // Goes to the run that begins with this token.
  void prepare(int64_t row, int64_t token) {
    b = row;
    first = token;
    count = job.in.tokens - token < job.run ? job.in.tokens - token : job.run;
    const int64_t whole = (count + kBlock<W> - 1) / kBlock<W> * kBlock<W>;
    __builtin_memset(work, 0, std::size_t(whole) * sizeof(Bits));
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.steps[i];
      lo[i] = step.limit >= 0 ? limit_of(p, step, 0, b, job.in.entries) : W(0);
      hi[i] = step.limit >= 0 ? limit_of(p, step, 1, b, job.in.entries) : W(0);
      W* s = strengths + i * kPlaneTokens;
      const W* from = &p.strength[i * p.strength_step + b * p.strength_row];
      for (int64_t j = 0; j < count; ++j) s[j] = from[(first + j) * p.strength_token];
      for (int64_t j = count; j < whole; ++j) s[j] = W(0);
      for (int64_t j = 0; j < whole; ++j) work[j] |= s[j] != W(0) ? Bits(-1) : Bits(0);
    }
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      int64_t busy = 0;
      for (int64_t j = d; j < d + kBlock<W>; ++j) busy += work[j] != 0;
      blocks[d / kBlock<W>] = busy == 0 ? 0 : (busy == valid(d) ? 1 : -1);
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
  DR_INLINE void prefetch(const T* next) {
    prefetch_block(reinterpret_cast<const char*>(next), kBlock<W> * int64_t(sizeof(T)));
  }

  // Step i on the tokens of a block, of which each has a strength of its own.
  inline __attribute__((always_inline)) void apply(int i, int64_t c, int64_t d, Block<W>& y) const {
    const Step& step = p.steps[i];
    const W* strength = strengths + i * kPlaneTokens + d;
    const V one = W(1) - V{}, low = lo[i] - V{}, high = hi[i] - V{};
    const V v = (step.vector >= 0 ? p.vectors[step.vector * job.in.width + c] : W(0)) - V{};
    const auto each = [&](auto target) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) {
        const V s = load_lanes(strength + k * kWidth<W>), now = y.v[k];
        y.v[k] = s != V{} ? target(now, s) : now;
      }
    };
    const auto blend = [&](V now, V target, V s) __attribute__((always_inline)) {
      return s == one ? target : now + s * (target - now);
    };
    switch (step.kind) {
      case kScale:
        return each([&](V now, V s) { return now * blend(one, low, s); });
      case kClamp:
        return each([&](V now, V s) { return blend(now, bound(now, low, high), s); });
      case kFill:
        return each([&](V now, V s) { return blend(now, v, s); });
      default:  // kSteer, kProject, kClampComponent
        return each([&](V now, V s) { return now + s * v; });
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

  void channel(int64_t c, Witness<T>& witness) const {
    const Concerned concerned = of_channel(c, p.count);
    const T* from = read_at(c);
    Sink<T> sink = Sink<T>::at(witness, from, write_at(c), 0, job.stream);
    if (concerned.count == 0) return sink.keep(0, count);
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      const int64_t n = valid(d);
      const int touched = blocks[d / kBlock<W>];
      if (touched == 0) {
        sink.keep(d, n);
        continue;
      }
      prefetch(from + job.in.stride_channel + d);
      Block<W> y = load<W>(from + d, n);
      for (int i = 0; i < concerned.count; ++i) apply(concerned.steps[i], c, d, y);
      if (touched == 1 || (sizeof(T) == sizeof(W) && !sink.compare))  // what is not rounded stays
        sink.put(d, y, n);
      else
        sink.put_some(d, work + d, y, n);
    }
    if (sink.overflowed()) tell_overflow(from, witness);
  }

  // Of tokens without work nothing is told.
  void tell_overflow(const T* from, Witness<T>& witness) const {
    Finite<T> finite;
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      Bits before[kBlock<W>] = {};
      __builtin_memcpy(before, from + d, std::size_t(valid(d)) * sizeof(T));
      for (int j = 0; j < kBlock<W>; ++j) before[j] &= work[d + j];
      finite.see(reinterpret_cast<const T*>(before), kBlock<W>);
    }
    witness.bits |= finite.all() ? kOverflowed : kOverflowed | kNotFinite;
  }
};

template <typename T>
static void run_planes(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  Witness<T> witness(job.seen);
  Run<T> run(job, scratch);
  const int64_t runs = (job.in.tokens + job.run - 1) / job.run;
  for (int64_t item = first; item < last; ++item) {
    run.prepare(item / runs, item % runs * job.run);
    for (int64_t c = 0; c < job.in.width; ++c) run.channel(c, witness);
  }
  if (job.stream) end_past_caches();
}

}  // namespace
}  // namespace dreamreader
