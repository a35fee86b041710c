// Row engine: one row at a time, channels dense. A row is swept once per reduction plus once to write:
// steps between two reductions are applied to a block while it is in registers.
#pragma once

#include "intervention_cpu.h"
#include "simd.h"

namespace dreamreader {
namespace {

enum Act { kAdd, kMultiply, kBound, kBoundBlend, kSet, kMix, kSetSource, kMixSource };

// A step whose row scalars are known.
template <typename W>
struct Action {
  Act act;
  int64_t begin, end;
  const uint8_t* mask;  // or null
  const W* v;           // kAdd, kSet, kMix: vector
  const void* source;   // k...Source: the entry, or null for one that does not exist
  DType dtype;
  int64_t source_stride;
  W s, lo, hi;
};

template <typename W>
DR_INLINE Block<W> splat(W value) {
  Block<W> block;
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) block.v[i] = value - typename Lanes<W>::V{};
  return block;
}

// Lanes of the block at channel d that lie in [begin, end) and in the mask: all bits set, else 0.
template <typename W>
static __attribute__((noinline)) void lane_mask(typename Lanes<W>::I* lanes, int64_t d, int64_t begin, int64_t end,
                                                const uint8_t* mask) {
  using Int = decltype(lanes[0][0] + 0);
  Int flags[kBlock<W>];
  for (int i = 0; i < kBlock<W>; ++i) {
    const int64_t at = d + i;
    flags[i] = at >= begin && at < end && (!mask || mask[at]) ? Int(-1) : Int(0);
  }
  __builtin_memcpy(lanes, flags, sizeof(flags));
}

template <typename W>
static __attribute__((noinline)) Block<W> load_source(const Action<W>& a, int64_t d, int64_t n) {
  W part[kBlock<W>];
  for (int64_t i = 0; i < kBlock<W>; ++i) {
    const int64_t at = (d + i) * a.source_stride;
    if (!a.source) {
      part[i] = W(__builtin_nan(""));
    } else if (i >= n) {
      part[i] = W(0);
    } else if (a.dtype == DType::f64) {
      part[i] = W(static_cast<const double*>(a.source)[at]);
    } else if (a.dtype == DType::f32) {
      part[i] = W(static_cast<const float*>(a.source)[at]);
    } else if (a.dtype == DType::bf16) {
      part[i] = W(bits_as<float>(uint32_t(static_cast<const bf16*>(a.source)[at].bits) << 16));
    } else {
      f16 one[kWidth<float>] = {static_cast<const f16*>(a.source)[at]};
      part[i] = W(load_lanes(one)[0]);
    }
  }
  return load<W>(part, kBlock<W>);
}

// Points an action at an entry of a source, -1 for none.
template <typename W>
DR_INLINE void aim(Action<W>& a, const Source& source, int64_t entry) {
  const int64_t bytes = source.dtype == DType::f64 ? 8 : (source.dtype == DType::f32 ? 4 : 2);
  a.source = entry < 0 ? nullptr : static_cast<const char*>(source.data) + entry * source.stride_entry * bytes;
  a.dtype = source.dtype;
  a.source_stride = source.stride_channel;
}

// The source of a patch, fast where it is dense.
template <typename W>
DR_INLINE Block<W> source_block(const Action<W>& a, int64_t d, int64_t n) {
  if constexpr (sizeof(W) == 4) {
    if (a.source && a.source_stride == 1) {
      if (a.dtype == DType::f32) return load<W>(static_cast<const float*>(a.source) + d, n);
      if (a.dtype == DType::bf16) return load<W>(static_cast<const bf16*>(a.source) + d, n);
      if (a.dtype == DType::f16) return load<W>(static_cast<const f16*>(a.source) + d, n);
    }
  }
  return load_source(a, d, n);
}

#define DR_EACH(EXPRESSION)             \
  {                                     \
    _Pragma("GCC unroll 16")            \
    for (int i = 0; i < kVectors; ++i) { EXPRESSION; } \
    break;                              \
  }

// One action on a block at channel d with n valid lanes.
template <typename W>
DR_INLINE void apply(const Action<W>& a, Block<W>& y, int64_t d, int64_t n) {
  using V = typename Lanes<W>::V;
  const V s = a.s - V{}, lo = a.lo - V{}, hi = a.hi - V{};
  switch (a.act) {
    case kAdd: {
      const Block<W> v = load<W>(a.v + d, n);
      DR_EACH(y.v[i] += s * v.v[i])
    }
    case kMultiply:
      DR_EACH(y.v[i] *= s)
    case kBound:
      DR_EACH(y.v[i] = y.v[i] < lo ? lo : (y.v[i] > hi ? hi : y.v[i]))
    case kBoundBlend:
      DR_EACH(y.v[i] += s * ((y.v[i] < lo ? lo : (y.v[i] > hi ? hi : y.v[i])) - y.v[i]))
    case kSet:
      y = load<W>(a.v + d, n);
      break;
    case kMix: {
      const Block<W> v = load<W>(a.v + d, n);
      DR_EACH(y.v[i] += s * (v.v[i] - y.v[i]))
    }
    case kSetSource:
      y = source_block(a, d, n);
      break;
    case kMixSource: {
      const Block<W> v = source_block(a, d, n);
      DR_EACH(y.v[i] += s * (v.v[i] - y.v[i]))
    }
  }
}

// Whether the action concerns all n lanes of the block at d (1), none (0) or some (-1).
template <typename W>
DR_INLINE int coverage(const Action<W>& a, int64_t d, int64_t n) {
  if (!a.mask && a.begin <= d && d + n <= a.end) return 1;
  return d >= a.end || d + n <= a.begin ? 0 : -1;
}

// What a sweep adds up: sum of y v (v set) or of y^2 over the channels of a step.
template <typename W>
struct Reduction {
  int64_t begin, end;
  const uint8_t* mask;
  const W* v;
  Block<W> total;
};

template <typename W>
DR_INLINE void accumulate(Reduction<W>& r, const Block<W>& y, int64_t d, int64_t n) {
  Block<W> z = y;
  if (r.mask || d < r.begin || d + n > r.end) {
    if (d >= r.end || d + n <= r.begin) return;
    typename Lanes<W>::I lanes[kVectors];
    lane_mask<W>(lanes, d, r.begin, r.end, r.mask);
    for (int i = 0; i < kVectors; ++i) z.v[i] = lanes[i] ? z.v[i] : typename Lanes<W>::V{};
  }
  const Block<W> v = r.v ? load<W>(r.v + d, n) : z;
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) r.total.v[i] += z.v[i] * v.v[i];
}

