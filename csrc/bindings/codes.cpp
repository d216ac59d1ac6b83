#include "bindings/codes.h"

#include <algorithm>

#include "bindings/weights.h"
#include "core/codes.h"

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
  ExactRoots math;
  for (int64_t begin = 0; begin < parts.count; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, parts.count);
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i)
      largest = larger(largest, as_bits(parts.values[i]) & 0x7fffffffu);
    const float scale = scale_of(largest);
    parts.scales[begin / kGroup] = scale;
    for (int64_t i = begin; i < end; ++i)
      parts.codes[i] =
          scale > 0 ? static_cast<uint8_t>(encoded<Code>(parts.values[i], scale, 0.5f, math)) : 0;
  }
}

template <class Code>
void decode(const CodeParts& parts) {
  for (int64_t i = 0; i < parts.count; ++i)
    parts.values[i] =
        Code::template value<float>(uint32_t{parts.codes[i]}, parts.scales[i / kGroup]);
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
