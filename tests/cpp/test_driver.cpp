// The CPU driver on updates made by hand, with every instruction set, any dtypes and layouts: bit
// for bit what the rule gives for each element alone.
#include "check.h"
#include "problem.h"

#include <algorithm>
#include <initializer_list>

using namespace fusedopt;

namespace {

using Buffers = std::vector<Buffer>;

void drive(const Problem& problem, Buffers& buffers, cpu::Isa isa, int threads) {
  ParamUpdate updates[4] = {{}};
  for (int i = 1; i < 4; ++i) updates[i] = make_update(problem, buffers);
  updates[2].device = kIdle;  // the same operands: an update would be a second one
  updates[3].device = kFirstGpu;
  // A second thread is only used if there are many chunks.
  const auto chunks =
      plan_chunks({0, problem.numel, problem.numel, problem.numel}, threads > 1 ? 64 : 1000);
  const Layout layout = {problem.dims.data(), static_cast<int>(problem.dims.size())};
  const Step step = {updates,
                     &problem.scalars,
                     &layout,
                     chunks.data(),
                     static_cast<int64_t>(chunks.size()) - 1,
                     /*in_order=*/false};
  cpu::run(step, isa, threads);
}

void check_values(const Problem& problem, const Buffers& before) {
  Buffers expected = before;
  update_one_by_one(problem, expected);
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (isa > cpu::best_isa()) continue;
    for (const int threads : {1, 2}) {
      if (threads > 1 && problem.numel < 1000) continue;  // one thread would do all of it
      Buffers buffers = before;
      drive(problem, buffers, isa, threads);
      CHECK(buffers == expected);  // guards included
    }
  }
}

void check_problem(const Problem& problem) {
  const Buffers before = make_buffers(problem);
  Buffers after = before;
  update_one_by_one(problem, after);
  CHECK(problem.numel == 0 || !(after == before));
  CHECK(after[kGrad] == before[kGrad]);
  check_values(problem, before);
}

void test_variants() {
  for (Problem problem : all_problems())
    for (const DType dtype : kAllDTypes) {
      problem.numel = 333;
      check_problem(in_format(problem, dtype));
    }
}

void test_dense() {
  for (Problem problem : main_problems())
    for (const DType dtype : kAllDTypes)
      for (const int64_t numel : {0, 1, 31, 32, 33, 2345})
        for (const int64_t guard : {int64_t{0}, kGuard}) {
          problem.numel = numel;
          problem.guard = guard;
          check_problem(in_format(problem, dtype));
        }
}

// Master weights and averages, each alone and together.
void test_masters_and_emas() {
  for (Problem problem : main_problems())
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      problem = in_format(problem, dtype);
      for (const DType master :
           {DType::kAbsent, DType::kFloat32, DType::kRemainder, DType::kRemainder8}) {
        if (is_split(master_of(master)) && dtype != DType::kBFloat16) continue;
        problem.dtypes[kMaster] = master;
        for (const DType ema : {DType::kAbsent, DType::kFloat32, DType::kFloat64, dtype}) {
          problem.dtypes[kEma] = ema;
          problem.numel = 333;
          for (const unsigned stochastic : {0u, 1u << kParam, ~0u})
            check_problem(rounded_stochastically(problem, stochastic));
        }
      }
    }
}

// Averages interpolated from either end, and rates of 0 and 1.
void test_rates_of_emas() {
  for (Problem problem : main_problems())
    for (const double decay : {0.0, 0.25, 0.5, 0.999, 1.0})
      for (const uint64_t step : {1, 2})
        for (const DType dtype : kAllDTypes) {
          problem.hyper.ema_decay = decay;
          problem.scalars = scalars_at(problem, {step, false}, 2.0);
          problem.dtypes[kEma] = dtype;
          problem.numel = 77;
          check_problem(in_format(problem, dtype));
        }
}

int64_t any_size(std::mt19937& random) {
  const int64_t sizes[] = {1, 31, 32, 33, 64, 255, 256, 257, 300, 2345};
  return sizes[random() % 10];
}

void shift(Problem& problem, std::mt19937& random) {
  for (int64_t& by : problem.shifts) by = random() % 4 == 0 ? 1 + random() % kGuard : 0;
}

void test_mixtures() {
  std::mt19937 random(5);
  for (Problem problem : main_problems())
    for (int run = 0; run < 40; ++run) {
      problem.numel = any_size(random);
      problem.guard = run % 2 == 0 ? 0 : kGuard;
      problem.shifts = {};
      if (problem.guard > 0) shift(problem, random);
      check_problem(in_any_formats(problem, random));
    }
}

void test_strided() {
  std::mt19937 random(6);
  for (const Problem& problem : main_problems())
    for (const Dims& dims : strided_layouts()) {
      Problem strided = with_dims(problem, dims);
      for (const DType dtype : kAllDTypes) check_problem(in_format(strided, dtype));
      for (int run = 0; run < 3; ++run) {
        strided.guard = run % 2 == 0 ? 0 : kGuard;
        check_problem(in_any_formats(strided, random));
      }
    }
}

