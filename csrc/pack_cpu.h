// CPU kernels of the packing, one set per instruction set.
#pragma once

#include "cpu.h"
#include "pack.h"

namespace dreamreader {

constexpr int64_t kPackTile =
    64;  // places that are read together where features are apart in memory

// Packs the rows first .. last - 1.
struct PackKernels {
  ByType<void(const PackJob& job, int64_t first, int64_t last)> run;
};

DR_KERNELS(PackKernels, pack)

}  // namespace dreamreader
