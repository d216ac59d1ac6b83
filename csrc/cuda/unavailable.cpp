// Stands in for the CUDA driver in builds without it; the build chooses one of three (core/gpu.h).
// It says why CUDA tensors cannot be stepped.

#include "core/gpu.h"

namespace fusedopt::cuda {

const char* unavailable_reason() {
  return "this fusedopt was built without CUDA; on a machine with a CUDA toolkit (nvcc), build it "
         "again from its sources: FUSEDOPT_CUDA=1 pip install --force-reinstall --no-deps "
         "PATH_OF_THE_SOURCES";
}

std::unique_ptr<Driver> make_driver(Allocate) { return nullptr; }

bool is_capturing(int, void*) { return false; }

std::string architectures() { return ""; }

bool is_emulated() { return false; }

}  // namespace fusedopt::cuda
