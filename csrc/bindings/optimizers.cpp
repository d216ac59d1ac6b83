#include "bindings/optimizers.h"

#include <algorithm>
#include <cmath>

#include "bindings/memory.h"
#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

const Key kParams("params"), kLr("lr"), kWeightDecay("weight_decay"), kMaximize("maximize");
const Key kDifferentiable("differentiable");
const Key kMomentum("momentum"), kDampening("dampening"), kNesterov("nesterov");
const Key kBetas("betas"), kEps("eps"), kAmsgrad("amsgrad"), kCapturable("capturable");
const Key kDecoupledWeightDecay("decoupled_weight_decay");
const Key kLrIndependent("lr_independent_weight_decay");
const Key kStateDtype("state_dtype"), kMasterWeights("master_weights");
const Key kStochasticRounding("stochastic_rounding"), kRoundingSeed("rounding_seed");
const Key kMaxGradNorm("max_grad_norm"), kErrorIfNonfinite("error_if_nonfinite");
const Key kEmaDecay("ema_decay"), kEmaBiasCorrection("ema_bias_correction");

// What a group adds to torch's options: all that is off has no effect.
void read_additions(GroupReader& group, HyperParams& hyper) {
  hyper.max_grad_norm = group.number_or(kMaxGradNorm, 0);
  if (!(hyper.max_grad_norm > 0) && group.has(kMaxGradNorm))
    group.fail("max_grad_norm must be above 0, or None: " + std::to_string(hyper.max_grad_norm));
  hyper.ema_decay = group.number_or(kEmaDecay, -1);
  if (group.has(kEmaDecay)) {
    // A schedule may end at 1, where the average rests, and miss either end by rounding.
    constexpr double kRounding = 1e-6;
    const char* const what = "ema_decay must be in [0, 1), or None";
    group.require_at_first(hyper.ema_decay >= 0 && hyper.ema_decay < 1, what, hyper.ema_decay);
    group.require(hyper.ema_decay >= -kRounding && hyper.ema_decay <= 1 + kRounding, what,
                  hyper.ema_decay);
    hyper.ema_decay = std::clamp(hyper.ema_decay, 0.0, 1.0);
  }
  hyper.ema_bias_correction = group.flag(kEmaBiasCorrection);
  hyper.stochastic_rounding = group.stochastic_rounding();
  const double seed = group.number_or(kRoundingSeed, 0);
  group.require(seed >= 0 && seed <= UINT32_MAX && seed == std::floor(seed),
                "rounding_seed must be a whole number from 0 to 2**32 - 1", seed);
  hyper.rounding_seed = static_cast<uint32_t>(seed);
  group.check_state_dtype();
  group.master_weights();  // checks it
}

void read_common(GroupReader& group, cuda::HyperParamsRef& source) {
  HyperParams& hyper = source.values;
  hyper.lr = group.number(kLr, source.lr);
  hyper.weight_decay = group.number(kWeightDecay, source.weight_decay);
  hyper.maximize = group.flag(kMaximize);
  hyper.decoupled_weight_decay = group.flag(kDecoupledWeightDecay);
  hyper.lr_independent_weight_decay = group.flag(kLrIndependent);
  if (hyper.lr_independent_weight_decay && !hyper.decoupled_weight_decay)
    group.fail("lr_independent_weight_decay needs decoupled_weight_decay");
  read_additions(group, hyper);
  group.require_at_first(hyper.lr >= 0, "Invalid learning rate", hyper.lr);
  group.require_at_first(hyper.weight_decay >= 0, "Invalid weight_decay value", hyper.weight_decay);
  if (group.flag(kDifferentiable))
    group.fail("differentiable=True is not supported: the step is not recorded by autograd");
}

cuda::HyperParamsRef read_sgd(GroupReader& group) {
  cuda::HyperParamsRef source = {};
  read_common(group, source);
  HyperParams& hyper = source.values;
  hyper.momentum = group.number(kMomentum, source.momentum);
  hyper.dampening = group.number(kDampening, source.dampening);
  hyper.nesterov = group.flag(kNesterov);
  group.require_at_first(hyper.momentum >= 0, "Invalid momentum value", hyper.momentum);
  group.require(true, "Invalid dampening value", hyper.dampening);
  if (group.is_strict() && hyper.nesterov && (hyper.momentum <= 0 || hyper.dampening != 0))
    group.fail("Nesterov momentum requires a momentum and zero dampening");
  return source;
}

cuda::HyperParamsRef read_adam(GroupReader& group) {
  cuda::HyperParamsRef source = {};
  read_common(group, source);
  HyperParams& hyper = source.values;
  hyper.eps = group.number(kEps, source.eps);
  group.betas(source);
  hyper.amsgrad = group.flag(kAmsgrad);
  group.require_at_first(hyper.eps >= 0, "Invalid epsilon value", hyper.eps);
  const auto check_beta = [&](double beta, bool is_sensible, const char* what) {
    group.require_at_first(beta >= 0 && beta < 1, what, beta);
    group.require(is_sensible, what, beta);
  };
  // Without these, 1 - beta^t is 0 where torch divides by it, or beta^t grows without bound.
  check_beta(hyper.beta1, std::abs(hyper.beta1) < 1, "Invalid beta parameter at index 0");
  check_beta(hyper.beta2, std::abs(hyper.beta2) <= 1, "Invalid beta parameter at index 1");
  return source;
}

