#pragma once

namespace fusedopt {

// What weight_decay does: nothing, add to the grad, or scale the param before the update.
enum class Decay { kNone, kL2, kDecoupled };
inline constexpr int kNumDecays = 3;

}  // namespace fusedopt
