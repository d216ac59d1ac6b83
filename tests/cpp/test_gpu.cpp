// The CUDA driver through its interface, with the code of its kernels emulated: bit for bit what
// the CPU driver gives, which its own tests compare with the rules.
#include "check.h"
#include "gpus.h"

#include "cuda/update.h"

#include <cmath>

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

// Sizes at and around the ends of pieces, warps and blocks.
std::vector<int64_t> sizes() {
  return {0, 1, 3, 31, 32, 33, 64, 127, 255, 256, 257, 511, 512, 513, 1024, 2345};
}

// Steps the model on the GPU and a copy of it on the CPU.
void check_steps(Gpus& gpus, Model& model, int steps = 1) {
  Model expected = model;
  for (int step = 0; step < steps; ++step) {
    step_on_cpu(expected);
    gpus.step(model);
    CHECK(model.has_values_of(expected));
  }
}

void check_steps(Model model) {
  Gpus gpus;
  const Model before = model;
  check_steps(gpus, model, 2);
  CHECK(!model.has_values_of(before));
}

void test_variants() {
  Model model = empty_model();
  for (Problem problem : all_problems())
    for (const DType dtype : kAllDTypes) {
      problem.numel = 333;
      model.add(in_format(problem, dtype));
    }
  check_steps(model);
}

void test_formats_and_sizes() {
  Model model = empty_model();
  for (Problem problem : main_problems())
    for (const DType dtype : kAllDTypes)
      for (const int64_t numel : sizes())
        for (const int64_t guard : {int64_t{0}, kGuard}) {
          problem.numel = numel;
          problem.guard = guard;
          model.add(in_format(problem, dtype));
        }
  check_steps(model);
}

// Master weights and averages, each alone and together.
void test_masters_and_emas() {
  Model model = empty_model();
  for (Problem problem : main_problems())
    for (const DType dtype : kAllDTypes) {
      problem = in_format(problem, dtype);
      for (const DType master :
           {DType::kAbsent, DType::kFloat32, DType::kRemainder, DType::kRemainder8}) {
        if (is_split(master_of(master)) && dtype != DType::kBFloat16) continue;
        if (master == DType::kFloat32 && item_size(dtype) > 2) continue;
        problem.dtypes[kMaster] = master;
        for (const DType ema : {DType::kAbsent, DType::kFloat32, DType::kFloat64, dtype}) {
          problem.dtypes[kEma] = ema;
          for (const unsigned stochastic : {0u, 1u << kParam, ~0u})
            for (const int64_t numel : {33, 513, 2345}) {
              problem.numel = numel;
              problem.guard = numel == 513 ? 0 : kGuard;
              model.add(rounded_stochastically(problem, stochastic));
            }
        }
      }
    }
  check_steps(model);
}

void test_mixtures() {
  std::mt19937 random(5);
  Model model = empty_model();
  for (Problem problem : main_problems())
    for (int run = 0; run < 60; ++run) {
      problem.numel = sizes()[random() % sizes().size()];
      problem.guard = run % 2 == 0 ? 0 : kGuard;
      model.add(in_any_formats(problem, random));
    }
  check_steps(model);
}

// The first average is the weight as it is stored, whatever the average could hold.
void test_first_averages() {
  Model model = empty_model();
  for (int kind = 0; kind < kNumKinds; ++kind)
    model.scalars[static_cast<size_t>(kind)] =
        scalars_at(problems_of(kind).back(), {1, false}, 1.0);
  for (Problem problem : main_problems())
    for (const DType dtype : kAllDTypes) {
      problem = in_format(problem, dtype);
      problem.dtypes[kEma] = DType::kFloat64;
      problem.numel = 333;
      model.add(problem);
      model.add(with_dims(problem, strided_layouts()[1]));
    }
  check_steps(model);
}

// First each operand alone, then all, not aligned as wide accesses need.
void test_misaligned() {
  std::mt19937 random(6);
  Model model = empty_model();
  for (const Problem& problem : main_problems())
    for (int mixture = 0; mixture < 8; ++mixture)
      for (int moved = 0; moved <= kMaxOperands; ++moved)
        for (const int64_t by : {1, 2, 4}) {
          Problem shifted = mixture < 4 ? in_format(problem, kAllDTypes[mixture])
                                        : in_any_formats(problem, random);
          if (moved < kMaxOperands && !shifted.has(moved)) continue;
          for (int k = 0; k < kMaxOperands; ++k)
            if (moved == k || moved == kMaxOperands) shifted.shifts[static_cast<size_t>(k)] = by;
          shifted.numel = by == 1 ? 777 : 130;  // for a block, and for a warp
          model.add(shifted);
        }
  check_steps(model);
}

