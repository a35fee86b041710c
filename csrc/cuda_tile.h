// What the kernels share: the size of a warp, and values that are computed in a wider type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dreamreader {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

template <typename W, typename T>
__device__ __forceinline__ W widen(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return W(__bfloat162float(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return W(__half2float(value));
  } else {
    return W(value);
  }
}

template <typename T, typename W>
__device__ __forceinline__ T narrow(W value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

}  // namespace dreamreader
