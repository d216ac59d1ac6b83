// Square roots and divisions without branches give the results of IEEE 754, or say that they do
// not, even if the approximations that they start from are off in their last bits.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/bits.h"
#include "core/branch_free.h"
#include "core/flush.h"

namespace fusedopt {
namespace {

int g_ulps = 0;  // error of the approximations, in units of the last place

float moved(float x) {
  if (!(std::fabs(x) > 0) || std::isinf(x)) return x;
  return bit_cast<float>(bit_cast<uint32_t>(x) + static_cast<uint32_t>(g_ulps));
}

struct Perturbed {
  static float reciprocal(float x) { return moved(1 / x); }
  static float reciprocal_root(float x) {
    return moved(static_cast<float>(1 / std::sqrt(double{x})));
  }
};

// Mantissas near all zeros and all ones, and random ones.
std::vector<uint32_t> mantissas(std::mt19937& random) {
  std::vector<uint32_t> found;
  for (uint32_t i = 0; i < 4; ++i) {
    found.push_back(i);
    found.push_back(0x7fffffu - i);
    found.push_back(0x400000u + i);
    found.push_back(random() & 0x7fffffu);
  }
  return found;
}

float number(int exponent, uint32_t mantissa) {
  return bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23 | mantissa);
}

bool is_same(float a, float b) { return bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b); }

// Denominators with a mantissa of all ones are the only ones whose approximate reciprocal has to be
// exact, because a correction ends in a tie. GPUs give it exactly.
bool is_delicate(float denominator) {
  return g_ulps != 0 && (bit_cast<uint32_t>(denominator) & 0x7fffffu) == 0x7fffffu;
}

void check_root(float x) { CHECK(is_same(BranchFree<Perturbed>::root(x), std::sqrt(x))); }

void check_quotient(float numerator, float denominator) {
  if (is_delicate(denominator)) return;
  CHECK(is_same(BranchFree<Perturbed>::quotient(numerator, denominator), numerator / denominator));
}

void check_both(float numerator, float square, float eps, bool must_be_exact) {
  const float denominator = std::sqrt(square) + eps;
  if (is_delicate(denominator)) return;
  BranchFree<Perturbed> math;
  const float found = math.divide_by_root(numerator, square, eps);
  if (must_be_exact) CHECK(math.is_exact());
  if (math.is_exact()) CHECK(is_same(found, numerator / denominator));
}

void check_division(float numerator, float denominator, bool must_be_exact) {
  if (is_delicate(denominator)) return;
  BranchFree<Perturbed> math;
  const float found = math.divide(numerator, denominator);
  if (must_be_exact) CHECK(math.is_exact());
  if (math.is_exact()) CHECK(is_same(found, numerator / denominator));
}

void check_root_of(float square, bool must_be_exact) {
  BranchFree<Perturbed> math;
  const float found = math.root_of(square);
  if (must_be_exact) CHECK(math.is_exact());
  if (math.is_exact()) CHECK(is_same(found, std::sqrt(square)));
}

void roots_are_exact() {
  std::mt19937 random(1);
  for (int exponent = -101; exponent <= 127; ++exponent)
    for (int again = 0; again < 20; ++again)
      for (const uint32_t mantissa : mantissas(random)) check_root(number(exponent, mantissa));
}

void quotients_are_exact() {
  std::mt19937 random(2);
  for (int top = -68; top < 127; top += 3)
    for (int bottom = -40; bottom < 100; bottom += 2)
      for (const uint32_t n : mantissas(random))
        for (const uint32_t d : mantissas(random)) {
          if (top - bottom < -96 || top - bottom > 124) continue;
          check_quotient(number(top, n), number(bottom, d));
          check_quotient(-number(top, n), number(bottom, d));
        }
}

void ratios_are_exact() {
  std::mt19937 random(3);
  for (const float eps :
       {0.0f, 0x1p-126f, 1e-30f, 1e-20f, 0x1p-67f, 1e-15f, 1e-8f, 1e-3f, 1.0f, 1e6f, 0x1p80f})
    for (int top = -126; top < 127; top += 5)
      for (int bottom = -126; bottom < 127; bottom += 4)
        for (const uint32_t n : mantissas(random)) {
          const float numerator = number(top, n), square = number(bottom, random() & 0x7fffffu);
          const double ratio =
              std::fabs(double{numerator}) / (std::sqrt(double{square}) + double{eps});
          const bool must = top < 69 && bottom < 67 && ratio < 0x1p96;
          check_both(numerator, square, eps, must);
          check_both(-numerator, square, eps, must);
        }
  for (int i = 0; i < 300000; ++i)
    check_both(bit_cast<float>(uint32_t(random())), std::fabs(bit_cast<float>(uint32_t(random()))),
               i % 2 != 0 ? 1e-8f : std::fabs(bit_cast<float>(uint32_t(random()))), false);
}

