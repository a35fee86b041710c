// The low-rank edit and its gradient for one instruction set; compiled once for each
// (CMakeLists.txt sets DR_ISA).
#include "low_rank_rows_simd.h"

namespace dreamreader {
namespace {

constexpr int64_t kMixTile = 256;  // values of rows, tables and sums that are worked on together

// Rows of one adapter, worked on block by block.
template <typename T>
struct Worker {
  using W = typename Work<T>::type;
  const LowRankJob& job;
  const LowRank<W>& p;
  const LowRankPiece& piece;
  const W *down[kMaxRank], *up[kMaxRank], *bias;
  W *x_rows, *g_rows, *z, *a, *heard, *sums;  // scratch
  // The block.
  int64_t count;
  Place places[kLowRankBlock];
  W strength[kLowRankBlock];
  W *x[kLowRankBlock], *g[kLowRankBlock];

  Worker(const LowRankJob& job, const LowRankPiece& piece, void* scratch)
      : job(job), p(*static_cast<const LowRank<W>*>(job.program)), piece(piece) {
    for (int64_t k = 0; k < p.rank; ++k) {
      down[k] = p.down + (piece.adapter * p.rank + k) * p.width;
      up[k] = p.up + (piece.adapter * p.rank + k) * p.width;
    }
    bias = p.bias + piece.adapter * p.rank;
    x_rows = static_cast<W*>(scratch);
    g_rows = x_rows + job.block * low_rank_pitch(p.width);
    sums = g_rows + job.block * low_rank_pitch(p.width);
    z = sums + 64 * p.rank;
    a = z + job.block * p.rank;
    heard = a + job.block * p.rank;
  }

  // The next rows from `row` on, without those of strength 0 unless all are wanted; these get the
  // bits of `from`. Returns the first row that is left.
  int64_t collect(int64_t row, bool all, const LowRankRows& from) {
    for (count = 0; row < piece.last && count < job.block; ++row) {
      const Place at{job.order[row / p.tokens], row % p.tokens};
      const W s = strength_of(p, at.entry, at.token);
      if (s == W(0) && !all) {
        copy_row<T>(from, job.out, at, p.width);
        continue;
      }
      places[count] = at;
      strength[count++] = s;
    }
    return row;
  }

  // z = A x + b
  void hidden() {
    dots<W>(x, count, down[0], p.width, p.rank, sums, z);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < p.rank; ++k) z[i * p.rank + k] += bias[k];
  }

  // result = base + combinations of the tables, by the coefficients [count, rank].
  void write(const W* coef, const W* const* tables, W* const* base, W* spare) {
    const int64_t rank = p.rank, width = p.width;
    if (job.out.stride_channel == 1) {
      T* to[kLowRankBlock];
      for (int64_t i = 0; i < count; ++i) to[i] = row_at<T>(job.out, places[i]);
      for (int64_t d = 0; d < width; d += kMixTile)
        mix<T, W>(count, coef, rank, 1, rank, tables, base, to, d, end_of(d));
      return;
    }
    W* to[kLowRankBlock];
    for (int64_t i = 0; i < count; ++i) to[i] = spare + i * low_rank_pitch(width);
    for (int64_t d = 0; d < width; d += kMixTile)
      mix<W, W>(count, coef, rank, 1, rank, tables, base, to, d, end_of(d));
    scatter<T>(job.out, places, count, width, to);
  }

  int64_t end_of(int64_t d) const { return p.width - d < kMixTile ? p.width : d + kMixTile; }

  void forward() {
    const bool all = job.x.stride_channel != 1;  // then longer runs are gathered at once
    for (int64_t row = piece.first; row < piece.last;) {
      row = collect(row, all, job.x);
      if (count == 0) continue;
      gather<T>(job.x, places, count, p.width, x_rows, x);
      hidden();
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        bool touched = false;
        for (int64_t k = 0; k < p.rank; ++k) {
          const W value = z[i * p.rank + k];
          touched |= value != W(0);
          a[kept * p.rank + k] = strength[i] * value;
        }
        if (strength[i] == W(0) || !touched) {
          copy_row<T>(job.x, job.out, places[i], p.width);
          continue;
        }
        x[kept] = x[i];
        places[kept++] = places[i];
      }
      count = kept;
      write(a, up, x, g_rows);
    }
  }

