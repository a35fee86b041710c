// Gathering: rows of a store in an order of positions, checked, converted and laid one after the
// other. Of a position:
//   q   = permuted(position)                     its place among all rows that are wanted
//   e   : start[e] <= q < start[e + 1]           the run of rows that it falls into
//   row = first[e] + (q - start[e])              with chosen tokens: the row of the run that is
//                                                number q - start[e] of those with such a token
//   out = (stored * scale of the row - mean) * scale
// in float32, every operation rounded. What is checked is the CRC-32C of the row as stored, its key
// and its scale.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "dtype.h"
#include "pack.h"
#include "permutation.h"

namespace dreamreader {

// Where one row is, and where it goes.
struct GatherRow {
  const char* values;
  const char* key;       // 16 bytes
  const char* scale;     // 4 bytes, for f8 and i8
  const char* checksum;  // 4 bytes
  char* out;
};

struct GatherFormat {
  Stored stored;
  DType out;    // f32, bf16 or f16
  bool copied;  // out is as stored
  bool checked;
  bool streamed;  // past the caches; then rows of `out` begin at multiples of 64 bytes
  int64_t width, row_bytes;
  const float* mean;   // [width], or null
  const float* scale;  // [width], where there is a mean
};

constexpr int64_t kGatherRows = 256;  // that a kernel gets at once, at most

struct GatherKernels {
  // Gives the rows, and returns the number of the first one whose checksum is wrong, or -1.
  int64_t (*run)(const GatherFormat& format, const GatherRow* rows, int64_t count);
  // Where the positions first .. first + count - 1 go, count at most kGatherRows.
  void (*permute)(const Permutation& permutation, int64_t first, int64_t count, int64_t* out);
};

DR_KERNELS(GatherKernels, gather)

}  // namespace dreamreader
