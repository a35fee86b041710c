// Rows of an activation, as every operator gets them.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dreamreader {

// [entries, tokens, width] in elements of dtype; a row is one (entry, token) pair. Any strides, in
// elements; those of extents of 1 say nothing and are 0, of the channels 1.
struct StridedRows {
  void* data;
  DType dtype;
  int64_t entries, tokens, width;
  int64_t stride_entry, stride_token, stride_channel;
};

DR_HD int64_t values_in(const StridedRows& x) { return x.entries * x.tokens * x.width; }

// Offset of the first channel of a row.
DR_HD int64_t row_offset(const StridedRows& x, int64_t entry, int64_t token) {
  return entry * x.stride_entry + token * x.stride_token;
}

template <typename T>
DR_HD T* row_at(const StridedRows& x, int64_t entry, int64_t token) {
  return static_cast<T*>(x.data) + row_offset(x, entry, token);
}

}  // namespace dreamreader
