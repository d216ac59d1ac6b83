// The rules against the textbook formulas in double, in every variant.
#include "check.h"

#include "core/schedule.h"

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

Hyper sgd_hyper() {
  Hyper hyper;
  hyper.lr = 0.1;
  hyper.momentum = 0.9;
  hyper.dampening = 0.25;
  hyper.weight_decay = 0.03;
  return hyper;
}

Hyper adam_hyper() {
  Hyper hyper;
  hyper.lr = 0.1;
  hyper.beta1 = 0.9;
  hyper.beta2 = 0.99;
  hyper.eps = 1e-3;
  hyper.weight_decay = 0.3;
  return hyper;
}

template <class T, Momentum kMomentum, Decay kDecay>
void test_sgd(double sign) {
  Hyper hyper = sgd_hyper();
  hyper.maximize = sign < 0;
  T param = T(1.5), buffer = 0, unused1 = T(7), unused2 = T(8);
  double p = param, v = 0;
  for (int step = 0; step < kSteps; ++step) {
    const Time time = {static_cast<uint64_t>(step) + 1, step == 0};
    const Sgd<T, kMomentum, kDecay> rule = {
        schedule_rule(SgdFamily{}, hyper, time, {4.0, 0}).template as<T>()};
    rule(param, static_cast<T>(4 * kGrads[step]), buffer, unused1, unused2);

    double g = sign * static_cast<T>(4 * kGrads[step]) / 4;
    if (kDecay == Decay::kL2) g += hyper.weight_decay * p;
    if (kDecay == Decay::kDecoupled) p *= 1 - hyper.lr * hyper.weight_decay;
    v = step == 0 ? g : hyper.momentum * v + (1 - hyper.dampening) * g;
    if (kMomentum == Momentum::kHeavyBall) g = v;
    if (kMomentum == Momentum::kNesterov) g += hyper.momentum * v;
    p -= hyper.lr * g;
  }
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  CHECK(near(param, p, epsilon));
  CHECK(near(buffer, kMomentum == Momentum::kNone ? 0 : v, epsilon));
  CHECK(unused1 == T(7) && unused2 == T(8));
}

template <class T, Decay kDecay, bool kAmsgrad>
void test_adam(double sign, double beta1) {
  Hyper hyper = adam_hyper();
  hyper.maximize = sign < 0;
  hyper.beta1 = beta1;
  T param = T(1.5), exp_avg = 0, exp_avg_sq = 0, max_exp_avg_sq = kAmsgrad ? T(0) : T(7);
  double p = param, m = 0, v = 0, largest = 0;
  for (int step = 1; step <= kSteps; ++step) {
    const Time time = {static_cast<uint64_t>(step), step == 1};
    const Adam<T, kDecay, kAmsgrad> rule = {
        schedule_rule(AdamFamily{}, hyper, time, {4.0, 0}).template as<T>()};
    rule(param, static_cast<T>(4 * kGrads[step - 1]), exp_avg, exp_avg_sq, max_exp_avg_sq);

    double g = sign * static_cast<T>(4 * kGrads[step - 1]) / 4;
    if (kDecay == Decay::kDecoupled) p *= 1 - hyper.lr * hyper.weight_decay;
    if (kDecay == Decay::kL2) g += hyper.weight_decay * p;
    m = hyper.beta1 * m + (1 - hyper.beta1) * g;
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g;
    largest = std::max(largest, v);
    const double m_hat = m / (1 - std::pow(hyper.beta1, step));
    const double v_hat = (kAmsgrad ? largest : v) / (1 - std::pow(hyper.beta2, step));
    p -= hyper.lr * m_hat / (std::sqrt(v_hat) + hyper.eps);
  }
  constexpr double epsilon = std::numeric_limits<T>::epsilon();
  CHECK(near(param, p, epsilon));
  CHECK(near(exp_avg, m, epsilon));
  CHECK(near(exp_avg_sq, v, epsilon));
  CHECK(near(max_exp_avg_sq, kAmsgrad ? largest : 7, epsilon));
}

