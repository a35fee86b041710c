// Column engine: a group of tokens at a time, one token per lane, for memory whose tokens are dense
// (feature maps [B, C, H, W] seen as [B, H*W, C]), for any other stride, and for subspaces. The
// group is gathered channel by channel, in memory order, into scratch y[channel]; every step is
// then a loop or two over it.
#pragma once

#include "intervention_simple_simd.h"

namespace dreamreader {
namespace {

constexpr int kColumnVectors = int(kLaneBytes) / DR_VECTOR_BYTES;
template <typename W>
constexpr int kLanes = int(kLaneBytes / sizeof(W));

// Vectors of a subspace that are worked on together: as many as the registers of AVX-512 hold.
// Elsewhere fewer, but not one at a time, since y is rounded once per tile.
constexpr int kTogether = DR_VECTOR_BYTES == 64 ? 8 : 4;

// Channels that are summed apart: one long sum of a lane would round once per channel.
constexpr int64_t kSummed = 16;

// One value of every lane.
template <typename W>
struct Column {
  typename Lanes<W>::V v[kColumnVectors];

  W get(int lane) const { return v[lane / kWidth<W>][lane % kWidth<W>]; }
  void set(int lane, W value) { v[lane / kWidth<W>][lane % kWidth<W>] = value; }
};

#define DR_COLUMN _Pragma("GCC unroll 8") for (int i = 0; i < kColumnVectors; ++i)

template <typename T>
struct Group {
  using W = typename Work<T>::type;
  using V = typename Lanes<W>::V;
  const InterventionJob& job;
  const Program<W>& p;
  Column<W>* y;  // [width], channels job.begin .. job.end - 1 in use
  int64_t b, t;  // first token
  int lanes;     // tokens in this group
  int touched;   // lanes with work
  bool work[kLanes<W>];

  const uint8_t* mask_of(const Step& step) const {
    return step.mask >= 0 ? p.masks + step.mask * job.in.width : nullptr;
  }

  void gather() const {
    const StridedRows& x = job.in;
    const T* base = row_at<T>(x, b, t);
    if (x.stride_channel == 1 && x.stride_token != 1) return gather_rows(base);
    for (int64_t c = job.begin; c < job.end; ++c) {
      const T* from = base + c * x.stride_channel;
      T part[kLanes<W>] = {};
      if (x.stride_token != 1 || lanes != kLanes<W>) {
        for (int l = 0; l < lanes; ++l) part[l] = from[l * x.stride_token];
        from = part;
      }
      DR_COLUMN y[c].v[i] = load_lanes(from + i * kWidth<W>);
    }
  }

  // Channels dense: reads each row in order and spreads it over the lanes.
  void gather_rows(const T* base) const {
    W* flat = reinterpret_cast<W*>(y);
    for (int64_t c = job.begin; c < job.end; c += kBlock<W>) {
      const int64_t n = job.end - c < kBlock<W> ? job.end - c : int64_t(kBlock<W>);
      for (int l = 0; l < kLanes<W>; ++l) {
        W part[kBlock<W>] = {};
        if (l < lanes) store(part, load<W>(base + l * job.in.stride_token + c, n), kBlock<W>);
        for (int64_t i = 0; i < n; ++i) flat[(c + i) * kLanes<W> + l] = part[i];
      }
    }
  }

  // Writes the lanes with work; the others keep their bits, copied where the result is another
  // tensor.
  void scatter() const {
    const StridedRows& x = job.out;
    T* base = row_at<T>(x, b, t);
    if (touched && x.stride_channel == 1 && x.stride_token != 1) {
      scatter_rows(base);
    } else if (touched) {
      for (int64_t c = job.begin; c < job.end; ++c) {
        T* to = base + c * x.stride_channel;
        T part[kLanes<W>];
        const bool whole = x.stride_token == 1 && touched == kLanes<W>;
        DR_COLUMN store_lanes((whole ? to : part) + i * kWidth<W>, y[c].v[i]);
        if (whole) continue;
        for (int l = 0; l < lanes; ++l)
          if (work[l]) to[l * x.stride_token] = part[l];
      }
    }
    if (job.in.data == job.out.data) return;
    for (int l = 0; l < lanes; ++l) {
      copy(l, 0, work[l] ? job.begin : x.width);
      if (work[l]) copy(l, job.end, x.width);
    }
  }

