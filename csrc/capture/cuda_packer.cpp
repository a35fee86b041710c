#ifdef DREAMREADER_CUDA

#include "cuda_packer.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pack_cuda.h"

namespace dreamreader {
namespace {

void check(cudaError_t error) { check_cuda(error, "writer"); }

PackJob rows_of(const PackJob& job, int64_t first, int64_t last) {
  static constexpr int64_t kBytes[] = {4, 2, 2, 1, 1};  // by Stored
  PackJob part = job;
  part.rows = last - first;
  part.out = static_cast<char*>(job.out) + first * job.x.width * kBytes[int(job.stored)];
  if (job.scales) part.scales += first;
  if (job.groups) {
    part.groups += first;
  } else {
    part.places += 2 * first;
  }
  return part;
}

constexpr int kCarries = 64;  // blocks that are allocated together
constexpr int kCounters = 4096;

}  // namespace

CudaPacker::CudaPacker(int device, const Ring& ring) : device_(device), ring_(ring) {
  const OnDevice on(device);
  cudaStream_t copies = nullptr;
  check(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
  copies_ = Owned<cudaStream_t, cudaStreamDestroy>(copies);
  check(cudaHostRegister(ring.base(), size_t(ring.bytes()), cudaHostRegisterDefault));
  registered_ = Owned<void*, cudaHostUnregister>(ring.base());
  ring_twin_ = allocate(ring.bytes());
  void* staged = nullptr;
  check(cudaHostAlloc(&staged, size_t(kParts * kPart), cudaHostAllocDefault));
  stage_ = Owned<void*, cudaFreeHost>(staged);
  stage_twin_ = allocate(kParts * kPart);
  for (Event& each : part_read_) each = new_event();
  before_ = new_event();
}

CudaPacker::~CudaPacker() {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  cudaDeviceSynchronize();  // nothing is in use any more when its owners give it back
  cudaSetDevice(before);
}

CudaPacker::Event CudaPacker::new_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return Event(event);
}

// What was queued on another stream before comes first.
void CudaPacker::use(int device, cudaStream_t stream) {
  if (device != device_)
    throw std::invalid_argument("writer: x is on cuda:" + std::to_string(device) +
                                ", the memory of the writer on cuda:" + std::to_string(device_));
  const OnDevice on(device_);
  if (used_ && stream != stream_) {
    check(cudaEventRecord(before_.get(), stream_));
    check(cudaStreamWaitEvent(stream, before_.get(), 0));
  }
  stream_ = stream;
  used_ = true;
  while (int(packed_.size()) < ring_.count()) packed_.push_back(new_event());
  while (int(arrived_.size()) < ring_.count()) arrived_.push_back(new_event());
}

char* CudaPacker::carry(int site) {
  while (int(carries_.size()) <= site) {
    const OnDevice on(device_);
    char* blocks = allocate(kCarries * kBlock);
    for (int i = 0; i < kCarries; ++i) carries_.push_back(blocks + i * kBlock);
  }
  return carries_[size_t(site)];
}

void CudaPacker::move(char* to, const char* from, int64_t bytes) {
  const OnDevice on(device_);
  check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, stream_));
}

void CudaPacker::pack(const PackJob& job, int64_t places, int counter) {
  const OnDevice on(device_);
  PackJob own = job;
  const int64_t first = job.groups ? job.groups[0] : 0;
  const int64_t count = job.groups ? job.groups[job.rows] - first : places;
  const int64_t place_bytes = 8 * count, group_bytes = job.groups ? 4 * (job.rows + 1) : 0;
  if (place_bytes + group_bytes > kPart && job.rows > 1) {
    pack(rows_of(job, 0, job.rows / 2), job.rows / 2, counter);
    return pack(rows_of(job, job.rows / 2, job.rows), job.rows - job.rows / 2, counter);
  }
  char* staged = stage(place_bytes + group_bytes);
  std::memcpy(staged, job.places + 2 * first, size_t(place_bytes));
  own.places = reinterpret_cast<const int32_t*>(to_twin(staged)) - 2 * first;
  if (job.groups) {
    std::memcpy(staged + place_bytes, job.groups, size_t(group_bytes));
    own.groups = reinterpret_cast<const int32_t*>(to_twin(staged + place_bytes));
  }
  check(cudaMemcpyAsync(to_twin(staged), staged, size_t(place_bytes + group_bytes),
                        cudaMemcpyHostToDevice, stream_));
  own.not_finite = counter_at(counter);
  check(pack_cuda(own, stream_));
}

