// The rules against the formulas of textbooks in double, in every variant.
#include "check.h"
#include "problem.h"

#include "core/element.h"
#include "core/step_scalars.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

using namespace fusedopt;

namespace {

// Signs that stay and signs that change, and so many that RAdam begins to divide.
constexpr double kGrads[] = {0.7, -1.3, 0.2, 2.1, -0.4, -0.9, -0.3, 1.1};

bool near(double found, double expected, double epsilon) {
  return std::fabs(found - expected) <= 16 * epsilon * std::max(1.0, std::fabs(expected));
}

// A parameter as the textbooks have it: one step with grad g, which is number t, in double.
struct Textbook {
  const HyperParams& hyper;
  double p;
  double states[kMaxStates];

  void step(Sgd, Sgd::Variant variant, double t, double g) { step(variant, {}, t, g); }
  void step(CautiousSgd, CautiousSgd::Variant variant, double t, double g) {
    step(variant, variant.caution, t, g);
  }
  void step(Sgd::Variant variant, Caution caution, double t, double g) {
    using Momentum = Sgd::Momentum;
    double& v = states[Sgd::kMomentumBuffer];
    if (variant.momentum != Momentum::kNone)
      v = t == 1 ? g : hyper.momentum * v + (1 - hyper.dampening) * g;
    move(caution, g,
         hyper.lr * (variant.momentum == Momentum::kNone        ? g
                     : variant.momentum == Momentum::kHeavyBall ? v
                                                                : g + hyper.momentum * v));
  }

  void step(Adam, Adam::Variant variant, double t, double g) { step(variant, {}, t, g); }
  void step(CautiousAdam, CautiousAdam::Variant variant, double t, double g) {
    step(variant, variant.caution, t, g);
  }
  void step(Adam::Variant variant, Caution caution, double t, double g) {
    double &v = states[Adam::kExpAvgSq], &largest = states[Adam::kMaxExpAvgSq];
    const double m = variant.averages_grads ? average(states[Adam::kExpAvg], hyper.beta1, g) : g;
    average(v, hyper.beta2, g * g);
    if (variant.amsgrad) largest = std::max(largest, v);
    const double m_hat = m / (1 - std::pow(hyper.beta1, t));
    const double v_hat = (variant.amsgrad ? largest : v) / (1 - std::pow(hyper.beta2, t));
    move(caution, g, hyper.lr * m_hat / (std::sqrt(v_hat) + hyper.eps));
  }

  void step(Adadelta, Adadelta::Variant, double, double g) {
    double &v = states[Adadelta::kSquareAvg], &acc = states[Adadelta::kAccDelta];
    average(v, hyper.rho, g * g);
    const double delta = std::sqrt(acc + hyper.eps) / std::sqrt(v + hyper.eps) * g;
    average(acc, hyper.rho, delta * delta);
    p -= hyper.lr * delta;
  }

  void step(Adagrad, Adagrad::Variant, double t, double g) {
    double& sum = states[Adagrad::kSum];
    sum += g * g;
    p -= hyper.lr / (1 + (t - 1) * hyper.lr_decay) * g / (std::sqrt(sum) + hyper.eps);
  }

  void step(Adamax, Adamax::Variant, double t, double g) {
    double& u = states[Adamax::kExpInf];
    const double m = average(states[Adamax::kExpAvg], hyper.beta1, g);
    u = std::max(hyper.beta2 * u, std::fabs(g) + hyper.eps);
    p -= hyper.lr / (1 - std::pow(hyper.beta1, t)) * m / u;
  }

  void step(Asgd, Asgd::Variant, double t, double g) {
    double& ax = states[Asgd::kAx];
    const double eta = hyper.lr / std::pow(1 + hyper.lambd * hyper.lr * (t - 1), hyper.alpha);
    p = (1 - hyper.lambd * eta) * p - eta * g;
    ax += (p - ax) / std::max(1.0, t - 1 - hyper.t0);
  }

  void step(Lion, Lion::Variant variant, double, double g) {
    double& m = states[Lion::kExpAvg];
    move(variant.caution, g, std::copysign(hyper.lr, hyper.beta1 * m + (1 - hyper.beta1) * g));
    average(m, hyper.beta2, g);
  }

