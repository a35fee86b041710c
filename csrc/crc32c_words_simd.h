// CRC-32C word by word, for kernels that are compiled once per instruction set. Of the two classes
// CrcInstruction may be used where crc_instruction() says so; where a build cannot do both, they
// are the same.
#pragma once

#include "simd.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dreamreader {
namespace {

#if defined(__SSE4_2__)

struct CrcInstruction {
  DR_INLINE uint64_t word(uint64_t crc, const char* p) {
    return _mm_crc32_u64(crc, load_vector<uint64_t>(p));
  }
  DR_INLINE uint64_t byte(uint64_t crc, const char* p) {
    return _mm_crc32_u8(uint32_t(crc), uint8_t(*p));
  }
};
using CrcTables = CrcInstruction;
constexpr bool crc_instruction() { return true; }

#else

struct CrcTables {
  uint32_t of[8][256];  // of[k][b]: byte b, followed by k bytes of 0

  constexpr CrcTables() : of() {
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
      of[0][b] = crc;
    }
    for (int k = 1; k < 8; ++k)
      for (uint32_t b = 0; b < 256; ++b)
        of[k][b] = (of[k - 1][b] >> 8) ^ of[0][of[k - 1][b] & 0xff];
  }

  DR_INLINE uint64_t word(uint64_t crc, const char* p);
  DR_INLINE uint64_t byte(uint64_t crc, const char* p);
};
constexpr CrcTables kCrcTables;

uint64_t CrcTables::word(uint64_t crc, const char* p) {
  const auto& t = kCrcTables.of;
  const uint64_t v = load_vector<uint64_t>(p) ^ crc;
  return t[7][v & 0xff] ^ t[6][v >> 8 & 0xff] ^ t[5][v >> 16 & 0xff] ^ t[4][v >> 24 & 0xff] ^
         t[3][v >> 32 & 0xff] ^ t[2][v >> 40 & 0xff] ^ t[1][v >> 48 & 0xff] ^ t[0][v >> 56];
}
uint64_t CrcTables::byte(uint64_t crc, const char* p) {
  return (crc >> 8) ^ kCrcTables.of[0][(crc ^ uint8_t(*p)) & 0xff];
}

#if defined(__aarch64__)

// In assembly, since an intrinsic would ask every function around it to be compiled for it.
struct CrcInstruction {
  DR_INLINE uint64_t word(uint64_t crc, const char* p) {
    uint32_t found;
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w1, %x2"
            : "=r"(found)
            : "r"(uint32_t(crc)), "r"(load_vector<uint64_t>(p)));
    return found;
  }
  DR_INLINE uint64_t byte(uint64_t crc, const char* p) {
    uint32_t found;
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w1, %w2"
            : "=r"(found)
            : "r"(uint32_t(crc)), "r"(uint32_t(uint8_t(*p))));
    return found;
  }
};
DR_INLINE bool crc_instruction() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }

#else

using CrcInstruction = CrcTables;
constexpr bool crc_instruction() { return false; }

#endif
#endif

// More bytes of kRows rows at once: the instruction takes three cycles, and one can begin in each.
template <typename Crc, int kRows>
DR_INLINE void add_bytes(const char* const* from, int64_t bytes, uint64_t* crc) {
  int64_t at = 0;
#pragma GCC unroll 4
  for (; at + 8 <= bytes; at += 8)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) crc[r] = Crc::word(crc[r], from[r] + at);
  for (; at < bytes; ++at)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) crc[r] = Crc::byte(crc[r], from[r] + at);
}

}  // namespace
}  // namespace dreamreader
