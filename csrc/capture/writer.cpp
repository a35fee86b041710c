#include "writer.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <system_error>

#include "crc32c.h"

namespace dreamreader {
namespace {

constexpr int64_t kMostRows = INT32_MAX;  // of a shard, whose segments count them
constexpr int64_t kLeast = 64 << 10;      // a slab of less is not worth its write

int64_t row_memory(const SiteShape& shape) {  // with its scale, its key and its checksum
  return shape.row_bytes + (shape.scaled ? 4 : 0) + 4 * kKey + 4;
}

// What a slab has behind the values of its rows.
struct Areas {
  Areas(char* slab, const SiteShape& shape, int64_t capacity)
      : scales(slab + kBlock + round_up(capacity * shape.row_bytes, 16)),
        keys(scales + (shape.scaled ? 4 * capacity : 0)),
        checksums(keys + 4 * kKey * capacity) {}
  char *scales, *keys, *checksums;
};

}  // namespace

Writer::Writer(const Options& options) : options_(options), ring_(options.ring_bytes) {
  try {
    for (int i = 0; i < options.threads; ++i) threads_.emplace_back([this] { run(); });
  } catch (const std::system_error& error) {
    const size_t running = threads_.size();
    stop();
    throw std::system_error(error.code(), "writer: " + std::to_string(options.threads) +
                                              " threads are wanted, after " +
                                              std::to_string(running) + " none can be started");
  } catch (...) {
    stop();  // threads that run may not be destroyed
    throw;
  }
}

Writer::~Writer() {
  abandon();
  stop();
}

void Writer::stop() {
  {
    const std::lock_guard lock(lock_);
    stopping_ = true;
  }
  tasks_arrived_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

int Writer::site(SiteShape shape) {
  sites_.push_back(std::make_unique<Site>(int(sites_.size()), std::move(shape)));
  return int(sites_.size()) - 1;
}

const SiteShape& Writer::shape(int site) const {
  if (site < 0 || site >= sites()) throw std::invalid_argument("writer: no site has this number");
  return sites_[size_t(site)]->shape;
}

// Every site may have an open slab while one is written and one waits.
void Writer::begin(const std::string& folder) {
  abandon();
  begun_ = false;
  folder_ = folder;
  counters_ = 0;
  int64_t least = kLeast;
  for (const auto& site : sites_) {
    site->rows = site->sent = site->carried = 0;
    site->segments.clear();
    site->counters.clear();
    site->left_out.clear();
    site->keys.clear();
    site->scales.clear();
    site->checksums.clear();
    least = std::max(least, round_up(2 * kBlock + row_memory(site->shape), kBlock));
  }
  const int64_t share = ring_.bytes() / (3 * std::max(1, sites())) / kBlock * kBlock;
  ring_.divide(std::max(least, std::min(options_.slab_bytes / kBlock * kBlock, share)));
  if (ring_.count() < 2)
    throw std::invalid_argument("writer: ring_bytes must be at least " +
                                std::to_string(2 * ring_.slab_bytes()) + " for these sites, not " +
                                std::to_string(ring_.bytes()));
  const std::lock_guard lock(lock_);
  free_.resize(size_t(ring_.count()));
  for (int i = 0; i < ring_.count(); ++i) free_[size_t(i)] = ring_.count() - 1 - i;
  tasks_.resize(size_t(ring_.count()));
  first_task_ = task_count_ = 0;
  begun_ = true;
}

int64_t Writer::put(int number, const PackJob& job, int64_t places, const int32_t* keys,
                    Packer& packer) {
  Site& site = *sites_[size_t(number)];
  if (!begun_) throw std::invalid_argument("writer: begin a unit before its rows");
  if (site.packer && site.packer != &packer)
    throw std::invalid_argument("writer: the rows of a site must be on one device in a unit; " +
                                site.shape.file + " had others");
  site.capacity = capacity(site.shape);
  if (site.capacity < 1)
    throw std::invalid_argument("writer: a row of " + site.shape.file + " needs more than " +
                                std::to_string(ring_.slab_bytes()) +
                                " bytes; make its site known before the unit begins");
  if (job.rows > kMostRows - site.rows)
    throw std::invalid_argument("writer: " + site.shape.file + " would have more than " +
                                std::to_string(kMostRows) + " rows; make units of fewer samples");
  const int32_t moment = keys[1];
  if (!has_room(site, job.rows)) {
    if (size_t(moment) >= site.left_out.size()) grow(site.left_out, size_t(moment) + 1);
    site.left_out[size_t(moment)] += job.rows;
    return 0;
  }
  if (!site.file.is_open()) site.file.create(folder_ + "/" + site.shape.file);
  site.packer = &packer;
  const int count = counter(site, moment);
  for (int64_t done = 0; done < job.rows;) {
    if (site.slab < 0) open_slab(site);
    PackJob part = job;
    part.rows = std::min(job.rows - done, site.capacity - site.in_slab);
    if (job.pool == Pool::none) {
      part.places += 2 * done;
      places = part.rows;
    } else {
      part.groups += done;
    }
    char* slab = ring_.slab(site.slab);
    const Areas areas(slab, site.shape, site.capacity);
    part.out = packer.twin(slab + site.carried + site.in_slab * site.shape.row_bytes);
    if (site.shape.scaled)
      part.scales = reinterpret_cast<float*>(packer.twin(areas.scales + 4 * site.in_slab));
    packer.pack(part, places, count);
    std::memcpy(areas.keys + 4 * kKey * site.in_slab, keys + kKey * done,
                size_t(4 * kKey * part.rows));
    add_keys(site, keys + kKey * done, part.rows);
    site.in_slab += part.rows;
    site.rows += part.rows;
    done += part.rows;
    if (site.in_slab == site.capacity) {
      const std::lock_guard lock(lock_);
      send(site);
    }
  }
  return job.rows;
}

void Writer::flush() {
  std::unique_lock lock(lock_);
  check();
  for (const auto& site : sites_)
    if (site->slab >= 0) send(*site);
  slab_freed_.wait(lock, [this] { return in_flight_ == 0; });
  check();
  for (const auto& site : sites_)
    if (site->packer)
      site->packer->fetch(site->rest.data(), site->packer->carry(site->number), site->carried);
}

bool Writer::used(int number) const {
  const Site& site = *sites_[size_t(number)];
  return site.rows > 0 || !site.left_out.empty();
}

void Writer::finish(int number, std::string header, std::string moments, const Tail& tail) {
  Site& site = *sites_[size_t(number)];
  if (!begun_) throw std::invalid_argument("writer: begin a unit before its end");
  if (!site.file.is_open()) site.file.create(folder_ + "/" + site.shape.file);
  site.header = std::move(header);
  site.moments = std::move(moments);
  site.tail = tail;
  std::unique_lock lock(lock_);
  const int slab = acquire(lock);
  const Task task{&site, nullptr, slab, 0, 0, 0, 0, 0, 0, true};
  tasks_[(first_task_ + task_count_++) % tasks_.size()] = task;
  ++in_flight_;
  tasks_arrived_.notify_one();
}

void Writer::wait() {
  std::unique_lock lock(lock_);
  slab_freed_.wait(lock, [this] { return in_flight_ == 0; });
  check();
}

void Writer::abandon() {
  std::unique_lock lock(lock_);
  discarding_ = true;
  slab_freed_.wait(lock, [this] { return in_flight_ == 0; });
  discarding_ = false;
  failure_ = nullptr;
  for (const auto& site : sites_) {
    if (site->slab >= 0) free_.push_back(site->slab);
    site->slab = -1;
    site->packer = nullptr;
    site->file.close();
  }
}

std::vector<int64_t> Writer::not_finite(int number) const {
  const Site& site = *sites_[size_t(number)];
  std::vector<int64_t> found(site.counters.size());
  if (!site.packer) return found;
  const std::vector<int64_t> counted = site.packer->counted();
  for (size_t moment = 0; moment < found.size(); ++moment) {
    const int counter = site.counters[moment];  // without a count where packing failed
    if (counter >= 0 && size_t(counter) < counted.size()) found[moment] = counted[size_t(counter)];
  }
  return found;
}

Writer::Counts Writer::counts() const {
  const std::lock_guard lock(lock_);
  return {written_, waits_, early_, grown_, direct_};
}

// Rows are left out only while the disk is busy; without, full slabs are only waiting to be sent.
bool Writer::has_room(Site& site, int64_t rows) {
  const std::lock_guard lock(lock_);
  check();
  if (!options_.leave_out || in_flight_ == 0) return true;
  const int64_t open = site.slab < 0 ? 0 : site.capacity - site.in_slab;
  const int64_t rest = std::max<int64_t>(0, rows - open);
  return (rest + site.capacity - 1) / site.capacity <= int64_t(free_.size());
}

void Writer::open_slab(Site& site) {
  {
    std::unique_lock lock(lock_);
    check();
    site.slab = acquire(lock);
  }
  site.in_slab = 0;
  if (site.carried)
    site.packer->move(site.packer->twin(ring_.slab(site.slab)), site.packer->carry(site.number),
                      site.carried);
}

int Writer::acquire(std::unique_lock<std::mutex>& lock) {
  bool waited = false;
  while (free_.empty()) {
    if (in_flight_ == 0 && send_fullest()) ++early_;
    waits_ += !waited;
    waited = true;
    slab_freed_.wait(lock);
    check();
  }
  const int slab = free_.back();  // the last one that was used, since it may still be in a cache
  free_.pop_back();
  return slab;
}

bool Writer::send_fullest() {
  Site* fullest = nullptr;
  for (const auto& site : sites_)
    if (site->slab >= 0 && (!fullest || site->in_slab * site->shape.row_bytes >
                                            fullest->in_slab * fullest->shape.row_bytes))
      fullest = site.get();
  if (fullest) send(*fullest);
  return fullest;
}

void Writer::send(Site& site) {
  const int64_t bytes = site.carried + site.in_slab * site.shape.row_bytes;
  const int64_t whole = bytes / kBlock * kBlock;
  const Task task{&site,         site.packer,  site.slab,
                  site.carried,  site.in_slab, site.rows - site.in_slab,
                  site.capacity, whole,        kHeader + site.sent,
                  false};
  char* slab = ring_.slab(site.slab);
  Packer& packer = *site.packer;
  packer.send(site.slab, slab, bytes);
  if (site.shape.scaled)
    packer.send(site.slab, Areas(slab, site.shape, site.capacity).scales, 4 * site.in_slab);
  if (bytes > whole)
    packer.move(packer.carry(site.number), packer.twin(slab + whole), bytes - whole);
  site.carried = bytes - whole;
  site.sent += whole;
  site.slab = -1;
  tasks_[(first_task_ + task_count_++) % tasks_.size()] = task;
  ++in_flight_;
  tasks_arrived_.notify_one();
}

void Writer::add_keys(Site& site, const int32_t* keys, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* key = keys + kKey * row;
    if (site.segments.empty() || site.segments.back()[0] != key[1] ||
        site.segments.back()[1] != key[2]) {
      grow(site.segments, site.segments.size() + 1);
      site.segments.back() = {key[1], key[2], int32_t(site.rows + row), 0};
    }
    ++site.segments.back()[3];
  }
}

int Writer::counter(Site& site, int32_t moment) {
  while (size_t(moment) >= site.counters.size()) {
    grow(site.counters, site.counters.size() + 1);
    site.counters.back() = -1;
  }
  int& found = site.counters[size_t(moment)];
  if (found < 0) found = counters_++;
  return found;
}

// The first block is for what is carried, and 64 bytes are lost to alignment.
int64_t Writer::capacity(const SiteShape& shape) const {
  return (ring_.slab_bytes() - kBlock - 64) / row_memory(shape);
}

template <typename T>
void Writer::grow(std::vector<T>& held, size_t size) {
  if (size > held.capacity()) {
    held.reserve(std::max(size, 2 * held.capacity()));
    ++grown_;
  }
  held.resize(size);
}

void Writer::check() const {
  if (failure_) std::rethrow_exception(failure_);
}

void Writer::run() {
  for (;;) {
    Task task;
    bool skipped;
    {
      std::unique_lock lock(lock_);
      tasks_arrived_.wait(lock, [this] { return stopping_ || task_count_ > 0; });
      if (task_count_ == 0) return;
      task = tasks_[first_task_];
      first_task_ = (first_task_ + 1) % tasks_.size();
      --task_count_;
      skipped = discarding_ || failure_;
    }
    try {
      if (task.packer) task.packer->arrive(task.slab);  // before anyone may use the slab again
      if (!skipped) task.last ? end_file(task) : write(task);
    } catch (...) {
      const std::lock_guard lock(lock_);
      if (!failure_) failure_ = std::current_exception();
    }
    release(task);
  }
}

void Writer::write(const Task& task) {
  Site& site = *task.site;
  char* slab = ring_.slab(task.slab);
  const Areas areas(slab, site.shape, task.capacity);
  const RowBytes parts[] = {
      {slab + task.carried, site.shape.row_bytes, site.shape.row_bytes},
      {areas.keys, 4 * kKey, 4 * kKey},
      {areas.scales, 4, 4},
  };
  crc32c_rows(parts, site.shape.scaled ? 3 : 2, task.rows,
              reinterpret_cast<uint32_t*>(areas.checksums));
  {
    const std::lock_guard lock(lock_);
    const size_t first = size_t(task.first), end = size_t(task.first + task.rows);
    const auto keep = [&](auto& held, const char* from, size_t each) {
      if (held.size() < each * end) grow(held, each * end);
      std::memcpy(held.data() + each * first, from, sizeof(held[0]) * each * size_t(task.rows));
    };
    keep(site.keys, areas.keys, kKey);
    keep(site.checksums, areas.checksums, 1);
    if (site.shape.scaled) keep(site.scales, areas.scales, 1);
  }
  if (options_.wait_micro)
    std::this_thread::sleep_for(std::chrono::microseconds(options_.wait_micro));
  site.file.write(slab, task.bytes, task.at);
}

namespace {

// Writes bytes of any length one after the other, in whole blocks.
class Stream {
 public:
  Stream(File& file, char* buffer, int64_t size) : file_(file), buffer_(buffer), size_(size) {}

