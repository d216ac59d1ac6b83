// The large kernels, which are compiled in files of their own with flags of their own (the other
// .cu files of this folder but runtime.cu).
#pragma once

#include "cuda/grad_norm.h"
#include "cuda/update.h"

namespace fusedopt::cuda {

// Blocks that must fit on an SM. This bounds the registers of a thread, to 128 in float and 168 in
// double (tests/cuda/test_sass.py), so that there are enough warps to compute while others wait.
template <class T>
constexpr int kMinBlocks = sizeof(T) == sizeof(float) ? 4 : 3;

// __grid_constant__ lets all threads read the arguments where they are, in constant memory. Without
// it, indexing UpdateArguments::few would make a copy in each thread's local memory.
template <class Rule, class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    update_kernel(const __grid_constant__ UpdateArguments<Rule, T> arguments) {
  extern __shared__ __align__(16) char shared[];
  update_thread<Rule, T, PlainStep>(arguments, shared_place(shared), blockIdx.x, threadIdx.x);
}

// As kMinBlocks, for states that are codes: as many as fit without spills, with 168 registers for a
// thread in float, and up to 255 in double.
template <class T>
constexpr int kMinCodesBlocks = sizeof(T) == sizeof(float) ? 3 : 2;

template <class Rule, class T>
__global__ void __launch_bounds__(kBlockThreads, kMinCodesBlocks<T>)
    codes_kernel(const __grid_constant__ UpdateArguments<Rule, T> arguments) {
  extern __shared__ __align__(16) char shared[];
  update_thread<Rule, T, CodesStep>(arguments, shared_place(shared), blockIdx.x, threadIdx.x);
}

template <class Rule, class T, int kNumber>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    usual_kernel(const __grid_constant__ UpdateArguments<Rule, T> arguments) {
  extern __shared__ __align__(16) char shared[];
  update_thread<Rule, T, UsualStep<Rule, kNumber>>(arguments, shared_place(shared), blockIdx.x,
                                                   threadIdx.x);
}

// Those of the usual steps with codes, or without. nullptr if the rule has no step of this number.
template <bool kHasCodes>
const void* usual_kernel_of(RuleId id, int number) {
  const void* kernel = nullptr;
  with_rule(id, [&](auto rule) {
    using Rule = decltype(rule);
    with_usual_step<Rule>(number, [&](auto step) {
      if constexpr (decltype(step)::kHasCodes == kHasCodes)
        kernel = reinterpret_cast<const void*>(&usual_kernel<Rule, float, decltype(step)::kNumber>);
    });
  });
  return kernel;
}

template <class T>
const void* codes_kernel_of(RuleId id) {
  const void* kernel = nullptr;
  with_rule(id, [&](auto rule) {
    kernel = reinterpret_cast<const void*>(&codes_kernel<decltype(rule), T>);
  });
  return kernel;
}

template <class T>
const void* update_kernel_of(RuleId id) {
  const void* kernel = nullptr;
  with_rule(id, [&](auto rule) {
    kernel = reinterpret_cast<const void*>(&update_kernel<decltype(rule), T>);
  });
  return kernel;
}

// The sum of the values of a warp's threads.
inline __device__ int64_t warp_sum(int64_t value) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

// As kMinBlocks, for the kernel below: a thread has 64 registers in float. In double, where these
// are too few on sm_120, it has 72.
template <class T>
constexpr int kMinNormBlocks = sizeof(T) == sizeof(float) ? 8 : 7;

// One block for each leaf.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kMinNormBlocks<T>)
    sum_squares_kernel(const __grid_constant__ SumSquaresArguments arguments) {
  const Leaf leaf = load_leaf(arguments, blockIdx.x);
  if (leaf.update.device == kIdle) return;
  NormSums& sums = arguments.sums[leaf.update.norm_class];
  ThreadSum<T> own = sum_thread<T>(leaf, arguments.layouts, threadIdx.x, sums);

  __shared__ int32_t bins[kBlockWarps];
  __shared__ int64_t slices[kBlockWarps][kSlices<T>];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t warps_bin = __reduce_max_sync(0xffffffffu, own.bin);
  if (lane == 0) bins[warp] = warps_bin;
  __syncthreads();
  int32_t bin = bins[0];
  for (int w = 1; w < kBlockWarps; ++w) bin = max(bin, bins[w]);
  own.raise(bin);
#pragma unroll
  for (int k = 0; k < kSlices<T>; ++k) {
    const int64_t slice = warp_sum(static_cast<typename FloatBits<T>::Signed>(own.slices[k]));
    if (lane == 0) slices[warp][k] = slice;
  }
  __syncthreads();
  if (threadIdx.x >= kSlices<T>) return;
  int64_t slice = 0;
  for (int w = 0; w < kBlockWarps; ++w) slice += slices[w][threadIdx.x];
  if (slice != 0) add_to(bins_of<T>(sums)[bin - static_cast<int>(threadIdx.x)], slice);
}

template <class T>
const void* sum_squares_kernel_of() {
  return reinterpret_cast<const void*>(&sum_squares_kernel<T>);
}

}  // namespace fusedopt::cuda
