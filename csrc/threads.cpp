#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

namespace dreamreader {
namespace {

struct Work {
  int64_t items, grain;
  void (*run)(void*, int64_t, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  static void drain(void* of) {
    Work& work = *static_cast<Work*>(of);
    for (;;) {
      const int64_t first = work.next.fetch_add(work.grain, std::memory_order_relaxed);
      if (first >= work.items) return;
      const int64_t last = first + work.grain;
      work.run(work.context, first, last < work.items ? last : work.items);
    }
  }
};

// GOMP_parallel(function, data, threads, flags), the entry of GNU's OpenMP that LLVM's and Intel's
// have too. Found where torch loaded it: its threads spin for a while after each of its operators,
// and threads of our own would share the cores with them.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

// From the start: torch may have used the threads of OpenMP before there is a call here.
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Parallel find_parallel() {
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

}  // namespace

void parallel(int64_t items, int64_t grain, int threads, void (*run)(void*, int64_t, int64_t),
              void* context) {
  const int64_t pieces = (items + grain - 1) / grain;
  const int team = int(threads < pieces ? threads : pieces);
  Work work{items, grain, run, context};
  if (team <= 1) return Work::drain(&work);
  static const Parallel openmp = find_parallel();
  if (openmp && !forked) {  // after a fork the threads of OpenMP are gone, and it waits for them
    return openmp(&Work::drain, &work, unsigned(team), 0);
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < team; ++i) helpers.emplace_back(&Work::drain, &work);
  Work::drain(&work);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace dreamreader
