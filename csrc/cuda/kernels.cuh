#pragma once

#include "cuda/grad_norm.h"
#include "cuda/update.h"

// Kernels that are compiled with flags of their own, and what sums share.
namespace fusedopt::cuda {

// Blocks for an SM, a bound on registers: enough warps to hide what a thread waits for.
template <class T>
constexpr int kMinBlocks = sizeof(T) == sizeof(float) ? 4 : 3;

template <class Rule, class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    update_kernel(const __grid_constant__ UpdateArguments<Rule, T> arguments) {
  extern __shared__ __align__(16) char shared[];
  update_thread<Rule, T>(arguments, shared_place(shared), blockIdx.x, threadIdx.x);
}

template <class T>
const void* update_kernel_of(RuleId id) {
  const void* kernel = nullptr;
  with_rule(id, [&](auto rule) {
    kernel = reinterpret_cast<const void*>(&update_kernel<decltype(rule), T>);
  });
  return kernel;
}

// The sum of a warp's values, in its first thread, as sum_warp() has it.
inline __device__ double warp_sum(double value) {
  for (int width = kTreeWidth / 2; width > 0; width /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

// The sum of a block's values, in its first thread, as sum_block() has it.
template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double warps[kTreeWidth];
  const int warp = threadIdx.x / kTreeWidth, lane = threadIdx.x % kTreeWidth;
  value = warp_sum(value);
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < kThreads / kTreeWidth ? warps[lane] : 0.0);
  return value;
}

// One block for each leaf.
template <class T>
__global__ void __launch_bounds__(kLeafThreads, 8)
    sum_squares_kernel(const __grid_constant__ SumSquaresArguments arguments) {
  const Leaf leaf = load_leaf(arguments, blockIdx.x);
  if (!is_summed_in<T>(leaf.update)) return;
  __shared__ double squares;
  __shared__ int nonfinite;
  const double sum = block_sum<kLeafThreads>(sum_thread<T>(leaf, arguments.layouts, threadIdx.x));
  if (threadIdx.x == 0) {
    squares = sum;
    nonfinite = 0;
  }
  __syncthreads();
  if (is_nonfinite(squares)) {
    atomicAdd(&nonfinite, count_thread<T>(leaf, arguments.layouts, threadIdx.x));
    __syncthreads();
  }
  if (threadIdx.x == 0) arguments.sums[blockIdx.x] = {squares, nonfinite, leaf.update.norm_class};
}

template <class T>
const void* sum_squares_kernel_of() {
  return reinterpret_cast<const void*>(&sum_squares_kernel<T>);
}

}  // namespace fusedopt::cuda
