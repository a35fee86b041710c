// CPU side of the packing: choice of instruction set and threads, from tensors to a job. At the
// foot the bindings, for CUDA too.
#include <algorithm>

#include "op.h"
#include "pack_cpu.h"
#ifdef DREAMREADER_CUDA
#include "cuda_device.h"
#include "pack_cuda.h"
#endif

namespace dreamreader {

void pack_cpu(const PackJob& job, int threads) {
  if (job.rows <= 0) return;
  const int64_t places = job.groups ? job.groups[job.rows] - job.groups[0] : job.rows;
  const int64_t bytes = places * job.x.width * size_of(job.x.dtype) / job.rows;  // of one row
  const int64_t unit = job.x.stride_channel == 1 ? 1 : kPackTile;
  const auto run = pack_kernels().run[job.x.dtype];
  share(job.rows, grain_of(job.rows, bytes, threads, unit), threads,
        [&](int64_t first, int64_t last) { run(job, first, last); });
}

namespace {

// Whether a tensor of this element type, [rows] or [rows, width], lies in memory without gaps.
bool dense(const TensorView& t, uint8_t code, int bits, int64_t rows, int64_t width) {
  return t.is(code, bits) && t.dims() == (width < 0 ? 1 : 2) && t.size(0) == rows &&
         (width < 0 || t.size(1) == width) && dense(t);
}

// A job from the operator's arguments; `out` of f8 comes as bytes.
PackJob job_of(py::handle out, py::handle scales, py::handle not_finite, py::handle x,
               py::handle places, py::handle minus, py::handle groups, int pool, int stored,
               int device) {
  static constexpr int kBits[] = {32, 16, 16, 8, 8};
  static constexpr uint8_t kCodes[] = {kDLFloat, kDLBfloat, kDLFloat, kDLUInt, kDLInt};
  const TensorView in(x), at(places), to(out);
  require(in.dims() == 3, "pack: x must be [entries, tokens, features]");
  require(0 <= pool && pool <= 2 && 0 <= stored && stored <= 4, "pack: unknown pool or type");
  require((pool != 0) == !groups.is_none(), "pack: groups go with a pool");
  require((stored >= 3) == !scales.is_none(), "pack: scales go with 8-bit types");
  PackJob job{};
  job.x = rows_of(in, "pack");
  job.pool = Pool(pool);
  job.stored = Stored(stored);
  job.rows = to.dims() == 2 ? to.size(0) : -1;
  const int64_t count = at.dims() == 2 ? at.size(0) : -1;
  require(dense(at, kDLInt, 32, count, 2), "pack: places must be dense int32 [places, 2]");
  require(dense(to, kCodes[stored], kBits[stored], job.rows, job.x.width),
          "pack: out must be dense [rows, features]");
  require(pool != 0 || job.rows == count, "pack: out must have a row for each place");
  job.places = reinterpret_cast<const int32_t*>(at.data());
  job.out = to.data();
  auto check_device = [device](const TensorView& t) {
    require(t.device().type == device, "pack: a tensor is on another kind of device");
  };
  for (const TensorView* each : {&in, &at, &to}) check_device(*each);
  if (!minus.is_none()) {
    const TensorView view(minus);
    check_device(view);
    require(same_shape(view, in) && float_type(view, "pack") == job.x.dtype,
            "pack: minus must have the shape and type of x");
    job.minus = rows_of(view, "pack");
  }
  if (!groups.is_none()) {
    const TensorView view(groups);
    check_device(view);
    require(dense(view, kDLInt, 32, job.rows + 1, -1), "pack: groups must be int32 [rows + 1]");
    job.groups = reinterpret_cast<const int32_t*>(view.data());
  }
  if (!scales.is_none()) {
    const TensorView view(scales);
    check_device(view);
    require(dense(view, kDLFloat, 32, job.rows, -1), "pack: scales must be float32 [rows]");
    job.scales = reinterpret_cast<float*>(view.data());
  }
  if (!not_finite.is_none()) {
    const TensorView view(not_finite);
    check_device(view);
    require(dense(view, kDLInt, 64, 1, -1), "pack: not_finite must be int64 [1]");
    job.not_finite = reinterpret_cast<int64_t*>(view.data());
  }
  return job;
}

void check_places(const PackJob& job, int64_t count, int64_t entries, int64_t tokens) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* at = job.places + 2 * i;
    require(0 <= at[0] && at[0] < entries && 0 <= at[1] && at[1] < tokens,
            "pack: a place is outside x");
  }
  if (!job.groups) return;
  require(job.groups[0] >= 0 && job.groups[job.rows] <= count, "pack: a group is outside places");
  for (int64_t row = 0; row < job.rows; ++row)
    require(job.groups[row] < job.groups[row + 1], "pack: a group is empty");
}

void pack_tensors(py::handle out, py::handle scales, py::handle not_finite, py::handle x,
                  py::handle places, py::handle minus, py::handle groups, int pool, int stored,
                  int threads) {
  const PackJob job =
      job_of(out, scales, not_finite, x, places, minus, groups, pool, stored, kDLCPU);
  const TensorView in(x), at(places);
  check_places(job, at.size(0), in.size(0), in.size(1));
  py::gil_scoped_release release;
  pack_cpu(job, threads);
}

#ifdef DREAMREADER_CUDA

void pack_tensors_cuda(py::handle out, py::handle scales, py::handle not_finite, py::handle x,
                       py::handle places, py::handle minus, py::handle groups, int pool,
                       int stored) {
  const PackJob job =
      job_of(out, scales, not_finite, x, places, minus, groups, pool, stored, kDLCUDA);
  const TensorView in(x);
  const OnDevice on(in.device().id);
  check_cuda(pack_cuda(job, static_cast<cudaStream_t>(in.stream())), "pack_cuda");
}

#endif

Bind bind_pack([](py::module_& m) {
  m.def("pack_cpu", &pack_tensors);
#ifdef DREAMREADER_CUDA
  m.def("pack_cuda", &pack_tensors_cuda);
#endif
});

}  // namespace
}  // namespace dreamreader
