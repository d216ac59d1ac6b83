#include "bindings/optimizers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <tuple>
#include <utility>

#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

const Key kLr("lr"), kWeightDecay("weight_decay"), kMaximize("maximize");
const Key kMomentum("momentum"), kDampening("dampening"), kNesterov("nesterov");
const Key kEps("eps"), kAmsgrad("amsgrad"), kDifferentiable("differentiable");
const Key kRho("rho"), kAlpha("alpha"), kCentered("centered"), kMomentumDecay("momentum_decay");
const Key kLrDecay("lr_decay"), kInitialAccumulatorValue("initial_accumulator_value");
const Key kLambd("lambd"), kT0("t0"), kEtas("etas"), kStepSizes("step_sizes");
const Key kDecoupledWeightDecay("decoupled_weight_decay");
const Key kLrIndependent("lr_independent_weight_decay");
const Key kCautiousUpdate("cautious_update"), kCautiousWeightDecay("cautious_weight_decay");
const Key kRoundingSeed("rounding_seed"), kMaxGradNorm("max_grad_norm");
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
  group.state_dtype();  // checks it
  group.master_weights();
}

void read_common(GroupReader& group, cuda::HyperParamsRef& source) {
  HyperParams& hyper = source.values;
  hyper.lr = group.number(kLr, source.lr);
  hyper.maximize = group.flag(kMaximize);
  hyper.decoupled_weight_decay = group.flag(kDecoupledWeightDecay);
  hyper.lr_independent_weight_decay = group.flag(kLrIndependent);
  if (hyper.lr_independent_weight_decay && !hyper.decoupled_weight_decay)
    group.fail("lr_independent_weight_decay needs decoupled_weight_decay");
  hyper.cautious_update = group.flag(kCautiousUpdate);
  hyper.cautious_weight_decay = group.flag(kCautiousWeightDecay);
  if (hyper.cautious_weight_decay && !hyper.decoupled_weight_decay)
    group.fail("cautious_weight_decay needs decoupled_weight_decay");
  read_additions(group, hyper);
  group.require_at_first(hyper.lr >= 0, "Invalid learning rate", hyper.lr);
  if (group.flag(kDifferentiable))
    group.fail("differentiable=True is not supported: the step is not recorded by autograd");
}

void read_weight_decay(GroupReader& group, cuda::HyperParamsRef& source) {
  double& decay = source.values.weight_decay;
  decay = group.number(kWeightDecay, source.weight_decay);
  group.require_at_first(decay >= 0, "Invalid weight_decay value", decay);
}

void read_sgd(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  HyperParams& hyper = source.values;
  hyper.momentum = group.number(kMomentum, source.momentum);
  hyper.dampening = group.number(kDampening, source.dampening);
  hyper.nesterov = group.flag(kNesterov);
  group.require_at_first(hyper.momentum >= 0, "Invalid momentum value", hyper.momentum);
  group.require(true, "Invalid dampening value", hyper.dampening);
  if (group.is_strict() && hyper.nesterov && (hyper.momentum <= 0 || hyper.dampening != 0))
    group.fail("Nesterov momentum requires a momentum and zero dampening");
}

void read_eps(GroupReader& group, cuda::HyperParamsRef& source) {
  source.values.eps = group.number(kEps, source.eps);
  group.require_at_first(source.values.eps >= 0, "Invalid epsilon value", source.values.eps);
}

// `most` is the largest beta2 that a step can compute with.
void read_betas(GroupReader& group, cuda::HyperParamsRef& source, double most = 1) {
  group.betas(source);
  const HyperParams& hyper = source.values;
  const auto check_beta = [&](double beta, bool is_sensible, const char* what) {
    group.require_at_first(beta >= 0 && beta < 1, what, beta);
    group.require(is_sensible, what, beta);
  };
  // Without these, 1 - beta^t is 0 where torch divides by it, or beta^t grows without bound.
  check_beta(hyper.beta1, std::abs(hyper.beta1) < 1, "Invalid beta parameter at index 0");
  check_beta(hyper.beta2, std::abs(hyper.beta2) <= most, "Invalid beta parameter at index 1");
}

