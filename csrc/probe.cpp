#ifdef DREAMREADER_CUDA
#include "probe.h"

#include <string>

#include "bind.h"
#include "cuda_device.h"

namespace dreamreader {
namespace {

// Why the kernels do not run on a device; empty where they do.
std::string why_not_on(int device) {
  try {
    const OnDevice on(device);
    check_cuda(find_code(), "the build is for " DREAMREADER_CUDA);
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

Bind bind_probe([](pybind11::module_& m) { m.def("why_not_on", &why_not_on); });

}  // namespace
}  // namespace dreamreader
#endif
