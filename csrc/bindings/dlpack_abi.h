// The part of DLPack's stable C ABI (https://dmlc.github.io/dlpack, version 1.x) that reading torch
// tensors takes: the exchange table of functions and the tensor it describes.
#pragma once

#include <cstdint>

extern "C" {

typedef struct {
  uint32_t major;
  uint32_t minor;
} DLPackVersion;

typedef struct {
  int32_t device_type;
  int32_t device_id;
} DLDevice;

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
} DLTensor;

typedef struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  struct DLPackExchangeAPIHeader* prev_api;
} DLPackExchangeAPIHeader;

// The functions before the last two are not used here; they hold their place in the table.
typedef struct {
  DLPackExchangeAPIHeader header;
  void (*managed_tensor_allocator)(void);
  void (*managed_tensor_from_py_object_no_sync)(void);
  void (*managed_tensor_to_py_object_no_sync)(void);
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
} DLPackExchangeAPI;

}  // extern "C"

namespace fusedopt {

inline constexpr uint32_t kDlpackMajor = 1;
inline constexpr uint8_t kDlInt = 0, kDlUInt = 1, kDlFloat = 2, kDlBfloat = 4, kDlComplex = 5;
inline constexpr int32_t kDlCpu = 1, kDlCuda = 2;

}  // namespace fusedopt
