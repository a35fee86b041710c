// Streams, events and copies of CUDA on threads of the CPU: enough to run what orders the work of a
// GPU. Everything on a stream happens late, at its own pace; memory of the GPU starts as garbage.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <thread>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorNotSupported = 801
};
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3
};
constexpr unsigned cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1;
constexpr unsigned cudaHostRegisterDefault = 0, cudaHostAllocDefault = 0;

namespace twin {

inline std::mutex lock;
inline std::condition_variable moved;
inline int64_t allocations = 0, waits = 0, ended = 0;
inline int64_t held = 0;   // allocations, events and streams that were not given back
inline int64_t left = -1;  // allocations until there is no memory; -1: never
inline void* registered = nullptr;

struct Event {
  int64_t recorded = 0, reached = 0;
};

struct Stream {
  Stream(int most_micro) : most_micro(most_micro), thread([this] { run(); }) {}
  ~Stream() {
    {
      const std::lock_guard guard(lock);
      stopping = true;
    }
    moved.notify_all();
    thread.join();
  }
  void add(std::function<void()> work) {
    {
      const std::lock_guard guard(lock);
      queue.push(std::move(work));
    }
    moved.notify_all();
  }
  void run() {
    std::mt19937 random(7);
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock guard(lock);
        moved.wait(guard, [this] { return stopping || !queue.empty(); });
        if (queue.empty()) return;
        work = std::move(queue.front());
        queue.pop();
        busy = true;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(int(random() % unsigned(most_micro))));
      work();
      {
        const std::lock_guard guard(lock);
        busy = false;
      }
      moved.notify_all();
    }
  }

  const int most_micro;
  bool stopping = false, busy = false;
  std::queue<std::function<void()>> queue;
  std::thread thread;
};

}  // namespace twin

using cudaStream_t = twin::Stream*;
using cudaEvent_t = twin::Event*;

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the twin"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMalloc(void** found, size_t bytes) {
  if (twin::left == 0) return cudaErrorMemoryAllocation;
  if (twin::left > 0) --twin::left;
  ++twin::allocations;
  ++twin::held;
  *found = std::malloc(bytes);
  std::memset(*found, 0xa5, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** found, size_t bytes, unsigned) {
  return cudaMalloc(found, bytes);
}
inline cudaError_t cudaFree(void* memory) { return --twin::held, std::free(memory), cudaSuccess; }
inline cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
inline cudaError_t cudaHostRegister(void* memory, size_t, unsigned) {
  if (twin::registered) return cudaErrorHostMemoryAlreadyRegistered;
  return twin::registered = memory, cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void*) { return twin::registered = nullptr, cudaSuccess; }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  ++twin::held;
  return *stream = new twin::Stream(400), cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return --twin::held, delete stream, cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (twin::left == 0) return cudaErrorMemoryAllocation;
  if (twin::left > 0) --twin::left;
  ++twin::allocations;
  ++twin::held;
  return *event = new twin::Event, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return --twin::held, delete event, cudaSuccess;
}

inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  int64_t number;
  {
    const std::lock_guard guard(twin::lock);
    number = ++event->recorded;
  }
  stream->add([=] {
    const std::lock_guard guard(twin::lock);
    event->reached = number;
  });
  return cudaSuccess;
}
inline void wait_for(cudaEvent_t event, int64_t number) {
  std::unique_lock guard(twin::lock);
  twin::moved.wait(guard, [=] { return event->reached >= number; });
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  int64_t number;
  {
    const std::lock_guard guard(twin::lock);
    number = event->recorded;
  }
  stream->add([=] { wait_for(event, number); });
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  int64_t number;
  {
    const std::lock_guard guard(twin::lock);
    number = event->recorded;
  }
  wait_for(event, number);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  std::unique_lock guard(twin::lock);
  ++twin::waits;
  twin::moved.wait(guard, [=] { return stream->queue.empty() && !stream->busy; });
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}  // the test waits for its streams

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  stream->add([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  stream->add([=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}
