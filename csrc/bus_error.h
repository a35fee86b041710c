// Reading mapped files that may get shorter, or lie on a disk that fails, meanwhile. Touching a
// page that is not there any more is a signal, SIGBUS, which ends a process. Here it gets a page of
// zeros instead and the owner of the memory is told, so that a loop over rows pays nothing for it.
#pragma once

namespace dreamreader {

// Who knows which memory is mapped. Called within a signal handler: locks and allocates nothing.
class MappedMemory {
 public:
  // Remembers that a page is missing and returns true, or false if the address is not its own.
  virtual bool miss(const void* address) = 0;

 protected:
  ~MappedMemory() = default;
};

// Has this process ask `ReadingMapped` about SIGBUS from now on; whoever had it before hears of
// every other one. Cheap enough for each call that reads.
void watch_bus_errors();

// While it exists, this thread reads from `memory`.
class ReadingMapped {
 public:
  explicit ReadingMapped(MappedMemory& memory);
  ~ReadingMapped();
  ReadingMapped(const ReadingMapped&) = delete;
};

}  // namespace dreamreader
