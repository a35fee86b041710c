// What Python sees of the checksums and of the writer.
#include <pybind11/stl.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <mutex>

#include "bind.h"
#include "crc32c.h"
#include "refusal.h"
#include "tensor_view.h"
#include "writer.h"
#ifdef DREAMREADER_CUDA
#include "cuda_packer.h"
#include "probe.h"
#endif

namespace dreamreader {
namespace {

namespace py = pybind11;

// Buffers instead of tensors: what is checked lies in mapped files, which torch takes for writable.
void crc32c(const py::sequence& parts, const py::buffer& out) {
  const py::buffer_info sums = out.request(true);
  require(sums.ndim == 1 && sums.itemsize == 4 && (sums.size <= 1 || sums.strides[0] == 4),
          "crc32c: the sums must be dense uint32 [rows]");
  std::vector<py::buffer_info> held;
  std::vector<RowBytes> rows;
  for (py::handle part : parts) {
    held.push_back(py::cast<py::buffer>(part).request());
    const py::buffer_info& each = held.back();
    require(each.ndim == 2 && each.itemsize == 1 && each.shape[0] == sums.size &&
                (each.shape[1] <= 1 || each.strides[1] == 1),
            "crc32c: the parts must be bytes [rows, n], those of a row side by side");
    rows.push_back({static_cast<const char*>(each.ptr), each.strides[0], each.shape[1]});
  }
  py::gil_scoped_release release;
  crc32c_rows(rows.data(), int(rows.size()), sums.size, static_cast<uint32_t*>(sums.ptr));
}

// int32, dense and in the memory of the host.
const int32_t* numbers_of(const TensorView& t, int64_t columns, const char* message) {
  const int dims = columns ? 2 : 1;
  require(t.dims() == dims && t.is(kDLInt, 32) && t.device().type != kDLCUDA &&
              (dims == 1 || t.size(1) == columns) &&
              (t.size(0) <= 1 || t.stride(0) == std::max<int64_t>(columns, 1)) &&
              (dims == 1 || t.stride(1) == 1),
          message);
  return reinterpret_cast<const int32_t*>(t.data());
}

// A writer, which calls from several threads of Python share one after the other. It does not
// outlive a fork: the child has none of its threads.
class ShardWriter {
 public:
  ShardWriter(int64_t ring_bytes, int64_t slab_bytes, int threads, int pack_threads, bool leave_out,
              int64_t wait_micro)
      : process_(getpid()), host_(pack_threads) {
    require(ring_bytes > 0 && slab_bytes > 0 && threads > 0,
            "writer: ring_bytes, slab_bytes and threads must be positive");
    writer_ =
        std::make_unique<Writer>(Options{ring_bytes, slab_bytes, threads, leave_out, wait_micro});
  }
  ~ShardWriter() { close(); }

  void close() {
    if (getpid() != process_) {
      (void)writer_.release();
#ifdef DREAMREADER_CUDA
      (void)cuda_.release();
#endif
      return;
    }
    py::gil_scoped_release release;
    const std::lock_guard call(calls_);
    if (writer_) writer_->abandon();
#ifdef DREAMREADER_CUDA
    cuda_.reset();  // knows the ring
#endif
    writer_.reset();
  }

  // Runs without the lock of Python, alone, and says what the system said.
  template <typename F>
  auto run(F&& call) {
    // Before the lock, which a thread of the parent may have held.
    if (getpid() != process_)
      throw std::runtime_error("writer: this process is a fork; open a writer in it");
    try {
      py::gil_scoped_release release;
      const std::lock_guard one(calls_);
      require(writer_ != nullptr, "writer: it is closed");
      return call(*writer_);
    } catch (const FileError& error) {
      errno = error.number;
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
      throw py::error_already_set();
    }
  }

  int site(const std::string& file, int64_t features, int stored, int pool) {
    static constexpr int kBytes[] = {4, 2, 2, 1, 1};
    require(features > 0 && stored >= 0 && stored < 5 && pool >= 0 && pool < 3,
            "writer: a site without features, or with an unknown type or pool");
    return run([&](Writer& writer) {
      return writer.site({file, features, features * kBytes[stored], Stored(stored), Pool(pool),
                          Stored(stored) == Stored::f8 || Stored(stored) == Stored::i8});
    });
  }

