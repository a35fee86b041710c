// Element types of tensors, the choice of code by them, and the mark of functions that host and
// device share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DR_HD __host__ __device__ __forceinline__
#else
#define DR_HD inline __attribute__((always_inline))
#endif

namespace dreamreader {

enum class DType : int32_t { f16, bf16, f32, f64 };

DR_HD int64_t size_of(DType type) { return type == DType::f64 ? 8 : (type == DType::f32 ? 4 : 2); }

// The same function for each element type, as DR_BY_TYPE(function) lists it in a file *_simd.cpp.
template <typename F>
struct ByType {
  F* each[4];
  F* operator[](DType type) const { return each[int(type)]; }
};
#define DR_BY_TYPE(...)                                                            \
  {                                                                                \
    {                                                                              \
      __VA_ARGS__<f16>, __VA_ARGS__<bf16>, __VA_ARGS__<float>, __VA_ARGS__<double> \
    }                                                                              \
  }

// run(W()) with the arithmetic type of an element type.
template <typename F>
void by_work(DType type, const F& run) {
  if (type == DType::f64)
    run(double());
  else
    run(float());
}

}  // namespace dreamreader