void test_strided() {
  std::mt19937 random(7);
  Model model = empty_model();
  for (const Problem& problem : main_problems())
    for (const Dims& dims : strided_layouts())
      for (int mixture = 0; mixture < 8; ++mixture) {
        Problem strided = with_dims(problem, dims);
        strided =
            mixture < 4 ? in_format(strided, kAllDTypes[mixture]) : in_any_formats(strided, random);
        strided.guard = mixture % 2 == 0 ? 0 : kGuard;
        model.add(strided);
      }
  model.add(with_dims(all_problems()[0], {{0, {2, 1, 1, 1, 1, 1, 1, 1}}}));
  check_steps(model);
}

// Zeros, and numbers for which the branch-free square roots and divisions are not exact.
void test_special_values() {
  std::mt19937 random(10);
  Model model = empty_model();
  for (Problem problem : main_problems())
    for (int run = 0; run < 24; ++run) {
      problem.numel = sizes()[random() % sizes().size()];
      model.add(run < 4 ? in_format(problem, kAllDTypes[run]) : in_any_formats(problem, random));
      Tensor& tensor = model.tensors.back();
      // Few in a tensor, so that their neighbours are ordinary numbers, or many.
      put_special_values(tensor.problem, tensor.buffers, run % 3 == 0 ? 2 : 40, random);
    }
  check_steps(model);
}

void test_many_small_tensors() {
  Model model = empty_model();
  Problem problem = problems_of(kIdOf<Adam>)[0];
  for (int i = 0; i < 10000; ++i) {
    problem.numel = i % 7 == 0 ? 64 : i % 5;
    model.add(problem);
  }
  check_steps(model);
}

void test_one_large_tensor() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Problem problem = in_format(problems_of(kIdOf<Adam>).back(), dtype);
    problem.numel = 65536 + 77;
    problem.guard = 0;
    Model model = empty_model();
    model.add(rounded_stochastically(problem, ~0u));
    check_steps(model);
  }
}

// Scalars so few that they fit into a kernel's arguments, and more, in float and in double.
void test_many_scalars() {
  for (const int fit :
       {UpdateArguments<Sgd, float>::kFew, UpdateArguments<Sgd, double>::kFew,
        UpdateArguments<Adam, float>::kFew, UpdateArguments<Adam, double>::kFew,
        UpdateArguments<OtherRules, float>::kFew, UpdateArguments<OtherRules, double>::kFew, 400})
    for (const int count : {fit - 1, fit, fit + 1}) {
      Model model;
      for (int i = 0; i < count; ++i) {
        Problem problem = problems_of(i / 2 % kNumKinds).back();
        problem.numel = 5;
        problem.hyper.lr = 0.001 * i;
        model.scalars.push_back(scalars_at(problem, {3, false}, 1.0));
        for (const DType dtype : kAllDTypes) model.add(in_format(problem, dtype), 0, i);
      }
      check_steps(model);
    }
}

// A tensor of any kind.
Problem any_problem(std::mt19937& random) {
  const std::vector<Problem>& problems = all_problems();
  const Problem problem = in_any_formats(problems[random() % problems.size()], random);
  if (random() % 4 == 0)
    return with_dims(problem, strided_layouts()[random() % strided_layouts().size()]);
  Problem dense = problem;
  dense.numel = sizes()[random() % sizes().size()];
  for (int64_t& shift : dense.shifts) shift = random() % 8 == 0 ? 1 : 0;
  return dense;
}

// What users may do between two steps.
void disturb(Model& model, std::mt19937& random) {
  for (Tensor& tensor : model.tensors) {
    tensor.idle = random() % 5 == 0;
    if (random() % 5 == 0) tensor.buffers = std::vector<Buffer>(tensor.buffers);  // it moves
    if (random() % 30 == 0) tensor.gpu = 3 - tensor.gpu;
    if (random() % 30 == 0) {
      tensor.problem = any_problem(random);
      tensor.buffers = make_buffers(tensor.problem, static_cast<uint32_t>(random()));
    }
  }
  // Groups of scalars, one for each kind of problem.
  if (random() % 4 == 0) model.scalars.resize((1 + random() % 10) * kNumKinds);
  for (size_t i = 0; i < model.scalars.size(); ++i) {
    Problem problem = problems_of(static_cast<int>(i % kNumKinds)).back();
    problem.hyper.lr = static_cast<double>(random() % 1000) / 1000;
    model.scalars[i] = scalars_at(problem, {1 + random() % 10, false}, 1.0);
  }
  const auto groups = model.scalars.size() / kNumKinds;
  for (Tensor& tensor : model.tensors)
    tensor.scalars = static_cast<int>(random() % groups) * kNumKinds + kind_of(tensor.problem);
}

