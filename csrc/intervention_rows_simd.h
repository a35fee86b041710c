// Row engine: one row at a time, channels dense. A row is swept once per reduction plus once to
// write: steps between two reductions are applied to a block while it is in registers.
#pragma once

#include "intervention_cpu.h"
#include "intervention_witness_simd.h"
#include "simd.h"

namespace dreamreader {
namespace {

enum Act { kAdd, kMultiply, kBound, kBoundBlend, kSet, kMix, kSetSource, kMixSource };

// A step on one row: what its step fixes, then what the row adds.
template <typename W>
struct Action {
  int64_t begin, end;
  const uint8_t* mask;  // or null
  const W* v;           // kAdd, kSet, kMix: vector
  bool whole;           // concerns every channel that the program touches
  Act act;
  const void* source;  // k...Source: the entry, or null for one that does not exist
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
static __attribute__((noinline)) void lane_mask(typename Lanes<W>::I* lanes, int64_t d,
                                                int64_t begin, int64_t end, const uint8_t* mask) {
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
  const char* data = static_cast<const char*>(source.data);
  a.source = entry < 0 ? nullptr : data + entry * source.stride_entry * size_of(source.dtype);
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

// clamp_value for lanes, with lo <= hi: two instructions, where its order of choices takes three.
template <typename V>
DR_INLINE V bound(V x, V lo, V hi) {
  const V below = x > hi ? hi : x;
  return below < lo ? lo : below;
}

#define DR_EACH(EXPRESSION)                                                     \
  {                                                                             \
    _Pragma("GCC unroll 16") for (int i = 0; i < kVectors; ++i) { EXPRESSION; } \
    break;                                                                      \
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
      DR_EACH(y.v[i] = bound(y.v[i], lo, hi))
    case kBoundBlend:
      DR_EACH(y.v[i] += s * (bound(y.v[i], lo, hi) - y.v[i]))
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

// A row between two sweeps, in the arithmetic type; where it did not change, nowhere.
template <typename W>
struct Between {
  static constexpr int kBytes = sizeof(W);
  W* row;

  inline __attribute__((always_inline)) void put(int64_t d, const Block<W>& y, int64_t n) const {
    if (row) store(row + d, y, n);
  }
  void finish(int64_t, int64_t) const {}
};

// Prefetches what lies `bytes` from `line` on.
DR_INLINE void prefetch_block(const char* line, int64_t bytes) {
#pragma GCC unroll 4
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(line + byte, 1);
}

// One sweep: load from `from`, add up `before`, apply the pending actions, add up `after`, put it
// into `to`. `next`, a row two ahead, is prefetched in step: with one ahead the memory would rest
// while a row is summed.
template <typename W, typename From, typename To>
static void sweep(const From* from, To to, int64_t begin, int64_t end, const Action<W>* actions,
                  const int* pending, int count, Reduction<W>* before, int before_count,
                  Reduction<W>* after, const char* next) {
  for (int64_t d = begin; d < end; d += kBlock<W>) {
    const int64_t n = end - d < kBlock<W> ? end - d : int64_t(kBlock<W>);
    if (next) prefetch_block(next + (d - begin) * To::kBytes, kBlock<W> * To::kBytes);
    Block<W> y = from ? load<W>(from + d, n) : splat(W(0));
    for (int i = 0; i < before_count; ++i) accumulate(before[i], y, d, n);
    for (int i = 0; i < count; ++i) {
      const Action<W>& action = actions[pending[i]];
      const int covered = action.whole ? 1 : coverage(action, d, n);
      if (covered == 1) {
        apply(action, y, d, n);
      } else if (covered < 0) {
        Block<W> changed = y;
        apply(action, changed, d, n);
        typename Lanes<W>::I lanes[kVectors];
        lane_mask<W>(lanes, d, action.begin, action.end, action.mask);
        for (int k = 0; k < kVectors; ++k) y.v[k] = lanes[k] ? changed.v[k] : y.v[k];
      }
    }
    if (after) accumulate(*after, y, d, n);
    to.put(d, y, n);
  }
  to.finish(begin, end);
}

// The sweep of the commonest programs without the choices inside the loop: over whole blocks y += s
// v (add), then bounds, then a sum of y w (dot).
template <bool add, bool bounds, bool dot, typename W, typename From, typename To>
static void sweep_plain(const From* from, To to, int64_t begin, int64_t end, const Action<W>* added,
                        const Action<W>* bounded, Reduction<W>* after, const char* next) {
  using V = typename Lanes<W>::V;
  const V s = (add ? added->s : W(0)) - V{};
  const V lo = (bounds ? bounded->lo : W(0)) - V{}, hi = (bounds ? bounded->hi : W(0)) - V{};
  const W* v = add ? added->v : nullptr;
  const W* w = dot ? after->v : nullptr;
  Block<W> total = splat(W(0));
  for (int64_t d = begin; d < end; d += kBlock<W>) {
    const int64_t n = end - d < kBlock<W> ? end - d : int64_t(kBlock<W>);
    if (next) prefetch_block(next + (d - begin) * To::kBytes, kBlock<W> * To::kBytes);
    Block<W> y = load<W>(from + d, n);
    const Block<W> one = add ? load<W>(v + d, n) : y, two = dot ? load<W>(w + d, n) : y;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      if (add) y.v[i] += s * one.v[i];
      if (bounds) y.v[i] = bound(y.v[i], lo, hi);
      if (dot) total.v[i] += y.v[i] * two.v[i];
    }
    to.put(d, y, n);
  }
  to.finish(begin, end);
  if (dot) after->total = total;
}

// Runs sweep_plain if it fits: no masks or part ranges, at most an addition and then bounds.
template <typename W, typename From, typename To>
static bool try_plain(const From* from, To to, int64_t begin, int64_t end, const Action<W>* actions,
                      const int* pending, int count, Reduction<W>* after, bool whole_sum,
                      const char* next) {
  if (!from || count > 2 || (after && !(whole_sum && after->v))) return false;
  const Action<W>*added = nullptr, *bounded = nullptr;
  for (int i = 0; i < count; ++i) {
    const Action<W>& a = actions[pending[i]];
    if (!a.whole) return false;
    if (a.act == kAdd && i == 0)
      added = &a;
    else if (a.act == kBound && !bounded)
      bounded = &a;
    else
      return false;
  }
  constexpr bool dot = __is_same(To, Between<W>);  // the last sweep has no sum, all others have
  switch ((added ? 2 : 0) + (bounded ? 1 : 0)) {
#define DR_CASE(ADD, BOUND)                                                             \
  case 2 * ADD + BOUND:                                                                 \
    sweep_plain<ADD, BOUND, dot, W>(from, to, begin, end, added, bounded, after, next); \
    return true;
    DR_CASE(0, 0)
    DR_CASE(0, 1)
    DR_CASE(1, 0)
    DR_CASE(1, 1)
#undef DR_CASE
  }
  return false;
}

// An item with its place; going on to the next one costs no division.
struct Cursor {
  int64_t item, row, token;

  void advance(int64_t tokens) {
    ++item;
    if (++token == tokens) {
      token = 0;
      ++row;
    }
  }
};

template <typename T>
static void copy_channels(const T* in, T* out, int64_t begin, int64_t end, bool stream = false) {
  if (in == out || end <= begin) return;
  const std::size_t bytes = std::size_t(end - begin) * sizeof(T);
  if (stream)
    copy_past_caches(out + begin, in + begin, bytes);
  else
    __builtin_memcpy(out + begin, in + begin, bytes);
}

// One row on its way through the program; kept from row to row, so that only scalars change.
template <typename T>
struct Row {
  using W = typename Work<T>::type;
  enum Origin { kNothing, kInput, kScratch };

  const InterventionJob& job;
  const Program<W>& p;
  W* scratch;     // the row, once a sweep has stored it
  T* filled;      // a row of the values of a fill, rounded
  int fill = -1;  // the step that they belong to

  int64_t b = 0, t = 0;
  const T* in = nullptr;
  T* out = nullptr;
  Origin from = kInput;
  int count = 0;    // pending actions, by step number
  int entries = 0;  // norms on entry that the next sweep has to add up
  int pending[kMaxSteps];
  Action<W> actions[kMaxSteps];  // by step number
  Reduction<W> entry[kMaxSteps], inside;
  W norms[kMaxSteps];

  Row(const InterventionJob& job, const Program<W>& p, void* memory)
      : job(job), p(p), scratch(static_cast<W*>(memory)) {
    const int64_t width = job.in.width;
    filled = reinterpret_cast<T*>(scratch + width);
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.steps[i];
      Action<W>& a = actions[i];
      a.begin = step.begin;
      a.end = step.end;
      a.mask = step.mask >= 0 ? p.masks + step.mask * width : nullptr;
      a.v = step.vector >= 0 ? p.vectors + step.vector * width : nullptr;
      a.whole = coverage(a, job.begin, job.end - job.begin) == 1;
    }
  }

  // The first item from `at` to last - 1 that a step touches, else last.
  Cursor next_touched(Cursor at, int64_t last) const {
    for (; at.item < last; at.advance(job.in.tokens)) {
      for (int i = 0; i < p.count; ++i)
        if (strength_of(p, i, at.row, at.token) != W(0)) return at;
    }
    return at;
  }

  const char* address(const Cursor& at) const {
    return reinterpret_cast<const char*>(row_at<T>(job.in, at.row, at.token) + job.begin);
  }

  void place(const Cursor& at) {
    b = at.row;
    t = at.token;
    in = row_at<T>(job.in, b, t);
    out = row_at<T>(job.out, b, t);
    from = kInput;
    count = entries = 0;
  }

  void clear(Reduction<W>& r, const Action<W>& a, const W* v) const {
    r.begin = a.begin;
    r.end = a.end;
    r.mask = a.mask;
    r.v = v;
    r.total = splat(W(0));
  }

  template <typename From, typename To>
  void pass_from(const From* from, To to, Reduction<W>* after, bool whole_sum, const char* next) {
    if (entries == 0 &&
        try_plain(from, to, job.begin, job.end, actions, pending, count, after, whole_sum, next))
      return;
    sweep<W>(from, to, job.begin, job.end, actions, pending, count, entry, entries, after, next);
  }

  template <typename To>
  void pass(To to, Reduction<W>* after, bool whole_sum, const char* next) {
    if (from == kScratch)
      pass_from(scratch, to, after, whole_sum, next);
    else
      pass_from(from == kInput ? in : nullptr, to, after, whole_sum, next);
    count = 0;
    for (; entries > 0; --entries)
      norms[entries - 1] = W(__builtin_sqrt(sum(entry[entries - 1].total)));
  }

  // Applies what is pending and adds up y v (v set) or y^2 over the channels of an action; stores
  // the row if it changed.
  W reduce(const Action<W>& a, const W* v) {
    clear(inside, a, v);
    const Between<W> to{count ? scratch : nullptr};
    pass(to, &inside, a.whole, nullptr);
    if (to.row) from = kScratch;
    return sum(inside.total);
  }

  // Applies what is pending: something is, where the row has work.
  void finish(Witness<T>& witness, const char* next) {
    if (from == kNothing && count == 1 && actions[pending[0]].act == kSet)
      finish_fill(pending[0], witness);
    else
      pass(Sink<T>::at(witness, in, out, job.begin, job.stream), nullptr, false, next);
  }
  // A fill has the same result in every row.
  void finish_fill(int number, Witness<T>& witness) {
    const W* v = actions[number].v;
    for (int64_t d = job.begin, n; fill != number && d < job.end; d += n) {
      n = job.end - d < kBlock<W> ? job.end - d : int64_t(kBlock<W>);
      store(filled + d, load<W>(v + d, n), n);
    }
    fill = number;
    if (job.seen) witness.look(in + job.begin, filled + job.begin, job.end - job.begin);
    copy_channels(filled, out, job.begin, job.end, job.stream && in != out);
  }

  void advance(int number, W s, int renorm);
  void run(Witness<T>& witness, const char* next);
};

// Turns one step into a pending action, sweeping first where it needs a sum over the row.
template <typename T>
void Row<T>::advance(int number, W s, int renorm) {
  const Step& step = p.steps[number];
  Action<W>& a = actions[number];
  a.s = s;
  if (step.limit >= 0) {
    a.lo = limit_of(p, step, 0, b, job.in.entries);
    a.hi = limit_of(p, step, 1, b, job.in.entries);
  }
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
      a.act = kAdd;
      a.s = component_shift(reduce(a, a.v), a.lo, a.hi, s);
      break;
    case kProject:
      a.act = kAdd;
      a.s = -component_removed(reduce(a, a.v), step.one_sided, s);
      break;
    case kFill:
      a.act = s == W(1) ? kSet : kMix;
      break;
    case kPatch:
      a.act = s == W(1) ? kSetSource : kMixSource;
      aim(a, p.sources[step.source], entry_of(p.sources[step.source], b, t));
      break;
    case kRenorm: {
      const W now = W(__builtin_sqrt(reduce(a, nullptr)));
      a.act = kMultiply;
      a.s = renorm_factor(now, norms[renorm], s);
      break;
    }
  }
  if ((a.act == kSet || a.act == kSetSource) && a.whole && entries == 0) {
    count = 0;  // overwritten as a whole: what came before is not read
    from = kNothing;
  }
  pending[count++] = number;
}

template <typename T>
void Row<T>::run(Witness<T>& witness, const char* next) {
  W strengths[kMaxSteps];
  for (int i = 0; i < p.count; ++i) {
    strengths[i] = strength_of(p, i, b, t);
    if (p.steps[i].kind == kRenorm && strengths[i] != W(0))
      clear(entry[entries++], actions[i], nullptr);
  }
  for (int i = 0, renorm = 0; i < p.count; ++i) {
    if (strengths[i] == W(0)) continue;
    advance(i, strengths[i], renorm);
    renorm += p.steps[i].kind == kRenorm;
  }
  finish(witness, next);
}

template <typename T>
static void run_rows(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const int64_t tokens = job.in.tokens, width = job.in.width;
  Row<T> row(job, *static_cast<const Program<W>*>(job.program), scratch);
  Witness<T> witness(job.seen);
  Cursor copied{first, first / tokens, first % tokens};
  const auto after = [&](Cursor at) {
    if (at.item < last) at.advance(tokens);
    return row.next_touched(at, last);
  };
  Cursor at = row.next_touched(copied, last), next = after(at);
  for (;;) {
    for (; job.in.data != job.out.data && copied.item < at.item; copied.advance(tokens)) {
      row.place(copied);
      copy_channels(row.in, row.out, 0, width, job.stream);
    }
    if (at.item == last) break;
    row.place(at);
    copied = at;
    copied.advance(tokens);
    at = next;
    next = after(next);
    row.run(witness, next.item < last ? row.address(next) : nullptr);
    copy_channels(row.in, row.out, 0, job.begin);
    copy_channels(row.in, row.out, job.end, width);
  }
  if (job.stream) end_past_caches();
}

}  // namespace
}  // namespace dreamreader
