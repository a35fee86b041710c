// Checking and converting gathered rows for one instruction set; compiled once for each
// (CMakeLists.txt sets DR_ISA).
#include "crc32c_words_simd.h"
#include "gather.h"
#include "simd.h"

namespace dreamreader {
namespace {

struct f8 {
  uint8_t bits;
};
struct i8 {
  int8_t bits;
};
typedef uint8_t VB __attribute__((vector_size(DR_VECTOR_BYTES / 4)));
typedef int8_t VSB __attribute__((vector_size(DR_VECTOR_BYTES / 4)));

DR_INLINE VF load_lanes(const i8* p) {
  return __builtin_convertvector(__builtin_convertvector(load_vector<VSB>(p), Lanes<float>::I), VF);
}
// Without numbers below the smallest normal float, which a processor may be set to take for 0.
DR_INLINE VF load_lanes(const f8* p) {
  const VU u = __builtin_convertvector(load_vector<VB>(p), VU);
  const VU magnitude = u & 0x7fu;
  const VF small = __builtin_convertvector(bits_as<Lanes<float>::I>(magnitude), VF) * 0x1p-9f;
  VU bits = magnitude < 8u ? bits_as<VU>(small) : (magnitude << 20) + (120u << 23);
  bits = magnitude == 0x7fu ? (u & 0u) + 0x7fc00000u : bits;
  return bits_as<VF>(bits | ((u & 0x80u) << 24));
}

template <typename S>
constexpr bool kScaled = sizeof(S) == 1;

// Rounds here: keeps the product from being fused with what is subtracted from it.
DR_INLINE void rounded(VF& v) {
#if defined(__x86_64__)
  __asm__("" : "+x"(v));
#else
  __asm__("" : "+w"(v));
#endif
}

constexpr int kTogether = 4;  // rows, for the sake of their checksums

// Writes past the caches: what is written is not read again here.
template <typename T>
DR_INLINE void stream(T* to, const T* from) {
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (int i = 0; i < kBlock<float> * int(sizeof(T)); i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(reinterpret_cast<char*>(to) + i),
                        load_vector<__m512i>(reinterpret_cast<const char*>(from) + i));
#elif defined(__AVX2__)
#pragma GCC unroll 8
  for (int i = 0; i < kBlock<float> * int(sizeof(T)); i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(reinterpret_cast<char*>(to) + i),
                        load_vector<__m256i>(reinterpret_cast<const char*>(from) + i));
#else
  __builtin_memcpy(to, from, kBlock<float> * sizeof(T));
#endif
}

// What happens to the features d .. d + n - 1 of a row, n at most a block.
template <typename S>
struct Copied {
  using Source = S;
  DR_INLINE void run(const GatherFormat& format, const GatherRow* rows, int64_t d, int64_t n) {
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r) {
      const S* x = reinterpret_cast<const S*>(rows[r].values) + d;
      S* y = reinterpret_cast<S*>(rows[r].out) + d;
      if (n == kBlock<float> && format.streamed) {
        stream(y, x);
      } else {
        __builtin_memcpy(y, x, std::size_t(n) * sizeof(S));
      }
    }
  }
};

template <typename S, typename O, bool kNormal>
struct Converted {
  using Source = S;
  DR_INLINE void run(const GatherFormat& format, const GatherRow* rows, int64_t d, int64_t n) {
    Block<float> mean{}, scale{};
    if constexpr (kNormal) {
      mean = load<float>(format.mean + d, n);
      scale = load<float>(format.scale + d, n);
    }
    for (int r = 0; r < kTogether; ++r) {
      Block<float> block = load<float>(reinterpret_cast<const S*>(rows[r].values) + d, n);
      if constexpr (kScaled<S>) {
        float own;
        __builtin_memcpy(&own, rows[r].scale, 4);
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
          block.v[i] *= own;
          rounded(block.v[i]);
        }
      }
      if constexpr (kNormal) {
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) block.v[i] = (block.v[i] - mean.v[i]) * scale.v[i];
      }
      O* y = reinterpret_cast<O*>(rows[r].out) + d;
      if (n >= kBlock<float> && format.streamed) {
        O part[kBlock<float>];
        store(part, block, kBlock<float>);
        stream(y, part);
      } else {
        store(y, block, n);
      }
    }
  }
};

