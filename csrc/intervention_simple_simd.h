// Programs of one step that changes every channel of a row by a formula of its own: no sums, no
// masks, no set-up for each row. A row is looked up two rows before its values are needed, so that
// they can be on their way.
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

  // One row, and its place in the tables; `from` is null behind the last one.
  struct Place {
    const T* from;
    T* to;
    W s, lo, hi;
  };

  const InterventionJob& job;
  const Program<W>& p;
  const Step& step;
  const W* v;
  const T* filled;  // the values of a fill, rounded
  Witness<T> witness;
  const bool copies, stream;

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

  // The next row from `at` on; in place only one that the step touches.
  Place next(Cursor& at, int64_t last) const {
    for (; at.item < last; at.advance(job.in.tokens)) {
      const W s = strength_of(p, 0, at.row, at.token);
      if (s == W(0) && !copies) continue;
      Place place{row_at<T>(job.in, at.row, at.token), row_at<T>(job.out, at.row, at.token), s};
      if (step.limit >= 0) {
        place.lo = limit_of(p, step, 0, at.row, job.in.entries);
        place.hi = limit_of(p, step, 1, at.row, job.in.entries);
      }
      at.advance(job.in.tokens);
      return place;
    }
    return {};
  }

  void run(const Place& row, const T* ahead) {
    if (row.s == W(0)) {
      copy_channels(row.from, row.to, 0, job.in.width, stream);
    } else if (step.kind == kSteer) {
      change<kAdd>(row, row.s, ahead);
    } else if (step.kind == kScale) {
      change<kMultiply>(row, scale_factor(row.lo, row.s), ahead);
    } else if (step.kind == kClamp && row.s == W(1)) {
      change<kBound>(row, row.s, ahead);
    } else if (step.kind == kClamp) {
      change<kBoundBlend>(row, row.s, ahead);
    } else if (row.s != W(1)) {
      change<kMix>(row, row.s, ahead);
    } else {
      if (job.seen) witness.look(row.from, filled, job.in.width);
      copy_channels(filled, row.to, 0, job.in.width, stream);
    }
  }

  template <Act act>
  inline __attribute__((always_inline)) void change(const Place& row, W factor, const T* ahead) {
    Action<W> action{};
    action.act = act;
    action.v = v;
    action.s = factor;
    action.lo = row.lo;
    action.hi = row.hi;
    Sink<T> sink = Sink<T>::at(witness, row.from, row.to, 0, stream);
    const bool overlaps = copies && !stream && job.in.width > kBlock<W>;
    const char* line = reinterpret_cast<const char*>(ahead);
    for (int64_t d = 0; d < job.in.width; d += kBlock<W>) {
      if (overlaps && d + kBlock<W> > job.in.width) d = job.in.width - kBlock<W>;  // some twice
      const int64_t left = job.in.width - d, n = left < kBlock<W> ? left : int64_t(kBlock<W>);
      prefetch_block(line + d * int64_t(sizeof(T)), kBlock<W> * int64_t(sizeof(T)));
      Block<W> y = load<W>(row.from + d, n);
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
  auto row = rows.next(at, last), second = rows.next(at, last);
  while (row.from) {
    const auto third = rows.next(at, last);
    rows.run(row, third.from ? third.from : row.from);
    row = second;
    second = third;
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
