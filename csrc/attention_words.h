// Attention maps of words from q and k: formula and operands, for the CPU and the CUDA kernel.
//
// For every batch entry b, head h and query i, with j the keys that may take part:
//
//   s_j = scale <query[b, h, i], key[b, h / groups, j]> + mask[b, h, i, j]
//   p_j = exp(s_j - max s) / sum_j exp(s_j - max s)
//   out[b, h, w, i] += sum_j weights[b, w, j] p_j
//
// A key takes part unless a bool mask or `causal` (j > i) leaves it out; then it is not looked at,
// NaN included. A query without keys adds 0. Two passes over tiles of keys: the first keeps the
// running maximum and sum of each query, the second visits the keys that have a weight, so scores
// never leave the tile. Arithmetic in float. No torch, no pybind11 here.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dreamreader {

enum class MaskType : int32_t { none, boolean, f16, bf16, f32 };

// Operands of one call; strides in elements, 0 where an operand does not vary.
struct AttentionWords {
  const void *query, *key;  // [batch, heads, queries, width], [batch, key heads, keys, width]
  DType dtype;              // of both: f16, bf16 or f32
  int64_t batch, heads, queries, keys, width, words;
  int64_t groups;  // heads that share a key head
  int64_t query_strides[4], key_strides[4];
  const float* weights;  // [batch, words, keys]
  int64_t weight_strides[3];
  float* out;  // [batch, heads, words, queries]
  int64_t out_strides[4];
  const void* mask;  // [batch, heads, queries, keys]
  MaskType mask_type;
  int64_t mask_strides[4];
  bool causal;
  float scale;
};

constexpr float kLog2E = 1.44269504088896341f;

}  // namespace dreamreader

#ifdef DREAMREADER_CUDA
#include <cuda_runtime_api.h>

namespace dreamreader {

// Adds to out on the stream of the current device, asynchronously, in one launch.
cudaError_t launch_attention_words(const AttentionWords& call, cudaStream_t stream);

}  // namespace dreamreader
#endif
