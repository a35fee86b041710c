// Attention maps of words for one instruction set; compiled once for each (CMakeLists.txt sets
// DR_ISA).
#include "attention_words_tile_simd.h"

namespace dreamreader {
namespace {

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool holds_all(const AttentionWords& call) { return call.keys <= kKeyTile; }

int64_t tiles_held(const AttentionWordsJob& job) {
  return holds_all(job.call) ? 1 : rounded_up(job.piece, kTile) / kTile;
}

int64_t tile_floats(const AttentionWords& call) {
  return rounded_up(call.width, kLanes) * kTile + int64_t(sizeof(Running) / sizeof(float));
}

// Sums of words, rounded into out once: of one word, or of all where they come in several chunks.
int64_t sums_held(const AttentionWordsJob& job) {
  return holds_all(job.call) ? 1 : tiles_held(job) * job.call.words;
}

int64_t scratch_floats(const AttentionWordsJob& job) {
  const int64_t held = job.call.keys < kKeyTile ? job.call.keys : kKeyTile;
  return tiles_held(job) * tile_floats(job.call) + held * (job.call.width + kTile) +
         sums_held(job) * kTile;
}

// One piece of the queries of one head.
template <typename Form>
struct Piece {
  using T = typename Form::Element;
  const AttentionWordsJob& job;
  const AttentionWords& call;
  const WeightedKeys& weighted;
  int64_t b, h, begin, end;  // queries
  const T *queries, *keys;   // of the head
  float factor;              // of the scores in the exponent to base 2
  float *tiles, *packed, *scores, *sums;

  Piece(const AttentionWordsJob& job, float* scratch, int64_t b, int64_t h, int64_t begin)
      : job(job),
        call(job.call),
        weighted(job.weighted[b * job.weighted_stride]),
        b(b),
        h(h),
        begin(begin),
        end(begin + job.piece < call.queries ? begin + job.piece : call.queries) {
    queries =
        static_cast<const T*>(call.query) + b * call.query_strides[0] + h * call.query_strides[1];
    keys = static_cast<const T*>(call.key) + b * call.key_strides[0] +
           h / call.groups * call.key_strides[1];
    factor = (added_mask() ? 1.0f : magnitude()) * kLog2E;
    tiles = scratch;
    sums = tiles + tiles_held(job) * tile_floats(call);
    scores = sums + sums_held(job) * kTile;
    packed = scores + (call.keys < kKeyTile ? call.keys : kKeyTile) * kTile;
  }

  // A scale below 0 turns the keys round, a scale of 0 makes them 0.
  float magnitude() const {
    return call.scale < 0 ? -call.scale : (call.scale == 0 ? 1.0f : call.scale);
  }
  float sign() const { return call.scale < 0 ? -1.0f : (call.scale == 0 ? 0.0f : 1.0f); }
  bool added_mask() const { return call.mask_type > MaskType::boolean; }

  float* tile_of(int64_t q) const {
    return tiles + (holds_all(call) ? 0 : (q - begin) / kTile) * tile_floats(call);
  }
  Running& running_of(float* tile) const {
    return *reinterpret_cast<Running*>(tile + tile_floats(call) -
                                       int64_t(sizeof(Running) / sizeof(float)));
  }
  float* sums_of(int64_t q, int64_t w) const {
    return sums + ((q - begin) / kTile * call.words + w) * kTile;
  }
  int64_t lanes(int64_t q) const { return end - q < kTile ? end - q : int64_t(kTile); }

  void load(int64_t q) {
    float* tile = tile_of(q);
    const int64_t stride = call.query_strides[2];
    load_queries<Form>(tile, queries + q * stride, lanes(q), stride, call.width,
                       call.width > 1 ? call.query_strides[3] : 1);
    Running& running = running_of(tile);
    for (int j = 0; j < kTile; ++j) {
      running.most[j] = -__builtin_inff();
      running.sum[j] = 0.0f;
    }
  }

  // The tile after that of q.
  NextRows next(int64_t q) const {
    const int64_t stride = call.query_strides[2], size = int64_t(sizeof(T));
    const bool more = holds_all(call) && q + kTile < end && call.query_strides[3] <= 1;
    return {reinterpret_cast<const char*>(queries + (q + kTile) * stride),
            more ? lanes(q + kTile) : 0, stride * size, call.width * size};
  }

  void pack(const int64_t* columns, int64_t first, int64_t n) {
    pack_keys<Form>(packed, keys, columns, first, n, call.key_strides[2], call.width,
                    call.key_strides[3], sign());
  }

  // Scores of the packed keys, with the mask; keys that take no part get -inf.
  void score_tile(int64_t q, const int64_t* columns, int64_t first, int64_t n) {
    const int64_t words = (call.width + Form::kChannels - 1) / Form::kChannels;
    score<Form>(tile_of(q), packed, n, words, scores, next(q));
    if (call.mask_type == MaskType::none && !call.causal) return;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t key = columns ? columns[j] : first + j;
      float* column = scores + j * kTile;
      if (call.mask_type != MaskType::none) mask_column(column, q, key);
      if (call.causal && key > q)
        for (int64_t lane = 0; lane < kTile && q + lane < key; ++lane)
          column[lane] = -__builtin_inff();
    }
  }

