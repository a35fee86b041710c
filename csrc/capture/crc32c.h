// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of rows of bytes.
#pragma once

#include <cstdint>

#include "cpu.h"

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

DR_KERNELS(Crc32cKernel, crc32c)

void crc32c_rows(const RowBytes* parts, int count, int64_t rows, uint32_t* out);

}  // namespace dreamreader
