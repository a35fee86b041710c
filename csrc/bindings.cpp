// The one Python module. Operators bind themselves (bind.h); here is only what the build says about
// itself, and the Python names of errors.
#include <new>
#include <system_error>

#include "bind.h"
#include "cpu.h"
#include "refusal.h"

#ifdef DREAMREADER_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

// What the system refused: a thread, for example, as OSError(number, text), or memory.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::system_error& refused) {
    const auto values = pybind11::make_tuple(refused.code().value(), refused.what());
    PyErr_SetObject(PyExc_OSError, values.ptr());
  } catch (const dreamreader::OutOfMemory& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_SetString(PyExc_MemoryError, "dreamreader: the system has no memory left for this call");
  }
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = DREAMREADER_VERSION;
  info["compiler"] = __VERSION__;
  info["isa"] = dreamreader::name_of(dreamreader::isa());
#ifdef NDEBUG
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
#ifdef DREAMREADER_CUDA
  info["compiled"] = "with CUDA";
  info["cuda"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_archs"] = DREAMREADER_CUDA;
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    info["driver"] = "no CUDA driver";
  else
    info["driver"] = std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
#else
  info["compiled"] = "for CPU only";
  info["cuda"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of dreamreader; tensors come in through DLPack.";
  m.def("build_info", &build_info);
  pybind11::register_local_exception<dreamreader::NotTaken>(m, "NotTaken");
  pybind11::register_local_exception<dreamreader::NoCode>(m, "NoCode");
  pybind11::register_local_exception_translator(&translate);
  for (auto bind : dreamreader::binders()) bind(m);
}
