// Steps whose count, hyper-parameters and scale only the device knows, eager and captured: what the
// CPU driver gives with scalars that the host computes.
#include "check.h"
#include "gpus.h"

#include "cuda/schedule.h"

#include <cmath>
#include <deque>
#include <initializer_list>

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

// Where a tensor's step count is kept.
enum class Count { kFloat, kDouble, kNone };

// A model with clocks, and another that goes through the same steps on the CPU.
class Clocked {
 public:
  Clocked() : model_(empty_model()) {
    std::mt19937 random(11);
    for (const Problem& problem : all_problems()) {
      add(problem, DType::kFloat32, Count::kFloat, 0);
      add(problem, DType::kFloat64, Count::kDouble, 1000);
      add(problem, DType::kBFloat16, Count::kFloat, 7);
      add(problem, DType::kFloat16, Count::kDouble, 0);
      add(with_dims(problem, strided_layouts()[0]), DType::kFloat32, Count::kFloat, 0);
      Problem mixture = problem;
      mixture.dtypes[kParam] = DType::kFloat64;
      add_tensor(mixture, Count::kDouble, 3);
      // Averages and draws depend on the count as well.
      for (int i = 0; i < 3; ++i)
        add_tensor(in_any_formats(problem, random), i == 0 ? Count::kFloat : Count::kDouble, i);
      // Adam always counts; what SGD has instead is whether its state is new.
      if (problem.rule == kIdOf<Sgd>) add(problem, DType::kFloat32, Count::kNone, 0);
      model_.tensors.back().gpu = 3;
    }
    expected_ = model_;
  }

  Model& model() { return model_; }
  std::vector<HyperSource>& groups() { return groups_; }
  float& grad_scale() { return grad_scale_; }
  float& found_inf() { return found_inf_; }
  double step_of(size_t tensor) const { return steps_[tensor]; }
  bool is_counted(size_t tensor) const { return counts_[tensor] != Count::kNone; }

  Gpus::Options options() {
    Gpus::Options options;
    clocks_.clear();
    for (size_t i = 0; i < model_.tensors.size(); ++i) clocks_.push_back(clock(i));
    options.clocks = &clocks_;
    options.groups = &groups_;
    options.grad_scale = &grad_scale_;
    options.found_inf = &found_inf_;
    return options;
  }

  // What a step must do, done by the host.
  void expect_step() {
    if (found_inf_ > 0) return;
    expected_.scalars.clear();
    for (size_t i = 0; i < expected_.tensors.size(); ++i) {
      expected_.tensors[i].idle = model_.tensors[i].idle;
      expected_.tensors[i].scalars = static_cast<int>(i);
      Problem problem = model_.tensors[i].problem;
      problem.hyper = host_hyper(i);
      if (!model_.tensors[i].idle) ++steps_[i];
      const Time time = {static_cast<uint64_t>(steps_[i]), steps_[i] == 1};
      expected_.scalars.push_back(scalars_at(problem, time, grad_scale_));
    }
    step_on_cpu(expected_);
  }

