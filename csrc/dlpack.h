// The part of the DLPack 1.x ABI that is needed to look at tensors of Python: names and layouts
// follow the standard (https://dmlc.github.io/dlpack/latest/c_api.html), which fixes them.
#pragma once

#include <cstdint>

extern "C" {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2 };
enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DLVersion {
  uint32_t major, minor;
};
struct DLDevice {
  DLDeviceType type;
  int32_t id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// What __dlpack__() returns in a capsule named "dltensor".
struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor* self);
};

// What the capsule __dlpack_c_exchange_api__ of a tensor type points to. Functions that are not
// used here keep their place in the table. All return 0 on success and set a Python error
// otherwise.
struct DLExchangeHeader {
  DLVersion version;
  DLExchangeHeader* previous;
};
struct DLExchangeApi {
  DLExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*view)(void* object, DLTensor* out);  // may be null; borrows from the object
  int (*current_stream)(DLDeviceType type, int32_t id, void** out);
};

}  // extern "C"
