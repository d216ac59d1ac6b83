#pragma once

#include "core/step.h"

// The entry points of the instruction sets.
namespace fusedopt::cpu {

struct Kernels {
  // Runs chunk number `chunk` of a step.
  void (*run_chunk)(const Step& step, int64_t chunk);
  // The squares of elements [begin, end) of a work's grad, a leaf, as the sums of kLeafThreads
  // threads (core/norm.h); returns how many have any.
  int (*sum_leaf)(const ParamUpdate& update, const Layout* layouts, int64_t begin, int64_t end,
                  double* threads);
  // How many of these elements are infinite or NaN.
  int64_t (*count_nonfinite)(const ParamUpdate& update, const Layout* layouts, int64_t begin,
                             int64_t end);
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace fusedopt::cpu
