// A model: the tensors of an optimizer, made by hand, which either driver can step.
#pragma once

#include <cstdint>
#include <vector>

#include "core/gpu.h"
#include "problem.h"

// One parameter: its operands, and what is to be done with them.
struct Tensor {
  Problem problem;
  std::vector<Buffer> buffers;
  int gpu;
  int scalars;  // index into the model's scalars
  bool idle = false;
};

struct Model {
  std::vector<fusedopt::Scalars> scalars;
  std::vector<Tensor> tensors;

  // Adds a tensor with scalars of its kind; tensors of the same problem differ in their values.
  void add(const Problem& problem, int gpu = 0) { add(problem, gpu, kind_of(problem)); }
  void add(const Problem& problem, int gpu, int scalars);

  bool has_values_of(const Model& other) const;  // compares the guards as well
};

// A model without tensors and with scalars for each kind of problem.
Model empty_model();

// The updates and layouts of a model, to which a step points.
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

// One step by the CPU driver, with the baseline instruction set.
void step_on_cpu(Model& model);
