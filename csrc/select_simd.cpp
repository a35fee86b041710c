// Selection kernels for one instruction set; compiled once for each (CMakeLists.txt sets DR_ISA).
//
// A key is above the bound where its signed bits are greater, or where it is a NaN with a sign,
// which signed bits put below everything.
#include "select.h"
#include "simd.h"

namespace dreamreader {
namespace {

template <typename Key>
struct Signed;
template <>
struct Signed<uint16_t> {
  using type = int16_t;
};
template <>
struct Signed<uint32_t> {
  using type = int32_t;
};
template <>
struct Signed<uint64_t> {
  using type = int64_t;
};
// What is above: signed bits greater than `high`, or a magnitude greater than `nan`.
template <typename Key>
struct Limit {
  Key high, nan;
};

// A bit for each of the 64 / sizeof(Key) entries of a line. Bounds: one for all, or one for each.
#if defined(__AVX512F__)
DR_INLINE __m512i line(uint16_t value) { return _mm512_set1_epi16(int16_t(value)); }
DR_INLINE __m512i line(uint32_t value) { return _mm512_set1_epi32(int32_t(value)); }
DR_INLINE __m512i line(uint64_t value) { return _mm512_set1_epi64(int64_t(value)); }
template <typename Key>
DR_INLINE __m512i line(const Key* values) {
  return _mm512_loadu_si512(values);
}
// Unsigned bits greater than those of -inf: a NaN with a sign.
template <typename Key, typename High>
DR_INLINE uint32_t above(const Key* x, High high, Key nan) {
  const __m512i v = _mm512_loadu_si512(x), h = line(high);
  const __m512i n = line(Key(nan | (kNanKey<Key> + 1)));
  if constexpr (sizeof(Key) == 2)
    return _mm512_cmpgt_epi16_mask(v, h) | _mm512_cmpgt_epu16_mask(v, n);
  else if constexpr (sizeof(Key) == 4)
    return uint32_t(_mm512_cmpgt_epi32_mask(v, h) | _mm512_cmpgt_epu32_mask(v, n));
  else
    return uint32_t(_mm512_cmpgt_epi64_mask(v, h) | _mm512_cmpgt_epu64_mask(v, n));
}
#elif defined(__AVX2__)
DR_INLINE __m256i half(uint16_t value, int) { return _mm256_set1_epi16(int16_t(value)); }
DR_INLINE __m256i half(uint32_t value, int) { return _mm256_set1_epi32(int32_t(value)); }
DR_INLINE __m256i half(uint64_t value, int) { return _mm256_set1_epi64x(int64_t(value)); }
template <typename Key>
DR_INLINE __m256i half(const Key* values, int h) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values) + h);
}
template <typename Key>
DR_INLINE __m256i greater(__m256i a, __m256i b) {
  if constexpr (sizeof(Key) == 2) return _mm256_cmpgt_epi16(a, b);
  if constexpr (sizeof(Key) == 4) return _mm256_cmpgt_epi32(a, b);
  return _mm256_cmpgt_epi64(a, b);
}
template <typename Key, typename High>
DR_INLINE uint32_t above(const Key* x, High high, Key nan) {
  const __m256i magnitude = half(kNanKey<Key>, 0), n = half(nan, 0);
  __m256i yes[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i v = half(x, i);
    yes[i] = _mm256_or_si256(greater<Key>(v, half(high, i)),
                             greater<Key>(_mm256_and_si256(v, magnitude), n));
  }
  if constexpr (sizeof(Key) == 2) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(yes[0], yes[1]), 0xd8);
    return uint32_t(_mm256_movemask_epi8(bytes));
  } else if constexpr (sizeof(Key) == 4) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(yes[0])) |
                    _mm256_movemask_ps(_mm256_castsi256_ps(yes[1])) << 8);
  } else {
    return uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(yes[0])) |
                    _mm256_movemask_pd(_mm256_castsi256_pd(yes[1])) << 4);
  }
}
#else
DR_INLINE uint16_t lane(uint16_t value, int) { return value; }
DR_INLINE uint32_t lane(uint32_t value, int) { return value; }
DR_INLINE uint64_t lane(uint64_t value, int) { return value; }
template <typename Key>
DR_INLINE Key lane(const Key* values, int i) {
  return values[i];
}
template <typename Key, typename High>
DR_INLINE uint32_t above(const Key* x, High high, Key nan) {
  using S = typename Signed<Key>::type;
  uint32_t bits = 0;
  for (int i = 0; i < kSelectLanes<Key>; ++i)
    bits |= uint32_t(S(x[i]) > S(lane(high, i)) || Key(x[i] & kNanKey<Key>) > nan) << i;
  return bits;
}
#endif

template <typename Key>
DR_INLINE uint32_t pool_bits(const uint8_t* pool, int64_t at) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, pool + at / 8, kSelectLanes<Key> / 8);
  return bits;
}

// Appends the entries of a line whose bits are set.
template <typename Key>
DR_INLINE int64_t append(uint32_t bits, const Key* x, int32_t first, Key inf,
                         SelectFound<Key> found, int64_t count) {
  for (; bits; bits &= bits - 1, ++count) {
    const int i = __builtin_ctz(bits);
    const Key magnitude = x[i] & kNanKey<Key>;
    found.keys[count] = magnitude > inf ? kNanKey<Key> : magnitude;
    found.columns[count] = first + i;
  }
  return count;
}

DR_INLINE uint32_t lowest(uint32_t bits, int64_t n) {  // the first n that are set
  uint32_t kept = 0;
  for (; bits && n > 0; bits &= bits - 1, --n) kept |= bits & -bits;
  return kept;
}

