#include "bindings/optimizers.h"

#include <algorithm>
#include <cmath>
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
  hyper.max_grad_norm = read_max_grad_norm(group);
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
  hyper.rounding_seed = seed >= 0 && seed <= UINT32_MAX ? static_cast<uint32_t>(seed) : 0;
  group.check_precision();
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
  group.require_finite("Invalid dampening value", hyper.dampening);
  if (group.is_construction() && hyper.nesterov && (hyper.momentum <= 0 || hyper.dampening != 0))
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
  const auto check_decay = [&](const char* what, double decay) {
    group.require_at_first(decay >= 0, what, decay);  // as torch 2.15 has it
    group.require_finite(what, decay);
  };
  check_decay("Invalid lambd value", hyper.lambd);
  check_decay("Invalid alpha value", hyper.alpha);
  group.require_finite("Invalid t0 value", hyper.t0);
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

template <class Rule>
RuleChoice choice_of() {
  return {kIdOf<Rule>, kMemberOf<Rule>};
}

Key kept_key(const std::string& name) {
  static auto* const kept = new std::deque<std::string>();  // for as long as the keys
  return Key(kept->emplace_back(name).c_str());
}

// Whether a state must be there.
enum class Need {
  kOptional,   // not even where it is in use: it then begins as in a first step
  kRequired,   // where it is in use
  kOmissible,  // the same, and it is not stored where it is not in use
};

// Makes a row of the table.
template <class Rule>
class Row {
 public:
  Row(const char* name, void (*read)(GroupReader&, cuda::HyperParamsRef&)) : row_{name, read} {
    row_.rule = choice_of<Rule>();
    for (int s = 0; s < Rule::kNumStates; ++s)
      if (Rule::is_second_moment(s)) row_.second_moments |= 1u << s;
  }

  // A state, by the rule's number, under torch's name.
  Row& keeps(int state, const char* name, Need need = Need::kRequired) {
    const auto s = static_cast<size_t>(state);
    for (std::vector<Key>* names : {&row_.state_names, &row_.code_names, &row_.scale_names})
      names->resize(std::max(names->size(), s + 1), Key(""));
    row_.state_names[s] = Key(name);
    const States own = 1u << s;
    if (need != Need::kOptional) row_.required |= own;
    if (need == Need::kOmissible) row_.omissible |= own;
    if (Rule::kind_of(state) == StateKind::kSigned) row_.signed_codes |= own;
    if (Rule::kind_of(state) == StateKind::kPositive) row_.positive_codes |= own;
    if (row_.can_be_codes(s)) {
      row_.code_names[s] = kept_key(std::string(name) + kCodesSuffix);
      row_.scale_names[s] = kept_key(std::string(name) + kScalesSuffix);
    }
    return *this;
  }
  // That state begins with the number of an option.
  Row& begins_with(const Key& option, int state) {
    row_.start_option = option;
    row_.started_state = state;
    return *this;
  }
  // The state has "step" whatever the options.
  Row& counts_steps() {
    row_.always_counts = true;
    return *this;
  }
  // torch's state has this as well, which here follows from "step".
  Row& derives(const char* name) {
    row_.derived.push_back(Key(name));
    return *this;
  }
  // Groups may have a caution. Their rule may be another, with the same states.
  template <class Cautious>
  Row& can_be_cautious() {
    row_.cautious_rule = choice_of<Cautious>();
    return *this;
  }
  Row& steps_by_rows() {
    row_.by_rows = true;
    return *this;
  }

  operator OptimizerRow() const { return row_; }

 private:
  OptimizerRow row_;
};

}  // namespace

const std::vector<OptimizerRow>& all_optimizers() {
  static const std::vector<OptimizerRow> all = {
      Row<Sgd>("SGD", read_sgd)
          .keeps(Sgd::kMomentumBuffer, "momentum_buffer", Need::kOptional)
          .can_be_cautious<CautiousSgd>(),
      Row<Adam>("Adam", read_adam)
          .keeps(Adam::kExpAvg, "exp_avg", Need::kOmissible)
          .keeps(Adam::kExpAvgSq, "exp_avg_sq")
          .keeps(Adam::kMaxExpAvgSq, "max_exp_avg_sq", Need::kOptional)
          .counts_steps()
          .can_be_cautious<CautiousAdam>(),
      Row<Adadelta>("Adadelta", read_adadelta)
          .keeps(Adadelta::kAccDelta, "acc_delta")
          .keeps(Adadelta::kSquareAvg, "square_avg")
          .counts_steps(),
      Row<Adagrad>("Adagrad", read_adagrad)
          .keeps(Adagrad::kSum, "sum")
          .begins_with(kInitialAccumulatorValue, Adagrad::kSum)
          .counts_steps(),
      Row<Adamax>("Adamax", read_adamax)
          .keeps(Adamax::kExpAvg, "exp_avg")
          .keeps(Adamax::kExpInf, "exp_inf")
          .counts_steps(),
      Row<Asgd>("ASGD", read_asgd)
          .keeps(Asgd::kAx, "ax")
          .counts_steps()
          .derives("eta")
          .derives("mu"),
      Row<Lion>("Lion", read_lion).keeps(Lion::kExpAvg, "exp_avg").can_be_cautious<Lion>(),
      Row<Nadam>("NAdam", read_nadam)
          .keeps(Nadam::kExpAvg, "exp_avg")
          .keeps(Nadam::kExpAvgSq, "exp_avg_sq")
          .counts_steps()
          .derives("mu_product")
          .can_be_cautious<Nadam>(),
      Row<Radam>("RAdam", read_radam)
          .keeps(Radam::kExpAvg, "exp_avg")
          .keeps(Radam::kExpAvgSq, "exp_avg_sq")
          .counts_steps()
          .can_be_cautious<Radam>(),
      Row<Rmsprop>("RMSprop", read_rmsprop)
          .keeps(Rmsprop::kMomentumBuffer, "momentum_buffer", Need::kOptional)
          .keeps(Rmsprop::kSquareAvg, "square_avg")
          .keeps(Rmsprop::kGradAvg, "grad_avg", Need::kOptional)
          .counts_steps(),
      Row<Rprop>("Rprop", read_rprop)
          .keeps(Rprop::kPrev, "prev")
          .keeps(Rprop::kStepSize, "step_size")
          .begins_with(kLr, Rprop::kStepSize)
          .counts_steps(),
      Row<SparseAdam>("SparseAdam", read_sparse_adam)
          .keeps(SparseAdam::kExpAvg, "exp_avg")
          .keeps(SparseAdam::kExpAvgSq, "exp_avg_sq")
          .counts_steps()
          .steps_by_rows(),
  };
  return all;
}

const OptimizerRow& find_optimizer(const std::string& name) {
  for (const OptimizerRow& row : all_optimizers())
    if (row.name == name) return row;
  throw py::value_error("unknown optimizer '" + name + "'");
}

RuleChoice rule_for(const OptimizerRow& row, const HyperParams& hyper) {
  const bool is_cautious = hyper.cautious_update || hyper.cautious_weight_decay;
  return is_cautious ? row.cautious_rule.value() : row.rule;
}

double read_max_grad_norm(GroupReader& group) {
  const double norm = group.number_or(kMaxGradNorm, 0);
  if (!(norm > 0) && group.has(kMaxGradNorm))
    group.fail("max_grad_norm must be above 0, or None: " + std::string(py::str(py::float_(norm))));
  return norm;
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

}  // namespace fusedopt
