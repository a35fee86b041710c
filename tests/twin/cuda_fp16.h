#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }
