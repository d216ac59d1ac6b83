// Codes of 8 bits: each is what its definition says, for every magnitude and draw, however rough
// the roots that say where to look.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/codes.h"
#include "core/element.h"
#include "core/rules/adam.h"
#include "core/stochastic.h"

using namespace fusedopt;

namespace {

// Approximations that are off.
struct Rough {
  float error;
  float about_root(float x) const { return std::sqrt(x) * (1 + error); }
  float about_fourth_root(float x) const { return std::sqrt(std::sqrt(x)) * (1 + error); }
  float about_reciprocal(float x) const { return 1 / x * (1 + error); }
};

// By counting thresholds.
template <class Code>
uint32_t code_by_definition(float value, float scale, float share) {
  constexpr bool kIsSigned = std::is_same_v<Code, SignedCode>;
  const float magnitude = std::fabs(value), unit = scale * Code::kUnit;
  if (!kIsSigned && magnitude == 0) return 0;
  int code = kIsSigned ? 0 : 4;
  for (; code < Code::kMost; ++code) {
    const auto c = static_cast<float>(code);
    const double exact = kIsSigned ? 2.0 * c + 1 : ((4.0 * c + 6) * c + 4) * c + 1;
    const float gap = static_cast<float>(exact);
    const float threshold = std::fma(share, gap, Code::power(c));
    if (!(magnitude > threshold * unit)) break;
  }
  return kIsSigned && value < 0 ? static_cast<uint8_t>(-code) : static_cast<uint32_t>(code);
}

template <class Code>
uint32_t code_of(float value, float scale, float share, float error = 0) {
  Rough math = {error};
  return encoded<Code>(value, scale, share, math) & 0xffu;
}

template <class Code>
void check_value(float value, float scale, uint32_t draw) {
  for (const bool is_drawn : {false, true}) {
    const float share = threshold_shares<float>(draw, is_drawn);
    CHECK(is_drawn ? share == (static_cast<float>(draw & 0xffffu) + 0.5f) / 65536 : share == 0.5f);
    const uint32_t expected = code_by_definition<Code>(value, scale, share);
    for (const float error : {0.0f, 1e-6f, 6e-4f, -6e-4f})
      CHECK(code_of<Code>(value, scale, share, error) == expected);
  }
}

template <class Code>
void test_definition() {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> exponent(-40, 0);
  for (const float scale : {1.0f, 0.3f, 7e-5f, 0x1p-88f, 3e38f, 0x1p-30f})
    for (int i = 0; i < 20000; ++i) {
      const float value = scale * (i % 2 == 0 ? std::exp2(exponent(random))
                                              : static_cast<float>(random()) * 0x1p-32f);
      check_value<Code>(std::is_same_v<Code, SignedCode> && i % 3 == 0 ? -value : value, scale,
                        static_cast<uint32_t>(random()));
    }
  // At and beside what a code stands for, and at both ends of the draws.
  for (const float scale : {1.0f, 0.3f, 5e-19f})
    for (uint32_t code = 0; code <= static_cast<uint32_t>(Code::kMost); ++code) {
      const float value = Code::template value<float>(code, scale);
      for (const float near : {value, std::nextafter(value, 0.0f), std::nextafter(value, scale)})
        if (near <= scale)
          for (const uint32_t draw : {0u, 1u, 0x8000u, 0xfffeu, 0xffffu})
            check_value<Code>(near, scale, draw);
    }
}

// To nearest, a code that may be found stays what it is; 0 is exact, and nothing above 0 becomes 0.
template <class Code>
void test_values() {
  for (const float scale : {1.0f, 0.3f, 5e-19f, 0x1p-88f})
    for (uint32_t code = 0; code < 256; ++code) {
      if (std::is_same_v<Code, SignedCode> && code == 128) continue;  // is no code
      const float value = Code::template value<float>(code, scale);
      CHECK((value == 0) == (code == 0));
      CHECK(value == 0 || std::isnormal(value));
      const auto least = static_cast<uint32_t>(Code::kLeast);
      const uint32_t expected = code == 0 ? 0 : std::max(code, least);
      CHECK(code_of<Code>(value, scale, 0.5f) == expected);
    }
  CHECK((Code::template value<float>(0u, __builtin_nanf(""))) !=
        (Code::template value<float>(0u, __builtin_nanf(""))));
}

// The mean over all draws is the value.
template <class Code>
void test_mean() {
  for (float value = 0.99f; value > 0x1p-20f; value *= 0.93f) {
    if (std::is_same_v<Code, PositiveCode> && value < Code::template value<float>(5u, 1.0f)) break;
    double sum = 0;
    uint32_t lowest = 255, highest = 0;
    for (uint32_t draw = 0; draw < 65536; ++draw) {
      const float share = threshold_shares<float>(draw, true);
      const uint32_t code = code_of<Code>(value, 1.0f, share);
      lowest = std::min(lowest, code);
      highest = std::max(highest, code);
      sum += Code::template value<float>(code, 1.0f);
    }
    CHECK(highest - lowest <= 1);
    const float gap =
        Code::template value<float>(lowest + 1, 1.0f) - Code::template value<float>(lowest, 1.0f);
    CHECK(std::fabs(sum / 65536 - value) <= gap / 65536 + value * 1e-6);  // there are no more draws
  }
}

// Adam's text with moments in codes, beside the same in double: the updates of many elements, whose
// grads have standard deviations that are spread by `spread` (of their logarithms) in each group,
// and a mean of a tenth of that. After kSteps the grads of some change by a factor.
class Simulation {
 public:
  struct Found {
    double error;    // root of the mean square, of that of the true updates
    double largest;  // update, of the largest true one
    double root;     // of the second moment, of the true one: median of those that changed
  };
  static constexpr int kElements = 2048, kSteps = 1000, kLast = 200;

