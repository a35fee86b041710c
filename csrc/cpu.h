// Which of the instruction sets that were compiled runs here, and the kernels compiled for each.
#pragma once

namespace dreamreader {

// amx: the kernels of avx512, some of which then use the tiles of AMX.
enum class Isa { portable, avx2, avx512, amx };

Isa isa();  // the best that this processor has, unless `use_isa` said otherwise
void use_isa(const char* name);  // of an instruction set, or "best"; throws if not available here
const char* name_of(Isa isa);

// Declares the table `name` that a file *_simd.cpp defines in the namespace of each instruction
// set, and name_kernels(), the one to use. Static: kernels of one set must not be linked to
// another's.
#if defined(__x86_64__)
#define DR_KERNELS(Type, name)                               \
  namespace portable {                                       \
  extern const Type name;                                    \
  }                                                          \
  namespace avx2 {                                           \
  extern const Type name;                                    \
  }                                                          \
  namespace avx512 {                                         \
  extern const Type name;                                    \
  }                                                          \
  [[maybe_unused]] static const Type& name##_kernels() {     \
    if (isa() >= Isa::avx512) return avx512::name;           \
    return isa() == Isa::avx2 ? avx2::name : portable::name; \
  }
#else
#define DR_KERNELS(Type, name) \
  namespace portable {         \
  extern const Type name;      \
  }                            \
  [[maybe_unused]] static const Type& name##_kernels() { return portable::name; }
#endif

}  // namespace dreamreader
