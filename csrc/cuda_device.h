// Calls to CUDA that may fail, the device that they go to, and who owns what they give.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "refusal.h"

namespace dreamreader {

inline void check_cuda(cudaError_t error, const char* where) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // else a later call would give it again
  const std::string text = std::string(where) + ": " + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorNotSupported:
      throw NotTaken(text);
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      throw NoCode(text);
    case cudaErrorMemoryAllocation:
      throw OutOfMemory(text);
    default:
      throw std::runtime_error(text);
  }
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda(cudaGetDevice(&before_), "cuda");
    if (before_ == device) return;
    check_cuda(cudaSetDevice(device), "cuda");
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Something of CUDA that `kFree` gives back: memory, a stream, an event.
template <typename T, cudaError_t (*kFree)(T)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(T held) : held_(held) {}
  Owned(Owned&& other) noexcept : held_(std::exchange(other.held_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(held_, other.held_);
    return *this;
  }
  ~Owned() {
    if (held_) kFree(held_);
  }
  T get() const { return held_; }

 private:
  T held_ = nullptr;
};

}  // namespace dreamreader
