// Where an edit's own pass puts its values, and what it tells of them: whether any changed, and
// whether halves overflowed.
#pragma once

#include "intervention_cpu.h"
#include "simd.h"

namespace dreamreader {
namespace {

template <std::size_t bytes>
struct Unsigned {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};

// The lowest bit of the exponent of a half.
template <typename T>
struct Lowest {
  static constexpr uint16_t value = 0x80;  // bf16
};
template <>
struct Lowest<f16> {
  static constexpr uint16_t value = 0x400;
};
template <>
struct Lowest<float> {
  static constexpr uint16_t value = 0;  // says nothing
};
template <>
struct Lowest<double> : Lowest<float> {};

// Whether all exponents of halves are below that of infinity: it carries into the sign.
template <typename T>
class Finite {
 public:
  inline __attribute__((always_inline)) void see(const T* x, int64_t n) {
    constexpr int64_t kHalves = DR_VECTOR_BYTES / 2;
    constexpr uint16_t kOne = Lowest<T>::value;
    for (int64_t i = 0; n >= kHalves && i < n; i += kHalves) {  // the last ones maybe twice
      const T* at = x + (i + kHalves <= n ? i : n - kHalves);
      carried_ |= (load_vector<Halves>(at) & uint16_t(0x7fff)) + kOne;
    }
    for (int64_t i = 0; n < kHalves && i < n; ++i)
      rest_ |= uint16_t((load_vector<uint16_t>(x + i) & 0x7fff) + kOne);
  }
  inline __attribute__((always_inline)) bool all() const {
    uint64_t words[DR_VECTOR_BYTES / 8], all = 0;
    __builtin_memcpy(words, &carried_, sizeof(words));
    for (uint64_t word : words) all |= word;
    return !(all & 0x8000800080008000u) && !(rest_ & 0x8000);
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(DR_VECTOR_BYTES)));
  Halves carried_{};
  uint16_t rest_ = 0;
};
template <typename T>
DR_INLINE bool all_finite(const T* x, int64_t n) {
  Finite<T> finite;
  finite.see(x, n);
  return finite.all();
}

// Whether n values differ anywhere, as == sees them.
template <typename T>
static __attribute__((noinline)) bool differ(const T* x, const T* y, int64_t n) {
  using W = typename Work<T>::type;
  for (int64_t d = 0; d < n; d += kBlock<W>) {
    const int64_t count = n - d < kBlock<W> ? n - d : int64_t(kBlock<W>);
    const Block<W> a = load<W>(x + d, count), b = load<W>(y + d, count);
    typename Lanes<W>::I found{};
    for (int i = 0; i < kVectors; ++i) found |= a.v[i] != b.v[i];
    for (int i = 0; i < kWidth<W>; ++i)
      if (found[i]) return true;
  }
  return false;
}

// What one piece of work saw, given to all at its end.
template <typename T>
struct Witness {
  int32_t* seen;
  int32_t bits;

  explicit Witness(int32_t* seen)
      : seen(seen), bits(seen ? __atomic_load_n(seen, __ATOMIC_RELAXED) & kChanged : 0) {}
  ~Witness() {
    if (bits) __atomic_fetch_or(seen, bits, __ATOMIC_RELAXED);
  }

  // n values that follow each other, before and after; both are still in the cache.
  void look(const T* in, const T* out, int64_t n) {
    if (!(bits & kChanged) && differ(in, out, n)) bits |= kChanged;
    if constexpr (sizeof(T) == 2) {
      if (!all_finite(out, n)) overflow(in, n);
    }
  }

  // Of n results some are not finite.
  void overflow(const T* in, int64_t n) {
    bits |= all_finite(in, n) ? kOverflowed : kOverflowed | kNotFinite;
  }
};

// The results of a row, or of the tokens of a channel, block by block: in memory or past the
// caches, and looked at on their way. A copy for each row keeps its fields in registers.
template <typename T>
struct Sink {
  using W = typename Work<T>::type;
  using Bits = typename Unsigned<sizeof(T)>::type;
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBytes = sizeof(T);

