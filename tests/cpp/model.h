#pragma once

#include <cstdint>
#include <vector>

#include "core/gpu.h"
#include "problem.h"

// The tensors of an optimizer made by hand, to be stepped by either driver.

struct Tensor {
  Problem problem;
  std::vector<Buffer> buffers;
  int gpu;
  int scalars;  // which of the model's
  bool idle = false;
};

struct Model {
  std::vector<fusedopt::Scalars> scalars;
  std::vector<Tensor> tensors;

  // Adds a tensor with scalars of its rule; tensors of the same problem differ in their values.
  void add(const Problem& problem, int gpu = 0) { add(problem, gpu, problem.rule); }
  void add(const Problem& problem, int gpu, int scalars);

  bool has_values_of(const Model& other) const;  // guards included
};

// A model without tensors and with scalars for each rule, by its number.
Model empty_model();

// What a share of a step points to.
class Borrowed {
 public:
  explicit Borrowed(Model& model);
  const std::vector<fusedopt::ParamUpdate>& updates() const { return updates_; }
  fusedopt::cuda::DeviceStep device_step(const Model& model, int gpu) const;
  void step_on_cpu(const Model& model);

 private:
  std::vector<fusedopt::ParamUpdate> updates_;
  std::vector<fusedopt::Layout> layouts_;
};

// One step with the CPU driver's baseline.
void step_on_cpu(Model& model);
