// The CPU driver on works made by hand: every instruction set, any dtypes and layouts, bit for bit
// what the rule gives for each element alone.
#include "check.h"

#include "core/schedule.h"
#include "core/step.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

using namespace fusedopt;

namespace {

constexpr int64_t kGuard = 8;  // elements around an operand that must not change

// One operand's memory, of any format.
class Buffer {
 public:
  Buffer(DType dtype, int64_t elements, std::mt19937& random)
      : dtype_(dtype), bytes_(static_cast<size_t>((elements + 2 * kGuard) * item_size(dtype))) {
    std::normal_distribution<double> normal;
    for (int64_t i = -kGuard; i < elements + kGuard; ++i) set(i, std::fabs(normal(random)));
  }

  void* data() { return bytes_.data() + kGuard * item_size(dtype_); }
  DType dtype() const { return dtype_; }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

  template <class T>
  T get(int64_t at) {
    T value = 0;
    with_storage(dtype_, [&](auto storage) {
      std::memcpy(&storage, place(at), sizeof(storage));
      value = load<T>(storage);
    });
    return value;
  }

  template <class T>
  void set(int64_t at, T value) {
    with_storage(dtype_, [&](auto storage) {
      store(storage, value);
      std::memcpy(place(at), &storage, sizeof(storage));
    });
  }

 private:
  uint8_t* place(int64_t at) { return bytes_.data() + (kGuard + at) * item_size(dtype_); }

  DType dtype_;
  std::vector<uint8_t> bytes_;
};

struct Problem {
  RuleId rule;
  int variant;
  Scalars scalars;
  std::vector<DType> dtypes;  // param, grad, states
  Dims dims;                  // empty: dense
  int64_t numel;
};

std::vector<Buffer> make_buffers(const Problem& problem) {
  std::mt19937 random(4);
  std::vector<Buffer> buffers;
  for (size_t k = 0; k < problem.dtypes.size(); ++k) {
    const int64_t elements =
        problem.dims.empty() ? problem.numel : extent(problem.dims, static_cast<int>(k));
    buffers.emplace_back(problem.dtypes[k], elements, random);
  }
  return buffers;
}

// Offset of element number i in operand k.
int64_t offset_of(const Problem& problem, int64_t i, size_t k) {
  if (problem.dims.empty()) return i;
  int64_t at = 0;
  for (auto dim = problem.dims.rbegin(); dim != problem.dims.rend(); ++dim) {
    at += i % dim->size * dim->strides[k];
    i /= dim->size;
  }
  return at;
}

template <class T, class Family, int kVariant>
void update_one_by_one(const Problem& problem, Family family, std::vector<Buffer>& buffers) {
  const typename Family::template Rule<T, kVariant> rule = {
      scalars_of(family, problem.scalars).template as<T>()};
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
      return update_one_by_one<T, Family, kVariant>(problem, family, buffers);
    find_and_update<T, Family, kVariant + 1>(problem, family, buffers);
  }
}

void reference(const Problem& problem, std::vector<Buffer>& buffers) {
  bool is_double = false;
  for (const DType dtype : problem.dtypes) is_double = is_double || dtype == DType::kFloat64;
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
  work.active = true;
  return work;
}

void drive(const Problem& problem, std::vector<Buffer>& buffers, cpu::Isa isa, int threads) {
  Work works[3] = {{}, make_work(problem, buffers), make_work(problem, buffers)};
  works[2].active = false;  // would update a second time
  const auto chunks = plan_chunks({0, problem.numel, problem.numel}, 1000);
  const Layout layout = {problem.dims.data(), static_cast<int>(problem.dims.size())};
  const Step step = {problem.rule, works,         &problem.scalars,
                     &layout,      chunks.data(), static_cast<int64_t>(chunks.size()) - 1};
  cpu::run(step, isa, threads);
}

void check_problem(const Problem& problem) {
  std::vector<Buffer> expected = make_buffers(problem);
  const std::vector<Buffer> before = expected;
  reference(problem, expected);
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

Problem sgd_problem(Momentum momentum, bool decay) {
  Hyper hyper;
  hyper.lr = 0.1;
  hyper.momentum = 0.9;
  hyper.weight_decay = 0.03;
  Problem problem = {};
  problem.rule = RuleId::kSgd;
  problem.variant = SgdFamily::variant(momentum, decay);
  problem.scalars.sgd = sgd_scalars(hyper, false, 2.0);
  problem.dtypes.assign(momentum == Momentum::kNone ? 2 : 3, DType::kFloat32);
  problem.numel = 2345;
  return problem;
}

Problem adam_problem(Decay decay, bool amsgrad) {
  Hyper hyper;
  hyper.lr = 0.1;
  hyper.beta1 = 0.9;
  hyper.beta2 = 0.99;
  hyper.eps = 1e-3;
  hyper.weight_decay = 0.03;
  Problem problem = {};
  problem.rule = RuleId::kAdam;
  problem.variant = AdamFamily::variant(decay, amsgrad);
  problem.scalars.adam = adam_scalars(hyper, 3, 2.0);
  problem.dtypes.assign(amsgrad ? 5 : 4, DType::kFloat32);
  problem.numel = 2345;
  return problem;
}

std::vector<Problem> all_problems() {
  std::vector<Problem> problems;
  for (const bool flag : {false, true}) {
    for (const Momentum momentum : {Momentum::kNone, Momentum::kHeavyBall, Momentum::kNesterov})
      problems.push_back(sgd_problem(momentum, flag));
    for (const Decay decay : {Decay::kNone, Decay::kL2, Decay::kDecoupled})
      problems.push_back(adam_problem(decay, flag));
  }
  return problems;
}

const DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

void test_dense() {
  for (Problem problem : all_problems())
    for (const DType dtype : kAll)
      for (const int64_t numel : {0, 1, 31, 2345}) {
        problem.dtypes.assign(problem.dtypes.size(), dtype);
        problem.numel = numel;
        check_problem(problem);
      }
}

void test_mixed_dtypes() {
  std::mt19937 random(5);
  for (Problem problem : all_problems())
    for (int run = 0; run < 10; ++run) {
      for (DType& dtype : problem.dtypes) dtype = kAll[random() % 4];
      check_problem(problem);
    }
}

void test_strided() {
  const Dims layouts[] = {
      {{7, {400, 300, 300, 301, 300}}, {300, {1, 1, 1, 1, 1}}},  // column slices
      {{37, {41, 1, 1, 41, 2}}, {41, {1, 37, 37, 1, 80}}},       // transposed grads
      {{5, {500, 0, 100, 100, 100}}, {10, {40, 0, 10, 10, 10}}, {10, {3, 1, 1, 1, 1}}},
      {{1500, {2, 1, 1, 1, 1}}},  // every second
      {{1500, {2, 3, 4, 5, 6}}},
  };
  for (Problem problem : all_problems())
    for (const Dims& dims : layouts)
      for (const DType dtype : kAll) {
        problem.dims = dims;
        problem.numel = 1;
        for (const Dim& dim : dims) problem.numel *= dim.size;
        problem.dtypes.assign(problem.dtypes.size(), dtype);
        check_problem(problem);
      }
}

}  // namespace

void test_driver() {
  test_dense();
  test_mixed_dtypes();
  test_strided();
}
