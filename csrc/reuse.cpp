// Memory for large results that is used again: a result of 32 MiB and more gets fresh pages from
// the C library each time, and to touch them takes longer than to compute it. Blocks go back when
// the storage of their tensor is freed, by whatever thread, and never before.
#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bind.h"
#include "dlpack.h"
#include "refusal.h"

namespace dreamreader {
namespace {

namespace py = pybind11;

constexpr int64_t kPage = 2 << 20;
constexpr int64_t kMostUnused = int64_t{256} << 20;  // bytes that are kept for later

struct Memory {
  void* data;
  int64_t bytes;
};

class Pool {
 public:
  // A block of at least this size, and at most a quarter larger.
  Memory take(int64_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = unused_.size(); i-- > 0;) {
        const Memory found = unused_[i];
        if (found.bytes < bytes || found.bytes > bytes + bytes / 4) continue;
        unused_.erase(unused_.begin() + int64_t(i));
        held_ -= found.bytes;
        return found;
      }
    }
    return fresh(bytes);
  }

  void give_back(Memory memory) {
    std::vector<Memory> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      unused_.push_back(memory);
      held_ += memory.bytes;
      while (held_ > kMostUnused) {  // the oldest first
        dropped.push_back(unused_.front());
        held_ -= unused_.front().bytes;
        unused_.erase(unused_.begin());
      }
    }
    for (const Memory& each : dropped) munmap(each.data, size_t(each.bytes));
  }

 private:
  // Begins at a huge page, so that 2 MiB are one fault.
  static Memory fresh(int64_t bytes) {
    const size_t room = size_t(bytes + kPage);
    void* map = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
      throw OutOfMemory("no memory for a result of " + std::to_string(bytes) + " bytes");
    const auto begin = reinterpret_cast<uintptr_t>(map);
    const uintptr_t data = (begin + kPage - 1) / kPage * kPage;
    if (data > begin) munmap(map, data - begin);
    const uintptr_t end = data + uintptr_t(bytes);
    if (end < begin + room) munmap(reinterpret_cast<void*>(end), begin + room - end);
    madvise(reinterpret_cast<void*>(data), size_t(bytes), MADV_HUGEPAGE);
    return {reinterpret_cast<void*>(data), bytes};
  }

  std::mutex mutex_;
  std::vector<Memory> unused_;
  int64_t held_ = 0;
};

Pool& pool() {
  static Pool* only = new Pool;  // tensors may be freed after the module's own statics
  return *only;
}

struct Lent {
  DLManagedTensor managed;
  Memory memory;
  int64_t shape;
};

void release(DLManagedTensor* managed) {
  auto* lent = static_cast<Lent*>(managed->manager);
  pool().give_back(lent->memory);
  delete lent;
}

// Bytes with unspecified values, as a capsule for torch.from_dlpack.
py::capsule reused(int64_t bytes) {
  auto lent = std::make_unique<Lent>();
  lent->memory = pool().take(bytes);
  lent->shape = bytes;
  lent->managed.tensor = {lent->memory.data, {kDLCPU, 0}, 1, {kDLUInt, 8, 1},
                          &lent->shape,      nullptr,     0};
  lent->managed.manager = lent.get();
  lent->managed.deleter = &release;
  const auto drop = [](PyObject* capsule) {  // nobody took it
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  };
  PyObject* capsule = PyCapsule_New(&lent->managed, "dltensor", drop);
  if (!capsule) {
    pool().give_back(lent->memory);
    throw py::error_already_set();
  }
  lent.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

Bind bind_reuse([](py::module_& m) { m.def("reused", &reused); });

}  // namespace
}  // namespace dreamreader