  float mask_value(const void* mask, int64_t at) const {
    switch (call.mask_type) {
      case MaskType::f32:
        return static_cast<const float*>(mask)[at];
      case MaskType::bf16:
        return to_float(static_cast<const bf16*>(mask)[at]);
      case MaskType::f16:
        return to_float(static_cast<const f16*>(mask)[at]);
      default:
        return static_cast<const uint8_t*>(mask)[at] ? 0.0f : -__builtin_inff();
    }
  }

  void mask_column(float* column, int64_t q, int64_t key) {
    const int64_t* strides = call.mask_strides;
    const int64_t at = b * strides[0] + h * strides[1] + q * strides[2] + key * strides[3];
    const int64_t n = lanes(q);
    const bool added_to = added_mask();
    const float scale = magnitude();
    float value = mask_value(call.mask, at);
    if (strides[2] == 0 && !added_to && value == 0.0f) return;
    for (int64_t lane = 0; lane < n; ++lane) {
      if (strides[2] != 0 && lane > 0) value = mask_value(call.mask, at + lane * strides[2]);
      if (added_to)
        column[lane] = column[lane] * scale + value;
      else if (value != 0.0f)
        column[lane] = value;
    }
  }

  // out += sum [kTile] for one word.
  void add(int64_t q, int64_t w, const float* sum) {
    const int64_t n = lanes(q), stride = call.out_strides[3];
    float* out = call.out + b * call.out_strides[0] + h * call.out_strides[1] +
                 w * call.out_strides[2] + q * stride;
    if (stride == 1)
      for (int64_t lane = 0; lane < n; ++lane) out[lane] += sum[lane];
    else
      for (int64_t lane = 0; lane < n; ++lane) out[lane * stride] += sum[lane];
  }

  // sum += weights of one word e, for the columns of one chunk; false where it has none there.
  bool gather_word(int64_t chunk, int64_t w, const Running& running, float* sum) {
    const int64_t* offsets = weighted.offsets + chunk * call.words + w;
    if (offsets[0] == offsets[1]) return false;
    gather(running, scores, weighted.entries + offsets[0], weighted.entries + offsets[1], sum);
    return true;
  }

  // Whether some query of the tile may see a key from `first` on.
  bool sees(int64_t q, int64_t first) const { return !call.causal || first < q + kTile; }

  // All keys at once: their scores stay until the words are added.
  void run_held() {
    pack(nullptr, 0, call.keys);
    for (int64_t q = begin; q < end; q += kTile) {
      load(q);
      Running& running = running_of(tile_of(q));
      score_tile(q, nullptr, 0, call.keys);
      take(running, scores, call.keys, factor);
      for (int64_t w = 0; w < call.words; ++w) {
        clear(sums);
        if (gather_word(0, w, running, sums)) add(q, w, sums);
      }
    }
  }

  // Chunks of keys, for all tiles in turn; then those that have a weight once more.
  void run_streamed() {
    for (int64_t q = begin; q < end; q += kTile) load(q);
    for (int64_t first = 0; first < call.keys; first += kKeyTile) {
      const int64_t n = call.keys - first < kKeyTile ? call.keys - first : kKeyTile;
      if (!sees(end - 1, first)) break;
      pack(nullptr, first, n);
      for (int64_t q = begin; q < end; q += kTile) {
        if (!sees(q, first)) continue;
        score_tile(q, nullptr, first, n);
        take(running_of(tile_of(q)), scores, n, factor);
      }
    }
    for (int64_t i = 0; i < sums_held(job); ++i) clear(sums + i * kTile);
    for (int64_t first = 0; first < weighted.count; first += kKeyTile) {
      const int64_t n = weighted.count - first < kKeyTile ? weighted.count - first : kKeyTile;
      pack(weighted.columns + first, 0, n);
      for (int64_t q = begin; q < end; q += kTile) {
        const Running& running = running_of(tile_of(q));
        score_tile(q, weighted.columns + first, 0, n);
        weigh(running, scores, n, factor);
        for (int64_t w = 0; w < call.words; ++w)
          gather_word(first / kKeyTile, w, running, sums_of(q, w));
      }
    }
    for (int64_t q = begin; q < end; q += kTile)
      for (int64_t w = 0; w < call.words; ++w) add(q, w, sums_of(q, w));
  }
};

template <typename Form>
void run(const AttentionWordsJob& job, float* scratch, int64_t first, int64_t last) {
  const int64_t pieces = (job.call.queries + job.piece - 1) / job.piece;
  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item / pieces, begin = item % pieces * job.piece;
    Piece<Form> piece(job, scratch, head / job.call.heads, head % job.call.heads, begin);
    if (piece.weighted.count == 0) continue;
    if (holds_all(job.call))
      piece.run_held();
    else
      piece.run_streamed();
  }
}

void run_bf16(const AttentionWordsJob& job, float* scratch, int64_t first, int64_t last) {
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512bf16")) return run<Pairs>(job, scratch, first, last);
#endif
  run<Singles<bf16>>(job, scratch, first, last);
}

}  // namespace

namespace DR_ISA {

extern const AttentionWordsKernels attention_words;
const AttentionWordsKernels attention_words = {
    {{run<Singles<f16>>, run_bf16, run<Singles<float>>}}, kTile, scratch_floats};

}  // namespace DR_ISA
}  // namespace dreamreader
