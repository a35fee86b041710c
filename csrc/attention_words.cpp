// CPU side of the attention maps: from tensors to a job, the list of keys that have a weight, and
// the choice of instruction set and threads. At the foot the bindings, for CUDA too.
#include <algorithm>
#include <vector>

#include "attention_words_cpu.h"
#include "op.h"
#ifdef DREAMREADER_CUDA
#include "cuda_device.h"
#endif

namespace dreamreader {
namespace {

DType dtype_of(const TensorView& tensor) {
  if (tensor.is(kDLFloat, 32)) return DType::f32;
  if (tensor.is(kDLBfloat, 16)) return DType::bf16;
  if (tensor.is(kDLFloat, 16)) return DType::f16;
  throw std::invalid_argument("attention_words_: got " + tensor.describe() +
                              "; float16, bfloat16 and float32 are possible");
}

MaskType mask_type_of(const TensorView& mask) {
  if (mask.is(kDLBool, 8)) return MaskType::boolean;
  const DType dtype = dtype_of(mask);
  return dtype == DType::f32 ? MaskType::f32
                             : (dtype == DType::bf16 ? MaskType::bf16 : MaskType::f16);
}

void require_shape(const TensorView& t, std::initializer_list<int64_t> shape, DLDevice device,
                   const char* message) {
  require(t.dims() == int(shape.size()), message);
  int dim = 0;
  for (int64_t size : shape) require(t.size(dim++) == size, message);
  require(t.device().type == device.type && t.device().id == device.id, message);
}

void strides_of(const TensorView& t, int64_t* strides) {
  for (int i = 0; i < t.dims(); ++i) strides[i] = t.size(i) > 1 ? t.stride(i) : 0;
}

// Checks what a kernel will follow blindly: shapes, types, one device.
AttentionWords call_of(py::handle out, py::handle query, py::handle key, py::handle weights,
                       py::handle mask, bool causal, double scale, DLDeviceType type) {
  const TensorView o(out), q(query), k(key), w(weights);
  require(q.dims() == 4 && k.dims() == 4 && w.dims() == 3, "attention_words_: malformed operands");
  const DLDevice device = q.device();
  require(device.type == type, "attention_words_: query is in other memory than the kernel's");
  AttentionWords call{};
  call.dtype = dtype_of(q);
  call.batch = q.size(0);
  call.heads = q.size(1);
  call.queries = q.size(2);
  call.width = q.size(3);
  call.keys = k.size(2);
  call.words = w.size(1);
  const int64_t key_heads = k.size(1);
  require(key_heads == 0 ? call.heads == 0 : call.heads % key_heads == 0,
          "attention_words_: heads must be a multiple of key heads");
  call.groups = key_heads ? std::max<int64_t>(call.heads / key_heads, 1) : 1;
  require(dtype_of(k) == call.dtype, "attention_words_: query and key differ in dtype");
  require_shape(k, {call.batch, key_heads, call.keys, call.width}, device,
                "attention_words_: key must be [batch, key heads, keys, width] beside query");
  require_shape(w, {w.size(0) == 1 ? 1 : call.batch, call.words, call.keys}, device,
                "attention_words_: weights must be [batch or 1, words, keys] beside query");
  require_shape(o, {call.batch, call.heads, call.words, call.queries}, device,
                "attention_words_: out must be [batch, heads, words, queries] beside query");
  require(w.is(kDLFloat, 32) && o.is(kDLFloat, 32),
          "attention_words_: weights and out must be float32");
  require(call.keys <= INT32_MAX / 2 && call.queries <= INT32_MAX / 2,
          "attention_words_: more keys or queries than a kernel counts");
  call.query = q.data();
  call.key = k.data();
  call.weights = reinterpret_cast<const float*>(w.data());
  call.out = reinterpret_cast<float*>(o.data());
  strides_of(q, call.query_strides);
  strides_of(k, call.key_strides);
  strides_of(w, call.weight_strides);
  strides_of(o, call.out_strides);
  for (int i = 0; i < 4; ++i)
    require(o.size(i) <= 1 || o.stride(i) != 0,
            "attention_words_: out has elements that share memory (an expanded tensor)");
  if (!mask.is_none()) {
    const TensorView m(mask);
    require_shape(m, {call.batch, call.heads, call.queries, call.keys}, device,
                  "attention_words_: mask must be [batch, heads, queries, keys] beside query");
    call.mask = m.data();
    call.mask_type = mask_type_of(m);
    strides_of(m, call.mask_strides);
  }
  call.causal = causal;
  call.scale = float(scale);
  return call;
}

bool nothing_to_do(const AttentionWords& call) {
  return call.batch * call.heads * call.queries * call.keys * call.words == 0;
}

// The keys with a weight in one batch entry, and who owns the lists.
struct Weighted {
  std::vector<int64_t> columns, offsets;
  std::vector<WeightedKeys::Entry> entries;

