// Enough of CUDA to run a kernel on the CPU: every thread of a block is a fiber, barriers and warp
// primitives switch between them. Stricter than a GPU: a barrier that not all threads reach, a
// 16-byte access that is not aligned and an impossible launch are reported; shared memory starts as
// garbage; threads and blocks run in shuffled order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim;

namespace twin {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
constexpr size_t kShared = 227 << 10;  // of sm_90, the most that there is
constexpr size_t kSharedAsked = 48 << 10;

enum class Wait { none, block, warp, shuffle, vote };

struct Fiber {
  ucontext_t begin;
  jmp_buf place;  // where it waits
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  Wait wait;
  bool entered = false, done = false;
};

inline std::string error;  // the first one
inline int64_t launches = 0;
inline size_t shared_allowed = kSharedAsked;
inline size_t shared_limit = kShared;  // of the device
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline int live = 0, current = 0;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mt19937 shuffle_order{7};
inline std::vector<uint64_t> slots;  // one for each thread, for warp primitives

inline void fail(const std::string& what) {
  if (error.empty()) error = what;
}

// Jumps, since each swapcontext calls the system twice.
inline void leave() {
  if (_setjmp(fibers[current]->place) == 0) _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  setcontext(&fiber.begin);
}

inline void wait(Wait what) {
  fibers[current]->wait = what;
  leave();
}

inline void enter() {
  for (;;) {  // one body after the other, of this block and later ones
    body();
    fibers[current]->done = true;
    leave();
  }
}

inline void begin(Fiber& fiber) {
  getcontext(&fiber.begin);
  fiber.begin.uc_stack.ss_sp = fiber.stack.get();
  fiber.begin.uc_stack.ss_size = kStack;
  fiber.begin.uc_link = nullptr;
  makecontext(&fiber.begin, enter, 0);
  fiber.entered = false;
}

// Releases fibers [first, last) if all of them wait for the same thing.
inline bool release(int first, int last, bool block) {
  const Wait what = fibers[first]->wait;
  if (what == Wait::none || (what == Wait::block) != block) return false;
  for (int i = first; i < last; ++i) {
    if (fibers[i]->done || fibers[i]->wait != what) return false;
  }
  for (int i = first; i < last; ++i) fibers[i]->wait = Wait::none;
  return true;
}

inline void run_block(dim3 block) {
  live = int(blockDim.x * blockDim.y);
  while (int(fibers.size()) < live) fibers.push_back(std::make_unique<Fiber>());
  slots.assign(live, ~uint64_t{0});
  blockIdx = block;
  std::vector<int> order(live);
  for (int i = 0; i < live; ++i) {
    Fiber& fiber = *fibers[i];
    order[i] = i;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x);
    fiber.wait = Wait::none;
    if (!fiber.done) begin(fiber);  // a new one, or one that was given up in its body
    fiber.done = false;
  }
  std::shuffle(order.begin(), order.end(), shuffle_order);
  for (;;) {
    bool moved = false, finished = true;
    for (int i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.done || fiber.wait != Wait::none) continue;
      current = i;
      threadIdx = fiber.index;
      resume(fiber);
      moved = true;
    }
    for (int w = 0; w < live; w += kWarp)
      moved = release(w, std::min(w + kWarp, live), false) || moved;
    moved = release(0, live, true) || moved;
    for (int i = 0; i < live; ++i) finished = finished && fibers[i]->done;
    if (finished) return;
    if (!moved) return fail("a barrier or warp primitive that not all threads reach");
  }
}

inline int warp_begin() { return current / kWarp * kWarp; }

template <typename T>
T shuffle_xor(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu || live % kWarp != 0) fail("a warp primitive without all lanes");
  std::memcpy(&slots[current], &value, sizeof(T));
  wait(Wait::shuffle);
  T other;
  std::memcpy(&other, &slots[warp_begin() + ((current % kWarp) ^ distance)], sizeof(T));
  wait(Wait::shuffle);
  return other;
}

// Bit i is set where value of thread first + i is not 0, up to 64 threads.
inline uint64_t ballot(int value, int first, int last, Wait what) {
  slots[current] = uint64_t(value != 0);
  wait(what);
  uint64_t result = 0;
  for (int i = first; i < last; ++i) result |= slots[i] << ((i - first) % 64);
  wait(what);
  return result;
}

inline int any(int value, int first, int last, Wait what) {
  return ballot(value, first, last, what) != 0;
}

// Allocates nothing: one block runs at a time.
inline char* shared_memory();

template <typename... P, typename... A>
cudaError_t launch(const cudaLaunchConfig_t& config, void (*kernel)(P...), A&&... arguments) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const unsigned threads = block.x * block.y * block.z;
  ++launches;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
      grid.y > 65535 || config.dynamicSmemBytes > shared_allowed) {
    fail("a launch that no GPU takes");
    return cudaErrorInvalidConfiguration;
  }
  shared_allowed = kSharedAsked;
  blockDim = block;
  body = [&] { kernel(arguments...); };
  std::vector<int64_t> order(int64_t(grid.x) * grid.y);
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  std::shuffle(order.begin(), order.end(), shuffle_order);
  for (int64_t i : order) {
    std::memset(shared_memory(), 0xff, config.dynamicSmemBytes);
    run_block(dim3(unsigned(i % grid.x), unsigned(i / grid.x)));
    if (!error.empty()) break;
  }
  return cudaSuccess;
}

}  // namespace twin

// 16 bytes that notice where they are read and written; what lies on a stack is no device memory.
struct uint4 {
  uint32_t words[4];
  uint4() = default;
  uint4(const uint4& from) { check(&from), std::memcpy(words, from.words, sizeof(words)); }
  uint4& operator=(const uint4& from) {
    check(this);
    std::memcpy(words, from.words, sizeof(words));
    return *this;
  }
  static void check(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0 && !on_stack(at))
      twin::fail("a 16-byte access that is not aligned");
  }
  static bool on_stack(const void* at) {
    const char* stack = twin::fibers[twin::current]->stack.get();
    return at >= stack && at < stack + twin::kStack;
  }
};

struct float4 {
  float x, y, z, w;
};

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return twin::shuffle_xor(mask, value, distance);
}
inline int __any_sync(unsigned mask, int value) {
  if (mask != 0xffffffffu) twin::fail("a warp primitive without all lanes");
  return twin::any(value, twin::warp_begin(), twin::warp_begin() + twin::kWarp, twin::Wait::vote);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  if (mask != 0xffffffffu) twin::fail("a warp primitive without all lanes");
  return unsigned(
      twin::ballot(value, twin::warp_begin(), twin::warp_begin() + twin::kWarp, twin::Wait::vote));
}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  const unsigned long long before = *to;
  *to += value;
  return before;
}
inline int32_t atomicOr(int32_t* to, int32_t value) {
  const int32_t before = *to;
  *to |= value;
  return before;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __syncwarp() { twin::wait(twin::Wait::warp); }
inline void __syncthreads() { twin::wait(twin::Wait::block); }
inline int __syncthreads_or(int value) {
  return twin::any(value, 0, twin::live, twin::Wait::block);
}

// Lets the twin be a device whose blocks have so many bytes of shared memory.
extern "C" __attribute__((used)) inline void limit_shared(int64_t bytes) {
  twin::shared_limit = size_t(bytes);
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = int(twin::shared_limit), cudaSuccess;
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int bytes) {
  if (size_t(bytes) > twin::shared_limit) return cudaErrorInvalidValue;
  twin::shared_allowed = size_t(bytes);
  return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  return twin::launch(*config, kernel, std::forward<A>(arguments)...);
}
