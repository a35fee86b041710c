// Column engine: a group of tokens at a time, one token per lane, for memory whose tokens are dense (feature maps
// [B, C, H, W] seen as [B, H*W, C]), for any other stride, and for subspaces. The group is gathered channel by channel,
// in memory order, into scratch [channel][lane]; every step is then a few loops over it.
#pragma once

#include "intervention_rows_simd.h"

namespace dreamreader {
namespace {

template <typename W>
constexpr int kLanes = int(kLaneBytes / sizeof(W));

// One value of every lane.
template <typename W>
struct Column {
  typedef W V __attribute__((vector_size(kLaneBytes)));
  W value[kLanes<W>];
};

#define DR_LANES for (int l = 0; l < kLanes<W>; ++l)

template <typename T>
DR_INLINE typename Work<T>::type widen(T x) {
  if constexpr (sizeof(T) == 2) {
    T one[kWidth<float>] = {x};
    return load_lanes(one)[0];
  } else {
    return x;
  }
}

template <typename T, typename W>
DR_INLINE T narrow(W x) {
  if constexpr (sizeof(T) == 2) {
    T one[kWidth<float>];
    store_lanes(one, x - VF{});
    return one[0];
  } else {
    return x;
  }
}

template <typename T>
struct Group {
  using W = typename Work<T>::type;
  const InterventionJob& job;
  const Program<W>& p;
  W (*y)[kLanes<W>];  // [width][lane], channels job.begin .. job.end - 1 in use
  int64_t b, t;       // first token
  int lanes;          // tokens in this group
  int touched;        // lanes with work

  void gather() const {
    const Activation& x = job.in;
    const T* base = static_cast<const T*>(x.data) + b * x.stride_row + t * x.stride_token;
    if (x.stride_channel == 1 && x.stride_token != 1) return gather_rows(base);
    for (int64_t c = job.begin; c < job.end; ++c) {
      const T* from = base + c * x.stride_channel;
      if (x.stride_token == 1 && lanes == kLanes<W>) {
        for (int l = 0; l < kLanes<W>; l += kWidth<W>) store_lanes(&y[c][l], load_lanes(from + l));
      } else {
        for (int l = 0; l < kLanes<W>; ++l) y[c][l] = l < lanes ? widen(from[l * x.stride_token]) : W(0);
      }
    }
  }

  // Channels dense: read each row in order, a vector at a time, and spread it over the lanes.
  void gather_rows(const T* base) const {
    for (int64_t c = job.begin; c < job.end; c += kBlock<W>) {
      const int64_t n = job.end - c < kBlock<W> ? job.end - c : int64_t(kBlock<W>);
      for (int l = 0; l < kLanes<W>; ++l) {
        W part[kBlock<W>] = {};
        if (l < lanes) store(part, load<W>(base + l * job.in.stride_token + c, n), kBlock<W>);
        for (int64_t i = 0; i < n; ++i) y[c + i][l] = part[i];
      }
    }
  }

  // Writes the lanes in `work`; the others keep their bits, copied when the result is another tensor.
  void scatter(const bool* work) const {
    const Activation& x = job.out;
    T* base = static_cast<T*>(x.data) + b * x.stride_row + t * x.stride_token;
    for (int64_t c = job.begin; c < job.end; ++c) {
      T* to = base + c * x.stride_channel;
      if (x.stride_token == 1 && touched == kLanes<W>) {
        for (int l = 0; l < kLanes<W>; l += kWidth<W>) store_lanes(to + l, load_lanes(&y[c][l]));
      } else {
        for (int l = 0; l < lanes; ++l)
          if (work[l]) to[l * x.stride_token] = narrow<T>(y[c][l]);
      }
    }
    if (job.in.data == job.out.data) return;
    for (int l = 0; l < lanes; ++l) {
      copy(l, 0, work[l] ? job.begin : x.width);
      if (work[l]) copy(l, job.end, x.width);
    }
  }

  void copy(int l, int64_t begin, int64_t end) const {
    const T* from = static_cast<const T*>(job.in.data) + b * job.in.stride_row + (t + l) * job.in.stride_token;
    T* to = static_cast<T*>(job.out.data) + b * job.out.stride_row + (t + l) * job.out.stride_token;
    for (int64_t c = begin; c < end; ++c) to[c * job.out.stride_channel] = from[c * job.in.stride_channel];
  }

  // Sum over the channels of a step of y v, or of y^2.
  Column<W> dot(const Step& step, const W* v) const {
    const uint8_t* mask = step.mask >= 0 ? p.masks + step.mask * job.in.width : nullptr;
    Column<W> total{};
    for (int64_t c = step.begin; c < step.end; ++c) {
      if (mask && !mask[c]) continue;
      if (v)
        DR_LANES total.value[l] += y[c][l] * v[c];
      else
        DR_LANES total.value[l] += y[c][l] * y[c][l];
    }
    return total;
  }

  // y = change(c, l, y) for the channels of a step, in lanes of strength other than 0.
  template <typename Change>
  void each(const Step& step, const Column<W>& s, Change change) const {
    const uint8_t* mask = step.mask >= 0 ? p.masks + step.mask * job.in.width : nullptr;
    for (int64_t c = step.begin; c < step.end; ++c) {
      if (mask && !mask[c]) continue;
      DR_LANES {
        const W now = y[c][l];
        const W then = change(c, l, now);
        y[c][l] = s.value[l] != W(0) ? then : now;
      }
    }
  }

