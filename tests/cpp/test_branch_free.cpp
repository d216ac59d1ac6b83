// Square roots and divisions without branches, against IEEE's, whatever the last bits of the
// approximations they start from.
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

int g_ulps = 0;  // by which the approximations are off

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

void check_root(float x, bool must_be_exact) {
  BranchFree<Perturbed> math;
  const float root = math.sqrt(x);
  if (must_be_exact) CHECK(math.is_exact());
  if (math.is_exact()) CHECK(is_same(root, std::sqrt(x)));
}

// A mantissa of all ones is the one denominator whose reciprocal has to be right at the start: a
// correction then ends in a tie. GPUs have it right.
bool is_delicate(float denominator) {
  return g_ulps != 0 && (bit_cast<uint32_t>(denominator) & 0x7fffffu) == 0x7fffffu;
}

void check_quotient(float numerator, float denominator, bool must_be_exact) {
  if (is_delicate(denominator)) return;
  BranchFree<Perturbed> math;
  const float quotient = math.divide(numerator, denominator);
  if (must_be_exact) CHECK(math.is_exact());
  if (math.is_exact()) CHECK(is_same(quotient, numerator / denominator));
}

void roots_are_exact() {
  std::mt19937 random(1);
  for (int exponent = -126; exponent <= 127; ++exponent)
    for (int again = 0; again < 20; ++again)
      for (const uint32_t mantissa : mantissas(random))
        check_root(number(exponent, mantissa), exponent < 99);
  for (int i = 0; i < 300000; ++i) check_root(bit_cast<float>(uint32_t(random())), false);
}

void quotients_are_exact() {
  std::mt19937 random(2);
  for (int top = -126; top < 127; top += 3)
    for (int bottom = -70; bottom < 30; ++bottom)
      for (const uint32_t n : mantissas(random))
        for (const uint32_t d : mantissas(random)) {
          const bool must = top < 36 && bottom >= -60 && bottom < 22;
          check_quotient(number(top, n), number(bottom, d), must);
          check_quotient(-number(top, n), number(bottom, d), must);
        }
  for (int i = 0; i < 300000; ++i)
    check_quotient(bit_cast<float>(uint32_t(random())), bit_cast<float>(uint32_t(random())), false);
}

void rare_operands_are_found_or_exact() {
  const float inf = INFINITY, nan = NAN, subnormal = bit_cast<float>(1u);
  const float all[] = {0.0f, -0.0f, 1.0f, -1.0f,     0x1p-126f,  0x1p-60f, 0x1p22f, 0x1p36f,
                       inf,  -inf,  nan,  subnormal, -subnormal, 0x1p100f, 0x1p127f};
  for (const float x : all) check_root(x, false);
  for (const float n : all)
    for (const float d : all) check_quotient(n, d, false);
  check_root(0.0f, true);
  check_quotient(0.0f, 1e-8f, true);
  check_quotient(-0.0f, 1e-8f, true);
  for (const float x : {-1.0f, inf, nan, 0x1p101f}) {
    BranchFree<Perturbed> math;
    math.sqrt(x);
    CHECK(!math.is_exact());
    math.sqrt(1.0f);  // it stays cleared
    CHECK(!math.is_exact());
  }
  for (const float d : {0.0f, -1.0f, inf, nan, 0x1p22f, 0x1p-61f}) {
    BranchFree<Perturbed> math;
    math.divide(1.0f, d);
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
    rare_operands_are_found_or_exact();
  }
}
