// CPU side of gathering: mapped files, finding rows, and the threads. At the foot its binding.
#include "gather.h"

#include <fcntl.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bus_error.h"
#include "op.h"
#include "permutation.h"

namespace dreamreader {
namespace {

constexpr int64_t kHeader = 8192;  // bytes before the values; layout.py says where all is
constexpr int64_t kKeyBytes = 16;
constexpr int64_t kTokenAt = 12;  // byte of a key where its token is
constexpr int64_t kPage = 4096;
constexpr int64_t kLine = 64;
constexpr int64_t kCached = 1 << 20;  // bytes of a batch that stay in caches until they are used

// What is wrong with the store, for the error that Python words.
struct Problem {
  const char* kind = nullptr;  // null: nothing
  int64_t file = 0, row = 0;
  std::string detail;
};

// Parts of a shard.
struct Shard {
  int64_t rows = 0, keys = 0, scales = 0, checksums = 0, end = 0;

  Shard(int64_t rows, int64_t row_bytes, bool scaled) : rows(rows) {
    const auto padded = [](int64_t bytes) { return (bytes + 7) / 8 * 8; };
    keys = kHeader + padded(rows * row_bytes);
    scales = keys + rows * kKeyBytes;
    checksums = scales + (scaled ? padded(rows * 4) : 0);
    end = checksums + rows * 4;
  }
};

// Mapped files; those that were not used for longest go first where there are too many.
class Mappings final : public MappedMemory {
 public:
  Mappings(std::vector<std::string> names, std::vector<int64_t> bytes, int64_t most)
      : names_(std::move(names)), bytes_(std::move(bytes)), most_(most), held_(names_.size()) {}
  Mappings(const Mappings&) = delete;
  ~Mappings() {
    for (int64_t file : used_) munmap(held_[size_t(file)].base, size_t(bytes_[size_t(file)]));
  }

  const char* operator[](int64_t file) const { return held_[size_t(file)].base; }
  int64_t most() const { return most_; }
  int64_t open() const { return int64_t(used_.size()); }

  bool miss(const void* address) override {
    const char* at = static_cast<const char*>(address);
    for (size_t file = 0; file < held_.size(); ++file) {
      const char* base = held_[file].base;
      if (!base || at < base || at >= base + bytes_[file]) continue;
      held_[file].missed = true;
      missed_ = true;
      return true;
    }
    return false;
  }

  // What became of a file of which a page was missing since the last call. Those files are mapped
  // again when they are needed again.
  Problem lost() {
    if (!missed_.exchange(false)) return {};
    int64_t file = -1;
    for (size_t each = 0; each < held_.size(); ++each) {
      if (!held_[each].missed.exchange(false)) continue;
      file = int64_t(each);
      unmap(file);
    }
    const Problem problem = shorter(file);
    return problem.kind ? problem : Problem{"read", file, 0, std::strerror(EIO)};
  }

  // Whether a file has lost what a whole one has.
  Problem shorter(int64_t file) const {
    struct stat found;
    if (stat(names_[size_t(file)].c_str(), &found) != 0)
      return {"open", file, 0, std::strerror(errno)};
    const int64_t bytes = bytes_[size_t(file)];
    if (found.st_size < bytes) return {"short", file, bytes, std::to_string(found.st_size)};
    return {};
  }

  // The same, at the price of one load: what a mapped file has lost reads as 0, and its last
  // checksum is hardly ever 0.
  Problem cut(int64_t file) {
    std::atomic_thread_fence(std::memory_order_acquire);
    uint32_t last;
    {
      const ReadingMapped reading(*this);
      std::memcpy(&last, held_[size_t(file)].base + bytes_[size_t(file)] - 4, 4);
    }
    if (last) return {};
    const Problem problem = lost();
    return problem.kind ? problem : shorter(file);
  }