  void project(const Step& step, const Column<W>& s, const W* v) const;
  void patch(const Step& step, const Column<W>& s) const;
  void run(const Step& step, const Column<W>& s, const Column<W>& norm) const;
};

// All components first, then one sweep that removes them, eight vectors at a time.
template <typename T>
void Group<T>::project(const Step& step, const Column<W>& s, const W* v) const {
  const int64_t width = job.in.width;
  Column<W> removed[kMaxSubspace];
  for (int j = 0; j < step.count; ++j) {
    removed[j] = dot(step, v + j * width);
    DR_LANES removed[j].value[l] = component_removed(removed[j].value[l], step.one_sided, s.value[l]);
  }
  each(step, s, [&](int64_t c, int l, W now) {
    for (int j = 0; j < step.count; ++j) now -= removed[j].value[l] * v[j * width + c];
    return now;
  });
}

template <typename T>
void Group<T>::patch(const Step& step, const Column<W>& s) const {
  const Source& source = p.sources[step.source];
  const int64_t bytes = source.dtype == DType::f64 ? 8 : (source.dtype == DType::f32 ? 4 : 2);
  const uint8_t* mask = step.mask >= 0 ? p.masks + step.mask * job.in.width : nullptr;
  for (int l = 0; l < lanes; ++l) {
    if (s.value[l] == W(0)) continue;
    const int64_t entry = entry_of(source, b, t + l);
    Action<W> a{};
    a.source = entry < 0 ? nullptr : static_cast<const char*>(source.data) + entry * source.stride_entry * bytes;
    a.dtype = source.dtype;
    a.source_stride = source.stride_channel;
    for (int64_t c = step.begin; c < step.end; c += kBlock<W>) {
      const int64_t n = step.end - c < kBlock<W> ? step.end - c : int64_t(kBlock<W>);
      W target[kBlock<W>];
      store(target, source_block(a, c, n), kBlock<W>);
      for (int64_t i = 0; i < n; ++i)
        if (!mask || mask[c + i]) y[c + i][l] = blend(y[c + i][l], target[i], s.value[l]);
    }
  }
}

template <typename T>
void Group<T>::run(const Step& step, const Column<W>& s, const Column<W>& norm) const {
  const W* v = step.vector >= 0 ? p.vectors + step.vector * job.in.width : nullptr;
  const W lo = step.limit >= 0 ? limit_of(p, step, 0, b, job.in.rows) : W(0);
  const W hi = step.limit >= 0 ? limit_of(p, step, 1, b, job.in.rows) : W(0);
  Column<W> k;
  switch (step.kind) {
    case kSteer:
      return each(step, s, [&](int64_t c, int l, W now) { return now + s.value[l] * v[c]; });
    case kScale:
      DR_LANES k.value[l] = scale_factor(lo, s.value[l]);
      return each(step, s, [&](int64_t, int l, W now) { return now * k.value[l]; });
    case kClamp:
      return each(step, s, [&](int64_t, int l, W now) { return blend(now, clamp_value(now, lo, hi), s.value[l]); });
    case kClampComponent:
      k = dot(step, v);
      DR_LANES k.value[l] = component_shift(k.value[l], lo, hi, s.value[l]);
      return each(step, s, [&](int64_t c, int l, W now) { return now + k.value[l] * v[c]; });
    case kProject:
      return project(step, s, v);
    case kFill:
      return each(step, s, [&](int64_t c, int l, W now) { return blend(now, v[c], s.value[l]); });
    case kPatch:
      return patch(step, s);
    case kRenorm:
      k = dot(step, nullptr);
      DR_LANES k.value[l] = renorm_factor(W(__builtin_sqrt(k.value[l])), norm.value[l], s.value[l]);
      return each(step, s, [&](int64_t, int l, W now) { return now * k.value[l]; });
  }
}

template <typename T>
static void run_columns(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const Program<W>& p = *static_cast<const Program<W>*>(job.program);
  const int64_t groups = (job.in.tokens + kLanes<W> - 1) / kLanes<W>;
  for (int64_t item = first; item < last; ++item) {
    const int64_t b = item / groups, t = item % groups * kLanes<W>;
    const int lanes = int(job.in.tokens - t < kLanes<W> ? job.in.tokens - t : int64_t(kLanes<W>));
    Group<T> group{job, p, static_cast<W (*)[kLanes<W>]>(scratch), b, t, lanes, 0};
    Column<W> strengths[kMaxSteps] = {}, norms[kMaxSteps];
    bool work[kLanes<W>] = {};
    for (int l = 0; l < lanes; ++l) {
      for (int i = 0; i < p.count; ++i) {
        strengths[i].value[l] = strength_of(p, i, b, t + l);
        work[l] |= strengths[i].value[l] != W(0);
      }
      group.touched += work[l];
    }
    if (group.touched) {
      group.gather();
      for (int i = 0; i < p.count; ++i) {
        if (p.steps[i].kind != kRenorm) continue;
        norms[i] = group.dot(p.steps[i], nullptr);
        DR_LANES norms[i].value[l] = W(__builtin_sqrt(norms[i].value[l]));
      }
      for (int i = 0; i < p.count; ++i) group.run(p.steps[i], strengths[i], norms[i]);
    }
    group.scatter(work);
  }
}

}  // namespace
}  // namespace dreamreader
