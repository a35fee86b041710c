// CUDA kernels of the packing. Every pointer of the job is device memory; nothing is checked.
#pragma once

#include <cuda_runtime_api.h>

#include "pack.h"

namespace dreamreader {

cudaError_t pack_cuda(const PackJob& job, cudaStream_t stream);

}  // namespace dreamreader
