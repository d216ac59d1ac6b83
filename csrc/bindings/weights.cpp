#include "bindings/weights.h"

#include "bindings/dlpack_abi.h"
#include "bindings/memory.h"
#include "bindings/torch_api.h"
#include "core/narrow.h"
#include "core/weight.h"

namespace py = pybind11;

namespace fusedopt {

TensorView view_on_cpu(py::handle tensor, DType dtype, References& held) {
  TensorView view;
  if (!is_tensor(tensor.ptr()) || !read_tensor(tensor.ptr(), view, held) || !view.is_supported ||
      view.dtype != dtype || view.is_complex || view.device_type != kDlCpu ||
      !is_contiguous(view) || contents_of(view.memory, view) != Contents::kValues)
    throw py::value_error(
        "not a contiguous tensor on the CPU of the dtype that is needed, but " +
        (is_tensor(tensor.ptr()) ? describe(tensor.ptr()) : std::string(py::repr(tensor))));
  return view;
}

namespace {

struct WeightParts {
  References held;
  uint16_t* param;
  void* remainder;
  bool has_bytes;  // the remainder has 8 bits
  float* weight;
  int64_t count;

  WeightParts(py::handle param_tensor, py::handle remainder_tensor, py::handle weight_tensor) {
    const TensorView params = view_on_cpu(param_tensor, DType::kBFloat16, held);
    has_bytes = py::object(remainder_tensor.attr("itemsize")).cast<int>() == 1;
    const TensorView remainders =
        view_on_cpu(remainder_tensor, has_bytes ? DType::kRemainder8 : DType::kRemainder, held);
    const TensorView weights = view_on_cpu(weight_tensor, DType::kFloat32, held);
    if (!same_shape(params, weights) || !same_shape(remainders, weights))
      throw py::value_error("the parts of weights differ in shape");
    param = static_cast<uint16_t*>(params.data);
    remainder = remainders.data;
    weight = static_cast<float*>(weights.data);
    count = count_elements(weights);
  }
};

}  // namespace

void join_weights(py::handle param, py::handle remainder, py::handle weight) {
  const WeightParts parts(param, remainder, weight);
  for (int64_t i = 0; i < parts.count; ++i) {
    const uint32_t bits = parts.has_bytes ? uint32_t{static_cast<uint8_t*>(parts.remainder)[i]} << 8
                                          : uint32_t{static_cast<uint16_t*>(parts.remainder)[i]};
    parts.weight[i] = join_weight(float_from_bfloat16(parts.param[i]), bits);
  }
}

void split_weights(py::handle weight, py::handle param, py::handle remainder) {
  const WeightParts parts(param, remainder, weight);
  for (int64_t i = 0; i < parts.count; ++i) {
    const float whole = parts.weight[i];
    // A NaN whose bits are all in the lower byte would be cut to infinity.
    const bool is_nan = whole != whole;
    const auto split = split_weight(parts.has_bytes && !is_nan ? nearest_of_24_bits(whole) : whole);
    parts.param[i] = static_cast<uint16_t>(as_bits(split.param) >> 16);
    if (parts.has_bytes)
      static_cast<uint8_t*>(parts.remainder)[i] = static_cast<uint8_t>(split.remainder >> 8);
    else
      static_cast<uint16_t*>(parts.remainder)[i] = static_cast<uint16_t>(split.remainder);
  }
}

}  // namespace fusedopt
