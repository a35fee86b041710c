// Steps on one tile of queries, which lie side by side in the lanes of two vectors: sums over keys
// and over channels then need no sums across lanes.
#pragma once

#include "attention_words_cpu.h"
#include "matmul_tile_simd.h"

namespace dreamreader {
namespace {

constexpr int kLanes = kWidth<float>;
constexpr int kTile = 2 * kLanes;                      // queries
constexpr int kKeys = DR_VECTOR_BYTES == 64 ? 12 : 6;  // accumulators stay in 32 or 16 registers

DR_INLINE float to_float(float x) { return x; }
DR_INLINE float to_float(bf16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
DR_INLINE float to_float(f16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t u = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  if (magnitude >= (0x7c00u << 13)) u |= 0x7f800000u;
  return bits_as<float>(u | (x.bits & 0x8000u) << 16);
}

// How channels lie in the words of a tile and of the packed keys, and their product. One of type T
// to a word, as a float:
template <typename T>
struct Singles : Products {
  using Element = T;
  static constexpr int kChannels = 1;
  DR_INLINE VF load(const T* row) { return load_lanes(row); }
  DR_INLINE float word(const T* row, int64_t i, int64_t, int64_t stride) {
    return to_float(row[i * stride]);
  }
  DR_INLINE float turned(float k, float sign) { return k * sign; }
};

#if defined(__AVX512F__)
// Two bfloat16 to a word.
struct Pairs : PairProducts {
  using Element = bf16;
  static constexpr int kChannels = 2;
  DR_INLINE VF load(const bf16* row) { return load_vector<VF>(row); }
  DR_INLINE float word(const bf16* row, int64_t i, int64_t width, int64_t stride) {
    const uint32_t upper = 2 * i + 1 < width ? row[(2 * i + 1) * stride].bits : 0;
    return bits_as<float>(upper << 16 | row[2 * i * stride].bits);
  }
  DR_INLINE float turned(float k, float sign) {
    const uint32_t bits = bits_as<uint32_t>(k);
    return bits_as<float>(sign == 0 ? 0u : bits ^ (sign < 0 ? 0x80008000u : 0u));
  }
};
#endif

// q [words, kTile] = rows of n queries, the other lanes 0. Whole vectors of words are written: q
// has room for words rounded up to them.
template <typename Form>
DR_INLINE void load_queries(float* q, const typename Form::Element* rows, int64_t n,
                            int64_t row_stride, int64_t width, int64_t stride) {
  const int64_t words = (width + Form::kChannels - 1) / Form::kChannels;
  for (int64_t i = 0; i < words; i += kLanes) {
    const bool whole = n == kTile && stride == 1 && (i + kLanes) * Form::kChannels <= width;
    for (int half = 0; half < kTile; half += kLanes) {
      VF square[kLanes];
      if (__builtin_expect(whole, 1)) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j)
          square[j] = Form::load(rows + (half + j) * row_stride + i * Form::kChannels);
      } else {
        for (int64_t j = 0; j < kLanes; ++j) {
          const auto* row = rows + (half + j) * row_stride;
          float part[kLanes] = {};
          for (int64_t k = 0; half + j < n && k < kLanes && i + k < words; ++k)
            part[k] = Form::word(row, i + k, width, stride);
          square[j] = load_vector<VF>(part);
        }
      }
      transpose_lanes(square);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) store_vector(q + (i + j) * kTile + half, square[j]);
    }
  }
}

// Rows that load_queries will read next, asked for a few at a time: all at once would wait.
struct NextRows {
  const char* rows;
  int64_t count, stride, bytes;

  void ask(int64_t n) {
    for (; n > 0 && count > 0; --n, --count, rows += stride)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows + at, 0, 3);
  }
};

// packed: blocks of kKeys keys times sign, in each [words, keys of the block]; `columns` names the
// keys, or they are first, first + 1, ...
template <typename Form>
DR_INLINE void pack_keys(float* packed, const typename Form::Element* keys, const int64_t* columns,
                         int64_t first, int64_t n, int64_t key_stride, int64_t width,
                         int64_t stride, float sign) {
  const int64_t words = (width + Form::kChannels - 1) / Form::kChannels;
  for (int64_t begin = 0; begin < n; begin += kKeys) {
    const int64_t block = n - begin < kKeys ? n - begin : int64_t(kKeys);
    for (int64_t j = 0; j < block; ++j) {
      const int64_t column = columns ? columns[begin + j] : first + begin + j;
      const auto* row = keys + column * key_stride;
      for (int64_t i = 0; i < words; ++i)
        packed[i * block + j] = Form::turned(Form::word(row, i, width, stride), sign);
    }
    packed += block * words;
  }
}

// scores [N, kTile] of N keys.
template <typename Form, int N>
void score_block(const float* q, const float* packed, int64_t words, float* scores) {
  VF sums[N][2] = {};
  add_products<Form>(
      sums, 0, words, 1, [&](int64_t i, int j) { return packed[i * N + j]; },
      [&](int64_t i, int half) { return load_vector<VF>(q + i * kTile + half * kLanes); });
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) {
    store_vector(scores + j * kTile, sums[j][0]);
    store_vector(scores + j * kTile + kLanes, sums[j][1]);
  }
}

