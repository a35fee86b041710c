// A twin of the ring in the memory of a GPU. Rows are packed on the stream that computes; a slab is
// copied to the host on a stream of its own, and the thread that writes it waits for that copy. No
// call but `arrive`, `fetch` and `counted` waits, and after the first units none allocates.
#pragma once

#include <cuda_runtime_api.h>

#include <array>

#include "cuda_device.h"
#include "packer.h"

namespace dreamreader {

class CudaPacker : public Packer {
 public:
  CudaPacker(int device, const Ring& ring);
  ~CudaPacker() override;

  void use(int device, cudaStream_t stream);  // where x is, and the stream that makes it

  char* twin(char* host) override { return ring_twin_ + (host - ring_.base()); }
  char* carry(int site) override;
  void move(char* to, const char* from, int64_t bytes) override;
  void pack(const PackJob& job, int64_t places, int counter) override;
  void send(int slab, char* host, int64_t bytes) override;
  void arrive(int slab) override;
  void fetch(char* host, const char* from, int64_t bytes) override;
  void clear() override;
  std::vector<int64_t> counted() override;

 private:
  // Places and groups on their way to the GPU: pinned memory and its twin, in parts. A part is
  // written again when the kernels that read it are done.
  static constexpr int kParts = 8;
  static constexpr int64_t kPart = 1 << 20;

  using Event = Owned<cudaEvent_t, cudaEventDestroy>;
  using DeviceMemory = Owned<void*, cudaFree>;

  static Event new_event();
  char* stage(int64_t bytes);
  char* to_twin(char* staged) const { return stage_twin_ + (staged - host_stage()); }
  char* host_stage() const { return static_cast<char*>(stage_.get()); }
  int64_t* counter_at(int number);
  char* allocate(int64_t bytes);

  const int device_;
  const Ring& ring_;
  cudaStream_t stream_ = nullptr;  // of torch
  bool used_ = false;
  // What a constructor that fails had taken goes with its owners.
  Owned<cudaStream_t, cudaStreamDestroy> copies_;
  Owned<void*, cudaHostUnregister> registered_;  // the ring
  Owned<void*, cudaFreeHost> stage_;
  std::vector<DeviceMemory> held_;
  char *ring_twin_ = nullptr, *stage_twin_ = nullptr;
  int part_ = 0;
  int64_t part_filled_ = 0;
  std::array<Event, kParts> part_read_;
  Event before_;
  std::vector<Event> packed_, arrived_;  // by slab
  std::vector<char*> carries_;
  int64_t* counters_ = nullptr;
  int counters_held_ = 0, counters_used_ = 0;
};

}  // namespace dreamreader