void CudaPacker::send(int slab, char* host, int64_t bytes) {
  const OnDevice on(device_);
  const cudaEvent_t packed = packed_[size_t(slab)].get(), arrived = arrived_[size_t(slab)].get();
  check(cudaEventRecord(packed, stream_));
  check(cudaStreamWaitEvent(copies_.get(), packed, 0));
  check(cudaMemcpyAsync(host, twin(host), size_t(bytes), cudaMemcpyDeviceToHost, copies_.get()));
  check(cudaEventRecord(arrived, copies_.get()));
}

void CudaPacker::arrive(int slab) {
  const OnDevice on(device_);
  check(cudaEventSynchronize(arrived_[size_t(slab)].get()));
}

void CudaPacker::fetch(char* host, const char* from, int64_t bytes) {
  if (bytes == 0) return;
  const OnDevice on(device_);
  check(cudaMemcpyAsync(host, from, size_t(bytes), cudaMemcpyDeviceToHost, stream_));
  check(cudaStreamSynchronize(stream_));
}

void CudaPacker::clear() {
  const OnDevice on(device_);
  if (counters_used_)
    check(cudaMemsetAsync(counters_, 0, size_t(counters_used_) * sizeof(int64_t), stream_));
  counters_used_ = 0;
}

std::vector<int64_t> CudaPacker::counted() {
  std::vector<int64_t> found(static_cast<size_t>(counters_used_));
  fetch(reinterpret_cast<char*>(found.data()), reinterpret_cast<const char*>(counters_),
        int64_t(found.size() * sizeof(int64_t)));
  return found;
}

// Memory of the stage for one call; its part is not written again before the kernel has read it.
char* CudaPacker::stage(int64_t bytes) {
  if (bytes > kPart)
    throw std::invalid_argument("writer: a row may pool 131000 places, not " +
                                std::to_string(bytes / 8));
  if (part_filled_ + bytes > kPart) {
    check(cudaEventRecord(part_read_[size_t(part_)].get(), stream_));
    part_ = (part_ + 1) % kParts;
    part_filled_ = 0;
    check(cudaEventSynchronize(part_read_[size_t(part_)].get()));  // long past, seven parts later
  }
  char* found = host_stage() + part_ * kPart + part_filled_;
  part_filled_ += round_up(bytes, 16);
  return found;
}

// More counters take the values of the old ones along; those are freed with the writer.
int64_t* CudaPacker::counter_at(int number) {
  if (number >= counters_held_) {
    const int held = std::max(kCounters, 2 * counters_held_);
    char* found = allocate(held * int64_t(sizeof(int64_t)));
    check(cudaMemsetAsync(found, 0, size_t(held) * sizeof(int64_t), stream_));
    if (counters_held_)
      move(found, reinterpret_cast<const char*>(counters_),
           counters_held_ * int64_t(sizeof(int64_t)));
    counters_ = reinterpret_cast<int64_t*>(found);
    counters_held_ = held;
  }
  counters_used_ = std::max(counters_used_, number + 1);
  return counters_ + number;
}

char* CudaPacker::allocate(int64_t bytes) {
  void* found = nullptr;
  check(cudaMalloc(&found, size_t(bytes)));
  held_.push_back(DeviceMemory(found));
  return static_cast<char*>(found);
}

}  // namespace dreamreader

#endif
