// Scores of the columns of activations a[i, j] = x[i, j] where it is positive or NaN, else 0.
//
//   squares[j] = sum_i a^2    or    total[j] = sum_i a and logs[j] = sum_i a log a
//
// with every term and sum in float64.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "dtype.h"

namespace dreamreader {

struct ColumnScoresJob {
  const char* x;
  int64_t rows, columns, stride_row;  // in elements
  // Rows are cut into pieces and columns into tiles; each pair of them is summed by one thread, and
  // the pieces are added up in their order, so results do not depend on the threads.
  int64_t pieces, piece_rows, tiles;
  double* first;   // [pieces, columns]: squares or total
  double* second;  // [pieces, columns]: logs, or null
};

constexpr int64_t kScoresTile = 1024;  // columns

// Sums the pairs first .. last - 1, counted piece by piece.
struct ColumnScoresKernels {
  ByType<void(const ColumnScoresJob& job, int64_t first, int64_t last)> squares, logs;
};

DR_KERNELS(ColumnScoresKernels, column_scores)

}  // namespace dreamreader
