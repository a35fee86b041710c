// Products of sparse rows with dense ones (dreamreader/ops/sparse_product.py has the formulas). Two
// walks over rows of a matrix are all of them:
//   weighted sums   out_i = start + sum_e value_e matrix[index_e]     over the entries e of i
//   dots            out_e = <left_i, matrix[index_e]>
// Entries of i are first[i] .. first[i + 1] - 1; those with a negative index do not exist.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace dreamreader {

// Rows of a matrix [rows, d] of which each lies in one piece.
struct SparseMatrix {
  const char* data;
  int64_t rows, d;
  int64_t stride;  // from row to row, in elements
};

struct SparseEntries {
  const int64_t* first;  // [count + 1]
  const int32_t* index;  // [slots], below the rows of the matrix
  int64_t count, slots;
};

// Values, `start` and wide results are of the arithmetic type, double for double and else float.
struct SparseSums {
  SparseEntries entries;
  const void* values;  // [slots]
  SparseMatrix matrix;
  const void* start;  // [d], or null
  char* out;          // [count, d] dense
  bool wide;          // `out` is of the arithmetic type, not of that of the matrix
  bool streamed;      // past the caches
  int64_t strip;      // columns that are worked on together
};

struct SparseDots {
  SparseEntries entries;
  SparseMatrix left;  // [count, d]
  SparseMatrix matrix;
  void* out;  // [slots]; only entries are written
};

constexpr int64_t kSparseStrip = 8192;  // columns of a strip, at most

// By element type of the matrices f16, bf16, f32, f64.
struct SparseProductKernels {
  // Items first .. last - 1 of all pairs of strip and i, those of a strip one after the other.
  void (*sums[4])(const SparseSums& job, int64_t first, int64_t last);
  void (*dots[4])(const SparseDots& job, int64_t first, int64_t last);  // of i
};

DR_KERNELS(SparseProductKernels, sparse_product)

}  // namespace dreamreader
