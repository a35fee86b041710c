// The intervention program on the GPU: one tile of x in the registers of a group of threads.
//
// A group (a warp, or a whole block) owns `across * kTokens` consecutive tokens of one row of the
// batch and `slots * kChannels` channels. A thread holds kTokens x kChannels elements of it:
//
//   token(j)   = first_token + (lane % across) * kTokens + j
//   channel(i) = first_channel + i / kChannelRun * hop + i % kChannelRun
//   hop        = slots * kChannelRun
//
// Runs of kTokenRun tokens or kChannelRun channels are contiguous in memory and move as one 16-byte
// access; at most one of the two is above 1. Programs with a sum over channels have all channels of
// a row in one group. Sums go over lanes by a butterfly and over warps in a fixed order, so results
// repeat bit for bit. kShared keeps the elements in shared memory and the loops short: for shapes
// that have no runs, and for rows too wide for registers.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_tile.h"
#include "intervention.h"

namespace dreamreader {

template <typename W>
struct Job {
  StridedRows in, out;
  Program<W> program;
  bool copy;            // out of place: elements that no step touches are copied
  bool sums;            // some step sums over channels
  int32_t across;       // threads of a group along the tokens, a power of two up to 32
  uint32_t blocks;      // groups along the tokens
  uint32_t groups;      // rows * blocks
  int32_t group_bytes;  // shared memory of one group
  int32_t* seen;        // out of place: where bits of Seen are added, or null
};

// The value itself, as far as the compiler knows another one each time: it then computes addresses
// where they are used, instead of once before the loop over the steps, where they do not fit into
// registers.
__device__ __forceinline__ int32_t afresh(int32_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// kRun contiguous elements; 16 bytes when kRun > 1, and then aligned to them.
template <typename T, int kRun>
struct Pack {
  T values[kRun];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kRun == 1) {
      values[0] = *from;
    } else {
      static_assert(sizeof(T) * kRun == sizeof(uint4));
      const uint4 raw = *reinterpret_cast<const uint4*>(from);
      memcpy(values, &raw, sizeof(raw));
    }
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kRun == 1) {
      *to = values[0];
    } else {
      uint4 raw;
      memcpy(&raw, values, sizeof(raw));
      *reinterpret_cast<uint4*>(to) = raw;
    }
  }
};

template <typename T, typename W, int kTokens, int kChannels, int kTokenRun, int kChannelRun,
          bool kShared>
struct Tile {
  static_assert(kTokenRun == 1 || kChannelRun == 1);
  static_assert(kTokens % kTokenRun == 0 && kChannels % kChannelRun == 0 &&
                kTokens * kChannels <= 32);
  static constexpr int kRun = kTokenRun * kChannelRun;
  static constexpr int kTogether = kTokens > 4   ? 1
                                   : kTokens > 1 ? 2
                                                 : 4;  // vectors of a subspace in one reduction
  static constexpr int kSums = kTokens * kTogether;    // the widest reduction
  static constexpr int kHeld =
      kShared ? kTokens * kChannels : 0;  // elements of a thread in shared memory
  static constexpr bool kSubspaces = kTokens > 1 || kShared;  // one row alone leaves them to others
  static constexpr uint32_t kRunBits = (1u << kChannelRun) - 1;
  static constexpr int kUnroll = kShared ? 2 : kChannels;  // registers have no index at run time

  const Job<W>& job;
  const Program<W>& program;
  int32_t row;
  int32_t first_token;    // of this thread
  int32_t first_channel;  // of this thread
  int32_t hop;            // channels from one run to the next
  int lane, lanes, across;
  uint32_t inside;   // bit i: channel(i) exists
  uint32_t touched;  // bit j * kChannels + i: some step writes element (j, i)
  uint32_t needed;   // the same: it must be read
  W elements[kShared ? 1 : kTokens * kChannels];
  W* shared_elements;  // [kTokens * kChannels][lanes]
  W* partial;          // [warps][kSums][across]
  W* totals;           // [sums_kept(m) of the largest m][across]

  __device__ __forceinline__ Tile(const Job<W>& of, uint32_t group, char* shared)
      : job(of), program(of.program), lane(threadIdx.x), lanes(blockDim.x), across(of.across) {
    const int slots = lanes / across;
    row = int32_t(group / job.blocks);
    first_token = (int32_t(group % job.blocks) * across + lane % across) * kTokens;
    first_channel = int32_t(blockIdx.y) * slots * kChannels + lane / across * kChannelRun;
    hop = slots * kChannelRun;
    shared_elements = reinterpret_cast<W*>(shared);
    partial = shared_elements + (kShared ? kTokens * kChannels * lanes : 0);
    totals = partial + (lanes > kWarp ? lanes / kWarp * kSums * across : 0);
    inside = in_range(0, int32_t(job.in.width));
  }