const OptimizerRow kOptimizers[] = {
    {"SGD", kIdOf<Sgd>, {Key("momentum_buffer")}, 0, 0, false, read_sgd},
    {"Adam",
     kIdOf<Adam>,
     {Key("exp_avg"), Key("exp_avg_sq"), Key("max_exp_avg_sq")},
     1u << Adam::kExpAvg | 1u << Adam::kExpAvgSq,
     1u << Adam::kExpAvg,
     true,
     read_adam},
};

}  // namespace

void GroupReader::fail(const std::string& what) const {
  throw py::value_error(what + " (param group " + std::to_string(index_) + ")");
}

void GroupReader::require(bool holds, const char* what, double value) const {
  if (!holds || !std::isfinite(value))
    fail(std::string(what) + ": " + std::string(py::str(py::float_(value))));
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

double GroupReader::number(const Key& key, cuda::DeviceScalar& on_gpu) {
  const py::object value = find(key);
  if (!value) fail(std::string("the group has no '") + key.name() + "'");
  return to_number(value, key.name(), &on_gpu);
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
  }
  fail("master_weights must be 'float32', 'split' or None, got " + std::string(py::repr(value)));
}

void GroupReader::check_state_dtype() const {
  const py::object value = find(kStateDtype);
  if (value && !value.is_none() && !is_state_dtype(value.ptr()))
    fail("state_dtype must be torch.float32, torch.bfloat16 or None, got " +
         std::string(py::repr(value)));
}

bool GroupReader::errs_if_nonfinite() const { return flag(kErrorIfNonfinite); }

bool GroupReader::flag(const Key& key) const {
  const py::object value = find(key);
  if (!value) return false;
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

StochasticRounding GroupReader::stochastic_rounding() const {
  if (!has(kStochasticRounding)) return StochasticRounding::kSecondMoments;
  return flag(kStochasticRounding) ? StochasticRounding::kAll : StochasticRounding::kNone;
}

py::object GroupReader::params() const {
  const py::object params = find(kParams);
  if (!params || is_tensor(params.ptr()) || !PyObject_HasAttrString(params.ptr(), "__iter__"))
    throw py::type_error("params of param group " + std::to_string(index_) +
                         " must be a list or another sequence of tensors");
  return as_tuple(params.ptr());
}

bool GroupReader::is_capturable() const { return flag(kCapturable); }

void GroupReader::betas(cuda::HyperParamsRef& source) {
  const py::object pair = find(kBetas);
  py::tuple values;
  if (pair && !PyUnicode_Check(pair.ptr()) && py::hasattr(pair, "__iter__"))
    values = as_tuple(pair.ptr());
  if (values.size() != 2) fail("betas must be a pair of numbers");
  source.values.beta1 = to_number(values[0], "betas[0]", &source.beta1);
  source.values.beta2 = to_number(values[1], "betas[1]", &source.beta2);
}

States states_in_use(const OptimizerRow& row, const HyperParams& hyper) {
  States in_use = 0;
  with_rule(row.rule, [&](auto rule) {
    const auto variant = rule.variant(hyper);
    for (int s = 0; s < rule.kNumStates; ++s)
      if (variant.uses(s)) in_use |= 1u << s;
  });
  return in_use;
}

void refuse_partial(const OptimizerRow& row, States in_use, PyObject* state, const ParamId& id,
                    bool is_checkpoint) {
  const auto has = [&](const Key& key) {
    const py::object value = lookup(state, key.object());
    return value && !value.is_none();
  };
  const Key* missing = nullptr;
  bool may_be_missing = true;
  const auto miss = [&](const Key& key, bool is_omissible) {
    if (missing == nullptr) missing = &key;
    may_be_missing = may_be_missing && is_omissible;
  };
  for (size_t s = 0; s < row.state_names.size(); ++s)
    if (((row.required & in_use) >> s & 1) != 0 && !has(row.state_names[s]))
      miss(row.state_names[s], !is_checkpoint && (row.omissible >> s & 1) != 0);
  if (!has(kStep) && (row.always_counts || has(kEmaParam)))
    miss(kStep, false);  // an average without its count would start anew
  if (may_be_missing) return;
  References keys;
  Py_ssize_t at = 0;
  visit_entries(state, at, [&](PyObject* key, PyObject* value) {
    if (value != Py_None) keys.hold(key);
    return true;
  });
  std::string others;
  for (const py::object& key : keys) {
    const bool is_master =
        key.equal(py::str(kMasterParam.name())) || key.equal(py::str(kParamRemainder.name()));
    if (!is_master) others += (others.empty() ? "" : ", ") + std::string(py::repr(key));
  }
  if (others.empty()) return;  // a parameter that has not been stepped
  throw py::value_error("the state of " + id.text() + " has no '" + missing->name() +
                        "', but has " + others +
                        ": it is another optimizer's, or incomplete; load all of it, or delete the "
                        "parameter's state for a fresh start");
}

bool counts_steps(const OptimizerRow& row, const HyperParams& hyper) {
  return row.always_counts || hyper.has_ema() ||
         hyper.stochastic_rounding == StochasticRounding::kAll;
}

const OptimizerRow& find_optimizer(const std::string& name) {
  for (const OptimizerRow& row : kOptimizers)
    if (row.name == name) return row;
  throw py::value_error("unknown optimizer '" + name + "'");
}

}  // namespace fusedopt
