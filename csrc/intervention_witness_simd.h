// What an edit's own pass tells of its values: whether any changed, and whether halves overflowed.
#pragma once

#include "intervention_cpu.h"
#include "simd.h"

namespace dreamreader {
namespace {

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

  // Whether the results leave anything to say, or need a look at what they came from.
  bool asks(const T* out, int64_t n) const {
    if constexpr (sizeof(T) == 2)
      if (!all_finite(out, n)) return true;
    return !(bits & kChanged);
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

}  // namespace
}  // namespace dreamreader
