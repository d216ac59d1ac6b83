#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/layout.h"
#include "core/schedule.h"
#include "core/stochastic.h"
#include "core/weight.h"

// What happens to an element in a step, once for all drivers: load its weight, grad and states,
// apply the rule, round, average, store. Drivers say where the bytes come from and go to.
namespace fusedopt {

// Square roots and divisions as IEEE 754 has them.
struct Ieee {
  template <class V>
  FUSEDOPT_HD V sqrt(V x) const {
    return square_root(x);
  }
  template <class V>
  FUSEDOPT_HD V divide(V numerator, V denominator) const {
    return numerator / denominator;
  }
  FUSEDOPT_HD static constexpr bool is_exact() { return true; }
};

// How the operands of a work are stored.
struct Formats {
  DType dtypes[kMaxOperands];
  uint8_t stochastic;  // a bit for each operand that is rounded stochastically

  FUSEDOPT_HD bool has(int operand) const { return dtypes[operand] != DType::kAbsent; }
  FUSEDOPT_HD bool is_stochastic(int operand) const { return (stochastic >> operand & 1) != 0; }
};

// Steps of kCount values V each, of elements that are stored as `formats` says. `Memory`, a
// driver's, has
//   load<Storage>(operand, V (&to)[kCount]), store<Storage>(operand, const V (&from)[kCount]),
//   store_bfloat16(operand, const Float (&from)[kCount]): of numbers that are bfloat16 already,
//   load_words(operand, Bits (&to)[kCount]), store_words(...): 16 bits in the lower half of a word,
//   find_draws(rounding_key, Bits (&draws)[kCount]): as core/stochastic.h has them.
template <class Rule, class T, class V, int kCount, class Memory>
class Elements {
  using Bits = typename Lanes<V>::Bits;
  using Float = typename Lanes<V>::Float;
  using Values = V[kCount];

 public:
  FUSEDOPT_HD Elements(const Formats& formats, const Memory& memory)
      : formats_(formats), memory_(memory) {}

  FUSEDOPT_HD void load() {
    load_weight();
    load(kGrad, grad_);
    unroll<Rule::kNumStates>([&](auto s) __attribute__((always_inline)) {
      if (formats_.has(kFirstState + s)) load(kFirstState + s, state_[s]);
    });
  }

  template <int kVariant, class Math>
  FUSEDOPT_HD void apply(const typename Rule::template Scalars<T>& scalars, Math& math) {
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      V state[Rule::kNumStates];
      unroll<Rule::kNumStates>([&](auto s)
                                   __attribute__((always_inline)) { state[s] = state_[s][j]; });
      Rule::template update<kVariant>(scalars, math, weight_[j], grad_[j], state);
      unroll<Rule::kNumStates>([&](auto s)
                                   __attribute__((always_inline)) { state_[s][j] = state[s]; });
    });
  }

  FUSEDOPT_HD void finish(const CommonScalars<T>& common) {
    if (formats_.stochastic != 0) {
      Bits draws[kCount];
      memory_.find_draws(common.rounding_key, draws);
      unroll<kCount>([&](auto j) __attribute__((always_inline)) {
        // Drivers differ in the bits of their NaNs; infinity stands in for them.
        const Float weight = to_float(weight_[j]), infinity = __builtin_inff();
        draws[j] = element_draw(draws[j], as_bits(select(weight < infinity, weight, infinity)));
      });
      if (formats_.is_stochastic(kParam)) round(kParam, weight_, draws);
      unroll<Rule::kNumStates>([&](auto s) __attribute__((always_inline)) {
        if (formats_.is_stochastic(kFirstState + s)) round(kFirstState + s, state_[s], draws);
      });
    }
    if (formats_.has(kAverage)) {
      Values average;
      load(kAverage, average);
      // The average is of what the weight will be.
      as_stored(formats_.has(kMaster) ? DType::kFloat32 : formats_.dtypes[kParam], weight_);
      unroll<kCount>([&](auto j) __attribute__((always_inline)) {
        average[j] = common.average(average[j], weight_[j]);
      });
      store(kAverage, average);
    }
    store_weight();
    unroll<Rule::kNumStates>([&](auto s) __attribute__((always_inline)) {
      if (formats_.has(kFirstState + s)) store(kFirstState + s, state_[s]);
    });
  }

 private:
  FUSEDOPT_HD void load(int operand, Values& values) const {
    with_storage<T>(formats_.dtypes[operand], [&](auto format) __attribute__((always_inline)) {
      memory_.template load<decltype(format)>(operand, values);
    });
  }

  FUSEDOPT_HD void store(int operand, const Values& values) const {
    if (formats_.is_stochastic(operand)) return store_rounded(operand, values);
    with_storage<T>(formats_.dtypes[operand], [&](auto format) __attribute__((always_inline)) {
      memory_.template store<decltype(format)>(operand, values);
    });
  }

  FUSEDOPT_HD void store_rounded(int operand, const Values& values) const {
    Float rounded[kCount];
    unroll<kCount>([&](auto j)
                       __attribute__((always_inline)) { rounded[j] = to_float(values[j]); });
    memory_.store_bfloat16(operand, rounded);
  }

  FUSEDOPT_HD void load_weight() {
    const Master master = master_of(formats_.dtypes[kMaster]);
    if (master == Master::kFloat32) return memory_.template load<float>(kMaster, weight_);
    load(kParam, weight_);
    if (master == Master::kNone) return;
    Bits remainders[kCount];
    memory_.load_words(kMaster, remainders);
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      weight_[j] = from_float<V>(join_weight(to_float(weight_[j]), remainders[j]));
    });
  }

  FUSEDOPT_HD void store_weight() {
    const Master master = master_of(formats_.dtypes[kMaster]);
    if (master == Master::kFloat32) memory_.template store<float>(kMaster, weight_);
    if (master == Master::kSplit) {
      Bits remainders[kCount];
      unroll<kCount>([&](auto j) __attribute__((always_inline)) {
        const auto parts = split_weight(to_float(weight_[j]));
        weight_[j] = from_float<V>(parts.param);
        remainders[j] = parts.remainder;
      });
      memory_.store_words(kMaster, remainders);
      return store_rounded(kParam, weight_);
    }
    store(kParam, weight_);
  }

  static FUSEDOPT_HD void round(int operand, Values& values, const Bits (&draws)[kCount]) {
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      values[j] = from_float<V>(round_stochastically(to_float(values[j]), draws[j], operand));
    });
  }

  static FUSEDOPT_HD void as_stored(DType dtype, Values& weights) {
    if constexpr (sizeof(T) == sizeof(double)) {
      if (dtype == DType::kFloat32)
        unroll<kCount>([&](auto j) __attribute__((always_inline)) {
          weights[j] = from_float<V>(to_float(weights[j]));
        });
    }
    if (dtype == DType::kBFloat16)
      unroll<kCount>([&](auto j) __attribute__((always_inline)) {
        weights[j] =
            from_float<V>(as_float(rounded_to_bfloat16(to_float(weights[j])) & 0xffff0000u));
      });
    if (dtype == DType::kFloat16)
      unroll<kCount>([&](auto j) __attribute__((always_inline)) {
        weights[j] =
            from_float<V>(float_from_half_bits(half_bits_from_float(to_float(weights[j]))));
      });
  }

  const Formats& formats_;
  const Memory& memory_;
  Values weight_, grad_, state_[Rule::kNumStates];
};

}  // namespace fusedopt