void read_adam(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  read_eps(group, source);
  read_betas(group, source);
  source.values.amsgrad = group.flag(kAmsgrad);
}

// A number in [0, 1] that is not on a GPU.
double read_rate(GroupReader& group, const Key& key, const char* what) {
  const double rate = group.number(key);
  group.require_at_first(rate >= 0, what, rate);
  group.require(std::abs(rate) <= 1, what, rate);
  return rate;
}

void read_adadelta(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  read_eps(group, source);
  source.values.rho = read_rate(group, kRho, "Invalid rho value");
}

void read_adagrad(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  read_eps(group, source);
  HyperParams& hyper = source.values;
  hyper.lr_decay = group.number(kLrDecay);
  group.require_at_first(hyper.lr_decay >= 0, "Invalid lr_decay value", hyper.lr_decay);
  const double initial = group.number_or(kInitialAccumulatorValue, 0);
  group.require(initial >= 0, "Invalid initial_accumulator_value value", initial);
}

void read_adamax(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  read_eps(group, source);
  read_betas(group, source);
}

void read_asgd(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  HyperParams& hyper = source.values;
  hyper.lambd = group.number(kLambd);
  hyper.alpha = group.number(kAlpha);
  hyper.t0 = group.number(kT0);
  group.require(true, "Invalid lambd value", hyper.lambd);
  group.require(true, "Invalid alpha value", hyper.alpha);
  group.require(true, "Invalid t0 value", hyper.t0);
}

void read_lion(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  read_betas(group, source);
}

void read_nadam(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  read_eps(group, source);
  read_betas(group, source);
  double& decay = source.values.momentum_decay;
  decay = group.number(kMomentumDecay);
  group.require(decay >= 0, "Invalid momentum_decay value", decay);
}

void read_radam(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  constexpr double kBelowOne = 1 - 1e-12;
  read_eps(group, source);
  read_betas(group, source, kBelowOne);
}

void read_rmsprop(GroupReader& group, cuda::HyperParamsRef& source) {
  read_weight_decay(group, source);
  read_eps(group, source);
  HyperParams& hyper = source.values;
  hyper.alpha = read_rate(group, kAlpha, "Invalid alpha value");
  hyper.momentum = group.number(kMomentum, source.momentum);
  hyper.centered = group.flag(kCentered);
  group.require_at_first(hyper.momentum >= 0, "Invalid momentum value", hyper.momentum);
}

void read_rprop(GroupReader& group, cuda::HyperParamsRef& source) {
  HyperParams& hyper = source.values;
  std::tie(hyper.eta_minus, hyper.eta_plus) = group.pair(kEtas);
  std::tie(hyper.smallest_step, hyper.largest_step) = group.pair(kStepSizes);
  group.require(hyper.eta_minus > 0 && hyper.eta_minus < 1 && hyper.eta_plus > 1,
                "Invalid eta values", {hyper.eta_minus, hyper.eta_plus});
  group.require(hyper.smallest_step >= 0 && hyper.largest_step >= hyper.smallest_step,
                "Invalid step sizes", {hyper.smallest_step, hyper.largest_step});
}

void read_sparse_adam(GroupReader& group, cuda::HyperParamsRef& source) {
  read_eps(group, source);
  group.require_at_first(source.values.lr > 0, "Invalid learning rate", source.values.lr);
  group.require_at_first(source.values.eps > 0, "Invalid epsilon value", source.values.eps);
  read_betas(group, source);
  if (source.values.has_ema())
    group.fail("ema_decay is not for SparseAdam: rows that are left alone would not be averaged");
}

template <class Rule>
RuleChoice choice_of() {
  return {kIdOf<Rule>, kMemberOf<Rule>};
}

