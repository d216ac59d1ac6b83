#include "problem.h"

#include <algorithm>

using namespace fusedopt;

namespace {

template <class T, class Family, int kVariant>
void update_variant(const Problem& problem, Family family, std::vector<Buffer>& buffers) {
  const typename Family::template Rule<T, kVariant> rule = {
      scalars_of(family, problem.scalars).rule.template as<T>()};
  for (int64_t i = 0; i < problem.numel; ++i) {
    T values[kMaxOperands] = {};
    for (size_t k = 0; k < buffers.size(); ++k)
      values[k] = buffers[k].get<T>(offset_of(problem, i, k));
    rule(values[0], values[1], values[2], values[3], values[4]);
    for (size_t k = 0; k < buffers.size(); ++k)
      if (k != kGrad) buffers[k].set(offset_of(problem, i, k), values[k]);
  }
}

template <class T, class Family, int kVariant = 0>
void find_and_update(const Problem& problem, Family family, std::vector<Buffer>& buffers) {
  if constexpr (kVariant < Family::kNumVariants) {
    if (problem.variant == kVariant)
      return update_variant<T, Family, kVariant>(problem, family, buffers);
    find_and_update<T, Family, kVariant + 1>(problem, family, buffers);
  }
}

Problem make_problem(RuleId rule, const Hyper& hyper, int num_states) {
  Problem problem = {};
  problem.rule = rule;
  problem.hyper = hyper;
  with_family(rule, [&](auto family) { problem.variant = variant(family, hyper); });
  problem.scalars = scalars_at(problem, {3, false}, 2.0);
  problem.dtypes.assign(static_cast<size_t>(kFirstState + num_states), DType::kFloat32);
  problem.numel = 2345;
  problem.guard = kGuard;
  return problem;
}

Problem sgd_problem(Momentum momentum, Decay decay) {
  Hyper hyper;
  hyper.lr = 0.1;
  hyper.momentum = momentum == Momentum::kNone ? 0 : 0.9;
  hyper.nesterov = momentum == Momentum::kNesterov;
  hyper.dampening = momentum == Momentum::kHeavyBall ? 0.25 : 0;
  hyper.weight_decay = decay == Decay::kNone ? 0 : 0.03;
  hyper.decoupled_weight_decay = decay == Decay::kDecoupled;
  return make_problem(RuleId::kSgd, hyper, momentum == Momentum::kNone ? 0 : 1);
}

Problem adam_problem(Decay decay, bool amsgrad) {
  Hyper hyper;
  hyper.lr = 0.1;
  hyper.beta1 = 0.9;
  hyper.beta2 = 0.99;
  hyper.eps = 1e-3;
  hyper.weight_decay = decay == Decay::kNone ? 0 : 0.03;
  hyper.decoupled_weight_decay = decay == Decay::kDecoupled;
  hyper.amsgrad = amsgrad;
  return make_problem(RuleId::kAdam, hyper, amsgrad ? 3 : 2);
}

}  // namespace

std::vector<Problem> all_problems() {
  std::vector<Problem> problems;
  for (const Decay decay : {Decay::kNone, Decay::kDecoupled, Decay::kL2}) {
    for (const Momentum momentum : {Momentum::kNone, Momentum::kHeavyBall, Momentum::kNesterov})
      problems.push_back(sgd_problem(momentum, decay));
    for (const bool amsgrad : {false, true}) problems.push_back(adam_problem(decay, amsgrad));
  }
  return problems;
}

std::vector<Problem> problems_of(RuleId rule) {
  std::vector<Problem> problems = all_problems();
  problems.erase(std::remove_if(problems.begin(), problems.end(),
                                [=](const Problem& problem) { return problem.rule != rule; }),
                 problems.end());
  return problems;
}

Problem in_format(Problem problem, DType dtype) {
  problem.dtypes.assign(problem.dtypes.size(), dtype);
  return problem;
}

Problem with_dims(Problem problem, const Dims& dims) {
  problem.dims = dims;
  problem.numel = 1;
  for (const Dim& dim : dims) problem.numel *= dim.size;
  return problem;
}

const std::vector<Dims>& strided_layouts() {
  static const std::vector<Dims> kLayouts = {
      {{7, {400, 300, 300, 301, 300}}, {300, {1, 1, 1, 1, 1}}},  // column slices
      {{37, {41, 1, 1, 41, 2}}, {41, {1, 37, 37, 1, 80}}},       // transposed grads
      {{5, {500, 0, 100, 100, 100}}, {10, {40, 0, 10, 10, 10}}, {10, {3, 1, 1, 1, 1}}},
      {{1500, {2, 1, 1, 1, 1}}},  // every second
      {{1500, {2, 3, 4, 5, 6}}},
  };
  return kLayouts;
}

Scalars scalars_at(const Problem& problem, Time time, double grad_scale) {
  Scalars scalars = {};
  with_family(problem.rule, [&](auto family) {
    set_scalars(scalars, schedule(family, problem.hyper, time, {grad_scale, 0}));
  });
  return scalars;
}

std::vector<Buffer> make_buffers(const Problem& problem, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Buffer> buffers;
  for (size_t k = 0; k < problem.dtypes.size(); ++k) {
    const int64_t elements =
        problem.dims.empty() ? problem.numel : extent(problem.dims, static_cast<int>(k));
    const int64_t shift = problem.shifts.empty() ? 0 : problem.shifts[k];
    buffers.emplace_back(problem.dtypes[k], elements, random, problem.guard, shift);
  }
  return buffers;
}

int64_t offset_of(const Problem& problem, int64_t i, size_t k) {
  if (problem.dims.empty()) return i;
  int64_t at = 0;
  for (auto dim = problem.dims.rbegin(); dim != problem.dims.rend(); ++dim) {
    at += i % dim->size * dim->strides[k];
    i /= dim->size;
  }
  return at;
}

void update_one_by_one(const Problem& problem, std::vector<Buffer>& buffers) {
  const bool is_double =
      std::count(problem.dtypes.begin(), problem.dtypes.end(), DType::kFloat64) > 0;
  with_family(problem.rule, [&](auto family) {
    if (is_double)
      find_and_update<double>(problem, family, buffers);
    else
      find_and_update<float>(problem, family, buffers);
  });
}

Work make_work(const Problem& problem, std::vector<Buffer>& buffers) {
  Work work = {};
  for (size_t k = 0; k < buffers.size(); ++k) {
    work.data[k] = buffers[k].data();
    work.dtypes[k] = buffers[k].dtype();
  }
  work.numel = problem.numel;
  work.layout = problem.dims.empty() ? kDense : 0;
  work.num_operands = static_cast<uint8_t>(buffers.size());
  work.variant = static_cast<uint8_t>(problem.variant);
  work.device = kCpu;
  return work;
}
