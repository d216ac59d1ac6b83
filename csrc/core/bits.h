// std::bit_cast of C++20, for host and device: the bits of a value as another type of the same
// size.
#pragma once

#include <cstring>

#include "core/macros.h"

namespace fusedopt {

template <class To, class From>
FUSEDOPT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of equal size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace fusedopt
