// Plane engine: feature maps [B, C, H, W] seen as [B, H*W, C], for programs without sums over
// channels. A run of tokens is swept channel by channel, in memory order, each element once.
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
  Bits work[kPlaneTokens];                  // all bits set: some step touches the token
  int8_t blocks[kPlaneTokens / kBlock<W>];  // tokens with work: all (1), none (0), some (-1)
  W lo[kMaxSteps], hi[kMaxSteps];

  void prepare() {
    for (int64_t j = 0; j < kPlaneTokens; ++j) work[j] = 0;
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.steps[i];
      lo[i] = step.limit >= 0 ? limit_of(p, step, 0, b, job.in.rows) : W(0);
      hi[i] = step.limit >= 0 ? limit_of(p, step, 1, b, job.in.rows) : W(0);
      for (int64_t j = 0; j < kPlaneTokens; ++j) {
        const W s = j < count ? strength_of(p, i, b, first + j) : W(0);
        strengths[i * kPlaneTokens + j] = s;
        if (s != W(0)) work[j] = Bits(-1);
      }
    }
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      const int64_t n = valid(d);
      int64_t busy = 0;
      for (int64_t j = d; j < d + n; ++j) busy += work[j] != 0;
      blocks[d / kBlock<W>] = busy == n ? 1 : (busy == 0 ? 0 : -1);
    }
  }

  int64_t valid(int64_t d) const { return count - d < kBlock<W> ? count - d : int64_t(kBlock<W>); }

  // The steps that concern channel c.
  int of_channel(int64_t c, int* steps) const {
    int found = 0;
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.steps[i];
      if (c < step.begin || c >= step.end) continue;
      if (step.mask >= 0 && !p.masks[step.mask * job.in.width + c]) continue;
      steps[found++] = i;
    }
    return found;
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
      if (step.kind == kSteer) {
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

  // Writes y where some step touches the token; the others keep their bits.
  static void merge(const T* from, T* to, const Bits* mask, const Block<W>& y, int64_t n,
                    Witness<T>& witness) {
    Bits old[kBlock<W>] = {}, fresh[kBlock<W>];
    __builtin_memcpy(old, from, std::size_t(n) * sizeof(T));
    store(reinterpret_cast<T*>(fresh), y, kBlock<W>);
    for (int64_t j = 0; j < kBlock<W>; ++j)
      fresh[j] = Bits((fresh[j] & mask[j]) | (old[j] & Bits(~mask[j])));
    __builtin_memcpy(to, fresh, std::size_t(n) * sizeof(T));
    if (!witness.seen) return;
    for (int64_t j = 0; j < kBlock<W>; ++j) {  // of the others nothing is told
      old[j] &= mask[j];
      fresh[j] &= mask[j];
    }
    witness.look(reinterpret_cast<T*>(old), reinterpret_cast<T*>(fresh), n);
  }

  void channel(int64_t c, Witness<T>& witness) const {
    int steps[kMaxSteps];
    const int found = of_channel(c, steps);
    const Activation &in = job.in, &out = job.out;
    const T* from =
        static_cast<const T*>(in.data) + b * in.stride_row + c * in.stride_channel + first;
    T* to = static_cast<T*>(out.data) + b * out.stride_row + c * out.stride_channel + first;
    for (int64_t d = 0; d < count; d += kBlock<W>) {
      const int64_t n = valid(d);
      const int touched = found ? blocks[d / kBlock<W>] : 0;
      if (touched == 0 && from != to)
        __builtin_memcpy(to + d, from + d, std::size_t(n) * sizeof(T));
      if (touched == 0) continue;
      const char* next = reinterpret_cast<const char*>(from + in.stride_channel + d);
#pragma GCC unroll 4
      for (int64_t byte = 0; byte < kBlock<W> * int64_t(sizeof(T)); byte += 64)
        __builtin_prefetch(next + byte, 1);
      Block<W> y = load<W>(from + d, n);
      for (int i = 0; i < found; ++i) apply(steps[i], c, d, y);
      if (touched == 1) {
        store(to + d, y, n);
        if (witness.seen) witness.look(from + d, to + d, n);
        continue;
      }
      merge(from + d, to + d, work + d, y, n, witness);
    }
  }
};

template <typename T>
static void run_planes(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const Program<W>& p = *static_cast<const Program<W>*>(job.program);
  Witness<T> witness(job.seen);
  const int64_t runs = (job.in.tokens + kPlaneTokens - 1) / kPlaneTokens;
  for (int64_t item = first; item < last; ++item) {
    const int64_t token = item % runs * kPlaneTokens, left = job.in.tokens - token;
    Run<T> run{job,         p,     static_cast<W*>(scratch),
               item / runs, token, left < kPlaneTokens ? left : kPlaneTokens,
               {},          {},    {},
               {}};
    run.prepare();
    for (int64_t c = 0; c < job.in.width; ++c) run.channel(c, witness);
  }
}

}  // namespace
}  // namespace dreamreader
