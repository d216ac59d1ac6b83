#include "bindings/fingerprint.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

namespace py = pybind11;

namespace fusedopt {
namespace {

constexpr size_t kWord = sizeof(uint64_t);
constexpr size_t kFirstWord = 2;  // behind the reference counts
constexpr size_t kMaxWords = 23;  // of a description, in the versions of torch that are known
constexpr size_t kDataWords = 3;  // of a storage: data, and who frees it, which a snapshot changes
constexpr size_t kStorageWords = 6;
constexpr size_t kCacheLine = 64;
constexpr uint64_t kMaxDims = 5;  // sizes and strides of more lie elsewhere

// Byte offsets in a description, unless said otherwise; 0 for what has not been found.
struct Offsets {
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

Offsets g_offsets;
const char* g_obstacle = nullptr;  // why there are no fingerprints

uint64_t word_at(const void* base, size_t offset) {
  uint64_t word;
  memcpy(&word, static_cast<const char*>(base) + offset, sizeof(word));
  return word;
}

const void* pointer_at(const void* base, size_t offset) {
  return reinterpret_cast<const void*>(word_at(base, offset));
}

const void* description_of(PyObject* tensor) { return pointer_at(tensor, g_offsets.description); }

// An odd constant for each word, so that exchanged or shifted words do not cancel out.
struct Weights {
  uint64_t of[3 * kMaxWords] = {};

  constexpr Weights() {
    for (uint64_t i = 0; i < 3 * kMaxWords; ++i) {
      uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      of[i] = (z ^ (z >> 31)) | 1;
    }
  }
};
constexpr Weights kWeights;

// Mixes words, two at a time.
class Mixer {
 public:
  void add(uint64_t first, uint64_t second) {
    sum_ += (first + kWeights.of[next_]) * (second + kWeights.of[next_ + 1]);
    next_ += 2;
  }
  uint64_t result() const { return sum_ != kNoFingerprint ? sum_ : 1; }

