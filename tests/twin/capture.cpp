// The writer with rows that are packed on a GPU, whose streams are threads here: its files must be
// those of rows that are packed in host memory, and after the first unit it may not allocate nor
// wait for a stream. Packing itself is plain: float32 in, float32 or int8 out.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "../../csrc/capture/crc32c.cpp"
#include "../../csrc/capture/cuda_packer.cpp"

// A file system that refuses O_DIRECT at the first write, to two threads at once: the second hears
// of it when the first has given O_DIRECT up already.
std::atomic<int> refused{-1};  // how many writes were; -1: it is like any other
ssize_t write_at(int file, const void* from, size_t bytes, off_t at) {
  if (refused < 0 || !(fcntl(file, F_GETFL) & O_DIRECT)) return pwrite(file, from, bytes, at);
  const bool first = refused++ == 0;
  for (int wait = 0; wait < 5000 && (first ? refused < 2 : fcntl(file, F_GETFL) & O_DIRECT); ++wait)
    usleep(1000);
  if (!first) usleep(50'000);
  errno = EINVAL;
  return -1;
}

#define pwrite write_at
#include "../../csrc/capture/file.cpp"
#undef pwrite
#include "../../csrc/capture/packer.cpp"
#include "../../csrc/capture/ring.cpp"
#include "../../csrc/capture/writer.cpp"
#define DR_ISA portable
#include "../../csrc/capture/crc32c_simd.cpp"

namespace dreamreader {

Isa isa() { return Isa::portable; }

void pack_cpu(const PackJob& job, int) {
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t first = job.groups ? job.groups[r] : r,
                  last = job.groups ? job.groups[r + 1] : r + 1;
    bool finite = true;
    float values[512], most = 0;
    for (int64_t d = 0; d < job.x.width; ++d) {
      float v = 0;
      for (int64_t p = first; p < last; ++p)
        v += row_at<float>(job.x, job.places[2 * p], job.places[2 * p + 1])[d];
      values[d] = v;
      finite = finite && std::isfinite(v);
      if (std::isfinite(v)) most = std::fmax(most, std::fabs(v));
    }
    *job.not_finite += !finite;
    if (job.scales) job.scales[r] = most;
    for (int64_t d = 0; d < job.x.width; ++d) {
      const int64_t at = r * job.x.width + d;
      if (job.scales)
        static_cast<int8_t*>(job.out)[at] =
            int8_t(std::fmin(127, std::fmax(-127, 127 * values[d] / most)));
      else
        static_cast<float*>(job.out)[at] = values[d];
    }
  }
}

cudaError_t pack_cuda(const PackJob& job, cudaStream_t stream) {
  stream->add([=] { pack_cpu(job, 1); });
  return cudaSuccess;
}

}  // namespace dreamreader

using namespace dreamreader;
namespace fs = std::filesystem;

struct Input {
  int site;
  std::vector<float> x;
  std::vector<int32_t> places, groups, keys;
  int64_t features;
};

StridedRows rows_of(const Input& in) {
  return {const_cast<float*>(in.x.data()),
          DType::f32,
          16,
          64,
          in.features,
          64 * in.features,
          in.features,
          1};
}

// 16 entries of 64 tokens; a row of the third site is the sum of `pooled` places.
Input input(int site, int64_t features, int64_t rows, int pooled, int32_t moment,
            std::mt19937& random) {
  Input in{site, {}, {}, {}, {}, features};
  for (int64_t i = 0; i < 16 * 64 * features; ++i) in.x.push_back(float(random() % 2001) - 1000);
  in.x[features * (random() % (16 * 64))] = INFINITY;
  for (int64_t r = 0; r < rows; ++r) {
    in.groups.push_back(int32_t(r) * pooled);
    for (int p = 0; p < pooled; ++p)
      in.places.insert(in.places.end(), {int32_t(random() % 16), int32_t(random() % 64)});
    in.keys.insert(in.keys.end(), {int32_t(r % 4), moment, int32_t(r / 40 % 2), int32_t(r)});
  }
  in.groups.push_back(int32_t(rows) * pooled);
  return in;
}

