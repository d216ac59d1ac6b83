// What happens to an element in a step, in one text for all drivers: load its weight, grad and
// states, apply the rule, round, average, store. Drivers only say where the bytes come from and go
// to. So CPU and GPU, dense and strided tensors and the last elements of each give the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/codes.h"
#include "core/dtypes.h"
#include "core/layout.h"
#include "core/step_scalars.h"
#include "core/stochastic.h"
#include "core/weight.h"

namespace fusedopt {

// Square roots and divisions as the compiler does them, correctly rounded as IEEE 754 demands. GPUs
// use BranchFree (core/branch_free.h) in its place, which gives the same results.
struct Ieee {
  static constexpr bool kIsForCodes = false;

  template <class V>
  FUSEDOPT_HD V divide_by_root(V numerator, V square, V eps) const {
    return numerator / (square_root(square) + eps);
  }
  template <class V>
  FUSEDOPT_HD V divide(V numerator, V denominator) const {
    return numerator / denominator;
  }
  template <class V>
  FUSEDOPT_HD V root_of(V square) const {
    return square_root(square);
  }
  static FUSEDOPT_HD float quotient(float numerator, float denominator) {
    return numerator / denominator;
  }
  FUSEDOPT_HD static constexpr bool is_exact() { return true; }
};

// The same in kernels for states that are codes.
struct IeeeForCodes : Ieee {
  static constexpr bool kIsForCodes = true;
};

// How the operands of an update are stored.
struct alignas(8) Formats {
  DType dtypes[kMaxOperands];
  uint8_t stochastic;  // a bit for each operand that is rounded stochastically

  FUSEDOPT_HD constexpr bool has(int operand) const { return dtypes[operand] != DType::kAbsent; }
  FUSEDOPT_HD constexpr bool has_codes() const {
    bool found = false;
    for (int s = 0; s < kMaxStates; ++s) found = found || is_code(dtypes[kFirstState + s]);
    return found;
  }
  FUSEDOPT_HD bool has_float32_master() const { return is(dtypes[kMaster], DType::kFloat32); }
  FUSEDOPT_HD bool has_split_master() const { return is(dtypes[kMaster], DType::kRemainder); }
  FUSEDOPT_HD constexpr bool has_split8_master() const {
    return is(dtypes[kMaster], DType::kRemainder8);
  }
  FUSEDOPT_HD bool is_stochastic(int operand) const { return (stochastic >> operand & 1) != 0; }
  // Whether to compute in double, which one float64 operand demands, or in float.
  FUSEDOPT_HD bool in_double() const {
    bool found = false;
    for (const DType dtype : dtypes) found = found || dtype == DType::kFloat64;
    return found;
  }
  // The one format that all operands have, or kAbsent if they have several. With `with_split`, the
  // remainder of a split master counts as bfloat16: it is as wide as the param it belongs to.
  FUSEDOPT_HD DType one_format(bool with_split) const {
    const DType param = dtypes[kParam];
    const bool can_be_split = with_split && is(param, DType::kBFloat16);
    for (const DType dtype : dtypes) {
      const bool fits = dtype == param || dtype == DType::kAbsent ||
                        (can_be_split && is(dtype, DType::kRemainder));
      if (!fits) return DType::kAbsent;
    }
    return has_float32_master() ? DType::kAbsent : param;
  }
};

// Stands for the storage type where operands have different ones.
struct Mixed {};

// The step of as many elements as V has, computed in T. `Memory` is a driver's class and has:
//   load<Storage, kIsOneFormat>(operand, V& to), store<...>(operand, const V& from);
//   store_bfloat16<kIsOneFormat>(operand, const Float& from): stores the upper halves of numbers,
//     which are bfloat16, without rounding them;
//   load_words<kIsOneFormat>(operand, Bits& to): reads 16 bits into the lower half of each word;
//   store_words<kIsOneFormat>(operand, const Bits& from): the reverse;
//   load_signed_bytes(operand, Bits& to): signed numbers of 8 bits, times 256;
//   store_bytes<kByte>(operand, const Bits& from): stores that byte of each word;
//   kLooksAtNumbers: are_ordinary(const Float& numbers) says whether none is NaN or above
//     kLargestOrdinary (core/stochastic.h), so that drawing for them takes less, with the same
//     results;
//   kHasCodes: states can be codes (core/codes.h). Only then there must be
//     load_codes<Code>(operand, Float& to), and
//     store_codes<Code>(operand, const Float& from, const Bits& fractions), which gets all values
//     of a group before it finds their scale, and what is added to their codes before they are cut;
//   find_draws(rounding_key, Bits& draws): random bits for the elements (core/stochastic.h);
//   kSplitIsOneFormat: a split master counts as bfloat16 among operands of one format;
//   kRoundsForNothing: store() is as fast as store_bfloat16() where either would do;
//   formats(): how the elements are stored;
//   one_format(): Formats::one_format(kSplitIsOneFormat). `kIsOneFormat` above says that it is not
//     kAbsent; V may then hold its elements in another order, the same one for all operands.
template <class Rule, class T, class V, class Memory>
class Elements {
  using Bits = typename Lanes<V>::Bits;
  using Float = typename Lanes<V>::Float;
  static constexpr int kNumStates = Rule::kNumStates;
  template <class Storage>
  static constexpr bool kIsOneFormat = !std::is_same_v<Storage, Mixed>;
  template <class Storage>
  static constexpr bool kCanBeSplit =
      std::is_same_v<Storage, Mixed> ||
      (std::is_same_v<Storage, BFloat16> && Memory::kSplitIsOneFormat);

