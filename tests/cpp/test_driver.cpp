// The CPU driver on works made by hand: every instruction set, any dtypes and layouts, bit for bit
// what the rule gives for each element alone.
#include "check.h"
#include "problem.h"

using namespace fusedopt;

namespace {

void drive(const Problem& problem, std::vector<Buffer>& buffers, cpu::Isa isa, int threads) {
  Work works[4] = {{}};
  for (int i = 1; i < 4; ++i) works[i] = make_work(problem, buffers);
  works[2].device = kIdle;  // would update a second time
  works[3].device = kFirstGpu;
  const auto chunks = plan_chunks({0, problem.numel, problem.numel, problem.numel}, 1000);
  const Layout layout = {problem.dims.data(), static_cast<int>(problem.dims.size())};
  const Step step = {problem.rule, works,         &problem.scalars,
                     &layout,      chunks.data(), static_cast<int64_t>(chunks.size()) - 1};
  cpu::run(step, isa, threads);
}

void check_problem(const Problem& problem) {
  std::vector<Buffer> expected = make_buffers(problem);
  const std::vector<Buffer> before = expected;
  update_one_by_one(problem, expected);
  CHECK(problem.numel == 0 || !(expected[kParam] == before[kParam]));
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (isa > cpu::best_isa()) continue;
    for (const int threads : {1, 2}) {
      std::vector<Buffer> buffers = before;
      drive(problem, buffers, isa, threads);
      CHECK(buffers == expected);  // guards included
    }
  }
}

void test_dense() {
  for (Problem problem : all_problems())
    for (const DType dtype : kAllDTypes)
      for (const int64_t numel : {0, 1, 31, 2345}) {
        problem.numel = numel;
        check_problem(in_format(problem, dtype));
      }
}

void test_mixed_dtypes() {
  std::mt19937 random(5);
  for (Problem problem : all_problems())
    for (int run = 0; run < 10; ++run) {
      for (DType& dtype : problem.dtypes) dtype = kAllDTypes[random() % 4];
      check_problem(problem);
    }
}

void test_strided() {
  for (const Problem& problem : all_problems())
    for (const Dims& dims : strided_layouts())
      for (const DType dtype : kAllDTypes)
        check_problem(in_format(with_dims(problem, dims), dtype));
}

}  // namespace

void test_driver() {
  test_dense();
  test_mixed_dtypes();
  test_strided();
}
