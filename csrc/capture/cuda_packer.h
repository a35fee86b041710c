// A twin of the ring in the memory of a GPU. Rows are packed on the stream that computes; a slab is
// copied to the host on a stream of its own, and the thread that writes it waits for that copy. No
// call but `arrive`, `fetch` and `counted` waits, and after the first units none allocates.
#pragma once

#include <cuda_runtime_api.h>

#include <array>

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

  char* stage(int64_t bytes);
  char* to_twin(char* staged) const { return stage_twin_ + (staged - stage_); }
  int64_t* counter_at(int number);
  char* allocate(int64_t bytes);

  const int device_;
  const Ring& ring_;
  cudaStream_t stream_ = nullptr, copies_ = nullptr;
  bool used_ = false;
  char *ring_twin_ = nullptr, *stage_ = nullptr, *stage_twin_ = nullptr;
  int part_ = 0;
  int64_t part_filled_ = 0;
  std::array<cudaEvent_t, kParts> part_read_{};
  cudaEvent_t before_ = nullptr;
  std::vector<cudaEvent_t> packed_, arrived_;  // by slab
  std::vector<char*> carries_;
  int64_t* counters_ = nullptr;
  int counters_held_ = 0, counters_used_ = 0;
  std::vector<void*> held_;  // of the GPU, to be freed
};

}  // namespace dreamreader
