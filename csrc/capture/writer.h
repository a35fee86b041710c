// Writes the rows of many sites to one file each, at the speed of the disk.
//
// put: packs rows into the open slab of their site. A full slab goes to a thread, which computes
// the checksums of its rows and writes its whole blocks; what is left over, less than a block,
// begins the next slab. A slab has room for the values, scales, keys and checksums of its rows:
//   [ carried | values ... | scales | keys | checksums ]
// What follows the values in a file is kept in memory until the unit ends.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "file.h"
#include "packer.h"
#include "ring.h"

namespace dreamreader {

constexpr int64_t kHeader = 8192;  // bytes before the values
constexpr int kKey = 4;            // sample, moment, branch, token

struct Options {
  int64_t ring_bytes;
  int64_t slab_bytes;  // less where the sites are many
  int threads;
  bool leave_out;      // rows for which no slab is free, instead of waiting
  int64_t wait_micro;  // before each write; for tests, as a slow disk
};

struct SiteShape {
  std::string file;
  int64_t features, row_bytes;
  Stored stored;
  Pool pool;
  bool scaled;
};

// First byte of each tensor behind the values, and the length of the file.
struct Tail {
  int64_t keys, scales, checksums, segments, moments, bytes;
};

using Segment = std::array<int32_t, 4>;  // moment, branch, first, rows

struct Site {
  Site(int number, SiteShape shape) : number(number), shape(std::move(shape)) {}

  const int number;
  const SiteShape shape;
  // Of the unit that is written:
  Packer* packer = nullptr;  // null where there was no row
  File file;
  int slab = -1;                                   // the open one
  int64_t carried = 0, in_slab = 0, capacity = 0;  // bytes, rows, rows
  int64_t rows = 0, sent = 0;                      // rows packed; bytes of values on their way
  std::vector<Segment> segments;
  std::vector<int> counters;      // of rows that are not finite, by moment; -1: none
  std::vector<int64_t> left_out;  // by moment
  std::string header, moments;
  Tail tail{};
  alignas(8) std::array<char, kBlock> rest{};
  // Behind Writer::lock_, as threads fill them:
  std::vector<float> scales;
  std::vector<int32_t> keys;
  std::vector<uint32_t> checksums;
};

class Writer {
 public:
  explicit Writer(const Options& options);
  ~Writer();
  Writer(const Writer&) = delete;

  int site(SiteShape shape);
  const SiteShape& shape(int site) const;
  void begin(const std::string& folder);

  // Adds job.rows rows, whose target the writer sets; keys [rows, 4]. Returns how many were kept.
  int64_t put(int site, const PackJob& job, int64_t places, const int32_t* keys, Packer& packer);

  // The unit ends: flush, then finish for each site that has rows or left some out, then wait.
  void flush();
  void finish(int site, std::string header, std::string moments, const Tail& tail);
  void wait();
  void abandon();

  int64_t rows(int site) const { return sites_[size_t(site)]->rows; }
  bool used(int site) const;
  const std::vector<Segment>& segments(int site) const { return sites_[size_t(site)]->segments; }
  // By moment.
  const std::vector<int64_t>& left_out(int site) const { return sites_[size_t(site)]->left_out; }
  std::vector<int64_t> not_finite(int site) const;
  int sites() const { return int(sites_.size()); }
  const Ring& ring() const { return ring_; }

  struct Counts {
    int64_t written;  // bytes of files that are whole
    int64_t waits;    // of a put for a slab
    int64_t early;    // slabs sent before they were full, for want of a free one
    int64_t grown;    // allocations of memory that is kept from unit to unit
    bool direct;      // whether every file went past the page cache
  };
  Counts counts() const;

 private:
  struct Task {
    Site* site;
    Packer* packer;  // of the rows; null for the end of a file
    int slab;
    int64_t carried, rows, first, capacity;  // rows of the site before this slab
    int64_t bytes, at;                       // what is written, and where
    bool last;                               // ends the file instead
  };

  void run();
  void write(const Task& task);
  void end_file(const Task& task);
  void release(const Task& task);
  void stop();
  void check() const;  // with the lock

  bool has_room(Site& site, int64_t rows);
  void open_slab(Site& site);
  int acquire(std::unique_lock<std::mutex>& lock);
  bool send_fullest();
  void send(Site& site);  // with the lock
  void add_keys(Site& site, const int32_t* keys, int64_t rows);
  int counter(Site& site, int32_t moment);
  int64_t capacity(const SiteShape& shape) const;
  template <typename T>
  void grow(std::vector<T>& held, size_t size);

  const Options options_;
  Ring ring_;
  std::vector<std::unique_ptr<Site>> sites_;
  std::string folder_;
  int counters_ = 0;

  mutable std::mutex lock_;
  std::condition_variable tasks_arrived_, slab_freed_;
  std::vector<int> free_;
  std::vector<Task> tasks_;  // a ring of its own: as many places as there are slabs
  size_t first_task_ = 0, task_count_ = 0;
  int in_flight_ = 0;           // slabs at the threads
  std::exception_ptr failure_;  // the first of the threads
  bool begun_ = false, discarding_ = false, stopping_ = false;
  int64_t written_ = 0, waits_ = 0, early_ = 0;
  bool direct_ = true;
  std::atomic<int64_t> grown_{0};
  std::vector<std::thread> threads_;
};

}  // namespace dreamreader
