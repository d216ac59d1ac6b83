// Where things lie in torch's own description of a tensor, which torch promises nobody. It is found
// out at import, from what torch says of probe tensors (learn_layout.cpp).
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace fusedopt {

inline constexpr size_t kWord = sizeof(uint64_t);
// Words of a description, in the versions of torch that are known.
inline constexpr size_t kMaxWords = 23;
// Words of a storage: data, and who frees it, which a snapshot changes.
inline constexpr size_t kDataWords = 3;
inline constexpr uint64_t kMaxNearDims = 5;  // sizes and strides of more lie elsewhere

// Byte offsets in a description, unless said otherwise; 0 for what has not been found.
struct TorchLayout {
  size_t num_words = 0;    // of a description, the first two included
  size_t description = 0;  // in the Python object
  size_t storage = 0;
  size_t data = 0;  // in the storage; what frees the memory lies behind it
  size_t ndim = 0, sizes = 0, strides = 0;
  size_t start = 0;  // torch's storage_offset()
  size_t numel = 0;
  // Words with the dtype, the device and flags, of which bits that torch leaves as they are do not
  // count.
  struct Kind {
    size_t offset;
    uint64_t mask;
  };
  Kind kinds[kMaxWords + 1] = {};
  size_t num_kinds = 0;
  size_t keys = 0;
  size_t version_counter = 0;  // a pointer, which views have from what they are views of
  size_t version = 0;          // in the counter, an atomic uint32
  bool trusted = false;
};

inline TorchLayout g_layout;

// Finds out the layout; call once, at import. With FUSEDOPT_FINGERPRINTS=0 in the environment it
// does nothing.
void learn_layout();

// What of torch's description of a tensor is not as expected, or the variable that switches
// fingerprints off; nullptr if the layout is trusted.
const char* layout_obstacle();

inline uint64_t word_at(const void* base, size_t offset) {
  uint64_t word;
  memcpy(&word, static_cast<const char*>(base) + offset, sizeof(word));
  return word;
}

inline const void* pointer_at(const void* base, size_t offset) {
  return reinterpret_cast<const void*>(word_at(base, offset));
}

inline const void* description_of(PyObject* tensor) {
  return pointer_at(tensor, g_layout.description);
}

// The number of writes to a tensor; nullptr for inference tensors.
inline std::atomic<uint32_t>* version_of(PyObject* tensor) {
  const void* const counter = pointer_at(description_of(tensor), g_layout.version_counter);
  if (counter == nullptr) return nullptr;
  return reinterpret_cast<std::atomic<uint32_t>*>(reinterpret_cast<uintptr_t>(counter) +
                                                  g_layout.version);
}

}  // namespace fusedopt
