// CPython's containers as a step reads them. Other threads may change them meanwhile (a step gives
// up the GIL, and free-threaded builds of Python have none), so whatever is read is held.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace fusedopt {

// References that a step keeps until it ends: to all that it reads and writes.
class References {
 public:
  References() = default;
  References(References&&) = default;
  References& operator=(References&&) = default;

  PyObject* hold(pybind11::object object) {
    objects_.push_back(std::move(object));
    return objects_.back().ptr();
  }
  void hold_all(References&& others) {
    for (pybind11::object& object : others.objects_) hold(std::move(object));
    others.objects_.clear();
  }
  PyObject* hold(PyObject* borrowed) {
    return hold(pybind11::reinterpret_borrow<pybind11::object>(borrowed));
  }
  // Empties this; the references live on in what is returned, whose end may run code of the
  // user's: whatever a weak reference or a destructor calls.
  References take() { return std::exchange(*this, References()); }
  auto begin() const { return objects_.begin(); }
  auto end() const { return objects_.end(); }
  size_t size() const { return objects_.size(); }
  void reserve(size_t count) { objects_.reserve(count); }

 private:
  std::vector<pybind11::object> objects_;
};

// The value of that key in a dict, or a null object. Raises what hashing or comparing raises.
pybind11::object lookup(PyObject* dict, PyObject* key);

// Calls `visit` with keys and values of a dict, borrowed, from that position on, until it returns
// false or the end is reached. `visit` may neither throw nor run code of Python's.
template <class Visit>
void visit_entries(PyObject* dict, Py_ssize_t& position, const Visit& visit) {
  PyObject *key = nullptr, *value = nullptr;
#if defined(Py_GIL_DISABLED)
  Py_BEGIN_CRITICAL_SECTION(dict);  // opens a scope
#endif
  while (PyDict_Next(dict, &position, &key, &value))
    if (!visit(key, value)) break;
#if defined(Py_GIL_DISABLED)
  Py_END_CRITICAL_SECTION();
#endif
}

// Raises TypeError, beginning with `what`, for what is no mapping.
void refuse_unless_mapping(PyObject* object, const char* what);

// A dict with a mapping's entries as its [] gives them: itself if it is a dict of Python's own,
// else a copy. Raises TypeError, beginning with `what`, for what is no mapping.
pybind11::object as_dict(PyObject* mapping, const char* what);

// Whether a mapping's [] does nothing but look up what PyDict_Next() finds: a dict or defaultdict.
bool is_plain_dict(PyObject* mapping);

// The value of that key in any mapping, or a null object if it has none.
pybind11::object find_in_mapping(PyObject* mapping, PyObject* key);

// What a sequence (or another iterable) holds, in a tuple, which nobody changes.
pybind11::object as_tuple(PyObject* sequence);

void append(PyObject* list, PyObject* object);

}  // namespace fusedopt
