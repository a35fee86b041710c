// What the CPU side of every operator needs: tensors, kernels by instruction set, scratch memory of
// a thread, and sharing work out.
#pragma once

#include "bind.h"
#include "cpu.h"
#include "scratch.h"
#include "tensor_view.h"
#include "threads.h"

namespace dreamreader {

namespace py = pybind11;

// `parallel` for any callable: work(first, last).
template <typename F>
void share(int64_t items, int64_t grain, int threads, const F& work) {
  const auto call = [](void* of, int64_t first, int64_t last) {
    (*static_cast<const F*>(of))(first, last);
  };
  parallel(items, grain, threads, call, const_cast<F*>(&work));
}

}  // namespace dreamreader
