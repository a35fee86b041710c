// Subspace engine: programs that only project out one subspace, on blocks of rows, as two products:
// the components z = x V', then x - s z V. In bfloat16 on AMX where the processor has it.
#pragma once

#include "intervention_planes_simd.h"
#include "low_rank_rows_simd.h"
#include "matmul_amx_simd.h"

namespace dreamreader {
namespace {

// What all pieces of a call share: V as a panel, and packed for AMX. With V = hi + lo in bfloat16,
//   z = x [hi' lo'], the halves added,   z V = [z_hi z_hi z_lo] [hi; lo; hi],
// which is exact to 16 bits.
template <typename W>
struct SubspaceTables {
  int64_t count, width, whole, depth, columns;  // vectors, channels; the latter three for AMX
  Panel<W> panel;
  bf16 *split, *down, *up;  // [2 count + 1, whole], the last row 0; packed matrices

  SubspaceTables(void* memory, int64_t count, int64_t width)
      : count(count),
        width(width),
        whole((width + 31) / 32 * 32),
        depth((3 * count + 31) / 32 * 32),
        columns((2 * count + 31) / 32 * 32),
        panel{static_cast<W*>(memory), count} {
    split = reinterpret_cast<bf16*>(panel.data + count * low_rank_pitch(width));
    down = split + (2 * count + 1) * whole;
    up = down + whole * columns;
  }

  int64_t bytes() const {
    return reinterpret_cast<char*>(up + depth * whole) - reinterpret_cast<char*>(panel.data);
  }

  // From V [count, pitch].
  void fill(const W* v, int64_t pitch, bool amx) const {
    for (int64_t k = 0; k < count; ++k)
      each_block(panel, k, 0, width,
                 [&](int64_t c, int64_t n, W* to) { gather_block(v + k * pitch + c, 1, n, to); });
#if defined(__AVX512F__)
    if constexpr (__is_same(W, float))
      if (amx) fill_amx(v, pitch);
#endif
    (void)amx;
  }

#if defined(__AVX512F__)
  void fill_amx(const float* v, int64_t pitch) const {
    __builtin_memset(split, 0, std::size_t((2 * count + 1) * whole) * sizeof(bf16));
    for (int64_t k = 0; k < count; ++k)
      for (int64_t c = 0; c < width; c += kBlock<float>) {
        const Block<float> block = load<float>(v + k * pitch + c, width - c);
        split_block(block, split + k * whole + c, split + (count + k) * whole + c, width - c);
      }
    const auto row = [&](int64_t k) { return split + (k < 2 * count ? k : 2 * count) * whole; };
    amx_pack_columns(down, whole, columns, row);
    amx_pack_rows(up, depth, whole, [&](int64_t k) {
      return k < 2 * count ? row(k) : (k < 3 * count ? row(k - 2 * count) : row(2 * count));
    });
  }

  DR_INLINE void split_block(const Block<float>& block, bf16* hi, bf16* lo, int64_t n) {
    store(hi, block, n);
    const Block<float> upper = load<float>(hi, n);
    Block<float> rest;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) rest.v[i] = block.v[i] - upper.v[i];
    store(lo, rest, n);
  }
#endif
};

// Rows of a call, worked on block by block.
template <typename T>
struct SubspaceBlock {
  using W = typename Work<T>::type;
  const InterventionJob& job;
  const Program<W>& p;
  const Step& step;
  const SubspaceTables<W> tables;
  const StridedRows in, out;  // the channels of the step
  Witness<T> witness;
  Panel<W> x;
  W *sums, *z;   // z: [rows, vectors], or of AMX [rows, columns]
  bf16* packed;  // of AMX: [rows, 3 vectors], then the rows themselves
  int64_t count = 0;
  Place places[kSubspaceBlock];
  W strength[kSubspaceBlock];
  Ahead ahead;

  SubspaceBlock(const InterventionJob& job, void* scratch)
      : job(job),
        p(*static_cast<const Program<W>*>(job.program)),
        step(p.steps[0]),
        tables(job.prepared, step.count, step.end - step.begin),
        in(rows_of(job.in)),
        out(rows_of(job.out)),
        witness(job.seen) {
    x = {static_cast<W*>(scratch), kSubspaceBlock};
    sums = x.data + kSubspaceBlock * low_rank_pitch(tables.width);
    z = sums + kLowRankSums * tables.count;
    packed = reinterpret_cast<bf16*>(z + kSubspaceBlock * tables.columns);
    if (job.amx)  // what is beyond the components stays 0
      __builtin_memset(packed, 0, std::size_t(kSubspaceBlock * tables.depth) * sizeof(bf16));
  }

  StridedRows rows_of(const StridedRows& a) const {
    StridedRows rows = a;
    rows.data = row_at<T>(a, 0, 0) + step.begin * a.stride_channel;
    rows.width = tables.width;
    if (rows.width == 1) rows.stride_channel = 1;
    return rows;
  }

