// CPU side of the intervention program: from tensors to a job, and the choice of engine,
// instruction set and threads. At the foot its bindings, for CUDA too.
#include <memory>
#include <string_view>
#include <utility>
#include <variant>

#include "intervention_cpu.h"
#include "low_rank_cpu.h"
#include "op.h"
#ifdef DREAMREADER_CUDA
#include "cuda_device.h"
#endif

namespace dreamreader {
namespace {

StridedRows activation_of(const TensorView& x) {
  require(x.dims() == 3, "intervene: x must have three dimensions");
  return rows_of(x, "intervene");
}

// Reads the text of ops/intervention_program.py: fields joined by ',', steps by ';'.
int parse_steps(std::string_view code, Step* steps) {
  constexpr int kFields = sizeof(Step) / sizeof(int32_t);
  int count = 0, field = 0;
  for (size_t at = 0; at < code.size(); ++field) {
    if (field == kFields || count == 0) {
      require(count < kMaxSteps, "intervene: more steps than a program holds");
      ++count;
      field = 0;
    }
    const bool negative = code[at] == '-';
    int64_t value = 0;
    for (at += negative; at < code.size() && code[at] >= '0' && code[at] <= '9'; ++at) {
      value = value * 10 + (code[at] - '0');
      require(value <= INT32_MAX, "intervene: malformed code");
    }
    const bool last = field == kFields - 1;
    require(at == code.size() ? last : code[at] == (last ? ';' : ','), "intervene: malformed code");
    reinterpret_cast<int32_t*>(&steps[count - 1])[field] = int32_t(negative ? -value : value);
    ++at;
  }
  require(count == 0 || field == kFields, "intervene: malformed code");
  return count;
}

struct Tables {
  TensorView strength, vectors, limits, masks;
};

// Everything a kernel will follow blindly: table rows, channel ranges, shapes.
void check_step(const Step& step, const Tables& tables, int64_t width, int64_t sources) {
  const bool vectors = step.kind == kSteer || step.kind == kClampComponent ||
                       step.kind == kProject || step.kind == kFill;
  const bool limits = step.kind == kScale || step.kind == kClamp || step.kind == kClampComponent;
  require(step.kind >= kSteer && step.kind <= kRenorm, "intervene: unknown kind of step");
  require(0 <= step.begin && step.begin < step.end && step.end <= width,
          "intervene: channels outside x");
  require(step.mask >= -1 && step.mask < tables.masks.size(0), "intervene: mask outside its table");
  require(vectors ? step.vector >= 0 && step.count >= 1 &&
                        step.count <= (step.kind == kProject ? kMaxSubspace : 1) &&
                        int64_t(step.vector) + step.count <= tables.vectors.size(0)
                  : step.vector == -1,
          "intervene: vectors outside their table");
  require(limits ? step.limit >= 0 && step.limit < tables.limits.size(0) : step.limit == -1,
          "intervene: limits outside their table");
  require(step.kind == kPatch ? step.source >= 0 && step.source < sources : step.source == -1,
          "intervene: source outside its list");
}

Source source_of(const TensorView& data, const TensorView& index, const StridedRows& x) {
  require(data.dims() == 2 && data.size(1) == x.width,
          "intervene: a patch source must be [entries, width]");
  require(index.dims() == 2 && index.size(0) == x.entries && index.size(1) == x.tokens &&
              index.is(kDLInt, 64),
          "intervene: a patch index must be int64 [rows, tokens]");
  return {data.data(),     float_type(data, "intervene"),
          data.size(0),    data.stride(0),
          data.stride(1),  reinterpret_cast<const int64_t*>(index.data()),
          index.stride(0), index.stride(1)};
}

template <typename W>
Program<W> program_of(std::string_view code, const Tables& t, const py::sequence& patches,
                      const StridedRows& x, DLDevice device) {
  constexpr int kBits = 8 * sizeof(W);
  Program<W> p;
  p.count = parse_steps(code, p.steps);
  require(t.strength.dims() == 3 && t.strength.size(0) == p.count &&
              t.strength.size(1) == x.entries && t.strength.size(2) == x.tokens &&
              t.strength.is(kDLFloat, kBits),
          "intervene: strength must be [steps, rows, tokens] in the arithmetic type of x");
  require(t.vectors.dims() == 2 && t.vectors.size(1) == x.width && t.vectors.is(kDLFloat, kBits) &&
              dense(t.vectors),
          "intervene: vectors must be dense [n, width] in the arithmetic type of x");
  require(t.limits.dims() == 3 && t.limits.size(1) == 2 && t.limits.size(2) == x.entries &&
              t.limits.is(kDLFloat, kBits) && dense(t.limits),
          "intervene: limits must be dense [n, 2, rows] in the arithmetic type of x");
  require(
      t.masks.dims() == 2 && t.masks.size(1) == x.width && t.masks.is(kDLBool, 8) && dense(t.masks),
      "intervene: masks must be dense bool [n, width]");
  for (const TensorView* each : {&t.strength, &t.vectors, &t.limits, &t.masks})
    require(each->device().type == device.type && each->device().id == device.id,
            "intervene: tables and x must be on one device");
  const int64_t sources = int64_t(py::len(patches)) / 2;
  require(sources <= kMaxSources && py::len(patches) % 2 == 0,
          "intervene: patches must be pairs, up to 8");
  for (int i = 0; i < p.count; ++i) check_step(p.steps[i], t, x.width, sources);
  for (int i = 0; i < sources; ++i) {
    const TensorView data(patches[2 * i]), index(patches[2 * i + 1]);
    require(data.device().type == device.type && data.device().id == device.id &&
                index.device().type == device.type && index.device().id == device.id,
            "intervene: sources and x must be on one device");
    p.sources[i] = source_of(data, index, x);
  }
  p.strength = reinterpret_cast<const W*>(t.strength.data());
  p.strength_step = t.strength.stride(0);
  p.strength_row = t.strength.stride(1);
  p.strength_token = t.strength.stride(2);
  p.vectors = reinterpret_cast<const W*>(t.vectors.data());
  p.limits = reinterpret_cast<const W*>(t.limits.data());
  p.masks = reinterpret_cast<const uint8_t*>(t.masks.data());
  return p;
}

void check_pair(const TensorView& x, const TensorView& out, const StridedRows& in,
                const StridedRows& to) {
  require(in.dtype == to.dtype && same_shape(x, out) && x.device().type == out.device().type &&
              x.device().id == out.device().id,
          "intervene: x and its result differ in shape, dtype or device");
  require_apart(out, "intervene");
}

// How one call is divided: which engine, how many tokens in one of its items, scratch values.
struct Division {
  const InterventionEngine& engine;
  int64_t tokens, scratch;
};

// x, sums, components and packed rows of the subspace engine.
int64_t subspace_scratch(int64_t vectors, int64_t width) {
  return kSubspaceBlock * (low_rank_pitch(width) + width / 2 + 4 * vectors + 128) +
         kLowRankSums * vectors;
}

// Long runs are fast, and every thread has some.
int64_t run_tokens(const StridedRows& in, int threads) {
  const int64_t share = in.entries * in.tokens / (int64_t{2} * threads);
  return std::clamp((share + 63) / 64 * 64, int64_t{128}, kPlaneTokens);
}

// Results of which nothing stays in the caches, in whole lines of memory.
constexpr int64_t kStreamBytes = 16 << 20;

bool streams(const StridedRows& out) {
  const int64_t element = size_of(out.dtype);
  uintptr_t places = reinterpret_cast<uintptr_t>(out.data);
  for (int64_t stride : {out.stride_entry, out.stride_token, out.stride_channel})
    if (stride != 1) places |= uintptr_t(stride * element);
  return values_in(out) * element >= kStreamBytes && places % 64 == 0;
}

template <typename W>
Division divide(const StridedRows& in, const StridedRows& out, const Program<W>& p, int threads) {
  const InterventionKernels& kernels = intervention_kernels();
  bool subspace = false, other = false;
  int components = 0;
  for (int i = 0; i < p.count; ++i) {
    const Step& step = p.steps[i];
    subspace |= step.count > 1;
    other |= step.kind == kPatch || step.kind == kRenorm;
    components += step.kind == kProject || step.kind == kClampComponent;
  }
  if (!subspace && in.stride_channel == 1 && out.stride_channel == 1)
    return {kernels.rows, 1, 2 * in.width};
  // Each component reads the whole again.
  if (!subspace && !other && components <= 2 && in.stride_token == 1 && out.stride_token == 1)
    return {kernels.planes, run_tokens(in, threads), kPlaneTokens * (p.count + 2)};
  const Step& only = p.steps[0];
  if (p.count == 1 && only.kind == kProject && only.mask < 0)
    return {kernels.subspace, 1, subspace_scratch(only.count, only.end - only.begin)};
  const int64_t lanes = kLaneBytes / int64_t(sizeof(W));
  return {kernels.columns, lanes, in.width * lanes};
}

// What the pieces of a call on the subspace engine share.
template <typename W>
Memory<char> prepare(InterventionJob& job, const Program<W>& p) {
  const InterventionKernels& kernels = intervention_kernels();
  const Step& step = p.steps[0];
  constexpr int kDouble = sizeof(W) == 8;
  const int64_t bytes = kernels.prepared_bytes[kDouble](step.count, step.end - step.begin);
  Memory<char> memory = allocate<char>(size_t(bytes));
  job.prepared = memory.get();
  job.amx = isa() == Isa::amx && job.in.dtype == DType::bf16;
  kernels.prepare[kDouble](job);
  return memory;
}

template <typename W>
void run_cpu(const StridedRows& in, const StridedRows& out, const Program<W>& p, int threads,
             int32_t* seen) {
  if (values_in(in) == 0) return;
  InterventionJob job{in, out, &p, in.width, 0, nullptr, false, false, 0, seen};
  for (int i = 0; i < p.count; ++i) {
    job.begin = std::min<int64_t>(job.begin, p.steps[i].begin);
    job.end = std::max<int64_t>(job.end, p.steps[i].end);
  }
  if (p.count == 0) {
    if (in.data == out.data) return;
    job.begin = 0;
  }
  const Division division = divide(in, out, p, threads);
  job.run = division.tokens;
  Memory<char> prepared;
  if (&division.engine == &intervention_kernels().subspace) prepared = prepare(job, p);
  const int64_t items = in.entries * ((in.tokens + division.tokens - 1) / division.tokens);
  const auto run = division.engine[in.dtype];
  const size_t scratch_bytes = size_t(division.scratch) * sizeof(W);
  job.stream = streams(out);
  const int64_t bytes = in.width * std::min(division.tokens, in.tokens) * size_of(in.dtype);
  const int64_t grain = grain_of(items, bytes, threads);
  if (items <= grain) {
    run(job, scratch(scratch_bytes), 0, items);
  } else {
    py::gil_scoped_release release;
    share(items, grain, threads,
          [&](int64_t first, int64_t last) { run(job, scratch(scratch_bytes), first, last); });
  }
}

void intervene_cpu(py::handle x, py::handle out, std::string_view code, py::handle strength,
                   py::handle vectors, py::handle limits, py::handle masks,
                   const py::sequence& patches, int threads, int32_t* seen) {
  const TensorView in(x), to(out);
  const Tables tables{TensorView(strength), TensorView(vectors), TensorView(limits),
                      TensorView(masks)};
  const StridedRows from = activation_of(in), result = activation_of(to);
  check_pair(in, to, from, result);
  require(in.device().type == kDLCPU, "intervene_cpu: x is not in CPU memory");
  by_work(from.dtype, [&]<typename W>(W) {
    run_cpu(from, result, program_of<W>(code, tables, patches, from, in.device()), threads, seen);
  });
}

void intervene_quietly(py::handle x, py::handle out, std::string_view code, py::handle strength,
                       py::handle vectors, py::handle limits, py::handle masks,
                       const py::sequence& patches, int threads) {
  intervene_cpu(x, out, code, strength, vectors, limits, masks, patches, threads, nullptr);
}

// Where bits of Seen are added: seen[at], beside x.
int32_t* place_of(const TensorView& seen, int64_t at, const TensorView& x) {
  require(seen.dims() == 1 && seen.is(kDLInt, 32) && seen.device().type == x.device().type &&
              seen.device().id == x.device().id && 0 <= at && at < seen.size(0),
          "intervene: what was seen needs a place in an int32 vector on the device of x");
  return reinterpret_cast<int32_t*>(seen.data()) + at * seen.stride(0);
}

// The same into memory of its own; adds bits of Seen to seen[at].
void intervene_seen(py::handle x, py::handle out, std::string_view code, py::handle strength,
                    py::handle vectors, py::handle limits, py::handle masks,
                    const py::sequence& patches, int threads, py::handle seen, int64_t at) {
  intervene_cpu(x, out, code, strength, vectors, limits, masks, patches, threads,
                place_of(TensorView(seen), at, TensorView(x)));
}

// A program whose tables are taken apart once, for an edit that is made again at every call of a
// model. Sources of patches may be the caller's own tensors, whose memory can be exchanged, so a
// program with patches is not prepared.
class PreparedIntervention {
 public:
  PreparedIntervention(py::handle like, std::string_view code, py::tuple tables,
                       py::object empty_like, py::tuple guards)
      : tables_(std::move(tables)), empty_like_(std::move(empty_like)), guards_(std::move(guards)) {
    const TensorView x(like);
    const Tables views{TensorView(tables_[0]), TensorView(tables_[1]), TensorView(tables_[2]),
                       TensorView(tables_[3])};
    require(x.device().type == kDLCPU, "prepare_intervention: x is not in CPU memory");
    type_ = py::type::of(like);
    const auto form = activation_of(x);
    dtype_ = form.dtype;
    for (int i = 0; i < 3; ++i) sizes_[i] = x.size(i);
    const auto prepare = [&](auto work) {
      program_ = program_of<decltype(work)>(code, views, py::tuple(), form, x.device());
    };
    dtype_ == DType::f64 ? prepare(double()) : prepare(float());
  }

