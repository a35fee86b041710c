// How packed values are rounded, stored and judged, for kernels that are compiled once per
// instruction set.
#pragma once

#include "pack.h"
#include "simd.h"

namespace dreamreader {
namespace {

struct f8 {
  uint8_t bits;
};
struct i8 {
  uint8_t bits;
};

// The low bytes of the lanes; the others are 0.
DR_INLINE void store_bytes(void* p, VU bits) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(bits_as<__m512i>(bits)));
#elif defined(__AVX2__)
  const __m256i v = bits_as<__m256i>(bits);
  const __m128i halves =
      _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(halves, halves));
#else
  typedef uint8_t VB __attribute__((vector_size(DR_VECTOR_BYTES / 4)));
  store_vector(p, __builtin_convertvector(bits, VB));
#endif
}

// To the nearest e4m3, ties to even; beyond 448 that, infinities too. Below the smallest normal
// number, adding 2^14 lets the adder round.
DR_INLINE void store_lanes(f8* p, VF v) {
  const VU u = bits_as<VU>(v);
  const VU magnitude = u & 0x7fffffffu;
  const VU a = magnitude > 0x43e00000u ? (u & 0u) + 0x43e00000u : magnitude;
  const VU normal = (a - (120u << 23) + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  const VU small = bits_as<VU>(bits_as<VF>(a) + 0x1p14f) - 0x46800000u;
  const VU h = (a < 0x3c800000u ? small : normal) | ((u >> 24) & 0x80u);
  store_bytes(p, magnitude > 0x7f800000u ? (u & 0u) + 0x7fu : h);
}

// To the nearest whole number of -127 .. 127, ties to even; NaN is 0.
DR_INLINE void store_lanes(i8* p, VF v) {
  v = v == v ? v : VF{};
  v = v > 127.0f ? VF{} + 127.0f : (v < -127.0f ? VF{} - 127.0f : v);
  store_bytes(p, bits_as<VU>(v + 0x1.8p23f) & 0xffu);
}

// The values as floats that round to S as the doubles themselves do: what a float cannot hold shows
// in its last bit, which is below the precision of every S but float.
template <typename S>
DR_INLINE Block<float> narrowed(const Block<double>& block) {
  constexpr int n = kBlock<double>;
  double from[n];
  float to[kBlock<float>] = {};
  __builtin_memcpy(from, &block, sizeof(from));
  for (int i = 0; i < n; ++i) {
    const float nearest = float(from[i]);
    uint32_t bits = bits_as<uint32_t>(nearest);
    if (sizeof(S) != sizeof(float) && double(nearest) != from[i]) {
      bits -= __builtin_fabs(double(nearest)) > __builtin_fabs(from[i]);
      bits |= 1u;
    }
    to[i] = bits_as<float>(bits);
  }
  return load<float>(to, kBlock<float>);
}
template <typename S>
DR_INLINE const Block<float>& narrowed(const Block<float>& block) {
  return block;
}

// Magnitudes as integers, which have the order of the numbers; NaN above infinity.
template <typename W>
struct Magnitude;
template <>
struct Magnitude<float> {
  typedef uint32_t Lane;
  typedef VU V;
  static constexpr Lane kInfinity = 0x7f800000u, kSign = 0x80000000u;
};
template <>
struct Magnitude<double> {
  typedef uint64_t Lane;
  typedef uint64_t V __attribute__((vector_size(DR_VECTOR_BYTES)));
  static constexpr Lane kInfinity = 0x7ff0000000000000u, kSign = 0x8000000000000000u;
};

// The largest magnitudes among values.
template <typename W>
class Largest {
 public:
  using M = Magnitude<W>;
  template <bool kFiniteOnly = false>
  DR_HD void see(const Block<W>& block) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      typename M::V m = bits_as<typename M::V>(block.v[i]) & ~M::kSign;
      if constexpr (kFiniteOnly) m = m >= M::kInfinity ? (m & 0u) : m;
      lanes_ = m > lanes_ ? m : lanes_;
    }
  }
  DR_HD bool below(W bound) const { return value() < bound; }  // NaN is not
  DR_HD W value() const {
    typename M::Lane most = 0;
    for (int i = 0; i < kWidth<W>; ++i) most = lanes_[i] > most ? lanes_[i] : most;
    return bits_as<W>(most);
  }

 private:
  typename M::V lanes_{};
};

// What a type asks of the rows that are stored in it.
template <typename W>
struct Storing {
  W overflow;  // the smallest magnitude that becomes infinite
  float most;  // the largest number of a type with a scale, else 0
  void (*put)(const W* values, int64_t n, W scale, void* out, int64_t at);  // from element `at` on
};

template <typename S, typename W, bool kScaled>
void put(const W* values, int64_t n, W scale, void* out, int64_t at) {
  S* to = static_cast<S*>(out) + at;
  for (int64_t d = 0; d < n; d += kBlock<W>) {
    Block<W> v = load<W>(values + d, kBlock<W>);
    if constexpr (kScaled) {
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) v.v[i] /= scale;
    }
    store(to + d, narrowed<S>(v), n - d < kBlock<W> ? n - d : kBlock<W>);
  }
}

template <typename W>
const Storing<W>& storing(Stored type) {
  constexpr W inf = W(__builtin_inf());
  static constexpr Storing<W> table[] = {
      {sizeof(W) == 8 ? W(0x1.ffffffp127) : inf, 0, put<float, W, false>},
      {W(0x1.ffp127), 0, put<bf16, W, false>},
      {W(65520), 0, put<f16, W, false>},
      {inf, 448, put<f8, W, true>},
      {inf, 127, put<i8, W, true>}};
  return table[int(type)];
}

}  // namespace
}  // namespace dreamreader
