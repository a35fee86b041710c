// What the CPU kernel of the attention maps offers for each instruction set.
#pragma once

#include "attention_words.h"
#include "cpu.h"

namespace dreamreader {

constexpr int64_t kKeyTile = 256;  // keys whose scores are held at once

// The keys that have a weight, in chunks of kKeyTile: their numbers, and for each chunk and word
// the entries (place of the key, weight). Where all keys fit into one chunk, every key is in it and
// a place is the key's number; otherwise a place counts the columns of the chunk.
struct WeightedKeys {
  struct Entry {
    int32_t at;
    float weight;
  };
  const int64_t* columns;
  int64_t count;           // of columns
  const int64_t* offsets;  // [chunks * words + 1], into entries
  const Entry* entries;
};

struct AttentionWordsJob {
  AttentionWords call;
  const WeightedKeys* weighted;  // by batch entry; one for all where the weights do not vary
  int64_t weighted_stride;       // 0 or 1
  int64_t piece;                 // queries of one item
};

struct AttentionWordsKernels {
  // An item is one piece of the queries of one head of one batch entry. Scratch holds
  // scratch_floats(job). f64 is missing.
  ByType<void(const AttentionWordsJob& job, float* scratch, int64_t first, int64_t last)> run;
  int64_t tile;  // queries side by side in vectors
  int64_t (*scratch_floats)(const AttentionWordsJob& job);
};

DR_KERNELS(AttentionWordsKernels, attention_words)

}  // namespace dreamreader