// Every combination of exponents: also of numbers that are flushed, at once or on the way, that
// overflow, and that are not finite.
void divisions_are_exact_or_found() {
  std::mt19937 random(4);
  for (int top = -127; top <= 128; ++top)
    for (int bottom = -127; bottom <= 128; ++bottom)
      for (int i = 0; i < 6; ++i) {
        const std::vector<uint32_t> kinds = {0, 1, 0x7fffff, uint32_t(random() & 0x7fffff)};
        const float n = number(top, kinds[random() % 4]), d = number(bottom, kinds[random() % 4]);
        const bool must = top < 68 && bottom > -127 && bottom < 97 && top - bottom < 68;
        check_division(n, d, must);
        check_division(-n, d, must);
      }
  // Quotients at the end of what is not flushed.
  for (int bottom = -126; bottom < 97; ++bottom)
    for (const int below : {125, 126, 127})
      for (const uint32_t n : mantissas(random))
        for (const uint32_t d : mantissas(random))
          if (bottom - below >= -126 && bottom - below < 68)
            check_division(number(bottom - below, n), number(bottom, d), true);
  for (int i = 0; i < 300000; ++i)
    check_division(bit_cast<float>(uint32_t(random())),
                   std::fabs(bit_cast<float>(uint32_t(random()))), false);
  for (const float d : {0.0f, -0.0f, 0x1p-127f, 0x1p97f, 0x1p127f, INFINITY, NAN})
    for (const float n : {0.0f, -0.0f, 1.0f, -0x1p-126f, 0x1p60f, INFINITY, NAN}) {
      BranchFree<Perturbed> math;
      math.divide(n, d);
      CHECK(!math.is_exact());
      math.divide(1.0f, 1.0f);
      CHECK(!math.is_exact());
    }
}

void roots_of_all_are_exact_or_found() {
  std::mt19937 random(5);
  for (int exponent = -126; exponent <= 127; ++exponent)
    for (int again = 0; again < 20; ++again)
      for (const uint32_t mantissa : mantissas(random))
        check_root_of(number(exponent, mantissa), exponent < 68);
  // Where the approximation is off by as much as a unit, so are ten roots of all of two binades.
  for (int i = 0; i < 300000 && g_ulps == 0; ++i)
    check_root_of(bit_cast<float>(uint32_t(random())), false);
  for (const float rare : {0.0f, -0.0f, 0x1p-127f, -0x1p-127f, -1.0f, 0x1p68f, INFINITY, NAN}) {
    BranchFree<Perturbed> math;
    math.root_of(rare);
    CHECK(!math.is_exact());
    math.root_of(1.0f);
    CHECK(!math.is_exact());
  }
}

void rare_operands_are_found_or_exact() {
  const float inf = INFINITY, nan = NAN, subnormal = bit_cast<float>(1u);
  const float all[] = {0.0f, -0.0f, 1.0f, -1.0f,     0x1p-126f,  0x1p-60f, 0x1p22f, 0x1p69f,
                       inf,  -inf,  nan,  subnormal, -subnormal, 0x1p100f, 0x1p127f};
  for (const float n : all)
    for (const float square : all)
      for (const float eps : all) check_both(n, square, eps, false);
  // Grads and states are 0 where nothing has been learnt for a while.
  for (const float eps : {1e-8f, 1e-15f, 0x1p-67f, 1.0f})
    for (const float n : {0.0f, -0.0f, 1.0f, 0x1p-126f, -0x1p-126f}) {
      check_both(n, 0.0f, eps, n * n < 1e20f * eps);
      check_both(n, 0x1p-126f, eps, true);
    }
  const struct {
    float numerator, square, eps;
  } rare[] = {{1, 1, -1},      {1, -1, 1},  {1, inf, 1},     {1, nan, 1},  {inf, 1, 1},
              {nan, 1, 1},     {1, 1, inf}, {1, 1, nan},     {1, 0, 0},    {1, 1, 0x1p96f},
              {1, 0x1p80f, 1}, {0, 0, 0},   {0x1p75f, 1, 1}, {1, -0.0f, 0}};
  for (const auto& r : rare) {
    BranchFree<Perturbed> math;
    math.divide_by_root(r.numerator, r.square, r.eps);
    CHECK(!math.is_exact());
    math.divide_by_root(1.0f, 1.0f, 1.0f);  // an exact result does not clear the flag
    CHECK(!math.is_exact());
  }
}

void flush_modes_are_put_back() {
  volatile float small = 0x1p-126f;
  const FlushMode outer(false);
  CHECK(small * 0.5f != 0);
  {
    const FlushMode inner(true);
#if defined(__x86_64__) || defined(__aarch64__)
    CHECK(small * 0.5f == 0);
#endif
  }
  CHECK(small * 0.5f != 0);
}

}  // namespace
}  // namespace fusedopt

void test_branch_free() {
  using namespace fusedopt;
  flush_modes_are_put_back();
  const FlushMode flush(true);
  for (g_ulps = -2; g_ulps <= 2; ++g_ulps) {
    roots_are_exact();
    quotients_are_exact();
    ratios_are_exact();
    divisions_are_exact_or_found();
    roots_of_all_are_exact_or_found();
    rare_operands_are_found_or_exact();
  }
}
