// Aligned memory for the work of one thread.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace dreamreader {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Memory = std::unique_ptr<T, FreeMemory>;

// Room for `count` values at an address that `alignment` divides. Throws std::bad_alloc.
template <typename T>
Memory<T> allocate(size_t count, size_t alignment = 64) {
  const size_t bytes = (count * sizeof(T) + alignment) / alignment * alignment;  // never 0
  void* found = std::aligned_alloc(alignment, bytes);
  if (!found) throw std::bad_alloc();
  return Memory<T>(static_cast<T*>(found));
}

// Memory of the calling thread, kept between calls.
inline void* scratch(size_t bytes) {
  thread_local Memory<char> memory;
  thread_local size_t held = 0;
  if (held < bytes) {
    held = 0;
    memory.reset();  // before there is more, since both may not fit
    memory = allocate<char>(bytes, 4096);
    held = bytes;
  }
  return memory.get();
}

}  // namespace dreamreader
