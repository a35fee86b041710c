// What the CPU side of every operator needs: tensors, kernels by instruction set, scratch memory of
// a thread, and sharing work out.
#pragma once

#include <algorithm>

#include "bind.h"
#include "cpu.h"
#include "scratch.h"
#include "tensor_view.h"
#include "threads.h"

namespace dreamreader {

namespace py = pybind11;

// Items of a piece of work, a multiple of `unit`, where an item has so many bytes and results do
// not depend on the cuts. Few pieces, since each begins with rows that were not prefetched, but so
// many that a slow thread holds up none.
inline int64_t grain_of(int64_t items, int64_t bytes, int threads, int64_t unit = 1) {
  constexpr int64_t kLeastBytes = 128 << 10, kPiecesPerThread = 8;
  const int64_t least = kLeastBytes / std::max<int64_t>(bytes, 1);
  const int64_t grain = std::max({least, items / (kPiecesPerThread * threads), int64_t{1}});
  return (grain + unit - 1) / unit * unit;
}

// `parallel` for any callable: work(first, last).
template <typename F>
void share(int64_t items, int64_t grain, int threads, const F& work) {
  const auto call = [](void* of, int64_t first, int64_t last) {
    (*static_cast<const F*>(of))(first, last);
  };
  parallel(items, grain, threads, call, const_cast<F*>(&work));
}

}  // namespace dreamreader
