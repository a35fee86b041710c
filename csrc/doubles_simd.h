// Vectors of double, read from every element type.
#pragma once

#include "simd.h"

namespace dreamreader {
namespace {

typedef Lanes<double>::V VD;
constexpr int kDoubles = kWidth<double>;  // features of one vector
typedef float VF1 __attribute__((vector_size(DR_VECTOR_BYTES / 2)));
typedef uint32_t VU1 __attribute__((vector_size(DR_VECTOR_BYTES / 2)));
typedef uint16_t VH1 __attribute__((vector_size(DR_VECTOR_BYTES / 4)));

// Half a vector of floats in double; GCC 12 makes five instructions of a __builtin_convertvector.
DR_INLINE VD widen(VF1 v) {
#if defined(__AVX512F__)
  return bits_as<VD>(_mm512_cvtps_pd(bits_as<__m256>(v)));
#elif defined(__AVX2__)
  return bits_as<VD>(_mm256_cvtps_pd(bits_as<__m128>(v)));
#else
  return __builtin_convertvector(v, VD);
#endif
}

// One vector of features in double.
DR_INLINE VD load_doubles(const double* p) { return load_vector<VD>(p); }
DR_INLINE VD load_doubles(const float* p) { return widen(load_vector<VF1>(p)); }
DR_INLINE VD load_doubles(const bf16* p) {
  return widen(bits_as<VF1>(__builtin_convertvector(load_vector<VH1>(p), VU1) << 16));
}
#if defined(__AVX512F__)
DR_INLINE VD load_doubles(const f16* p) {
  return widen(bits_as<VF1>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))));
}
#elif defined(__AVX2__)
DR_INLINE VD load_doubles(const f16* p) {
  return widen(bits_as<VF1>(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p))));
}
#else
DR_INLINE VD load_doubles(const f16* p) {
  f16 two[kWidth<float>] = {};
  __builtin_memcpy(two, p, kDoubles * sizeof(f16));
  const VF four = load_lanes(two);
  return VD{double(four[0]), double(four[1])};
}
#endif

}  // namespace
}  // namespace dreamreader
