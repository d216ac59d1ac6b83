// The rules against the formulas of textbooks in double, in every variant.
#include "check.h"

#include "core/element.h"
#include "core/step_scalars.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

using namespace fusedopt;

namespace {

constexpr int kSteps = 5;
constexpr double kGrads[kSteps] = {0.7, -1.3, 0.2, 2.1, -0.4};

bool near(double found, double expected, double epsilon) {
  return std::fabs(found - expected) <= 16 * epsilon * std::max(1.0, std::fabs(expected));
}

HyperParams sgd_hyper() {
  HyperParams hyper;
  hyper.lr = 0.1;
  hyper.momentum = 0.9;
  hyper.dampening = 0.25;
  hyper.weight_decay = 0.03;
  return hyper;
}

HyperParams adam_hyper() {
  HyperParams hyper;
  hyper.lr = 0.1;
  hyper.beta1 = 0.9;
  hyper.beta2 = 0.99;
  hyper.eps = 1e-3;
  hyper.weight_decay = 0.3;
  return hyper;
}

template <class T>
void test_sgd(Sgd::Variant variant, double sign) {
  using Momentum = Sgd::Momentum;
  HyperParams hyper = sgd_hyper();
  hyper.maximize = sign < 0;
  T param = T(1.5), state[] = {variant.uses(Sgd::kMomentumBuffer) ? T(0) : T(7)};
  double p = param, v = 0;
  for (int step = 0; step < kSteps; ++step) {
    const StepInfo info = {static_cast<uint64_t>(step) + 1, step == 0};
    const auto scalars = Sgd::scalars(hyper, info, {4.0, 0}).template as<T>();
    Ieee math;
    Sgd::update(variant, scalars, math, param, static_cast<T>(4 * kGrads[step]), state);

    double g = sign * static_cast<T>(4 * kGrads[step]) / 4;
    if (variant.decay == Decay::kL2) g += hyper.weight_decay * p;
    if (variant.decay == Decay::kDecoupled) p *= 1 - hyper.lr * hyper.weight_decay;
    v = step == 0 ? g : hyper.momentum * v + (1 - hyper.dampening) * g;
    if (variant.momentum == Momentum::kHeavyBall) g = v;
    if (variant.momentum == Momentum::kNesterov) g += hyper.momentum * v;
    p -= hyper.lr * g;
  }
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  CHECK(near(param, p, epsilon));
  if (variant.momentum == Momentum::kNone)
    CHECK(state[Sgd::kMomentumBuffer] == T(7));
  else
    CHECK(near(state[Sgd::kMomentumBuffer], v, epsilon));
}

template <class T>
void test_adam(Adam::Variant variant, double sign, double beta1) {
  if (!variant.averages_grads && beta1 != 0) return;
  HyperParams hyper = adam_hyper();
  hyper.maximize = sign < 0;
  hyper.beta1 = beta1;
  T param = T(1.5), state[Adam::kNumStates];
  for (int s = 0; s < Adam::kNumStates; ++s) state[s] = variant.uses(s) ? T(0) : T(7);
  double p = param, m = 0, v = 0, largest = 0;
  for (int step = 1; step <= kSteps; ++step) {
    const StepInfo info = {static_cast<uint64_t>(step), step == 1};
    const auto scalars = Adam::scalars(hyper, info, {4.0, 0}).template as<T>();
    Ieee math;
    Adam::update(variant, scalars, math, param, static_cast<T>(4 * kGrads[step - 1]), state);

    double g = sign * static_cast<T>(4 * kGrads[step - 1]) / 4;
    if (variant.decay == Decay::kDecoupled) p *= 1 - hyper.lr * hyper.weight_decay;
    if (variant.decay == Decay::kL2) g += hyper.weight_decay * p;
    m = hyper.beta1 * m + (1 - hyper.beta1) * g;
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g;
    largest = std::max(largest, v);
    const double m_hat = m / (1 - std::pow(hyper.beta1, step));
    const double v_hat = (variant.amsgrad ? largest : v) / (1 - std::pow(hyper.beta2, step));
    p -= hyper.lr * m_hat / (std::sqrt(v_hat) + hyper.eps);
  }
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  CHECK(near(param, p, epsilon));
  const double expected[] = {m, v, largest};
  for (int s = 0; s < Adam::kNumStates; ++s) {
    if (variant.uses(s)) CHECK(near(state[s], expected[s], epsilon));
  }
}

template <class Rule, class F>
void for_each_variant(const F& f) {
  for (int number = 0; number < Rule::kNumVariants; ++number) f(Rule::Variant::of(number));
}

// Each variant has a number, and each number a variant.
template <class Rule>
void test_numbers() {
  int called = 0;
  for_each_variant<Rule>([&](auto variant) { CHECK(variant.number() == called++); });
  CHECK(called == Rule::kNumVariants && called <= 256);
}

void test_list() {
  CHECK(kIdOf<Sgd> != kIdOf<Adam>);
  for (int id = 0; id < Rules::kSize; ++id) {
    int called = 0;
    with_rule(static_cast<RuleId>(id), [&](auto rule) {
      using Rule = decltype(rule);
      ++called;
      CHECK(kIdOf<Rule> == id && Rule::kNumStates <= kMaxStates);
      test_numbers<Rule>();
    });
    CHECK(called == 1);
  }
}

template <class T>
void test_ema(double rate) {
  const Ema<T> update_ema = ema_at(rate).template as<T>();
  for (const T ema : {T(-3), T(0), T(0.3)})
    for (const T weight : {T(0.7), T(-2), T(0.3)}) {
      const double expected = static_cast<double>(ema) + rate * (static_cast<double>(weight) - ema);
      CHECK(near(update_ema(ema, weight), expected, std::numeric_limits<T>::epsilon()));
      if (rate == 0) CHECK(update_ema(ema, weight) == ema);
      if (rate == 1) CHECK(update_ema(ema, weight) == weight);
    }
  // What follows in the steps after a NaN or an infinity.
  const T nan = std::numeric_limits<T>::quiet_NaN();
  if (rate == 1) CHECK(update_ema(nan, T(2)) == T(2));
  if (rate == 0) CHECK(update_ema(T(2), nan) == T(2));
}

bool has_number(Sgd::Variant found, Sgd::Variant expected) {
  return found.number() == expected.number();
}
bool has_number(Adam::Variant found, Adam::Variant expected) {
  return found.number() == expected.number();
}

}  // namespace