  Simulation(double spread, bool draws) : draws_(draws) {
    std::normal_distribution<double> normal;
    for (double& deviation : deviations_) deviation = std::exp(spread * normal(random_));
    hyper_.lr = 1;
    hyper_.beta1 = 0.9;
    hyper_.beta2 = 0.999;
    hyper_.eps = 1e-12;
  }

  // Of the last steps of so many more; then every `period`-th element's grads are so much larger.
  Found run(double factor = 1, int period = 1) {
    for (int i = 0; i < kElements; i += period) deviations_[i] *= factor;
    double error = 0, truth = 0, largest = 0, largest_true = 0;
    for (int step = 0; step < kSteps; ++step) {
      make_step();
      for (int i = 0; step >= kSteps - kLast && i < kElements; ++i) {
        error += (moved_[i] - true_moved_[i]) * (moved_[i] - true_moved_[i]);
        truth += true_moved_[i] * true_moved_[i];
        largest = std::max<double>(largest, std::fabs(moved_[i]));
        largest_true = std::max(largest_true, std::fabs(true_moved_[i]));
      }
    }
    std::vector<double> roots;
    for (int i = 0; i < kElements; i += period)
      roots.push_back(std::sqrt(static_cast<double>(moments_[1][i]) / true_moments_[1][i]));
    std::nth_element(roots.begin(), roots.begin() + kElements / period / 2, roots.end());
    return {std::sqrt(error / truth), largest / largest_true, roots[kElements / period / 2]};
  }

 private:
  void make_step() {
    ++step_;
    const auto variant = Adam::variant(hyper_);
    const auto exact = Adam::scalars(hyper_, {step_, step_ == 1}, {});
    const auto scalars = exact.as<float>();
    const uint32_t key = rounding_key(7, step_);
    std::normal_distribution<double> normal(0.1, 1);
    for (int group = 0; group < kElements; group += kGroup) {
      uint32_t largest[2] = {0, 0}, draws[2][kGroup];
      for (int i = group; i < group + kGroup; ++i) {
        const double grad = deviations_[i] * normal(random_);
        moved_[i] = moved<float>(variant, scalars, grad, i, moments_);
        true_moved_[i] = moved<double>(variant, exact, grad, i, true_moments_);
        for (int s = 0; s < 2; ++s)
          largest[s] = larger(largest[s], as_bits(std::fabs(moments_[s][i])));
        const uint32_t own = own_draw(key, static_cast<uint64_t>(i));
        for (int s = 0; s < 2; ++s)
          draws[s][i - group] = draw_for(kFirstState + s, own) ^ as_bits(moments_[s][i]);
      }
      encode<SignedCode>(group, scale_of(largest[0]), moments_[0], draws_ ? draws[0] : nullptr);
      encode<PositiveCode>(group, scale_of(largest[1]), moments_[1], draws_ ? draws[1] : nullptr);
    }
  }

