#include "cpu.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "bind.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dreamreader {
namespace {

#if defined(__x86_64__)
// Linux hands the tiles out to processes that ask.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr int kAskPermission = 0x1023, kTileData = 18;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTiles) &&
         syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return has_amx() ? Isa::amx : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

const Isa known = best();
std::atomic<Isa> chosen{known};

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

const char* name_of(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "amx"};
  return names[int(isa)];
}

void use_isa(const char* text) {
  const std::string name = text;
  for (Isa each : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (name == name_of(each) && each <= known) {
      chosen = each;
      return;
    }
  }
  if (name != "best")
    throw std::invalid_argument("instruction set " + name + " is not available here; best is " +
                                name_of(known));
  chosen = known;
}

static Bind bind_cpu([](pybind11::module_& m) {
  m.def("isa", [] { return name_of(isa()); });
  m.def("use_isa", &use_isa);
});

}  // namespace dreamreader
