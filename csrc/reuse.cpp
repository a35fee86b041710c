// Memory for results that is used again: the C library gives what is freed back to the system, so
// that a result of 32 MiB and more has fresh pages each time, and a smaller one where a few are
// freed together; to touch them takes longer than to compute it. Blocks go back when the storage of
// their tensor is freed, by whatever thread, and never before.
#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bind.h"
#include "dlpack.h"
#include "refusal.h"
#include "tensor_view.h"

namespace dreamreader {
namespace {

namespace py = pybind11;

constexpr int64_t kPage = 2 << 20;
constexpr int64_t kSmall = 64 << 10;  // in parts of which blocks below a huge page are counted
constexpr int64_t kMostUnused = int64_t{256} << 20;  // bytes that are kept for later

struct Memory {
  void* data;
  int64_t bytes;
};

class Pool {
 public:
  // A block of at least this size, and at most a quarter larger.
  Memory take(int64_t bytes) {
    const int64_t part = bytes < kPage ? kSmall : kPage;
    bytes = (bytes + part - 1) / part * part;
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
  // A large one begins at a huge page, so that 2 MiB are one fault.
  static Memory fresh(int64_t bytes) {
    const size_t room = size_t(bytes < kPage ? bytes : bytes + kPage);
    void* map = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
      throw OutOfMemory("no memory for a result of " + std::to_string(bytes) + " bytes");
    if (bytes < kPage) return {map, bytes};
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
  std::vector<int64_t> shape;
};

void release(DLManagedTensor* managed) {
  auto* lent = static_cast<Lent*>(managed->manager);
  pool().give_back(lent->memory);
  delete lent;
}

// Dense numbers with unspecified values, as a capsule for torch.from_dlpack.
py::capsule lend(std::vector<int64_t> shape, DLDataType type) {
  auto lent = std::make_unique<Lent>();
  int64_t bytes = type.bits / 8;
  for (const int64_t size : shape) bytes *= size;
  lent->memory = pool().take(bytes);
  lent->shape = std::move(shape);
  lent->managed.tensor = {lent->memory.data,
                          {kDLCPU, 0},
                          int32_t(lent->shape.size()),
                          type,
                          lent->shape.data(),
                          nullptr,
                          0};
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

py::capsule reused(int64_t bytes) { return lend({bytes}, {kDLUInt, 8, 1}); }

py::capsule reused_like(py::handle like) {
  const TensorView x(like);
  std::vector<int64_t> shape(size_t(x.dims()));
  for (int i = 0; i < x.dims(); ++i) shape[size_t(i)] = x.size(i);
  return lend(std::move(shape), x.dtype());
}

Bind bind_reuse([](py::module_& m) {
  m.def("reused", &reused);
  m.def("reused_like", &reused_like);
});

}  // namespace
}  // namespace dreamreader
