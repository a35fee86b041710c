#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#define DR_PAUSE _mm_pause()
#else
#define DR_PAUSE ((void)0)
#endif

namespace dreamreader {
namespace {

struct Work {
  std::atomic<int64_t> next{0};
  int64_t items = 0, grain = 1;
  void (*run)(void*, int64_t, int64_t) = nullptr;
  void* context = nullptr;

  void drain() {
    for (;;) {
      const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
      if (first >= items) return;
      run(context, first, first + grain < items ? first + grain : items);
    }
  }
};

// Helpers sleep on `round`. A round admits `seats` of them; each takes a seat or goes back to
// sleep, and the caller closes the round by taking the seats that are left and waiting for the
// helpers that sat down.
class Pool {
 public:
  void run(Work& work, int helpers) {
    for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();
    work_ = &work;
    busy_.store(0, std::memory_order_relaxed);
    seats_.store(helpers, std::memory_order_release);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    work.drain();
    const int left = seats_.exchange(0, std::memory_order_acq_rel);
    const int seated = helpers - left;
    while (busy_.load(std::memory_order_acquire) != seated) DR_PAUSE;
  }

 private:
  void serve() {
    uint32_t seen = 0;
    for (;;) {
      uint32_t now = round_.load(std::memory_order_acquire);
      // A short spin catches calls that follow each other; the sleep after it costs a few
      // microseconds to leave.
      for (int i = 0; now == seen && i < 2000; ++i) {
        DR_PAUSE;
        now = round_.load(std::memory_order_acquire);
      }
      if (now == seen) {
        round_.wait(seen, std::memory_order_acquire);
        continue;
      }
      seen = now;
      int seats = seats_.load(std::memory_order_acquire);
      while (seats > 0 &&
             !seats_.compare_exchange_weak(seats, seats - 1, std::memory_order_acq_rel)) {
      }
      if (seats > 0) {
        work_->drain();
        busy_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  int started_ = 0;
  Work* work_ = nullptr;
  std::atomic<uint32_t> round_{0};
  std::atomic<int> seats_{0}, busy_{0};
};

std::mutex gate;
Pool* pool = nullptr;  // never destroyed: helpers may still sleep on it when the process ends

void forget_in_child() {
  pthread_atfork([] { gate.lock(); }, [] { gate.unlock(); },
                 [] {
                   pool = nullptr;  // its threads exist in the parent only
                   gate.unlock();
                 });
}

}  // namespace

void parallel(int64_t items, int64_t grain, int threads, void (*run)(void*, int64_t, int64_t),
              void* context) {
  const int64_t pieces = (items + grain - 1) / grain;
  const int helpers = int((threads < pieces ? threads : pieces) - 1);
  std::unique_lock<std::mutex> lock(gate, std::defer_lock);
  if (helpers < 1 || !lock.try_lock()) {
    if (items > 0) run(context, 0, items);
    return;
  }
  static const bool registered = (forget_in_child(), true);
  (void)registered;
  if (!pool) pool = new Pool;
  Work work;
  work.items = items;
  work.grain = grain;
  work.run = run;
  work.context = context;
  pool->run(work, helpers);
}

}  // namespace dreamreader