  Weighted(const AttentionWords& call, int64_t b) {
    const int64_t *s = call.weight_strides, words = call.words;
    const float* weights = call.weights + b * s[0];
    const bool all = call.keys <= kKeyTile;
    for (int64_t j = 0; j < call.keys; ++j)
      for (int64_t w = 0; w < words; ++w)
        if (weights[w * s[1] + j * s[2]] != 0.0f) {
          columns.push_back(j);
          break;
        }
    offsets.push_back(0);
    const int64_t count = int64_t(columns.size());
    for (int64_t first = 0; first < count; first += all ? count : kKeyTile) {
      const int64_t last = all ? count : std::min(first + kKeyTile, count);
      for (int64_t w = 0; w < words; ++w) {
        for (int64_t i = first; i < last; ++i) {
          const float weight = weights[w * s[1] + columns[i] * s[2]];
          if (weight != 0.0f) entries.push_back({int32_t(all ? columns[i] : i - first), weight});
        }
        offsets.push_back(int64_t(entries.size()));
      }
    }
  }

  WeightedKeys view() const {
    return {columns.data(), int64_t(columns.size()), offsets.data(), entries.data()};
  }
};

// Queries of one piece: few enough that their tiles stay in a core's cache and that every thread
// has some; many enough that packing the keys of the head, once a piece, does not count.
constexpr int64_t kPieceFloats = 64 << 10, kPieceQueries = 1024;
constexpr int64_t kPiecesPerThread = 4;
constexpr int64_t kSerial = 1 << 16;  // products below which other threads are not worth waking

int64_t piece_of(const AttentionWords& call, int64_t tile, int threads) {
  const int64_t total = call.batch * call.heads * call.queries;
  const int64_t fair = total / (std::max(threads, 1) * kPiecesPerThread);
  const int64_t cached = kPieceFloats / std::max<int64_t>(call.width, 1);
  const int64_t queries = std::min({fair, cached, kPieceQueries});
  return std::max<int64_t>(queries / tile, 1) * tile;
}

void attention_words_cpu(py::handle out, py::handle query, py::handle key, py::handle weights,
                         py::handle mask, bool causal, double scale, int threads) {
  AttentionWordsJob job{};
  job.call = call_of(out, query, key, weights, mask, causal, scale, kDLCPU);
  const AttentionWords& call = job.call;
  if (nothing_to_do(call)) return;
  std::vector<Weighted> lists;
  std::vector<WeightedKeys> weighted;
  job.weighted_stride = call.weight_strides[0] != 0;
  for (int64_t b = 0; b < (job.weighted_stride ? call.batch : 1); ++b) lists.emplace_back(call, b);
  for (const Weighted& each : lists) weighted.push_back(each.view());
  job.weighted = weighted.data();
  const AttentionWordsKernels& chosen = attention_words_kernels();
  job.piece = piece_of(call, chosen.tile, threads);
  const auto run = chosen.run[call.dtype];
  const size_t floats = size_t(chosen.scratch_floats(job));
  const int64_t items = call.batch * call.heads * ((call.queries + job.piece - 1) / job.piece);
  const bool serial =
      call.batch * call.heads * call.queries * call.keys * (call.width + 1) < kSerial;
  py::gil_scoped_release release;
  share(items, 1, serial ? 1 : threads, [&](int64_t first, int64_t last) {
    // It lasts as long as the piece of work: a call takes far longer than its allocation.
    const Memory<float> scratch = allocate<float>(floats);
    run(job, scratch.get(), first, last);
  });
}

#ifdef DREAMREADER_CUDA

void attention_words_cuda(py::handle out, py::handle query, py::handle key, py::handle weights,
                          py::handle mask, bool causal, double scale) {
  const AttentionWords call = call_of(out, query, key, weights, mask, causal, scale, kDLCUDA);
  if (nothing_to_do(call)) return;
  const TensorView q(query);
  const OnDevice on(q.device().id);
  check_cuda(launch_attention_words(call, static_cast<cudaStream_t>(q.stream())),
             "attention_words_cuda");
}

#endif

Bind bind_attention_words([](py::module_& m) {
  m.def("attention_words_cpu", &attention_words_cpu);
#ifdef DREAMREADER_CUDA
  m.def("attention_words_cuda", &attention_words_cuda);
#endif
});

}  // namespace
}  // namespace dreamreader
