#include "bindings/fingerprint.h"

#include "bindings/torch_layout.h"

namespace fusedopt {
namespace {

constexpr size_t kCacheLine = 64;

// An odd constant for each word, so that exchanged or shifted words do not cancel out.
struct Multipliers {
  uint64_t of[3 * kMaxWords] = {};

  constexpr Multipliers() {
    for (uint64_t i = 0; i < 3 * kMaxWords; ++i) {
      uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      of[i] = (z ^ (z >> 31)) | 1;
    }
  }
};
constexpr Multipliers kMultipliers;

// Mixes words, two at a time.
class Mixer {
 public:
  void add(uint64_t first, uint64_t second) {
    sum_ += (first + kMultipliers.of[next_]) * (second + kMultipliers.of[next_ + 1]);
    next_ += 2;
  }
  uint64_t result() const { return sum_ != kNoFingerprint ? sum_ : 1; }

 private:
  uint64_t sum_ = 0;
  size_t next_ = 0;
};

uint64_t mix_form(const void* description) {
  const uint64_t ndim = word_at(description, g_layout.ndim);
  if (ndim > kMaxNearDims) return kNoFingerprint;
  Mixer mixer;
  mixer.add(ndim, word_at(description, g_layout.numel));
  mixer.add(word_at(description, g_layout.start), 0);
  for (size_t i = 0; i < g_layout.num_kinds; i += 2) {
    const TorchLayout::Kind &first = g_layout.kinds[i], &second = g_layout.kinds[i + 1];
    mixer.add(word_at(description, first.offset) & first.mask,
              word_at(description, second.offset) & second.mask);
  }
  for (uint64_t d = 0; d < ndim; ++d)
    mixer.add(word_at(description, g_layout.sizes + d * kWord),
              word_at(description, g_layout.strides + d * kWord));
  return mixer.result();
}

uint64_t mix_all(PyObject* tensor) {
  const void* const description = description_of(tensor);
  const uint64_t form = mix_form(description);
  if (form == kNoFingerprint) return kNoFingerprint;
  Mixer mixer;
  mixer.add(form, reinterpret_cast<uintptr_t>(tensor));
  const void* const storage = pointer_at(description, g_layout.storage);
  mixer.add(reinterpret_cast<uintptr_t>(description), reinterpret_cast<uintptr_t>(storage));
  if (storage == nullptr) return mixer.result();
  static_assert(kDataWords == 3);
  mixer.add(word_at(storage, g_layout.data), word_at(storage, g_layout.data + kWord));
  mixer.add(word_at(storage, g_layout.data + 2 * kWord), 0);
  return mixer.result();
}

}  // namespace

bool has_dispatch_keys() { return g_layout.trusted && g_layout.keys != 0; }

uint64_t dispatch_keys(PyObject* tensor) {
  if (!has_dispatch_keys()) return kNoKeys;
  return word_at(description_of(tensor), g_layout.keys);
}

bool has_fingerprints() { return g_layout.trusted; }

bool has_versions() { return g_layout.trusted && g_layout.version != 0; }

bool increment_version(PyObject* tensor) {
  if (!has_versions()) return false;
  std::atomic<uint32_t>* const version = version_of(tensor);
  if (version == nullptr) return false;
  version->fetch_add(1, std::memory_order_relaxed);
  return true;
}

int64_t find_version(PyObject* tensor) {
  const std::atomic<uint32_t>* const version = version_of(tensor);
  return version != nullptr ? int64_t{version->load(std::memory_order_relaxed)} : -1;
}

uint64_t form_fingerprint(PyObject* tensor) {
  return g_layout.trusted ? mix_form(description_of(tensor)) : kNoFingerprint;
}

uint64_t fingerprint(PyObject* tensor) {
  return g_layout.trusted ? mix_all(tensor) : kNoFingerprint;
}

void prefetch_description(PyObject* tensor) {
  if (!g_layout.trusted) return;
  const char* const description = static_cast<const char*>(description_of(tensor));
  for (size_t byte = 0; byte < kMaxWords * kWord; byte += kCacheLine)
    __builtin_prefetch(description + byte);
}

void prefetch_storage(PyObject* tensor) {
  if (!g_layout.trusted) return;
  __builtin_prefetch(pointer_at(description_of(tensor), g_layout.storage));
}

char* storage_data(PyObject* tensor) {
  if (!g_layout.trusted) return nullptr;
  const void* const storage = pointer_at(description_of(tensor), g_layout.storage);
  if (storage == nullptr) return nullptr;
  return reinterpret_cast<char*>(word_at(storage, g_layout.data));
}

}  // namespace fusedopt
