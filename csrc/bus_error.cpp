#include "bus_error.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>

namespace dreamreader {
namespace {

const uintptr_t page_bytes = uintptr_t(sysconf(_SC_PAGESIZE));

// A thread that reads has it already: a signal handler may not allocate it. (Not in the static
// block, which has no room for a module with the CUDA runtime.)
thread_local MappedMemory* reading = nullptr;

std::atomic_flag installing;
std::atomic<bool> passed_on{false};
struct sigaction before;

void on_bus_error(int number, siginfo_t* info, void*) {
  const int error = errno;
  const uintptr_t page = uintptr_t(info->si_addr) / page_bytes * page_bytes;
  if (info->si_code > 0 && reading && reading->miss(info->si_addr) &&
      mmap(reinterpret_cast<void*>(page), page_bytes, PROT_READ,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
    errno = error;
    return;
  }
  // Not ours: the instruction runs again and meets who was here before us, or the default.
  struct sigaction next = before;
  if (passed_on.exchange(true)) {
    next = {};
    next.sa_handler = SIG_DFL;
  }
  sigaction(number, &next, nullptr);
  if (info->si_code <= 0) raise(number);  // no instruction, but someone sent it
  errno = error;
}

}  // namespace

void watch_bus_errors() {
  struct sigaction now;
  sigaction(SIGBUS, nullptr, &now);
  if (now.sa_sigaction == &on_bus_error || installing.test_and_set()) return;
  before = now;
  struct sigaction own = {};
  own.sa_sigaction = &on_bus_error;
  own.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&own.sa_mask);
  sigaction(SIGBUS, &own, nullptr);
  installing.clear();
}

ReadingMapped::ReadingMapped(MappedMemory& memory) { reading = &memory; }
ReadingMapped::~ReadingMapped() { reading = nullptr; }

}  // namespace dreamreader
