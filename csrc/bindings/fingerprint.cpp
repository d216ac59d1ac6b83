#include "bindings/fingerprint.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

namespace py = pybind11;

namespace fusedopt {
namespace {

constexpr size_t kWord = sizeof(uint64_t);
constexpr size_t kFirstWord = 2;  // behind the reference counts
constexpr size_t kNumWords = 22;  // of a description, the first two included
constexpr size_t kDataWords = 3;  // of a storage: data, and who frees it, which a snapshot changes
constexpr size_t kStorageWords = 6;

// Byte offsets; 0 for those that have not been found.
struct Offsets {
  size_t description = 0;  // in the Python object
  size_t storage = 0;      // in the description
  size_t data = 0;         // in the storage; what frees the memory lies behind it
  size_t keys = 0;         // in the description
  bool trusted = false;
};

Offsets g_offsets;

uint64_t word_at(const void* base, size_t offset) {
  uint64_t word;
  memcpy(&word, static_cast<const char*>(base) + offset, sizeof(word));
  return word;
}

const void* pointer_at(const void* base, size_t offset) {
  return reinterpret_cast<const void*>(word_at(base, offset));
}

// An odd constant for each word, so that exchanged or shifted words do not cancel out.
struct Weights {
  uint64_t of[kNumWords + kDataWords] = {};

