#include "core/step.h"

// Stands in for the CUDA driver in builds without it; the build chooses between the two.
namespace fusedopt::cuda {

const char* unavailable_reason() { return "fusedopt was built without CUDA"; }

}  // namespace fusedopt::cuda