// The rule of a group with these options.
RuleChoice rule_for(const OptimizerRow& row, const HyperParams& hyper) {
  const bool is_cautious = hyper.cautious_update || hyper.cautious_weight_decay;
  return is_cautious ? row.cautious_rule.value() : row.rule;
}

Key kept_key(const std::string& name) {
  static auto* const kept = new std::deque<std::string>();  // for as long as the keys
  return Key(kept->emplace_back(name).c_str());
}

// A row with what follows from its rule.
template <class Rule>
OptimizerRow row_of(OptimizerRow row) {
  row.rule = choice_of<Rule>();
  for (int s = 0; s < Rule::kNumStates; ++s)
    if (Rule::is_second_moment(s)) row.second_moments |= 1u << s;
  for (int s = 0; s < static_cast<int>(row.state_names.size()); ++s) {
    if (Rule::kind_of(s) == StateKind::kSigned) row.signed_codes |= 1u << s;
    if (Rule::kind_of(s) == StateKind::kPositive) row.positive_codes |= 1u << s;
    const std::string name = row.state_names[static_cast<size_t>(s)].name();
    row.code_names.push_back(kept_key(name + kCodesSuffix));
    row.scale_names.push_back(kept_key(name + kScalesSuffix));
  }
  return row;
}

// An option's number is what a state begins with.
OptimizerRow starting(OptimizerRow row, const Key& option, int state) {
  row.start_option = option;
  row.started_state = state;
  return row;
}

// torch's state has these as well.
OptimizerRow deriving(OptimizerRow row, std::vector<Key> names) {
  row.derived = std::move(names);
  return row;
}

// Groups may have a caution. Their rule may be another, with the same states.
template <class Rule>
OptimizerRow with_caution(OptimizerRow row) {
  row.cautious_rule = choice_of<Rule>();
  return row;
}

OptimizerRow stepping_rows(OptimizerRow row) {
  row.by_rows = true;
  return row;
}

// A set of a rule's states.
template <class... State>
constexpr States only(State... states) {
  return ((1u << states) | ...);
}

// In the place of a number that is no state's.
const Key kNoState("");

// Name, names of states, those without which a state is incomplete, those of them that are left out
// where they are not in use, whether steps are counted, how options are read.
const OptimizerRow kOptimizers[] = {
    with_caution<CautiousSgd>(
        row_of<Sgd>({"SGD", {Key("momentum_buffer")}, 0, 0, false, read_sgd})),
    with_caution<CautiousAdam>(
        row_of<Adam>({"Adam",
                      {Key("exp_avg"), Key("exp_avg_sq"), Key("max_exp_avg_sq")},
                      only(Adam::kExpAvg, Adam::kExpAvgSq),
                      only(Adam::kExpAvg),
                      true,
                      read_adam})),
    row_of<Adadelta>({"Adadelta",
                      {Key("acc_delta"), Key("square_avg")},
                      only(Adadelta::kAccDelta, Adadelta::kSquareAvg),
                      0,
                      true,
                      read_adadelta}),
    starting(row_of<Adagrad>(
                 {"Adagrad", {kNoState, Key("sum")}, only(Adagrad::kSum), 0, true, read_adagrad}),
             kInitialAccumulatorValue, Adagrad::kSum),
    row_of<Adamax>({"Adamax",
                    {Key("exp_avg"), Key("exp_inf")},
                    only(Adamax::kExpAvg, Adamax::kExpInf),
                    0,
                    true,
                    read_adamax}),
    deriving(row_of<Asgd>({"ASGD", {Key("ax")}, only(Asgd::kAx), 0, true, read_asgd}),
             {Key("eta"), Key("mu")}),
    with_caution<Lion>(
        row_of<Lion>({"Lion", {Key("exp_avg")}, only(Lion::kExpAvg), 0, false, read_lion})),
    with_caution<Nadam>(deriving(row_of<Nadam>({"NAdam",
                                                {Key("exp_avg"), Key("exp_avg_sq")},
                                                only(Nadam::kExpAvg, Nadam::kExpAvgSq),
                                                0,
                                                true,
                                                read_nadam}),
                                 {Key("mu_product")})),
    with_caution<Radam>(row_of<Radam>({"RAdam",
                                       {Key("exp_avg"), Key("exp_avg_sq")},
                                       only(Radam::kExpAvg, Radam::kExpAvgSq),
                                       0,
                                       true,
                                       read_radam})),
    row_of<Rmsprop>({"RMSprop",
                     {Key("momentum_buffer"), Key("square_avg"), Key("grad_avg")},
                     only(Rmsprop::kSquareAvg),
                     0,
                     true,
                     read_rmsprop}),
    starting(row_of<Rprop>({"Rprop",
                            {Key("prev"), Key("step_size")},
                            only(Rprop::kPrev, Rprop::kStepSize),
                            0,
                            true,
                            read_rprop}),
             kLr, Rprop::kStepSize),
    stepping_rows(row_of<SparseAdam>({"SparseAdam",
                                      {Key("exp_avg"), Key("exp_avg_sq")},
                                      only(SparseAdam::kExpAvg, SparseAdam::kExpAvgSq),
                                      0,
                                      true,
                                      read_sparse_adam})),
};

