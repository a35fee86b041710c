// The CUDA source of the packing, compiled for the CPU, behind one C function.
#include "../../csrc/pack.cu"

#include <cstdio>

namespace dreamreader {
namespace {
alignas(16) char shared[twin::kShared];  // what the kernels declare as extern
}
}  // namespace dreamreader

char* twin::shared_memory() { return dreamreader::shared; }

// Plain integers and pointers, in the order of tests/twin/__init__.py.
struct Call {
  const void *x, *minus, *places, *groups;
  void *out, *scales, *not_finite;
  int64_t source, stored, pool, rows, features;
  int64_t x_strides[3], minus_strides[3];
};

// Returns the CUDA error, or -1 with a message where the twin found something; counts the launches.
extern "C" int pack(const Call* c, int64_t* launches, char* message, size_t size) {
  using namespace dreamreader;
  PackJob job = {};
  const auto rows = [&](const void* data, const int64_t* s) {
    return StridedRows{
        const_cast<void*>(data), DType(c->source), 0, 0, c->features, s[0], s[1], s[2]};
  };
  job.x = rows(c->x, c->x_strides);
  job.minus = rows(c->minus, c->minus_strides);
  job.places = static_cast<const int32_t*>(c->places);
  job.groups = static_cast<const int32_t*>(c->groups);
  job.out = c->out;
  job.scales = static_cast<float*>(c->scales);
  job.not_finite = static_cast<int64_t*>(c->not_finite);
  job.stored = Stored(c->stored);
  job.pool = Pool(c->pool);
  job.rows = c->rows;
  twin::error.clear();
  twin::launches = 0;
  const cudaError_t error = pack_cuda(job, nullptr);
  *launches = twin::launches;
  std::snprintf(message, size, "%s", twin::error.c_str());
  return twin::error.empty() ? int(error) : -1;
}
