#include "bindings/python.h"

#include <pybind11/gil_safe_call_once.h>

#include <string>

namespace py = pybind11;

namespace fusedopt {

py::object lookup(PyObject* dict, PyObject* key) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* value = nullptr;
  if (PyDict_GetItemRef(dict, key, &value) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
#else
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(value);
#endif
}

void refuse_unless_mapping(PyObject* object, const char* what) {
  if (!PyMapping_Check(object) || !py::hasattr(object, "keys"))
    throw py::type_error(std::string(what) + " must be a dict or another mapping, got " +
                         std::string(py::repr(py::type::of(object))));
}

py::object as_dict(PyObject* mapping, const char* what) {
  if (PyDict_CheckExact(mapping)) return py::reinterpret_borrow<py::object>(mapping);
  refuse_unless_mapping(mapping, what);
  py::dict copy;
  for (const py::handle key : py::handle(mapping).attr("keys")())
    copy[key] = py::handle(mapping)[key];
  return std::move(copy);
}

bool is_plain_dict(PyObject* mapping) {
  // A plain static would wait for another thread's import without giving up the GIL.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> default_dict;
  if (PyDict_CheckExact(mapping)) return true;
  default_dict.call_once_and_store_result(
      [] { return py::object(py::module_::import("collections").attr("defaultdict")); });
  return py::type::handle_of(mapping).is(default_dict.get_stored());
}

py::object find_in_mapping(PyObject* mapping, PyObject* key) {
  const int is_there = PySequence_Contains(mapping, key);
  if (is_there < 0) throw py::error_already_set();
  if (is_there == 0) return {};
  PyObject* const value = PyObject_GetItem(mapping, key);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object as_tuple(PyObject* sequence) {
  PyObject* const tuple = PySequence_Tuple(sequence);
  if (tuple == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(tuple);
}

void append(PyObject* list, PyObject* object) {
  if (PyList_Append(list, object) < 0) throw py::error_already_set();
}

}  // namespace fusedopt