bool failed = false;
void expect(bool condition, const char* what) {
  if (!condition) std::fprintf(stderr, "%s\n", what);
  failed = failed || !condition;
}

Tail tail_of(const Writer& writer, int site) {
  const SiteShape& shape = writer.shape(site);
  const int64_t rows = writer.rows(site);
  Tail tail;
  tail.keys = kHeader + round_up(rows * shape.row_bytes, 8);
  tail.scales = tail.keys + 16 * rows;
  tail.checksums = tail.scales + (shape.scaled ? round_up(4 * rows, 8) : 0);
  tail.segments = tail.checksums + round_up(4 * rows, 8);
  tail.moments = tail.segments + 16 * int64_t(writer.segments(site).size());
  tail.bytes = tail.moments + 56;
  return tail;
}

// Two units; returns the rows that are not finite.
std::vector<std::vector<int64_t>> fill(Writer& writer, Packer& packer,
                                       const std::vector<Input>& inputs, const fs::path& folder,
                                       cudaStream_t* streams) {
  std::vector<std::vector<int64_t>> found;
  for (int unit = 0; unit < 2; ++unit) {
    const fs::path own = folder / std::to_string(unit);
    fs::create_directories(own);
    writer.begin(own.string());
    packer.clear();
    const int64_t allocations = twin::allocations, waits = twin::waits;
    for (size_t n = 0; n < inputs.size(); ++n) {
      const Input& in = inputs[n];
      if (streams) static_cast<CudaPacker&>(packer).use(0, streams[n / 3 % 2]);
      const SiteShape& shape = writer.shape(in.site);
      PackJob job{};
      job.x = rows_of(in);
      job.places = in.places.data();
      job.pool = shape.pool;
      job.groups = shape.pool == Pool::none ? nullptr : in.groups.data();
      job.rows = int64_t(in.keys.size()) / 4;
      job.stored = shape.stored;
      writer.put(in.site, job, int64_t(in.places.size()) / 2, in.keys.data(), packer);
    }
    expect(unit == 0 || allocations == twin::allocations, "the second unit allocated memory");
    expect(waits == twin::waits, "a put waited for a stream");
    writer.flush();
    for (int site = 0; site < writer.sites(); ++site) {
      found.push_back(writer.not_finite(site));
      writer.finish(site, std::string(kHeader, 'h'), std::string(56, 'm'), tail_of(writer, site));
    }
    writer.wait();
  }
  return found;
}

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Two threads write blocks of one file, which ends up whole and in the page cache.
void check_refusal(const std::string& path) {
  constexpr int64_t bytes = 4096;
  alignas(bytes) static char block[bytes];
  std::fill_n(block, bytes, 'b');
  File file;
  file.create(path);
  if (!file.direct()) return;
  refused = 0;
  std::atomic<int> errors{0};
  const auto write = [&](int64_t at) {
    try {
      file.write(block, bytes, at);
    } catch (const FileError&) {
      ++errors;
    }
  };
  std::thread other(write, bytes);
  write(0);
  other.join();
  file.finish(2 * bytes);
  expect(refused == 2, "two writes were to be refused");
  refused = -1;
  expect(errors == 0 && !file.direct(), "a refusal of O_DIRECT became an error");
  expect(content(path) == std::string(2 * bytes, 'b'), "the file that refused O_DIRECT");
}

