// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of rows of bytes.
#pragma once

#include <cstdint>

namespace dreamreader {

// Bytes of each row: those of row r begin at data + r stride.
struct RowBytes {
  const char* data;
  int64_t stride, bytes;
};

struct Crc32cKernel {
  // out[r] = CRC-32C of row r of the parts, one part after the other.
  void (*run)(const RowBytes* parts, int count, int64_t rows, uint32_t* out);
};

namespace portable {
extern const Crc32cKernel crc32c;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Crc32cKernel crc32c;
}
namespace avx512 {
extern const Crc32cKernel crc32c;
}
#endif

void crc32c_rows(const RowBytes* parts, int count, int64_t rows, uint32_t* out);

}  // namespace dreamreader
