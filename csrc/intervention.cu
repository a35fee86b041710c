// CUDA launch of the intervention program: one launch, one pass over memory, see
// intervention_tile.h.
#include <algorithm>
#include <utility>

#include "cuda_shared.h"
#include "intervention_tile.h"

namespace dreamreader {
namespace {

constexpr int64_t kMaxGridY = 65535;
constexpr int kWarpsPerBlock = 4;  // where a warp is a whole group

template <typename T, typename W, int kTokens, int kChannels, int kTokenRun, int kChannelRun,
          bool kShared, int kThreads>
__global__ void __launch_bounds__(kThreads)
    intervention_kernel(const __grid_constant__ Job<W> job) {
  extern __shared__ __align__(16) char shared[];
  const uint32_t group = blockIdx.x * blockDim.y + threadIdx.y;
  if (group >= job.groups) return;  // only where a warp is a group, so no block barrier follows
  Tile<T, W, kTokens, kChannels, kTokenRun, kChannelRun, kShared> tile(
      job, group, shared + threadIdx.y * job.group_bytes);
  bool work = tile.scan();
  // Threads beside each other may hold different tokens; barriers need all of them or none.
  if (job.sums && job.across > 1) {
    work = tile.lanes > kWarp ? __syncthreads_or(work) != 0 : __any_sync(kAllLanes, work) != 0;
  }
  if (work) {
    tile.load();
    tile.run();
  }
  const uint32_t seen = work || job.copy ? tile.store() : 0;
  if (job.seen) tile.tell(seen);
}

// How a problem is cut into groups.
struct Cut {
  int64_t across = 1;  // threads along the tokens
  int64_t slots = 1;   // threads along the channels
  bool fits = true;    // programs with sums: a row fits into the registers of a block
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cut for up to `threads` threads of `tokens_each` x `channels_each` elements. `wanted` threads
// along the tokens make the accesses wide where tokens are contiguous; rows that need many threads
// leave fewer.
Cut cut_for(const StridedRows& x, bool sums, int64_t tokens_each, int64_t channels_each,
            int64_t wanted, int64_t threads) {
  Cut cut;
  const int64_t per_row = divide_up(x.width, channels_each);
  const int64_t slots =
      sums ? per_row : std::min<int64_t>(per_row, std::max<int64_t>(256 / wanted, 1));
  cut.fits = slots <= threads;
  while (cut.across < wanted && cut.across * 2 * slots <= threads &&
         cut.across * tokens_each < x.tokens) {
    cut.across *= 2;
  }
  const int64_t lanes = divide_up(cut.across * slots, kWarp) * kWarp;
  cut.slots = lanes / cut.across;
  return cut;
}

// Bytes of shared memory of one group.
template <typename Shape, typename W>
int64_t bytes_of(const Job<W>& job, const Cut& cut) {
  const int64_t lanes = cut.across * cut.slots;
  int64_t bytes = Shape::kHeld * lanes * int64_t{sizeof(W)};
  if (job.sums) {
    int64_t most = 1;  // vectors of one step
    for (int p = 0; p < job.program.count; ++p)
      most = std::max<int64_t>(most, job.program.steps[p].count);
    const int64_t warps = lanes > kWarp ? lanes / kWarp : 0;
    const int64_t sums = warps * Shape::kSums + Shape::sums_kept(most);
    bytes += divide_up(sums * cut.across * int64_t{sizeof(W)}, 16) * 16;
  }
  return bytes;
}

// The cut for as many threads as a block of this device has shared memory for, up to `threads`.
template <typename Shape, typename W>
Cut cut_within(const Job<W>& job, int64_t tokens_each, int64_t channels_each, int64_t wanted,
               int64_t threads) {
  Cut cut = cut_for(job.in, job.sums, tokens_each, channels_each, wanted, threads);
  if (!cut.fits || bytes_of<Shape>(job, cut) <= kSharedUnasked) return cut;
  const int64_t limit = shared_limit();
  while (cut.fits && bytes_of<Shape>(job, cut) > limit) {
    threads -= kWarp;
    cut = cut_for(job.in, job.sums, tokens_each, channels_each, wanted, threads);
  }
  return cut;
}

template <typename T, typename W, int kTokens, int kChannels, int kTokenRun, int kChannelRun,
          bool kShared, int kThreads>
cudaError_t launch(Job<W> job, const Cut& cut, cudaStream_t stream) {
  using Shape = Tile<T, W, kTokens, kChannels, kTokenRun, kChannelRun, kShared>;
  const auto kernel =
      intervention_kernel<T, W, kTokens, kChannels, kTokenRun, kChannelRun, kShared, kThreads>;
  const StridedRows& x = job.in;
  const int64_t lanes = cut.across * cut.slots;
  const int64_t blocks = divide_up(x.tokens, cut.across * kTokens);
  const int64_t groups = x.entries * blocks;
  const int64_t grid_y = divide_up(x.width, cut.slots * kChannels);
  // Tokens and channels are counted in 32 bits, with room for the last block; addresses in 64.
  if (groups > INT32_MAX || grid_y > kMaxGridY || x.tokens > INT32_MAX / 2 ||
      x.width > INT32_MAX / 2) {
    return cudaErrorNotSupported;
  }
  job.across = int32_t(cut.across);
  job.blocks = uint32_t(blocks);
  job.groups = uint32_t(groups);
  job.group_bytes = int32_t(bytes_of<Shape>(job, cut));
  int64_t per_block = 1;
  if (lanes == kWarp) {
    per_block = kWarpsPerBlock;
    while (per_block > 1 && per_block * job.group_bytes > kSharedUnasked) per_block /= 2;
  }
  const int64_t bytes = per_block * job.group_bytes;
  if (bytes > kSharedUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(divide_up(groups, per_block)), unsigned(grid_y));
  config.blockDim = dim3(unsigned(lanes), unsigned(per_block));
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, job);
}

// Tokens as channels.
StridedRows turned(StridedRows x) {
  std::swap(x.tokens, x.width);
  std::swap(x.stride_token, x.stride_channel);
  return x;
}

// Launches the tile of this shape if a row fits into it; `wanted` as in cut_for.
template <typename T, typename W, int kTokens, int kChannels, int kTokenRun, int kChannelRun,
          bool kShared, int kThreads>
bool launched(const Job<W>& job, int64_t wanted, cudaStream_t stream, cudaError_t& error) {
  using Shape = Tile<T, W, kTokens, kChannels, kTokenRun, kChannelRun, kShared>;
  const Cut cut = cut_within<Shape>(job, kTokens, kChannels, wanted, kThreads);
  if (!cut.fits) return false;
  error =
      launch<T, W, kTokens, kChannels, kTokenRun, kChannelRun, kShared, kThreads>(job, cut, stream);
  return true;
}

template <typename T, typename W>
cudaError_t launch_typed(const Job<W>& job, cudaStream_t stream) {
  constexpr int kRun = int(sizeof(uint4) / sizeof(T));
  const StridedRows &x = job.in, &y = job.out;
  cudaError_t error = cudaErrorNotSupported;  // rows that no block holds
  int most = 1;                               // vectors of one step
  for (int p = 0; p < job.program.count; ++p)
    most = std::max(most, int(job.program.steps[p].count));
  if constexpr (std::is_same_v<W, float>) {
    const bool channels = in_runs(x, kRun) && in_runs(y, kRun) && aligned(job.program.vectors);
    const bool tokens = in_runs(turned(x), kRun) && in_runs(turned(y), kRun);
    // Four rows share each read of the subspace.
    if (channels && most > 1 && launched<T, W, 4, 8, 1, kRun, false, 512>(job, 1, stream, error))
      return error;
    if (channels && most == 1 && launched<T, W, 1, 16, 1, kRun, false, 896>(job, 1, stream, error))
      return error;
    // 640 threads hold 16 tokens, a 32-byte sector, of 1280 channels.
    if (tokens && launched<T, W, kRun, 32 / kRun, kRun, 1, false, 640>(job, 8, stream, error))
      return error;
  }
  constexpr int kThreads = std::is_same_v<W, double> ? 512 : 1024;
  const bool along_tokens = x.stride_token < x.stride_channel;
  launched<T, W, 1, 32, 1, 1, true, kThreads>(job, along_tokens ? kWarp : 1, stream, error);
  return error;
}

template <typename W>
Job<W> job_of(const StridedRows& in, const StridedRows& out, const Program<W>& program,
              int32_t* seen) {
  Job<W> job = {};
  job.in = in;
  job.out = out;
  job.program = program;
  job.copy = in.data != out.data;
  job.seen = seen;
  for (int p = 0; p < program.count; ++p) {
    const int32_t kind = program.steps[p].kind;
    job.sums = job.sums || kind == kClampComponent || kind == kProject || kind == kRenorm;
  }
  return job;
}

template <typename W>
bool nothing_to_do(const Job<W>& job) {
  return values_in(job.in) == 0 || (!job.copy && job.program.count == 0);
}

}  // namespace

cudaError_t launch_intervention(const StridedRows& in, const StridedRows& out,
                                const Program<float>& program, cudaStream_t stream, int32_t* seen) {
  const Job<float> job = job_of(in, out, program, seen);
  if (nothing_to_do(job)) return cudaSuccess;
  return by_type(in.dtype, [&]<typename T>(T) { return launch_typed<T>(job, stream); });
}

cudaError_t launch_intervention(const StridedRows& in, const StridedRows& out,
                                const Program<double>& program, cudaStream_t stream,
                                int32_t* seen) {
  const Job<double> job = job_of(in, out, program, seen);
  if (in.dtype != DType::f64) return cudaErrorInvalidValue;
  if (nothing_to_do(job)) return cudaSuccess;
  return launch_typed<double>(job, stream);
}

}  // namespace dreamreader