  void copy(Place at, int64_t begin, int64_t end) const {
    const StridedRows &from = job.in, &to = job.out;
    if (from.data == to.data) return;
    const T* source = row_at<T>(from, at);
    T* target = row_at<T>(to, at);
    if (from.stride_channel == 1 && to.stride_channel == 1)
      return copy_channels(source, target, begin, end);
    for (int64_t c = begin; c < end; ++c)
      target[c * to.stride_channel] = source[c * from.stride_channel];
  }

  // The next rows with work, from `at` on.
  void collect(Cursor& at, int64_t last) {
    for (count = 0; at.item < last && count < kSubspaceBlock; at.advance(job.in.tokens)) {
      const Place place{at.row, at.token};
      const W s = strength_of(p, 0, at.row, at.token);
      copy(place, 0, s == W(0) ? job.in.width : step.begin);
      if (s == W(0)) continue;
      copy(place, step.end, job.in.width);
      places[count] = place;
      strength[count++] = s;
    }
    ahead.count = 0;
    for (Cursor next = at;
         in.stride_channel == 1 && next.item < last && ahead.count < kSubspaceBlock;
         next.advance(job.in.tokens))
      ahead.rows[ahead.count++] =
          reinterpret_cast<const char*>(row_at<T>(in, {next.row, next.token}));
  }

  W removed(int64_t i, W c) const { return component_removed(c, step.one_sided, strength[i]); }

  void run() {
    gather<T>(in, places, count, tables.width, x);
    dots<W>(x, count, tables.panel, tables.width, sums, z);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < tables.count; ++k)
        z[i * tables.count + k] = -removed(i, z[i * tables.count + k]);
    T* rows[kSubspaceBlock];
    for (int64_t i = 0; i < count; ++i) rows[i] = row_at<T>(out, places[i]);
    for (int64_t d = 0; d < tables.width; d += kTile) {
      const int64_t n = tile_width<W>(tables.width, d);
      ahead.tile(d * int64_t(sizeof(T)), (d + n) * int64_t(sizeof(T)));
      const auto into = [&](const auto& target, int64_t dense) {
        mix(count, z, tables.count, 1, tables.count, tables.panel.at(0, d), target, dense, n);
      };
      if (out.stride_channel == 1)
        into(IntoRows<T>{x.at(0, d), rows, d, tables.width, ahead},
             tables.width - d < n ? tables.width - d : n);
      else
        into(IntoPanel<W>{x.at(0, d), ahead}, n);
    }
    if (out.stride_channel != 1) scatter<T>(out, places, count, tables.width, x);
    if (job.seen) look();
  }

  void look() {
    for (int64_t i = 0, n; i < count; i += n) {
      const bool rows = in.stride_channel == 1 && out.stride_channel == 1;
      n = rows || out.stride_token != 1 ? 1 : run_of(in, places, i, count);
      const T *from = row_at<T>(in, places[i]), *to = row_at<T>(out, places[i]);
      if (rows) {
        witness.look(from, to, tables.width);
        continue;
      }
      for (int64_t c = 0; c < tables.width; ++c)
        witness.look(from + c * in.stride_channel, to + c * out.stride_channel, n);
    }
  }

#if defined(__AVX512F__)
  // Whether the rows of the block are those of a matrix that AMX can read where it is.
  bool regular() const {
    bool is = count % kAmxRows == 0 && tables.whole == tables.width;
    for (int64_t i = 1; is && i < count; ++i)
      is = places[i].entry == places[0].entry && places[i].token == places[0].token + i;
    return is;
  }

  // The rows of the block one after the other, zeros behind the last channel and the last row.
  void copy_rows(bf16* own, int64_t pitch) const {
    for (int64_t i = 0; i < amx_whole(count); ++i) {
      const int64_t n = i < count ? tables.width : 0;
      if (n) __builtin_memcpy(own + i * pitch, row_at<T>(in, places[i]), std::size_t(n) * 2);
      __builtin_memset(own + i * pitch + n, 0, std::size_t(tables.whole - n) * 2);
    }
  }