// However early the memory of the GPU ends: an error that leaves nothing behind, so that the next
// attempt succeeds.
void check_no_memory(const fs::path& folder) {
  Writer writer({1 << 18, 4 << 20, 1, false, 0});
  writer.site({"rows", 4, 16, Stored::f32, Pool::none, false});
  writer.begin(folder.string());
  int failures = 0;
  for (twin::left = 0;; twin::left = ++failures) {
    try {
      CudaPacker packer(0, writer.ring());
      break;
    } catch (const std::bad_alloc& error) {
      expect(std::string(error.what()).starts_with("writer: "),
             "an allocation failed without a reason");
      expect(twin::held == 0 && !twin::registered,
             "a constructor that failed left something behind");
    }
  }
  expect(failures > 10, "too few allocations failed");
  expect(twin::held == 0 && !twin::registered, "a packer that ended left something behind");
  twin::left = -1;
}

void check_most_rows(const fs::path& folder) {
  Writer writer({1 << 18, 4 << 20, 1, false, 0});
  HostPacker packer(1);
  const int site = writer.site({"many", 1, 4, Stored::f32, Pool::none, false});
  writer.begin(folder.string());
  PackJob job{};
  job.rows = int64_t{1} << 31;
  const int32_t key[kKey] = {};
  std::string said;
  try {
    writer.put(site, job, job.rows, key, packer);
  } catch (const std::invalid_argument& error) {
    said = error.what();
  }
  expect(said.starts_with("writer: many would have more than 2147483647 rows"),
         "too many rows were not refused");
}

int main(int, char** arguments) {
  const fs::path folder = arguments[1];
  check_refusal(folder / "refusing");
  check_most_rows(folder);
  check_no_memory(folder);
  std::mt19937 random(3);
  std::vector<Input> inputs;
  for (int n = 0; n < 12; ++n) {
    inputs.push_back(input(0, 333, 60 + n, 1, n / 4, random));
    inputs.push_back(input(1, 77, 200 + n, 1, n / 4, random));
    inputs.push_back(
        input(2, 3, 64, 3000, n / 4, random));  // more places than a part of the stage holds
  }
  // No ring is full meanwhile, so the stage has to hold these back.
  for (int n = 0; n < 8; ++n) inputs.push_back(input(2, 3, 64, 3000, 2, random));
  twin::Stream one(300), two(40);
  cudaStream_t streams[] = {&one, &two};
  std::vector<std::vector<int64_t>> counts[2];
  for (int gpu = 0; gpu < 2; ++gpu) {
    Writer writer({1 << 18, 4 << 20, 2, false, 100});
    writer.site({"rows", 333, 4 * 333, Stored::f32, Pool::none, false});
    writer.site({"scaled", 77, 77, Stored::i8, Pool::none, true});
    writer.site({"pooled", 3, 12, Stored::f32, Pool::mean, false});
    std::unique_ptr<Packer> packer;
    if (gpu)
      packer = std::make_unique<CudaPacker>(0, writer.ring());
    else
      packer = std::make_unique<HostPacker>(1);
    counts[gpu] =
        fill(writer, *packer, inputs, folder / (gpu ? "gpu" : "host"), gpu ? streams : nullptr);
    expect(writer.counts().waits > 0, "the ring was never full");
    if (gpu) {  // a unit that is dropped while its rows are on their way
      writer.begin((folder / "gpu").string());
      writer.put(0,
                 PackJob{rows_of(inputs[0]),
                         {},
                         inputs[0].places.data(),
                         nullptr,
                         Pool::none,
                         60,
                         Stored::f32,
                         nullptr,
                         nullptr,
                         nullptr},
                 60, inputs[0].keys.data(), *packer);
      writer.abandon();
      for (cudaStream_t each : streams) cudaStreamSynchronize(each);
    }
  }
  expect(counts[0] == counts[1], "rows that are not finite were counted differently");
  for (const char* unit : {"0", "1"})
    for (const char* name : {"rows", "scaled", "pooled"}) {
      const std::string host = content(folder / "host" / unit / name),
                        gpu = content(folder / "gpu" / unit / name);
      expect(host.size() > kHeader && host == gpu, name);
    }
  return failed;
}
