#pragma once

#include <cmath>

#include "core/macros.h"

namespace fusedopt {

// Exponential moving average of the weights: ema + rate (weight - ema), interpolated from the
// nearer end. At a rate of 1 it is the weight, exactly.
template <class T>
struct Average {
  T factor;     // rate, or rate - 1 when the interpolation starts from the weight
  T to_weight;  // not 0 if it does

  FUSEDOPT_HD T operator()(T ema, T weight) const {
    const T from = to_weight != 0 ? weight : ema;
    return factor == 0 ? from : std::fma(factor, weight - ema, from);
  }

  template <class U>
  FUSEDOPT_HD Average<U> as() const {
    return {U(factor), U(to_weight)};
  }
};

FUSEDOPT_HD Average<double> average_at(double rate) {
  return rate <= 0.5 ? Average<double>{rate, 0} : Average<double>{rate - 1, 1};
}

}  // namespace fusedopt
