#include "bindings/options.h"

#include <cmath>

#include "bindings/memory.h"
#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

const Key kParams("params"), kBetas("betas"), kCapturable("capturable");
const Key kStateDtype("state_dtype"), kMasterWeights("master_weights");
const Key kStochasticRounding("stochastic_rounding"), kErrorIfNonfinite("error_if_nonfinite");

bool is_iterable(const py::object& object) {
  return PyList_CheckExact(object.ptr()) || PyTuple_CheckExact(object.ptr()) ||
         py::hasattr(object, "__iter__");
}

bool is_text(py::handle value) {
  return PyUnicode_Check(value.ptr()) || PyBytes_Check(value.ptr());
}

}  // namespace

void GroupReader::fail(const std::string& what) const {
  throw py::value_error(what + " (param group " + std::to_string(index_) + ")");
}

void GroupReader::require(bool holds, const char* what,
                          std::initializer_list<double> values) const {
  for (double value : values) holds = holds && std::isfinite(value);
  if (holds || ranges_ == Ranges::kAny) return;
  std::string shown;
  for (double value : values)
    shown += (shown.empty() ? ": " : ", ") + std::string(py::str(py::float_(value)));
  fail(what + shown);
}

py::object GroupReader::find(const Key& key) const { return lookup(group_, key.object()); }

// Stands in for a number that stays on a GPU: within the range of every option.
constexpr double kUnknownNumber = 0.5;

bool GroupReader::find_on_gpu(py::handle value, const char* name, cuda::DeviceScalar& on_gpu) {
  TensorView view;
  try {
    if (!is_tensor(value.ptr()) || !read_tensor(value.ptr(), view, held_)) return false;
  } catch (const UnknownTensorType&) {
    return false;  // item() will know
  }
  if (!is_on_gpu(view)) return false;
  if (cuda::is_emulated() && !is_capturable()) return false;
  if (!view.is_supported || view.is_complex || item_size(view.dtype) < 4 ||
      count_elements(view) != 1)
    fail(std::string(name) + " is " + describe(value.ptr()) +
         ", but on a GPU it must be one float32 or float64 number");
  if (scalars_gpu_ >= 0 && scalars_gpu_ != view.device_id)
    fail(std::string(name) + " is on cuda:" + std::to_string(view.device_id) +
         ", other options of the group are on cuda:" + std::to_string(scalars_gpu_));
  held_.hold(py::reinterpret_borrow<py::object>(value));
  scalars_gpu_ = view.device_id;
  on_gpu = {view.data, view.dtype};
  return true;
}

double GroupReader::to_number(py::handle value, const char* name, cuda::DeviceScalar* on_gpu) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (PyLong_CheckExact(value.ptr())) {
    const double number = PyLong_AsDouble(value.ptr());
    if (number != -1 || !PyErr_Occurred()) return number;
    PyErr_Clear();
    fail(std::string(name) + " is too large");
  }
  if (leave_on_gpu_ && on_gpu && find_on_gpu(value, name, *on_gpu)) return kUnknownNumber;
  if (!is_text(value) && py::hasattr(value, "numel") && value.attr("numel")().cast<int64_t>() != 1)
    fail(std::string("Tensor ") + name + " must be 1-element");
  // item() and not float(): a tensor that requires grad would warn.
  const py::object item = py::hasattr(value, "item") ? py::object(value.attr("item")())
                                                     : py::reinterpret_borrow<py::object>(value);
  const double number = is_text(value) ? -1 : PyFloat_AsDouble(item.ptr());
  if (is_text(value) || PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be a number or a tensor of one element, got " +
                         std::string(py::repr(value)) + " (param group " + std::to_string(index_) +
                         ")");
  }
  return number;
}

double GroupReader::number(const Key& key, cuda::DeviceScalar* on_gpu) {
  const py::object value = find(key);
  if (!value) fail(std::string("the group has no '") + key.name() + "'");
  return to_number(value, key.name(), on_gpu);
}

