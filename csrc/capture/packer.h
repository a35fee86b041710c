// Where rows are packed: in the ring itself, or in a twin of it in the memory of a GPU, from which
// whole slabs are copied. The writer does the same with both.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "pack.h"
#include "ring.h"

namespace dreamreader {

class Packer {
 public:
  virtual ~Packer() = default;

  // Where the bytes are prepared that will be at this place of the ring.
  virtual char* twin(char* host) = 0;
  // Less than a block of each site, which waits for the next slab.
  virtual char* carry(int site) = 0;

  // These three happen in the order of the calls, maybe later.
  virtual void move(char* to, const char* from, int64_t bytes) = 0;
  virtual void pack(const PackJob& job, int64_t places, int counter) = 0;
  virtual void send(int slab, char* host, int64_t bytes) = 0;  // from twin(host)

  virtual void arrive(int slab) = 0;  // waits until what was sent is in the ring; on any thread
  virtual void fetch(char* host, const char* from, int64_t bytes) = 0;  // waits, too

  // Rows that are not finite, by counter.
  virtual void clear() = 0;
  virtual std::vector<int64_t> counted() = 0;
};

class HostPacker : public Packer {
 public:
  explicit HostPacker(int threads) : threads_(threads) {}
  char* twin(char* host) override { return host; }
  char* carry(int site) override;
  void move(char* to, const char* from, int64_t bytes) override;
  void pack(const PackJob& job, int64_t places, int counter) override;
  void send(int, char*, int64_t) override {}
  void arrive(int) override {}
  void fetch(char* host, const char* from, int64_t bytes) override { move(host, from, bytes); }
  void clear() override { counts_.clear(); }
  std::vector<int64_t> counted() override { return counts_; }

 private:
  int threads_;
  std::deque<std::unique_ptr<char[]>> carries_;
  std::vector<int64_t> counts_;
};

}  // namespace dreamreader