void test_special_values() {
  std::mt19937 random(7);
  for (Problem problem : main_problems())
    for (int run = 0; run < 24; ++run) {
      problem.numel = 777;
      const Problem any =
          run < 4 ? in_format(problem, kAllDTypes[run]) : in_any_formats(problem, random);
      Buffers buffers = make_buffers(any);
      put_special_values(any, buffers, 2, random);
      check_values(any, buffers);
    }
}

// One element for each bit pattern of a 16-bit format, with SGD that changes nothing. It computes
// in float or, with grads in float64, in double.
Problem unchanged(DType param, DType grad) {
  Problem problem = problems_of(kIdOf<Sgd>)[0];
  problem.hyper.lr = 0;
  problem.scalars = scalars_at(problem, {1, true}, 1.0);
  problem.dtypes[kParam] = param;
  problem.dtypes[kGrad] = grad;
  problem.numel = 65536;
  return problem;
}

void test_every_pattern() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (const DType grad : {DType::kFloat32, DType::kFloat64}) {
      const Problem problem = unchanged(dtype, grad);
      Buffers before = make_buffers(problem);
      for (int64_t i = 0; i < problem.numel; ++i) {
        before[kParam].set_word(i, static_cast<uint16_t>(i));
        before[kGrad].set(i, 1.0);  // times -lr it is -0, which changes no zero
      }
      check_values(problem, before);
      Buffers after = before;
      drive(problem, after, cpu::best_isa(), 1);
      const bool flushes = dtype == DType::kBFloat16 && grad == DType::kFloat32;
      for (int64_t i = 0; i < problem.numel; ++i) {
        const float value = before[kParam].get<float>(i);
        const bool is_subnormal = std::fpclassify(value) == FP_SUBNORMAL;
        if (std::isnan(value))
          CHECK(std::isnan(after[kParam].get<float>(i)));
        else
          CHECK(after[kParam].word(i) == (is_subnormal && flushes ? i & 0x8000 : i));
      }
    }
}

// Params of 0 become the grads, rounded: numbers of every exponent, and those halfway between two
// numbers of the format with their neighbours.
void test_every_rounding() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (const DType grad : {DType::kFloat32, DType::kFloat64}) {
      Problem problem = unchanged(dtype, grad);
      problem.hyper.lr = -1;
      problem.scalars = scalars_at(problem, {1, true}, 1.0);
      for (const int around : {-1, 0, 1}) {
        Buffers buffers = make_buffers(problem);
        for (int64_t i = 0; i < problem.numel; ++i) {
          buffers[kParam].set_word(i, static_cast<uint16_t>(i));
          const auto low = bit_cast<uint32_t>(buffers[kParam].get<float>(i));
          buffers[kParam].set_word(i, 0);
          // Half of a last place, of bfloat16 or of normal float16, as bits of a float.
          const uint32_t half = dtype == DType::kBFloat16 ? 0x8000u : 0x1000u;
          const float value = bit_cast<float>(low + half + static_cast<uint32_t>(around));
          buffers[kGrad].set(i, static_cast<double>(value));
        }
        check_values(problem, buffers);
        for (int64_t i = 0; i < problem.numel;
             ++i) {  // subnormal numbers of float16, and numbers too large for it
          const double value = (static_cast<double>(i) - 32768 + 0.5 * around) * 0x1p-26;
          buffers[kGrad].set(i, i % 2 == 0 ? value : std::ldexp(value, static_cast<int>(i % 61)));
        }
        check_values(problem, buffers);
      }
    }
}

// Square roots and quotients of all magnitudes: Adam with params of 0, which become grad /
// sqrt(exp_avg_sq).
void test_roots() {
  std::mt19937 random(12);
  const HyperParams hyper = {};
  Problem problem = problems_of(kIdOf<Adam>)[0];
  StepScalars<Adam, double> scalars = step_scalars<Adam>(hyper, {1, true}, {});
  scalars.rule = {};
  scalars.rule.grad_factor = 1;
  scalars.rule.square_average.decay = {1, 0};
  scalars.rule.step_size = -1;
  problem.scalars.set<Adam>(scalars);
  problem.numel = 65536;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64})
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0xfffeu, 0xffffu, 0x10000u, 0x10000u}) {
      problem = in_format(problem, dtype);
      Buffers buffers = make_buffers(problem);
      for (int64_t i = 0; i < problem.numel; ++i) {
        const uint32_t half = low < 0x10000u ? low : static_cast<uint32_t>(random() % 0x10000);
        const float square = bit_cast<float>(static_cast<uint32_t>(i) << 16 | half);
        buffers[kParam].set(i, 0.0);
        buffers[kFirstState + Adam::kExpAvgSq].set(i, static_cast<double>(square));
      }
      check_values(problem, buffers);
    }
}