bool GroupReader::has(const Key& key) const {
  const py::object value = find(key);
  return value && !value.is_none();
}

double GroupReader::number_or(const Key& key, double otherwise) {
  const py::object value = find(key);  // once: another thread may take it out
  return value && !value.is_none() ? to_number(value, key.name(), nullptr) : otherwise;
}

Master GroupReader::master_weights() const {
  const py::object value = find(kMasterWeights);
  if (!value || value.is_none()) return Master::kNone;
  if (PyUnicode_Check(value.ptr())) {
    if (PyUnicode_CompareWithASCIIString(value.ptr(), "float32") == 0) return Master::kFloat32;
    if (PyUnicode_CompareWithASCIIString(value.ptr(), "split") == 0) return Master::kSplit;
    if (PyUnicode_CompareWithASCIIString(value.ptr(), "split8") == 0) return Master::kSplit8;
  }
  fail("master_weights must be 'float32', 'split', 'split8' or None, got " +
       std::string(py::repr(value)));
}

py::object GroupReader::state_dtype() const {
  const py::object value = find(kStateDtype);
  if (!value || value.is_none()) return py::none();
  PyObject* const dtype = find_state_dtype(value.ptr());
  if (dtype == nullptr)
    fail("state_dtype must be " + allowed_state_dtypes() + ", got " + std::string(py::repr(value)));
  return py::reinterpret_borrow<py::object>(dtype);
}

bool GroupReader::wants_codes() const {
  const py::object value = find(kStateDtype);
  return value && is_q8(value.ptr());
}

void GroupReader::check_precision() const {
  state_dtype();  // what reads them raises
  master_weights();
}

bool GroupReader::errs_if_nonfinite() const { return flag(kErrorIfNonfinite); }

bool GroupReader::flag(const Key& key) const {
  const py::object value = find(key);
  if (!value) return false;
  // The truth of a text is not what it says.
  const int truth = is_text(value) ? -1 : PyObject_IsTrue(value.ptr());
  if (truth < 0) {
    const bool has_none = !PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_RuntimeError) ||
                          PyErr_ExceptionMatches(PyExc_ValueError) ||
                          PyErr_ExceptionMatches(PyExc_TypeError);
    if (!has_none) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(std::string(key.name()) + " must be True or False, got " +
                         std::string(py::repr(value)) + " (param group " + std::to_string(index_) +
                         ")");
  }
  return truth != 0;
}

StochasticRounding GroupReader::stochastic_rounding() const {
  if (!has(kStochasticRounding)) return StochasticRounding::kSecondMoments;
  return flag(kStochasticRounding) ? StochasticRounding::kAll : StochasticRounding::kNone;
}

py::object GroupReader::params() const {
  const py::object params = find(kParams);
  if (!params || is_tensor(params.ptr()) || !is_iterable(params))
    throw py::type_error("params of param group " + std::to_string(index_) +
                         " must be a list or another sequence of tensors");
  return as_tuple(params.ptr());
}

bool GroupReader::is_capturable() const { return flag(kCapturable); }

py::tuple GroupReader::find_pair(const Key& key) {
  const py::object pair = find(key);
  py::tuple values;
  if (pair && !PyUnicode_Check(pair.ptr()) && is_iterable(pair)) values = as_tuple(pair.ptr());
  if (values.size() != 2) fail(std::string(key.name()) + " must be a pair of numbers");
  return values;
}

std::pair<double, double> GroupReader::pair(const Key& key) {
  const py::tuple values = find_pair(key);
  const auto number = [&](size_t at) {
    const std::string name = std::string(key.name()) + "[" + std::to_string(at) + "]";
    return to_number(values[at], name.c_str(), nullptr);
  };
  const double first = number(0);
  return {first, number(1)};
}

void GroupReader::betas(cuda::HyperParamsRef& source) {
  const py::tuple values = find_pair(kBetas);
  source.values.beta1 = to_number(values[0], "betas[0]", &source.beta1);
  source.values.beta2 = to_number(values[1], "betas[1]", &source.beta2);
}

}  // namespace fusedopt