 public:
  FUSEDOPT_HD explicit Elements(const Memory& memory) : memory_(memory) {}

  FUSEDOPT_HD void load() {
    with_format([&](auto format) __attribute__((always_inline)) { load<decltype(format)>(); });
  }

  template <class Math>
  FUSEDOPT_HD void apply(typename Rule::Variant variant,
                         const typename Rule::template Scalars<T>& scalars, Math& math) {
    Rule::update(variant, scalars, math, weight_, grad_, states_);
  }

  // All that follows the rule: stochastic rounding, the moving average, the stores. Until now
  // nothing has been written, so a driver may still give up (BranchFree::is_exact()).
  FUSEDOPT_HD void finish(const CommonScalars<T>& common) {
    formats_ = memory_.formats();
    bool has_codes = false;
    if constexpr (Memory::kHasCodes) has_codes = formats_.has_codes();
    if (has_codes) {
      const Bits draws = finish_codes(common);
      if constexpr (Memory::kLooksAtNumbers) {
        if (!formats_.has(kEma) && formats_.has_split8_master() &&
            memory_.are_ordinary(to_float(weight_))) {
          round_weight<true>(draws);
          store_weight<Mixed, true>();
          return store_states<Mixed>();
        }
      }
      round_weight<false>(draws);
    } else if (formats_.stochastic != 0) {
      if constexpr (Memory::kLooksAtNumbers) {
        if (!formats_.has(kEma) && are_ordinary()) {
          round_all<true>(common);
          return with_format([&](auto format) __attribute__((always_inline)) {
            store_weight<decltype(format), true>();
            store_states<decltype(format), true>();
          });
        }
      }
      round_all<false>(common);
    }
    if (formats_.has(kEma))
      with_format([&](auto format)
                      __attribute__((always_inline)) { update_ema<decltype(format)>(common); });
    with_format([&](auto format) __attribute__((always_inline)) { store<decltype(format)>(); });
  }

 private:
  // Branches on the format once for all operands if they share one of the two that most models
  // have, bfloat16 or float32. Else each operand branches by itself.
  template <class F>
  FUSEDOPT_HD void with_format(const F& f) {
    formats_ = memory_.formats();  // read anew, so that it takes no registers meanwhile
    if constexpr (sizeof(T) == sizeof(float)) {
      const DType format = memory_.one_format();
      if (is(format, DType::kBFloat16)) return f(BFloat16{});
      if (is(format, DType::kFloat32)) return f(float{});
    }
    f(Mixed{});
  }

  template <class Storage>
  FUSEDOPT_HD void load() {
    load_weight<Storage>();
    load<Storage>(kGrad, grad_);
    unroll<kNumStates>([&](auto s) __attribute__((always_inline)) {
      if (is_coded<Storage>(kFirstState + s))
        load_codes(kFirstState + s, states_[s]);
      else if (formats_.has(kFirstState + s))
        load<Storage>(kFirstState + s, states_[s]);
    });
  }

  template <class Storage>
  FUSEDOPT_HD bool is_coded(int operand) const {
    if constexpr (Memory::kHasCodes && !kIsOneFormat<Storage>)
      return is_code(formats_.dtypes[operand]);
    else
      return false;
  }

  FUSEDOPT_HD void load_codes(int operand, V& values) const {
    if constexpr (Memory::kHasCodes) {
      Float found;
      if (is(formats_.dtypes[operand], DType::kSignedCodes))
        memory_.template load_codes<SignedCode>(operand, found);
      else
        memory_.template load_codes<PositiveCode>(operand, found);
      values = from_float<V>(found);
    }
  }

