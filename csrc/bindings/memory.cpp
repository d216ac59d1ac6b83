#include "bindings/memory.h"

#include <atomic>
#include <mutex>
#include <unordered_map>

#include "bindings/fingerprint.h"
#include "bindings/options.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

const Key kMesh("mesh"), kPlacements("placements");

// How to get from a tensor of some type to what it wraps.
struct Wrapping {
  PyObject* name = nullptr;  // of the attribute, or of the method; nullptr: it wraps nothing
  bool is_method = false;
  PyObject* spec = nullptr;  // name of the attribute with a DTensor's layout over devices
};

// Asked once for each type, which is then kept for good.
Wrapping wrapping_of(PyTypeObject* type) {
  using Known = std::unordered_map<PyTypeObject*, Wrapping>;
  static auto* const known = new Known();
  static auto* const mutex = new std::mutex();
  static std::atomic<const Known::value_type*> latest{nullptr};  // entries stay where they are
  const Known::value_type* const last = latest.load(std::memory_order_acquire);
  if (last != nullptr && last->first == type) return last->second;
  {
    const std::lock_guard<std::mutex> lock(*mutex);
    const auto found = known->find(type);
    if (found != known->end()) {
      latest.store(&*found, std::memory_order_release);
      return found->second;
    }
  }
  const auto object = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
  Wrapping wrapping;
  try {
    const py::tuple answer = ask_wrapping(object);
    if (!answer[0].is_none()) wrapping.name = py::object(answer[0]).release().ptr();
    wrapping.is_method = answer[1].cast<bool>();
    if (!answer[2].is_none()) wrapping.spec = py::object(answer[2]).release().ptr();
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

Shard find_shard(PyObject* tensor, References& held) {
  if (is_plain(tensor)) return {tensor, nullptr};
  Wrapping wrapping;
  try {
    wrapping = wrapping_of(Py_TYPE(tensor));
  } catch (const UnknownTensorType&) {
    return {};  // unwrap() will raise it again, where the tensor has a name
  }
  if (wrapping.spec == nullptr) return {};
  const auto read = [&](PyObject* name) {
    return held.hold(py::object(py::handle(tensor).attr(py::handle(name))));
  };
  PyObject* const shard = read(wrapping.name);
  return {is_plain(shard) ? shard : nullptr, read(wrapping.spec)};
}

bool are_alike(PyObject* spec, PyObject* other) {
  if (spec == other) return true;
  if (spec == nullptr || other == nullptr) return false;
  const auto read = [](PyObject* from, const Key& name) {
    return py::object(py::handle(from).attr(py::handle(name.object())));
  };
  return read(spec, kMesh).is(read(other, kMesh)) &&
         read(spec, kPlacements).equal(read(other, kPlacements));
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
