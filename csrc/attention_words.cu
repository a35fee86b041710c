// CUDA kernel of the attention maps of words: one launch, scores in registers, see
// attention_words.h.
#include <cmath>

#include "attention_words.h"
#include "cuda_tile.h"

namespace dreamreader {
namespace {

// A block owns kQueries queries of one head and walks over tiles of kKeys keys. Thread t holds the
// scores of 8 queries (t / 16 tells which) and the keys t % 16, + 16, ... of the tile; the 16
// threads of the same queries are half a warp, so sums over keys are shuffles.
constexpr int kThreads = 128;
constexpr int kAcross = 16;  // threads that share queries
constexpr int kRows = 8;     // queries of a thread
constexpr int kColumns = 5;  // keys of a thread: 80 a tile, so that 77 text tokens fit
constexpr int kQueries = kThreads / kAcross * kRows;
constexpr int kKeys = kAcross * kColumns;
constexpr int kSlab = 32;      // channels in shared memory at a time
constexpr int kWindow = 1024;  // keys that are searched for weights at a time
constexpr int kWords = 32;     // words whose sums are held while keys come in several tiles
constexpr int kQueryPitch = kQueries + 4;  // 16-byte reads of queries
constexpr int kKeyPitch = kKeys + 1;       // the slab is written along channels without conflicts

struct Shared {
  float query[kSlab * kQueryPitch];
  float key[kSlab * kKeyPitch];
  int32_t columns[kWindow];
  uint32_t found[kWindow / kWarp];
  float sums[kWords * kQueries];
};

template <typename T>
struct Tile {
  const AttentionWords& call;
  Shared& shared;
  const T *queries, *keys;  // of the head
  const float* weights;     // of the batch entry
  float* out;
  int64_t mask_at;         // of the head
  int first_query, count;  // of the block
  int lane, row;           // of the thread: first key and first query
  float factor, magnitude;
  float scores[kRows][kColumns];
  float most[kRows], sum[kRows];  // running maximum; sum of the thread's own keys, at last of all

  __device__ __forceinline__ Tile(const AttentionWords& call, Shared& shared, int64_t head,
                                  int tile)
      : call(call), shared(shared), first_query(tile * kQueries) {
    const int64_t b = head / call.heads, h = head % call.heads;
    queries =
        static_cast<const T*>(call.query) + b * call.query_strides[0] + h * call.query_strides[1];
    keys = static_cast<const T*>(call.key) + b * call.key_strides[0] +
           h / call.groups * call.key_strides[1];
    weights = call.weights + b * call.weight_strides[0];
    out = call.out + b * call.out_strides[0] + h * call.out_strides[1];
    mask_at = b * call.mask_strides[0] + h * call.mask_strides[1];
    count = int(call.queries) - first_query < kQueries ? int(call.queries) - first_query : kQueries;
    lane = int(threadIdx.x) % kAcross;
    row = int(threadIdx.x) / kAcross * kRows;
    // A scale below 0 turns the keys round, a scale of 0 makes them 0.
    magnitude = call.scale < 0 ? -call.scale : (call.scale == 0 ? 1.0f : call.scale);
    factor = (added_mask() ? 1.0f : magnitude) * kLog2E;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      most[i] = -INFINITY;
      sum[i] = 0.0f;
    }
  }

  __device__ __forceinline__ bool added_mask() const { return call.mask_type > MaskType::boolean; }

  // Key number `place` of the tile, or -1 beyond its end. Listed tiles hold columns, others begin
  // at `first`.
  __device__ __forceinline__ int column(bool listed, int first, int n, int place) const {
    if (place >= n) return -1;
    return listed ? shared.columns[first + place] : first + place;
  }

  __device__ __forceinline__ void load_slab(bool listed, int first, int n, int begin) {
    const int channel = int(threadIdx.x) % kSlab;
    const bool inside = begin + channel < call.width;
    const float sign = call.scale < 0 ? -1.0f : (call.scale == 0 ? 0.0f : 1.0f);
    for (int i = int(threadIdx.x) / kSlab; i < kQueries; i += kThreads / kSlab) {
      float q = 0.0f;
      if (inside && i < count)
        q = widen<float>(queries[(first_query + i) * call.query_strides[2] +
                                 (begin + channel) * call.query_strides[3]]);
      shared.query[channel * kQueryPitch + i] = q;
    }
    for (int i = int(threadIdx.x) / kSlab; i < kKeys; i += kThreads / kSlab) {
      const int64_t j = column(listed, first, n, i);
      float k = 0.0f;
      if (inside && j >= 0)
        k = sign *
            widen<float>(keys[j * call.key_strides[2] + (begin + channel) * call.key_strides[3]]);
      shared.key[channel * kKeyPitch + i] = k;
    }
  }

