// Steps whose count, hyper-parameters and grad_scale only the device knows, eager and captured,
// give what the CPU driver gives with scalars that the host computes.
#include "check.h"
#include "gpus.h"

#include "core/emulation.h"
#include "cuda/step_scalars.h"

#include <cmath>
#include <deque>
#include <initializer_list>

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

// How a tensor's step count is kept.
enum class Count { kFloat, kDouble, kNone };

// A model with step counters, and another that goes through the same steps on the CPU.
class Counted {
 public:
  Counted() : model_(empty_model()) {
    std::mt19937 random(11);
    for (const Problem& problem : main_problems()) {
      add(problem, DType::kFloat32, Count::kFloat, 0);
      add(problem, DType::kFloat64, Count::kDouble, 1000);
      add(problem, DType::kBFloat16, Count::kFloat, 7);
      add(problem, DType::kFloat16, Count::kDouble, 0);
      add(with_dims(problem, strided_layouts()[0]), DType::kFloat32, Count::kFloat, 0);
      Problem mixture = problem;
      mixture.dtypes[kParam] = DType::kFloat64;
      add_tensor(mixture, Count::kDouble, 3);
      // Averages and random draws depend on the count as well.
      for (int i = 0; i < 3; ++i)
        add_tensor(in_any_formats(problem, random), i == 0 ? Count::kFloat : Count::kDouble, i);
      // Most rules always count their steps. SGD may only know whether its state is new.
      if (problem.rule == kIdOf<Sgd>) add(problem, DType::kFloat32, Count::kNone, 0);
      model_.tensors.back().gpu = 3;
    }
    expected_ = model_;
  }

  Model& model() { return model_; }
  std::vector<HyperParamsRef>& groups() { return groups_; }
  float& grad_scale() { return grad_scale_; }
  float& found_inf() { return found_inf_; }
  double step_of(size_t tensor) const { return steps_[tensor]; }
  // The last tensor of a kind.
  size_t last_of(int kind) const {
    size_t last = 0;
    for (size_t i = 0; i < model_.tensors.size(); ++i)
      if (kind_of(model_.tensors[i].problem) == kind) last = i;
    return last;
  }
  bool is_counted(size_t tensor) const { return counts_[tensor] != Count::kNone; }

  Gpus::Options options() {
    Gpus::Options options;
    counters_.clear();
    for (size_t i = 0; i < model_.tensors.size(); ++i) counters_.push_back(counter(i));
    options.counters = &counters_;
    options.groups = &groups_;
    options.grad_scale = &grad_scale_;
    options.found_inf = &found_inf_;
    return options;
  }