  // Takes the rows whose components are numbers that bfloat16 can hold; leaves the others.
  void run_amx() {
    const bool direct = regular();
    const int64_t size = amx_whole(count);
    const int64_t pitch = direct ? in.stride_token : tables.whole + 32;
    bf16 *coefficients = packed, *own = packed + kSubspaceBlock * tables.depth;
    if (direct)
      own = row_at<bf16>(in, places[0]);
    else
      copy_rows(own, pitch);
    amx_multiply(
        own, size, pitch, tables.down, tables.whole, tables.columns, tables.columns,
        [&](int64_t r, int64_t c) { return z + r * tables.columns + c; }, [](int64_t, int64_t) {});
    bool done[kSubspaceBlock] = {};
    T* rows[kSubspaceBlock];
    ahead.tile(0, tables.width * int64_t(sizeof(T)));
    for (int64_t i = 0; i < count; ++i) {
      done[i] = split(i, coefficients + i * tables.depth);
      rows[i] = row_at<T>(out, places[i]);
    }
    Finite<T> finite;
    alignas(64) float part[kAmxRows][kAmxColumns];
    amx_multiply(
        coefficients, size, tables.depth, tables.up, tables.depth, tables.whole, kAmxColumns,
        [&](int64_t, int64_t) { return part[0]; },
        [&](int64_t r, int64_t c) {
          const bf16* from = own + r * pitch + c;
          if (c + kAmxColumns > tables.width)
            subtract<kEdge>(from, pitch, part, rows, done, r, c, finite);
          else if (job.stream)
            subtract<kPast>(from, pitch, part, rows, done, r, c, finite);
          else
            subtract<kPlain>(from, pitch, part, rows, done, r, c, finite);
        });
    if (job.seen && (!(witness.bits & kChanged) || !finite.all()))
      for (int64_t i = 0; i < count; ++i)
        if (done[i]) witness.look(row_at<T>(in, places[i]), rows[i], tables.width);
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (done[i]) continue;
      places[left] = places[i];
      strength[left++] = strength[i];
    }
    count = left;
  }

  // [hi hi lo] of what row i loses along each vector; false where that would not be exact enough.
  bool split(int64_t i, bf16* to) const {
    const int64_t m = tables.count;
    const Block<float> one = load<float>(z + i * tables.columns, m);
    const Block<float> other = load<float>(z + i * tables.columns + m, m);
    const VF least = VF{} + 1e-30f, most = VF{} + 1e30f, s = VF{} + strength[i];
    Block<float> a;
    Lanes<float>::I some{}, odd{};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const VF c = one.v[v] + other.v[v];
      a.v[v] = s * (step.one_sided ? (c < 0.0f ? VF{} : c) : c);
      some |= (c >= least) | (c <= -least);
      odd |= ~((c < most) & (c > -most) & (a.v[v] < most) & (a.v[v] > -most));
    }
    if (!any(some) || any(odd)) return false;
    SubspaceTables<float>::split_block(a, to, to + 2 * m, m);
    __builtin_memcpy(to + m, to, std::size_t(m) * sizeof(bf16));
    return true;
  }

  static bool any(Lanes<float>::I lanes) { return _mm512_movepi32_mask(bits_as<__m512i>(lanes)); }

  enum Target { kPlain, kPast, kEdge };

  // Rows r .. r + 31 and columns c .. c + 31 of the results.
  template <Target target>
  void subtract(const bf16* own, int64_t pitch, const float (&part)[kAmxRows][kAmxColumns],
                T* const* rows, const bool* done, int64_t r, int64_t c, Finite<T>& finite) {
    Finite<T> seen = finite;
    const int64_t last = count < r + kAmxRows ? count : r + kAmxRows;
    for (int64_t i = r; i < last; ++i, own += pitch) {
      ahead.step();
      if (!done[i]) continue;
      VF y[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        y[half] =
            load_lanes(own + half * kWidth<float>) - load_lanes(part[i - r] + half * kWidth<float>);
      alignas(64) T fresh[kAmxColumns];
      T* made = target == kPlain ? rows[i] + c : fresh;
      store_pair(made, y[0], y[1]);
      const int64_t n = target == kEdge ? tables.width - c : kAmxColumns;
      seen.see(made, n);
      if (target == kPast) copy_line_past_caches(rows[i] + c, fresh);
      if (target == kEdge) __builtin_memcpy(rows[i] + c, fresh, std::size_t(n) * sizeof(T));
    }
    finite = seen;
  }
#endif
};

template <typename T>
static void run_subspace(const InterventionJob& job, void* scratch, int64_t first, int64_t last) {
  SubspaceBlock<T> block(job, scratch);
  Cursor at{first, first / job.in.tokens, first % job.in.tokens};
#if defined(__AVX512F__)
  if constexpr (__is_same(T, bf16)) {
    if (job.amx && block.in.stride_channel == 1 && block.out.stride_channel == 1) {
      const AmxTiles tiles;
      while (at.item < last) {
        block.collect(at, last);
        if (block.count) block.run_amx();
        if (block.count) block.run();  // what is left
      }
      if (job.stream) end_past_caches();
      return;
    }
  }
#endif
  while (at.item < last) {
    block.collect(at, last);
    if (block.count) block.run();
  }
}

template <typename W>
static int64_t subspace_bytes(int64_t count, int64_t width) {
  return SubspaceTables<W>(nullptr, count, width).bytes();
}

template <typename W>
static void prepare_subspace(const InterventionJob& job) {
  const Program<W>& p = *static_cast<const Program<W>*>(job.program);
  const Step& step = p.steps[0];
  SubspaceTables<W>(job.prepared, step.count, step.end - step.begin)
      .fill(p.vectors + step.vector * job.in.width + step.begin, job.in.width, job.amx);
}

}  // namespace
}  // namespace dreamreader
