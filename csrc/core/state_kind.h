#pragma once

#include <cstdint>

namespace fusedopt {

// What a state is, as far as 8 bits for each element do for it (core/codes.h).
enum class StateKind : uint8_t {
  kExact,     // they do not: small additions to it must not be lost
  kSigned,    // a first moment, of either sign
  kPositive,  // a second moment, or another that is never negative
};

}  // namespace fusedopt