  // Sums that a step with m vectors (renorm: any m) keeps at once.
  static int64_t sums_kept(int64_t m) {
    const int64_t rounds = (m + kTogether - 1) / kTogether;
    return kTokens * (rounds * kTogether > 2 ? rounds * kTogether : 2);
  }

  __device__ __forceinline__ W& z(int j, int i) {
    return kShared ? shared_elements[(j * kChannels + i) * lanes + lane]
                   : elements[kShared ? 0 : j * kChannels + i];
  }

  __device__ __forceinline__ static bool has(uint32_t bits, int j, int i) {
    return bits >> (j * kChannels + i) & 1u;
  }

  // Bit i: begin <= channel(i) < end.
  __device__ __forceinline__ uint32_t in_range(int32_t begin, int32_t end) const {
    uint32_t bits = 0;
    int32_t c = afresh(first_channel);
#pragma unroll(kUnroll)
    for (int i = 0; i < kChannels; i += kChannelRun, c += hop) {
#pragma unroll
      for (int k = 0; k < kChannelRun; ++k)
        bits |= uint32_t(c + k >= begin && c + k < end) << (i + k);
    }
    return bits;
  }

  __device__ __forceinline__ bool exists(int j) const { return first_token + j < job.in.tokens; }

  __device__ __forceinline__ W strength(int step, int j) const {
    return exists(j) ? strength_of(program, step, row, first_token + j) : W(0);
  }

  // Bit i: the step reads and writes channel(i).
  __device__ __forceinline__ uint32_t chosen(const Step& step) const {
    if (step.begin == 0 && step.end == job.in.width && step.mask < 0) return inside;
    uint32_t bits = in_range(step.begin, step.end);
    if (step.mask < 0) return bits;
    const uint8_t* mask = program.masks + step.mask * job.in.width;
    int32_t c = afresh(first_channel);
#pragma unroll(kUnroll)
    for (int i = 0; i < kChannels; i += kChannelRun, c += hop) {
#pragma unroll
      for (int k = 0; k < kChannelRun; ++k) {
        if ((bits >> (i + k) & 1u) && mask[c + k] == 0) bits &= ~(1u << (i + k));
      }
    }
    return bits;
  }

  // Where token j of channel(0) is.
  __device__ __forceinline__ T* at(const StridedRows& x, int j) const {
    return static_cast<T*>(x.data) + row * x.stride_entry +
           int64_t{first_token + j} * x.stride_token + afresh(first_channel) * x.stride_channel;
  }