template <class T, Decay kDecay>
void test_all_sgd(double sign) {
  test_sgd<T, Momentum::kNone, kDecay>(sign);
  test_sgd<T, Momentum::kHeavyBall, kDecay>(sign);
  test_sgd<T, Momentum::kNesterov, kDecay>(sign);
}

template <class T>
void test_all_adam(double sign, double beta1) {
  test_adam<T, Decay::kNone, false>(sign, beta1);
  test_adam<T, Decay::kNone, true>(sign, beta1);
  test_adam<T, Decay::kL2, false>(sign, beta1);
  test_adam<T, Decay::kL2, true>(sign, beta1);
  test_adam<T, Decay::kDecoupled, false>(sign, beta1);
  test_adam<T, Decay::kDecoupled, true>(sign, beta1);
}

}  // namespace

void test_rules() {
  for (const double sign : {1.0, -1.0}) {
    test_all_sgd<float, Decay::kNone>(sign);
    test_all_sgd<float, Decay::kL2>(sign);
    test_all_sgd<float, Decay::kDecoupled>(sign);
    test_all_sgd<double, Decay::kNone>(sign);
    test_all_sgd<double, Decay::kL2>(sign);
    test_all_sgd<double, Decay::kDecoupled>(sign);
    for (const double beta1 : {0.0, 0.4, 0.5, 0.9}) {
      test_all_adam<float>(sign, beta1);
      test_all_adam<double>(sign, beta1);
    }
  }
}

void test_schedule() {
  // A decay is split into two parts of one sign, so that inf stays inf and nothing is lost.
  for (const double decay : {0.0, 1e-12, 1e-5, 1e-3, 0.01, 0.3, 0.999, 1.3, 5.0}) {
    const Factor<double> keep = split(1 - decay);
    const long double lost =
        static_cast<long double>(keep.high) + keep.rest - (1.0L - static_cast<long double>(decay));
    CHECK(std::fabs(static_cast<double>(lost)) <= 1e-16);
    CHECK(static_cast<double>(static_cast<float>(keep.high)) == keep.high);
    CHECK(keep.rest != 0 && std::signbit(keep.rest) == std::signbit(1 - decay));
    CHECK(std::signbit(keep.high) == std::signbit(1 - decay));
  }
  // Terms that torch skips are variants without the term.
  Hyper hyper = sgd_hyper();
  CHECK(variant(SgdFamily{}, hyper) == SgdFamily::variant(Momentum::kHeavyBall, Decay::kL2));
  hyper.nesterov = true;
  CHECK(variant(SgdFamily{}, hyper) == SgdFamily::variant(Momentum::kNesterov, Decay::kL2));
  hyper.momentum = hyper.weight_decay = 0;
  CHECK(variant(SgdFamily{}, hyper) == SgdFamily::variant(Momentum::kNone, Decay::kNone));
  hyper = adam_hyper();
  CHECK(variant(AdamFamily{}, hyper) == AdamFamily::variant(Decay::kL2, false));
  hyper.decoupled_weight_decay = hyper.amsgrad = true;
  CHECK(variant(AdamFamily{}, hyper) == AdamFamily::variant(Decay::kDecoupled, true));
  hyper.weight_decay = 0;
  CHECK(variant(AdamFamily{}, hyper) == AdamFamily::variant(Decay::kNone, true));
  // Clipping, as torch has it.
  hyper.max_grad_norm = 2;
  CHECK(clip_factor(hyper, 1) == 1 && clip_factor(hyper, 4) == 2 / (4 + 1e-6));
  hyper.max_grad_norm = HUGE_VAL;
  CHECK(clip_factor(hyper, 4) == 1);
  // Averages: the first step sets them, then the rate follows from the decay.
  hyper.ema_decay = 0.75;
  CHECK(average_rate(hyper, {1, true}) == 1 && average_rate(hyper, {2, false}) == 0.25);
  hyper.ema_bias_correction = true;
  CHECK(average_rate(hyper, {1, true}) == 1 && average_rate(hyper, {2, false}) == 0.25 / 0.4375);
}