// Anything may change from one step to the next, on two GPUs.
void test_everything_changes() {
  std::mt19937 random(8);
  for (int run = 0; run < 6; ++run) {
    Gpus gpus;
    Model model = empty_model();
    for (int i = 0; i < 30; ++i) model.add(any_problem(random), i % 2 == 0 ? 0 : 3);
    for (int step = 0; step < 15; ++step) {
      check_steps(gpus, model);
      if (step % 3 != 0) disturb(model, random);
    }
  }
}

// Pointers may change, as those of new grads do, without new memory on the device.
void test_memory_is_kept() {
  Gpus gpus;
  Model model = empty_model();
  for (const int64_t numel : sizes()) {
    Problem problem = problems_of(kIdOf<Adam>)[0];
    problem.numel = numel;
    for (const int gpu : {0, 3}) model.add(problem, gpu);
  }
  for (int step = 0; step < 4; ++step) {
    check_steps(gpus, model);
    for (Tensor& tensor : model.tensors) tensor.buffers = std::vector<Buffer>(tensor.buffers);
  }
  CHECK(gpus.allocations(Memory::kDevice) == 2);
  CHECK(gpus.allocations(Memory::kPageLocked) == 2);
  Gpus::Options options;
  options.stream = &model;  // a table serves one stream only
  gpus.step(model, options);
  CHECK(gpus.allocations(Memory::kDevice) == 4);
}

// found_inf is read on the device; if it is above 0, nothing changes.
void test_found_inf() {
  for (const float found_inf : {0.0f, 1.0f, 2.0f}) {
    Gpus gpus;
    Model model = empty_model();
    for (const Problem& problem : main_problems())
      for (const DType dtype : kAllDTypes) {
        model.add(in_format(problem, dtype));
        model.add(in_format(with_dims(problem, strided_layouts()[0]), dtype));
      }
    Model expected = model;
    if (found_inf == 0) step_on_cpu(expected);
    Gpus::Options options;
    options.found_inf = &found_inf;
    gpus.step(model, options);
    CHECK(model.has_values_of(expected));
  }
}

// A step for which there is no memory changes nothing, and the next one is right.
void test_no_memory() {
  std::mt19937 random(9);
  for (int allocations = 0; allocations < 4; ++allocations) {
    Gpus gpus;
    Model model = empty_model();
    for (int i = 0; i < 20; ++i) model.add(any_problem(random), i % 2 == 0 ? 0 : 3);
    const Model before = model;
    gpus.fail_in(allocations);
    bool failed = false;
    try {
      gpus.step(model);
    } catch (const std::runtime_error&) {
      failed = true;
    }
    CHECK(failed && model.has_values_of(before));
    model.tensors[0].buffers = std::vector<Buffer>(model.tensors[0].buffers);
    check_steps(gpus, model, 2);
  }
}

void test_nothing_to_do() {
  Gpus gpus;
  Model model = empty_model();
  gpus.step(model);  // no tensors
  model.add(problems_of(kIdOf<Sgd>)[0]);
  model.tensors[0].idle = true;
  check_steps(gpus, model, 2);
  Problem problem = problems_of(kIdOf<Sgd>)[0];
  problem.numel = 0;
  for (int i = 0; i < 9; ++i) model.add(problem);
  check_steps(gpus, model, 2);
  for (Tensor& tensor : model.tensors) tensor.idle = true;
  check_steps(gpus, model, 2);
}

}  // namespace

void test_gpu() {
  test_variants();
  test_formats_and_sizes();
  test_masters_and_emas();
  test_first_averages();
  test_mixtures();
  test_misaligned();
  test_strided();
  test_special_values();
  test_many_small_tensors();
  test_one_large_tensor();
  test_many_scalars();
  test_everything_changes();
  test_memory_is_kept();
  test_found_inf();
  test_no_memory();
  test_nothing_to_do();
}