template <typename Form, int N>
DR_INLINE void score_rest(int64_t n, const float* q, const float* packed, int64_t words,
                          float* scores) {
  if (n == N) return score_block<Form, N>(q, packed, words, scores);
  if constexpr (N > 1) score_rest<Form, N - 1>(n, q, packed, words, scores);
}

// scores [n, kTile] = <q, keys>, unscaled.
template <typename Form>
DR_INLINE void score(const float* q, const float* packed, int64_t n, int64_t words, float* scores,
                     NextRows next) {
  const int64_t rows = (kTile * kKeys + n - 1) / n;  // to ask for with each block
  for (; n >= kKeys; n -= kKeys, packed += kKeys * words, scores += kKeys * kTile) {
    next.ask(rows);
    score_block<Form, kKeys>(q, packed, words, scores);
  }
  next.ask(kTile);
  if (n > 0) score_rest<Form, kKeys - 1>(n, q, packed, words, scores);
}

// What the softmax of a tile has seen so far, for each query. Exponents are taken from about the
// largest score, to a whole number.
struct Running {
  float most[kTile];  // largest score, -inf before the first
  float sum[kTile];   // of 2^(factor score - shift)
};

DR_INLINE VF larger(VF a, VF b) { return a > b ? a : b; }

// About factor * most, and 0 where nothing was allowed, so that 2^(factor * -inf - this) is 0.
DR_INLINE VF shift_of(VF most, VF factor) {
  return most == -__builtin_inff() ? VF{} : whole_lanes(most * factor);
}

// Puts 2^(factor * score - shift) in place of a vector of scores.
DR_INLINE VF exponential(float* at, VF factor, VF shift) {
  const VF e = exp2_lanes(load_vector<VF>(at), factor, shift);
  store_vector(at, e);
  return e;
}

constexpr int64_t kGroup = 16;  // keys summed before their sum is added to a larger one

// Takes n more scores in; leaves 2^(factor score - shift) in their place.
DR_INLINE void take(Running& running, float* scores, int64_t n, float factor) {
  const VF each = VF{} + factor;
  VF now[2], shift[2], before[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const float* column = scores + half * kLanes;
    const VF earlier = load_vector<VF>(running.most + half * kLanes);
    VF most = earlier, other = earlier;
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      most = larger(load_vector<VF>(column + j * kTile), most);
      other = larger(load_vector<VF>(column + (j + 1) * kTile), other);
    }
    if (j < n) most = larger(load_vector<VF>(column + j * kTile), most);
    now[half] = larger(most, other);
    shift[half] = shift_of(now[half], each);
    const VF was = earlier == -__builtin_inff() ? earlier : shift_of(earlier, each);
    before[half] =
        load_vector<VF>(running.sum + half * kLanes) * exp2_lanes(was, VF{} + 1.0f, shift[half]);
  }
  VF chunk[2] = {};
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t end = begin + kGroup < n ? begin + kGroup : n;
    VF group[2] = {};
    for (int64_t j = begin; j < end; ++j) {
      float* at = scores + j * kTile;
      group[0] += exponential(at, each, shift[0]);
      group[1] += exponential(at + kLanes, each, shift[1]);
    }
    chunk[0] += group[0];
    chunk[1] += group[1];
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    store_vector(running.most + half * kLanes, now[half]);
    store_vector(running.sum + half * kLanes, before[half] + chunk[half]);
  }
}

// 2^(factor score - shift) in place of n scores that `running` has taken in before.
DR_INLINE void weigh(const Running& running, float* scores, int64_t n, float factor) {
#pragma GCC unroll 2
  for (int half = 0; half < kTile; half += kLanes) {
    const VF each = VF{} + factor, shift = shift_of(load_vector<VF>(running.most + half), each);
    for (int64_t j = 0; j < n; ++j) exponential(scores + j * kTile + half, each, shift);
  }
}

DR_INLINE void clear(float* sum) {
  store_vector(sum, VF{});
  store_vector(sum + kLanes, VF{});
}

// sum [kTile] += weight * e / total over the entries of one word.
DR_INLINE void gather(const Running& running, const float* e, const WeightedKeys::Entry* entry,
                      const WeightedKeys::Entry* end, float* sum) {
  VF sums[2] = {};
  while (entry < end) {
    const WeightedKeys::Entry* last = end - entry < kGroup ? end : entry + kGroup;
    VF group[2] = {};
    for (; entry < last; ++entry) {
      group[0] += load_vector<VF>(e + entry->at * kTile) * entry->weight;
      group[1] += load_vector<VF>(e + entry->at * kTile + kLanes) * entry->weight;
    }
    sums[0] += group[0];
    sums[1] += group[1];
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const VF total = load_vector<VF>(running.sum + half * kLanes);
    float* at = sum + half * kLanes;
    store_vector(at, load_vector<VF>(at) + (total == 0.0f ? VF{} : sums[half] / total));
  }
}

}  // namespace
}  // namespace dreamreader
