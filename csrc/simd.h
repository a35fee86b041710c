// Blocks of lanes for kernels that are compiled once per instruction set (files named *_simd.cpp).
//
// A block is 256 bytes of the arithmetic type W on every instruction set (64 floats, 32 doubles),
// so that sums run in the same order everywhere. Nothing here has external linkage: a function
// compiled for AVX-512 must never be the one that the linker keeps for an older processor. For the
// same reason no header of the standard library with inline functions is included.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DR_INLINE static inline __attribute__((always_inline))

// Lanes of a vector in the order of an index vector.
#if defined(__clang__)
#define DR_SHUFFLE(v, order) __builtin_shufflevector(v, order)
#else
#define DR_SHUFFLE(v, order) __builtin_shuffle(v, order)
#endif

#if defined(__AVX512F__)
#define DR_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DR_VECTOR_BYTES 32
#else
#define DR_VECTOR_BYTES 16
#endif

namespace dreamreader {
namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// Arithmetic type of an element type.
template <typename T>
struct Work {
  using type = float;
};
template <>
struct Work<double> {
  using type = double;
};

template <typename W>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(DR_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(DR_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(DR_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(DR_VECTOR_BYTES)));
};

constexpr int kBlockBytes = 256;
constexpr int kVectors = kBlockBytes / DR_VECTOR_BYTES;

template <typename W>
constexpr int kBlock = kBlockBytes / int(sizeof(W));  // lanes in a block
template <typename W>
constexpr int kWidth = DR_VECTOR_BYTES / int(sizeof(W));  // lanes in a vector

template <typename W>
struct Block {
  typename Lanes<W>::V v[kVectors];
};

// Unaligned access to a vector type.
template <typename V>
DR_INLINE V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
DR_INLINE void store_vector(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <typename To, typename From>
DR_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Copies to lines of memory that are not read first and do not stay in a cache. Others see them
// once end_past_caches() has returned.
#if defined(__AVX2__)
DR_INLINE void copy_line_past_caches(void* to, const void* from) {  // 64 bytes, aligned
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
  const __m256i* v = static_cast<const __m256i*>(from);
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(v));
  _mm256_stream_si256(static_cast<__m256i*>(to) + 1, _mm256_loadu_si256(v + 1));
#endif
}
DR_INLINE void copy_past_caches(void* to, const void* from, std::size_t bytes) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  const std::size_t head = -reinterpret_cast<uintptr_t>(t) & 63;
  if (bytes > head) {
    __builtin_memcpy(t, f, head);
    t += head;
    f += head;
    bytes -= head;
    for (; bytes >= 64; bytes -= 64, t += 64, f += 64) copy_line_past_caches(t, f);
  }
  __builtin_memcpy(t, f, bytes);
}
DR_INLINE void end_past_caches() { _mm_sfence(); }
#else
DR_INLINE void copy_line_past_caches(void* to, const void* from) { __builtin_memcpy(to, from, 64); }
DR_INLINE void copy_past_caches(void* to, const void* from, std::size_t bytes) {
  __builtin_memcpy(to, from, bytes);
}
DR_INLINE void end_past_caches() {}
#endif

typedef float VF __attribute__((vector_size(DR_VECTOR_BYTES)));
typedef uint32_t VU __attribute__((vector_size(DR_VECTOR_BYTES)));
typedef uint16_t VH __attribute__((vector_size(DR_VECTOR_BYTES / 2)));

DR_INLINE VF load_lanes(const float* p) { return load_vector<VF>(p); }
DR_INLINE Lanes<double>::V load_lanes(const double* p) { return load_vector<Lanes<double>::V>(p); }
#if defined(__AVX512F__)
DR_INLINE VF load_lanes(const bf16* p) {  // GCC 12 makes four instructions of the other form
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return bits_as<VF>(_mm512_slli_epi32(wide, 16));
}
#else
DR_INLINE VF load_lanes(const bf16* p) {
  return bits_as<VF>(__builtin_convertvector(load_vector<VH>(p), VU) << 16);
}
#endif

DR_INLINE void store_lanes(float* p, VF v) { store_vector(p, v); }
DR_INLINE void store_lanes(double* p, Lanes<double>::V v) { store_vector(p, v); }

