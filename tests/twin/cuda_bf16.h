#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t wide = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

// To nearest, ties to even; NaN becomes the one that the hardware gives.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  wide += 0x7fff + (wide >> 16 & 1);
  return {uint16_t(wide >> 16)};
}
