// How single values are rounded and judged, on host and device.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "pack.h"

namespace dreamreader {

DR_HD bool has_scale(Stored type) { return type == Stored::f8 || type == Stored::i8; }

// The smallest magnitude that a type turns into infinity.
template <typename W>
DR_HD W overflow_of(Stored type) {
  if (type == Stored::bf16) return W(0x1.ffp127);
  if (type == Stored::f16) return W(65520);
  if (type == Stored::f32 && sizeof(W) == 8) return W(0x1.ffffffp127);
  return W(INFINITY);
}

// The scale of a row from its largest finite magnitude.
template <typename W>
DR_HD float scale_of(Stored type, W finite) {
  const W scale = finite / W(type == Stored::f8 ? 448 : 127);
  const float narrow = scale > W(FLT_MAX) ? FLT_MAX : float(scale);
  return narrow == 0 ? 1.0f : narrow;
}

DR_HD uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
DR_HD float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// A float that rounds to a narrower type as x does: what it cannot hold shows in its last bit.
DR_HD float to_odd(float x) { return x; }
DR_HD float to_odd(double x) {
  const float nearest = float(x);
  if (double(nearest) == x || x != x) return nearest;
  const bool beyond = std::fabs(double(nearest)) > std::fabs(x);
  return float_of((float_bits(nearest) - (beyond ? 1u : 0u)) | 1u);
}

// To the nearest e4m3, ties to even; beyond 448 that, infinities too. Below the smallest normal
// number, adding 2^14 lets the adder round.
DR_HD uint8_t f8_bits(float x) {
  const uint32_t u = float_bits(x), magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  const uint32_t a = magnitude > 0x43e00000u ? 0x43e00000u : magnitude;
  const uint32_t h = a < 0x3c800000u ? float_bits(float_of(a) + 0x1p14f) - 0x46800000u
                                     : (a - (120u << 23) + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  return uint8_t(h | ((u >> 24) & 0x80u));
}

// To the nearest whole number of -127 .. 127, ties to even; NaN is 0.
DR_HD uint8_t i8_bits(float x) {
  const float inside = x != x ? 0.0f : (x > 127.0f ? 127.0f : (x < -127.0f ? -127.0f : x));
  return uint8_t(float_bits(inside + 0x1.8p23f) & 0xffu);
}

}  // namespace dreamreader
