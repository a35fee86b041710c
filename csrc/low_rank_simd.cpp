// The low-rank edit and its gradient for one instruction set; compiled once for each
// (CMakeLists.txt sets DR_ISA).
#include "low_rank_rows_simd.h"

namespace dreamreader {
namespace {

// Rows of one adapter, worked on block by block.
template <typename T>
struct Worker {
  using W = typename Work<T>::type;
  const LowRankJob& job;
  const LowRank<W>& p;
  const LowRankPiece& piece;
  const W* bias;
  Panel<W> x, g, down, up, d_down, d_up;  // in scratch
  W *sums, *z, *a, *heard;                // the last three: [block, rank]
  // The block.
  int64_t count;
  Place places[kLowRankBlock];
  W strength[kLowRankBlock];
  Ahead ahead;

  Worker(const LowRankJob& job, const LowRankPiece& piece, void* scratch)
      : job(job), p(*static_cast<const LowRank<W>*>(job.program)), piece(piece) {
    W* next = static_cast<W*>(scratch);
    const auto panel = [&](int64_t rows) {
      next += rows * low_rank_pitch(p.width);
      return Panel<W>{next - rows * low_rank_pitch(p.width), rows};
    };
    x = panel(job.block);
    g = panel(job.block);
    down = panel(p.rank);
    up = panel(p.rank);
    d_down = panel(p.rank);
    d_up = panel(p.rank);
    sums = next;
    z = sums + kLowRankSums * p.rank;
    a = z + job.block * p.rank;
    heard = a + job.block * p.rank;
    bias = p.bias + piece.adapter * p.rank;
    fill(down, p.down);
    fill(up, p.up);
  }

  void fill(const Panel<W>& panel, const W* tables) {
    for (int64_t k = 0; k < p.rank; ++k)
      each_block(panel, k, 0, p.width, [&](int64_t c, int64_t n, W* to) {
        gather_block(tables + (piece.adapter * p.rank + k) * p.width + c, 1, n, to);
      });
  }

  void clear(const Panel<W>& panel) {
    __builtin_memset(panel.data, 0, std::size_t(panel.rows * low_rank_pitch(p.width)) * sizeof(W));
  }

  void give(const Panel<W>& panel, void* tables) {
    for (int64_t k = 0; k < p.rank; ++k)
      each_block(panel, k, 0, p.width, [&](int64_t c, int64_t n, const W* from) {
        store(static_cast<W*>(tables) + k * p.width + c, load<W>(from, n), n);
      });
  }

  // The next rows from `row` on, without those of strength 0 unless all are wanted; these get the
  // bits of `from`. Returns the first row that is left.
  int64_t collect(int64_t row, bool all, const StridedRows& from) {
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

  // The rows after this block, where they are dense; some of them may have strength 0.
  void look_ahead(int64_t row, const StridedRows& rows) {
    if (rows.stride_channel != 1) return;
    for (int64_t i = row; i < piece.last && i < row + job.block; ++i) {
      const Place at{job.order[i / p.tokens], i % p.tokens};
      ahead.rows[ahead.count++] = reinterpret_cast<const char*>(row_at<T>(rows, at));
    }
  }

  // Begins the tile at channel d; returns its channels as whole vectors.
  int64_t begin_tile(int64_t d) {
    const int64_t n = tile_width<W>(p.width, d);
    ahead.tile(d * int64_t(sizeof(T)), (d + n) * int64_t(sizeof(T)));
    return n;
  }

  // z = A x + b
  void hidden() {
    dots<W>(x, count, down, p.width, sums, z);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < p.rank; ++k) z[i * p.rank + k] += bias[k];
  }

  // One tile of result = base + combinations of the tables by the coefficients [count, rank].
  void write(const W* coef, const Panel<W>& tables, const Panel<W>& base, T* const* rows, int64_t d,
             int64_t n) {
    const int64_t exist = p.width - d < n ? p.width - d : n;
    if (job.out.stride_channel == 1)
      mix(count, coef, p.rank, 1, p.rank, tables.at(0, d),
          IntoRows<T>{base.at(0, d), rows, d, p.width, ahead}, exist, n);
    else
      mix(count, coef, p.rank, 1, p.rank, tables.at(0, d), IntoPanel<W>{base.at(0, d), ahead}, n,
          n);
  }

  // Where the results of the block go.
  void aim(T** rows) {
    for (int64_t i = 0; i < count; ++i) rows[i] = row_at<T>(job.out, places[i]);
  }

  // Moves row i of a block to the place of a row before it that has left.
  void move(const Panel<W>& panel, int64_t i, int64_t to) {
    for (int64_t d = 0; i != to && d < p.width; d += kTile)
      __builtin_memcpy(panel.at(to, d), panel.at(i, d), kTile * sizeof(W));
  }

  void forward() {
    const bool all = job.x.stride_channel != 1;  // then longer runs are gathered at once
    for (int64_t row = piece.first; row < piece.last;) {
      row = collect(row, all, job.x);
      if (count == 0) continue;
      gather<T>(job.x, places, count, p.width, x);
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
        move(x, i, kept);
        places[kept++] = places[i];
      }
      count = kept;
      T* rows[kLowRankBlock];
      aim(rows);
      for (int64_t d = 0; d < p.width; d += kTile) write(a, up, x, rows, d, begin_tile(d));
      if (job.out.stride_channel != 1) scatter<T>(job.out, places, count, p.width, x);
    }
  }

  void backward() {
    const bool dx = job.out.data, ds = job.d_strength;
    const bool need_z = ds || piece.d_up, need_x = need_z || piece.d_down;
    const bool all = ds || job.x.stride_channel != 1 || job.grad.stride_channel != 1;
    if (piece.d_down) clear(d_down);
    if (piece.d_up) clear(d_up);
    W* d_bias = static_cast<W*>(piece.d_bias);
    for (int64_t k = 0; d_bias && k < p.rank; ++k) d_bias[k] = 0;
    for (int64_t row = piece.first; row < piece.last;) {
      row = collect(row, all, job.grad);
      if (count == 0) continue;
      gather<T>(job.grad, places, count, p.width, g);
      if (need_x) gather<T>(job.x, places, count, p.width, x);
      if (dx || ds || piece.d_down) dots<W>(g, count, up, p.width, sums, a);
      if (need_z) hidden();
      if (ds) strengths();
      weigh();
      for (int64_t i = 0; d_bias && i < count; ++i)
        for (int64_t k = 0; k < p.rank; ++k) d_bias[k] += a[i * p.rank + k];
      ahead.count = 0;
      look_ahead(row, job.grad);
      if (need_x) look_ahead(row, job.x);
      T* rows[kLowRankBlock];
      if (dx) aim(rows);
      for (int64_t d = 0; d < p.width; d += kTile) {
        const int64_t n = begin_tile(d);
        if (piece.d_down)
          mix(p.rank, a, 1, p.rank, count, x.at(0, d), IntoPanel<W>{d_down.at(0, d), ahead}, n, n);
        if (piece.d_up)
          mix(p.rank, heard, 1, p.rank, count, g.at(0, d), IntoPanel<W>{d_up.at(0, d), ahead}, n,
              n);
        if (dx) write(a, down, g, rows, d, n);
      }
      if (dx && job.out.stride_channel != 1) scatter<T>(job.out, places, count, p.width, g);
    }
    if (piece.d_down) give(d_down, piece.d_down);
    if (piece.d_up) give(d_up, piece.d_up);
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
      move(x, i, kept);
      move(g, i, kept);
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
const LowRankKernels low_rank = {DR_BY_TYPE(run_forward), DR_BY_TYPE(run_backward)};

}  // namespace DR_ISA
}  // namespace dreamreader