// Gives kTogether rows; returns the number of the first whose checksum is wrong, or kTogether.
template <typename Step, typename Crc>
DR_INLINE int give(const GatherFormat& format, const GatherRow* rows, const GatherRow* next) {
  using S = typename Step::Source;
  uint64_t crc[kTogether];
  const char *values[kTogether], *keys[kTogether], *scales[kTogether];
  for (int r = 0; r < kTogether; ++r) {
    crc[r] = 0xffffffffu;
    values[r] = rows[r].values;
    keys[r] = rows[r].key;
    scales[r] = rows[r].scale;
  }
  for (int64_t d = 0; d < format.width; d += kBlock<float>) {
    const int64_t n = format.width - d < kBlock<float> ? format.width - d : kBlock<float>;
    const int64_t at = d * int64_t(sizeof(S)), bytes = n * int64_t(sizeof(S));
    for (int r = 0; r < kTogether; ++r)
      for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(next[r].values + at + line, 0, 2);
    if (format.checked) {
      const char* from[kTogether];
      for (int r = 0; r < kTogether; ++r) from[r] = values[r] + at;
      if (n == kBlock<float>) {
        add_bytes<Crc, kTogether>(from, kBlock<float> * int64_t(sizeof(S)), crc);
      } else {
        add_bytes<Crc, kTogether>(from, bytes, crc);
      }
    }
    Step::run(format, rows, d, n);
  }
  if (!format.checked) return kTogether;
  add_bytes<Crc, kTogether>(keys, 16, crc);
  if constexpr (kScaled<S>) add_bytes<Crc, kTogether>(scales, 4, crc);
  for (int r = 0; r < kTogether; ++r)
    if (~uint32_t(crc[r]) != load_vector<uint32_t>(rows[r].checksum)) return r;
  return kTogether;
}

template <typename Step, typename Crc>
int64_t run_rows(const GatherFormat& format, const GatherRow* rows, int64_t count) {
  GatherRow group[2][kTogether];  // this one and the next; a short group repeats its last row
  const auto load_group = [&](int64_t at) {
    for (int r = 0; r < kTogether; ++r)
      group[at / kTogether % 2][r] = rows[at + r < count ? at + r : count - 1];
  };
  load_group(0);
  for (int64_t at = 0; at < count; at += kTogether) {
    const bool last = at + kTogether >= count;
    if (!last) load_group(at + kTogether);
    // Small things, and the pages that rows begin and end on, another group ahead.
    for (int64_t r = at + 2 * kTogether; r < at + 3 * kTogether && r < count; ++r) {
      __builtin_prefetch(rows[r].key);
      __builtin_prefetch(rows[r].checksum);
      if constexpr (kScaled<typename Step::Source>) __builtin_prefetch(rows[r].scale);
      __builtin_prefetch(rows[r].values, 0, 2);
      __builtin_prefetch(rows[r].values + format.row_bytes - 1, 0, 2);
    }
    const GatherRow* now = group[at / kTogether % 2];
    const GatherRow* next = group[(at / kTogether + (last ? 0 : 1)) % 2];
    const int wrong = give<Step, Crc>(format, now, next);
    if (wrong < kTogether) return at + wrong;
  }
#if defined(__AVX2__)
  _mm_sfence();  // another thread reads what was written past the caches
#endif
  return -1;
}

using Run = int64_t (*)(const GatherFormat&, const GatherRow*, int64_t);

template <typename Step>
Run checked() {
  return crc_instruction() ? run_rows<Step, CrcInstruction> : run_rows<Step, CrcTables>;
}
template <typename S, typename O>
Run normal(const GatherFormat& format) {
  return format.mean ? checked<Converted<S, O, true>>() : checked<Converted<S, O, false>>();
}
template <typename S>
Run from(const GatherFormat& format) {
  if (format.copied) return checked<Copied<S>>();
  if (format.out == DType::f32) return normal<S, float>(format);
  return format.out == DType::bf16 ? normal<S, bf16>(format) : normal<S, f16>(format);
}

int64_t run_gather(const GatherFormat& format, const GatherRow* rows, int64_t count) {
  constexpr Run (*kFrom[])(const GatherFormat&) = {from<float>, from<bf16>, from<f16>, from<f8>,
                                                   from<i8>};
  return kFrom[int(format.stored)](format)(format, rows, count);
}

// All walks take their next step side by side, which the compiler does in vectors.
void run_permute(const Permutation& permutation, int64_t first, int64_t count, int64_t* out) {
  uint64_t value[kGatherRows];
  int64_t place[kGatherRows];  // of the walks that are not at their end
  for (int64_t i = 0; i < count; ++i) {
    value[i] = uint64_t(first + i);
    place[i] = i;
  }
  while (count > 0) {
    for (int64_t i = 0; i < count; ++i) value[i] = permutation.step(value[i]);
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t now = value[i];
      const int64_t at = place[i];
      out[at] = int64_t(now);  // again at the next step, where it is outside
      value[left] = now;
      place[left] = at;
      left += now >= permutation.size();
    }
    count = left;
  }
}

}  // namespace

namespace DR_ISA {

extern const GatherKernels gather;
const GatherKernels gather = {run_gather, run_permute};

}  // namespace DR_ISA
}  // namespace dreamreader