// One sweep: load from `from`, add up `before`, apply the actions, add up `after`, store to `to` unless null.
// `next` is prefetched in step, so that the row after this one arrives while this one is computed.
template <typename W, typename From, typename To>
static void sweep(const From* from, To* to, int64_t begin, int64_t end, const Action<W>* actions, int count,
                  Reduction<W>* before, int before_count, Reduction<W>* after, const char* next) {
  for (int64_t d = begin; d < end; d += kBlock<W>) {
    const int64_t n = end - d < kBlock<W> ? end - d : int64_t(kBlock<W>);
    if (next) {
      const char* line = next + (d - begin) * int64_t(sizeof(To));
#pragma GCC unroll 4
      for (int64_t byte = 0; byte < kBlock<W> * int64_t(sizeof(To)); byte += 64) __builtin_prefetch(line + byte, 1);
    }
    Block<W> y = from ? load<W>(from + d, n) : splat(W(0));
    for (int i = 0; i < before_count; ++i) accumulate(before[i], y, d, n);
    for (int i = 0; i < count; ++i) {
      const int covered = coverage(actions[i], d, n);
      if (covered == 1) {
        apply(actions[i], y, d, n);
      } else if (covered < 0) {
        Block<W> changed = y;
        apply(actions[i], changed, d, n);
        typename Lanes<W>::I lanes[kVectors];
        lane_mask<W>(lanes, d, actions[i].begin, actions[i].end, actions[i].mask);
        for (int k = 0; k < kVectors; ++k) y.v[k] = lanes[k] ? changed.v[k] : y.v[k];
      }
    }
    if (after) accumulate(*after, y, d, n);
    if (to) store(to + d, y, n);
  }
}

// The state of one row on its way through the program.
template <typename T>
struct Row {
  using W = typename Work<T>::type;
  enum From { kNothing, kInput, kScratch };

  const InterventionJob& job;
  const T* in;
  T* out;
  W* scratch;  // the row in W once a sweep has stored it; `out` itself where T is W
  From from = kInput;
  int pending = 0;
  int entries = 0;  // norms on entry that the next sweep has to add up
  Action<W> actions[kMaxSteps];
  Reduction<W> entry[kMaxSteps];
  W norms[kMaxSteps];

  // A constructor, so that the arrays are not cleared for every row.
  Row(const InterventionJob& job, const T* in, T* out, W* scratch) : job(job), in(in), out(out), scratch(scratch) {}

  // Applies the pending actions and adds up `after`; stores the row only if it changed.
  void reduce(Reduction<W>* after) {
    W* to = pending ? scratch : nullptr;
    if (from == kScratch)
      sweep<W>(scratch, to, job.begin, job.end, actions, pending, entry, entries, after, nullptr);
    else
      sweep<W>(from == kInput ? in : nullptr, to, job.begin, job.end, actions, pending, entry, entries, after,
               nullptr);
    if (to) from = kScratch;
    pending = 0;
    for (; entries > 0; --entries) norms[entries - 1] = W(__builtin_sqrt(sum(entry[entries - 1].total)));
  }

  // Applies the pending actions and writes the result.
  void finish(const char* next) {
    if (!pending && static_cast<const void*>(from == kInput ? (const void*)in : scratch) == out) return;
    if (from == kScratch)
      sweep<W>(scratch, out, job.begin, job.end, actions, pending, entry, 0, static_cast<Reduction<W>*>(nullptr), next);
    else
      sweep<W>(from == kInput ? in : nullptr, out, job.begin, job.end, actions, pending, entry, 0,
               static_cast<Reduction<W>*>(nullptr), next);
  }
};