  void begin(const std::string& folder) {
    run([&](Writer& writer) {
      writer.begin(folder);
      host_.clear();
#ifdef DREAMREADER_CUDA
      if (cuda_) cuda_->clear();
#endif
    });
  }

  int64_t put(int site, py::handle x, py::handle places, py::handle keys, py::object minus,
              py::object groups) {
    const TensorView in(x), at(places), key(keys), less(minus.is_none() ? x : minus);
    PackJob job{};
    job.places = numbers_of(at, 2, "writer: places must be dense int32 [places, 2] on the CPU");
    const int64_t count = at.size(0);
    const int32_t* names =
        numbers_of(key, kKey, "writer: keys must be dense int32 [rows, 4] on the CPU");
    job.rows = key.size(0);
    require(in.dims() == 3 && less.dims() == 3, "writer: x must be [entries, tokens, features]");
    job.x = rows_of(in, "writer");
    if (!minus.is_none()) job.minus = rows_of(less, "writer");
    require(same_shape(in, less), "writer: x and minus differ in shape");
    require(float_type(less, "writer") == job.x.dtype && less.device().type == in.device().type &&
                less.device().id == in.device().id,
            "writer: x and minus differ in type or device");
    if (!groups.is_none()) {
      const TensorView cuts(groups);
      job.groups = numbers_of(cuts, 0, "writer: groups must be dense int32 [rows + 1] on the CPU");
      require(cuts.size(0) == job.rows + 1, "writer: groups must be [rows + 1]");
    }
    check_places(job, count, in.size(0), in.size(1));
    if (job.rows == 0) return 0;
    for (int64_t row = 0; row < job.rows; ++row)
      require(names[kKey * row + 1] == names[1] && names[1] >= 0,
              "writer: the rows of one put have one moment, not negative");
    void* stream = in.device().type == kDLCUDA ? in.stream() : nullptr;
    return run([&](Writer& writer) {
      const SiteShape& shape = writer.shape(site);
      require(shape.features == job.x.width, "writer: x has other features than its site");
      require((shape.pool == Pool::none) == (job.groups == nullptr),
              "writer: groups are for sites with a pool");
      job.pool = shape.pool;
      job.stored = shape.stored;
      return writer.put(site, job, count, names, packer_of(writer, in.device(), stream));
    });
  }

  // Takes the memory that rows on the device of x need, if they have it not yet.
  void reserve(py::handle x) {
    const DLDevice device = TensorView(x).device();
    run([&](Writer& writer) { memory_of(writer, device); });
  }

  std::vector<int> used() {
    return run([&](Writer& writer) {
      std::vector<int> found;
      for (int site = 0; site < writer.sites(); ++site)
        if (writer.used(site)) found.push_back(site);
      return found;
    });
  }
  py::bytes segments(int site) {
    const auto found = run([&](Writer& writer) {
      writer.shape(site);
      return writer.segments(site);
    });
    return {reinterpret_cast<const char*>(found.data()), found.size() * sizeof(Segment)};
  }
  int64_t rows(int site) {
    return run([&](Writer& writer) { return writer.shape(site), writer.rows(site); });
  }
  std::vector<int64_t> not_finite(int site) {
    return run([&](Writer& writer) { return writer.shape(site), writer.not_finite(site); });
  }
  std::vector<int64_t> left_out(int site) {
    return run([&](Writer& writer) { return writer.shape(site), writer.left_out(site); });
  }

  void flush() {
    run([](Writer& writer) { writer.flush(); });
  }
  void finish(int site, const std::string& header, const std::string& moments,
              const std::array<int64_t, 6>& tail) {
    require(int64_t(header.size()) == kHeader, "writer: a header of another length");
    run([&](Writer& writer) {
      writer.shape(site);
      writer.finish(site, header, moments, {tail[0], tail[1], tail[2], tail[3], tail[4], tail[5]});
    });
  }
  void wait() {
    run([](Writer& writer) { writer.wait(); });
  }
  void abandon() {
    run([](Writer& writer) { writer.abandon(); });
  }