  void start(int64_t at) {
    send();
    at_ = at;
  }
  void add(const void* data, int64_t bytes) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const int64_t part = std::min(bytes, size_ - filled_);
      std::memcpy(buffer_ + filled_, from, size_t(part));
      filled_ += part;
      from += part;
      bytes -= part;
      if (filled_ == size_) send();
    }
  }
  void zeros_until(int64_t place) {
    constexpr char kZeros[8] = {};  // tensors begin at multiples of 8
    add(kZeros, place - at_ - filled_);
  }
  void send() {
    const int64_t whole = round_up(filled_, kBlock);
    std::memset(buffer_ + filled_, 0, size_t(whole - filled_));
    file_.write(buffer_, whole, at_);
    at_ += filled_;
    filled_ = 0;
  }

 private:
  File& file_;
  char* buffer_;
  const int64_t size_;
  int64_t at_ = 0, filled_ = 0;
};

}  // namespace

void Writer::end_file(const Task& task) {
  Site& site = *task.site;
  Stream stream(site.file, ring_.slab(task.slab), ring_.slab_bytes());
  stream.add(site.header.data(), int64_t(site.header.size()));
  stream.start(kHeader + site.sent);
  stream.add(site.rest.data(), site.carried);
  const auto part = [&](int64_t at, const void* data, int64_t bytes) {
    stream.zeros_until(at);
    stream.add(data, bytes);
  };
  part(site.tail.keys, site.keys.data(), 4 * int64_t(site.keys.size()));
  part(site.tail.scales, site.scales.data(), 4 * int64_t(site.scales.size()));
  part(site.tail.checksums, site.checksums.data(), 4 * int64_t(site.checksums.size()));
  part(site.tail.segments, site.segments.data(), int64_t(site.segments.size() * sizeof(Segment)));
  part(site.tail.moments, site.moments.data(), int64_t(site.moments.size()));
  stream.zeros_until(site.tail.bytes);
  stream.send();
  const bool direct = site.file.direct();
  site.file.finish(site.tail.bytes);
  const std::lock_guard lock(lock_);
  written_ += site.tail.bytes;
  direct_ = direct_ && direct;
}

void Writer::release(const Task& task) {
  const std::lock_guard lock(lock_);
  free_.push_back(task.slab);
  --in_flight_;
  slab_freed_.notify_all();
}

}  // namespace dreamreader