  void check_values() {
    CHECK(model_.has_values_of(expected_));
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (counts_[i] == Count::kFloat) CHECK(floats_[i] == static_cast<float>(steps_[i]));
      if (counts_[i] == Count::kDouble) CHECK(doubles_[i] == steps_[i]);
    }
  }

  // Numbers of group `g` that the device reads; those on the host are wrong from here on.
  void put_on_device(size_t g) {
    HyperSource& group = groups_[g];
    const auto number = [&](double& value, DeviceNumber& source) {
      numbers_.push_back(value);
      source = {&numbers_.back(), DType::kFloat64};
      value = -1e9;
    };
    number(group.values.weight_decay, group.weight_decay);
    number(group.values.momentum, group.momentum);
    number(group.values.dampening, group.dampening);
    number(group.values.beta1, group.beta1);
    number(group.values.beta2, group.beta2);
    number(group.values.eps, group.eps);
    lr_ = static_cast<float>(group.values.lr);
    group.lr = {&lr_, DType::kFloat32};
    group.values.lr = -1e9;
  }

  float& lr() { return lr_; }

 private:
  void add(const Problem& problem, DType dtype, Count count, int steps_done) {
    add_tensor(in_format(problem, dtype), count, steps_done);
  }

  // Each tensor is a param group.
  void add_tensor(Problem problem, Count count, int steps_done) {
    problem.numel = problem.dims.empty() ? 333 : problem.numel;
    HyperSource source = {};
    source.values = problem.hyper;
    source.values.lr = 0.01 * static_cast<double>(1 + model_.tensors.size());
    hypers_.push_back(source.values);
    groups_.push_back(source);
    model_.add(problem);
    counts_.push_back(count);
    steps_.push_back(steps_done);
    floats_.push_back(static_cast<float>(steps_done));
    doubles_.push_back(steps_done);
  }

  Clock clock(size_t tensor) {
    Clock clock = {};
    clock.group = static_cast<int32_t>(tensor);
    clock.active = !model_.tensors[tensor].idle;
    clock.dtype = counts_[tensor] == Count::kDouble ? DType::kFloat64 : DType::kFloat32;
    if (counts_[tensor] == Count::kFloat) clock.step = &floats_[tensor];
    if (counts_[tensor] == Count::kDouble) clock.step = &doubles_[tensor];
    clock.is_first = counts_[tensor] == Count::kNone && steps_[tensor] == 0;
    clock.is_fresh = true;
    return clock;
  }

  Hyper host_hyper(size_t tensor) const {
    Hyper hyper = hypers_[tensor];
    if (groups_[tensor].lr.data != nullptr) hyper.lr = static_cast<double>(lr_);
    return hyper;
  }

  Model model_, expected_;
  std::vector<Hyper> hypers_;
  std::vector<HyperSource> groups_;
  std::vector<Clock> clocks_;
  std::vector<Count> counts_;
  std::vector<double> steps_;
  // Device memory.
  std::deque<float> floats_;
  std::deque<double> doubles_, numbers_;
  float grad_scale_ = 1, found_inf_ = 0, lr_ = 0;
};

void step_and_check(Gpus& gpus, Clocked& clocked) {
  const Gpus::Options options = clocked.options();
  clocked.expect_step();
  gpus.step(clocked.model(), options);
  clocked.check_values();
}

void test_steps_are_counted() {
  Gpus gpus;
  Clocked clocked;
  for (int step = 0; step < 4; ++step) {
    clocked.grad_scale() = step == 2 ? 65536.0f : 1.0f;
    step_and_check(gpus, clocked);
  }
}

// A skipped step counts for nothing: the one after it is a first step still.
void test_skipped_steps() {
  Gpus gpus;
  Clocked clocked;
  for (const float found_inf : {1.0f, 0.0f, 3.0f, 0.0f}) {
    clocked.found_inf() = found_inf;
    step_and_check(gpus, clocked);
  }
  CHECK(clocked.step_of(0) == 2);
}

void test_idle_tensors_are_not_counted() {
  Gpus gpus;
  Clocked clocked;
  for (size_t step = 0; step < 4; ++step) {
    for (size_t i = 0; i < clocked.model().tensors.size(); ++i)
      clocked.model().tensors[i].idle = (i + step) % 3 == 1;
    step_and_check(gpus, clocked);
  }
}

void test_numbers_on_the_device() {
  Gpus gpus;
  Clocked clocked;
  const size_t last = clocked.model().tensors.size() - 1;  // Adam's, while the first are SGD's
  for (const size_t group : {size_t{0}, size_t{3}, last, last - 4}) {
    clocked.put_on_device(group);
    for (const float lr : {0.5f, 0.25f}) {
      clocked.lr() = lr;
      step_and_check(gpus, clocked);
    }
  }
}

// Counts that a float does not tell from their neighbours, as in torch.
void test_late_steps() {
  for (const double done : {16777215.0, 16777216.0, 9007199254740991.0}) {
    float in_float = static_cast<float>(done);
    double in_double = done;
    CHECK(advance({&in_float, 0, DType::kFloat32, true, false, false}).step ==
          static_cast<uint64_t>(static_cast<double>(static_cast<float>(done)) + 1));
    CHECK(advance({&in_double, 0, DType::kFloat64, true, true, false}).step ==
          static_cast<uint64_t>(done) + 1);
    CHECK(in_double == done + 1);
    CHECK(in_float == static_cast<float>(static_cast<double>(static_cast<float>(done)) + 1));
  }
}

void move_buffers(Model& model) {
  for (Tensor& tensor : model.tensors) tensor.buffers = std::vector<Buffer>(tensor.buffers);
}

// What was captured reads its own table, whatever the steps in between do; lr, counts, scale and
// found_inf are read anew in every replay.
void test_capture() {
  Gpus gpus;
  Clocked clocked;
  clocked.put_on_device(0);
  clocked.put_on_device(clocked.model().tensors.size() - 1);
  for (int warm_up = 0; warm_up < 2; ++warm_up) step_and_check(gpus, clocked);
  emulation()->begin_capture();
  gpus.step(clocked.model(), clocked.options());
  emulation()->end_capture();
  clocked.check_values();                         // nothing has run
  CHECK(gpus.allocations(Memory::kDevice) == 2);  // a graph's table is not from torch
  for (int replay = 0; replay < 4; ++replay) {
    clocked.lr() = 0.125f * static_cast<float>(replay);
    clocked.grad_scale() = replay == 1 ? 8.0f : 1.0f;
    clocked.found_inf() = replay == 2 ? 1.0f : 0.0f;
    clocked.expect_step();
    emulation()->replay();
    clocked.check_values();
    clocked.found_inf() = 0;
    Model moved = clocked.model();  // another model's step, with the same driver
    move_buffers(moved);
    std::vector<double> counts(moved.tensors.size());
    std::vector<Clock> clocks(moved.tensors.size());
    for (size_t i = 0; i < clocks.size(); ++i)
      clocks[i] = {&counts[i], static_cast<int32_t>(i), DType::kFloat64, true, false, true};
    Gpus::Options options = clocked.options();
    options.clocks = &clocks;
    gpus.step(moved, options);
    clocked.check_values();
  }
}

// A graph that was captured at the very first step, and steps without a graph after it.
void test_capture_first() {
  Gpus gpus;
  Clocked clocked;
  emulation()->begin_capture();
  gpus.step(clocked.model(), clocked.options());
  emulation()->end_capture();
  for (int step = 0; step < 3; ++step) {
    // Without a count, the graph goes on as it was captured: as a first step.
    if (step == 0) {
      clocked.expect_step();
      emulation()->replay();
      clocked.check_values();
    }
    step_and_check(gpus, clocked);
  }
  CHECK(gpus.allocations(Memory::kDevice) == 2);
}

// Two steps in one graph, each with a table of its own that lives as long as the driver.
void test_capture_twice() {
  Gpus gpus;
  Clocked clocked;
  // Without a count, both would go on as they were captured: as first steps.
  for (size_t i = 0; i < clocked.model().tensors.size(); ++i)
    clocked.model().tensors[i].idle = !clocked.is_counted(i);
  emulation()->begin_capture();
  gpus.step(clocked.model(), clocked.options());
  gpus.step(clocked.model(), clocked.options());
  emulation()->end_capture();
  for (int replay = 0; replay < 2; ++replay) {
    clocked.expect_step();
    clocked.expect_step();
    emulation()->replay();
    clocked.check_values();
  }
}

}  // namespace

void test_clocks() {
  test_steps_are_counted();
  test_skipped_steps();
  test_idle_tensors_are_not_counted();
  test_numbers_on_the_device();
  test_late_steps();
  test_capture();
  test_capture_first();
  test_capture_twice();
}
