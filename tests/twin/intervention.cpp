// The CUDA source of the intervention program, compiled for the CPU, behind one C function.
#include "../../csrc/intervention.cu"

#include <cstdio>

namespace dreamreader {
namespace {
alignas(16) char shared[twin::kShared];  // what the kernel declares as extern
}
}  // namespace dreamreader

char* twin::shared_memory() { return dreamreader::shared; }

// Plain integers and pointers, in the order of tests/twin/__init__.py.
struct Call {
  void *x, *out;
  int64_t dtype, rows, tokens, width;
  int64_t x_strides[3], out_strides[3];
  int64_t count;
  const int32_t* steps;
  const void* strength;
  int64_t strength_strides[3];
  const void *vectors, *limits;
  const uint8_t* masks;
  int64_t sources;
  int64_t source_fields[dreamreader::kMaxSources]
                       [8];  // data, dtype, entries, 2 strides, index, 2 strides
  int32_t* seen;
};

template <typename W>
cudaError_t run(const Call& c) {
  using namespace dreamreader;
  Program<W> p = {};
  p.count = int32_t(c.count);
  for (int i = 0; i < p.count; ++i) std::memcpy(&p.steps[i], c.steps + i * 9, sizeof(Step));
  p.strength = static_cast<const W*>(c.strength);
  p.strength_step = c.strength_strides[0];
  p.strength_row = c.strength_strides[1];
  p.strength_token = c.strength_strides[2];
  p.vectors = static_cast<const W*>(c.vectors);
  p.limits = static_cast<const W*>(c.limits);
  p.masks = c.masks;
  for (int i = 0; i < c.sources; ++i) {
    const int64_t* f = c.source_fields[i];
    p.sources[i] = {reinterpret_cast<const void*>(f[0]),    DType(f[1]), f[2], f[3], f[4],
                    reinterpret_cast<const int64_t*>(f[5]), f[6],        f[7]};
  }
  const auto side = [&](void* data, const int64_t* s) {
    return StridedRows{data, DType(c.dtype), c.rows, c.tokens, c.width, s[0], s[1], s[2]};
  };
  return launch_intervention(side(c.x, c.x_strides), side(c.out, c.out_strides), p, nullptr,
                             c.seen);
}

// Returns the CUDA error, or -1 with a message where the twin found something; counts the launches.
extern "C" int intervention(const Call* call, int64_t* launches, char* message, size_t size) {
  static_assert(sizeof(dreamreader::Step) == 9 * sizeof(int32_t));
  twin::error.clear();
  twin::launches = 0;
  const cudaError_t error = dreamreader::DType(call->dtype) == dreamreader::DType::f64
                                ? run<double>(*call)
                                : run<float>(*call);
  *launches = twin::launches;
  std::snprintf(message, size, "%s", twin::error.c_str());
  return twin::error.empty() ? int(error) : -1;
}
