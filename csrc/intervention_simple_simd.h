// Programs of one step that changes every channel of a row by a formula of its own: no sums, no
// masks, no set-up for each row. Rows are taken in chunks, of which everything but the values is
// looked up first.
#pragma once

#include "intervention_rows_simd.h"

namespace dreamreader {
namespace {

template <typename W>
DR_INLINE bool is_simple(const Program<W>& p, int64_t width) {
  if (p.count != 1) return false;
  const Step& step = p.steps[0];
  return step.begin == 0 && step.end == width && step.mask < 0 &&
         (step.kind == kSteer || step.kind == kScale || step.kind == kClamp || step.kind == kFill);
}

template <typename T>
struct SimpleRows {
  using W = typename Work<T>::type;
  static constexpr int64_t kChunk = 64;

  const InterventionJob& job;
  const Program<W>& p;
  const Step& step;
  const W* v;
  const T* filled;  // the values of a fill, rounded
  Witness<T> witness;
  const bool copies, stream;
  int64_t count = 0;
  const T* from[kChunk];
  T* to[kChunk];
  W s[kChunk], lo[kChunk], hi[kChunk];

  SimpleRows(const InterventionJob& job, void* scratch)
      : job(job),
        p(*static_cast<const Program<W>*>(job.program)),
        step(p.steps[0]),
        v(step.vector >= 0 ? p.vectors + step.vector * job.in.width : nullptr),
        filled(static_cast<const T*>(scratch)),
        witness(job.seen),
        copies(job.in.data != job.out.data),
        stream(job.stream && copies) {
    T* to = static_cast<T*>(scratch);
    for (int64_t d = 0, n; step.kind == kFill && d < job.in.width; d += n) {
      n = job.in.width - d < kBlock<W> ? job.in.width - d : int64_t(kBlock<W>);
      store(to + d, load<W>(v + d, n), n);
    }
  }

  // The next rows from `at` on; in place those alone that the step touches.
  void collect(Cursor& at, int64_t last) {
    for (count = 0; at.item < last && count < kChunk; at.advance(job.in.tokens)) {
      const W strength = strength_of(p, 0, at.row, at.token);
      if (strength == W(0) && !copies) continue;
      s[count] = strength;
      if (step.limit >= 0) {
        lo[count] = limit_of(p, step, 0, at.row, job.in.entries);
        hi[count] = limit_of(p, step, 1, at.row, job.in.entries);
      }
      from[count] = row_at<T>(job.in, at.row, at.token);
      to[count++] = row_at<T>(job.out, at.row, at.token);
    }
  }

  void run() {
    for (int64_t i = 0; i < count; ++i) {
      const char* next = reinterpret_cast<const char*>(from[i + 2 < count ? i + 2 : count - 1]);
      if (s[i] == W(0)) {
        copy_channels(from[i], to[i], 0, job.in.width, stream);
      } else if (step.kind == kSteer) {
        change<kAdd>(i, s[i], next);
      } else if (step.kind == kScale) {
        change<kMultiply>(i, scale_factor(lo[i], s[i]), next);
      } else if (step.kind == kClamp && s[i] == W(1)) {
        change<kBound>(i, s[i], next);
      } else if (step.kind == kClamp) {
        change<kBoundBlend>(i, s[i], next);
      } else if (s[i] != W(1)) {
        change<kMix>(i, s[i], next);
      } else {
        if (job.seen) witness.look(from[i], filled, job.in.width);
        copy_channels(filled, to[i], 0, job.in.width, stream);
      }
    }
  }

  // One row.
  template <Act act>
  inline __attribute__((always_inline)) void change(int64_t i, W factor, const char* next) {
    Action<W> action{};
    action.act = act;
    action.v = v;
    action.s = factor;
    action.lo = lo[i];
    action.hi = hi[i];
    Sink<T> sink = Sink<T>::at(witness, from[i], to[i], 0, stream);
    const bool overlaps = copies && !stream && job.in.width > kBlock<W>;
    for (int64_t d = 0; d < job.in.width; d += kBlock<W>) {
      if (overlaps && d + kBlock<W> > job.in.width) d = job.in.width - kBlock<W>;  // some twice
      const int64_t left = job.in.width - d, n = left < kBlock<W> ? left : int64_t(kBlock<W>);
      prefetch_block(next + d * int64_t(sizeof(T)), kBlock<W> * int64_t(sizeof(T)));
      Block<W> y = load<W>(from[i] + d, n);
      apply(action, y, d, n);
      sink.put(d, y, n);
    }
    sink.finish(0, job.in.width);
  }
};

template <typename T>
static void run_simple(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  SimpleRows<T> rows(job, scratch);
  Cursor at{first, first / job.in.tokens, first % job.in.tokens};
  while (at.item < last) {
    rows.collect(at, last);
    rows.run();
  }
  if (job.stream) end_past_caches();
}

// The row engine, of whichever program.
template <typename T>
static void run_dense(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  using W = typename Work<T>::type;
  const bool simple = is_simple(*static_cast<const Program<W>*>(job.program), job.in.width);
  (simple ? run_simple<T> : run_rows<T>)(job, scratch, first, last);
}

}  // namespace
}  // namespace dreamreader