  template <class T, class Scalars, class Moments>
  static T moved(Adam::Variant variant, const Scalars& scalars, double grad, int i,
                 Moments& moments) {
    T param = 0, states[3] = {moments[0][i], moments[1][i], 0};
    Ieee math;
    Adam::update(variant, scalars, math, param, static_cast<T>(grad), states);
    for (int s = 0; s < 2; ++s) moments[s][i] = states[s];
    return param;
  }

  // What is left of the moments of a group once they have been kept.
  template <class Code>
  static void encode(int group, float scale, float* moments, const uint32_t* draws) {
    for (int i = 0; i < kGroup; ++i) {
      const float share = draws != nullptr ? threshold_shares<float>(draws[i], true) : 0.5f;
      float& moment = moments[group + i];
      const uint32_t code = code_of<Code>(moment, scale, share);
      moment = Code::template value<float>(code, scale);
    }
  }

  const bool draws_;
  HyperParams hyper_;
  uint64_t step_ = 0;
  std::mt19937 random_{1};
  double deviations_[kElements], true_moments_[2][kElements] = {}, true_moved_[kElements];
  float moments_[2][kElements] = {}, moved_[kElements];
};

void test_accuracy() {
  const auto print = [](const char* what, const Simulation::Found& found) {
    std::printf("%s: error %.3f, largest update %.2f, root %.3f\n", what, found.error,
                found.largest, found.root);
  };
  Simulation usual(0.5, true);
  const Simulation::Found steady = usual.run(), fallen = usual.run(0.1);
  print("steady", steady);
  print("after a fall", fallen);
  CHECK(steady.error < 0.07 && fallen.error < 0.07);
  CHECK(std::fabs(fallen.root - 1) < 0.01);
  // The grads of every second element fall. To nearest their second moments would stand still.
  for (const bool draws : {true, false}) {
    Simulation apart(0.5, draws);
    apart.run();
    const Simulation::Found found = apart.run(0.1, 2);
    print(draws ? "after half of them fell, drawn" : "after half of them fell, to nearest", found);
    CHECK(draws ? std::fabs(found.root - 1) < 0.02 && found.error < 0.08
                : found.root > 1.4 && found.error > 0.2);
  }
  const Simulation::Found wide = Simulation(1.0, true).run(), wider = Simulation(1.5, true).run();
  print("spread 1.0", wide);
  print("spread 1.5", wider);
  CHECK(wide.error < 0.12 && wider.error < 0.22 && wider.largest < 3);
}

void test_scales() {
  CHECK(scale_of(0) == 0);
  CHECK(scale_of(as_bits(0.7f)) == 0.7f);
  CHECK(scale_of(as_bits(1e-30f)) == 0x1p-88f);
  for (const uint32_t bits : {0x7f800000u, 0x7f800001u, 0x7fffffffu})
    CHECK(scale_of(bits) != scale_of(bits));
  CHECK(num_groups(0) == 0 && num_groups(1) == 1 && num_groups(64) == 1 && num_groups(65) == 2);
}

}  // namespace

void test_codes() {
  test_definition<SignedCode>();
  test_definition<PositiveCode>();
  test_values<SignedCode>();
  test_values<PositiveCode>();
  test_mean<SignedCode>();
  test_mean<PositiveCode>();
  test_scales();
  test_accuracy();
}