  // What the strengths say about this thread's elements, without reading x. Backwards, an exact
  // overwrite does not depend on x, a sum depends on all that it covers. Returns whether any token
  // of this thread has work.
  __device__ __forceinline__ bool scan() {
    bool work = false;
    touched = needed = 0;  // also without work: threads beside this one may have some
    for (int p = 0; p < program.count; ++p) {
      const uint32_t bits = chosen(program.steps[p]);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        if (strength(p, j) == W(0)) continue;
        work = true;
        touched |= bits << (j * kChannels);
      }
    }
    if (!work) return false;
    uint32_t entry = 0;  // read on entry by renorm
    needed = touched;
    for (int p = program.count - 1; p >= 0; --p) {
      const Step& step = program.steps[p];
      const bool overwrites = step.kind == kFill || step.kind == kPatch;
      const bool sums =
          step.kind == kClampComponent || step.kind == kProject || step.kind == kRenorm;
      if (!overwrites && !sums) continue;
      const uint32_t bits = chosen(step);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const W s = strength(p, j);
        if (overwrites && s == W(1)) needed &= ~(bits << (j * kChannels));
        if (sums && s != W(0)) needed |= bits << (j * kChannels);
        if (step.kind == kRenorm && s != W(0)) entry |= bits << (j * kChannels);
      }
    }
    needed |= entry;
    return true;
  }

  // Calls f(j, i, value) for the elements of x whose run has a bit in `wanted` (as in `touched`).
  template <typename F>
  __device__ __forceinline__ void read(uint32_t wanted, F f) const {
#pragma unroll
    for (int j = 0; j < kTokens; j += kTokenRun) {
      const T* from = at(job.in, j);
#pragma unroll(kUnroll)
      for (int i = 0; i < kChannels; i += kChannelRun, from += hop * job.in.stride_channel) {
        uint32_t bits = 0;
#pragma unroll
        for (int k = 0; k < kTokenRun; ++k) bits |= wanted >> ((j + k) * kChannels + i) & kRunBits;
        if (bits == 0) continue;
        Pack<T, kRun> pack;
        pack.load(from);
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          f(j + k / kChannelRun, i + k % kChannelRun, widen<W>(pack.values[k]));
        }
      }
    }
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
#pragma unroll(kUnroll)
      for (int i = 0; i < kChannels; ++i) z(j, i) = W(0);
    }
    read(needed, [&](int j, int i, W value) { z(j, i) = value; });
  }

  // Bits of Seen of one element; the difference of two infinities is NaN.
  __device__ __forceinline__ static uint32_t seen_of(T before, T after) {
    const W was = widen<W>(before), is = widen<W>(after);
    uint32_t bits = was != is ? kChanged : 0;
    if constexpr (sizeof(T) == 2) {
      bits |= is - is != W(0) ? kOverflowed : 0;
      bits |= was - was != W(0) ? kNotFinite : 0;
    }
    return bits;
  }

  // Adds the bits of all threads; every thread of a warp must call it.
  __device__ __forceinline__ void tell(uint32_t bits) const {
    uint32_t all = 0;
#pragma unroll
    for (uint32_t bit = kChanged; bit <= kNotFinite; bit *= 2) {
      all |= __any_sync(kAllLanes, (bits & bit) != 0) ? bit : 0;
    }
    // Most warps find what another has told already.
    const int32_t known = *static_cast<const volatile int32_t*>(job.seen);
    if (lane % kWarp == 0 && (all & ~uint32_t(known)) != 0) atomicOr(job.seen, int32_t(all));
  }

  // Writes what the steps touched; out of place also copies the rest. Returns bits of Seen.
  __device__ __forceinline__ uint32_t store() {
    uint32_t seen = 0;
    constexpr uint32_t kAll = (1u << kRun) - 1;
#pragma unroll
    for (int j = 0; j < kTokens; j += kTokenRun) {
      const T* from = at(job.in, j);
      T* to = at(job.out, j);
#pragma unroll(kUnroll)
      for (int i = 0; i < kChannels; i += kChannelRun) {
        uint32_t written = 0;  // bits in the order of the run
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          written |= uint32_t(has(touched, j + k / kChannelRun, i + k % kChannelRun)) << k;
        }
        const bool fill = job.copy && exists(j) && (inside >> i & 1u);  // runs exist as a whole
        Pack<T, kRun> pack = {};
        if (fill && (written != kAll || job.seen)) pack.load(from);
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          if (!(written >> k & 1u)) continue;
          const T after = narrow<T>(z(j + k / kChannelRun, i + k % kChannelRun));
          if (job.seen) seen |= seen_of(pack.values[k], after);
          pack.values[k] = after;
        }
        if (written == kAll || fill) {
          pack.store(to);
        } else if (written != 0) {
          const int64_t stride = kTokenRun > 1 ? job.out.stride_token : job.out.stride_channel;
#pragma unroll
          for (int k = 0; k < kRun; ++k) {
            if (written >> k & 1u) to[k * stride] = pack.values[k];
          }
        }
        from += hop * job.in.stride_channel;
        to += hop * job.out.stride_channel;
      }
    }
    return seen;
  }

  // Sums values over the channels of the group, for each token; leaves them in `values` and in
  // `into` [kCount][across]. Every thread of the group must call it.
  template <int kCount>
  __device__ __forceinline__ void sum(W (&values)[kCount], W* into) const {
    static_assert(kCount <= kSums);
    for (int distance = kWarp / 2; distance >= across; distance /= 2) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) values[n] += __shfl_xor_sync(kAllLanes, values[n], distance);
    }
    const int in_warp = lane % kWarp;
    if (lanes == kWarp) {
      __syncwarp();  // the previous contents have been read
      if (in_warp < across) {
#pragma unroll
        for (int n = 0; n < kCount; ++n) into[n * across + in_warp] = values[n];
      }
      __syncwarp();
      return;
    }
    const int all = kCount * across;
    if (in_warp < across) {
#pragma unroll
      for (int n = 0; n < kCount; ++n)
        partial[lane / kWarp * all + n * across + in_warp] = values[n];
    }
    __syncthreads();
    for (int k = lane; k < all; k += lanes) {
      W total = 0;
      for (int warp = 0; warp < lanes / kWarp; ++warp) total += partial[warp * all + k];
      into[k] = total;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kCount; ++n) values[n] = into[n * across + lane % across];
  }

  // Calls f(i, v[channel(i)]) for the chosen channels.
  template <typename F>
  __device__ __forceinline__ void with_vector(int64_t number, uint32_t bits, F f) const {
    const W* v = program.vectors + number * job.in.width + afresh(first_channel);
#pragma unroll(kUnroll)
    for (int i = 0; i < kChannels; i += kChannelRun, v += hop) {
      if ((bits >> i & kRunBits) == 0) continue;
      W values[kChannelRun];
      if constexpr (kChannelRun > 1) {
        constexpr int kQuad = sizeof(uint4) / sizeof(W);
        static_assert(kChannelRun % kQuad == 0);
#pragma unroll
        for (int k = 0; k < kChannelRun; k += kQuad) {
          const uint4 raw = __ldg(reinterpret_cast<const uint4*>(v + k));
          memcpy(values + k, &raw, sizeof(raw));
        }
      } else {
        values[0] = __ldg(v);
      }
#pragma unroll
      for (int k = 0; k < kChannelRun; ++k) {
        if (bits >> (i + k) & 1u) f(i + k, values[k]);
      }
    }
  }

  // Calls f(j, i) for the elements that a step with these strengths and channels changes.
  template <typename F>
  __device__ __forceinline__ void each(const W (&s)[kTokens], uint32_t bits, F f) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (s[j] == W(0)) continue;