  Witness<T>& witness;
  const T* in;
  T* out;
  bool past, compare;
  Finite<T> finite;

  // From element `first` on, in whole blocks.
  DR_INLINE Sink at(Witness<T>& witness, const T* in, T* out, int64_t first, bool stream) {
    const bool past = stream && in != out && reinterpret_cast<uintptr_t>(out + first) % 64 == 0;
    const bool compare = witness.seen && !(witness.bits & kChanged);
    return {witness, in, out, past, compare, {}};
  }

  // Results d .. d + n - 1.
  inline __attribute__((always_inline)) void put(int64_t d, const Block<W>& y, int64_t n) {
    alignas(64) T fresh[kBlock<W>];
    const bool line = past && n >= kBlock<W>;
    T* made = line ? fresh : out + d;
    store(made, y, n);
    if (compare && differ(in + d, made, n)) witness.bits |= kChanged;
    if (kHalf && witness.seen) finite.see(made, n);
    if (line) send(d, fresh);
  }

  // The same where only the values with work (all bits set, else 0) are results; the others keep
  // their bits, and of them nothing is told.
  inline __attribute__((always_inline)) void put_some(int64_t d, const Bits* work,
                                                      const Block<W>& y, int64_t n) {
    typedef Bits Group __attribute__((vector_size(DR_VECTOR_BYTES)));
    constexpr int64_t kGroup = DR_VECTOR_BYTES / int64_t(sizeof(T));
    alignas(64) T fresh[kBlock<W>], part[kBlock<W>];
    T end[kBlock<W>];
    const bool whole = n >= kBlock<W>;
    const T* from = whole ? in + d : padded(end, sizeof(end), in + d, n);
    T* made = whole && !past ? out + d : part;
    store(fresh, y, kBlock<W>);
#pragma GCC unroll 16
    for (int64_t j = 0; j < kBlock<W>; j += kGroup) {
      const Group which = load_vector<Group>(work + j), now = load_vector<Group>(fresh + j) & which;
      const Group before = load_vector<Group>(from + j);
      store_vector(fresh + j, now);
      store_vector(made + j, now | (before & ~which));
    }
    if (compare && differ_where(work, from, fresh)) witness.bits |= kChanged;
    if (kHalf && witness.seen) finite.see(fresh, kBlock<W>);
    if (!whole)
      __builtin_memcpy(out + d, part, std::size_t(n) * sizeof(T));
    else if (past)
      send(d, part);
  }

  // Values that stay as they are.
  void keep(int64_t d, int64_t n) const {
    if (in == out) return;
    if (past)
      copy_past_caches(out + d, in + d, std::size_t(n) * sizeof(T));
    else
      __builtin_memcpy(out + d, in + d, std::size_t(n) * sizeof(T));
  }

  inline __attribute__((always_inline)) bool overflowed() const {
    return kHalf && witness.seen && !finite.all();
  }
  // After the last block; the results are the values begin .. end - 1.
  inline __attribute__((always_inline)) void finish(int64_t begin, int64_t end) const {
    if (overflowed()) witness.overflow(in + begin, end - begin);
  }

 private:
  inline __attribute__((always_inline)) void send(int64_t d, const T* from) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBlock<W>; i += 64 / int64_t(sizeof(T)))
      copy_line_past_caches(out + d + i, from + i);
  }

  // Of a whole block; the second is 0 where there is no work.
  static __attribute__((noinline)) bool differ_where(const Bits* work, const T* x, const T* y) {
    Bits masked[kBlock<W>];
    __builtin_memcpy(masked, x, sizeof(masked));
    for (int i = 0; i < kBlock<W>; ++i) masked[i] &= work[i];
    T before[kBlock<W>];
    __builtin_memcpy(before, masked, sizeof(masked));
    return differ(before, y, kBlock<W>);
  }
};

}  // namespace
}  // namespace dreamreader