  // Maps a file. What was asked for in the last `most` calls stays mapped.
  Problem use(int64_t file) {
    Held& held = held_[size_t(file)];
    if (held.base) {
      if (held.place != used_.begin()) used_.splice(used_.begin(), used_, held.place);
      return {};
    }
    if (open() >= most_) unmap(used_.back());
    const int handle = ::open(names_[size_t(file)].c_str(), O_RDONLY | O_CLOEXEC);
    if (handle < 0) return {"open", file, 0, std::strerror(errno)};
    struct stat found;
    void* base = MAP_FAILED;
    const int64_t bytes = bytes_[size_t(file)];
    const bool whole = fstat(handle, &found) == 0 && found.st_size >= bytes;
    if (whole) base = mmap(nullptr, size_t(bytes), PROT_READ, MAP_SHARED, handle, 0);
    const std::string said = std::strerror(errno);
    close(handle);
    if (!whole) return {"short", file, bytes, std::to_string(found.st_size)};
    if (base == MAP_FAILED) return {"open", file, 0, said};
    madvise(base, size_t(bytes), MADV_RANDOM);  // else each row that is not cached reads 128 KB
    held.base = static_cast<char*>(base);
    used_.push_front(file);
    held.place = used_.begin();
    return {};
  }

 private:
  struct Held {
    char* base = nullptr;
    std::list<int64_t>::iterator place;
    std::atomic<bool> missed{false};
  };

  void unmap(int64_t file) {
    Held& held = held_[size_t(file)];
    munmap(held.base, size_t(bytes_[size_t(file)]));
    held.base = nullptr;
    used_.erase(held.place);
  }

  std::vector<std::string> names_;
  std::vector<int64_t> bytes_;
  int64_t most_;
  std::vector<Held> held_;
  std::list<int64_t> used_;  // the last used first
  std::atomic<bool> missed_{false};
};

// Which tokens are wanted: begin, begin + every, ..., or those that the table marks.
struct Tokens {
  int64_t begin = 0;
  uint64_t span = 0;
  uint64_t every = 1;
  std::vector<uint8_t> table;

  bool wanted(const char* key) const {
    int32_t token;
    std::memcpy(&token, key + kTokenAt, 4);
    const uint64_t at = uint64_t(int64_t(token) - begin);
    return at < span && (table.empty() ? every == 1 || at % every == 0 : table[at] != 0);
  }
};

void will_need(const char* p, int64_t bytes) {
  const uintptr_t from = uintptr_t(p) / kPage * kPage, to = uintptr_t(p) + uintptr_t(bytes);
  madvise(reinterpret_cast<void*>(from), to - from, MADV_WILLNEED);
}

int64_t blocks_read() {  // by this process, from disks
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_inblock;
}

template <typename T>
std::vector<T> copied(py::handle tensor, int bits, const char* message) {
  const TensorView view(tensor);
  require(view.dims() == 1 && view.is(kDLInt, bits) && view.device().type == kDLCPU &&
              (view.size(0) <= 1 || view.stride(0) == 1),
          message);
  const T* data = reinterpret_cast<const T*>(view.data());
  return {data, data + view.size(0)};
}

class Gather {
 public:
  Gather(std::vector<std::string> names, py::handle file_rows, py::handle file, py::handle first,
         py::handle start, int stored, int64_t width, int64_t most)
      : file_(copied<int32_t>(file, 32, "gather: file must be dense int32 [runs]")),
        first_(copied<int64_t>(first, 64, "gather: first must be dense int64 [runs]")),
        start_(copied<int64_t>(start, 64, "gather: start must be dense int64 [runs + 1]")) {
    require(stored >= 0 && stored <= int(Stored::i8), "gather: no such stored type");
    require(width > 0 && most > 0, "gather: width and most must be positive");
    require(file_.size() == first_.size() && start_.size() == file_.size() + 1 && start_[0] == 0,
            "gather: runs have a file, a first row and a start each, starts one more");
    format_.stored = Stored(stored);
    format_.width = width;
    constexpr int64_t sizes[] = {4, 2, 2, 1, 1};
    format_.row_bytes = width * sizes[stored];
    scaled_ = format_.stored == Stored::f8 || format_.stored == Stored::i8;
    std::vector<int64_t> bytes;
    for (int64_t rows : copied<int64_t>(file_rows, 64, "gather: file_rows must be int64 [files]")) {
      shards_.emplace_back(rows, format_.row_bytes, scaled_);
      bytes.push_back(shards_.back().end);
    }
    require(shards_.size() == names.size(), "gather: every file has a number of rows");
    for (size_t run = 0; run < file_.size(); ++run) {
      require(file_[run] >= 0 && size_t(file_[run]) < shards_.size() && first_[run] >= 0 &&
                  start_[run + 1] >= start_[run] &&
                  first_[run] + start_[run + 1] - start_[run] <= shards_[size_t(file_[run])].rows,
              "gather: a run is outside its file");
    }
    mappings_ = std::make_unique<Mappings>(std::move(names), std::move(bytes), most);
  }