// Calls visit(name) for all that a state with these options has no use for.
template <class Visit>
void visit_unused(const OptimizerRow& row, const GroupOptions& options, Master master,
                  const Visit& visit) {
  for (size_t s = 0; s < row.state_names.size(); ++s)
    if ((row.omissible & ~options.states) >> s & 1)
      for (const std::vector<Key>* names : {&row.state_names, &row.code_names, &row.scale_names})
        visit((*names)[s]);
  for (const Key& name : row.derived) visit(name);
  if (master != Master::kFloat32) visit(kMasterParam);
  if (master != Master::kSplit) visit(kParamRemainder);
  if (master != Master::kSplit8) visit(kParamRemainder8);
  if (!options.source.values.has_ema()) visit(kEmaParam);
  if (!options.counts_steps) visit(kStep);
}

}  // namespace

// What 8 bits are too few for.
void refuse_codes(const OptimizerRow& row, const HyperParams& hyper, const GroupReader& reader) {
  if ((row.signed_codes | row.positive_codes) == 0)
    reader.fail(std::string("state_dtype='q8' is not for ") + row.name +
                ", whose state needs more than 8 bits");
  if (hyper.centered)
    reader.fail(
        "state_dtype='q8' is not for centered=True: the difference of two averages needs "
        "more than 8 bits");
}

cuda::HyperParamsRef read_hyper(const OptimizerRow& row, GroupReader& reader) {
  cuda::HyperParamsRef source = {};
  read_common(reader, source);
  row.read(reader, source);
  for (const Key* key : {&kCautiousUpdate, &kCautiousWeightDecay})
    if (reader.flag(*key) && !row.cautious_rule)
      reader.fail(std::string(key->name()) + " is not for " + row.name);
  if (reader.wants_codes()) refuse_codes(row, source.values, reader);
  source.values.member = rule_for(row, source.values).member;
  return source;
}

GroupOptions read_options(const OptimizerRow& row, GroupReader& reader) {
  GroupOptions options = {};
  options.source = read_hyper(row, reader);
  options.scalars_gpu = reader.scalars_gpu();
  options.capturable = reader.is_capturable();
  options.errs_if_nonfinite = reader.errs_if_nonfinite();
  options.master_weights = reader.master_weights();
  const HyperParams& hyper = options.source.values;
  options.rule = rule_for(row, hyper).id;
  with_rule(options.rule, [&](auto rule) {
    const auto variant = rule.variant(hyper);
    options.variant = static_cast<uint8_t>(variant.number());
    for (int s = 0; s < static_cast<int>(row.state_names.size()); ++s) {
      if (!variant.uses(s)) continue;
      options.states |= 1u << s;
      options.names[kFirstState + s] = &row.state_names[static_cast<size_t>(s)];
    }
  });
  if (options.master_weights == Master::kFloat32) options.names[kMaster] = &kMasterParam;
  if (options.master_weights == Master::kSplit) options.names[kMaster] = &kParamRemainder;
  if (options.master_weights == Master::kSplit8) options.names[kMaster] = &kParamRemainder8;
  if (hyper.has_ema()) options.names[kEma] = &kEmaParam;
  options.counts_steps =
      row.always_counts || hyper.has_ema() ||
      hyper.stochastic_rounding == StochasticRounding::kAll ||
      (reader.wants_codes() && hyper.stochastic_rounding != StochasticRounding::kNone) ||
      rounds_remainder(options.master_weights, hyper.stochastic_rounding);
  options.has_state =
      options.counts_steps || std::any_of(std::begin(options.names), std::end(options.names),
                                          [](const Key* name) { return name != nullptr; });
  return options;
}

std::optional<Master> master_for(Master wanted, DType param, bool is_complex) {
  if (wanted == Master::kNone) return wanted;
  if (wanted == Master::kFloat32 && item_size(param) > 2) return Master::kNone;
  if (is_complex || (is_split(wanted) && param != DType::kBFloat16)) return std::nullopt;
  return wanted;
}

std::string master_is_for(Master kind) {
  return kind == Master::kSplit    ? "master_weights='split' is for torch.bfloat16"
         : kind == Master::kSplit8 ? "master_weights='split8' is for torch.bfloat16"
                                   : "master_weights='float32' is for real numbers";
}

StateSpec state_spec(const OptimizerRow& row, GroupReader& reader, const py::object& dtype,
                     bool is_strict) {
  const GroupOptions options = read_options(row, reader);
  const TorchDType param = read_torch_dtype(dtype);
  std::optional<Master> master = master_for(options.master_weights, param.dtype, param.is_complex);
  if (!master && !is_strict) master = Master::kNone;
  if (!master)
    throw py::value_error(master_is_for(options.master_weights) + ", not for " +
                          std::string(py::str(dtype)));
  if (is_strict && reader.wants_codes() && (param.is_complex || item_size(param.dtype) > 4))
    throw py::value_error("state_dtype='q8' is for float32, bfloat16 and float16, not for " +
                          std::string(py::str(dtype)));
  const auto torch = py::module_::import("torch");
  // Weights and averages of 16-bit params are wider than these.
  const bool is_narrow = !param.is_complex && item_size(param.dtype) == 2;
  const py::object wide = is_narrow ? torch.attr("float32") : dtype;
  StateSpec spec;
  spec.state_dtype = reader.state_dtype();
  const py::object state_dtype = spec.state_dtype.is_none() ? dtype : spec.state_dtype;
  spec.counts_steps = options.counts_steps;
  spec.weight_dtype = wide;
  spec.wants_codes = reader.wants_codes();
  for (size_t s = 0; s < row.state_names.size(); ++s)
    if (((row.signed_codes | row.positive_codes) >> s & 1) != 0)
      spec.codes[row.state_names[s].str()] = py::make_tuple(
          row.code_names[s].str(), torch.attr((row.signed_codes >> s & 1) != 0 ? "int8" : "uint8"),
          row.scale_names[s].str());
  const auto add = [](py::list& list, const Key& name, const char* kind, const py::object& dtype) {
    list.append(py::make_tuple(name.str(), kind, dtype));
  };
  for (size_t s = 0; s < row.state_names.size(); ++s) {
    if ((options.states >> s & 1) != 0)
      add(spec.entries, row.state_names[s], "state", state_dtype);
    else if ((row.omissible >> s & 1) != 0)
      add(spec.left_out, row.state_names[s], "state", state_dtype);
  }
  if (row.start_option)
    spec.starts[row.state_names[static_cast<size_t>(row.started_state)].str()] =
        reader.number_or(*row.start_option, 0);
  if (*master == Master::kFloat32) add(spec.entries, kMasterParam, "master", wide);
  if (*master == Master::kSplit)
    add(spec.entries, kParamRemainder, "remainder", torch.attr("int16"));
  if (*master == Master::kSplit8)
    add(spec.entries, kParamRemainder8, "remainder8", torch.attr("int8"));
  if (options.source.values.has_ema()) add(spec.entries, kEmaParam, "average", wide);
  visit_unused(row, options, *master, [&](const Key& name) { spec.unused.append(name.str()); });
  return spec;
}