  // Does on the host what a step must do.
  void expect_step() {
    if (found_inf_ > 0) return;
    expected_.scalars.clear();
    for (size_t i = 0; i < expected_.tensors.size(); ++i) {
      expected_.tensors[i].idle = model_.tensors[i].idle;
      expected_.tensors[i].scalars = static_cast<int>(i);
      Problem problem = model_.tensors[i].problem;
      problem.hyper = host_hyper(i);
      if (!model_.tensors[i].idle) ++steps_[i];
      const StepInfo info = {static_cast<uint64_t>(steps_[i]), steps_[i] == 1};
      expected_.scalars.push_back(scalars_at(problem, info, grad_scale_));
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

  // Lets the device read the numbers of group `g`; those on the host are wrong from here on.
  void put_on_device(size_t g) {
    HyperParamsRef& group = groups_[g];
    const auto number = [&](double& value, DeviceScalar& source) {
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
    HyperParamsRef source = {};
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

  StepCounter counter(size_t tensor) {
    StepCounter counter = {};
    counter.group = static_cast<int32_t>(tensor);
    counter.active = !model_.tensors[tensor].idle;
    counter.dtype = counts_[tensor] == Count::kDouble ? DType::kFloat64 : DType::kFloat32;
    if (counts_[tensor] == Count::kFloat) counter.step = &floats_[tensor];
    if (counts_[tensor] == Count::kDouble) counter.step = &doubles_[tensor];
    counter.is_first = counts_[tensor] == Count::kNone && steps_[tensor] == 0;
    counter.is_fresh = true;
    return counter;
  }

  HyperParams host_hyper(size_t tensor) const {
    HyperParams hyper = hypers_[tensor];
    if (groups_[tensor].lr.data != nullptr) hyper.lr = static_cast<double>(lr_);
    return hyper;
  }

  Model model_, expected_;
  std::vector<HyperParams> hypers_;
  std::vector<HyperParamsRef> groups_;
  std::vector<StepCounter> counters_;
  std::vector<Count> counts_;
  std::vector<double> steps_;
  // Device memory.
  std::deque<float> floats_;
  std::deque<double> doubles_, numbers_;
  float grad_scale_ = 1, found_inf_ = 0, lr_ = 0;
};

void step_and_check(Gpus& gpus, Counted& counted) {
  const Gpus::Options options = counted.options();
  counted.expect_step();
  gpus.step(counted.model(), options);
  counted.check_values();
}

void test_steps_are_counted() {
  Gpus gpus;
  Counted counted;
  for (int step = 0; step < 4; ++step) {
    counted.grad_scale() = step == 2 ? 65536.0f : 1.0f;
    step_and_check(gpus, counted);
  }
}

// A step that is skipped does not count: the one after it is still a first step.
void test_skipped_steps() {
  Gpus gpus;
  Counted counted;
  for (const float found_inf : {1.0f, 0.0f, 3.0f, 0.0f}) {
    counted.found_inf() = found_inf;
    step_and_check(gpus, counted);
  }
  CHECK(counted.step_of(0) == 2);
}

void test_idle_tensors_are_not_counted() {
  Gpus gpus;
  Counted counted;
  for (size_t step = 0; step < 4; ++step) {
    for (size_t i = 0; i < counted.model().tensors.size(); ++i)
      counted.model().tensors[i].idle = (i + step) % 3 == 1;
    step_and_check(gpus, counted);
  }
}

void test_numbers_on_the_device() {
  Gpus gpus;
  Counted counted;
  std::vector<size_t> groups;
  for (const int kind : {kKindOf<Sgd>, kKindOf<Adam>, kKindOf<Nadam>, kKindOf<Rmsprop>}) {
    const size_t last = counted.last_of(kind);
    groups.insert(groups.end(), {last, last - 4});
  }
  for (const size_t group : groups) {
    counted.put_on_device(group);
    for (const float lr : {0.5f, 0.25f}) {
      counted.lr() = lr;
      step_and_check(gpus, counted);
    }
  }
}

// Counts beyond those that a float can tell apart act as in torch.
void test_late_steps() {
  for (const double done : {16777215.0, 16777216.0, 9007199254740991.0}) {
    float in_float = static_cast<float>(done);
    double in_double = done;
    CHECK(increment({&in_float, 0, DType::kFloat32, true, false, false}).step ==
          static_cast<uint64_t>(static_cast<double>(static_cast<float>(done)) + 1));
    CHECK(increment({&in_double, 0, DType::kFloat64, true, true, false}).step ==
          static_cast<uint64_t>(done) + 1);
    CHECK(in_double == done + 1);
    CHECK(in_float == static_cast<float>(static_cast<double>(static_cast<float>(done)) + 1));
  }
}

void move_buffers(Model& model) {
  for (Tensor& tensor : model.tensors) tensor.buffers = std::vector<Buffer>(tensor.buffers);
}

// A captured step reads its own table, whatever the steps in between do. lr, step counts,
// grad_scale and found_inf are read anew in every replay.
void test_capture() {
  Gpus gpus;
  Counted counted;
  counted.put_on_device(0);
  counted.put_on_device(counted.last_of(kKindOf<Adam>));
  for (int warm_up = 0; warm_up < 2; ++warm_up) step_and_check(gpus, counted);
  emulation::begin_capture();
  gpus.step(counted.model(), counted.options());
  emulation::end_capture();
  counted.check_values();                         // nothing has run yet
  CHECK(gpus.allocations(Memory::kDevice) == 2);  // a graph's table is not from torch
  for (int replay = 0; replay < 4; ++replay) {
    counted.lr() = 0.125f * static_cast<float>(replay);
    counted.grad_scale() = replay == 1 ? 8.0f : 1.0f;
    counted.found_inf() = replay == 2 ? 1.0f : 0.0f;
    counted.expect_step();
    emulation::replay();
    counted.check_values();
    counted.found_inf() = 0;
    Model moved = counted.model();  // a step of another model by the same driver
    move_buffers(moved);
    std::vector<double> counts(moved.tensors.size());
    std::vector<StepCounter> counters(moved.tensors.size());
    for (size_t i = 0; i < counters.size(); ++i)
      counters[i] = {&counts[i], static_cast<int32_t>(i), DType::kFloat64, true, false, true};
    Gpus::Options options = counted.options();
    options.counters = &counters;
    gpus.step(moved, options);
    counted.check_values();
  }
}

// A graph that was captured in the very first step, and then steps without a graph.
void test_capture_first() {
  Gpus gpus;
  Counted counted;
  emulation::begin_capture();
  gpus.step(counted.model(), counted.options());
  emulation::end_capture();
  for (int step = 0; step < 3; ++step) {
    // A parameter without a count would be updated as in a first step in every replay.
    if (step == 0) {
      counted.expect_step();
      emulation::replay();
      counted.check_values();
    }
    step_and_check(gpus, counted);
  }
  CHECK(gpus.allocations(Memory::kDevice) == 2);
}

// Two steps in one graph, each with a table of its own that lives as long as the driver.
void test_capture_twice() {
  Gpus gpus;
  Counted counted;
  // Parameters without a count would be updated as in a first step both times.
  for (size_t i = 0; i < counted.model().tensors.size(); ++i)
    counted.model().tensors[i].idle = !counted.is_counted(i);
  emulation::begin_capture();
  gpus.step(counted.model(), counted.options());
  gpus.step(counted.model(), counted.options());
  emulation::end_capture();
  for (int replay = 0; replay < 2; ++replay) {
    counted.expect_step();
    counted.expect_step();
    emulation::replay();
    counted.check_values();
  }
}

}  // namespace

void test_counters() {
  test_steps_are_counted();
  test_skipped_steps();
  test_idle_tensors_are_not_counted();
  test_numbers_on_the_device();
  test_late_steps();
  test_capture();
  test_capture_first();
  test_capture_twice();
}
