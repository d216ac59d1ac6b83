// The functions that each instruction set has. They are called through pointers: the one that the
// processor can run is chosen at run time.
#pragma once

#include "core/step.h"

namespace fusedopt::cpu {

struct Kernels {
  // Runs chunk number `chunk` of a step.
  void (*run_chunk)(const Step& step, int64_t chunk);
  // Sums the squares of a leaf, elements [begin, end) of an update's grad, as kLeafThreads threads
  // would (core/norm.h): writes the sum of each thread, and returns how many have one.
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
