// What the kernels share: the size of a warp, and values that are computed in a wider type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "rows.h"

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

inline bool aligned(const void* pointer) {  // to what one thread reads at once
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

// Whether every row is a row of runs of `run` elements, which one thread reads at once.
inline bool in_runs(const StridedRows& x, int64_t run) {
  return x.stride_channel == 1 && x.width % run == 0 && x.stride_entry % run == 0 &&
         x.stride_token % run == 0 && aligned(x.data);
}

// launch(T()) with the element type that CUDA has for it.
template <bool kDouble = false, typename Launch>
cudaError_t by_type(DType type, const Launch& launch) {
  switch (type) {
    case DType::f16:
      return launch(__half());
    case DType::bf16:
      return launch(__nv_bfloat16());
    case DType::f32:
      return launch(float());
    case DType::f64:
      if constexpr (kDouble) return launch(double());
  }
  return cudaErrorNotSupported;
}

}  // namespace dreamreader