  // The edited values; null where x is another kind of tensor, or where torch follows what is done.
  py::object run(py::handle x, int threads, py::handle seen, int64_t at) const {
    if (!py::type::of(x).is(type_) || is_followed(x)) return {};
    const TensorView in(x);
    if (in.dims() != 3 || in.device().type != kDLCPU) return {};
    const auto from = activation_of(in);
    if (from.dtype != dtype_) return {};
    for (int i = 0; i < 3; ++i)
      if (in.size(i) != sizes_[i]) return {};
    py::object out = empty_like_(x);
    const TensorView to(out);
    const auto result = activation_of(to);
    check_pair(in, to, from, result);
    int32_t* place = seen ? place_of(TensorView(seen), at, in) : nullptr;
    std::visit([&](const auto& program) { run_cpu(from, result, program, threads, place); },
               program_);
    return out;
  }

 private:
  // Whether a mode of torch is on, by functions that give nothing or 0 where none is; or whether
  // the values are negated lazily.
  bool is_followed(py::handle x) const {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    for (const py::handle guard : guards_)
      if (is_true(PyObject_CallNoArgs(guard.ptr()))) return true;
    return is_true(PyObject_CallMethodNoArgs(x.ptr(), is_neg));
  }

  static bool is_true(PyObject* answer) {
    if (!answer) throw py::error_already_set();
    return bool(py::bool_(py::reinterpret_steal<py::object>(answer)));
  }

