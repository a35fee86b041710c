// Where many indices go under a permutation.
#include "permutation.h"

#include "op.h"

namespace dreamreader {
namespace {

bool dense_int64(const TensorView& t) {
  return t.dims() == 1 && t.is(kDLInt, 64) && t.device().type == kDLCPU && dense(t);
}

void permuted_cpu(py::handle indices, py::handle out, int64_t n, uint64_t seed) {
  const TensorView in(indices), result(out);
  require(dense_int64(in) && dense_int64(result) && in.size(0) == result.size(0),
          "permuted: indices and out must be dense int64 of one length");
  require(n >= 1 && n <= kPermutationMost, "permuted: n must be 1 .. 2^62");
  const int64_t* from = reinterpret_cast<const int64_t*>(in.data());
  int64_t* to = reinterpret_cast<int64_t*>(result.data());
  const int64_t size = in.size(0);
  const Permutation permutation(n, seed);
  py::gil_scoped_release release;
  for (int64_t i = 0; i < size; ++i) to[i] = permutation(from[i]);
}

Bind bind_permutation([](py::module_& m) { m.def("permuted_cpu", &permuted_cpu); });

}  // namespace
}  // namespace dreamreader