  // scores = <query, key>, unscaled, with the mask; keys that take no part get -inf.
  __device__ __forceinline__ void score(bool listed, int first, int n) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) scores[i][j] = 0.0f;
    for (int begin = 0; begin < call.width; begin += kSlab) {
      __syncthreads();
      load_slab(listed, first, n, begin);
      __syncthreads();
#pragma unroll 2
      for (int c = 0; c < kSlab; ++c) {
        float q[kRows], k[kColumns];
#pragma unroll
        for (int i = 0; i < kRows; i += 4) {
          const float4 four =
              *reinterpret_cast<const float4*>(&shared.query[c * kQueryPitch + row + i]);
          q[i] = four.x, q[i + 1] = four.y, q[i + 2] = four.z, q[i + 3] = four.w;
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) k[j] = shared.key[c * kKeyPitch + lane + j * kAcross];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) scores[i][j] = fmaf(q[i], k[j], scores[i][j]);
      }
    }
    const bool plain = call.mask_type == MaskType::none && !call.causal;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int key = column(listed, first, n, lane + j * kAcross);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int query = first_query + row + i;
        if (key < 0 || (call.causal && key > query))
          scores[i][j] = -INFINITY;
        else if (!plain && row + i < count)
          scores[i][j] = masked(scores[i][j], query, key);
      }
    }
  }

  __device__ __forceinline__ float masked(float score, int query, int key) const {
    const int64_t at = mask_at + query * call.mask_strides[2] + key * call.mask_strides[3];
    if (call.mask_type == MaskType::boolean)
      return static_cast<const uint8_t*>(call.mask)[at] ? score : -INFINITY;
    if (call.mask_type == MaskType::none) return score;
    const float added = call.mask_type == MaskType::f32 ? static_cast<const float*>(call.mask)[at]
                        : call.mask_type == MaskType::bf16
                            ? widen<float>(static_cast<const __nv_bfloat16*>(call.mask)[at])
                            : widen<float>(static_cast<const __half*>(call.mask)[at]);
    return fmaf(score, magnitude, added);
  }

  // About factor * most as a whole number, and 0 where nothing was allowed.
  __device__ __forceinline__ float shift(int i) const {
    return most[i] == -INFINITY ? 0.0f : rintf(most[i] * factor);
  }

  // Takes the scores in; leaves 2^(factor score - shift) in their place.
  __device__ __forceinline__ void take() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float now = most[i];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) now = fmaxf(now, scores[i][j]);