  void backward() {
    const bool dx = job.out.data, ds = job.d_strength;
    const bool need_along = dx || ds || piece.d_down, need_z = ds || piece.d_up;
    const bool all = ds || job.x.stride_channel != 1 || job.grad.stride_channel != 1;
    W *d_down[kMaxRank], *d_up[kMaxRank];
    for (int64_t k = 0; k < p.rank; ++k) {
      d_down[k] = static_cast<W*>(piece.d_down) + k * p.width;
      d_up[k] = static_cast<W*>(piece.d_up) + k * p.width;
    }
    clear(piece.d_down, p.rank * p.width);
    clear(piece.d_up, p.rank * p.width);
    clear(piece.d_bias, p.rank);
    for (int64_t row = piece.first; row < piece.last;) {
      row = collect(row, all, job.grad);
      if (count == 0) continue;
      gather<T>(job.grad, places, count, p.width, g_rows, g);
      gather<T>(job.x, places, count, p.width, x_rows, x);
      if (need_along) dots<W>(g, count, up[0], p.width, p.rank, sums, a);
      if (need_z) hidden();
      if (ds) strengths();
      weigh();
      for (int64_t k = 0; piece.d_bias && k < p.rank; ++k)
        for (int64_t i = 0; i < count; ++i)
          static_cast<W*>(piece.d_bias)[k] += a[i * p.rank + k];
      for (int64_t d = 0; d < p.width; d += kMixTile) {
        if (piece.d_down) mix<W, W>(p.rank, a, 1, p.rank, count, x, d_down, d_down, d, end_of(d));
        if (piece.d_up) mix<W, W>(p.rank, heard, 1, p.rank, count, g, d_up, d_up, d, end_of(d));
      }
      if (dx) write(a, down, g, x_rows);
    }
  }

  void clear(void* sums, int64_t size) {
    if (sums) __builtin_memset(sums, 0, std::size_t(size) * sizeof(W));
  }

  void strengths() {
    for (int64_t i = 0; i < count; ++i) {
      W total = 0;
      for (int64_t k = 0; k < p.rank; ++k) total += a[i * p.rank + k] * z[i * p.rank + k];
      static_cast<W*>(job.d_strength)[places[i].entry * p.tokens + places[i].token] = total;
    }
  }

  // a = s U g, heard = s z; rows of strength 0 leave the block.
  void weigh() {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (strength[i] == W(0)) {
        copy_row<T>(job.grad, job.out, places[i], p.width);
        continue;
      }
      for (int64_t k = 0; k < p.rank; ++k) {
        a[kept * p.rank + k] = strength[i] * a[i * p.rank + k];
        heard[kept * p.rank + k] = strength[i] * z[i * p.rank + k];
      }
      x[kept] = x[i];
      g[kept] = g[i];
      places[kept++] = places[i];
    }
    count = kept;
  }
};

template <typename T>
void run_forward(const LowRankJob& job, void* scratch, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) Worker<T>(job, job.pieces[i], scratch).forward();
}

template <typename T>
void run_backward(const LowRankJob& job, void* scratch, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) Worker<T>(job, job.pieces[i], scratch).backward();
}

}  // namespace

namespace DR_ISA {

extern const LowRankKernels low_rank;
const LowRankKernels low_rank = {
    {run_forward<f16>, run_forward<bf16>, run_forward<float>, run_forward<double>},
    {run_backward<f16>, run_backward<bf16>, run_backward<float>, run_backward<double>},
};

}  // namespace DR_ISA
}  // namespace dreamreader
