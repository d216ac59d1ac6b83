// Codes of 8 bits: each is what its definition says, for every magnitude and draw.

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

template <class Code>
constexpr bool kIsSigned = std::is_same_v<Code, SignedCode>;

// In the binade that begins at 2^33 2^binade, so many codes, after so many of those below.
struct Binade {
  int codes, below;
};
template <class Code>
Binade binade_of(int binade) {
  if (kIsSigned<Code>)
    return binade < 4 ? Binade{16, 16 * binade} : Binade{32, 64 + 32 * (binade - 4)};
  if (binade < 4) return {8, 8 * binade};
  if (binade < 6) return {16, 32 + 16 * (binade - 4)};
  return {32, 64 + 32 * (binade - 6)};
}

// The value of a code, over its scale.
template <class Code>
double level(uint32_t code) {
  const int number = static_cast<int>(kIsSigned<Code> ? code & 0x7f : code);
  int binade = 0;
  while (binade_of<Code>(binade + 1).below <= number) ++binade;
  const auto [codes, below] = binade_of<Code>(binade);
  const double place = std::ldexp(1 + static_cast<double>(number - below) / codes, 33 + binade);
  const double magnitude = (place - 0x1p33) / static_cast<double>(Code::kRange);
  return kIsSigned<Code> && (code & 0x80) != 0 ? -magnitude : magnitude;
}

template <class Code>
uint32_t code_by_definition(float value, float scale, uint32_t fraction) {
  const float units = Code::kRange / scale, magnitude = std::fabs(value);
  const float place =
      kIsSigned<Code> ? magnitude * units + 0x1p33f : std::fma(magnitude, units, 0x1p33f);
  int exponent;
  const double part = std::frexp(static_cast<double>(place), &exponent);
  const auto [codes, below] = binade_of<Code>(exponent - 34);
  const double position = below + codes * (2 * part - 1);
  auto code = static_cast<uint32_t>(position + std::ldexp(fraction, -24));
  CHECK(code <= (kIsSigned<Code> ? 127 : 255));
  if (!kIsSigned<Code> && value > 0) code = std::max(code, 1u);
  return kIsSigned<Code> && std::signbit(value) ? code | 0x80u : code;
}

template <class Code>
uint32_t code_of(float value, float scale, uint32_t fraction = kHalf) {
  Ieee math;
  return encoded<Code>(value, units_in<Code>(scale, math), fraction) >> 24;
}

template <class Code>
float value_of(uint32_t code, float scale) {
  return decoded<Code, float>(code, scale);
}

template <class Code>
void check_value(float value, float scale, uint32_t fraction) {
  for (const uint32_t each : {fraction, kHalf})
    CHECK(code_of<Code>(value, scale, each) == code_by_definition<Code>(value, scale, each));
}

constexpr uint32_t kLastFraction = 0xffffff;

template <class Code>
void test_definition() {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> exponent(-40, 0);
  for (const float scale : {1.0f, 0.3f, 7e-5f, 0x1p-80f, 3e38f, 0x1p-30f})
    for (int i = 0; i < 20000; ++i) {
      const float value = scale * (i % 2 == 0 ? std::exp2(exponent(random))
                                              : static_cast<float>(random()) * 0x1p-32f);
      check_value<Code>(kIsSigned<Code> && i % 3 == 0 ? -value : value, scale,
                        static_cast<uint32_t>(random()) & kLastFraction);
    }
  // At and beside what a code stands for, and at both ends of the draws.
  for (const float scale : {1.0f, 0.3f, 5e-19f, 3e38f})
    for (uint32_t code = 0; code <= (kIsSigned<Code> ? 127 : 255); ++code) {
      const float value = value_of<Code>(code, scale);
      CHECK(std::fabs(value - scale * level<Code>(code)) <= 3e-7 * value);
      for (const float near : {value, std::nextafter(value, 0.0f), std::nextafter(value, scale)})
        if (near <= scale)
          for (const uint32_t fraction : {0u, 1u, kHalf, kLastFraction - 1, kLastFraction})
            check_value<Code>(near, scale, fraction);
    }
  // The largest of a group has the last code, with all scales.
  for (int i = 0; i < 200000; ++i) {
    const float scale = as_float(0x17800000u + random() % 0x68000000u);
    CHECK(code_of<Code>(scale, scale) == (kIsSigned<Code> ? 127 : 255));
    CHECK(code_of<Code>(scale, scale, kLastFraction) == (kIsSigned<Code> ? 127 : 255));
  }
}

// To nearest, a code stays what it is; 0 is exact, and nothing above 0 becomes 0.
template <class Code>
void test_values() {
  for (const float scale : {1.0f, 0.3f, 5e-19f, 0x1p-80f})
    for (uint32_t code = 0; code < 256; ++code) {
      const float value = value_of<Code>(code, scale);
      CHECK((value == 0) == (code == 0 || (kIsSigned<Code> && code == 0x80)));
      CHECK(value == 0 || std::isnormal(value));
      CHECK(code_of<Code>(value, scale) == code);
    }
  for (const float tiny : {0x1p-149f, 0x1p-126f, 1e-30f})
    for (const uint32_t fraction : {0u, kHalf}) {
      CHECK(code_of<Code>(tiny, 1.0f, fraction) == (kIsSigned<Code> ? 0 : 1));
      CHECK(code_of<Code>(0.0f, 1.0f, kLastFraction) == 0);
    }
  if (kIsSigned<Code>) CHECK(code_of<Code>(-0.0f, 1.0f, kLastFraction) == 0x80);
  for (const float scale : {as_float(0x7f7fffffu), as_float(0x7f7ffffcu), 1.0f, 0x1.fffffep-80f})
    CHECK(value_of<Code>(kIsSigned<Code> ? 127 : 255, scale) <= scale);
  CHECK(std::isnan(value_of<Code>(0, __builtin_nanf(""))));
  CHECK(value_of<Code>(0, 0) == 0);
}

// The mean over all draws is the value.
template <class Code>
void test_mean() {
  constexpr uint32_t kApart = 1u << 8;
  for (float value = 0.99f; value > 0x1p-20f; value *= 0.93f) {
    if (!kIsSigned<Code> && value < value_of<Code>(1, 1.0f)) break;
    double sum = 0;
    uint32_t lowest = 255, highest = 0;
    for (uint32_t fraction = kApart / 2; fraction <= kLastFraction; fraction += kApart) {
      const uint32_t code = code_of<Code>(value, 1.0f, fraction);
      lowest = std::min(lowest, code);
      highest = std::max(highest, code);
      sum += value_of<Code>(code, 1.0f);
    }
    CHECK(highest - lowest <= 1);
    const float gap = value_of<Code>(lowest + 1, 1.0f) - value_of<Code>(lowest, 1.0f);
    CHECK(std::fabs(sum / 65536 - value) <= gap / 65536 + value * 1e-6);
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
          draws[s][i - group] = draw_for_code(kFirstState + s, own, as_bits(moments_[s][i]));
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
      float& moment = moments[group + i];
      moment =
          value_of<Code>(code_of<Code>(moment, scale, draws != nullptr ? draws[i] : kHalf), scale);
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
  CHECK(steady.error < 0.06 && fallen.error < 0.06);
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
  CHECK(wide.error < 0.12 && wider.error < 0.3 && wider.largest < 3);
}

void test_scales() {
  CHECK(scale_of(0) == 0);
  CHECK(scale_of(as_bits(0.7f)) == 0.7f);
  CHECK(scale_of(as_bits(1e-30f)) == 0x1p-80f);
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