  void step(Nadam, Nadam::Variant variant, double t, double g) {
    const auto momentum = [&](double at) {
      return hyper.beta1 * (1 - 0.5 * std::pow(0.96, at * hyper.momentum_decay));
    };
    double product = 1;  // of the momenta
    for (int i = 1; i <= t; ++i) product *= momentum(i);
    const double m = average(states[Nadam::kExpAvg], hyper.beta1, g);
    const double v = average(states[Nadam::kExpAvgSq], hyper.beta2, g * g);
    const double root = std::sqrt(v / (1 - std::pow(hyper.beta2, t))) + hyper.eps;
    const double of_grad = (1 - momentum(t)) / (1 - product) * g;
    const double of_m = momentum(t + 1) / (1 - product * momentum(t + 1)) * m;
    move(variant.caution, g, hyper.lr * (of_grad + of_m) / root);
  }

  void step(Radam, Radam::Variant variant, double t, double g) {
    const double m = average(states[Radam::kExpAvg], hyper.beta1, g);
    const double v = average(states[Radam::kExpAvgSq], hyper.beta2, g * g);
    const double m_hat = m / (1 - std::pow(hyper.beta1, t));
    const double decay = std::pow(hyper.beta2, t), limit = 2 / (1 - hyper.beta2) - 1;
    const double rho = limit - 2 * t * decay / (1 - decay);
    const double r = std::sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho));
    const double l = std::sqrt(1 - decay) / (std::sqrt(v) + hyper.eps);
    move(variant.caution, g, hyper.lr * m_hat * (rho > 5 ? r * l : 1));
  }

  void step(Rmsprop, Rmsprop::Variant variant, double, double g) {
    double &buffer = states[Rmsprop::kMomentumBuffer], &mean = states[Rmsprop::kGradAvg];
    double v = average(states[Rmsprop::kSquareAvg], hyper.alpha, g * g);
    if (variant.centered) average(mean, hyper.alpha, g);
    if (variant.centered) v -= mean * mean;
    const double ratio = g / (std::sqrt(v) + hyper.eps);
    if (variant.has_momentum) buffer = hyper.momentum * buffer + ratio;
    p -= hyper.lr * (variant.has_momentum ? buffer : ratio);
  }

  void step(Rprop, Rprop::Variant, double, double g) {
    double &prev = states[Rprop::kPrev], &size = states[Rprop::kStepSize];
    if (prev * g > 0) size *= hyper.eta_plus;
    if (prev * g < 0) size *= hyper.eta_minus;
    size = std::clamp(size, hyper.smallest_step, hyper.largest_step);
    prev = prev * g < 0 ? 0 : g;
    if (prev != 0) p -= std::copysign(size, prev);
  }

  void step(SparseAdam, SparseAdam::Variant, double t, double g) {
    const double m = average(states[SparseAdam::kExpAvg], hyper.beta1, g);
    const double v = average(states[SparseAdam::kExpAvgSq], hyper.beta2, g * g);
    const double step_size =
        hyper.lr * std::sqrt(1 - std::pow(hyper.beta2, t)) / (1 - std::pow(hyper.beta1, t));
    p -= step_size * m / (std::sqrt(v) + hyper.eps);
  }

  // Weight decay, which comes before all else. Cautious decay waits for the update.
  template <class Variant>
  void decay(Variant variant, double& g) {
    if (variant.decay == Decay::kL2) g += hyper.weight_decay * p;
    if (variant.decay == Decay::kDecoupled && !hyper.cautious_weight_decay) p *= kept();
  }
  void decay(OnlyVariant, double&) {}  // Rprop and SparseAdam have none

 private:
  static double average(double& of, double beta, double with) {
    return of = beta * of + (1 - beta) * with;
  }

  double kept() const { return 1 - hyper.lr * hyper.weight_decay; }

  // The formulas of the papers, for what is subtracted.
  void move(Caution caution, double g, double update) {
    if (caution.in_updates && update * g <= 0) update = 0;
    if (caution.in_decay && hyper.decoupled_weight_decay && update * p >= 0) p *= kept();
    p -= update;
  }
};

