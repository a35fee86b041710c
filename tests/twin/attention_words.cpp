// The CUDA source of the attention maps of words, compiled for the CPU, behind one C function.
#include "../../csrc/attention_words.cu"

#include <cstdio>

namespace dreamreader {
namespace {
alignas(16) char shared[twin::kShared];  // what the kernel declares as extern
}
}  // namespace dreamreader

char* twin::shared_memory() { return dreamreader::shared; }

// Plain integers and pointers, in the order of tests/twin/__init__.py.
struct Call {
  const void *query, *key, *weights, *mask;
  void* out;
  int64_t dtype, mask_type;
  int64_t sizes[7];  // batch, heads, queries, keys, width, words, groups
  int64_t query_strides[4], key_strides[4], weight_strides[3], out_strides[4], mask_strides[4];
  int64_t causal;
  double scale;
};

// Returns the CUDA error, or -1 with a message where the twin found something; counts the launches.
extern "C" int attention_words(const Call* c, int64_t* launches, char* message, size_t size) {
  using namespace dreamreader;
  AttentionWords call = {};
  call.query = c->query;
  call.key = c->key;
  call.dtype = DType(c->dtype);
  call.batch = c->sizes[0];
  call.heads = c->sizes[1];
  call.queries = c->sizes[2];
  call.keys = c->sizes[3];
  call.width = c->sizes[4];
  call.words = c->sizes[5];
  call.groups = c->sizes[6];
  call.weights = static_cast<const float*>(c->weights);
  call.out = static_cast<float*>(c->out);
  call.mask = c->mask;
  call.mask_type = MaskType(c->mask_type);
  std::memcpy(call.query_strides, c->query_strides, sizeof(c->query_strides));
  std::memcpy(call.key_strides, c->key_strides, sizeof(c->key_strides));
  std::memcpy(call.weight_strides, c->weight_strides, sizeof(c->weight_strides));
  std::memcpy(call.out_strides, c->out_strides, sizeof(c->out_strides));
  std::memcpy(call.mask_strides, c->mask_strides, sizeof(c->mask_strides));
  call.causal = c->causal != 0;
  call.scale = float(c->scale);
  twin::error.clear();
  twin::launches = 0;
  const cudaError_t error = launch_attention_words(call, nullptr);
  *launches = twin::launches;
  std::snprintf(message, size, "%s", twin::error.c_str());
  return twin::error.empty() ? int(error) : -1;
}