  // From now on the runs have `rows` rows each, of which those with such a token count.
  void choose(py::handle rows, int64_t begin, int64_t span, int64_t every, py::bytes table) {
    rows_ = copied<int64_t>(rows, 64, "gather: rows must be dense int64 [runs]");
    require(rows_.size() == file_.size() && span > 0 && every > 0, "gather: bad choice of tokens");
    for (size_t run = 0; run < rows_.size(); ++run)
      require(rows_[run] >= 0 && first_[run] + rows_[run] <= shards_[size_t(file_[run])].rows &&
                  rows_[run] >= start_[run + 1] - start_[run],
              "gather: a run is outside its file");
    const std::string_view marks = table;
    require(marks.empty() || int64_t(marks.size()) == span, "gather: bad table of tokens");
    tokens_ = {begin, uint64_t(span), uint64_t(every), {marks.begin(), marks.end()}};
  }

  py::object count(py::handle counts, int threads) {
    const TensorView view(counts);
    require(view.dims() == 1 && view.is(kDLInt, 64) && view.size(0) == int64_t(file_.size()) &&
                rows_.size() == file_.size() && (view.size(0) <= 1 || view.stride(0) == 1),
            "gather: counts must be dense int64 [runs], after a choice of tokens");
    Problem problem;
    {
      py::gil_scoped_release release;
      std::lock_guard<std::mutex> lock(busy_);
      watch_bus_errors();
      problem = count_runs(reinterpret_cast<int64_t*>(view.data()), threads);
    }
    return told(problem);
  }

  py::object read(int64_t position, std::optional<uint64_t> seed, py::handle out, py::object mean,
                  py::object scale, py::object keys, bool checked, int threads) {
    const TensorView to(out);
    require(to.dims() == 2 && to.size(1) == format_.width && to.device().type == kDLCPU &&
                (to.size(0) <= 1 || to.stride(0) == format_.width) &&
                (format_.width == 1 || to.stride(1) == 1),
            "gather: out must be dense [rows, width] in CPU memory");
    require(position >= 0 && position <= start_.back() - to.size(0),
            "gather: positions are beyond the last row");
    require(threads > 0, "gather: threads must be positive");
    GatherFormat format = with(to, checked);
    format.mean = vector_of(mean);
    format.scale = vector_of(scale);
    require(!format.mean == !format.scale, "gather: mean and scale come together");
    format.copied = format.copied && !format.mean;
    int32_t* found = nullptr;
    if (!keys.is_none()) {
      const TensorView view(keys);
      require(view.dims() == 2 && view.is(kDLInt, 32) && view.size(0) == to.size(0) &&
                  view.size(1) == 5 && view.stride(1) == 1 &&
                  (view.size(0) <= 1 || view.stride(0) == 5),
              "gather: keys must be dense int32 [rows, 5]");
      found = reinterpret_cast<int32_t*>(view.data());
    }
    Problem problem;
    {
      py::gil_scoped_release release;
      std::lock_guard<std::mutex> lock(busy_);
      watch_bus_errors();
      const int64_t out_bytes = format.width * (format.out == DType::f32 ? 4 : 2);
      format.streamed = (out_bytes | int64_t(uintptr_t(to.data()))) % kLine == 0 &&
                        to.size(0) * out_bytes > kCached;
      for (int64_t at = 0; at < to.size(0) && !problem.kind; at += mappings_->most()) {
        const int64_t rows = std::min(to.size(0) - at, mappings_->most());
        problem = read_rows(format, position + at, rows, seed, to.data() + at * out_bytes,
                            out_bytes, found ? found + at * 5 : nullptr, threads);
      }
    }
    return told(problem);
  }

  int64_t open() const { return mappings_->open(); }

 private:
  struct Found {
    int64_t run, row;
  };

  GatherFormat with(const TensorView& out, bool checked) const {
    GatherFormat format = format_;
    format.checked = checked;
    constexpr uint8_t codes[] = {kDLFloat, kDLBfloat, kDLFloat};
    constexpr int bits[] = {32, 16, 16};
    const int own = int(format_.stored);
    format.copied = !scaled_ && out.is(codes[own], bits[own]);
    if (out.is(kDLFloat, 32)) {
      format.out = DType::f32;
    } else if (out.is(kDLBfloat, 16)) {
      format.out = DType::bf16;
    } else if (out.is(kDLFloat, 16)) {
      format.out = DType::f16;
    } else {
      throw std::invalid_argument("gather: no kernel for rows " + out.describe());
    }
    return format;
  }

