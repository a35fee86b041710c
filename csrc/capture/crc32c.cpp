#include "crc32c.h"

namespace dreamreader {

void crc32c_rows(const RowBytes* parts, int count, int64_t rows, uint32_t* out) {
  crc32c_kernels().run(parts, count, rows, out);
}

}  // namespace dreamreader