  constexpr Weights() {
    for (uint64_t i = 0; i < kNumWords + kDataWords; ++i) {
      uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      of[i] = (z ^ (z >> 31)) | 1;
    }
  }
};
constexpr Weights kWeights;

uint64_t mix(PyObject* tensor) {
  const void* const description = pointer_at(tensor, g_offsets.description);
  const void* const storage = pointer_at(description, g_offsets.storage);
  uint64_t sum = reinterpret_cast<uintptr_t>(tensor) * kWeights.of[0];
  sum += reinterpret_cast<uintptr_t>(description) * kWeights.of[1];
  for (size_t i = kFirstWord; i < kNumWords; i += 2)
    sum += (word_at(description, i * kWord) + kWeights.of[i]) *
           (word_at(description, (i + 1) * kWord) + kWeights.of[i + 1]);
  for (size_t i = 0; storage != nullptr && i < kDataWords; ++i)
    sum += word_at(storage, g_offsets.data + i * kWord) * kWeights.of[kNumWords + i];
  return sum != kNoFingerprint ? sum : 1;
}

// Offset of the word with this value among the first `size` bytes, or 0.
size_t find_word(const void* base, size_t size, uint64_t value) {
  for (size_t offset = kWord; offset + kWord <= size; offset += kWord)
    if (word_at(base, offset) == value) return offset;
  return 0;
}

bool allocated_at_least(const void* memory, size_t size) {
#if defined(__GLIBC__)
  return malloc_usable_size(const_cast<void*>(memory)) >= size;
#else
  return memory == nullptr && size == 0;  // cannot be told: fingerprints stay off
#endif
}

bool find_offsets(const py::object& tensor) {
  const auto description = tensor.attr("_cdata").cast<uintptr_t>();
  const auto storage = tensor.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>();
  const auto data = tensor.attr("data_ptr")().cast<uintptr_t>();
  const auto* const described = reinterpret_cast<const void*>(description);
  const auto* const stored = reinterpret_cast<const void*>(storage);
  const auto object_size = static_cast<size_t>(Py_TYPE(tensor.ptr())->tp_basicsize);
  if (!allocated_at_least(described, kNumWords * kWord) ||
      !allocated_at_least(stored, (kStorageWords + kDataWords) * kWord))
    return false;
  g_offsets.description = find_word(tensor.ptr(), object_size, description);
  g_offsets.storage = find_word(described, kNumWords * kWord, storage);
  g_offsets.data = find_word(stored, kStorageWords * kWord, data);
  return g_offsets.description != 0 && g_offsets.storage != 0 && g_offsets.data != 0;
}

// True if `change` shows in a tensor's fingerprint, and if nothing shows without a change.
bool shows(py::object tensor, const std::function<void(py::object&)>& change) {
  const uint64_t before = mix(tensor.ptr());
  tensor.attr("mul_")(0.5);
  if (mix(tensor.ptr()) != before) return false;
  change(tensor);
  return mix(tensor.ptr()) != before;
}

bool every_change_shows(const py::module_& torch) {
  const auto probe = [&] { return torch.attr("zeros")(6, 4); };
  const auto view_as = [](py::object& t, const py::object& view) { t.attr("data") = view; };
  const std::function<void(py::object&)> changes[] = {
      [&](py::object& t) { view_as(t, torch.attr("zeros")(6, 4)); },
      [&](py::object& t) { view_as(t, t.attr("view")(4, 6)); },
      [&](py::object& t) { view_as(t, t.attr("view")(torch.attr("int32"))); },
      [&](py::object& t) {
        view_as(t, t.attr("as_strided")(py::make_tuple(6, 4), py::make_tuple(1, 6)));
      },
      [&](py::object& t) {
        view_as(t, t.attr("as_strided")(py::make_tuple(5, 4), py::make_tuple(4, 1), 4));
      },
      [&](py::object& t) { view_as(t, t.attr("narrow")(0, 0, 5)); },
      [](py::object& t) { t.attr("resize_")(3, 4); },
      [](py::object& t) { t.attr("t_")(); },
      [](py::object& t) { t.attr("untyped_storage")().attr("resize_")(0); },
      [&](py::object& t) { t.attr("set_")(torch.attr("zeros")(6, 4)); },
      [&](py::object& t) { t = torch.attr("zeros")(6, 4); },
  };
  for (const auto& change : changes)
    if (!shows(probe(), change)) return false;
  // After a copy on write, the next write must go to memory of its own.
  py::object snapshot;
  return !py::hasattr(torch, "_lazy_clone") ||
         shows(probe(), [&](py::object& t) { snapshot = torch.attr("_lazy_clone")(t); });
}

bool is_one_bit(uint64_t bits) { return bits != 0 && (bits & (bits - 1)) == 0; }

// Offset of the word in which conj() changes one bit, and a lazy negation another, whatever the
// tensor; 0 unless there is exactly one such word. Pointers do not differ like that.
size_t find_keys(const py::module_& torch) {
  std::vector<py::object> tensors;
  for (const int size : {1, 4, 9, 16}) {
    const py::object complex =
        torch.attr("ones")(3, size, py::arg("dtype") = torch.attr("complex64"));
    const py::object conjugate = complex.attr("conj")();
    const py::object imag = complex.attr("imag"), negated = conjugate.attr("imag");
    tensors.insert(tensors.end(), {complex, conjugate, imag, negated});
  }
  const auto change = [&](size_t first, size_t word) {
    const auto keys_at = [&](size_t i) {
      return word_at(pointer_at(tensors[i].ptr(), g_offsets.description), word * kWord);
    };
    return keys_at(first) ^ keys_at(first + 1);
  };
  size_t found = 0;
  size_t num_words = kNumWords;  // in builds without the GIL, the keys lie behind those
  const auto has_more = [&](const py::object& tensor) {
    return allocated_at_least(pointer_at(tensor.ptr(), g_offsets.description),
                              (num_words + 1) * kWord);
  };
  while (num_words < kNumWords + 2 && std::all_of(tensors.begin(), tensors.end(), has_more))
    ++num_words;
  for (size_t word = kFirstWord; word < num_words; ++word) {
    const uint64_t conjugated = change(0, word), negated = change(2, word);
    bool is_keys = is_one_bit(conjugated) && is_one_bit(negated) && conjugated != negated;
    for (size_t i = 4; i < tensors.size(); i += 4)
      is_keys = is_keys && change(i, word) == conjugated && change(i + 2, word) == negated;
    if (is_keys && found != 0) return 0;
    if (is_keys) found = word * kWord;
  }
  return found;
}

}  // namespace

void learn_fingerprints() {
  try {
    const auto torch = py::module_::import("torch");
    g_offsets.trusted = find_offsets(torch.attr("ones")(3, 5)) && every_change_shows(torch);
    if (g_offsets.trusted) g_offsets.keys = find_keys(torch);
  } catch (const py::error_already_set&) {
    g_offsets.trusted = false;
  }
}

bool has_dispatch_keys() { return g_offsets.trusted && g_offsets.keys != 0; }

uint64_t dispatch_keys(PyObject* tensor) {
  if (!has_dispatch_keys()) return kNoKeys;
  return word_at(pointer_at(tensor, g_offsets.description), g_offsets.keys);
}

bool has_fingerprints() { return g_offsets.trusted; }

uint64_t fingerprint(PyObject* tensor) { return g_offsets.trusted ? mix(tensor) : kNoFingerprint; }

void prefetch_description(PyObject* tensor) {
  if (!g_offsets.trusted || tensor == Py_None) return;
  const auto* const words = static_cast<const char*>(pointer_at(tensor, g_offsets.description));
  for (size_t at = 0; at < kNumWords * kWord; at += 64) __builtin_prefetch(words + at);
}

void prefetch_storage(PyObject* tensor) {
  if (!g_offsets.trusted || tensor == Py_None) return;
  const void* const description = pointer_at(tensor, g_offsets.description);
  __builtin_prefetch(pointer_at(description, g_offsets.storage));
  __builtin_prefetch(pointer_at(description, g_offsets.storage + kWord));  // where the grad hangs
}

}  // namespace fusedopt
