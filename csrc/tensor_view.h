// A tensor of Python as pointer, sizes and strides, borrowed for the duration of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "dlpack.h"
#include "rows.h"

namespace dreamreader {

// Exchange table of a tensor type, or null where its library has none. Remembers the last type:
// calls with plain torch tensors look it up once.
inline const DLExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known = nullptr;
  static const DLExchangeApi* api = nullptr;
  if (type == known) return api;
  const DLExchangeApi* found = nullptr;
  pybind11::handle owner(reinterpret_cast<PyObject*>(type));
  if (pybind11::hasattr(owner, "__dlpack_c_exchange_api__")) {
    pybind11::object capsule = owner.attr("__dlpack_c_exchange_api__");
    void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!table) throw pybind11::error_already_set();
    found = static_cast<const DLExchangeApi*>(table);
    if (found->header.version.major != 1 || !found->view) found = nullptr;
  }
  Py_INCREF(type);  // keeps the address from being reused by another type
  known = type;
  api = found;
  return api;
}

class TensorView {
 public:
  explicit TensorView(pybind11::handle object) : type_(Py_TYPE(object.ptr())) {
    if (const DLExchangeApi* api = exchange_api(type_)) {
      if (api->view(object.ptr(), &tensor_) != 0) throw pybind11::error_already_set();
    } else {
      if (!pybind11::hasattr(object, "__dlpack__") || !pybind11::hasattr(object, "detach"))
        throw pybind11::type_error("expected a tensor of torch, got " +
                                   std::string(type_->tp_name));
      capsule_ = object.attr("detach")().attr("__dlpack__")();
      void* managed = PyCapsule_GetPointer(capsule_.ptr(), "dltensor");
      if (!managed) throw pybind11::error_already_set();
      tensor_ = static_cast<DLManagedTensor*>(managed)->tensor;
    }
  }

  char* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  int dims() const { return tensor_.ndim; }
  int64_t size(int dim) const { return tensor_.shape[dim]; }
  int64_t stride(int dim) const {
    return tensor_.strides ? tensor_.strides[dim] : dense_stride(dim);
  }
  DLDevice device() const { return tensor_.device; }
  bool is(uint8_t code, int bits) const {
    return tensor_.dtype.code == code && tensor_.dtype.bits == bits && tensor_.dtype.lanes == 1;
  }

  // The stream that torch works on now.
  void* stream() const {
    void* stream = nullptr;
    const DLExchangeApi* api = exchange_api(type_);
    if (api && api->current_stream(tensor_.device.type, tensor_.device.id, &stream) != 0)
      throw pybind11::error_already_set();
    return stream;
  }

  std::string describe() const {
    std::string text = "[";
    for (int i = 0; i < dims(); ++i) text += (i ? ", " : "") + std::to_string(size(i));
    return type() + " " + text + "]";
  }

  // As torch calls it.
  std::string type() const {
    static constexpr const char* kinds[] = {"int",           "uint",
                                            "float",         "an opaque type",
                                            "bfloat",        "complex",
                                            "bool",          "float8_e3m4",
                                            "float8_e4m3",   "float8_e4m3b11fnuz",
                                            "float8_e4m3fn", "float8_e4m3fnuz",
                                            "float8_e5m2",   "float8_e5m2fnuz",
                                            "float8_e8m0fnu"};
    const DLDataType& own = tensor_.dtype;
    if (own.code >= std::size(kinds)) return "DLPack type " + std::to_string(own.code);
    const bool sized = own.code <= kDLBool - 1 && own.code != 3;
    return kinds[own.code] + (sized ? std::to_string(own.bits) : "");
  }

 private:
  int64_t dense_stride(int dim) const {
    int64_t stride = 1;
    for (int i = dims() - 1; i > dim; --i) stride *= size(i);
    return stride;
  }

  PyTypeObject* type_;
  pybind11::object capsule_;  // owns the view where there is no exchange table
  DLTensor tensor_{};
};

// Whether the elements lie in memory one after the other.
inline bool dense(const TensorView& t) {
  int64_t stride = 1;
  for (int i = t.dims() - 1; i >= 0; --i) {
    if (t.size(i) == 0) return true;
    if (t.size(i) > 1 && t.stride(i) != stride) return false;
    stride *= t.size(i);
  }
  return true;
}

// The element type of numbers that kernels compute with; `where` names the operator in the error.
inline DType float_type(const TensorView& x, const char* where) {
  if (x.is(kDLFloat, 32)) return DType::f32;
  if (x.is(kDLBfloat, 16)) return DType::bf16;
  if (x.is(kDLFloat, 16)) return DType::f16;
  if (x.is(kDLFloat, 64)) return DType::f64;
  throw std::invalid_argument(std::string(where) + ": got " + x.describe() +
                              "; float16, bfloat16, float32 and float64 are possible, so convert "
                              "it first, as with x.bfloat16()");
}

// [entries, tokens, width], or [tokens, width] of one entry; `where` names the operator in the
// error.
inline StridedRows rows_of(const TensorView& x, const char* where) {
  const int channel = x.dims() - 1, token = channel - 1, entry = token - 1;
  if (token < 0 || entry > 0)
    throw std::invalid_argument(std::string(where) + ": got " + x.describe() +
                                "; expected [entries, tokens, width] or [tokens, width]");
  const auto stride = [&](int dim) {
    return x.size(dim) == 1 ? int64_t{dim == channel} : x.stride(dim);
  };
  return {x.data(),      float_type(x, where), entry < 0 ? 1 : x.size(entry),
          x.size(token), x.size(channel),      entry < 0 ? 0 : stride(entry),
          stride(token), stride(channel)};
}

inline bool same_shape(const TensorView& x, const TensorView& y) {
  bool same = x.dims() == y.dims();
  for (int i = 0; same && i < x.dims(); ++i) same = x.size(i) == y.size(i);
  return same;
}

// Throws ValueError where elements of a result share memory.
inline void require_apart(const TensorView& out, const char* where) {
  for (int i = 0; i < out.dims(); ++i)
    if (!out.stride(i) && out.size(i) > 1)
      throw std::invalid_argument(std::string(where) +
                                  ": the result has elements that share memory (an expanded "
                                  "tensor); clone it first");
}

// Throws ValueError unless the condition that memory safety needs holds.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace dreamreader
