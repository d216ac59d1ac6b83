// core/norm.h: bins, slices and what is made of their sums.
#include "check.h"

#include <cmath>
#include <cstring>
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
  Word<T> slices[kSlices] = {};
  add_slices<T>(scaled_square(grad, norm_scale<T>(bin)), slices);
  for (int k = 0; k < kSlices; ++k) sums.bins[bin_index(bin - k)] += slice_sum<T>(slices[k], 1, k);
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
  add(grad, own, expected);
  CHECK(own == -kTopBin<T> || expected.bins[bin_index(own)] > 0);
  for (int k = 0; k < kSlices; ++k)
    CHECK(std::llabs(expected.bins[bin_index(own - k)]) <= 1 << (kSliceBits - 1));
  for (int higher = 1; higher <= kSlices && own + higher <= kTopBin<T>; ++higher) {
    NormSums found = {};
    add(grad, own + higher, found);
    for (int bin = own + higher; bin > own; --bin) CHECK(found.bins[bin_index(bin)] == 0);
    for (int bin = own; bin > own + higher - kSlices; --bin)
      CHECK(found.bins[bin_index(bin)] == expected.bins[bin_index(bin)]);
  }
}

// A single grad's norm is the grad, but for what its square has lost.
template <class T>
void test_norm_of_one(T grad) {
  NormSums sums = {};
  add(grad, bin_of(grad), sums);
  const double norm = norm_of(sums, top_bin(sums));
  CHECK(std::fabs(norm / std::fabs(grad) - 1) < std::ldexp(1.0, -FloatBits<T>::kMantissa));
}

template <class T>
void test_all_exponents() {
  const FlushMode flush(sizeof(T) == sizeof(float));
  const int lowest = -kGradBits * kTopBin<T>;  // below, digits are lost
  std::mt19937 random(1);
  for (int exponent = lowest; exponent <= FloatBits<T>::kBias; ++exponent) {
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
      if (exponent > lowest) test_norm_of_one(grad);
    }
  }
  test_slices(T{0});
}

// The short way to the slices of 16-bit grads is the same as the long one, and sees the same ones
// that are too large.
template <class Storage>
void test_exact_squares() {
  const FlushMode flush(true);
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const float grad = load<float>(bit_cast<Storage>(static_cast<uint16_t>(bits)));
    if (!std::isfinite(grad)) continue;
    for (int bin = -kTopBin<float>; bin <= kTopBin<float>; ++bin) {
      const float scaled = grad * norm_scale<float>(bin), square = scaled * scaled;
      uint32_t expected[kSlices] = {}, found[kSlices] = {};
      add_slices<float>(square, expected);
      const bool is_large = add_exact_slices<float>(scaled, found) > kLargestFirst<float>;
      CHECK(is_large == (as_bits(square) > kLargestSquare<float>));
      if (!is_large) CHECK(std::memcmp(found, expected, sizeof(found)) == 0);
    }
  }
}

void test_what_is_not_finite() {
  NormSums sums = {};
  add(3.0f, bin_of(3.0f), sums);
  add(4.0, bin_of(4.0), sums);
  const auto status = [&](bool found_inf, bool clips) {
    return finalize_norm(sums, top_bin(sums), 2.0, found_inf, clips);
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
  test_exact_squares<BFloat16>();
  test_exact_squares<Float16>();
  test_what_is_not_finite();
}
