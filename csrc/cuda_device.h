// Calls to CUDA that may fail, and the device that they go to.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace dreamreader {

inline void check_cuda(cudaError_t error, const char* where) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(where) + ": " + cudaGetErrorString(error));
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

}  // namespace dreamreader