 private:
  uint64_t sum_ = 0;
  size_t next_ = 0;
};

uint64_t mix_form(const void* description) {
  const uint64_t ndim = word_at(description, g_offsets.ndim);
  if (ndim > kMaxDims) return kNoFingerprint;
  Mixer mixer;
  mixer.add(ndim, word_at(description, g_offsets.numel));
  mixer.add(word_at(description, g_offsets.start), 0);
  for (size_t i = 0; i < g_offsets.num_kinds; i += 2) {
    const Offsets::Kind &first = g_offsets.kinds[i], &second = g_offsets.kinds[i + 1];
    mixer.add(word_at(description, first.offset) & first.mask,
              word_at(description, second.offset) & second.mask);
  }
  for (uint64_t d = 0; d < ndim; ++d)
    mixer.add(word_at(description, g_offsets.sizes + d * kWord),
              word_at(description, g_offsets.strides + d * kWord));
  return mixer.result();
}

uint64_t mix_all(PyObject* tensor) {
  const void* const description = description_of(tensor);
  const uint64_t form = mix_form(description);
  if (form == kNoFingerprint) return kNoFingerprint;
  Mixer mixer;
  mixer.add(form, reinterpret_cast<uintptr_t>(tensor));
  const void* const storage = pointer_at(description, g_offsets.storage);
  mixer.add(reinterpret_cast<uintptr_t>(description), reinterpret_cast<uintptr_t>(storage));
  if (storage == nullptr) return mixer.result();
  static_assert(kDataWords == 3);
  mixer.add(word_at(storage, g_offsets.data), word_at(storage, g_offsets.data + kWord));
  mixer.add(word_at(storage, g_offsets.data + 2 * kWord), 0);
  return mixer.result();
}

// Offset of the first run of words with these values among the first `size` bytes, or 0.
size_t find_words(const void* base, size_t size, std::initializer_list<uint64_t> values) {
  for (size_t offset = kWord; offset + values.size() * kWord <= size; offset += kWord) {
    size_t i = 0;
    const bool fits = std::all_of(values.begin(), values.end(), [&](uint64_t value) {
      return word_at(base, offset + i++ * kWord) == value;
    });
    if (fits) return offset;
  }
  return 0;
}

bool allocated_at_least(const void* memory, size_t size) {
#if defined(__GLIBC__)
  return malloc_usable_size(const_cast<void*>(memory)) >= size;
#else
  return memory == nullptr && size == 0;  // cannot be told: fingerprints stay off
#endif
}

// torch.zeros(), on the CPU and in float32 whatever the defaults are.
py::object zeros(std::initializer_list<int64_t> sizes, const char* dtype = "float32",
                 const char* device = "cpu") {
  const auto torch = py::module_::import("torch");
  py::list shape;
  for (const int64_t size : sizes) shape.append(size);
  return torch.attr("zeros")(shape, py::arg("dtype") = torch.attr(dtype),
                             py::arg("device") = device);
}

// Sizes, strides and an offset that occur nowhere else in the description.
py::object distinctive_probe() {
  return zeros({1000}).attr("as_strided")(py::make_tuple(2, 3, 7, 11, 13),
                                          py::make_tuple(17, 19, 23, 29, 31), 37);
}

bool find_offsets() {
  const py::object tensor = distinctive_probe();
  const auto description = tensor.attr("_cdata").cast<uintptr_t>();
  const auto storage = tensor.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>();
  const auto data = tensor.attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>();
  const auto* const described = reinterpret_cast<const void*>(description);
  const auto* const stored = reinterpret_cast<const void*>(storage);
  const auto object_size = static_cast<size_t>(Py_TYPE(tensor.ptr())->tp_basicsize);
  const size_t size = g_offsets.num_words * kWord;
  if (!allocated_at_least(described, size) ||
      !allocated_at_least(stored, (kStorageWords + kDataWords) * kWord))
    return false;
  g_offsets.description = find_words(tensor.ptr(), object_size, {description});
  g_offsets.storage = find_words(described, size, {storage});
  g_offsets.data = find_words(stored, kStorageWords * kWord, {data});
  g_offsets.ndim = find_words(described, size, {5});
  g_offsets.sizes = find_words(described, size, {2, 3, 7, 11, 13});
  g_offsets.strides = find_words(described, size, {17, 19, 23, 29, 31});
  g_offsets.start = find_words(described, size, {37});
  g_offsets.numel = find_words(described, size, {2 * 3 * 7 * 11 * 13});
  const size_t found[] = {g_offsets.description, g_offsets.storage, g_offsets.data,
                          g_offsets.ndim,        g_offsets.sizes,   g_offsets.strides,
                          g_offsets.start,       g_offsets.numel};
  return std::all_of(std::begin(found), std::end(found), [](size_t at) { return at != 0; });
}

// A grad as backward() leaves it.
py::object grad_of_backward() {
  const py::object param = zeros({6, 4}).attr("requires_grad_")();
  param.attr("mul")(2.0).attr("sum")().attr("backward")();
  return param.attr("grad");
}

// Leaves memory with these bytes to the next objects of that size.
void litter(size_t size, int byte) {
  void* pieces[8];
  for (void*& piece : pieces) {
    piece = malloc(size);
    if (piece == nullptr) continue;
    memset(piece, byte, size);
    asm volatile("" : : "r"(piece) : "memory");  // else nobody could tell
  }
  for (void* const piece : pieces) free(piece);
}

// Tensors of one form, wherever they come from.
std::vector<py::object> tensors_of_one_form() {
  std::vector<py::object> tensors;
  for (const int byte : {0x00, 0xff, 0x5a}) {
    const auto add = [&](const py::object& tensor) {
      tensors.push_back(tensor);
      litter(g_offsets.num_words * kWord, byte);
      litter((g_offsets.num_words + 2) * kWord, byte);
    };
    add(zeros({6, 4}));
    for (int i = 0; i < 3; ++i) add(zeros({6, 4}));
    add(zeros({6, 4}).attr("requires_grad_")());
    add(grad_of_backward());
    add(grad_of_backward().attr("detach")());
    add(zeros({4, 6}).attr("mul")(2.0).attr("reshape")(6, 4));
  }
  return tensors;
}

// Finds the words in which tensors of other dtypes and flags differ from `tensors`, and there the
// bits that are the same in all of these.
void find_kinds(const std::vector<py::object>& tensors) {
  const py::object others[] = {zeros({6, 4}, "bfloat16"), zeros({6, 4}, "float64"),
                               zeros({6, 4}, "complex64").attr("conj")()};
  const void* const first = description_of(tensors[0].ptr());
  const auto lies_in = [](size_t offset, size_t begin) {
    return begin <= offset && offset < begin + kMaxDims * kWord;
  };
  g_offsets.num_kinds = 0;
  for (size_t offset = kFirstWord * kWord; offset < g_offsets.num_words * kWord; offset += kWord) {
    if (lies_in(offset, g_offsets.sizes) || lies_in(offset, g_offsets.strides)) continue;
    uint64_t varying = 0, telling = 0;
    for (const py::object& tensor : tensors)
      varying |= word_at(description_of(tensor.ptr()), offset) ^ word_at(first, offset);
    for (const py::object& other : others)
      telling |= word_at(description_of(other.ptr()), offset) ^ word_at(first, offset);
    // Of pointers, and of them alone, the lower half differs from tensor to tensor.
    const bool is_pointer = (varying & 0xffffffffu) != 0;
    if (!is_pointer && (telling & ~varying) != 0)
      g_offsets.kinds[g_offsets.num_kinds++] = {offset, ~varying};
  }
  if (g_offsets.num_kinds % 2 != 0)  // they are mixed in pairs
    g_offsets.kinds[g_offsets.num_kinds++] = {g_offsets.ndim, ~uint64_t{0}};
}

uint64_t form_of(const py::object& tensor) { return mix_form(description_of(tensor.ptr())); }

// True if tensors that are read in the same way, and no others, have the same form.
bool forms_are_right(const py::module_& torch, const std::vector<py::object>& same) {
  const auto of_dtype = [](const char* dtype) { return zeros({6, 4}, dtype); };
  const uint64_t form = form_of(of_dtype("float32"));
  for (const py::object& tensor : same)
    if (form_of(tensor) != form) return false;
  std::vector<py::object> others = {
      zeros({6, 4}, "float32", "meta"),
      of_dtype("complex64").attr("conj")(),
      of_dtype("complex64").attr("conj")().attr("imag"),
      of_dtype("complex64").attr("imag"),
      torch.attr("_efficientzerotensor")(py::make_tuple(6, 4), py::arg("device") = "cpu"),
      zeros({6, 4, 1}),
      zeros({24}),
      zeros({4, 6}),
      zeros({4, 6}).attr("t")(),
      zeros({6, 5}).attr("narrow")(1, 0, 4),
      zeros({7, 4}).attr("narrow")(0, 1, 6),
      zeros({1, 4}).attr("expand")(6, 4)};
  for (const char* dtype : {"float64", "float16", "bfloat16", "complex64", "complex128", "int16",
                            "int32", "int64", "float8_e4m3fn"})
    others.push_back(of_dtype(dtype));
  std::vector<uint64_t> forms = {form};
  for (const py::object& other : others) forms.push_back(form_of(other));
  std::sort(forms.begin(), forms.end());
  const py::object six_dims = zeros({1, 1, 1, 1, 6, 4});
  return std::adjacent_find(forms.begin(), forms.end()) == forms.end() &&
         form_of(six_dims) == kNoFingerprint;
}

// True if `change` shows in a tensor's fingerprint, and if nothing shows without a change.
bool shows(py::object tensor, const std::function<void(py::object&)>& change) {
  const uint64_t before = mix_all(tensor.ptr());
  tensor.attr("mul_")(0.5);
  if (mix_all(tensor.ptr()) != before) return false;
  change(tensor);
  return mix_all(tensor.ptr()) != before;
}

bool every_change_shows(const py::module_& torch) {
  const auto probe = [&] { return zeros({6, 4}); };
  const auto view_as = [](py::object& t, const py::object& view) { t.attr("data") = view; };
  const std::function<void(py::object&)> changes[] = {
      [&](py::object& t) { view_as(t, zeros({6, 4})); },
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
      [&](py::object& t) { t.attr("set_")(zeros({6, 4})); },
      [&](py::object& t) { t = zeros({6, 4}); },
  };
  for (const auto& change : changes)
    if (!shows(probe(), change)) return false;
  // After a copy on write, the next write must go to memory of its own.
  py::object snapshot;
  return !py::hasattr(torch, "_lazy_clone") ||
         shows(probe(), [&](py::object& t) { snapshot = torch.attr("_lazy_clone")(t); });
}

std::atomic<uint32_t>* version_of(PyObject* tensor) {
  const void* const counter = pointer_at(description_of(tensor), g_offsets.version_counter);
  if (counter == nullptr) return nullptr;
  return reinterpret_cast<std::atomic<uint32_t>*>(reinterpret_cast<uintptr_t>(counter) +
                                                  g_offsets.version);
}

// Finds the counter of writes to a tensor: the one word that a view always shares, but neither a
// tensor of the same storage that is no view nor any other tensor; in the counter, the number that
// torch says is the tensor's version.
bool find_version() {
  std::vector<py::object> tensors, views, same_storage;
  for (const int byte : {0x00, 0xff, 0x5a, 0x00}) {
    litter(g_offsets.num_words * kWord, byte);  // words that torch leaves as they are differ
    const py::object tensor = zeros({6, 4});
    for (size_t i = 0; i < 41 + tensors.size(); ++i) tensor.attr("zero_")();
    litter(g_offsets.num_words * kWord, ~byte);
    views.push_back(tensor.attr("view")(4, 6));
    same_storage.push_back(tensor.attr("data"));
    tensors.push_back(tensor);
  }
  const auto is_counter = [&](size_t offset) {
    const auto word = [&](const py::object& of) {
      return word_at(description_of(of.ptr()), offset);
    };
    for (size_t i = 0; i < tensors.size(); ++i) {
      const uint64_t mine = word(tensors[i]);
      const bool is_address = mine > 4096 && mine % alignof(std::max_align_t) == 0;
      if (!is_address || mine != word(views[i]) || mine == word(same_storage[i]) ||
          (i > 0 && mine == word(tensors[i - 1])))
        return false;
    }
    return true;
  };
  size_t counter = 0;
  for (size_t offset = kFirstWord * kWord; offset < g_offsets.num_words * kWord; offset += kWord) {
    if (!is_counter(offset)) continue;
    if (counter != 0) return false;
    counter = offset;
  }
  if (counter == 0) return false;
  constexpr size_t kMaxBytes = 4 * kWord;
  const void* const counted = pointer_at(description_of(tensors[0].ptr()), counter);
  size_t at = 0;
  for (size_t offset = kWord; at == 0 && offset < kMaxBytes; offset += sizeof(uint32_t)) {
    uint32_t number = 0;
    if (!allocated_at_least(counted, offset + sizeof(number))) break;
    memcpy(&number, static_cast<const char*>(counted) + offset, sizeof(number));
    if (number == tensors[0].attr("_version").cast<uint32_t>()) at = offset;
  }
  if (at == 0) return false;
  g_offsets.version_counter = counter;
  g_offsets.version = at;
  tensors.push_back(grad_of_backward());
  for (const py::object& tensor : tensors) {
    const auto version = tensor.attr("_version").cast<uint32_t>();
    std::atomic<uint32_t>* const found = version_of(tensor.ptr());
    if (found == nullptr || found->load() != version) return false;
    ++*found;
    if (tensor.attr("_version").cast<uint32_t>() != version + 1) return false;
  }
  return views[0].attr("_version").cast<uint32_t>() == tensors[0].attr("_version").cast<uint32_t>();
}

bool is_one_bit(uint64_t bits) { return bits != 0 && (bits & (bits - 1)) == 0; }

// Offset of the word in which conj() changes one bit, and a lazy negation another, whatever the
// tensor; 0 unless there is exactly one such word. Pointers do not differ like that.
size_t find_keys() {
  std::vector<py::object> tensors;
  for (const int64_t size : {1, 4, 9, 16}) {
    const py::object complex = zeros({3, size}, "complex64"), conjugate = complex.attr("conj")();
    const py::object imag = complex.attr("imag"), negated = conjugate.attr("imag");
    tensors.insert(tensors.end(), {complex, conjugate, imag, negated});
  }
  const auto change = [&](size_t first, size_t offset) {
    return word_at(description_of(tensors[first].ptr()), offset) ^
           word_at(description_of(tensors[first + 1].ptr()), offset);
  };
  size_t found = 0;
  for (size_t offset = kFirstWord * kWord; offset < g_offsets.num_words * kWord; offset += kWord) {
    const uint64_t conjugated = change(0, offset), negated = change(2, offset);
    bool is_keys = is_one_bit(conjugated) && is_one_bit(negated) && conjugated != negated;
    for (size_t i = 4; i < tensors.size(); i += 4)
      is_keys = is_keys && change(i, offset) == conjugated && change(i + 2, offset) == negated;
    if (is_keys && found != 0) return 0;
    if (is_keys) found = offset;
  }
  return found;
}

// torch without what may be set where fusedopt is imported, until this ends: modes that change what
// its functions do (fake tensors, deferred initialisation), and what keeps grads from being
// recorded.
class PlainTorch {
 public:
  PlainTorch() = default;
  PlainTorch(const PlainTorch&) = delete;
  PlainTorch& operator=(const PlainTorch&) = delete;
  ~PlainTorch() {
    for (; !contexts_.empty(); contexts_.pop_back()) try {
        contexts_.back().attr("__exit__")(py::none(), py::none(), py::none());
      } catch (py::error_already_set& error) {
        error.discard_as_unraisable("fusedopt");
      }
  }

