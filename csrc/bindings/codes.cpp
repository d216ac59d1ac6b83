#include "bindings/codes.h"

#include <algorithm>

#include "bindings/weights.h"
#include "core/codes.h"
#include "core/element.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

struct CodeParts {
  References held;
  float* values;
  uint8_t* codes;
  float* scales;
  bool are_signed;
  int64_t count;

  CodeParts(py::handle values_tensor, py::handle codes_tensor, py::handle scales_tensor) {
    are_signed = py::object(codes_tensor.attr("is_signed")()).cast<bool>();
    const TensorView numbers = view_on_cpu(values_tensor, DType::kFloat32, held);
    const TensorView small =
        view_on_cpu(codes_tensor, are_signed ? DType::kRemainder8 : DType::kPositiveCodes, held);
    const TensorView large = view_on_cpu(scales_tensor, DType::kFloat32, held);
    count = count_elements(numbers);
    if (count_elements(small) != count || count_elements(large) != num_groups(count))
      throw py::value_error("values, codes and scales differ in size");
    values = static_cast<float*>(numbers.data);
    codes = static_cast<uint8_t*>(small.data);
    scales = static_cast<float*>(large.data);
  }
};

template <class Code>
void encode(const CodeParts& parts) {
  Ieee math;
  for (int64_t begin = 0; begin < parts.count; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, parts.count);
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i)
      largest = larger(largest, as_bits(parts.values[i]) & 0x7fffffffu);
    const float scale = scale_of(largest);
    parts.scales[begin / kGroup] = scale;
    const float units = units_in<Code>(scale, math);
    for (int64_t i = begin; i < end; ++i) {
      // What is never negative in a step may be so in what a user loads.
      const float value = Code::kHasSign ? parts.values[i] : larger(parts.values[i], 0.0f);
      parts.codes[i] =
          scale > 0 ? static_cast<uint8_t>(encoded<Code>(value, units, kHalf) >> 24) : 0;
    }
  }
}

template <class Code>
void decode(const CodeParts& parts) {
  for (int64_t i = 0; i < parts.count; ++i)
    parts.values[i] = decoded<Code, float>(uint32_t{parts.codes[i]}, parts.scales[i / kGroup]);
}

}  // namespace

void encode(py::handle values, py::handle codes, py::handle scales) {
  const CodeParts parts(values, codes, scales);
  parts.are_signed ? encode<SignedCode>(parts) : encode<PositiveCode>(parts);
}

void decode(py::handle codes, py::handle scales, py::handle values) {
  const CodeParts parts(values, codes, scales);
  parts.are_signed ? decode<SignedCode>(parts) : decode<PositiveCode>(parts);
}

}  // namespace fusedopt