// The random draws of a step differ by operand and element, and do not depend on what else is
// updated with them.
void test_draws() {
  Problem problem = in_format(problems_of(kIdOf<Adam>).back(), DType::kBFloat16);
  for (const StochasticRounding rounding :
       {StochasticRounding::kNone, StochasticRounding::kSecondMoments, StochasticRounding::kAll})
    for (const uint64_t step : {uint64_t{1}, uint64_t{2}, uint64_t{1} << 40}) {
      problem.hyper.stochastic_rounding = rounding;
      problem.scalars = scalars_at(problem, {step, false}, 1.0);
      for (unsigned operands = 0; operands < 1u << kMaster; ++operands)
        check_problem(rounded_stochastically(problem, operands));
    }
}

// One step of several problems. With `in_order`, the grad of each but the first is the param of the
// one before it.
void drive_all(const std::vector<Problem>& problems, std::vector<Buffers>& buffers, cpu::Isa isa,
               bool in_order) {
  std::vector<ParamUpdate> updates;
  std::vector<Scalars> scalars;
  std::vector<Layout> layouts;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& problem = problems[i];
    ParamUpdate update = make_update(problem, buffers[i]);
    if (in_order && i > 0) update.data[kGrad] = updates[i - 1].data[kParam];
    const auto is_own = [&](const Scalars& other) {
      return std::memcmp(&other, &problem.scalars, sizeof(Scalars)) == 0;
    };
    const auto found = std::find_if(scalars.begin(), scalars.end(), is_own);
    update.scalars = static_cast<int32_t>(found - scalars.begin());
    if (found == scalars.end()) scalars.push_back(problem.scalars);
    if (update.layout != kDense) {
      update.layout = static_cast<int32_t>(layouts.size());
      layouts.push_back({problem.dims.data(), static_cast<int>(problem.dims.size())});
    }
    updates.push_back(update);
    sizes.push_back(problem.numel);
  }
  const auto chunks = plan_chunks(sizes, kMinChunkElements);
  const Step step = {updates.data(),
                     scalars.data(),
                     layouts.data(),
                     chunks.data(),
                     static_cast<int64_t>(chunks.size()) - 1,
                     in_order};
  cpu::run(step, isa, 1);
}

void check_all(const std::vector<Problem>& problems, bool in_order) {
  std::vector<Buffers> before;
  for (size_t i = 0; i < problems.size(); ++i)
    before.push_back(make_buffers(problems[i], static_cast<uint32_t>(i)));
  std::vector<Buffers> expected = before;
  for (size_t i = 0; i < problems.size(); ++i) {
    if (in_order && i > 0) expected[i][kGrad] = expected[i - 1][kParam];
    update_one_by_one(problems[i], expected[i]);
    if (in_order) expected[i][kGrad] = before[i][kGrad];  // not used
  }
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (isa > cpu::best_isa()) continue;
    std::vector<Buffers> buffers = before;
    drive_all(problems, buffers, isa, in_order);
    CHECK(buffers == expected);
  }
}

// Tensors of several kinds in one step, mostly small and in runs of one kind: what does not fill
// blocks is computed together.
void test_many_tensors() {
  std::mt19937 random(8);
  const std::vector<Problem>& all = all_problems();
  for (int run = 0; run < 24; ++run) {
    std::vector<Problem> kinds;
    for (int i = 0; i < 3; ++i) kinds.push_back(in_any_formats(all[random() % all.size()], random));
    kinds.push_back(kinds[0]);  // with other scalars
    kinds.back().hyper.lr = 0.2;
    kinds.back().scalars = scalars_at(kinds.back(), {3, false}, 2.0);
    kinds.push_back(with_dims(kinds[0], strided_layouts()[random() % 4]));
    std::vector<Problem> problems;
    const uint32_t largest = run % 3 == 0 ? 1 : run % 3 == 1 ? 33 : 200;
    size_t kind = 0;
    for (int i = 0; i < 100; ++i) {
      if (random() % 20 == 0) kind = random() % kinds.size();
      problems.push_back(kinds[kind]);
      if (problems.back().dims.empty()) problems.back().numel = 1 + random() % largest;
      problems.back().guard = run % 2 == 0 ? 0 : kGuard;
    }
    check_all(problems, /*in_order=*/false);
  }
}

// A grad that is the param of the tensor before it is read after that one's update.
void test_order() {
  for (const Problem& problem : main_problems())
    for (const int64_t numel : {1, 31, 70}) {
      Problem small = problem;
      small.numel = numel;
      check_all(std::vector<Problem>(70, small), /*in_order=*/true);
    }
}

}  // namespace

void test_driver() {
  test_variants();
  test_dense();
  test_masters_and_emas();
  test_rates_of_emas();
  test_mixtures();
  test_strided();
  test_special_values();
  test_every_pattern();
  test_every_rounding();
  test_roots();
  test_draws();
  test_many_tensors();
  test_order();
}
