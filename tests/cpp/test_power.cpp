// power() and real_power() against the long double pow() of the library.
#include "check.h"

#include "core/power.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <random>
#include <vector>

using namespace fusedopt;

namespace {

constexpr uint64_t kLast = uint64_t{1} << 53;  // the last step that a double counts to

double ulp_of(double value) { return std::nextafter(value, 2.0) - value; }

void check_near(double base, uint64_t exponent) {
  const auto expected = static_cast<double>(
      std::pow(static_cast<long double>(base), static_cast<long double>(exponent)));
  CHECK(std::fabs(power(base, exponent) - expected) <= ulp_of(expected));
}

// The steps of a training, and those around every power of two.
std::vector<uint64_t> exponents() {
  std::vector<uint64_t> all = {kLast};
  for (uint64_t i = 0; i < 300; ++i) all.push_back(i);
  for (uint64_t power_of_two = 512; power_of_two < kLast; power_of_two *= 2)
    for (const uint64_t i : {power_of_two - 1, power_of_two, power_of_two + 1}) all.push_back(i);
  return all;
}

void test_exact() {
  for (const uint64_t exponent : exponents()) {
    CHECK(power(1.0, exponent) == 1.0);
    CHECK(power(0.0, exponent) == (exponent == 0 ? 1.0 : 0.0));
    const int halvings = static_cast<int>(std::min<uint64_t>(exponent, 2000));
    CHECK(power(0.5, exponent) == std::ldexp(1.0, -halvings));
  }
  CHECK(power(0.3, 0) == 1.0 && power(0.3, 1) == 0.3);
}

void test_near() {
  for (const double base : {1e-300, 1e-9, 0.1, 0.25, 0.4, 0.9, 0.95, 0.99, 0.999, 0.9999,
                            1 - std::ldexp(1.0, -20), 1 - std::ldexp(1.0, -40)})
    for (const uint64_t exponent : exponents()) check_near(base, exponent);
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform;
  for (int run = 0; run < 20000; ++run) {
    // Results of every magnitude: base = 1 - x with x exponent up to a few hundred.
    const uint64_t exponent = random() >> (12 + random() % 52);
    const double most = 700.0 / (static_cast<double>(exponent) + 700.0);
    check_near(1 - most * uniform(random), exponent);
  }
}

// Bias corrections end at 1 and stay there.
void test_underflow() {
  for (const double base : {0.1, 0.9, 0.999}) {
    const auto start = static_cast<uint64_t>(-690 / std::log(base));
    double last = power(base, start);
    CHECK(last > 0);
    for (uint64_t exponent = start + 1; exponent < start + start / 12 + 10; ++exponent) {
      const double next = power(base, exponent);
      CHECK(next <= last && next >= 0);
      last = next;
    }
    CHECK(last == 0);
    for (const uint64_t exponent : {2 * start, kLast, ~uint64_t{0}})
      CHECK(power(base, exponent) == 0);
  }
}

void check_real(double base, double exponent) {
  const long double expected =
      std::pow(static_cast<long double>(base), static_cast<long double>(exponent));
  const double log = std::fabs(exponent * std::log(base));
  const double lost = static_cast<double>(std::fabs(real_power(base, exponent) / expected - 1));
  CHECK(lost <= 1e-15 * (1 + log));
}

void test_real_near() {
  const double inner = std::sqrt(0.5), outer = std::sqrt(2.0);
  const double bases[] = {5e-324,
                          1e-300,
                          1e-9,
                          0.1,
                          0.5,
                          std::nextafter(inner, 0.0),
                          inner,
                          std::nextafter(inner, 1.0),
                          0.96,
                          1 - 1e-9,
                          std::nextafter(1.0, 0.0),
                          std::nextafter(1.0, 2.0),
                          1 + 1e-9,
                          1.0001,
                          std::nextafter(outer, 0.0),
                          outer,
                          std::nextafter(outer, 2.0),
                          2,
                          3,
                          1e9,
                          1e300,
                          0x1.fffffffffffffp1023};
  for (const double base : bases)
    for (const double exponent : {1e-300, 1e-9, 0.004, 0.5, 0.75, 1.0, 2.0, 17.5, 1e6, 1e12})
      for (const double sign : {1.0, -1.0})
        if (std::fabs(exponent * std::log(base)) < 699) check_real(base, sign * exponent);
  std::mt19937_64 random(2);
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (int run = 0; run < 20000; ++run) {
    const double base = std::exp(700 * std::pow(uniform(random), 1 + 2 * (run % 5)));
    check_real(base, 699 * uniform(random) / std::max(std::fabs(std::log(base)), 1e-9));
  }
}

void test_real_edges() {
  for (const double exponent : {0.0, -0.0, 0.75, -3.0, 1e308, -1e308})
    CHECK(real_power(1.0, exponent) == 1);
  for (const double base : {5e-324, 1e-300, 0.3, 1.0, 7.0, 1e308}) {
    CHECK(real_power(base, 0.0) == 1 && real_power(base, -0.0) == 1);
    CHECK(std::isnan(real_power(base, NAN)));
  }
  // Nothing decays, and nothing grows: a learning rate of ASGD for every step there may be.
  CHECK(real_power(2.0, 1024) == HUGE_VAL && real_power(0.5, -1e300) == HUGE_VAL);
  CHECK(real_power(2.0, -1100) == 0 && real_power(0.5, 1e300) == 0);
  CHECK(real_power(2.0, HUGE_VAL) == HUGE_VAL && real_power(2.0, -HUGE_VAL) == 0);
  CHECK(real_power(0.0, 0.75) == 0);
  for (const double base : {-1.0, -1e-300, -HUGE_VAL, static_cast<double>(NAN)})
    CHECK(std::isnan(real_power(base, 2.0)));
  // It falls where the exponent of a base below 1 grows, also where the series begin anew.
  double last = 1;
  for (int i = 1; i < 4000; ++i) {
    const double next = real_power(0.96, 0.25 * i);
    CHECK(next < last && next > 0);
    last = next;
  }
}

}  // namespace

void test_power() {
  test_exact();
  test_near();
  test_underflow();
  test_real_near();
  test_real_edges();
}