#pragma unroll(kUnroll)
      for (int i = 0; i < kChannels; ++i) {
        if (bits >> i & 1u) f(j, i);
      }
    }
  }

  __device__ __forceinline__ void run() {
    for (int p = 0; p < program.count; ++p) {
      const Step& step = program.steps[p];
      W s[kTokens];
      bool on = false;
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        s[j] = strength(p, j);
        on = on || s[j] != W(0);
      }
      // With one thread along the tokens all threads agree on this, otherwise sums must not be left
      // out.
      if (!on && (across == 1 || !job.sums)) continue;
      apply(step, s, chosen(step));
    }
  }

  __device__ __forceinline__ void apply(const Step& step, const W (&s)[kTokens], uint32_t bits) {
    W lo = W(0), hi = W(0);
    if (step.limit >= 0) {
      lo = limit_of(program, step, 0, row, job.in.entries);
      hi = limit_of(program, step, 1, row, job.in.entries);
    }
    switch (step.kind) {
      case kSteer:  // x + s v
        with_vector(step.vector, bits, [&](int i, W v) {
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            if (s[j] != W(0)) z(j, i) += s[j] * v;
          }
        });
        break;
      case kScale:  // x (1 + s (f - 1))
        each(s, bits, [&](int j, int i) { z(j, i) *= scale_factor(lo, s[j]); });
        break;
      case kClamp:  // x + s (clamp(x, lo, hi) - x)
        each(s, bits,
             [&](int j, int i) { z(j, i) = blend(z(j, i), clamp_value(z(j, i), lo, hi), s[j]); });
        break;
      case kFill:  // x + s (v - x)
        with_vector(step.vector, bits, [&](int i, W v) {
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            if (s[j] != W(0)) z(j, i) = blend(z(j, i), v, s[j]);
          }
        });
        break;
      case kClampComponent:
      case kProject:
        if constexpr (kSubspaces) {
          if (step.count > 1) {
            along_subspace(step, s, bits);
            break;
          }
        }
        along_one(step, s, bits, lo, hi);
        break;
      case kPatch:
        patch(step, s, bits);
        break;
      case kRenorm:
        renorm(s, bits);
        break;
    }
  }

  // x + s (clamp(c, lo, hi) - c) v and x - s c v with c = <x, v>
  __device__ __forceinline__ void along_one(const Step& step, const W (&s)[kTokens], uint32_t bits,
                                            W lo, W hi) {
    W c[kTokens] = {};
    with_vector(step.vector, bits, [&](int i, W v) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) c[j] += z(j, i) * v;
    });
    sum(c, totals);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      c[j] = step.kind == kProject ? -component_removed(c[j], step.one_sided != 0, s[j])
                                   : component_shift(c[j], lo, hi, s[j]);
    }
    with_vector(step.vector, bits, [&](int i, W v) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        if (s[j] != W(0)) z(j, i) += c[j] * v;
      }
    });
  }

  // x - s V'V x: all components of the row as it is, then their removal in one
  __device__ __forceinline__ void along_subspace(const Step& step, const W (&s)[kTokens],
                                                 uint32_t bits) {
    for (int m = 0; m < step.count; m += kTogether) {
      W c[kTogether * kTokens] = {};
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        if (m + n >= step.count) continue;
        with_vector(step.vector + m + n, bits, [&](int i, W v) {
#pragma unroll
          for (int j = 0; j < kTokens; ++j) c[n * kTokens + j] += z(j, i) * v;
        });
      }
      sum(c, totals + m * kTokens * across);
    }
    // What is removed is summed apart from x, whose magnitude would round every term.
    constexpr int kPart = kChannelRun > 1 ? int(sizeof(uint4) / sizeof(W)) : 1;