  void begin() {
    const auto torch = py::module_::import("torch");
    const py::object library = torch.attr("_C");
    if (library.attr("_len_torch_dispatch_stack")().cast<int>() >
        0)  // for it imports more of torch
      enter(py::module_::import("torch.utils._python_dispatch").attr("_disable_current_modes")());
    enter(library.attr("DisableTorchFunction")());
    enter(torch.attr("inference_mode")(false));
    enter(torch.attr("enable_grad")());
  }

 private:
  void enter(const py::object& context) {
    context.attr("__enter__")();
    contexts_.push_back(context);
  }
  std::vector<py::object> contexts_;
};

// Learns where things are in descriptions of so many words. Returns what is not as expected, or
// nullptr.
const char* learn(size_t num_words) {
  const auto torch = py::module_::import("torch");
  g_offsets.num_words = num_words;
  if (!find_offsets()) return "where sizes, strides and memory are described";
  const std::vector<py::object> tensors = tensors_of_one_form();
  find_kinds(tensors);
  if (!forms_are_right(torch, tensors)) return "how dtypes, devices and flags are described";
  if (!every_change_shows(torch)) return "which changes show in a description";
  g_offsets.trusted = true;
  g_offsets.keys = find_keys();
  if (!find_version()) g_offsets.version = 0;
  return nullptr;
}

}  // namespace

void learn_fingerprints() {
  const char* const wanted = std::getenv("FUSEDOPT_FINGERPRINTS");
  g_obstacle = "FUSEDOPT_FINGERPRINTS=0";
  if (wanted != nullptr && std::string(wanted) == "0") return;
  try {
    PlainTorch plain;
    plain.begin();
    // torch 2.10 has a word more in it than 2.13.
    for (size_t num_words = kMaxWords - 1; num_words <= kMaxWords; ++num_words) {
      g_offsets = {};
      g_obstacle = learn(num_words);
      if (g_obstacle == nullptr) return;
    }
  } catch (const std::exception&) {  // of Python's, too
    g_obstacle = "how tensors can be made";
  }
  g_offsets = {};
}

const char* fingerprint_obstacle() { return g_obstacle; }

bool has_dispatch_keys() { return g_offsets.trusted && g_offsets.keys != 0; }

uint64_t dispatch_keys(PyObject* tensor) {
  if (!has_dispatch_keys()) return kNoKeys;
  return word_at(description_of(tensor), g_offsets.keys);
}

bool has_fingerprints() { return g_offsets.trusted; }

bool has_versions() { return g_offsets.trusted && g_offsets.version != 0; }

bool increment_version(PyObject* tensor) {
  if (!has_versions()) return false;
  std::atomic<uint32_t>* const version = version_of(tensor);
  if (version == nullptr) return false;
  version->fetch_add(1, std::memory_order_relaxed);
  return true;
}

uint64_t form_fingerprint(PyObject* tensor) {
  return g_offsets.trusted ? mix_form(description_of(tensor)) : kNoFingerprint;
}

uint64_t fingerprint(PyObject* tensor) {
  return g_offsets.trusted ? mix_all(tensor) : kNoFingerprint;
}

void prefetch_description(PyObject* tensor) {
  if (!g_offsets.trusted) return;
  const char* const description = static_cast<const char*>(description_of(tensor));
  for (size_t byte = 0; byte < kMaxWords * kWord; byte += kCacheLine)
    __builtin_prefetch(description + byte);
}

void prefetch_storage(PyObject* tensor) {
  if (!g_offsets.trusted) return;
  __builtin_prefetch(pointer_at(description_of(tensor), g_offsets.storage));
}

char* storage_data(PyObject* tensor) {
  if (!g_offsets.trusted) return nullptr;
  const void* const storage = pointer_at(description_of(tensor), g_offsets.storage);
  if (storage == nullptr) return nullptr;
  return reinterpret_cast<char*>(word_at(storage, g_offsets.data));
}

}  // namespace fusedopt