// Calls visit(line, column) for the lines of a row; what is missing to the last one is 0.
template <typename Key, typename Visit>
DR_INLINE void for_lines(const Key* x, int64_t columns, Visit visit) {
  constexpr int kLanes = kSelectLanes<Key>;
  constexpr int64_t kAhead = 4096 / int64_t(sizeof(Key));  // rows mostly follow each other
  int64_t at = 0;
  for (; at + kLanes <= columns; at += kLanes) {
    __builtin_prefetch(x + at + kAhead, 0, 2);
    visit(x + at, at);
  }
  if (at == columns) return;
  Key last[kLanes] = {};
  __builtin_memcpy(last, x + at, std::size_t(columns - at) * sizeof(Key));
  visit(static_cast<const Key*>(last), at);
}

template <typename Key, bool kPool>
DR_INLINE int64_t collect_in(const SelectRow<Key>& row, Key bound, Key inf, int64_t ties,
                             SelectFound<Key> found, int64_t* equal) {
  const bool nan = bound == kNanKey<Key>;
  const Limit<Key> greater{bound, nan ? kNanKey<Key> : inf};
  const Limit<Key> not_less{nan ? inf : bound ? Key(bound - 1) : Key{0}, inf};
  int64_t count = 0, equals = 0;
  for_lines(row.x, row.columns, [&](const Key* x, int64_t at) {
    uint32_t bits = above(x, not_less.high, not_less.nan);
    if (__builtin_expect(bits == 0, 1)) return;
    if constexpr (kPool) bits &= pool_bits<Key>(row.pool, at);
    const uint32_t over = above(x, greater.high, greater.nan) & bits;
    const uint32_t tied = bits ^ over;
    uint32_t kept = over;
    if (tied) {
      if (ties > equals) kept |= lowest(tied, ties - equals);
      equals += __builtin_popcount(tied);
    }
    count = append(kept, x, int32_t(row.first + at), inf, found, count);
  });
  *equal = equals;
  return count;
}

template <typename Key>
int64_t collect(const SelectRow<Key>& row, Key bound, Key inf, int64_t ties, SelectFound<Key> found,
                int64_t* equal) {
  return row.pool ? collect_in<Key, true>(row, bound, inf, ties, found, equal)
                  : collect_in<Key, false>(row, bound, inf, ties, found, equal);
}

template <typename Key>
int64_t collect_each(const SelectRow<Key>& row, const Key* bounds, Key inf,
                     SelectFound<Key> found) {
  constexpr int kLanes = kSelectLanes<Key>;
  int64_t count = 0;
  for_lines(row.x, row.columns, [&](const Key* x, int64_t at) {
    Key own[kLanes] = {};
    const Key* high = bounds + at;
    if (at + kLanes > row.columns) {
      __builtin_memcpy(own, high, std::size_t(row.columns - at) * sizeof(Key));
      high = own;
    }
    const uint32_t bits = above(x, high, inf);
    if (bits) count = append(bits, x, int32_t(row.first + at), inf, found, count);
  });
  return count;
}

template <typename Key>
void maxima(const Key* x, int64_t columns, Key inf, int64_t groups, Key* largest) {
  typedef typename Signed<Key>::type V __attribute__((vector_size(DR_VECTOR_BYTES)));
  constexpr int kLanes = kSelectLanes<Key>;
  for (int64_t i = 0; i < groups * kLanes; ++i) largest[i] = 0;
  const int64_t lines = columns / kLanes;
  for (int64_t line = 0; line < lines; line += groups) {
    const int64_t n = lines - line < groups ? lines - line : groups;
    for (int64_t g = 0; g < n; ++g) {
      const Key* v = x + (line + g) * kLanes;
      __builtin_prefetch(v + 4096 / sizeof(Key), 0, 2);
      Key* most = largest + g * kLanes;
#pragma GCC unroll 4
      for (int i = 0; i < kLanes; i += kLanes * DR_VECTOR_BYTES / 64) {
        const V a = load_vector<V>(v + i), b = load_vector<V>(most + i);
        store_vector(most + i, a > b ? a : b);
      }
    }
  }
  for (int64_t i = 0; i < groups * kLanes; ++i)
    if (largest[i] > inf) largest[i] = kNanKey<Key>;
}

template <typename Key>
int64_t count_from(const Key* keys, int64_t n, Key least) {
  constexpr int64_t kPiece = 1 << 14;  // a count of it fits every type of key
  int64_t total = 0;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t last = n - first < kPiece ? n : first + kPiece;
    Key count = 0;
    for (int64_t i = first; i < last; ++i) count += Key(keys[i] >= least);
    total += int64_t(count);
  }
  return total;
}

template <typename Key>
Key kth(const Key* keys, int64_t n, int64_t k) {
  Key found = 0;
  for (int bit = int(sizeof(Key)) * 8 - 2; bit >= 0; --bit) {
    const Key next = found | Key(Key{1} << bit);
    if (count_from(keys, n, next) >= k) found = next;
  }
  return found;
}

template <typename Key>
constexpr SelectWidthKernels<Key> width_kernels() {
  return {&collect<Key>, &collect_each<Key>, &maxima<Key>, &kth<Key>};
}

}  // namespace

namespace DR_ISA {
extern const SelectKernels select;
const SelectKernels select = {width_kernels<uint16_t>(), width_kernels<uint32_t>(),
                              width_kernels<uint64_t>()};
}  // namespace DR_ISA

}  // namespace dreamreader