  py::tuple tables_;
  py::object empty_like_;
  py::tuple guards_;
  py::object type_;
  DType dtype_;
  int64_t sizes_[3];
  std::variant<Program<float>, Program<double>> program_;
};

constexpr const char* kPrepared = "dreamreader.prepared_intervention";

// (x, threads) or (x, threads, seen, at); see PreparedIntervention::run. None where that is null.
PyObject* run_prepared(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  const auto* prepared = static_cast<PreparedIntervention*>(PyCapsule_GetPointer(self, kPrepared));
  try {
    require(count == 2 || count == 4, "intervene: x, threads and maybe seen, at are expected");
    const int threads = py::cast<int>(py::handle(given[1]));
    const bool notes = count == 4;
    py::object out = prepared->run(given[0], threads, notes ? given[2] : nullptr,
                                   notes ? py::cast<int64_t>(py::handle(given[3])) : 0);
    return out ? out.release().ptr() : py::none().release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

PyMethodDef run_prepared_method{
    "run_prepared", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run_prepared)),
    METH_FASTCALL, "Applies a prepared program to a tensor."};

// A plain function of Python's own interface: a call through pybind11 takes longer than the edit.
py::object prepare_intervention(py::handle like, std::string_view code, py::tuple tables,
                                py::object empty_like, py::tuple guards) {
  auto prepared = std::make_unique<PreparedIntervention>(like, code, std::move(tables),
                                                         std::move(empty_like), std::move(guards));
  const py::capsule self(prepared.release(), kPrepared, [](PyObject* capsule) {
    delete static_cast<PreparedIntervention*>(PyCapsule_GetPointer(capsule, kPrepared));
  });
  PyObject* function = PyCFunction_New(&run_prepared_method, self.ptr());
  if (!function) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

#ifdef DREAMREADER_CUDA

void intervene_cuda(py::handle x, py::handle out, std::string_view code, py::handle strength,
                    py::handle vectors, py::handle limits, py::handle masks,
                    const py::sequence& patches, int32_t* seen) {
  const TensorView in(x), to(out);
  const Tables tables{TensorView(strength), TensorView(vectors), TensorView(limits),
                      TensorView(masks)};
  const StridedRows from = activation_of(in), result = activation_of(to);
  check_pair(in, to, from, result);
  require(in.device().type == kDLCUDA, "intervene_cuda: x is not on a CUDA device");
  if (values_in(from) == 0) return;
  const OnDevice on(in.device().id);
  const auto stream = static_cast<cudaStream_t>(in.stream());
  by_work(from.dtype, [&]<typename W>(W) {
    const Program<W> program = program_of<W>(code, tables, patches, from, in.device());
    check_cuda(launch_intervention(from, result, program, stream, seen), "intervene_cuda");
  });
}

#endif

Bind bind_intervention([](py::module_& m) {
  m.def("intervene_cpu", &intervene_quietly);
  m.def("intervene_seen_cpu", &intervene_seen);
  m.def("prepare_intervention", &prepare_intervention);
#ifdef DREAMREADER_CUDA
  m.def("intervene_cuda",
        [](py::handle x, py::handle out, std::string_view code, py::handle strength,
           py::handle vectors, py::handle limits, py::handle masks, const py::sequence& patches) {
          intervene_cuda(x, out, code, strength, vectors, limits, masks, patches, nullptr);
        });
  m.def("intervene_seen_cuda",
        [](py::handle x, py::handle out, std::string_view code, py::handle strength,
           py::handle vectors, py::handle limits, py::handle masks, const py::sequence& patches,
           py::handle seen, int64_t at) {
          intervene_cuda(x, out, code, strength, vectors, limits, masks, patches,
                         place_of(TensorView(seen), at, TensorView(x)));
        });
#endif
});

}  // namespace
}  // namespace dreamreader
