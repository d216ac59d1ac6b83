// Steps whose formats are compiled in: those that people take most. A kernel that finds out formats
// while it runs jumps to other code for each operand, and a GPU waits for the instructions behind
// such jumps: on an H200 its warps did for 11 to 29 % of their time, by the setting, and for 2 % in
// the one kernel that knew its formats (bench/results/profile-ncu-cuda.json). Which of the kernels
// does a step changes no result.
#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/element.h"
#include "core/layout.h"
#include "core/rules/adam.h"
#include "core/step.h"

namespace fusedopt::cuda {

// The usual steps of a rule, by their numbers.
template <class Rule>
struct Usual {
  static constexpr int kCount = 0;
};

struct AdamOperands {
  DType param, grad, exp_avg, exp_avg_sq;
  DType master = DType::kAbsent, ema = DType::kAbsent;
  bool draws = true;  // for codes, and for a 24-bit master beside them
};

template <>
struct Usual<Adam> {
  static constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kB16 = DType::kBFloat16,
                         kSigned = DType::kSignedCodes, kPositive = DType::kPositiveCodes,
                         kNone = DType::kAbsent;
  static constexpr AdamOperands kAll[] = {
      {kB16, kB16, kB16, kB16},
      {kF16, kF16, kF16, kF16},
      {kF32, kF32, kB16, kB16},
      {kB16, kB16, kF32, kF32},
      {kB16, kB16, kF32, kF32, kF32},
      {kB16, kB16, kB16, kB16, DType::kRemainder},
      {kB16, kB16, kB16, kB16, DType::kRemainder8},
      {kB16, kB16, kB16, kB16, kNone, kF32},
      {kB16, kB16, kB16, kB16, DType::kRemainder, kF32},
      {kB16, kB16, kSigned, kPositive, DType::kRemainder8},
      {kB16, kB16, kSigned, kPositive, DType::kRemainder8, kNone, false},
      {kB16, kB16, kSigned, kPositive},
      {kF32, kF32, kSigned, kPositive},
  };
  static constexpr int kCount = sizeof(kAll) / sizeof(kAll[0]);

  static constexpr Formats formats(const AdamOperands& operands) {
    Formats formats = {};
    formats.dtypes[kParam] = operands.param;
    formats.dtypes[kGrad] = operands.grad;
    formats.dtypes[kFirstState + Adam::kExpAvg] = operands.exp_avg;
    formats.dtypes[kFirstState + Adam::kExpAvgSq] = operands.exp_avg_sq;
    formats.dtypes[kMaster] = operands.master;
    formats.dtypes[kEma] = operands.ema;
    if (formats.has_codes() && operands.draws)
      formats.stochastic = 1 << (kFirstState + Adam::kExpAvg) |
                           1 << (kFirstState + Adam::kExpAvgSq) |
                           (formats.has_split8_master() ? 1 << kMaster : 0);
    return formats;
  }
  static constexpr Formats formats_of(int number) { return formats(kAll[number]); }

  // The formats say that there is no third state, and that grads are averaged. What is left is how
  // weights decay.
  static FUSEDOPT_HD Adam::Variant known(Adam::Variant variant) {
    return {variant.decay, false, true};
  }
};

// The bytes of formats in their order in memory, on the little-endian machines that CUDA is for.
constexpr uint64_t as_number(const Formats& formats) {
  static_assert(sizeof(Formats) == sizeof(uint64_t) && kMaxOperands == 7, "a byte for each");
  uint64_t number = uint64_t{formats.stochastic} << 8 * kMaxOperands;
  for (int k = 0; k < kMaxOperands; ++k) number |= uint64_t{uint8_t(formats.dtypes[k])} << 8 * k;
  return number;
}

// What is known of a step when its kernel is compiled: that no state is codes, that some are, or
// all formats. With codes it is also known what is drawn for, else the launch says that.
struct PlainStep {
  static constexpr bool kHasCodes = false, kIsUsual = false;
};
struct CodesStep {
  static constexpr bool kHasCodes = true, kIsUsual = false;
};
template <class Rule, int kStep>
struct UsualStep {
  static constexpr int kNumber = kStep;
  static constexpr bool kIsUsual = true;
  static constexpr bool kHasCodes = Usual<Rule>::formats_of(kStep).has_codes();
  // Code for a device can use such a constant if it is a number, and call no function for it.
  static constexpr uint64_t kFormats = as_number(Usual<Rule>::formats_of(kStep));
  static FUSEDOPT_HD Formats formats() { return bit_cast<Formats>(uint64_t{kFormats}); }
};

// Whether any operand is of a format that can be rounded stochastically.
FUSEDOPT_HD bool can_be_drawn(const Formats& formats) {
  bool found = formats.has_split8_master();
  for (int k = 0; k < kMaster; ++k) {
    const bool is_written = k != kGrad && !(k == kParam && formats.has(kMaster));
    found = found || (is_written && is(formats.dtypes[k], DType::kBFloat16));
  }
  return found;
}

// The formats of a launch, `asked`, or as much of them as its kernel does not know.
template <class Kind>
FUSEDOPT_HD Formats formats_of_step(const Formats& asked) {
  if constexpr (Kind::kIsUsual) {
    Formats formats = Kind::formats();
    if (!Kind::kHasCodes) formats.stochastic = can_be_drawn(formats) ? asked.stochastic : 0;
    return formats;
  } else {
    return asked;
  }
}

// Which kernel does an update: the one for all formats, that where there are codes, or that of a
// usual step, whose number is added.
using KernelKind = uint8_t;
inline constexpr KernelKind kPlainKernel = 0, kCodesKernel = 1, kUsualKernel = 2;

// The number of the usual step that has these formats, or -1. It is asked for every tensor in every
// step, so the formats to compare with are numbers that the compiler knows.
template <class Rule, int kNumber = 0>
int usual_number(uint64_t formats) {
  if constexpr (kNumber < Usual<Rule>::kCount) {
    using Kind = UsualStep<Rule, kNumber>;
    constexpr uint64_t kDrawn = Kind::kHasCodes ? 0 : uint64_t{0xff} << 8 * kMaxOperands;
    return ((formats ^ Kind::kFormats) & ~kDrawn) == 0 ? kNumber
                                                       : usual_number<Rule, kNumber + 1>(formats);
  }
  return -1;
}

template <class Rule>
KernelKind kernel_kind(const ParamUpdate& update, uint32_t shifted) {
  if constexpr (Usual<Rule>::kCount > 0) {
    const int number = usual_number<Rule>(bit_cast<uint64_t>(update.formats));
    if (number >= 0 && update.layout == kDense && shifted == 0)
      return static_cast<KernelKind>(kUsualKernel + number);
  }
  return update.formats.has_codes() ? kCodesKernel : kPlainKernel;
}

// Calls f(UsualStep<Rule, number>{}) for a number known at run time, if the rule has such a step.
template <class Rule, int kNumber = 0, class F>
void with_usual_step(int number, const F& f) {
  if constexpr (kNumber < Usual<Rule>::kCount) {
    if (number == kNumber) return f(UsualStep<Rule, kNumber>{});
    with_usual_step<Rule, kNumber + 1>(number, f);
  }
}

}  // namespace fusedopt::cuda
