// CUDA kernels of the low-rank edit and its gradient, see low_rank.h and low_rank_tile.h. The edit
// reads and writes its rows once. The gradient does so too and leaves d and s z of every row
// behind; a second kernel forms the sums of d x' and s z g' over the rows of each adapter, a third
// adds up the parts of the rows.
#include <algorithm>

#include "cuda_shared.h"
#include "low_rank_cuda.h"
#include "low_rank_tile.h"

namespace dreamreader {
namespace {

constexpr int64_t kSharedTwice = 100 << 10;  // leaves room for a second block
constexpr int64_t kSharedOnce = 160 << 10;   // both where a device gives a block as much
constexpr int64_t kFewRank = 16;  // above, the traffic of the tables outweighs a second block
constexpr int64_t kFill = 264;    // tiles that fill a GPU

struct Job {
  LowRank<float> p;
  Cut cut;
  StridedRows x, y;  // y: the result, or dx
  bool x_runs, y_runs, all;
  // The gradient only:
  StridedRows grad;
  bool grad_runs;
  bool hidden, along;  // z and U g are needed
  float* strength;
  float *d, *heard;  // [rows, rank]: d and s z
};

__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

template <typename T>
__host__ __device__ int64_t tile_bytes(const Cut& cut) {
  return round_up(int64_t{sizeof(TileRows)}, 16) +
         int64_t{cut.rows} * cut.pitch * int64_t{sizeof(T)};
}

template <typename T>
__device__ __forceinline__ float* coefficients_of(char* shared, const Cut& cut) {
  return reinterpret_cast<float*>(shared + tile_bytes<T>(cut));
}

template <typename T, int kRows, bool kWide>
__device__ __forceinline__ LowRankTile<T, kRows, kWide> tile_of(const Job& job, char* shared) {
  TileRows& rows = *reinterpret_cast<TileRows*>(shared);
  return {job.p, job.cut, rows, shared + round_up(int64_t{sizeof(TileRows)}, 16)};
}

// NaN for the rows of an adapter that does not exist.
__device__ __forceinline__ void fill_nan(float* coefficients, int count) {
  for (int i = int(threadIdx.x); i < count; i += kThreads) coefficients[i] = NAN;
  __syncthreads();
}

template <typename T, int kRows, bool kWide>
__global__ void __launch_bounds__(kThreads) low_rank_kernel(const __grid_constant__ Job job) {
  extern __shared__ __align__(16) char shared[];
  auto tile = tile_of<T, kRows, kWide>(job, shared);
  float* z = coefficients_of<T>(shared, job.cut);  // [rank][rows]
  const int64_t adapter = tile.find(blockIdx.x);
  const int row = tile.thread;
  const bool mine = row < job.cut.rows;
  const bool changes = __syncthreads_or(mine && tile.rows.changed[row]) != 0;
  if (!changes && !job.all) return;
  if (mine) tile.rows.loaded[row] = job.all ? tile.rows.there[row] : tile.rows.changed[row];
  __syncthreads();
  tile.load(job.x, job.x_runs);
  if (changes) {
    const int64_t known = adapter < 0 ? 0 : adapter;
    const float* up = job.p.up + known * job.p.rank * job.p.width;
    if (adapter < 0) {
      fill_nan(z, tile.rank * job.cut.rows);
    } else {
      const float* down = job.p.down + known * job.p.rank * job.p.width;
      tile.project(down, job.p.bias + known * job.p.rank, z);
    }
    if (mine) {
      bool some = false;
      for (int j = 0; j < tile.rank; ++j) some = some || z[j * job.cut.rows + row] != 0;
      tile.rows.changed[row] = tile.rows.changed[row] && some;
    }
    __syncthreads();
    tile.spread(up, z);
  }
  tile.store(job.y, job.y_runs, job.all);
}

template <typename T, int kRows, bool kWide>
__global__ void __launch_bounds__(kThreads) low_rank_rows_kernel(const __grid_constant__ Job job) {
  extern __shared__ __align__(16) char shared[];
  auto tile = tile_of<T, kRows, kWide>(job, shared);
  const int rows = job.cut.rows, rank = int(job.p.rank), row = tile.thread;
  float* z = coefficients_of<T>(shared, job.cut);  // [rank][rows]
  float* along = z + rank * rows;                  // [rank][rows]
  const int64_t adapter = tile.find(blockIdx.x), known = adapter < 0 ? 0 : adapter;
  const float* down = job.p.down + known * job.p.rank * job.p.width;
  const float* up = job.p.up + known * job.p.rank * job.p.width;
  if (row < rows)
    tile.rows.loaded[row] = tile.rows.there[row] && (job.strength || tile.rows.changed[row]);
  __syncthreads();
  if (job.hidden) {
    tile.load(job.x, job.x_runs);
    tile.project(down, job.p.bias + known * job.p.rank, z);
  }
  if (row < rows) tile.rows.loaded[row] = tile.rows.there[row];
  __syncthreads();
  if (job.along || job.all) tile.load(job.grad, job.grad_runs);
  if (job.along) tile.project(up, nullptr, along);
  if (adapter < 0) fill_nan(z, 2 * rank * rows);
  if (row < rows && tile.rows.there[row] && job.strength) {
    float sum = 0.0f;
    for (int j = 0; j < rank; ++j) sum = fmaf(along[j * rows + row], z[j * rows + row], sum);
    job.strength[tile.rows.entry[row] * job.p.tokens + tile.rows.token[row]] = sum;
  }
  for (int i = tile.thread; i < rows * rank; i += kThreads) {
    const int of = i / rank, j = i % rank;
    if (!tile.rows.changed[of]) continue;
    const int64_t at = (tile.rows.entry[of] * job.p.tokens + tile.rows.token[of]) * rank + j;
    if (job.d) job.d[at] = tile.rows.strength[of] * along[j * rows + of];
    if (job.heard) job.heard[at] = tile.rows.strength[of] * z[j * rows + of];
  }
  if (job.all) {
    tile.spread(down, along);
    tile.store(job.y, job.y_runs, true);
  }
}

// The sums over rows. A block owns 128 channels of one table of one adapter and a part of the rows.
// A warp owns kHeld ranks; where there are fewer ranks than warps hold, its rows are every second,
// fourth or eighth.
constexpr int kHeld = 8;
constexpr int kWindow = kWarp * kQuad;
constexpr int kWarps = kThreads / kWarp;

struct Sums {
  LowRank<float> p;
  StridedRows rows[2];  // x, g
  bool runs[2];
  const float* coefficients[2];  // d, s z: [rows, rank]
  float *tables[2], *bias;       // dA, dU and db, of the first part
  int64_t part;                  // floats from one part to the next
  int32_t sides[2];              // which of the two are wanted, in order
  int32_t windows, groups, parts;
};

template <typename T>
__device__ __forceinline__ Quad<T> channels_at(const T* from, const StridedRows& x, bool runs,
                                               int c, int width) {
  if (runs) return quad_at(from);
  Quad<T> quad;
#pragma unroll
  for (int e = 0; e < kQuad; ++e)
    quad.at[e] = c + e < width ? from[e * x.stride_channel] : narrow<T>(0.0f);
  return quad;
}

// A row's coefficients from the first of the warp's ranks on, 0 beyond the last rank.
__device__ __forceinline__ void coefficients_at(const float* from, int left, float (&to)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) to[i] = i < left ? from[i] : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) low_rank_sums_kernel(const __grid_constant__ Sums job) {
  constexpr int kAhead = 8 / int(sizeof(T));  // rows whose loads are on their way at once
  extern __shared__ __align__(16) char shared[];
  Quad<float>* held = reinterpret_cast<Quad<float>*>(shared);                  // [warps][kHeld][32]
  float* held_bias = reinterpret_cast<float*>(held + kWarps * kHeld * kWarp);  // [warps][kHeld]
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int width = int(job.p.width), rank = int(job.p.rank);
  const int window = int(blockIdx.x) % job.windows;
  const int64_t number = int64_t(blockIdx.x) / job.windows, adapter = number % job.p.adapters;
  const int side = job.sides[number / job.p.adapters];
  const StridedRows& x = job.rows[side];
  const int c = window * kWindow + lane * kQuad;
  const int first_rank = warp % job.groups * kHeld, every = kWarps / job.groups;
  const int64_t total = job.p.entries * job.p.tokens;
  const int64_t end = total * (blockIdx.y + 1) / job.parts;

  Quad<float> sums[kHeld] = {};
  float bias[kHeld] = {};
  for (int64_t at = total * blockIdx.y / job.parts + warp / job.groups; at < end;
       at += every * kAhead) {
    Quad<T> rows[kAhead];
    float d[kAhead][kHeld];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const int64_t row = at + n * every, entry = row / job.p.tokens, token = row % job.p.tokens;
      const bool on =
          row < end && adapter_of(job.p, entry) == adapter && strength_of(job.p, entry, token) != 0;
      const T* from =
          static_cast<const T*>(x.data) + row_offset(x, entry, token) + c * x.stride_channel;
      for (int e = 0; e < kQuad; ++e) rows[n].at[e] = narrow<T>(0.0f);
      if (on && c < width) rows[n] = channels_at(from, x, job.runs[side], c, width);
      coefficients_at(job.coefficients[side] + row * rank + first_rank, on ? rank - first_rank : 0,
                      d[n]);
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
#pragma unroll
        for (int e = 0; e < kQuad; ++e)
          sums[j].at[e] = fmaf(d[n][j], widen<float>(rows[n].at[e]), sums[j].at[e]);
        bias[j] += d[n][j];
      }
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    held[(warp * kHeld + j) * kWarp + lane] = sums[j];
    if (lane == 0) held_bias[warp * kHeld + j] = bias[j];
  }
  __syncthreads();
  const float* every_sum = reinterpret_cast<const float*>(held);
  float* table = job.tables[side] + blockIdx.y * job.part + adapter * rank * width;
  for (int i = int(threadIdx.x); i < rank * kWindow; i += kThreads) {
    const int j = i / kWindow, channel = window * kWindow + i % kWindow;
    if (channel >= width) continue;
    float sum = 0.0f;
    for (int w = j / kHeld; w < kWarps; w += job.groups)
      sum += every_sum[(w * kHeld + j % kHeld) * kWindow + i % kWindow];
    table[int64_t{j} * width + channel] = sum;
  }
  if (side == 0 && window == 0 && int(threadIdx.x) < rank) {
    const int j = int(threadIdx.x);
    float sum = 0.0f;
    for (int w = j / kHeld; w < kWarps; w += job.groups) sum += held_bias[w * kHeld + j % kHeld];
    job.bias[blockIdx.y * job.part + adapter * rank + j] = sum;
  }
}