  const float* vector_of(const py::object& tensor) const {
    if (tensor.is_none()) return nullptr;
    const TensorView view(tensor);
    require(view.dims() == 1 && view.is(kDLFloat, 32) && view.size(0) == format_.width &&
                (format_.width == 1 || view.stride(0) == 1) && view.device().type == kDLCPU,
            "gather: mean and scale must be dense float32 [width]");
    return reinterpret_cast<const float*>(view.data());
  }

  static py::object told(const Problem& problem) {
    if (!problem.kind) return py::none();
    return py::make_tuple(problem.kind, problem.file, problem.row, problem.detail);
  }

  const char* key_of(int64_t file, int64_t row) const {
    return (*mappings_)[file] + shards_[size_t(file)].keys + row * kKeyBytes;
  }

  // `share` for work that reads mapped files.
  template <typename F>
  void share_reading(int64_t items, int64_t grain, int threads, const F& work) {
    share(items, grain, threads, [&](int64_t first, int64_t last) {
      const ReadingMapped reading(*mappings_);
      work(first, last);
    });
  }

  // Whether a file of these runs got shorter; for what no checksum covers.
  template <typename F>
  Problem cut(int64_t count, const F& run_at) {
    int64_t before = -1;
    asked_.assign(shards_.size(), false);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t file = file_[size_t(run_at(i))];
      if (file == before || asked_[size_t(file)]) continue;
      asked_[size_t(file)] = true;
      before = file;
      if (const Problem problem = mappings_->cut(file); problem.kind) return problem;
    }
    return {};
  }