  // Tells what the lanes with work were before and after.
  void look(Witness<T>& witness) const {
    const T *in = row_at<T>(job.in, b, 0), *out = row_at<T>(job.out, b, 0);
    const bool rows = job.in.stride_channel == 1 && job.out.stride_channel == 1;
    const bool whole = touched == lanes && job.in.stride_token == 1 && job.out.stride_token == 1;
    if (!rows && whole) {
      for (int64_t c = job.begin; c < job.end; ++c)
        witness.look(in + t + c * job.in.stride_channel, out + t + c * job.out.stride_channel,
                     lanes);
      return;
    }
    for (int l = 0; l < lanes; ++l) {
      if (!work[l]) continue;
      const T* from = in + (t + l) * job.in.stride_token;
      const T* to = out + (t + l) * job.out.stride_token;
      if (rows) {
        witness.look(from + job.begin, to + job.begin, job.end - job.begin);
        continue;
      }
      for (int64_t c = job.begin; c < job.end; ++c)
        witness.look(from + c * job.in.stride_channel, to + c * job.out.stride_channel, 1);
    }
  }

  void scatter_rows(T* base) const {
    const W* flat = reinterpret_cast<const W*>(y);
    for (int64_t c = job.begin; c < job.end; c += kBlock<W>) {
      const int64_t n = job.end - c < kBlock<W> ? job.end - c : int64_t(kBlock<W>);
      for (int l = 0; l < lanes; ++l) {
        if (!work[l]) continue;
        W part[kBlock<W>];
        for (int64_t i = 0; i < n; ++i) part[i] = flat[(c + i) * kLanes<W> + l];
        store(base + l * job.out.stride_token + c, load<W>(part, n), n);
      }
    }
  }

  void copy(int l, int64_t begin, int64_t end) const {
    const T* from = static_cast<const T*>(job.in.data) + b * job.in.stride_entry +
                    (t + l) * job.in.stride_token;
    T* to =
        static_cast<T*>(job.out.data) + b * job.out.stride_entry + (t + l) * job.out.stride_token;
    for (int64_t c = begin; c < end; ++c)
      to[c * job.out.stride_channel] = from[c * job.in.stride_channel];
  }