#if defined(__AVX512F__)
DR_INLINE void store_halves(void* p, VU bits) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bits_as<__m512i>(bits)));
}
#elif defined(__AVX2__)
DR_INLINE void store_halves(void* p, VU bits) {
  const __m256i v = bits_as<__m256i>(bits);
  _mm_storeu_si128((__m128i*)p,
                   _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
#else
DR_INLINE void store_halves(void* p, VU bits) {
  store_vector(p, __builtin_convertvector(bits, VH));
}
#endif

// Rounds to nearest even; a NaN stays one, its upper payload bits kept.
DR_INLINE void store_lanes(bf16* p, VF v) {
  const VU u = bits_as<VU>(v);
  const VU rounded = u + 0x7fffu + ((u >> 16) & 1u);
  store_halves(p, (v != v ? (u | 0x400000u) : rounded) >> 16);
}

// Two vectors that follow each other in memory.
template <typename T, typename V>
DR_INLINE void store_pair(T* p, V first, V second) {
  store_lanes(p, first);
  store_lanes(p + sizeof(V) / sizeof(first[0]), second);
}

#if defined(__AVX512F__)
DR_INLINE __m512i rounded_bf16(VF v) {  // in the upper halves of the lanes
  const __m512i u = bits_as<__m512i>(v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i half =
      _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  const __mmask16 nan = _mm512_cmp_ps_mask(bits_as<__m512>(v), bits_as<__m512>(v), _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(_mm512_add_epi32(u, half), nan, u, _mm512_set1_epi32(0x400000));
}
// One permutation takes the upper halves of both: half the instructions of shifts and truncations.
DR_INLINE void store_pair(bf16* p, VF first, VF second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves upper;
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) upper[i] = uint16_t(2 * i + 1);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(rounded_bf16(first), bits_as<__m512i>(upper),
                                                   rounded_bf16(second)));
}
#endif

#if defined(__AVX512F__)
DR_INLINE VF load_lanes(const f16* p) {
  return bits_as<VF>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
}
DR_INLINE void store_lanes(f16* p, VF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(bits_as<__m512>(v), 0));
}
#elif defined(__AVX2__)
DR_INLINE VF load_lanes(const f16* p) {
  return bits_as<VF>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
DR_INLINE void store_lanes(f16* p, VF v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(bits_as<__m256>(v), 0));
}
#else
// Multiplying by 2^112 moves the exponent of a half into place, for subnormals too.
DR_INLINE VF load_lanes(const f16* p) {
  const VU h = __builtin_convertvector(load_vector<VH>(p), VU);
  const VU magnitude = (h & 0x7fffu) << 13;
  VU u = bits_as<VU>(bits_as<VF>(magnitude) * 0x1p112f);
  u |= (magnitude >= (0x7c00u << 13)) ? (u & 0u) + 0x7f800000u : (u & 0u);
  return bits_as<VF>(u | ((h & 0x8000u) << 16));
}
// Nearest even in integers; below the smallest normal half, adding 0.5 lets the adder round.
DR_INLINE void store_lanes(f16* p, VF v) {
  const VU u = bits_as<VU>(v);
  const VU sign = (u >> 16) & 0x8000u;
  const VU a = u & 0x7fffffffu;
  const VU normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const VU small = bits_as<VU>(bits_as<VF>(a) + 0.5f) - 0x3f000000u;
  VU h = a < 0x38800000u ? small : normal;
  h = a >= 0x477ff000u ? (h & 0u) + 0x7c00u : h;
  h = a > 0x7f800000u ? (((a >> 13) & 0x3ffu) | 0x7e00u) : h;
  store_halves(p, h | sign);
}
#endif

// 2^r for |r| <= 0.5, within 1 ulp: 2e-9 from the polynomial, the rest from rounding.
DR_INLINE VF exp2_polynomial(VF r) {
  constexpr float c[] = {0x1.41fbb4p-13f,
                         0x1.5f3e56p-10f,
                         0x1.3b2d4ep-7f,
                         0x1.c6aee8p-5f,
                         0x1.ebfbdcp-3f,
                         0x1.62e430p-1f,
                         1.0f};
  VF y = VF{} + c[0];
#pragma GCC unroll 8
  for (int i = 1; i < 7; ++i) y = y * r + c[i];
  return y;
}

// 2^(x factor - shift) for whole shifts and exponents up to 127, 0 for x = -inf; NaN stays. Below
// 2^-126 it may be 0. The fraction of the exponent is taken from x itself, so that it has the error
// of one rounding at 0.5, whatever the exponent. (Beyond 2^24 there is no fraction, but the sum of
// the whole numbers is rounded: hence the bounds.)
#if defined(__AVX512F__)
DR_INLINE VF exp2_lanes(VF x, VF factor, VF shift) {
  const __m512 v = _mm512_max_ps(_mm512_set1_ps(-200.0f), bits_as<__m512>(x * factor - shift));
  const __m512 n = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const VF r = x * factor - (shift + bits_as<VF>(n));
  const __m512 least = _mm512_max_ps(_mm512_set1_ps(-1.0f), bits_as<__m512>(r));
  const VF inside = bits_as<VF>(_mm512_min_ps(_mm512_set1_ps(1.0f), least));
  return bits_as<VF>(_mm512_scalef_ps(bits_as<__m512>(exp2_polynomial(inside)), n));
}
#else
DR_INLINE VF exp2_lanes(VF x, VF factor, VF shift) {
  const VF exponent = x * factor - shift;
  const VF v = exponent < -126.0f ? VF{} - 126.0f : exponent;
  const VF shifted = v + 0x1.8p23f;  // a whole number, in the lower bits
  VF r = x * factor - (shift + (shifted - 0x1.8p23f));
  r = r < -1.0f ? VF{} - 1.0f : (r > 1.0f ? VF{} + 1.0f : r);
  const VF y = bits_as<VF>(bits_as<VU>(exp2_polynomial(r)) + (bits_as<VU>(shifted) << 23));
  return exponent < -126.0f ? VF{} : (exponent != exponent ? exponent : y);
}
#endif

DR_INLINE VF whole_lanes(VF x) {  // rounded, for |x| < 2^22; larger, infinite and NaN stay
  const VF rounded = (x + 0x1.8p23f) - 0x1.8p23f;
  return x < 0x1p22f && x > -0x1p22f ? rounded : x;
}

// Columns of a square of kWidth<float> rows of lanes.
DR_INLINE void transpose_lanes(VF (&v)[kWidth<float>]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = bits_as<__m512>(v[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of each 4 x 4 square of four rows
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even_lo = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    const __m512 odd_lo = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 even_hi = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd_hi = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    v[c] = bits_as<VF>(_mm512_shuffle_f32x4(even_lo, even_hi, 0x88));
    v[4 + c] = bits_as<VF>(_mm512_shuffle_f32x4(odd_lo, odd_hi, 0x88));
    v[8 + c] = bits_as<VF>(_mm512_shuffle_f32x4(even_lo, even_hi, 0xdd));
    v[12 + c] = bits_as<VF>(_mm512_shuffle_f32x4(odd_lo, odd_hi, 0xdd));
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = bits_as<__m256>(v[i]);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c] = bits_as<VF>(_mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    v[4 + c] = bits_as<VF>(_mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
#else
  constexpr int n = kWidth<float>;
  float square[n][n];
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) square[j][i] = v[i][j];
  for (int i = 0; i < n; ++i) v[i] = load_vector<VF>(square[i]);
#endif
}

// The first n values at p, zeros behind them: the end of a row, as long as a block.
template <typename T>
static __attribute__((noinline)) const T* padded(T* part, std::size_t bytes, const T* p,
                                                 int64_t n) {
  __builtin_memset(part, 0, bytes);
  if (n > 0) __builtin_memcpy(part, p, std::size_t(n) * sizeof(T));
  return part;
}

// Loads the first n lanes of a block (the rest are 0), converted to W.
template <typename W, typename T>
DR_INLINE Block<W> load(const T* p, int64_t n) {
  Block<W> block;
  T part[kBlock<W>];  // so that there is one conversion, not another one for the ends of rows
  if (__builtin_expect(n < kBlock<W>, 0)) p = padded(part, sizeof(part), p, n);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) block.v[i] = load_lanes(p + i * kWidth<W>);
  return block;
}

// Rounds the first n lanes of a block to T and stores them.
template <typename T, typename W>
DR_INLINE void store(T* p, const Block<W>& block, int64_t n) {
  T part[kBlock<W>];
  const bool whole = __builtin_expect(n >= kBlock<W>, 1);
  T* to = whole ? p : part;
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i += 2) store_pair(to + i * kWidth<W>, block.v[i], block.v[i + 1]);
  if (!whole && n > 0) __builtin_memcpy(p, part, std::size_t(n) * sizeof(T));
}

// Sum of all lanes, halving the block each time: the same order for every width of vector.
template <typename W>
DR_INLINE W sum(const Block<W>& block) {
  using V = typename Lanes<W>::V;
  V v[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) v[i] = block.v[i];
#pragma GCC unroll 4
  for (int half = kVectors / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  V total = v[0];
#pragma GCC unroll 4
  for (int half = kWidth<W> / 2; half > 0; half /= 2) {
    typename Lanes<W>::I other;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<W>; ++i) other[i] = (i + half) % kWidth<W>;
    total += DR_SHUFFLE(total, other);
  }
  return total[0];
}

}  // namespace
}  // namespace dreamreader
