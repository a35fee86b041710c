// The CUDA source of the low-rank edit and its gradient, compiled for the CPU, behind one C
// function.
#include "../../csrc/low_rank.cu"

#include <cstdio>

namespace dreamreader {
namespace {
alignas(16) char shared[twin::kShared];  // what the kernels declare as extern
}
}  // namespace dreamreader

char* twin::shared_memory() { return dreamreader::shared; }

// Plain integers and pointers, in the order of tests/twin/__init__.py.
struct Call {
  int64_t dtype;
  int64_t sizes[5];  // entries, tokens, width, rank, adapters
  const float *down, *bias, *up, *strength;
  int64_t strength_strides[2];
  const int64_t* index;
  int64_t index_stride;
  void *x, *out, *grad;  // grad: null for the edit, otherwise out is dx, which may be null
  int64_t x_strides[3], out_strides[3], grad_strides[3];
  float *d_down, *d_bias, *d_up, *d_strength, *workspace;
};

dreamreader::LowRank<float> arguments_of(const Call& c) {
  return {c.sizes[0],
          c.sizes[1],
          c.sizes[2],
          c.sizes[3],
          c.sizes[4],
          c.down,
          c.bias,
          c.up,
          c.strength,
          c.strength_strides[0],
          c.strength_strides[1],
          c.index,
          c.index_stride};
}

extern "C" int64_t workspace(const Call* c) {
  return dreamreader::low_rank_workspace(arguments_of(*c));
}

// Returns the CUDA error, or -1 with a message where the twin found something; counts the launches.
extern "C" int low_rank(const Call* c, int64_t* launches, char* message, size_t size) {
  using namespace dreamreader;
  const LowRank<float> p = arguments_of(*c);
  const auto rows = [&](void* data, const int64_t* strides) {
    return StridedRows{data,    DType(c->dtype), p.entries,  p.tokens,
                       p.width, strides[0],      strides[1], strides[2]};
  };
  const StridedRows x = rows(c->x, c->x_strides), out = rows(c->out, c->out_strides);
  twin::error.clear();
  twin::launches = 0;
  cudaError_t error;
  if (c->grad) {
    const LowRankGradients gradients = {out, c->d_down, c->d_bias, c->d_up, c->d_strength};
    error = launch_low_rank_backward(p, rows(c->grad, c->grad_strides), x, gradients, c->workspace,
                                     nullptr);
  } else {
    error = launch_low_rank(p, x, out, nullptr);
  }
  *launches = twin::launches;
  std::snprintf(message, size, "%s", twin::error.c_str());
  return twin::error.empty() ? int(error) : -1;
}
