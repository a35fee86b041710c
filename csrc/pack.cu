// CUDA kernels of the packing, see pack.h. Where features lie next to one another, a block owns a
// row; elsewhere tokens do so in most layouts, and a block turns a tile of rows in shared memory.
// With a scale, values are formed twice: the second look finds them in the cache.
#include <cstdint>

#include "cuda_tile.h"
#include "pack_bits.h"
#include "pack_cuda.h"

namespace dreamreader {
namespace {

constexpr int kRowThreads = 128;
constexpr int kTileRows = 16;  // of 2 bytes each, tokens next to one another fill a sector
constexpr int kTileThreads = 512;
constexpr int kTileAcross = kTileThreads / kTileRows;
constexpr int kTileFeatures = 4 * kTileAcross;

template <typename T>
struct Work {
  using type = float;
};
template <>
struct Work<double> {
  using type = double;
};

template <typename T, int kRun>
struct alignas(sizeof(T) * kRun < 16 ? sizeof(T) * kRun : 16) Run {
  T at[kRun];
};

// Differences and pools of kRun features of a row, from feature d on.
template <typename T, int kRun>
struct Values {
  using W = typename Work<T>::type;
  W at[kRun];
  bool odd = false;  // a difference is not finite although its pool may be

  __device__ __forceinline__ Values(const PackJob& job, int64_t row, int64_t d) {
    const bool alone = job.pool == Pool::none;
    const int64_t begin = alone ? row : job.groups[row];
    difference(job, begin, d, at);
    if (alone) return;
    const int64_t end = job.groups[row + 1];
    const bool mean = job.pool == Pool::mean;
    if (!mean) judge(at);
    for (int64_t place = begin + 1; place < end; ++place) {
      W next[kRun];
      difference(job, place, d, next);
      if (!mean) judge(next);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (mean)
          at[i] += next[i];
        else if (next[i] > at[i] || next[i] != next[i])
          at[i] = next[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      at[i] = (mean ? at[i] / W(end - begin) : at[i]) + W(0);  // zeros are +0
  }

 private:
  __device__ __forceinline__ void difference(const PackJob& job, int64_t place, int64_t d,
                                             W (&to)[kRun]) {
    const int64_t entry = job.places[2 * place], token = job.places[2 * place + 1];
    load(job.x, entry, token, d, to);
    if (job.minus.data == nullptr) return;
    W taken[kRun];
    load(job.minus, entry, token, d, taken);
#pragma unroll
    for (int i = 0; i < kRun; ++i) to[i] -= taken[i];
  }

  static __device__ __forceinline__ void load(const StridedRows& x, int64_t entry, int64_t token,
                                              int64_t d, W (&to)[kRun]) {
    const T* from = row_at<T>(x, entry, token) + d * x.stride_channel;
    const Run<T, kRun> run = *reinterpret_cast<const Run<T, kRun>*>(from);
#pragma unroll
    for (int i = 0; i < kRun; ++i) to[i] = widen<W>(run.at[i]);
  }

  __device__ __forceinline__ void judge(const W (&values)[kRun]) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) odd = odd || !(std::fabs(values[i]) < W(INFINITY));
  }
};

// What a thread has seen of a row.
template <typename W>
struct Seen {
  W finite = 0;
  bool odd = false;

  __device__ __forceinline__ void see(W value, W overflow) {
    const W magnitude = std::fabs(value);
    odd = odd || !(magnitude < overflow);
    if (magnitude < W(INFINITY) && magnitude > finite) finite = magnitude;
  }
};

template <typename S, int kRun>
__device__ __forceinline__ void write(const PackJob& job, int64_t element,
                                      const Run<S, kRun>& run) {
  S* to = static_cast<S*>(job.out) + element;
  if (reinterpret_cast<uintptr_t>(to) % alignof(Run<S, kRun>) == 0) {
    *reinterpret_cast<Run<S, kRun>*>(to) = run;
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) to[i] = run.at[i];
}

// Rounds kRun values and writes them from this element of out on.
template <int kRun, typename W>
__device__ __forceinline__ void put(const PackJob& job, int64_t element, const W (&values)[kRun],
                                    W scale) {
  if (job.stored == Stored::f32) {
    Run<float, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = float(values[i]);
    write(job, element, run);
  } else if (job.stored == Stored::bf16) {
    Run<__nv_bfloat16, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = __float2bfloat16_rn(to_odd(values[i]));
    write(job, element, run);
  } else if (job.stored == Stored::f16) {
    Run<__half, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = __float2half_rn(to_odd(values[i]));
    write(job, element, run);
  } else {
    Run<uint8_t, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float part = to_odd(values[i] / scale);
      run.at[i] = job.stored == Stored::f8 ? f8_bits(part) : i8_bits(part);
    }
    write(job, element, run);
  }
}

__device__ __forceinline__ void count(const PackJob& job) {
  if (job.not_finite != nullptr)
    atomicAdd(reinterpret_cast<unsigned long long*>(job.not_finite), 1ull);
}

template <typename T, int kRun>
__global__ void __launch_bounds__(kRowThreads) pack_row_kernel(const PackJob job) {
  using W = typename Work<T>::type;
  extern __shared__ __align__(16) char shared[];
  W* const largest = reinterpret_cast<W*>(shared);  // of each warp
  const int64_t row = blockIdx.x, at = row * job.x.width;
  const W overflow = overflow_of<W>(job.stored);
  const bool scaled = has_scale(job.stored);
  Seen<W> seen;
  for (int64_t d = int64_t(threadIdx.x) * kRun; d < job.x.width; d += kRowThreads * kRun) {
    const Values<T, kRun> values(job, row, d);
    seen.odd = seen.odd || values.odd;
#pragma unroll
    for (int i = 0; i < kRun; ++i) seen.see(values.at[i], overflow);
    if (!scaled) put<kRun>(job, at + d, values.at, W(1));
  }
  if (__syncthreads_or(seen.odd) && threadIdx.x == 0) count(job);
  if (!scaled) return;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const W other = __shfl_xor_sync(kAllLanes, seen.finite, distance);
    seen.finite = other > seen.finite ? other : seen.finite;
  }
  if (threadIdx.x % kWarp == 0) largest[threadIdx.x / kWarp] = seen.finite;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRowThreads / kWarp; ++i)
    seen.finite = largest[i] > seen.finite ? largest[i] : seen.finite;
  const float scale = scale_of(job.stored, seen.finite);
  if (threadIdx.x == 0) job.scales[row] = scale;
  for (int64_t d = int64_t(threadIdx.x) * kRun; d < job.x.width; d += kRowThreads * kRun)
    put<kRun>(job, at + d, Values<T, kRun>(job, row, d).at, W(scale));
}

