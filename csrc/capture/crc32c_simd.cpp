// CRC-32C for one instruction set; compiled once for each (CMakeLists.txt sets DR_ISA).
#include "crc32c.h"
#include "crc32c_words_simd.h"

namespace dreamreader {
namespace {

template <typename Crc, int kRows>
void rows_at(const RowBytes* parts, int count, int64_t first, uint32_t* out) {
  uint64_t crc[kRows];
  for (int r = 0; r < kRows; ++r) crc[r] = 0xffffffffu;
  for (int part = 0; part < count; ++part) {
    const RowBytes& from = parts[part];
    const char* p[kRows];
    for (int r = 0; r < kRows; ++r) p[r] = from.data + (first + r) * from.stride;
    add_bytes<Crc, kRows>(p, from.bytes, crc);
  }
  for (int r = 0; r < kRows; ++r) out[first + r] = ~uint32_t(crc[r]);
}

template <typename Crc>
void each_row(const RowBytes* parts, int count, int64_t rows, uint32_t* out) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) rows_at<Crc, 4>(parts, count, row, out);
  for (; row < rows; ++row) rows_at<Crc, 1>(parts, count, row, out);
}

}  // namespace

namespace DR_ISA {

extern const Crc32cKernel crc32c;
const Crc32cKernel crc32c = {crc_instruction() ? each_row<CrcInstruction> : each_row<CrcTables>};

}  // namespace DR_ISA
}  // namespace dreamreader