  // totals[k] = sum over the channels of a step of y v_k, for `count` vectors v_k (at most
  // kTogether) of `width` values.
  template <int count>
  void dots(const Step& step, const W* v, Column<W>* totals) const {
    const uint8_t* mask = mask_of(step);
    const int64_t width = job.in.width;
    Column<W> total[count] = {};
    for (int64_t first = step.begin; first < step.end; first += kSummed) {
      const int64_t last = step.end - first < kSummed ? step.end : first + kSummed;
      Column<W> part[count] = {};
      for (int64_t c = first; c < last; ++c) {
        if (mask && !mask[c]) continue;
        const Column<W> now = y[c];
#pragma GCC unroll 8
        for (int k = 0; k < count; ++k) {
          const V factor = v[k * width + c] - V{};
          DR_COLUMN part[k].v[i] += now.v[i] * factor;
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < count; ++k) DR_COLUMN total[k].v[i] += part[k].v[i];
    }
    for (int k = 0; k < count; ++k) totals[k] = total[k];
  }

  Column<W> norm(const Step& step) const {
    const uint8_t* mask = mask_of(step);
    Column<W> total{};
    for (int64_t first = step.begin; first < step.end; first += kSummed) {
      const int64_t last = step.end - first < kSummed ? step.end : first + kSummed;
      Column<W> part{};
      for (int64_t c = first; c < last; ++c) {
        if (mask && !mask[c]) continue;
        DR_COLUMN part.v[i] += y[c].v[i] * y[c].v[i];
      }
      DR_COLUMN total.v[i] += part.v[i];
    }
    for (int l = 0; l < kLanes<W>; ++l) total.set(l, W(__builtin_sqrt(total.get(l))));
    return total;
  }

  // y = change(c, i, y) for the channels of a step, in lanes of strength other than 0.
  template <typename Change>
  void each(const Step& step, const Column<W>& s, Change change) const {
    const uint8_t* mask = mask_of(step);
    for (int64_t c = step.begin; c < step.end; ++c) {
      if (mask && !mask[c]) continue;
      DR_COLUMN {
        const V now = y[c].v[i];
        y[c].v[i] = s.v[i] != V{} ? change(c, i, now) : now;
      }
    }
  }

  // y -= sum of removed[k] v_k.
  template <int count>
  void remove(const Step& step, const Column<W>& s, const W* v, const Column<W>* removed) const {
    const int64_t width = job.in.width;
    Column<W> amount[count];
    for (int k = 0; k < count; ++k) amount[k] = removed[k];
    each(step, s, [&](int64_t c, int i, V now) {
      // Summed apart from y: the terms are smaller than it, and so are their rounding errors.
      V total{};
#pragma GCC unroll 8
      for (int k = 0; k < count; ++k) total += amount[k].v[i] * (v[k * width + c] - V{});
      return now - total;
    });
  }

  // All components first, then they are removed.
  void project(const Step& step, const Column<W>& s, const W* v) const {
    const int64_t width = job.in.width;
    Column<W> c[kMaxSubspace];
    int k = 0;
    for (; k + kTogether <= step.count; k += kTogether) dots<kTogether>(step, v + k * width, c + k);
    for (; k < step.count; ++k) dots<1>(step, v + k * width, c + k);
    for (k = 0; k < step.count; ++k)
      for (int l = 0; l < kLanes<W>; ++l)
        c[k].set(l, component_removed(c[k].get(l), step.one_sided, s.get(l)));
    for (k = 0; k + kTogether <= step.count; k += kTogether)
      remove<kTogether>(step, s, v + k * width, c + k);
    for (; k < step.count; ++k) remove<1>(step, s, v + k * width, c + k);
  }

  void patch(const Step& step, const Column<W>& s) const {
    const Source& source = p.sources[step.source];
    const uint8_t* mask = mask_of(step);
    for (int l = 0; l < lanes; ++l) {
      if (s.get(l) == W(0)) continue;
      Action<W> a{};
      aim(a, source, entry_of(source, b, t + l));
      for (int64_t c = step.begin; c < step.end; c += kBlock<W>) {
        const int64_t n = step.end - c < kBlock<W> ? step.end - c : int64_t(kBlock<W>);
        W target[kBlock<W>];
        store(target, source_block(a, c, n), kBlock<W>);
        for (int64_t i = 0; i < n; ++i)
          if (!mask || mask[c + i]) y[c + i].set(l, blend(y[c + i].get(l), target[i], s.get(l)));
      }
    }
  }

  void run(const Step& step, const Column<W>& s, const Column<W>& entry) const {
    const W* v = step.vector >= 0 ? p.vectors + step.vector * job.in.width : nullptr;
    const W lo = step.limit >= 0 ? limit_of(p, step, 0, b, job.in.entries) : W(0);
    const W hi = step.limit >= 0 ? limit_of(p, step, 1, b, job.in.entries) : W(0);
    Column<W> k;
    switch (step.kind) {
      case kSteer:
        return each(step, s, [&](int64_t c, int i, V now) { return now + s.v[i] * (v[c] - V{}); });
      case kScale:
        for (int l = 0; l < kLanes<W>; ++l) k.set(l, scale_factor(lo, s.get(l)));
        return each(step, s, [&](int64_t, int i, V now) { return now * k.v[i]; });
      case kClamp:
        return each(step, s, [&](int64_t, int i, V now) {
          const V target = now < lo - V{} ? lo - V{} : (now > hi - V{} ? hi - V{} : now);
          return s.v[i] == W(1) - V{} ? target : now + s.v[i] * (target - now);
        });
      case kClampComponent:
        dots<1>(step, v, &k);
        for (int l = 0; l < kLanes<W>; ++l) k.set(l, component_shift(k.get(l), lo, hi, s.get(l)));
        return each(step, s, [&](int64_t c, int i, V now) { return now + k.v[i] * (v[c] - V{}); });
      case kProject:
        return project(step, s, v);
      case kFill:
        return each(step, s, [&](int64_t c, int i, V now) {
          const V target = v[c] - V{};
          return s.v[i] == W(1) - V{} ? target : now + s.v[i] * (target - now);
        });
      case kPatch:
        return patch(step, s);
      case kRenorm:
        k = norm(step);
        for (int l = 0; l < kLanes<W>; ++l)
          k.set(l, renorm_factor(k.get(l), entry.get(l), s.get(l)));
        return each(step, s, [&](int64_t, int i, V now) { return now * k.v[i]; });
    }
  }
};

template <typename T>
static void run_columns(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const Program<W>& p = *static_cast<const Program<W>*>(job.program);
  Witness<T> witness(job.seen);
  const int64_t groups = (job.in.tokens + kLanes<W> - 1) / kLanes<W>;
  for (int64_t item = first; item < last; ++item) {
    const int64_t b = item / groups, t = item % groups * kLanes<W>;
    const int lanes = int(job.in.tokens - t < kLanes<W> ? job.in.tokens - t : int64_t(kLanes<W>));
    Group<T> group{job, p, static_cast<Column<W>*>(scratch), b, t, lanes, 0, {}};
    Column<W> strengths[kMaxSteps], entries[kMaxSteps];
    for (int i = 0; i < p.count; ++i) {
      for (int l = 0; l < kLanes<W>; ++l) {
        strengths[i].set(l, l < lanes ? strength_of(p, i, b, t + l) : W(0));
        group.work[l] |= strengths[i].get(l) != W(0);
      }
    }
    for (bool each : group.work) group.touched += each;
    if (group.touched) {
      group.gather();
      for (int i = 0; i < p.count; ++i)
        if (p.steps[i].kind == kRenorm) entries[i] = group.norm(p.steps[i]);
      for (int i = 0; i < p.count; ++i) group.run(p.steps[i], strengths[i], entries[i]);
    }
    group.scatter();
    if (job.seen && group.touched) group.look(witness);
  }
}

}  // namespace
}  // namespace dreamreader
