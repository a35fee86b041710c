#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace dreamreader {
namespace {

struct Work {
  int64_t items, grain;
  void (*run)(void*, int64_t, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
  std::once_flag failed{};
  std::exception_ptr error{};  // the first one: none may leave a thread

  static void drain(void* of) {
    Work& work = *static_cast<Work*>(of);
    try {
      for (;;) {
        const int64_t first = work.next.fetch_add(work.grain, std::memory_order_relaxed);
        if (first >= work.items) return;
        const int64_t last = first + work.grain;
        work.run(work.context, first, last < work.items ? last : work.items);
      }
    } catch (...) {
      work.next.store(work.items, std::memory_order_relaxed);  // nobody begins another piece
      std::call_once(work.failed, [&] { work.error = std::current_exception(); });
    }
  }
};

// Threads that wait until they are let go, and then do nothing or drain the work.
class Helpers {
 public:
  // As many of `count` as the system gives.
  explicit Helpers(int count) {
    try {
      threads_.reserve(size_t(count));
      while (int(threads_.size()) < count) threads_.emplace_back([this] { wait(); });
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
  }
  ~Helpers() {
    release(nullptr);
    for (std::thread& each : threads_) each.join();
  }
  Helpers(const Helpers&) = delete;

  int count() const { return int(threads_.size()); }
  void release(Work* work) {
    if (released_.test()) return;
    work_ = work;
    released_.test_and_set();
    released_.notify_all();
  }

 private:
  void wait() {
    released_.wait(false);
    if (work_) Work::drain(work_);
  }

  Work* work_ = nullptr;
  std::atomic_flag released_;
  std::vector<std::thread> threads_;
};

// GOMP_parallel(function, data, threads, flags), the entry of GNU's OpenMP that LLVM's and Intel's
// have too. Found where torch loaded it: its threads spin for a while after each of its operators,
// and threads of our own would share the cores with them.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};  // then the threads of OpenMP are gone, and it waits for them

// From the start: torch may have used the threads of OpenMP before there is a call here.
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Parallel find_parallel() {
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

// Whether so many threads can run: OpenMP ends the process where one of its own cannot start. Asked
// for once by each thread that calls, and again for more.
bool may_start(int team) {
  thread_local int known = 1;
  if (team > known && Helpers(team - 1).count() == team - 1) known = team;
  return team <= known;
}

}  // namespace

void parallel(int64_t items, int64_t grain, int threads, void (*run)(void*, int64_t, int64_t),
              void* context) {
  const int64_t pieces = (items + grain - 1) / grain;
  const int team = int(threads < pieces ? threads : pieces);
  Work work{items, grain, run, context};
  static const Parallel openmp = find_parallel();
  if (team <= 1) {
    Work::drain(&work);
  } else if (openmp && !forked && may_start(team)) {
    openmp(&Work::drain, &work, unsigned(team), 0);
  } else {
    Helpers helpers(team - 1);
    helpers.release(&work);
    Work::drain(&work);
  }
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace dreamreader
