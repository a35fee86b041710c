// Element types of tensors, and the mark of functions that host and device share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DR_HD __host__ __device__ __forceinline__
#else
#define DR_HD inline __attribute__((always_inline))
#endif

namespace dreamreader {

enum class DType : int32_t { f16, bf16, f32, f64 };

}  // namespace dreamreader
