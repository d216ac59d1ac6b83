#include "bindings/optimizers.h"

#include <cmath>

namespace py = pybind11;

namespace fusedopt {
namespace {

const Key kLr("lr"), kWeightDecay("weight_decay"), kMaximize("maximize");
const Key kDifferentiable("differentiable");
const Key kMomentum("momentum"), kDampening("dampening"), kNesterov("nesterov");
const Key kBetas("betas"), kEps("eps"), kAmsgrad("amsgrad");
const Key kDecoupledWeightDecay("decoupled_weight_decay");

Hyper read_common(const GroupReader& group) {
  Hyper hyper;
  hyper.lr = group.number(kLr);
  hyper.weight_decay = group.number(kWeightDecay);
  hyper.maximize = group.flag(kMaximize);
  group.require(hyper.lr >= 0, "Invalid learning rate", hyper.lr);
  group.require(hyper.weight_decay >= 0, "Invalid weight_decay value", hyper.weight_decay);
  if (group.flag(kDifferentiable))
    group.fail("differentiable=True is not supported: the step is not recorded by autograd");
  return hyper;
}

Hyper read_sgd(const GroupReader& group) {
  Hyper hyper = read_common(group);
  hyper.momentum = group.number(kMomentum);
  hyper.dampening = group.number(kDampening);
  hyper.nesterov = group.flag(kNesterov);
  group.require(hyper.momentum >= 0, "Invalid momentum value", hyper.momentum);
  group.require(true, "Invalid dampening value", hyper.dampening);
  if (hyper.nesterov && (hyper.momentum == 0 || hyper.dampening != 0))
    group.fail("Nesterov momentum requires a momentum and zero dampening");
  return hyper;
}

Hyper read_adam(const GroupReader& group) {
  Hyper hyper = read_common(group);
  hyper.eps = group.number(kEps);
  group.betas(hyper.beta1, hyper.beta2);
  hyper.amsgrad = group.flag(kAmsgrad);
  hyper.decoupled_weight_decay = group.flag(kDecoupledWeightDecay);
  group.require(hyper.eps >= 0, "Invalid epsilon value", hyper.eps);
  group.require(hyper.beta1 >= 0 && hyper.beta1 < 1, "Invalid beta parameter at index 0",
                hyper.beta1);
  group.require(hyper.beta2 >= 0 && hyper.beta2 < 1, "Invalid beta parameter at index 1",
                hyper.beta2);
  return hyper;
}

const OptimizerRow kOptimizers[] = {
    {"SGD",
     RuleId::kSgd,
     {Key("momentum_buffer"), Key(""), Key("")},
     false,
     read_sgd,
     [](const Hyper& hyper) { return hyper.momentum == 0 ? 0 : 1; },
     sgd_variant,
     [](const Hyper& hyper, double, bool is_first, double grad_scale) {
       Scalars scalars;
       scalars.sgd = sgd_scalars(hyper, is_first, grad_scale);
       return scalars;
     }},
    {"Adam",
     RuleId::kAdam,
     {Key("exp_avg"), Key("exp_avg_sq"), Key("max_exp_avg_sq")},
     true,
     read_adam,
     [](const Hyper& hyper) { return hyper.amsgrad ? 3 : 2; },
     adam_variant,
     [](const Hyper& hyper, double step, bool, double grad_scale) {
       Scalars scalars;
       scalars.adam = adam_scalars(hyper, step, grad_scale);
       return scalars;
     }},
};

}  // namespace

void GroupReader::fail(const std::string& what) const {
  throw py::value_error(what + " (param group " + std::to_string(index_) + ")");
}

void GroupReader::require(bool holds, const char* what, double value) const {
  if (!holds || !std::isfinite(value))
    fail(std::string(what) + ": " + std::string(py::str(py::float_(value))));
}

py::handle GroupReader::find(const Key& key) const {
  return PyDict_GetItemWithError(group_, key.object());
}

double GroupReader::to_number(py::handle value, const char* name) const {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (PyLong_CheckExact(value.ptr())) {
    const double number = PyLong_AsDouble(value.ptr());
    if (number != -1 || !PyErr_Occurred()) return number;
    PyErr_Clear();
    fail(std::string(name) + " is too large");
  }
  const bool is_text = PyUnicode_Check(value.ptr()) || PyBytes_Check(value.ptr());
  if (!is_text && py::hasattr(value, "numel") && value.attr("numel")().cast<int64_t>() != 1)
    fail(std::string("Tensor ") + name + " must be 1-element");
  // item() and not float(): a tensor that requires grad would warn.
  const py::object item = py::hasattr(value, "item") ? py::object(value.attr("item")())
                                                     : py::reinterpret_borrow<py::object>(value);
  const double number = is_text ? -1 : PyFloat_AsDouble(item.ptr());
  if (is_text || PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be a number or a tensor of one element, got " +
                         std::string(py::repr(value)) + " (param group " + std::to_string(index_) +
                         ")");
  }
  return number;
}

double GroupReader::number(const Key& key) const {
  const py::handle value = find(key);
  if (!value) fail(std::string("the group has no '") + key.name() + "'");
  return to_number(value, key.name());
}

bool GroupReader::flag(const Key& key) const {
  const py::handle value = find(key);
  if (!value) return false;
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

void GroupReader::betas(double& beta1, double& beta2) const {
  const py::handle pair = find(kBetas);
  if (!pair || !PySequence_Check(pair.ptr()) || py::len(pair) != 2)
    fail("betas must be a pair of numbers");
  if (PyTuple_CheckExact(pair.ptr())) {
    beta1 = to_number(PyTuple_GET_ITEM(pair.ptr(), 0), "betas[0]");
    beta2 = to_number(PyTuple_GET_ITEM(pair.ptr(), 1), "betas[1]");
    return;
  }
  const py::sequence values = py::reinterpret_borrow<py::sequence>(pair);
  beta1 = to_number(values[0], "betas[0]");
  beta2 = to_number(values[1], "betas[1]");
}

const OptimizerRow& find_optimizer(const std::string& name) {
  for (const OptimizerRow& row : kOptimizers)
    if (row.name == name) return row;
  throw py::value_error("unknown optimizer '" + name + "'");
}

}  // namespace fusedopt