  // Codes come before the weight is rounded, as they need not wait for it. Beside them it alone is
  // drawn for.
  FUSEDOPT_HD Bits finish_codes(const CommonScalars<T>& common) const {
    Bits draws(0u);
    if (formats_.stochastic != 0) memory_.find_draws(common.rounding_key, draws);
    unroll<kNumStates>([&](auto s) __attribute__((always_inline)) {
      store_codes(kFirstState + s, states_[s], draws);
    });
    return draws;
  }

  template <bool kAreOrdinary>
  FUSEDOPT_HD void round_weight(Bits draws) {
    if (!formats_.is_stochastic(kParam) && !formats_.is_stochastic(kMaster)) return;
    draws = draw_beside_codes(draws, bits_of_weight<kAreOrdinary>());
    round<false>(kParam, weight_, draws);
    round_master<kAreOrdinary>(draw_for_weight_beside_codes(draws));
  }

  FUSEDOPT_HD void store_codes(int operand, const V& values, const Bits& draws) const {
    if constexpr (Memory::kHasCodes) {
      if (!is_coded<Mixed>(operand)) return;
      // A state's own bits keep tensors of one shape from all being rounded in the same way.
      const Float found = to_float(values);
      const Bits fractions = either(formats_.is_stochastic(operand),
                                    draw_for_code(operand, draws, as_bits(found)), Bits(kHalf));
      if (is(formats_.dtypes[operand], DType::kSignedCodes))
        memory_.template store_codes<SignedCode>(operand, found, fractions);
      else
        memory_.template store_codes<PositiveCode>(operand, found, fractions);
    }
  }

  // The average is taken of the weight as it will be read in the next step: rounded to the format
  // in which it is stored.
  template <class Storage>
  FUSEDOPT_HD void update_ema(const CommonScalars<T>& common) {
    V ema;
    load<Storage>(kEma, ema);
    as_stored(formats_.has(kMaster) ? DType::kFloat32 : formats_.dtypes[kParam], weight_);
    if (!kIsOneFormat<Storage> && formats_.has_split8_master())
      weight_ = from_float<V>(nearest_of_24_bits(to_float(weight_)));
    store<Storage>(kEma, common.ema(ema, weight_));
  }

  template <class Storage>
  FUSEDOPT_HD void store() const {
    store_weight<Storage>();
    store_states<Storage>();
  }

  template <class Storage, bool kAreOrdinary = false>
  FUSEDOPT_HD void store_states() const {
    unroll<kNumStates>([&](auto s) __attribute__((always_inline)) {
      if (formats_.has(kFirstState + s) && !is_coded<Storage>(kFirstState + s))
        store<Storage, kAreOrdinary>(kFirstState + s, states_[s]);
    });
  }

  template <class Storage>
  FUSEDOPT_HD void load(int operand, V& values) const {
    if constexpr (std::is_same_v<Storage, Mixed>)
      with_storage<T>(formats_.dtypes[operand], [&](auto format) __attribute__((always_inline)) {
        memory_.template load<decltype(format), false>(operand, values);
      });
    else
      memory_.template load<Storage, true>(operand, values);
  }

  // With `kAreOrdinary`, what was drawn for is not cut yet.
  template <class Storage, bool kAreOrdinary = false>
  FUSEDOPT_HD void store(int operand, const V& values) const {
    if ((kAreOrdinary || !Memory::kRoundsForNothing) && formats_.is_stochastic(operand))
      return memory_.template store_bfloat16<kIsOneFormat<Storage>>(operand, to_float(values));
    if constexpr (std::is_same_v<Storage, Mixed>)
      with_storage<T>(formats_.dtypes[operand], [&](auto format) __attribute__((always_inline)) {
        memory_.template store<decltype(format), false>(operand, values);
      });
    else
      memory_.template store<Storage, true>(operand, values);
  }

  // The weight is the float32 master, or the param with its remainder, or the param alone.
  template <class Storage>
  FUSEDOPT_HD void load_weight() {
    if (!kIsOneFormat<Storage> && formats_.has_float32_master())
      return memory_.template load<float, false>(kMaster, weight_);
    load<Storage>(kParam, weight_);
    Bits remainder;
    if (kCanBeSplit<Storage> && formats_.has_split_master()) {
      memory_.template load_words<kIsOneFormat<Storage>>(kMaster, remainder);
      weight_ = from_float<V>(join_weight(to_float(weight_), remainder));
    } else if (!kIsOneFormat<Storage> && formats_.has_split8_master()) {
      memory_.load_signed_bytes(kMaster, remainder);
      weight_ = from_float<V>(join_weight8(to_float(weight_), remainder));
    }
  }

