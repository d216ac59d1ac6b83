// Square roots by multiplications, of all floats there are: as the processor's own.
#if defined(FUSEDOPT_X86_64)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "check.h"

#include "core/fast_root.h"
#include "core/flush.h"
#include "core/step.h"
#include "cpu/vec.h"

#include <cstdio>

using namespace fusedopt;

#if defined(FUSEDOPT_X86_64) && defined(__AVX512F__)
namespace {

constexpr int kLanes = 16;
using Floats = cpu::Vec<float, kLanes>;
using Words = cpu::Vec<uint32_t, kLanes>;

#if defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kStride = 1021 * kLanes;
#else
constexpr uint64_t kStride = kLanes;
#endif

// Of all floats, or some of every binade. Subnormals are zeros.
void test_all_floats() {
  Words::Raw lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  for (uint64_t first = 0; first <= 0xffffffffu; first += kStride) {
    const Floats x = as_float(Words(static_cast<uint32_t>(first)) + Words(lane));
    const Floats found = FastRoot().sqrt(x), expected = square_root(x);
    const auto is_same = (found == expected) | ((found != found) & (expected != expected));
    bool all = true;
    for (int i = 0; i < kLanes; ++i) all = all && is_same[i] != 0;
    CHECK(all);
  }
}

}  // namespace

void test_fast_root() {
  if (cpu::best_isa() < cpu::Isa::kAvx512) return;
  const FlushMode mode(true);
  test_all_floats();
}
#else
void test_fast_root() {}
#endif
