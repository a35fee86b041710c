// A tile of rows in the shared memory of a block: how it comes there, what the low-rank edit does
// to it, and how it goes back. Both projections run on it:
//
//   project   coefficients[j][row] = <table_j, tile_row> + bias_j
//   spread    tile_row += s_row sum_j coefficients[j][row] table_j
//
// In `project` a warp owns kGroup rows and kRanks ranks and its lanes split the channels; in
// `spread` a thread owns four channels. Tables come from the L2 cache.
#pragma once

#include <cmath>

#include "cuda_tile.h"
#include "low_rank.h"

namespace dreamreader {

constexpr int kThreads = 256;
constexpr int kRanks = 4;
constexpr int kQuad = 4;
constexpr int kMaxRows = 32;  // of a tile

// Four neighbours, which move at once.
template <typename T>
struct alignas(kQuad * sizeof(T)) Quad {
  T at[kQuad];
};

template <typename T>
__device__ __forceinline__ Quad<T> quad_at(const T* from) {
  return *reinterpret_cast<const Quad<T>*>(from);
}

// Channels c .. c + 3 of a row of a table, 0 beyond its end. kWide: none is beyond, and aligned.
template <bool kWide>
__device__ __forceinline__ Quad<float> table_at(const float* row, int c, int width) {
  if constexpr (kWide) {
    return quad_at(row + c);
  } else {
    Quad<float> quad;
#pragma unroll
    for (int e = 0; e < kQuad; ++e) quad.at[e] = c + e < width ? row[c + e] : 0.0f;
    return quad;
  }
}

// 16 bytes from global to shared memory, on their way until `copies_done`.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
#ifdef __CUDA_ARCH__
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

__device__ __forceinline__ void copies_done() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncthreads();
}

// Sums kCount values over the lanes of a warp; lane L then holds value L / (32 / kCount) at [0].
template <int kCount, int kDistance = kWarp / 2, int kAll>
__device__ __forceinline__ void sum_over_lanes(float (&values)[kAll], int lane) {
  if constexpr (kDistance > 0) {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? values[i] : values[i + kHalf];
      values[i] = upper ? values[i + kHalf] : values[i];
      values[i] += __shfl_xor_sync(kAllLanes, given, kDistance);
    }
    if constexpr (kHalf == 0) values[0] += __shfl_xor_sync(kAllLanes, values[0], kDistance);
    sum_over_lanes<(kHalf > 0 ? kHalf : 1), kDistance / 2>(values, lane);
  }
}

// How the rows are cut into tiles: runs of rows with one adapter, which are those of an entry, or
// all where there is one adapter.
struct Cut {
  int64_t span;    // rows of a run
  int64_t blocks;  // tiles of a run
  int64_t tiles;   // of all
  int32_t rows;    // of a tile
  int32_t pitch;   // elements from one row of a tile to the next
  bool fits;       // into the shared memory of a block
};

// What a block knows of its rows.
struct TileRows {
  int64_t entry[kMaxRows], token[kMaxRows];
  float strength[kMaxRows];
  bool there[kMaxRows];    // exists
  bool loaded[kMaxRows];   // lies in the tile, others are 0 there
  bool changed[kMaxRows];  // by `spread`
};

template <typename T, int kRows, bool kWide>
struct LowRankTile {
  static constexpr int kGroup = kRows < 8 ? kRows : 8;     // rows of `project`
  static constexpr int kSpread = kRows < 16 ? kRows : 16;  // rows of `spread`
  static constexpr int kRun = 16 / int(sizeof(T));

  const LowRank<float>& p;
  const Cut& cut;
  TileRows& rows;
  T* tile;  // [rows][pitch], 0 beyond the width as far as the last quad goes
  int thread, lane, warp, width, rank;

  __device__ __forceinline__ LowRankTile(const LowRank<float>& p, const Cut& cut, TileRows& rows,
                                         char* tile)
      : p(p),
        cut(cut),
        rows(rows),
        tile(reinterpret_cast<T*>(tile)),
        thread(int(threadIdx.x)),
        lane(thread % kWarp),
        warp(thread / kWarp),
        width(int(p.width)),
        rank(int(p.rank)) {}

  // Finds the rows of tile `number` and returns their adapter, -1 where there is none.
  __device__ __forceinline__ int64_t find(int64_t number) {
    const int64_t run = number / cut.blocks, first = number % cut.blocks * cut.rows;
    if (thread < cut.rows) {
      const int64_t row = run * cut.span + first + thread;
      const bool there = first + thread < cut.span;
      rows.there[thread] = there;
      rows.entry[thread] = there ? row / p.tokens : 0;
      rows.token[thread] = there ? row % p.tokens : 0;
      rows.strength[thread] = there ? strength_of(p, rows.entry[thread], rows.token[thread]) : 0.0f;
      rows.changed[thread] = rows.strength[thread] != 0;
    }
    __syncthreads();
    return adapter_of(p, rows.entry[0]);
  }

