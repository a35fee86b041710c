// How much shared memory a block may have, which differs between devices (of capability 7.5: 64
// KiB, 8.0: 163, 8.6 and 8.9: 99, 9.0 and 10.0: 227).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dreamreader {

constexpr int64_t kSharedUnasked = 48 << 10;  // every device gives this without being asked

// Bytes that a block may ask for on the current device; the least where it does not say.
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess)
    return kSharedUnasked;
  return bytes > kSharedUnasked ? bytes : kSharedUnasked;
}

}  // namespace dreamreader
