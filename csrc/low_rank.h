// The affine low-rank edit of rows, shared by the CPU and the CUDA kernel.
//
//   z = A x + b          y = x + s U'z
//
// and its gradient for g = dL/dy, with a = U g and d = s a:
//
//   dx = g + A'd         ds = <a, z>
//   dA = sum d x'        db = sum d        dU = sum s z g'
//
// A row is one (entry, token) pair; the adapter (A, b, U) is that of its entry. s = 0: the row
// keeps its bits, dx has those of g, and the tables get nothing from it, NaN included; ds is the
// formula's. z = 0: the row keeps its bits. Arithmetic in W (float; double for double x), one
// rounding at the end. No torch, no pybind11 here.
#pragma once

#include <cstdint>

#include "rows.h"

namespace dreamreader {

constexpr int kMaxRank = 256;  // the limit of dreamreader/ops/low_rank.py

// The sizes and the dense tables by value. W is the arithmetic type.
template <typename W>
struct LowRank {
  int64_t entries, tokens, width, rank, adapters;
  const W* down;      // A: [adapters, rank, width]
  const W* bias;      // b: [adapters, rank]
  const W* up;        // U: [adapters, rank, width]
  const W* strength;  // s: [entries, tokens], any strides (0 where it does not vary)
  int64_t strength_entry, strength_token;
  const int64_t* index;  // [entries]
  int64_t index_entry;
};

template <typename W>
DR_HD W strength_of(const LowRank<W>& p, int64_t entry, int64_t token) {
  return p.strength[entry * p.strength_entry + token * p.strength_token];
}

// The adapter of an entry, or -1 if the index does not exist (on a device its rows then become NaN;
// on the CPU the call is refused).
template <typename W>
DR_HD int64_t adapter_of(const LowRank<W>& p, int64_t entry) {
  const int64_t adapter = p.index[entry * p.index_entry];
  return adapter >= 0 && adapter < p.adapters ? adapter : -1;
}

}  // namespace dreamreader
