// Compares the roots and quotients of core/branch_free.h with IEEE's on a GPU: all floats there
// are, and pairs of floats at the edges of the ranges and of mantissas, and any. Prints a line for
// each; exits with 1 if one differs or if ordinary operands are not taken for exact. Compiled and
// run by tests/cuda/test_exactness.py, with the flags of the kernels that compute in float.
#include "core/branch_free.h"
#include "core/stochastic.h"

#include <cstdint>
#include <cstdio>

using namespace fusedopt;

namespace {

constexpr int kThreads = 256, kBlocks = 8192;

struct Counts {
  unsigned long long compared, different, refused;
  uint32_t first[2];  // operands of one that differs
};

__device__ void count(Counts& counts, float found, float expected, uint32_t a, uint32_t b) {
  atomicAdd(&counts.compared, 1ull);
  if (as_bits(found) == as_bits(expected)) return;
  if (atomicAdd(&counts.different, 1ull) == 0) {
    counts.first[0] = a;
    counts.first[1] = b;
  }
}

__global__ void compare_roots(Counts* counts) {
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < 1ull << 32; i += stride) {
    const auto bits = static_cast<uint32_t>(i);
    const float x = as_float(bits);
    if (x >= 0x1p-101f && x < HUGE_VALF) count(*counts, BranchFree<>::root(x), sqrtf(x), bits, 0);
  }
}

// Random mantissas, or with a few bits that are not all zeros or all ones.
__device__ uint32_t mantissa(uint32_t random) {
  const uint32_t few = 1u << (random >> 8 & 31) | 1u << (random >> 13 & 31);
  const uint32_t kind = random & 3;
  return (kind == 0 ? few : kind == 1 ? ~few : hash(random)) & 0x7fffffu;
}

__global__ void compare_quotients(Counts* counts, uint64_t pairs, uint32_t seed) {
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pairs; i += stride) {
    const uint32_t a = hash(static_cast<uint32_t>(i) ^ hash(seed + static_cast<uint32_t>(i >> 32)));
    const uint32_t b = hash(a + 0x9e3779b9u), c = hash(b + 0x85ebca6bu);
    // Denominators from 2^-96 to 2^120, numerators such that the quotient is from 2^-96 to 2^124.
    const int denominator = 127 - 96 + static_cast<int>(c >> 16) % 216;
    const int numerator = denominator - 96 + static_cast<int>(c & 0xffffu) % 220;
    const uint32_t sign = a & 0x80000000u;
    if (numerator < 127 - 68 || numerator > 254) continue;  // scaled by 2^58, so never below
    const uint32_t n =
        c % 1021 == 0 ? sign : sign | static_cast<uint32_t>(numerator) << 23 | mantissa(a);
    const uint32_t d = static_cast<uint32_t>(denominator) << 23 | mantissa(b);
    count(*counts, BranchFree<>::quotient(as_float(n), as_float(d)), as_float(n) / as_float(d), n,
          d);
  }
}

// All together, and whether what is rare is found.
__global__ void compare_ratios(Counts* counts, uint64_t triples, uint32_t seed) {
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < triples; i += stride) {
    const uint32_t a = hash(static_cast<uint32_t>(i) ^ hash(seed + static_cast<uint32_t>(i >> 32)));
    const uint32_t b = hash(a + 0x9e3779b9u), c = hash(b + 0x85ebca6bu);
    const float n = as_float(a), square = as_float(b & 0x7fffffffu);
    const float eps = c % 4 == 0   ? 0.0f
                      : c % 4 == 1 ? 1e-8f
                      : c % 4 == 2 ? 1e-15f
                                   : as_float(c & 0x7fffffffu);
    BranchFree<> math;
    const float found = math.divide_by_root(n, square, eps);
    if (math.is_exact())
      count(*counts, found, n / (sqrtf(square) + eps), a, b);
    else if (fabsf(n) < 0x1p30f && square < 0x1p60f && square >= 0x1p-60f && eps < 1.0f)
      atomicAdd(&counts->refused, 1ull);
  }
}

// The same for a root or a quotient alone.
__global__ void compare_all_roots(Counts* counts) {
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < 1ull << 32; i += stride) {
    const auto bits = static_cast<uint32_t>(i);
    const float x = as_float(bits);
    BranchFree<> math;
    const float found = math.root_of(x);
    if (math.is_exact())
      count(*counts, found, sqrtf(x), bits, 0);
    else if (x >= 0x1p-126f && x < 0x1p67f)
      atomicAdd(&counts->refused, 1ull);
  }
}

__global__ void compare_divisions(Counts* counts, uint64_t pairs, uint32_t seed) {
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pairs; i += stride) {
    const uint32_t a = hash(static_cast<uint32_t>(i) ^ hash(seed + static_cast<uint32_t>(i >> 32)));
    const uint32_t b = hash(a + 0x9e3779b9u);
    const float n = as_float((a & 0xff800000u) | mantissa(a));
    const float d = as_float((b & 0x7f800000u) | mantissa(b));
    BranchFree<> math;
    const float found = math.divide(n, d);
    if (math.is_exact())
      count(*counts, found, n / d, as_bits(n), as_bits(d));
    else if (fabsf(n) < 0x1p30f && d >= 0x1p-30f && d < 0x1p90f)
      atomicAdd(&counts->refused, 1ull);
  }
}

bool report(const char* what, const Counts& counts, unsigned long long least) {
  std::printf("%s: %llu compared, %llu different", what, counts.compared, counts.different);
  if (counts.different > 0) std::printf(" (%08x, %08x)", counts.first[0], counts.first[1]);
  std::printf(", %llu ordinary ones refused\n", counts.refused);
  return counts.different == 0 && counts.refused == 0 && counts.compared >= least;
}

}  // namespace

int main() {
  constexpr uint64_t kPairs = 1ull << 33;
  constexpr int kKinds = 5;
  Counts* counts = nullptr;
  if (cudaMallocManaged(&counts, kKinds * sizeof(Counts)) != cudaSuccess) return 2;
  for (int kind = 0; kind < kKinds; ++kind) counts[kind] = {};
  compare_roots<<<kBlocks, kThreads>>>(counts);
  compare_quotients<<<kBlocks, kThreads>>>(counts + 1, kPairs, 1);
  compare_ratios<<<kBlocks, kThreads>>>(counts + 2, kPairs, 2);
  compare_all_roots<<<kBlocks, kThreads>>>(counts + 3);
  compare_divisions<<<kBlocks, kThreads>>>(counts + 4, kPairs, 3);
  if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
    std::printf("%s\n", cudaGetErrorString(error));
    return 2;
  }
  bool holds = report("roots", counts[0], (101ull + 128) << 23);
  holds = report("quotients", counts[1], kPairs / 2) && holds;
  holds = report("ratios", counts[2], kPairs / 4) && holds;
  holds = report("all roots", counts[3], (126ull + 67) << 23) && holds;
  return report("divisions", counts[4], kPairs / 4) && holds ? 0 : 1;
}
