// Steps with codes whose formats are compiled in, because people take 8-bit states for them. A
// kernel that finds out all formats while it runs takes a quarter more instructions for an element
// (tests/cuda/test_sass.py), and the fewer bytes an element has, the fewer instructions a GPU has
// time for.
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/element.h"
#include "core/layout.h"
#include "core/rules/adam.h"
#include "core/step.h"

namespace fusedopt::cuda {

// The usual step of a rule, if it has one.
template <class Rule>
struct UsualCodes {
  static constexpr bool kExists = false;
};

// AdamW with 5 bytes for a weight but for its grad: a bfloat16 param, its master in 24 bits, both
// moments in codes, all rounded stochastically.
template <>
struct UsualCodes<Adam> {
  static constexpr bool kExists = true;

  static FUSEDOPT_HD Formats formats() {
    Formats formats = {};
    formats.dtypes[kParam] = formats.dtypes[kGrad] = DType::kBFloat16;
    formats.dtypes[kFirstState + Adam::kExpAvg] = DType::kSignedCodes;
    formats.dtypes[kFirstState + Adam::kExpAvgSq] = DType::kPositiveCodes;
    formats.dtypes[kMaster] = DType::kRemainder8;
    formats.stochastic =
        1 << (kFirstState + Adam::kExpAvg) | 1 << (kFirstState + Adam::kExpAvgSq) | 1 << kMaster;
    return formats;
  }
  // The formats say that there is no third state, and that grads are averaged. What is left is
  // whether weights decay.
  static FUSEDOPT_HD bool is_usual(Adam::Variant variant) { return variant.decay != Decay::kL2; }
  static FUSEDOPT_HD Adam::Variant known(Adam::Variant variant) {
    return {variant.decay == Decay::kDecoupled ? Decay::kDecoupled : Decay::kNone, false, true};
  }
};

// Which kernel an update takes; and which it is where there are codes.
enum class KernelKind : uint8_t { kPlain, kCodes, kUsualCodes };

template <class Rule>
KernelKind kernel_kind(const ParamUpdate& update, uint32_t shifted) {
  if constexpr (UsualCodes<Rule>::kExists)
    if (update.layout == kDense && shifted == 0 &&
        UsualCodes<Rule>::is_usual(Rule::Variant::of(update.variant)) &&
        bit_cast<uint64_t>(update.formats) == bit_cast<uint64_t>(UsualCodes<Rule>::formats()))
      return KernelKind::kUsualCodes;
  return KernelKind::kCodes;
}

}  // namespace fusedopt::cuda
