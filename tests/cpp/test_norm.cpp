// core/norm.h: bins, slices and what is made of their sums.
#include "check.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/dtypes.h"
#include "core/flush.h"
#include "core/norm.h"

using namespace fusedopt;

namespace {

// Adds a square's slices from this bin down.
template <class T>
void add(T grad, int bin, NormSums& sums) {
  Word<T> slices[kSlices<T>] = {}, seen = 0;
  add_square<T, false>(grad * norm_scale<T>(bin), slices, seen);
  for (int k = 0; k < kSlices<T>; ++k) bins_of<T>(sums)[bin - k] += slice_sum<T>(slices[k], 1, k);
}

template <class T>
int bin_of(T grad) {
  return own_bin<T>(as_bits(std::fabs(grad)));
}

// The own bin is the highest one with a slice, whatever the bin from which slices are taken, and
// every bin has the same slice then.
template <class T>
void test_slices(T grad) {
  const int own = bin_of(grad);
  NormSums expected = {};
  const Bins<T>& slices = bins_of<T>(expected);
  add(grad, own, expected);
  CHECK(own == -kTopBin<T> || slices[own] > 0);
  for (int k = 0; k < kSlices<T>; ++k)
    CHECK(std::llabs(slices[own - k]) <= 1 << (kSliceBits<T> - 1));
  for (int higher = 1; higher <= kSlices<T> && own + higher <= kTopBin<T>; ++higher) {
    NormSums sums = {};
    const Bins<T>& found = bins_of<T>(sums);
    add(grad, own + higher, sums);
    for (int bin = own + higher; bin > own; --bin) CHECK(found[bin] == 0);
    for (int bin = own; bin > own + higher - kSlices<T>; --bin) CHECK(found[bin] == slices[bin]);
  }
}

// A single grad's norm is the grad, but for what its square has lost.
template <class T>
void test_norm_of_one(T grad) {
  NormSums sums = {};
  add(grad, bin_of(grad), sums);
  const double norm = norm_of(sums, highest_bins(sums));
  CHECK(std::fabs(norm / std::fabs(grad) - 1) < std::ldexp(1.0, -FloatBits<T>::kMantissa));
}

template <class T>
void test_all_exponents() {
  const FlushMode flush(sizeof(T) == sizeof(float));
  const T smallest = std::numeric_limits<T>::min();
  std::mt19937 random(1);
  for (int exponent = 1 - FloatBits<T>::kBias; exponent <= FloatBits<T>::kBias; ++exponent) {
    const T power = power_of_two<T>(exponent), root = std::sqrt(T{2});
    std::vector<T> grads = {power, std::nextafter(power, T{0}), std::nextafter(power, 2 * power)};
    for (const T factor : {root, std::nextafter(root, T{0}), std::nextafter(root, T{2})})
      grads.push_back(power * factor);
    for (int i = 0; i < 50; ++i)
      grads.push_back(power * (1 + static_cast<T>(random()) / static_cast<T>(4294967296.0)));
    for (const T grad : grads) {
      if (!(std::fabs(grad) <= std::numeric_limits<T>::max())) continue;
      test_slices(grad);
      test_slices(-grad);
      if (grad >= smallest) test_norm_of_one(grad);
    }
  }
  test_slices(T{0});
}

// What a sum of squares is off by at the very worst: by 2^-44 of the largest for every square in
// float, by 2^-60 in double. The largest is at the lower border of its bin, and of all others there
// is just nothing to count, or as little as the grid can count.
template <class T>
void test_what_is_left_out() {
  constexpr int kCount = 65536, kDigits = kSliceBits<T> * (kSlices<T> - 1);
  const T large = bit_cast<T>(as_bits(std::sqrt(T{0.5})) + 1);
  const T border = std::sqrt(std::ldexp(T{1}, -kDigits - 1));
  for (const bool is_counted : {false, true}) {
    const T small = bit_cast<T>(as_bits(border) + (is_counted ? 1 : -1));
    NormSums sums = {};
    add(large, bin_of(large), sums);
    for (int i = 0; i < kCount; ++i) add(small, bin_of(large), sums);
    const double largest = static_cast<double>(large * large);
    const double others = kCount * static_cast<double>(small * small);
    const double norm = norm_of(sums, highest_bins(sums));
    const double error = std::fabs(norm * norm - largest - others);
    const double promised = kCount * std::ldexp(largest, -kDigits);
    CHECK(error < promised * 1.01 && error > promised * 0.99);
  }
}

// What float and double have, however far apart.
void test_both_types() {
  const auto norm = [](float a, double b) {
    NormSums sums = {};
    add(a, bin_of(a), sums);
    add(b, bin_of(b), sums);
    return norm_of(sums, highest_bins(sums));
  };
  for (int i = -120; i <= 120; i += 3)
    for (int j = -1020; j <= 1020; j += 5) {
      const float a = std::ldexp(1.25f, i);
      const double b = std::ldexp(1.5, j);
      CHECK(std::fabs(norm(a, b) / std::hypot(a, b) - 1) < 1e-15);
      CHECK(norm(0, b) == b && norm(a, 0) == a);
    }
  CHECK(norm(0, 0) == 0);
}

// The short way to the slices of 16-bit grads is the same as the long one, and sees the same ones
// that are too large, whatever it has seen before.
template <class Storage>
void test_exact_squares() {
  const FlushMode flush(true);
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const float grad = load<float>(bit_cast<Storage>(static_cast<uint16_t>(bits)));
    if (!std::isfinite(grad)) continue;
    for (int bin = -kTopBin<float>; bin <= kTopBin<float>; ++bin) {
      const float scaled = grad * norm_scale<float>(bin);
      uint32_t expected[kSlices<float>] = {}, found[kSlices<float>] = {};
      uint32_t largest = 0, seen = kMostSeen<float, true>;
      add_square<float, false>(scaled, expected, largest);
      add_square<float, true>(scaled, found, seen);
      const bool is_large = largest > kMostSeen<float, false>;
      CHECK((seen > kMostSeen<float, true>) == is_large);
      if (!is_large) CHECK(std::memcmp(found, expected, sizeof(found)) == 0);
    }
  }
}

void test_what_is_not_finite() {
  NormSums sums = {};
  add(3.0f, bin_of(3.0f), sums);
  add(4.0, bin_of(4.0), sums);
  const auto status = [&](bool found_inf, bool clips) {
    return finalize_norm(sums, highest_bins(sums), 2.0, found_inf, clips);
  };
  CHECK(status(false, true).grad_norm == 2.5 && status(false, true).skip == 0);
  CHECK(status(true, false).skip == 1);
  sums.infinite = 2;
  CHECK(status(false, false).grad_norm == HUGE_VAL && status(false, false).skip == 1);
  sums.nan = 1;
  CHECK(std::isnan(status(false, false).grad_norm) && status(false, false).nonfinite == 3);
}

}  // namespace

void test_norm() {
  test_all_exponents<float>();
  test_all_exponents<double>();
  test_what_is_left_out<float>();
  test_what_is_left_out<double>();
  test_both_types();
  test_exact_squares<BFloat16>();
  test_exact_squares<Float16>();
  test_what_is_not_finite();
}