template <typename W>
struct Tile {
  W values[kTileFeatures][kTileRows + 1];
  W largest[kTileAcross][kTileRows];
  float scales[kTileRows];
  int odd[kTileRows];
};

// Thread t reads features t / kTileRows, + kTileAcross, ... of row t % kTileRows of the tile and
// writes them the other way round.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) pack_tile_kernel(const PackJob job) {
  using W = typename Work<T>::type;
  extern __shared__ __align__(16) char shared[];
  Tile<W>& tile = *reinterpret_cast<Tile<W>*>(shared);
  const int64_t first = int64_t(blockIdx.x) * kTileRows;
  const int lane = int(threadIdx.x) % kTileRows, across = int(threadIdx.x) / kTileRows;
  const bool inside = first + lane < job.rows;
  const W overflow = overflow_of<W>(job.stored);
  const bool scaled = has_scale(job.stored);
  Seen<W> seen;
  if (threadIdx.x < kTileRows) tile.odd[threadIdx.x] = 0;
  for (int pass = scaled ? 0 : 1; pass < 2; ++pass) {
    for (int64_t d = 0; d < job.x.width; d += kTileFeatures) {
#pragma unroll
      for (int i = 0; i < kTileFeatures; i += kTileAcross) {
        if (!inside || d + i + across >= job.x.width) continue;
        const Values<T, 1> values(job, first + lane, d + i + across);
        seen.see(values.at[0], overflow);
        seen.odd = seen.odd || values.odd;
        tile.values[i + across][lane] = values.at[0];
      }
      if (pass == 0) continue;
      __syncthreads();
      for (int i = int(threadIdx.x); i < kTileRows * kTileFeatures; i += kTileThreads) {
        const int row = i / kTileFeatures, feature = i % kTileFeatures;
        if (first + row >= job.rows || d + feature >= job.x.width) continue;
        const W value[1] = {tile.values[feature][row]};
        put<1>(job, (first + row) * job.x.width + d + feature, value,
               scaled ? W(tile.scales[row]) : W(1));
      }
      __syncthreads();
    }
    if (pass == 1) continue;
    tile.largest[across][lane] = seen.finite;
    __syncthreads();
    if (threadIdx.x < kTileRows) {
      W most = 0;
      for (int i = 0; i < kTileAcross; ++i)
        most = tile.largest[i][lane] > most ? tile.largest[i][lane] : most;
      tile.scales[lane] = scale_of(job.stored, most);
      if (inside) job.scales[first + lane] = tile.scales[lane];
    }
    __syncthreads();
  }
  if (seen.odd) tile.odd[lane] = 1;
  __syncthreads();
  if (threadIdx.x < kTileRows && tile.odd[lane]) count(job);
}

cudaError_t launch(void (*kernel)(PackJob), const PackJob& job, int64_t blocks, int threads,
                   size_t bytes, cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorNotSupported;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, job);
}

template <typename T>
cudaError_t launch_typed(const PackJob& job, cudaStream_t stream) {
  using W = typename Work<T>::type;
  constexpr int kRun = 16 / int(sizeof(T));
  if (job.x.stride_channel != 1 || (job.minus.data != nullptr && job.minus.stride_channel != 1)) {
    const int64_t tiles = (job.rows + kTileRows - 1) / kTileRows;
    static_assert(sizeof(Tile<W>) <= 48 << 10);  // what every device gives unasked
    return launch(pack_tile_kernel<T>, job, tiles, kTileThreads, sizeof(Tile<W>), stream);
  }
  const bool wide = in_runs(job.x, kRun) && (job.minus.data == nullptr || in_runs(job.minus, kRun));
  const auto kernel = wide ? pack_row_kernel<T, kRun> : pack_row_kernel<T, 1>;
  return launch(kernel, job, job.rows, kRowThreads, kRowThreads / kWarp * sizeof(W), stream);
}

}  // namespace

cudaError_t pack_cuda(const PackJob& job, cudaStream_t stream) {
  if (job.rows <= 0) return cudaSuccess;
  return by_type<true>(job.x.dtype, [&]<typename T>(T) { return launch_typed<T>(job, stream); });
}

}  // namespace dreamreader
