#include "bindings/memory.h"

#include <atomic>
#include <mutex>
#include <unordered_map>

#include "bindings/fingerprint.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// How to get from a tensor of some type to what it wraps.
struct Wrapping {
  PyObject* name = nullptr;  // of the attribute, or of the method; nullptr: it wraps nothing
  bool is_method = false;
};

// Asked once for each type, which is then kept for good.
Wrapping wrapping_of(PyTypeObject* type) {
  static auto* const known = new std::unordered_map<PyTypeObject*, Wrapping>();
  static auto* const mutex = new std::mutex();
  {
    const std::lock_guard<std::mutex> lock(*mutex);
    const auto found = known->find(type);
    if (found != known->end()) return found->second;
  }
  const auto object = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
  Wrapping wrapping;
  try {
    const py::tuple answer = ask_wrapping(object);
    if (!answer[0].is_none()) wrapping.name = py::object(answer[0]).release().ptr();
    wrapping.is_method = answer[1].cast<bool>();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    throw UnknownTensorType(py::str(error.value()));
  }
  const std::lock_guard<std::mutex> lock(*mutex);
  if (known->emplace(type, wrapping).second) object.inc_ref();
  return wrapping;
}

// Sets of dispatch keys of tensors that were found not to be lazy. There are few in a program.
constexpr int kKnownKeys = 8;
std::atomic<uint64_t> g_keys_of_values[kKnownKeys] = {};

bool has_known_keys(uint64_t keys) {
  for (const auto& known : g_keys_of_values)
    if (known.load(std::memory_order_relaxed) == keys) return keys != kNoKeys;
  return false;
}

void remember(uint64_t keys) {
  static std::atomic<unsigned> next{0};
  if (keys != kNoKeys)
    g_keys_of_values[next.fetch_add(1, std::memory_order_relaxed) % kKnownKeys].store(
        keys, std::memory_order_relaxed);
}

}  // namespace

PyObject* unwrap(PyObject* tensor, References& held) {
  constexpr int kMaxDepth = 8;
  for (int depth = 0; !is_plain(tensor); ++depth) {
    const Wrapping wrapping = wrapping_of(Py_TYPE(tensor));
    if (wrapping.name == nullptr) return tensor;
    py::object inner = py::handle(tensor).attr(py::handle(wrapping.name));
    if (wrapping.is_method) inner = inner();
    if (!is_tensor(inner.ptr()) || depth == kMaxDepth)
      throw UnknownTensorType("a tensor subclass that wraps " +
                              std::string(py::repr(py::type::of(inner))));
    tensor = held.hold(std::move(inner));
  }
  return tensor;
}

Contents contents_of(PyObject* memory, const TensorView& view) {
  if (view.data == nullptr && count_elements(view) > 0)
    return is_zero_tensor(memory) ? Contents::kZeros : Contents::kFreed;
  // Being lazy is one of a tensor's dispatch keys, so those that have the same are lazy alike.
  const uint64_t keys = dispatch_keys(memory);
  if (has_known_keys(keys)) return Contents::kValues;
  if (is_negated(memory) || is_conjugated(memory)) return Contents::kLazy;
  remember(keys);
  return Contents::kValues;
}

py::object materialize(PyObject* memory) {
  const py::object resolved = py::handle(memory).attr("resolve_conj")().attr("resolve_neg")();
  return is_zero_tensor(resolved.ptr()) ? resolved.attr("clone")() : resolved;
}

}  // namespace fusedopt
