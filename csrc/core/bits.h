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