  Problem count_runs(int64_t* counts, int threads) {
    const int64_t runs = int64_t(file_.size());
    for (int64_t from = 0; from < runs; from += mappings_->most()) {
      const int64_t to = std::min(runs, from + mappings_->most());
      for (int64_t run = from; run < to; ++run) {
        const int64_t file = file_[size_t(run)];
        if (const Problem problem = mappings_->use(file); problem.kind) return problem;
        will_need(key_of(file, first_[size_t(run)]), rows_[size_t(run)] * kKeyBytes);
      }
      share_reading(to - from, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t run = from + begin; run < from + end; ++run) {
          const char* key = key_of(file_[size_t(run)], first_[size_t(run)]);
          int64_t count = 0;
          for (int64_t row = 0; row < rows_[size_t(run)]; ++row)
            count += tokens_.wanted(key + row * kKeyBytes);
          counts[run] = count;
        }
      });
      if (const Problem problem = mappings_->lost(); problem.kind) return problem;
      const auto run_at = [&](int64_t i) { return from + i; };
      if (const Problem problem = cut(to - from, run_at); problem.kind) return problem;
    }
    return {};
  }

  Problem read_rows(const GatherFormat& format, int64_t position, int64_t rows,
                    std::optional<uint64_t> seed, char* out, int64_t out_bytes, int32_t* keys,
                    int threads) {
    found_.resize(size_t(rows));
    find_runs(position, seed, threads);
    for (const Found& each : found_) {
      const Problem problem = mappings_->use(file_[size_t(each.run)]);
      if (problem.kind) return problem;
    }
    const int64_t before = blocks_read();
    if (cold_) announce(threads);
    std::mutex reporting;
    int64_t first_wrong = rows;
    const int64_t grain = std::clamp(rows / (4 * threads), int64_t{16}, kGatherRows);
    share_reading(rows, grain, threads, [&](int64_t begin, int64_t end) {
      GatherRow parts[kGatherRows];
      for (int64_t at = begin; at < end; ++at) {
        if (!rows_.empty()) pick(found_[size_t(at)]);
        parts[at - begin] = parts_of(found_[size_t(at)], out + at * out_bytes);
      }
      const int64_t wrong = gather_kernels().run(format, parts, end - begin);
      if (wrong >= 0) {
        std::lock_guard<std::mutex> lock(reporting);
        first_wrong = std::min(first_wrong, begin + wrong);
      } else if (keys) {
        for (int64_t at = begin; at < end; ++at) {
          keys[at * 5] = file_[size_t(found_[size_t(at)].run)];
          std::memcpy(keys + at * 5 + 1, parts[at - begin].key, kKeyBytes);
        }
      }
    });
    cold_ = blocks_read() != before;
    if (const Problem lost = mappings_->lost(); lost.kind) return lost;
    if (first_wrong < rows) {
      const Found& wrong = found_[size_t(first_wrong)];
      const int64_t file = file_[size_t(wrong.run)];
      const Problem shorter = mappings_->shorter(file);
      return shorter.kind ? shorter : Problem{"checksum", file, wrong.row, ""};
    }
    if (format.checked && rows_.empty()) return {};
    return cut(rows, [&](int64_t i) { return found_[size_t(i)].run; });
  }

  // The run of each position; its row too, unless tokens are chosen: then its number among them.
  void find_runs(int64_t position, std::optional<uint64_t> seed, int threads) {
    const Permutation permutation(start_.back(), seed.value_or(0));
    share(int64_t(found_.size()), kGatherRows, threads, [&](int64_t begin, int64_t end) {
      int64_t places[kGatherRows];
      if (seed) {
        gather_kernels().permute(permutation, position + begin, end - begin, places);
      } else {
        std::iota(places, places + (end - begin), position + begin);
      }
      for (int64_t at = begin; at < end; ++at) {
        const int64_t place = places[at - begin], run = run_of(place);
        const int64_t within = place - start_[size_t(run)];
        found_[size_t(at)] = {run, rows_.empty() ? first_[size_t(run)] + within : within};
      }
    });
  }

  int64_t run_of(int64_t place) const {
    const int64_t *from = start_.data(), *const begin = from;
    for (size_t runs = file_.size(); runs > 1;) {  // without branches, which would be guessed wrong
      const size_t half = runs / 2;
      from = from[half] <= place ? from + half : from;
      runs -= half;
    }
    return from - begin;
  }

  void pick(Found& found) const {
    const int64_t from = first_[size_t(found.run)];
    const char* key = key_of(file_[size_t(found.run)], from);
    int64_t left = found.row, row = 0;
    for (const int64_t rows = rows_[size_t(found.run)]; row < rows; ++row)
      if (tokens_.wanted(key + row * kKeyBytes) && left-- == 0) break;
    found.row = from + std::min(row, rows_[size_t(found.run)] - 1);  // keys that changed meanwhile
  }

  // Has the system read what is not in memory yet, of all rows at once.
  void announce(int threads) {
    const bool chosen = !rows_.empty();
    for (const bool values : {false, true}) {
      if (!values && !chosen) continue;
      share_reading(int64_t(found_.size()), kGatherRows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
          Found found = found_[size_t(at)];
          const int64_t run = found.run, file = file_[size_t(run)];
          if (!values) {
            will_need(key_of(file, first_[size_t(run)]), rows_[size_t(run)] * kKeyBytes);
            continue;
          }
          if (chosen) pick(found);
          const GatherRow parts = parts_of(found, nullptr);
          will_need(parts.values, format_.row_bytes);
          if (!chosen) will_need(parts.key, kKeyBytes);
          if (scaled_) will_need(parts.scale, 4);
          will_need(parts.checksum, 4);
        }
      });
    }
  }

  GatherRow parts_of(const Found& found, char* out) const {
    const int64_t file = file_[size_t(found.run)], row = found.row;
    const char* base = (*mappings_)[file];
    const Shard& shard = shards_[size_t(file)];
    return {base + kHeader + row * format_.row_bytes, base + shard.keys + row * kKeyBytes,
            base + shard.scales + row * 4, base + shard.checksums + row * 4, out};
  }

  GatherFormat format_{};
  bool scaled_ = false;
  std::vector<Shard> shards_;
  std::vector<int32_t> file_;
  std::vector<int64_t> first_, start_, rows_;
  Tokens tokens_;
  std::unique_ptr<Mappings> mappings_;
  std::vector<Found> found_;
  std::vector<bool> asked_;  // by file
  bool cold_ = true;         // whether the last rows came from the disk
  std::mutex busy_;
};

Bind bind_gather([](py::module_& m) {
  py::class_<Gather>(m, "Gather")
      .def(py::init<std::vector<std::string>, py::handle, py::handle, py::handle, py::handle, int,
                    int64_t, int64_t>())
      .def("choose", &Gather::choose)
      .def("count", &Gather::count)
      .def("read", &Gather::read)
      .def_property_readonly("open", &Gather::open);
});

}  // namespace
}  // namespace dreamreader