// Steps a rule, called as the one that stands for it in the list of all rules, in T.
template <class Rule, class T>
void test_rule(const HyperParams& hyper) {
  with_rule(kIdOf<Rule>, [&](auto listed) {
    using Listed = decltype(listed);
    const auto variant = Listed::variant(hyper);
    const auto own = Rule::variant(hyper);
    T param = T(1.5), state[Listed::kNumStates];
    Textbook expected = {hyper, param, {}};
    for (int s = 0; s < Listed::kNumStates; ++s) {
      const bool is_used = s < Rule::kNumStates && own.uses(s);
      CHECK(variant.uses(s) == is_used);
      state[s] = is_used ? T(0) : T(7);
    }
    if constexpr (std::is_same_v<Rule, Rprop>)
      expected.states[Rprop::kStepSize] = state[Rprop::kStepSize] = T(0.25);
    uint64_t step = 0;
    for (const double grad : kGrads) {
      ++step;
      const T scaled = static_cast<T>(4 * grad);
      const auto scalars = Listed::scalars(hyper, {step, step == 1}, {4.0, 0}).template as<T>();
      Ieee math;
      Listed::update(variant, scalars, math, param, scaled, state);
      double g = (hyper.maximize ? -1.0 : 1.0) * scaled / 4;
      expected.decay(own, g);
      expected.step(Rule{}, own, static_cast<double>(step), g);
      constexpr double epsilon = std::numeric_limits<T>::epsilon();
      CHECK(near(param, expected.p, epsilon));
      for (int s = 0; s < Listed::kNumStates; ++s)
        if (variant.uses(s)) CHECK(near(state[s], expected.states[s], epsilon));
    }
  });
}

template <class Rule>
void test_rule() {
  for (const Problem& problem : problems_of(kKindOf<Rule>))
    for (const bool maximize : {false, true})
      for (const double beta1 : {0.0, 0.4, 0.5, 0.9}) {
        HyperParams hyper = problem.hyper;
        hyper.maximize = maximize;
        if (hyper.beta1 != 0) hyper.beta1 = beta1;
        test_rule<Rule, float>(hyper);
        test_rule<Rule, double>(hyper);
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

// The variants of rules that share a kernel: each is of one of them, and all have their turn, one
// rule after the other.
void test_shared_variants() {
  int number = 0;
  for (int member = 0; member < OtherRules::Members::kSize; ++member)
    OtherRules::Members::call(member, [&](auto rule) {
      using Rule = decltype(rule);
      CHECK(Rules::find<Rule>() == -1 && kIdOf<Rule> == kIdOf<OtherRules>);
      CHECK(kMemberOf<Rule> == member);
      test_numbers<Rule>();
      for_each_variant<Rule>([&](auto own) {
        int called = 0;
        OtherRules::Variant::of(number++).with_rule([&](auto found, auto variant) {
          ++called;
          CHECK((std::is_same_v<decltype(found), Rule>));
          CHECK(variant.number() == own.number());
        });
        CHECK(called == 1);
      });
    });
  CHECK(number == OtherRules::kNumVariants);
  CHECK(kMemberOf<Sgd> == 0 && kMemberOf<Adam> == 0);
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

HyperParams sgd_hyper() {
  HyperParams hyper;
  hyper.lr = 0.1;
  hyper.momentum = 0.9;
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

bool has_number(Sgd::Variant found, Sgd::Variant expected) {
  return found.number() == expected.number();
}
bool has_number(Adam::Variant found, Adam::Variant expected) {
  return found.number() == expected.number();
}

}  // namespace

void test_rules() {
  test_rule<Sgd>();
  test_rule<Adam>();
  test_rule<Adadelta>();
  test_rule<Adagrad>();
  test_rule<Adamax>();
  test_rule<Asgd>();
  test_rule<CautiousAdam>();
  test_rule<CautiousSgd>();
  test_rule<Lion>();
  test_rule<Nadam>();
  test_rule<Radam>();
  test_rule<Rmsprop>();
  test_rule<Rprop>();
  test_rule<SparseAdam>();
  test_list();
  test_shared_variants();
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
