// CUDA kernels of the low-rank edit, see low_rank.h. Every pointer is device memory.
#pragma once

#include <cuda_runtime_api.h>

#include "low_rank.h"

namespace dreamreader {

constexpr int kMaxCudaRank = 64;
constexpr int kMaxCudaWidth = 8192;

// y from x, in place when their data agree: rows that keep their bits are then not written. Ranks,
// widths and types that the kernels do not take give cudaErrorNotSupported; so everywhere below.
cudaError_t launch_low_rank(const LowRank<float>& p, const StridedRows& x, const StridedRows& y,
                            cudaStream_t stream);

// What the gradient gives; null where it is not asked for (`bias` goes with `down`).
struct LowRankGradients {
  StridedRows dx;
  float* down;      // dA: [adapters, rank, width]
  float* bias;      // db: [adapters, rank]
  float* up;        // dU: [adapters, rank, width]
  float* strength;  // ds: [entries, tokens]
};

// Floats that the gradient needs beside its results; the launch finds the same number.
int64_t low_rank_workspace(const LowRank<float>& p);

// In two or three launches. Sums over rows are formed in a fixed order.
cudaError_t launch_low_rank_backward(const LowRank<float>& p, const StridedRows& grad,
                                     const StridedRows& x, const LowRankGradients& out,
                                     float* workspace, cudaStream_t stream);

}  // namespace dreamreader
