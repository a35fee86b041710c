#pragma once

#include <cuda_runtime_api.h>

namespace dreamreader {

// cudaSuccess if the kernels run on the current device, else why they do not.
cudaError_t find_code();

}  // namespace dreamreader