  template <class Storage, bool kAreOrdinary = false>
  FUSEDOPT_HD void store_weight() const {
    if (!kIsOneFormat<Storage> && formats_.has_float32_master())
      memory_.template store<float, false>(kMaster, weight_);
    if (kCanBeSplit<Storage> && formats_.has_split_master()) {
      const auto parts = split_weight(to_float(weight_));
      memory_.template store_words<kIsOneFormat<Storage>>(kMaster, parts.remainder);
      return memory_.template store_bfloat16<kIsOneFormat<Storage>>(kParam, parts.param);
    }
    if constexpr (!kIsOneFormat<Storage>) {
      if (formats_.has_split8_master()) {
        Float whole = to_float(weight_);
        if (!formats_.is_stochastic(kMaster)) whole = nearest_of_24_bits(whole);
        const auto parts = split_weight<kAreOrdinary>(whole);
        memory_.template store_bytes<1>(kMaster, parts.remainder);
        return memory_.template store_bfloat16<false>(kParam, parts.param);
      }
    }
    store<Storage, kAreOrdinary>(kParam, weight_);
  }

  // The weight, which is a part of all draws, and all states that are drawn for.
  FUSEDOPT_HD bool are_ordinary() const {
    bool found = memory_.are_ordinary(to_float(weight_));
    unroll<kNumStates>([&](auto s) __attribute__((always_inline)) {
      if (formats_.is_stochastic(kFirstState + s))
        found = memory_.are_ordinary(to_float(states_[s])) && found;
    });
    return found;
  }

  template <bool kAreOrdinary>
  FUSEDOPT_HD void round_all(const CommonScalars<T>& common) {
    Bits draws;
    memory_.find_draws(common.rounding_key, draws);
    draws = element_draw(draws, bits_of_weight<kAreOrdinary>());
    if constexpr (kFirstState + kNumStates > kCheapest)
      round<kAreOrdinary>(kCheapest, states_[kCheapest - kFirstState], draws);
    if ((formats_.stochastic & ~(1 << kCheapest)) == 0) return;
    draws = mixed(draws);
    round<kAreOrdinary>(kParam, weight_, draws);
    unroll<kNumStates>([&](auto s) __attribute__((always_inline)) {
      if (kFirstState + s != kCheapest) round<kAreOrdinary>(kFirstState + s, states_[s], draws);
    });
    round_master<kAreOrdinary>(draw_for_weight(draws));
  }

  // The new weight is part of the draw. NaNs of CPUs and GPUs differ in their bits, so infinity
  // stands in for a NaN.
  template <bool kAreOrdinary = false>
  FUSEDOPT_HD Bits bits_of_weight() const {
    Float weight = to_float(weight_);
    const Float infinity = __builtin_inff();
    if constexpr (!kAreOrdinary) weight = select(weight < infinity, weight, infinity);
    return as_bits(weight);
  }

  template <bool kAreOrdinary>
  FUSEDOPT_HD void round(int operand, V& values, const Bits& draws) const {
    if (formats_.is_stochastic(operand))
      values = from_float<V>(round_stochastically<kAreOrdinary>(to_float(values), draws, operand));
  }
  template <bool kAreOrdinary = false>
  FUSEDOPT_HD void round_master(const Bits& drawn) {
    if (formats_.is_stochastic(kMaster))
      weight_ = from_float<V>(round_to_24_bits<kAreOrdinary>(to_float(weight_), drawn));
  }

  // Rounds weights to what reading them back from `dtype` would give.
  static FUSEDOPT_HD void as_stored(DType dtype, V& weights) {
    if constexpr (sizeof(T) == sizeof(double)) {
      if (is(dtype, DType::kFloat32)) weights = from_float<V>(to_float(weights));
    }
    if (is(dtype, DType::kBFloat16))
      weights = from_float<V>(as_float(rounded_to_bfloat16(to_float(weights)) & 0xffff0000u));
    if (is(dtype, DType::kFloat16))
      weights = from_float<V>(float_from_half_bits(half_bits_from_float(to_float(weights))));
  }

  const Memory& memory_;
  Formats formats_;
  V weight_, grad_, states_[kNumStates];
};

}  // namespace fusedopt
