// Memory for rows on their way to the disk: allocated once, cut into slabs of one size.
#pragma once

#include <cstdint>

namespace dreamreader {

constexpr int64_t kBlock = 4096;  // unit of O_DIRECT, for addresses, lengths and places in a file

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

class Ring {
 public:
  explicit Ring(int64_t bytes);
  ~Ring();
  Ring(const Ring&) = delete;

  void divide(int64_t slab_bytes);
  char* base() const { return base_; }
  int64_t bytes() const { return bytes_; }
  char* slab(int number) const { return base_ + number * slab_bytes_; }
  int64_t slab_bytes() const { return slab_bytes_; }
  int count() const { return count_; }

 private:
  void* mapped_;
  char* base_;
  int64_t bytes_, slab_bytes_ = 0;
  int count_ = 0;
};

}  // namespace dreamreader