#pragma unroll(kUnroll)
    for (int i = 0; i < kChannels; i += kPart) {
      if ((bits >> i & ((1u << kPart) - 1)) == 0) continue;
      const W* v = program.vectors + step.vector * job.in.width + afresh(first_channel) +
                   i / kChannelRun * hop + i % kChannelRun;
      W removed[kTokens * kPart] = {};
#pragma unroll 1
      for (int m = 0; m < step.count; ++m, v += job.in.width) {
        Pack<W, kPart> values;
        values.load(v);
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          const W c = totals[(m * kTokens + j) * across + lane % across];
#pragma unroll
          for (int k = 0; k < kPart; ++k) removed[j * kPart + k] += c * values.values[k];
        }
      }
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        if (s[j] == W(0)) continue;
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          if (bits >> (i + k) & 1u) z(j, i + k) -= s[j] * removed[j * kPart + k];
        }
      }
    }
  }

  // x + s (source[index] - x)
  __device__ __forceinline__ void patch(const Step& step, const W (&s)[kTokens], uint32_t bits) {
    const Source& source = program.sources[step.source];
    switch (source.dtype) {
      case DType::f16:
        return patch_from<__half>(source, s, bits);
      case DType::bf16:
        return patch_from<__nv_bfloat16>(source, s, bits);
      case DType::f32:
        return patch_from<float>(source, s, bits);
      case DType::f64:
        return patch_from<double>(source, s, bits);
    }
  }

  template <typename S>
  __device__ __forceinline__ void patch_from(const Source& source, const W (&s)[kTokens],
                                             uint32_t bits) {
    // A source in the dtype of x, dense and aligned, is read like x.
    constexpr bool kSame = std::is_same_v<S, T> && kChannelRun > 1;
    const bool packed = kSame && source.stride_channel == 1 &&
                        source.stride_entry % kChannelRun == 0 &&
                        reinterpret_cast<uintptr_t>(source.data) % sizeof(uint4) == 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (s[j] == W(0)) continue;
      const int64_t entry = entry_of(source, row, first_token + j);
      const S* from = static_cast<const S*>(source.data) + entry * source.stride_entry +
                      afresh(first_channel) * source.stride_channel;
#pragma unroll(kUnroll)
      for (int i = 0; i < kChannels; i += kChannelRun, from += hop * source.stride_channel) {
        if ((bits >> i & kRunBits) == 0) continue;
        Pack<S, kSame ? kChannelRun : 1> pack;
        if (kSame && packed && entry >= 0) pack.load(from);
#pragma unroll
        for (int k = 0; k < kChannelRun; ++k) {
          if (!(bits >> (i + k) & 1u)) continue;
          W target = W(NAN);
          if (entry >= 0) {
            target = widen<W>(kSame && packed ? pack.values[kSame ? k : 0]
                                              : from[k * source.stride_channel]);
          }
          z(j, i + k) = blend(z(j, i + k), target, s[j]);
        }
      }
    }
  }

  // x (1 + s (|x0| / |x| - 1)); x0 is read again, nothing of this group has been written yet
  __device__ __forceinline__ void renorm(const W (&s)[kTokens], uint32_t bits) {
    uint32_t wanted = 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) wanted |= s[j] != W(0) ? bits << (j * kChannels) : 0;
    W* before = totals + kTokens * across;
    W squares[kTokens] = {};
    each(s, bits, [&](int j, int i) { squares[j] += z(j, i) * z(j, i); });
    sum(squares, totals);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) squares[j] = W(0);
    read(wanted, [&](int j, int i, W value) {
      if (has(wanted, j, i)) squares[j] += value * value;
    });
    sum(squares, before);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int place = j * across + lane % across;
      const W factor = renorm_factor(W(sqrt(totals[place])), W(sqrt(before[place])), s[j]);
#pragma unroll(kUnroll)
      for (int i = 0; i < kChannels; ++i) {
        if (s[j] != W(0) && (bits >> i & 1u)) z(j, i) *= factor;
      }
    }
  }
};

}  // namespace dreamreader
