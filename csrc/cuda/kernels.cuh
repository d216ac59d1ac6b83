// The large kernels, which are compiled in files of their own with flags of their own (float.cu,
// double.cu, grad_norm.cu), and the sums over a block.
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

// The sum of a warp's values, which its first thread gets, in the order of sum_warp()
// (core/norm.h), so that it has the same bits as on the host.
inline __device__ double warp_sum(double value) {
  for (int width = kTreeWidth / 2; width > 0; width /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

// The same for a block, as sum_block() has it: the sum of the sums of its warps.
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

// One block for each leaf. Eight blocks on an SM leave a thread 64 registers.
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
  // The same for all threads of the block, which makes a barrier inside possible. Rarely true.
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