#pragma unroll
      for (int far = 1; far < kAcross; far *= 2)
        now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, far));
      const float before = most[i] == -INFINITY ? -INFINITY : shift(i);
      most[i] = now;
      sum[i] *= exp2f(before - shift(i));
    }
    weigh();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i] += scores[i][j];
  }

  // The fraction of the exponent is taken from the score itself, so that it is rounded below 0.5,
  // whatever the exponent. (Beyond 2^24 there is no fraction, but the sum of the whole numbers is
  // rounded: hence the bounds.)
  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float whole = shift(i);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float n = fmaxf(rintf(fmaf(scores[i][j], factor, -whole)), -200.0f);
        const float r = fmaf(scores[i][j], factor, -(whole + n));
        scores[i][j] = exp2f(r < -1.0f ? -1.0f : (r > 1.0f ? 1.0f : r)) * exp2f(n);
      }
    }
  }

  // sum = 1 / the sum over all keys, or 0 without any.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int far = 1; far < kAcross; far *= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], far);
      sum[i] = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
    }
  }

  // Adds weights of the words begin .. end - 1 e / sum, for the keys of the tile: to out, or to
  // shared.sums.
  __device__ __forceinline__ void add(bool listed, int first, int n, int64_t begin, int64_t end) {
    int64_t key[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) key[j] = column(listed, first, n, lane + j * kAcross);
    for (int64_t w = begin; w < end; ++w) {
      float added[kRows] = {};
      bool some = false;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float weight =
            key[j] < 0 ? 0.0f
                       : weights[w * call.weight_strides[1] + key[j] * call.weight_strides[2]];
        if (weight == 0.0f) continue;
        some = true;
#pragma unroll
        for (int i = 0; i < kRows; ++i) added[i] = fmaf(weight, scores[i][j], added[i]);
      }
      if (!__any_sync(kAllLanes, some)) continue;  // a warp holds every key of the tile
      float mine = 0.0f;                           // of the query that this thread writes
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int far = 1; far < kAcross; far *= 2)
          added[i] += __shfl_xor_sync(kAllLanes, added[i], far);
        const float share =
            added[i] * sum[i];  // before the choice: indexed by lane, sum would leave its registers
        mine = lane == i ? share : mine;
      }
      if (lane < kRows && row + lane < count) {
        if (listed)
          shared.sums[int(w - begin) * kQueries + row + lane] += mine;
        else
          out[w * call.out_strides[2] + (first_query + row + lane) * call.out_strides[3]] += mine;
      }
    }
  }

  // The keys among first .. first + kWindow - 1 that have a weight in the words, in order, to
  // shared.columns.
  __device__ __forceinline__ int find_weights(int first, int64_t begin, int64_t end) {
    __syncthreads();
    const int place = int(threadIdx.x) % kWarp;
    for (int group = int(threadIdx.x) / kWarp; group < kWindow / kWarp; group += kThreads / kWarp) {
      const int64_t j = first + group * kWarp + place;
      bool any = false;
      for (int64_t w = begin; w < end && j < call.keys && !any; ++w)
        any = weights[w * call.weight_strides[1] + j * call.weight_strides[2]] != 0.0f;
      const uint32_t found = __ballot_sync(kAllLanes, any);
      if (place == 0) shared.found[group] = found;
    }
    __syncthreads();
    int before = 0;
    for (int group = 0; group < kWindow / kWarp; ++group) {
      const uint32_t found = shared.found[group];
      if (group % (kThreads / kWarp) == int(threadIdx.x) / kWarp && (found >> place & 1u))
        shared.columns[before + __popc(found & ((1u << place) - 1u))] =
            first + group * kWarp + place;
      before += __popc(found);
    }
    __syncthreads();
    return before;
  }

  __device__ __forceinline__ void run() {
    const int keys_seen =
        call.causal && first_query + kQueries < call.keys ? first_query + kQueries : int(call.keys);
    for (int first = 0; first < keys_seen; first += kKeys) {
      score(false, first, keys_seen - first < kKeys ? keys_seen - first : kKeys);
      take();
    }
    finish();
    if (keys_seen <= kKeys)
      return add(false, 0, keys_seen, 0, call.words);  // of the scores that are still there
    for (int64_t w = 0; w < call.words; w += kWords)
      add_words(w, w + kWords < call.words ? w + kWords : call.words, keys_seen);
  }

  // A second pass, over the keys that have a weight in the words begin .. end - 1.
  __device__ __forceinline__ void add_words(int64_t begin, int64_t end, int keys_seen) {
    for (int i = int(threadIdx.x); i < kWords * kQueries; i += kThreads) shared.sums[i] = 0.0f;
    for (int window = 0; window < keys_seen; window += kWindow) {
      const int found = find_weights(window, begin, end);
      for (int first = 0; first < found; first += kKeys) {
        const int n = found - first < kKeys ? found - first : kKeys;
        score(true, first, n);
        weigh();
        add(true, first, n, begin, end);
      }
    }
    __syncthreads();
    const int i = int(threadIdx.x) % kQueries;
    for (int64_t w = begin + int(threadIdx.x) / kQueries; w < end && i < count;
         w += kThreads / kQueries)
      out[w * call.out_strides[2] + (first_query + i) * call.out_strides[3]] +=
          shared.sums[int(w - begin) * kQueries + i];
    __syncthreads();
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_words_kernel(const __grid_constant__ AttentionWords call) {
  extern __shared__ __align__(16) char shared[];
  const int64_t tiles = (call.queries + kQueries - 1) / kQueries;
  Tile<T> tile(call, *reinterpret_cast<Shared*>(shared), blockIdx.x / tiles,
               int(blockIdx.x % tiles));
  tile.run();
}

template <typename T>
cudaError_t launch(const AttentionWords& call, cudaStream_t stream) {
  const int64_t blocks = (call.queries + kQueries - 1) / kQueries * call.heads * call.batch;
  if (blocks > INT32_MAX || call.keys > INT32_MAX / 2 || call.queries > INT32_MAX / 2 ||
      call.width > INT32_MAX / 2)
    return cudaErrorNotSupported;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  static_assert(sizeof(Shared) <= 48 << 10);  // what every device gives unasked
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, attention_words_kernel<T>, call);
}

}  // namespace

cudaError_t launch_attention_words(const AttentionWords& call, cudaStream_t stream) {
  if (call.batch * call.heads * call.queries * call.keys * call.words == 0) return cudaSuccess;
  return by_type(call.dtype, [&]<typename T>(T) { return launch<T>(call, stream); });
}

}  // namespace dreamreader
