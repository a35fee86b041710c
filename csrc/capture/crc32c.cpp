#include "crc32c.h"

#include "cpu.h"

namespace dreamreader {

void crc32c_rows(const RowBytes* parts, int count, int64_t rows, uint32_t* out) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::crc32c.run(parts, count, rows, out);
  if (isa() == Isa::avx2) return avx2::crc32c.run(parts, count, rows, out);
#endif
  portable::crc32c.run(parts, count, rows, out);
}

}  // namespace dreamreader
