// Runs independent items on the threads of torch's OpenMP.
#pragma once

#include <cstdint>

namespace dreamreader {

// Calls run(context, first, last) on pieces of `grain` items until all `items` are done, on up to
// `threads` threads, the calling one among them. Which thread does which piece varies, so results
// may not depend on it. Fewer threads do it where the system gives no more; what `run` throws
// comes out of this call, when no piece runs any more.
void parallel(int64_t items, int64_t grain, int threads,
              void (*run)(void* context, int64_t first, int64_t last), void* context);

}  // namespace dreamreader
