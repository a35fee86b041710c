// What the CPU kernel of the low-rank edit offers for each instruction set, and how its work is
// divided.
#pragma once

#include "cpu.h"
#include "low_rank.h"

namespace dreamreader {

// Rows that one thread works through in order, all of one adapter. Rows are counted through the
// entries in the order of LowRankJob::order.
struct LowRankPiece {
  int64_t adapter, first, last;
  void *d_down, *d_bias, *d_up;  // sums of this piece, or null: [rank, width], [rank]
};

// One call. `program` is a LowRank<double> for f64 activations and a LowRank<float> otherwise.
struct LowRankJob {
  const void* program;
  StridedRows x, out;  // forward: y; backward: dx, without data where nobody asks for it
  StridedRows grad;    // backward only
  const int64_t* order;
  const LowRankPiece* pieces;
  void* d_strength;  // dense [entries, tokens], or null
  int64_t block;     // rows that stay in the second cache while they are worked on
};

constexpr int64_t kLowRankBlock = 64;  // rows, at most

constexpr int64_t kLowRankTile = 128;  // channels of a tile of a panel

// Channels with memory in a panel.
DR_HD int64_t low_rank_pitch(int64_t width) {
  return (width + kLowRankTile - 1) / kLowRankTile * kLowRankTile;
}

constexpr int64_t kLowRankSums = 128;  // lanes of eight rows

// Values of scratch: two blocks of rows, the tables and their sums, three blocks of ranks, and the
// sums of eight rows in lanes.
DR_HD int64_t low_rank_scratch(int64_t block, int64_t width, int64_t rank) {
  return (2 * block + 4 * rank) * low_rank_pitch(width) + kLowRankSums * rank + 3 * block * rank;
}

// Work on pieces first .. last - 1.
struct LowRankKernels {
  ByType<void(const LowRankJob& job, void* scratch, int64_t first, int64_t last)> forward, backward;
};

DR_KERNELS(LowRankKernels, low_rank)

}  // namespace dreamreader
