#include "packer.h"

#include <cstring>

namespace dreamreader {

char* HostPacker::carry(int site) {
  while (int(carries_.size()) <= site) carries_.push_back(std::make_unique<char[]>(kBlock));
  return carries_[size_t(site)].get();
}

void HostPacker::move(char* to, const char* from, int64_t bytes) {
  std::memcpy(to, from, size_t(bytes));
}

void HostPacker::pack(const PackJob& job, int64_t, int counter) {
  if (int(counts_.size()) <= counter) counts_.resize(size_t(counter) + 1);
  PackJob own = job;
  own.not_finite = &counts_[size_t(counter)];
  pack_cpu(own, threads_);
}

}  // namespace dreamreader
