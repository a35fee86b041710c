#include "cpu.h"

#include <atomic>
#include <stdexcept>

#include "bind.h"

namespace dreamreader {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa> chosen{best()};

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : (isa == Isa::avx2 ? "avx2" : "portable");
}

void use_isa(const std::string& name) {
  for (Isa each : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name == name_of(each) && each <= best()) {
      chosen = each;
      return;
    }
  }
  if (name != "best")
    throw std::invalid_argument("instruction set " + name + " is not available here; best is " +
                                name_of(best()));
  chosen = best();
}

static Bind bind_cpu([](pybind11::module_& m) {
  m.def("isa", [] { return name_of(isa()); });
  m.def("use_isa", &use_isa);
});

}  // namespace dreamreader
