// Bindings of the CUDA kernels of the low-rank edit: from tensors to a launch.
#ifdef DREAMREADER_CUDA
#include "low_rank_cuda.h"

#include <string>

#include "cuda_device.h"
#include "op.h"

namespace dreamreader {
namespace {

void require_there(const TensorView& t, DLDevice device) {
  require(t.device().type == kDLCUDA && t.device().id == device.id,
          "low_rank_cuda: all tensors must be on the CUDA device of x");
}

// Rows like those of x; `written`: none may share memory with another.
StridedRows rows_like(const TensorView& t, const TensorView& x, bool written) {
  require_there(t, x.device());
  require(t.dims() == 3, "low_rank_cuda: x must be [entries, tokens, width]");
  require(same_shape(t, x), "low_rank_cuda: x, results and gradients differ in shape");
  if (written) require_apart(t, "low_rank_cuda");
  const StridedRows rows = rows_of(t, "low_rank_cuda");
  require(rows.dtype == float_type(x, "low_rank_cuda"), "low_rank_cuda: dtypes differ");
  return rows;
}

// A dense float32 tensor; the last size may be left out (-1).
float* dense_floats(const TensorView& t, DLDevice device, int64_t a, int64_t b, int64_t c) {
  require_there(t, device);
  const bool fits = t.is(kDLFloat, 32) && t.dims() == (c < 0 ? 2 : 3) && t.size(0) == a &&
                    t.size(1) == b && (c < 0 || t.size(2) == c) && dense(t);
  if (!fits) {
    const std::string wanted =
        std::to_string(a) + ", " + std::to_string(b) + (c < 0 ? "" : ", " + std::to_string(c));
    throw std::invalid_argument("low_rank_cuda: expected dense float32 [" + wanted + "], got " +
                                t.describe());
  }
  return reinterpret_cast<float*>(t.data());
}

LowRank<float> program_of(const TensorView& x, py::handle down, py::handle bias, py::handle up,
                          py::handle strength, py::handle index) {
  const TensorView a(down), s(strength), at(index);
  require(x.dims() == 3 && a.dims() == 3, "low_rank_cuda: x and down must have three dimensions");
  LowRank<float> p = {};
  p.entries = x.size(0);
  p.tokens = x.size(1);
  p.width = x.size(2);
  p.adapters = a.size(0);
  p.rank = a.size(1);
  require(p.adapters >= 1 && p.rank >= 1, "low_rank_cuda: there is no adapter");
  p.down = dense_floats(a, x.device(), p.adapters, p.rank, p.width);
  p.bias = dense_floats(TensorView(bias), x.device(), p.adapters, p.rank, -1);
  p.up = dense_floats(TensorView(up), x.device(), p.adapters, p.rank, p.width);
  require_there(s, x.device());
  require(s.dims() == 2 && s.size(0) == p.entries && s.size(1) == p.tokens && s.is(kDLFloat, 32),
          "low_rank_cuda: strength must be float32 [entries, tokens]");
  p.strength = reinterpret_cast<const float*>(s.data());
  p.strength_entry = s.stride(0);
  p.strength_token = s.stride(1);
  require_there(at, x.device());
  require(at.dims() == 1 && at.size(0) == p.entries && at.is(kDLInt, 64),
          "low_rank_cuda: index must be int64 [entries]");
  p.index = reinterpret_cast<const int64_t*>(at.data());
  p.index_entry = at.stride(0);
  return p;
}

void low_rank_cuda(py::handle x, py::handle out, py::handle down, py::handle bias, py::handle up,
                   py::handle strength, py::handle index) {
  const TensorView in(x);
  const LowRank<float> p = program_of(in, down, bias, up, strength, index);
  const StridedRows from = rows_like(in, in, false), to = rows_like(TensorView(out), in, true);
  const OnDevice on(in.device().id);
  check_cuda(launch_low_rank(p, from, to, static_cast<cudaStream_t>(in.stream())), "low_rank_cuda");
}

// Floats of workspace for these sizes.
int64_t workspace_cuda(int64_t entries, int64_t tokens, int64_t width, int64_t rank,
                       int64_t adapters) {
  LowRank<float> p = {};
  p.entries = entries;
  p.tokens = tokens;
  p.width = width;
  p.rank = rank;
  p.adapters = adapters;
  return low_rank_workspace(p);
}

// dx and the gradients of the tables and the strength may be None; that of bias goes with `down`.
void low_rank_backward_cuda(py::handle grad, py::handle x, py::handle down, py::handle bias,
                            py::handle up, py::handle strength, py::handle index, py::handle dx,
                            py::handle d_down, py::handle d_bias, py::handle d_up,
                            py::handle d_strength, py::handle workspace) {
  const TensorView in(x), memory(workspace);
  const LowRank<float> p = program_of(in, down, bias, up, strength, index);
  const auto floats = [&](py::handle t, int64_t a, int64_t b, int64_t c) {
    return t.is_none() ? nullptr : dense_floats(TensorView(t), in.device(), a, b, c);
  };
  LowRankGradients out = {};
  if (!dx.is_none()) out.dx = rows_like(TensorView(dx), in, true);
  require(d_down.is_none() == d_bias.is_none(), "low_rank_cuda: d_bias goes with d_down");
  out.down = floats(d_down, p.adapters, p.rank, p.width);
  out.bias = floats(d_bias, p.adapters, p.rank, -1);
  out.up = floats(d_up, p.adapters, p.rank, p.width);
  out.strength = floats(d_strength, p.entries, p.tokens, -1);
  require_there(memory, in.device());
  require(memory.dims() == 1 && memory.is(kDLFloat, 32) && dense(memory) &&
              memory.size(0) >= low_rank_workspace(p),
          "low_rank_cuda: the workspace must be dense float32 and large enough");
  const StridedRows given = rows_like(TensorView(grad), in, false), from = rows_like(in, in, false);
  const OnDevice on(in.device().id);
  check_cuda(launch_low_rank_backward(p, given, from, out, reinterpret_cast<float*>(memory.data()),
                                      static_cast<cudaStream_t>(in.stream())),
             "low_rank_backward_cuda");
}

Bind bind_low_rank_cuda([](py::module_& m) {
  m.def("low_rank_cuda", &low_rank_cuda);
  m.def("low_rank_workspace_cuda", &workspace_cuda);
  m.def("low_rank_backward_cuda", &low_rank_backward_cuda);
});

}  // namespace
}  // namespace dreamreader
#endif