  py::dict info() {
    py::dict found;
    Writer::Counts counts{};
    int64_t ring_bytes = 0, slab_bytes = 0;
    run([&](Writer& writer) {
      counts = writer.counts();
      ring_bytes = writer.ring().bytes();
      slab_bytes = writer.ring().slab_bytes();
    });
    found["ring_bytes"] = ring_bytes;
    found["slab_bytes"] = slab_bytes;
    found["written"] = counts.written;
    found["waits"] = counts.waits;
    found["early"] = counts.early;
    found["grown"] = counts.grown;
    found["direct"] = counts.direct;
    return found;
  }

 private:
  static void check_places(const PackJob& job, int64_t count, int64_t entries, int64_t tokens) {
    for (int64_t i = 0; i < count; ++i)
      require(job.places[2 * i] >= 0 && job.places[2 * i] < entries && job.places[2 * i + 1] >= 0 &&
                  job.places[2 * i + 1] < tokens,
              "writer: a place is outside x");
    if (!job.groups) {
      require(count == job.rows, "writer: as many places as keys are needed without a pool");
      return;
    }
    require(job.groups[0] == 0 && job.groups[job.rows] == count,
            "writer: groups must go from 0 to the number of places");
    for (int64_t row = 0; row < job.rows; ++row)
      require(job.groups[row] < job.groups[row + 1], "writer: a group without a place");
  }

  // These within a call, so that no other one makes, uses or frees it meanwhile.
  Packer& memory_of([[maybe_unused]] Writer& writer, DLDevice device) {
    if (device.type == kDLCPU) return host_;
#ifdef DREAMREADER_CUDA
    if (device.type == kDLCUDA) {
      if (!cuda_) {
        const OnDevice on(device.id);
        check_cuda(find_code(), "writer");
        cuda_ = std::make_unique<CudaPacker>(device.id, writer.ring());
      }
      return *cuda_;
    }
#endif
    throw NoCode("writer: no kernel for the device of x");
  }

  Packer& packer_of(Writer& writer, DLDevice device, [[maybe_unused]] void* stream) {
    Packer& found = memory_of(writer, device);
#ifdef DREAMREADER_CUDA
    if (device.type == kDLCUDA) cuda_->use(device.id, static_cast<cudaStream_t>(stream));
#endif
    return found;
  }

  const pid_t process_;
  std::mutex calls_;
  HostPacker host_;
#ifdef DREAMREADER_CUDA
  std::unique_ptr<CudaPacker> cuda_;
#endif
  std::unique_ptr<Writer> writer_;
};

Bind bind_capture([](py::module_& m) {
  m.def("crc32c", &crc32c);
  py::class_<ShardWriter>(m, "ShardWriter")
      .def(py::init<int64_t, int64_t, int, int, bool, int64_t>(), py::arg("ring_bytes"),
           py::arg("slab_bytes"), py::arg("threads"), py::arg("pack_threads"), py::arg("leave_out"),
           py::arg("wait_micro") = 0)
      .def("close", &ShardWriter::close)
      .def("site", &ShardWriter::site)
      .def("begin", &ShardWriter::begin)
      .def("reserve", &ShardWriter::reserve)
      .def("put", &ShardWriter::put)
      .def("flush", &ShardWriter::flush)
      .def("used", &ShardWriter::used)
      .def("rows", &ShardWriter::rows)
      .def("segments", &ShardWriter::segments)
      .def("not_finite", &ShardWriter::not_finite)
      .def("left_out", &ShardWriter::left_out)
      .def("finish", &ShardWriter::finish)
      .def("wait", &ShardWriter::wait)
      .def("abandon", &ShardWriter::abandon)
      .def("info", &ShardWriter::info);
});

}  // namespace
}  // namespace dreamreader
