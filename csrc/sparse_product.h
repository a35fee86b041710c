// Products of sparse rows with dense ones (dreamreader/ops/sparse_product.py has the formulas). Two
// walks over rows of a matrix are all of them:
//   weighted sums   out_i = start + sum_e value_e matrix[index_e]     over the entries e of i
//   dots            out_e = <left_i, matrix[index_e]>
// Entries of i are first[i] .. first[i + 1] - 1; those with a negative index do not exist. Rows of
// a matrix lie in one piece each.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "rows.h"

namespace dreamreader {

struct SparseEntries {
  const int64_t* first;  // [count + 1]
  const int32_t* index;  // [slots], below the rows of the matrix
  int64_t count, slots;
};

// Values, `start` and wide results are of the arithmetic type, double for double and else float.
struct SparseSums {
  SparseEntries entries;
  const void* values;  // [slots]
  StridedRows matrix;
  const void* start;  // [d], or null
  char* out;          // [count, d] dense
  bool wide;          // `out` is of the arithmetic type, not of that of the matrix
  bool streamed;      // past the caches
  int64_t strip;      // columns that are worked on together
};

struct SparseDots {
  SparseEntries entries;
  StridedRows left;  // [count, d]
  StridedRows matrix;
  void* out;  // [slots]; only entries are written
};

// Both for one matrix of rows g and one of rows w: of i with the entries e,
//   sums   out_i = sum_e value_e g[index_e]        dots   dots[slot_e] = <g[index_e], w_i>
// so that a row of g is read once for both.
struct SparseBoth {
  SparseSums sums;
  StridedRows weight;   // [count, d], as the matrix of the sums
  const int64_t* slot;  // [slots]
  void* dots;
};

constexpr int64_t kSparseStrip = 8192;  // columns of a strip, at most

// By element type of the matrices.
struct SparseProductKernels {
  // Items first .. last - 1 of all pairs of strip and i, those of a strip one after the other.
  ByType<void(const SparseSums& job, int64_t first, int64_t last)> sums;
  ByType<void(const SparseDots& job, int64_t first, int64_t last)> dots;  // of i
  ByType<void(const SparseBoth& job, int64_t first, int64_t last)> both;
};

DR_KERNELS(SparseProductKernels, sparse_product)

}  // namespace dreamreader