void test_rules() {
  for (const double sign : {1.0, -1.0}) {
    for_each_variant<Sgd>([&](auto variant) {
      test_sgd<float>(variant, sign);
      test_sgd<double>(variant, sign);
    });
    for (const double beta1 : {0.0, 0.4, 0.5, 0.9})
      for_each_variant<Adam>([&](auto variant) {
        test_adam<float>(variant, sign, beta1);
        test_adam<double>(variant, sign, beta1);
      });
  }
  test_list();
}

void test_step_scalars() {
  // Both parts of a decay have one sign, so that inf stays inf, and nothing is lost.
  for (const double decay : {0.0, 1e-12, 1e-5, 1e-3, 0.01, 0.3, 0.999, 1.3, 5.0}) {
    const TwoFloat<double> keep = two_float(1 - decay);
    const long double lost =
        static_cast<long double>(keep.high) + keep.rest - (1.0L - static_cast<long double>(decay));
    CHECK(std::fabs(static_cast<double>(lost)) <= 1e-16);
    CHECK(static_cast<double>(static_cast<float>(keep.high)) == keep.high);
    CHECK(keep.rest != 0 && std::signbit(keep.rest) == std::signbit(1 - decay));
    CHECK(std::signbit(keep.high) == std::signbit(1 - decay));
  }
  // A term that torch leaves out is a variant without it.
  using Momentum = Sgd::Momentum;
  HyperParams hyper = sgd_hyper();
  CHECK(has_number(Sgd::variant(hyper), {Momentum::kHeavyBall, Decay::kL2}));
  hyper.nesterov = true;
  CHECK(has_number(Sgd::variant(hyper), {Momentum::kNesterov, Decay::kL2}));
  hyper.momentum = hyper.weight_decay = 0;
  CHECK(has_number(Sgd::variant(hyper), {Momentum::kNone, Decay::kNone}));
  hyper = adam_hyper();
  CHECK(has_number(Adam::variant(hyper), {Decay::kL2, false, true}));
  hyper.decoupled_weight_decay = hyper.amsgrad = true;
  CHECK(has_number(Adam::variant(hyper), {Decay::kDecoupled, true, true}));
  hyper.weight_decay = 0;
  CHECK(has_number(Adam::variant(hyper), {Decay::kNone, true, true}));
  hyper.beta1 = 0;
  CHECK(has_number(Adam::variant(hyper), {Decay::kNone, true, false}));
  // Clipping, as torch has it.
  hyper.max_grad_norm = 2;
  CHECK(clip_factor(hyper, 1) == 1 && clip_factor(hyper, 4) == 2 / (4 + 1e-6));
  hyper.max_grad_norm = HUGE_VAL;
  CHECK(clip_factor(hyper, 4) == 1);
  // Averages: the first step sets them, and then the rate follows from the decay.
  hyper.ema_decay = 0.75;
  CHECK(ema_rate(hyper, {1, true}) == 1 && ema_rate(hyper, {2, false}) == 0.25);
  hyper.ema_bias_correction = true;
  CHECK(ema_rate(hyper, {1, true}) == 1 && ema_rate(hyper, {2, false}) == 0.25 / 0.4375);
  for (const double rate : {0.0, 0.001, 0.25, 0.5, 0.6, 0.999, 1.0}) {
    test_ema<float>(rate);
    test_ema<double>(rate);
  }
  // The scalars that all rules have are stored beside the rule's own, and are found there.
  hyper.stochastic_rounding = StochasticRounding::kAll;
  hyper.rounding_seed = 9;
  Scalars scalars;
  scalars.set<Adam>(step_scalars<Adam>(hyper, {2, false}, {}));
  const CommonScalars<float> common = scalars.of<Adam>().as<float>().common;
  CHECK(common.rounding_key == rounding_key(9, 2));
  CHECK(common.ema.factor == static_cast<float>(0.25 / 0.4375 - 1));
  CHECK(scalars.of<Adam>().rule.eps == Adam::scalars(hyper, {2, false}, {}).eps);
}