  // Calls move(row, channel, offset in memory) for every run of kRun channels or, one at a time,
  // for all of them, in the order of memory.
  template <typename Move>
  __device__ __forceinline__ void walk(const StridedRows& x, bool runs, const Move& move) {
    const auto offset = [&](int row, int c) {
      return row_offset(x, rows.entry[row], rows.token[row]) + c * x.stride_channel;
    };
    const int step = runs ? kRun : 1, across = (width + step - 1) / step;
    const bool by_token = x.stride_token < x.stride_channel;
#pragma unroll 4
    for (int i = thread; i < across * cut.rows; i += kThreads) {
      const int row = by_token ? i % cut.rows : i / across;
      const int c = (by_token ? i / cut.rows : i % across) * step;
      move(row, c, offset(row, c));
    }
  }

  // Brings the rows that are `loaded` into the tile.
  __device__ __forceinline__ void load(const StridedRows& x, bool runs) {
    const T* data = static_cast<const T*>(x.data);
    walk(x, runs, [&](int row, int c, int64_t at) {
      T* to = tile + row * cut.pitch + c;
      if (!rows.loaded[row]) {
        for (int e = 0; e < (runs ? kRun : 1); ++e) to[e] = narrow<T>(0.0f);
      } else if (runs) {
        copy_16(to, data + at);
      } else {
        *to = data[at];
      }
    });
    const int beyond = -width & (kQuad - 1);  // of the last quad
    for (int i = thread; i < beyond * cut.rows; i += kThreads)
      tile[i % cut.rows * cut.pitch + width + i / cut.rows] = narrow<T>(0.0f);
    copies_done();
  }

  // Writes the rows that changed or, if asked to, all that exist.
  __device__ __forceinline__ void store(const StridedRows& y, bool runs, bool all) {
    T* data = static_cast<T*>(y.data);
    walk(y, runs, [&](int row, int c, int64_t at) {
      if (!(all ? rows.there[row] : rows.changed[row])) return;
      const T* from = tile + row * cut.pitch + c;
      if (runs) {
        *reinterpret_cast<uint4*>(data + at) = *reinterpret_cast<const uint4*>(from);
      } else {
        data[at] = *from;
      }
    });
  }

  __device__ __forceinline__ void project(const float* table, const float* bias,
                                          float* coefficients) {
    const int groups = cut.rows / kGroup, tasks = groups * ((rank + kRanks - 1) / kRanks);
    for (int task = warp; task < tasks; task += kThreads / kWarp) {
      // Warps beside each other share ranks, so that tables come from the L1 cache but once.
      const int row = task % groups * kGroup, first = task / groups * kRanks;
      const float* tables[kRanks];
      for (int j = 0; j < kRanks; ++j)
        tables[j] = table + int64_t{first + j < rank ? first + j : rank - 1} * width;
      float sums[kGroup * kRanks] = {};
      for (int c = lane * kQuad; c < width; c += kWarp * kQuad) {
        Quad<float> a[kRanks];
#pragma unroll
        for (int j = 0; j < kRanks; ++j) a[j] = table_at<kWide>(tables[j], c, width);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const Quad<T> x = quad_at(tile + (row + i) * cut.pitch + c);
#pragma unroll
          for (int e = 0; e < kQuad; ++e)
#pragma unroll
            for (int j = 0; j < kRanks; ++j)
              sums[i * kRanks + j] = fmaf(widen<float>(x.at[e]), a[j].at[e], sums[i * kRanks + j]);
        }
      }
      sum_over_lanes<kGroup * kRanks>(sums, lane);
      constexpr int kLanesEach = kWarp / (kGroup * kRanks);
      const int i = lane / kLanesEach / kRanks, j = first + lane / kLanesEach % kRanks;
      if (lane % kLanesEach == 0 && j < rank)
        coefficients[j * cut.rows + row + i] = sums[0] + (bias ? bias[j] : 0.0f);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void spread(const float* table, const float* coefficients) {
    for (int c = thread * kQuad; c < width; c += kThreads * kQuad) {
      for (int first = 0; first < cut.rows; first += kSpread) {
        float sums[kSpread][kQuad] = {};
        for (int j = 0; j < rank; ++j) {
          const Quad<float> u = table_at<kWide>(table + int64_t{j} * width, c, width);
#pragma unroll
          for (int i = 0; i < kSpread; i += kQuad) {
            const Quad<float> z = quad_at(coefficients + j * cut.rows + first + i);
#pragma unroll
            for (int n = 0; n < kQuad; ++n)
#pragma unroll
              for (int e = 0; e < kQuad; ++e)
                sums[i + n][e] = fmaf(z.at[n], u.at[e], sums[i + n][e]);
          }
        }
#pragma unroll
        for (int i = 0; i < kSpread; ++i) {
          if (!rows.changed[first + i]) continue;
          Quad<T>* at = reinterpret_cast<Quad<T>*>(tile + (first + i) * cut.pitch + c);
          Quad<T> x = *at;
#pragma unroll
          for (int e = 0; e < kQuad; ++e)
            x.at[e] = narrow<T>(fmaf(rows.strength[first + i], sums[i][e], widen<float>(x.at[e])));
          *at = x;
        }
      }
    }
    __syncthreads();
  }
};

}  // namespace dreamreader
