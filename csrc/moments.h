// Moments of labelled rows. For every label l and feature d, over the rows i of that label,
//   total[l, d] = sum x[i, d] - shift[d]        square[l, d] = sum (x[i, d] - shift[d])^2
// with every difference and sum in float64.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "rows.h"

namespace dreamreader {

struct MomentsJob {
  StridedRows x;          // of one entry
  const int64_t* labels;  // below `count`; rows with a negative one take no part
  int64_t stride_label;
  int64_t count;
  const double* shift;  // [features]
  // Rows are cut into pieces and features into tiles; each pair of them is summed by one thread,
  // and the pieces are added up in their order, so results do not depend on the threads.
  int64_t pieces, piece_rows, tiles;
  double* total;   // [pieces, count, features]
  double* square;  // the same, or null
};

constexpr int64_t kMomentsTile = 2048;       // features
constexpr int64_t kMomentsBlock = 64;        // rows that are ordered by label together
constexpr int64_t kMomentsPieces = 64;       // of rows, at most
constexpr int64_t kMomentsBytes = 64 << 20;  // of the sums of all pieces, about

// Sums the pairs first .. last - 1, counted piece by piece.
struct MomentsKernels {
  ByType<void(const MomentsJob& job, int64_t first, int64_t last)> run;
};

DR_KERNELS(MomentsKernels, moments)

}  // namespace dreamreader
