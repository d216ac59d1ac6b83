// All 65536 patterns of the 16-bit formats, and the rounding between every two neighbours.
#include "check.h"

#include "core/dtypes.h"
#include "core/weight.h"

#include <cmath>
#include <initializer_list>
#include <limits>

using namespace fusedopt;

namespace {

// The number that a bit pattern means, from the format's definition alone. Infinity is read as the
// power of two that would come after the largest number: for rounding, it lies there.
double value_of(int pattern, int mantissa_bits, int exponent_bits) {
  const int mantissa = pattern & ((1 << mantissa_bits) - 1);
  const int exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                    : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return pattern & 0x8000 ? -magnitude : magnitude;
}

template <class Storage>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int kMantissa = 7, kExponent = 8;
};
template <>
struct Format<Float16> {
  static constexpr int kMantissa = 10, kExponent = 5;
};

template <class Storage>
constexpr int kInfinity = 0x7fff & ~((1 << Format<Storage>::kMantissa) - 1);

template <class Storage>
double reference(int pattern) {
  return value_of(pattern, Format<Storage>::kMantissa, Format<Storage>::kExponent);
}

template <class Storage, class T>
int encode(T value) {
  Storage stored;
  store(stored, value);
  return stored.bits;
}

template <class Storage>
void test_every_pattern() {
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const Storage stored = {static_cast<uint16_t>(pattern)};
    const float value = load<float>(stored);
    const int magnitude = pattern & 0x7fff;
    if (magnitude > kInfinity<Storage>) {
      CHECK(std::isnan(value));
      CHECK((encode<Storage>(value) & 0x7fff) > kInfinity<Storage>);  // never inf, never -0.0
    } else {
      if (magnitude == kInfinity<Storage>)
        CHECK(std::isinf(value));
      else
        CHECK(value == reference<Storage>(pattern));
      CHECK(std::signbit(value) == (pattern >= 0x8000));
      CHECK(encode<Storage>(value) == pattern);
      CHECK(encode<Storage>(static_cast<double>(value)) == pattern);
      CHECK(load<double>(stored) == static_cast<double>(value));
    }
  }
}

// Between every two neighbours: the midpoint is rounded to the even one, the floats beside it to
// the nearer one.
template <class Storage>
void test_every_midpoint() {
  for (int low = 0; low < kInfinity<Storage>; ++low) {
    const int high = low + 1;
    const auto middle =
        static_cast<float>((reference<Storage>(low) + reference<Storage>(high)) / 2);
    const int even = low % 2 == 0 ? low : high;
    const float below = std::nextafterf(middle, 0.0f);
    const float above = std::nextafterf(middle, std::numeric_limits<float>::infinity());
    CHECK(encode<Storage>(middle) == even && encode<Storage>(-middle) == (even | 0x8000));
    CHECK(encode<Storage>(below) == low && encode<Storage>(-below) == (low | 0x8000));
    CHECK(encode<Storage>(above) == high && encode<Storage>(-above) == (high | 0x8000));
  }
}

// Floats of every exponent: the result is the nearest of the result and its two neighbours.
template <class Storage>
void test_nearest() {
  for (uint64_t bits = 0; bits < 0x7f800000u; bits += 1021) {
    const double value = bit_cast<float>(static_cast<uint32_t>(bits));
    const int found = encode<Storage>(static_cast<float>(value));
    CHECK(found <= kInfinity<Storage>);
    const double error = std::fabs(reference<Storage>(found) - value);
    if (found > 0) CHECK(error <= std::fabs(reference<Storage>(found - 1) - value));
    if (found < kInfinity<Storage>)
      CHECK(error <= std::fabs(reference<Storage>(found + 1) - value));
  }
}

void test_float_nans() {
  for (uint32_t payload = 1; payload < 0x800000u; payload += 997) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const float nan = bit_cast<float>(0x7f800000u | sign | payload);
      CHECK((encode<BFloat16>(nan) & 0x7fff) > kInfinity<BFloat16>);
      CHECK((encode<Float16>(nan) & 0x7fff) > kInfinity<Float16>);
    }
  }
}

void test_wide_formats() {
  float narrow = 0;
  store(narrow, 0.1);
  CHECK(narrow == 0.1f);
  double wide = 0;
  store(wide, 0.1);
  CHECK(wide == 0.1 && load<double>(wide) == 0.1);
  CHECK(load<double>(0.1f) == static_cast<double>(0.1f));
}

// Beside any remainder, no number becomes NaN; a param of 0 is 0, or subnormal, which counts as 0.
void test_params_that_were_written_to() {
  for (uint32_t upper = 0; upper <= 0xffffu; ++upper)
    for (const uint32_t remainder :
         {0x8000u, 0x8001u, 0xff00u, 0xffffu, 0u, 1u, 0x7f00u, 0x7fffu}) {
      const float param = bit_cast<float>(upper << 16);
      const uint32_t byte = remainder & 0xff00u;
      for (const float joined : {join_weight(param, remainder),
                                 join_weight8(param, byte >= 0x8000u ? byte - 0x10000u : byte)}) {
        CHECK((joined != joined) == (param != param));
        if (param == 0) CHECK(std::fabs(joined) < 0x1p-126f);
      }
    }
}