// Adds up the parts: [down | bias | up] of each.
__global__ void __launch_bounds__(kThreads)
    low_rank_parts_kernel(const float* parts, int64_t part, int32_t count, float* down,
                          int64_t downs, float* bias, int64_t biases, float* up) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= part) return;
  float* to = i < downs            ? down + i
              : i < downs + biases ? bias + (i - downs)
                                   : up + (i - downs - biases);
  if (!(i < downs ? down : i < downs + biases ? bias : up)) return;
  float sum = 0.0f;
  for (int n = 0; n < count; ++n) sum += parts[n * part + i];
  *to = sum;
}

template <typename K, typename... A>
cudaError_t launch(K kernel, int64_t across, int64_t down, int64_t bytes, cudaStream_t stream,
                   A... arguments) {
  if (across > INT32_MAX || down > 65535) return cudaErrorNotSupported;
  if (bytes > kSharedUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(across), unsigned(down));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
int64_t bytes_of(const LowRank<float>& p, const Cut& cut, int64_t coefficients) {
  return tile_bytes<T>(cut) + coefficients * p.rank * cut.rows * int64_t{sizeof(float)};
}

// `coefficients`: how many of [rank][rows] lie beside the tile. `fits`: whether a block of this
// device has room for the fewest rows.
template <typename T>
Cut cut_for(const LowRank<float>& p, int64_t coefficients) {
  const int64_t limit = shared_limit();
  Cut cut;
  const int64_t runs = p.adapters == 1 ? 1 : p.entries;
  cut.span = p.entries * p.tokens / runs;
  // A tile that is filled token by token then meets eight banks, not one.
  cut.pitch = int32_t((round_up(p.width * int64_t{sizeof(T)}, 128) + 16) / int64_t{sizeof(T)});
  const auto largest = [&](int64_t bytes) {
    cut.rows = kMaxRows;
    while (cut.rows > 4 && bytes_of<T>(p, cut, coefficients) > std::min(bytes, limit))
      cut.rows /= 2;
    cut.fits = bytes_of<T>(p, cut, coefficients) <= limit;
  };
  largest(p.rank <= kFewRank ? kSharedTwice : kSharedOnce);
  while (cut.rows > 4 && cut.rows / 2 >= cut.span) cut.rows /= 2;
  while (cut.rows > 8 && runs * divide_up(cut.span, cut.rows) < kFill) cut.rows /= 2;
  cut.blocks = divide_up(cut.span, cut.rows);
  cut.tiles = runs * cut.blocks;
  return cut;
}

bool wide(const LowRank<float>& p) {
  return p.width % kQuad == 0 && aligned(p.down) && aligned(p.up);
}

bool supported(const LowRank<float>& p) {
  return p.rank <= kMaxCudaRank && p.width <= kMaxCudaWidth;
}

// Calls launch(T, number of rows that kernels are made for, whether tables are wide).
template <typename Launch>
cudaError_t by_rows(const LowRank<float>& p, const Cut& cut, const Launch& launch) {
  const auto with = [&](auto is_wide) {
    if (cut.rows == 4) return launch(std::integral_constant<int, 4>(), is_wide);
    if (cut.rows == 8) return launch(std::integral_constant<int, 8>(), is_wide);
    return launch(std::integral_constant<int, 16>(), is_wide);
  };
  return wide(p) ? with(std::true_type()) : with(std::false_type());
}

template <typename T>
cudaError_t edit(const LowRank<float>& p, const StridedRows& x, const StridedRows& y,
                 cudaStream_t stream) {
  Job job = {};
  job.p = p;
  job.cut = cut_for<T>(p, 1);
  if (!job.cut.fits) return cudaErrorNotSupported;
  job.x = x;
  job.y = y;
  job.x_runs = in_runs(x, 16 / int64_t{sizeof(T)});
  job.y_runs = in_runs(y, 16 / int64_t{sizeof(T)});
  job.all = x.data != y.data;
  return by_rows(p, job.cut, [&](auto rows, auto is_wide) {
    return launch(low_rank_kernel<T, rows(), is_wide()>, job.cut.tiles, 1,
                  bytes_of<T>(p, job.cut, 1), stream, job);
  });
}

int64_t part_floats(const LowRank<float>& p) { return p.adapters * p.rank * (2 * p.width + 1); }

int64_t parts_of(const LowRank<float>& p) {
  const int64_t blocks = 2 * p.adapters * divide_up(p.width, kWindow);
  const int64_t most = std::min<int64_t>(16, divide_up(p.entries * p.tokens, 64));
  return std::clamp<int64_t>(divide_up(2 * kFill, blocks), 1, std::max<int64_t>(most, 1));
}

template <typename T>
cudaError_t sum_rows(const Job& rows, const LowRankGradients& out, float* workspace,
                     cudaStream_t stream) {
  const LowRank<float>& p = rows.p;
  const int64_t downs = p.adapters * p.rank * p.width, biases = p.adapters * p.rank;
  Sums job = {};
  job.p = p;
  job.rows[0] = rows.x;
  job.rows[1] = rows.grad;
  job.runs[0] = rows.x_runs;
  job.runs[1] = rows.grad_runs;
  job.coefficients[0] = rows.d;
  job.coefficients[1] = rows.heard;
  job.parts = int32_t(parts_of(p));
  const bool direct = job.parts == 1;
  job.part = part_floats(p);
  job.tables[0] = direct ? out.down : workspace;
  job.bias = direct ? out.bias : workspace + downs;
  job.tables[1] = direct ? out.up : workspace + downs + biases;
  int sides = 0;
  if (out.down) job.sides[sides++] = 0;
  if (out.up) job.sides[sides++] = 1;
  job.windows = int32_t(divide_up(p.width, kWindow));
  job.groups = 1;
  while (job.groups * kHeld < p.rank) job.groups *= 2;
  const int64_t bytes = kWarps * kHeld * (kWindow + 1) * int64_t{sizeof(float)};
  const int64_t blocks = int64_t{sides} * p.adapters * job.windows;
  const cudaError_t error = launch(low_rank_sums_kernel<T>, blocks, job.parts, bytes, stream, job);
  if (error != cudaSuccess || direct) return error;
  return launch(low_rank_parts_kernel, divide_up(job.part, kThreads), 1, 0, stream,
                static_cast<const float*>(workspace), job.part, job.parts, out.down, downs,
                out.bias, biases, out.up);
}

template <typename T>
cudaError_t gradient(const LowRank<float>& p, const StridedRows& grad, const StridedRows& x,
                     const LowRankGradients& out, float* workspace, cudaStream_t stream) {
  const int64_t coefficients = p.entries * p.tokens * p.rank;
  Job job = {};
  job.p = p;
  job.cut = cut_for<T>(p, 2);
  if (!job.cut.fits) return cudaErrorNotSupported;
  job.x = x;
  job.grad = grad;
  job.y = out.dx;
  job.x_runs = in_runs(x, 16 / int64_t{sizeof(T)});
  job.grad_runs = in_runs(grad, 16 / int64_t{sizeof(T)});
  job.y_runs = in_runs(out.dx, 16 / int64_t{sizeof(T)});
  job.all = out.dx.data != nullptr;
  job.hidden = out.up || out.strength;
  job.along = out.dx.data || out.down || out.strength;
  job.strength = out.strength;
  job.d = out.down ? workspace : nullptr;
  job.heard = out.up ? workspace + coefficients : nullptr;
  const cudaError_t error = by_rows(p, job.cut, [&](auto rows, auto is_wide) {
    const int64_t bytes = bytes_of<T>(p, job.cut, 2);
    return launch(low_rank_rows_kernel<T, rows(), is_wide()>, job.cut.tiles, 1, bytes, stream, job);
  });
  if (error != cudaSuccess || (!out.down && !out.up)) return error;
  return sum_rows<T>(job, out, workspace + 2 * coefficients, stream);
}

}  // namespace

cudaError_t launch_low_rank(const LowRank<float>& p, const StridedRows& x, const StridedRows& y,
                            cudaStream_t stream) {
  if (!supported(p)) return cudaErrorNotSupported;
  if (p.entries * p.tokens * p.width == 0) return cudaSuccess;
  return by_type(x.dtype, [&](auto type) { return edit<decltype(type)>(p, x, y, stream); });
}

int64_t low_rank_workspace(const LowRank<float>& p) {
  const int64_t parts = parts_of(p);
  return 2 * p.entries * p.tokens * p.rank + (parts > 1 ? parts * part_floats(p) : 0);
}

cudaError_t launch_low_rank_backward(const LowRank<float>& p, const StridedRows& grad,
                                     const StridedRows& x, const LowRankGradients& out,
                                     float* workspace, cudaStream_t stream) {
  if (!supported(p)) return cudaErrorNotSupported;
  if (p.entries * p.tokens * p.width == 0) return cudaSuccess;
  return by_type(x.dtype, [&](auto type) {
    return gradient<decltype(type)>(p, grad, x, out, workspace, stream);
  });
}

}  // namespace dreamreader
