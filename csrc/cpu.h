// Which of the instruction sets that were compiled runs here.
#pragma once

#include <string>

namespace dreamreader {

enum class Isa { portable, avx2, avx512 };

Isa isa();  // the best that this processor has, unless `use_isa` said otherwise
void use_isa(const std::string&
                 name);  // "portable", "avx2", "avx512" or "best"; throws if not available here
const char* name_of(Isa isa);

}  // namespace dreamreader