template <typename W>
DR_INLINE void clear(Reduction<W>& r, const Step& step, const uint8_t* mask, const W* v) {
  r = {step.begin, step.end, mask, v, splat(W(0))};
}

// Turns one step into an action, sweeping first where it needs a sum over the row.
template <typename T, typename W>
static void advance(Row<T>& row, const Program<W>& p, int number, W s, int64_t b, int64_t t, int64_t width, int64_t rows,
                    int renorm) {
  const Step& step = p.steps[number];
  Action<W> a{};
  a.begin = step.begin;
  a.end = step.end;
  a.mask = step.mask >= 0 ? p.masks + step.mask * width : nullptr;
  a.v = step.vector >= 0 ? p.vectors + step.vector * width : nullptr;
  a.s = s;
  if (step.limit >= 0) {
    a.lo = limit_of(p, step, 0, b, rows);
    a.hi = limit_of(p, step, 1, b, rows);
  }
  Reduction<W> r;
  switch (step.kind) {
    case kSteer:
      a.act = kAdd;
      break;
    case kScale:
      a.act = kMultiply;
      a.s = scale_factor(a.lo, s);
      break;
    case kClamp:
      a.act = s == W(1) ? kBound : kBoundBlend;
      break;
    case kClampComponent:
    case kProject: {
      clear(r, step, a.mask, a.v);
      row.reduce(&r);
      const W c = sum(r.total);
      a.act = kAdd;
      a.s = step.kind == kProject ? -component_removed(c, step.one_sided, s) : component_shift(c, a.lo, a.hi, s);
      break;
    }
    case kFill:
      a.act = s == W(1) ? kSet : kMix;
      break;
    case kPatch: {
      const Source& source = p.sources[step.source];
      a.act = s == W(1) ? kSetSource : kMixSource;
      aim(a, source, entry_of(source, b, t));
      break;
    }
    case kRenorm:
      clear<W>(r, step, a.mask, nullptr);
      row.reduce(&r);
      a.act = kMultiply;
      a.s = renorm_factor(W(__builtin_sqrt(sum(r.total))), row.norms[renorm], s);
      break;
  }
  if ((a.act == kSet || a.act == kSetSource) && row.entries == 0 &&
      coverage(a, row.job.begin, row.job.end - row.job.begin) == 1) {
    row.pending = 0;  // overwritten as a whole: what came before is not read
    row.from = Row<T>::kNothing;
  }
  row.actions[row.pending++] = a;
}

// Runs the whole program on one row; false if no step touches it.
template <typename T, typename W>
static bool run_row(Row<T>& row, const Program<W>& p, int64_t b, int64_t t, int64_t width, int64_t rows, const char* next) {
  W strengths[kMaxSteps];
  bool touched = false;
  for (int i = 0; i < p.count; ++i) {
    strengths[i] = strength_of(p, i, b, t);
    touched |= strengths[i] != W(0);
    if (p.steps[i].kind == kRenorm && strengths[i] != W(0)) {
      const uint8_t* mask = p.steps[i].mask >= 0 ? p.masks + p.steps[i].mask * width : nullptr;
      clear<W>(row.entry[row.entries++], p.steps[i], mask, nullptr);
    }
  }
  if (!touched) return false;
  for (int i = 0, renorm = 0; i < p.count; ++i) {
    if (strengths[i] == W(0)) continue;
    advance(row, p, i, strengths[i], b, t, width, rows, renorm);
    renorm += p.steps[i].kind == kRenorm;
  }
  row.finish(next);
  return true;
}

template <typename T>
static void copy_channels(const T* in, T* out, int64_t begin, int64_t end) {
  if (in != out && end > begin) __builtin_memcpy(out + begin, in + begin, std::size_t(end - begin) * sizeof(T));
}

template <typename T>
static void run_rows(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const Program<W>& p = *static_cast<const Program<W>*>(job.program);
  const int64_t tokens = job.in.tokens, width = job.in.width;
  for (int64_t item = first; item < last; ++item) {
    const int64_t b = item / tokens, t = item % tokens;
    const T* in = static_cast<const T*>(job.in.data) + b * job.in.stride_row + t * job.in.stride_token;
    T* out = static_cast<T*>(job.out.data) + b * job.out.stride_row + t * job.out.stride_token;
    W* own;
    if constexpr (sizeof(T) == sizeof(W))
      own = out;
    else
      own = static_cast<W*>(scratch);
    const bool more = item + 1 < last && t + 1 < tokens;
    const char* next = more ? reinterpret_cast<const char*>(in + job.in.stride_token + job.begin) : nullptr;
    Row<T> row(job, in, out, own);
    if (run_row(row, p, b, t, width, job.in.rows, next)) {
      copy_channels(in, out, 0, job.begin);
      copy_channels(in, out, job.end, width);
    } else {
      copy_channels(in, out, 0, width);
    }
  }
}

}  // namespace
}  // namespace dreamreader
