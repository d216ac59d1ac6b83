#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#if defined(__GLIBC__)  // which the headers above define
#include <malloc.h>
#endif

#include "bindings/fingerprint.h"
#include "bindings/torch_layout.h"

// Learns torch's layout, and makes sure that fingerprints tell what they promise: every kind of
// change that matters is made to a probe and must show.
namespace py = pybind11;

namespace fusedopt {
namespace {

constexpr size_t kFirstWord = 2;  // behind the reference counts
constexpr size_t kStorageWords = 6;

const char* g_obstacle = nullptr;  // why the layout is not trusted

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
  const size_t size = g_layout.num_words * kWord;
  if (!allocated_at_least(described, size) ||
      !allocated_at_least(stored, (kStorageWords + kDataWords) * kWord))
    return false;
  g_layout.description = find_words(tensor.ptr(), object_size, {description});
  g_layout.storage = find_words(described, size, {storage});
  g_layout.data = find_words(stored, kStorageWords * kWord, {data});
  g_layout.ndim = find_words(described, size, {5});
  g_layout.sizes = find_words(described, size, {2, 3, 7, 11, 13});
  g_layout.strides = find_words(described, size, {17, 19, 23, 29, 31});
  g_layout.start = find_words(described, size, {37});
  g_layout.numel = find_words(described, size, {2 * 3 * 7 * 11 * 13});
  const size_t found[] = {g_layout.description, g_layout.storage, g_layout.data,  g_layout.ndim,
                          g_layout.sizes,       g_layout.strides, g_layout.start, g_layout.numel};
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
      litter(g_layout.num_words * kWord, byte);
      litter((g_layout.num_words + 2) * kWord, byte);
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
    return begin <= offset && offset < begin + kMaxNearDims * kWord;
  };
  g_layout.num_kinds = 0;
  for (size_t offset = kFirstWord * kWord; offset < g_layout.num_words * kWord; offset += kWord) {
    if (lies_in(offset, g_layout.sizes) || lies_in(offset, g_layout.strides)) continue;
    uint64_t varying = 0, telling = 0;
    for (const py::object& tensor : tensors)
      varying |= word_at(description_of(tensor.ptr()), offset) ^ word_at(first, offset);
    for (const py::object& other : others)
      telling |= word_at(description_of(other.ptr()), offset) ^ word_at(first, offset);
    // Of pointers, and of them alone, the lower half differs from tensor to tensor.
    const bool is_pointer = (varying & 0xffffffffu) != 0;
    if (!is_pointer && (telling & ~varying) != 0)
      g_layout.kinds[g_layout.num_kinds++] = {offset, ~varying};
  }
  if (g_layout.num_kinds % 2 != 0)  // they are mixed in pairs
    g_layout.kinds[g_layout.num_kinds++] = {g_layout.ndim, ~uint64_t{0}};
}

uint64_t form_of(const py::object& tensor) { return form_fingerprint(tensor.ptr()); }

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
  const uint64_t before = fingerprint(tensor.ptr());
  tensor.attr("mul_")(0.5);
  if (fingerprint(tensor.ptr()) != before) return false;
  change(tensor);
  return fingerprint(tensor.ptr()) != before;
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

// Finds the counter of writes to a tensor: the one word that a view always shares, but neither a
// tensor of the same storage that is no view nor any other tensor; in the counter, the number that
// torch says is the tensor's version.
bool find_version_counter() {
  constexpr size_t kWrites = 41;  // a count that no other word of a description has
  constexpr uint64_t kPage = 4096;
  std::vector<py::object> tensors, views, same_storage;
  for (const int byte : {0x00, 0xff, 0x5a, 0x00}) {
    litter(g_layout.num_words * kWord, byte);  // words that torch leaves as they are differ
    const py::object tensor = zeros({6, 4});
    for (size_t i = 0; i < kWrites + tensors.size(); ++i) tensor.attr("zero_")();
    litter(g_layout.num_words * kWord, ~byte);
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
      const bool is_address = mine > kPage && mine % alignof(std::max_align_t) == 0;
      if (!is_address || mine != word(views[i]) || mine == word(same_storage[i]) ||
          (i > 0 && mine == word(tensors[i - 1])))
        return false;
    }
    return true;
  };
  size_t counter = 0;
  for (size_t offset = kFirstWord * kWord; offset < g_layout.num_words * kWord; offset += kWord) {
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
  g_layout.version_counter = counter;
  g_layout.version = at;
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
  for (size_t offset = kFirstWord * kWord; offset < g_layout.num_words * kWord; offset += kWord) {
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
    // Only then, as it imports more of torch.
    if (library.attr("_len_torch_dispatch_stack")().cast<int>() > 0)
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
  g_layout.num_words = num_words;
  if (!find_offsets()) return "where sizes, strides and memory are described";
  const std::vector<py::object> tensors = tensors_of_one_form();
  find_kinds(tensors);
  g_layout.trusted = true;  // so that there are fingerprints to look at
  if (!forms_are_right(torch, tensors)) return "how dtypes, devices and flags are described";
  if (!every_change_shows(torch)) return "which changes show in a description";
  g_layout.keys = find_keys();
  if (!find_version_counter()) g_layout.version = 0;
  return nullptr;
}

}  // namespace

void learn_layout() {
  const char* const wanted = std::getenv("FUSEDOPT_FINGERPRINTS");
  g_obstacle = "FUSEDOPT_FINGERPRINTS=0";
  if (wanted != nullptr && std::string(wanted) == "0") return;
  try {
    PlainTorch plain;
    plain.begin();
    // torch 2.10 has a word more in it than 2.13.
    for (size_t num_words = kMaxWords - 1; num_words <= kMaxWords; ++num_words) {
      g_layout = {};
      g_obstacle = learn(num_words);
      if (g_obstacle == nullptr) return;
    }
  } catch (const std::exception&) {  // of Python's, too
    g_obstacle = "how tensors can be made";
  }
  g_layout = {};
}

const char* layout_obstacle() { return g_obstacle; }

}  // namespace fusedopt
