// CRC-32C for one instruction set; compiled once for each (CMakeLists.txt sets DR_ISA).
#include "crc32c.h"
#include "simd.h"

#if defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dreamreader {
namespace {

DR_INLINE uint64_t eight(const char* p) { return load_vector<uint64_t>(p); }

#if defined(__SSE4_2__)
#define DR_CRC
DR_INLINE uint64_t crc_of_eight(uint64_t crc, uint64_t v) { return _mm_crc32_u64(crc, v); }
DR_INLINE uint64_t crc_of_one(uint64_t crc, uint8_t v) { return _mm_crc32_u8(uint32_t(crc), v); }
#elif defined(__aarch64__)
#define DR_CRC __attribute__((target("+crc")))
DR_CRC DR_INLINE uint64_t crc_of_eight(uint64_t crc, uint64_t v) {
  return __crc32cd(uint32_t(crc), v);
}
DR_CRC DR_INLINE uint64_t crc_of_one(uint64_t crc, uint8_t v) { return __crc32cb(uint32_t(crc), v); }
#endif

#ifdef DR_CRC
// kRows rows at once: the instruction takes three cycles, and one can begin in each.
template <int kRows>
DR_CRC void rows_at(const RowBytes* parts, int count, int64_t first, uint32_t* out) {
  uint64_t crc[kRows];
  for (int r = 0; r < kRows; ++r) crc[r] = 0xffffffffu;
  for (int part = 0; part < count; ++part) {
    const RowBytes& from = parts[part];
    const char* p[kRows];
    for (int r = 0; r < kRows; ++r) p[r] = from.data + (first + r) * from.stride;
    int64_t i = 0;
    for (; i + 8 <= from.bytes; i += 8)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) crc[r] = crc_of_eight(crc[r], eight(p[r] + i));
    for (; i < from.bytes; ++i)
      for (int r = 0; r < kRows; ++r) crc[r] = crc_of_one(crc[r], uint8_t(p[r][i]));
  }
  for (int r = 0; r < kRows; ++r) out[first + r] = ~uint32_t(crc[r]);
}

void hardware(const RowBytes* parts, int count, int64_t rows, uint32_t* out) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) rows_at<4>(parts, count, row, out);
  for (; row < rows; ++row) rows_at<1>(parts, count, row, out);
}
#endif

#ifndef __SSE4_2__
struct Tables {
  uint32_t of[8][256];  // of[k][b]: byte b, followed by k bytes of 0
  constexpr Tables() : of() {
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
      of[0][b] = crc;
    }
    for (int k = 1; k < 8; ++k)
      for (uint32_t b = 0; b < 256; ++b)
        of[k][b] = (of[k - 1][b] >> 8) ^ of[0][of[k - 1][b] & 0xff];
  }
};
constexpr Tables kTables;

void slicing(const RowBytes* parts, int count, int64_t rows, uint32_t* out) {
  const auto& t = kTables.of;
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t crc = 0xffffffffu;
    for (int part = 0; part < count; ++part) {
      const char* p = parts[part].data + row * parts[part].stride;
      int64_t i = 0;
      for (; i + 8 <= parts[part].bytes; i += 8) {
        const uint64_t v = eight(p + i) ^ crc;
        crc = t[7][v & 0xff] ^ t[6][v >> 8 & 0xff] ^ t[5][v >> 16 & 0xff] ^ t[4][v >> 24 & 0xff] ^
              t[3][v >> 32 & 0xff] ^ t[2][v >> 40 & 0xff] ^ t[1][v >> 48 & 0xff] ^ t[0][v >> 56];
      }
      for (; i < parts[part].bytes; ++i) crc = (crc >> 8) ^ t[0][(crc ^ uint8_t(p[i])) & 0xff];
    }
    out[row] = ~crc;
  }
}
#endif

}  // namespace

namespace DR_ISA {

extern const Crc32cKernel crc32c;
#if defined(__SSE4_2__)
const Crc32cKernel crc32c = {hardware};
#elif defined(__aarch64__)
const Crc32cKernel crc32c = {getauxval(AT_HWCAP) & HWCAP_CRC32 ? hardware : slicing};
#else
const Crc32cKernel crc32c = {slicing};
#endif

}  // namespace DR_ISA
}  // namespace dreamreader