// A float and its two halves, for all exponents, signs and lower halves.
void test_split_weights() {
  for (uint64_t pattern = 0; pattern <= 0xffffffffu; pattern += 251) {
    const float weight = bit_cast<float>(static_cast<uint32_t>(pattern));
    const SplitWeight<float> parts = split_weight(weight);
    CHECK((as_bits(parts.param) & 0xffffu) == 0);  // it is a bfloat16
    const auto remainder = static_cast<int32_t>(parts.remainder);
    CHECK(remainder >= -0x8000 && remainder <= 0x7fff);
    const float joined = join_weight(parts.param, parts.remainder);
    // Only the lower half of the remainder's word is stored.
    const float joined_again = join_weight(parts.param, (parts.remainder & 0xffffu) | 0x12340000u);
    CHECK(as_bits(joined_again) == as_bits(joined));
    if (weight != weight) {
      CHECK(joined != joined && parts.param != parts.param);
      continue;
    }
    CHECK(as_bits(joined) == pattern);
    if (std::isinf(weight) || std::isinf(parts.param)) continue;
    // Neither neighbour of the param is nearer, and of two equally near ones it is the larger in
    // magnitude.
    const auto param = static_cast<uint16_t>(as_bits(parts.param) >> 16);
    const double distance = std::fabs(static_cast<double>(weight) - parts.param);
    for (const int step : {-1, 1}) {
      const auto bits = static_cast<uint16_t>(param + step);
      if ((bits & 0x7fffu) == 0x7fffu || (bits ^ param) >> 15 != 0) continue;
      const double neighbour = load<double>(BFloat16{bits});
      const double other = std::fabs(static_cast<double>(weight) - neighbour);
      CHECK(distance < other ||
            (distance == other && std::fabs(neighbour) < std::fabs(parts.param)));
    }
  }
}

// Rounded to 24 bits, by each of the draws that there are: one of the two neighbours, in the mean
// right, and what has 24 bits stays. NaNs stay NaNs, and nothing finite becomes infinite.
void test_weights_of_24_bits() {
  for (uint64_t pattern = 0; pattern <= 0xffffffffu; pattern += 65521) {
    const float weight = bit_cast<float>(static_cast<uint32_t>(pattern));
    const float nearest = nearest_of_24_bits(weight);
    if (weight != weight) {
      CHECK(nearest != nearest || (pattern & 0x7fff00u) == 0);  // which arithmetic does not give
      continue;
    }
    CHECK((as_bits(nearest) & 0xffu) == 0);
    CHECK(std::isinf(nearest) == std::isinf(weight));
    const float down = bit_cast<float>(static_cast<uint32_t>(pattern) & 0xffffff00u);
    uint32_t ups = 0;
    for (uint32_t draw = 0; draw < 256; ++draw) {
      const float rounded = round_to_24_bits(weight, draw);
      CHECK(as_bits(rounded) == as_bits(down) || as_bits(rounded) == as_bits(down) + 0x100u);
      ups += rounded != down ? 1 : 0;
    }
    const bool is_largest = (pattern & 0x7fffff00u) == 0x7f7fff00u;
    CHECK(is_largest || ups == (pattern & 0xffu));
    const uint32_t lost = static_cast<uint32_t>(pattern) & 0xffu;
    if (lost != 0x80u && !is_largest) CHECK((nearest != down) == (lost > 0x80u));
  }
}

template <class T>
void test_storage(DType dtype, int64_t size) {
  int64_t found = 0;
  with_storage<T>(dtype, [&](auto storage) { found = sizeof(storage); });
  CHECK(item_size(dtype) == size && found == size);
}

void test_descriptions() {
  test_storage<double>(DType::kFloat32, 4);
  test_storage<double>(DType::kFloat64, 8);
  test_storage<double>(DType::kBFloat16, 2);
  test_storage<double>(DType::kFloat16, 2);
  test_storage<float>(DType::kFloat32, 4);
  test_storage<float>(DType::kBFloat16, 2);
  test_storage<float>(DType::kFloat16, 2);
  CHECK(item_size(DType::kRemainder) == 2 && item_size(DType::kAbsent) == 0);
  CHECK(master_of(DType::kAbsent) == Master::kNone);
  CHECK(master_of(DType::kFloat32) == Master::kFloat32);
  CHECK(item_size(DType::kRemainder8) == 1);
  for (const Master master : {Master::kNone, Master::kFloat32, Master::kSplit, Master::kSplit8})
    CHECK(master_of(dtype_of(master)) == master);
}

}  // namespace

void test_dtypes() {
  test_every_pattern<BFloat16>();
  test_every_pattern<Float16>();
  test_every_midpoint<BFloat16>();
  test_every_midpoint<Float16>();
  test_nearest<BFloat16>();
  test_nearest<Float16>();
  test_float_nans();
  test_wide_formats();
  test_params_that_were_written_to();
  test_split_weights();
  test_weights_of_24_bits();
  test_descriptions();
}
