#include "ring.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace dreamreader {

namespace {
constexpr int64_t kHuge = 2 << 20;  // a large page
}

Ring::Ring(int64_t bytes) : bytes_(round_up(bytes, kBlock)) {
  mapped_ = mmap(nullptr, size_t(bytes_ + kHuge), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  base_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(mapped_), kHuge));
  madvise(base_, size_t(bytes_), MADV_HUGEPAGE);
  // A child does not use it, and pages shared with a child would be copied at the next row.
  madvise(base_, size_t(bytes_), MADV_DONTFORK);
  std::memset(base_, 0, size_t(bytes_));
}

Ring::~Ring() { munmap(mapped_, size_t(bytes_ + kHuge)); }

void Ring::divide(int64_t slab_bytes) {
  slab_bytes_ = slab_bytes;
  count_ = int(bytes_ / slab_bytes);
}

}  // namespace dreamreader