py::dict names_of_weights() {
  py::dict names;
  names["master"] = kMasterParam.name();
  names["remainder"] = kParamRemainder.name();
  names["remainder8"] = kParamRemainder8.name();
  names["average"] = kEmaParam.name();
  return names;
}

// What is in a state (`has` says what is) and another optimizer's alone, or nullptr.
template <class Has>
const Key* find_foreign(const OptimizerRow& row, const Has& has) {
  const auto is_own = [&](const Key& key) {
    const auto holds = [&](const std::vector<Key>& names) {
      return std::any_of(names.begin(), names.end(),
                         [&](const Key& own) { return std::strcmp(own.name(), key.name()) == 0; });
    };
    return holds(row.state_names) || holds(row.derived) || holds(row.code_names) ||
           holds(row.scale_names);
  };
  for (const OptimizerRow& other : kOptimizers)
    for (const std::vector<Key>* names :
         {&other.state_names, &other.derived, &other.code_names, &other.scale_names})
      for (const Key& name : *names)
        if (!is_own(name) && has(name)) return &name;
  return nullptr;
}

bool has_unused(const OptimizerRow& row, const GroupOptions& options, Master master,
                PyObject* state) {
  bool found = false;
  visit_unused(row, options, master,
               [&](const Key& name) { found = found || lookup(state, name.object()); });
  return found;
}

void refuse_partial(const OptimizerRow& row, States in_use, PyObject* state,
                    const std::string& place, bool is_checkpoint) {
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
    if (((row.required & in_use) >> s & 1) != 0 && !has(row.state_names[s]) &&
        !has(row.code_names[s]) && !has(row.scale_names[s]))
      miss(row.state_names[s], !is_checkpoint && (row.omissible >> s & 1) != 0);
  for (size_t s = 0; s < row.code_names.size(); ++s)
    if (has(row.code_names[s]) != has(row.scale_names[s]))
      miss(has(row.code_names[s]) ? row.scale_names[s] : row.code_names[s], false);
  if (!has(kStep) && (row.always_counts || has(kEmaParam)))
    miss(kStep, false);  // an average without its count would start anew
  if (may_be_missing) {
    const Key* const foreign = is_checkpoint ? find_foreign(row, has) : nullptr;
    if (foreign == nullptr) return;
    throw py::value_error("the state of " + place + " has '" + foreign->name() + "', which " +
                          row.name + " has not: it is another optimizer's");
  }
  References keys;
  Py_ssize_t at = 0;
  visit_entries(state, at, [&](PyObject* key, PyObject* value) {
    if (value != Py_None) keys.hold(key);
    return true;
  });
  std::string others;
  for (const py::object& key : keys) {
    const bool is_master = key.equal(py::str(kMasterParam.name())) ||
                           key.equal(py::str(kParamRemainder.name())) ||
                           key.equal(py::str(kParamRemainder8.name()));
    if (!is_master) others += (others.empty() ? "" : ", ") + std::string(py::repr(key));
  }
  if (others.empty()) return;  // a parameter that has not been stepped
  throw py::value_error("the state of " + place + " has no '" + missing->name() + "', but has " +
                        others +
                        ": it is another optimizer's, or incomplete; load all of it, or delete the "
                        "parameter's state for a fresh start");
}

const OptimizerRow& find_optimizer(const std::string& name) {
  for (const OptimizerRow& row : kOptimizers)
    if (row.name == name) return row;
  throw py::value_error("unknown optimizer '" + name + "'");
}

}  // namespace fusedopt
