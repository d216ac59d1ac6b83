// One optimizer's steps: collects its tensors, checks all of them, then hands the work to the
// drivers.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "bindings/aliases.h"
#include "bindings/collect.h"
#include "bindings/gpu_steps.h"
#include "bindings/grad_norm.h"
#include "bindings/param_table.h"
#include "bindings/step_call.h"
#include "core/chunks.h"

namespace fusedopt {

class PendingStep;

class Plan {
 public:
  // `chunk_elements`: how finely the work is divided; 0 chooses by its size.
  Plan(const std::string& optimizer, const std::string& isa, int64_t chunk_elements);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Steps every parameter that has a grad, or changes nothing and raises. Grads are divided by
  // `grad_scale`, a number or a tensor on a GPU; nothing changes if `found_inf`, a tensor on a GPU
  // or None, is above 0; nor, if `checks_grads`, if a grad is infinite or NaN. What is to be known
  // of all grads is added up over `norm_groups`. Or the caller knows the norm of the grads, not
  // divided by `grad_scale`: `grad_norm`, a number, a tensor of one element or None.
  //
  // Returns None as a rule; a PendingStep, with nothing changed so far, if state must be created
  // first, or master weights made again; or else a list of (group, index) of the parameters whose
  // options have changed so that they use less state than before.
  pybind11::object step(const pybind11::object& param_groups, const pybind11::object& state,
                        const pybind11::object& grad_scale, const pybind11::object& found_inf,
                        int num_threads, bool checks_grads, const pybind11::list& norm_groups,
                        const pybind11::object& grad_norm);

  pybind11::object status() const { return norm_.status(); }  // see GradNorm
  int64_t num_runs() const { return num_runs_; }  // steps that may have written something
  int64_t overlap_checks() const { return aliases_.num_checks(); }
  int64_t bookkeeping_bytes();  // that the plan keeps between steps

 private:
  friend class PendingStep;

  // That the plan is at work, which it does for one thread at a time. All that a step holds is let
  // go of at the end.
  class Running {
   public:
    explicit Running(Plan& plan);
    Running(Running&& other) noexcept : plan_(std::exchange(other.plan_, nullptr)) {}
    ~Running() { end(); }
    void end();
    bool is_on() const { return plan_ != nullptr; }

   private:
    Plan* plan_;
  };

  // The passes of a step, in their order. Those that return false want it skipped.
  bool read_scaler(StepCall& call, const StepContext& context) const;
  void prepare(const StepCall& call, StepContext& context);
  bool measure_before_creating(StepCall& call, const StepContext& context);
  pybind11::object run(StepCall& call, StepContext& context);

  bool find_norm(const Step& on_cpu, StepCall& call, const StepContext& context, GpuStep& on_gpus);
  Step step_on_cpu(const StepContext& context, const std::vector<Layout>& layouts);
  void run_on_cpu(const Step& step, const StepContext& context, int num_threads);
  void plan_chunks_on_cpu();
  void tell_autograd(const StepContext& context);
  void count_own_writes(const StepContext& context);

  const OptimizerRow& row_;
  const cpu::Isa isa_;
  const int64_t chunk_elements_;
  std::atomic_flag running_ = ATOMIC_FLAG_INIT;
  std::atomic<int64_t> num_runs_ = 0;
  size_t num_held_ = 0;  // in the step before
  References held_;      // all that the step touches, until it ends
  ParamTable table_;
  Collector collector_;
  AliasCheck aliases_;
  GradNorm norm_;
  Gpus gpus_;
  std::vector<ChunkStart> chunks_;  // of the updates on the CPU
};

// A step that waits for state to be created. Until it is closed, the optimizer makes no other.
class PendingStep {
 public:
  PendingStep(pybind11::object plan, Plan::Running running, StepCall call,
              const StepContext& context);

  pybind11::list missing;        // (group, index) of the params whose state lacks something,
  pybind11::list maybe_written;  // and of those that may not be what their float32 master is
  const bool counts_on_gpu;      // step counts belong on the GPUs of their params

  pybind11::object run();  // the rest of Plan::step(), once the state is there
  // Something may have been written; without, the state is to go again.
  bool has_run() const { return call_.has_run; }
  void close() { running_.end(); }

 private:
  pybind11::object plan_;
  Plan::Running running_;
  StepCall call_;
};

}  // namespace fusedopt
