// Packing: chosen rows of an activation, converted and laid one after the other.
//
//   out[r] = store(pool over the places p of row r: x[p] - minus[p])
//   f8, i8: scale[r] = amax over the finite values of the row / 448 or 127 (1 where that is 0),
//           out[r] = store(value / scale[r]), to nearest even
//
// Differences and pools are formed in float32 (float64 for f64), with one rounding at the end.
#pragma once

#include <cstdint>

#include "rows.h"

namespace dreamreader {

enum class Stored : int32_t { f32, bf16, f16, f8, i8 };  // f8: e4m3 without infinities
enum class Pool : int32_t { none, mean, max };

struct PackJob {
  StridedRows x;
  StridedRows minus;      // the same shape and type, or without data
  const int32_t* places;  // [places, 2]: entry, token
  const int32_t* groups;  // with a pool [rows + 1]: row r has places groups[r] .. groups[r + 1] - 1
  Pool pool;
  int64_t rows;
  Stored stored;
  void* out;            // dense [rows, width]; aligned to the size of an element only
  float* scales;        // [rows] for f8 and i8, else null
  int64_t* not_finite;  // [1], added to: rows with a value that is not finite, or that became so
};

void pack_cpu(const PackJob& job, int threads);

}  // namespace dreamreader
