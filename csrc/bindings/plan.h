#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bindings/fingerprint.h"
#include "bindings/operands.h"
#include "bindings/optimizers.h"
#include "bindings/python.h"
#include "core/gpu.h"
#include "core/overlap.h"
#include "core/step.h"

// One optimizer's step: collects its tensors, checks all of them, then hands the work to the
// drivers. Every tensor is looked at in every step: what is kept of it is used only if a
// fingerprint shows that it is what it was.
namespace fusedopt {

class Plan {
 public:
  // `chunk_elements`: how finely the work is divided; 0 chooses by its size.
  Plan(const std::string& optimizer, const std::string& isa, int64_t chunk_elements);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Steps every parameter that has a grad, or changes nothing and raises. Once all is checked,
  // `create_state` is called with a list of (group, index) of the parameters whose state lacks
  // something and whether step counts belong on the GPU; what it returns undoes that.
  // Grads are divided by `grad_scale`, a number or a tensor on a GPU; nothing changes if
  // `found_inf`, a tensor on a GPU or None, is above 0; nor, if `checks_grads`, if a grad is
  // infinite or NaN. Returns a list of (group, index) of the parameters whose options have changed
  // so that they use less state than before, or None.
  pybind11::object step(const pybind11::object& param_groups, const pybind11::object& state,
                        const pybind11::object& grad_scale, const pybind11::object& found_inf,
                        const pybind11::function& create_state, int num_threads, bool checks_grads);

  // The GradStatus on the grads of the latest step, a tensor; None if they were not read for one.
  pybind11::object status() const;

  // Bytes that the plan keeps between steps.
  int64_t bookkeeping_bytes();

  // How often all written memory has been compared so far, which takes long for sliced tensors.
  int64_t overlap_checks() const { return overlap_checks_; }

 private:
  struct Group {
    pybind11::object dict;
    pybind11::object params;  // a tuple
    cuda::HyperParamsRef source;
    int scalars_gpu;  // where the numbers of `source` are that are on a GPU, or -1
    States states;    // of the rule that are in use
    uint8_t variant;
    bool capturable;
    Master master_weights;
    bool counts_steps;
    bool errs_if_nonfinite;
    bool has_state() const {
      return states != 0 || counts_steps || master_weights != Master::kNone ||
             source.values.has_ema();
    }
    const Key* names[kMaxOperands] = {};  // of what is in use of the state, in their places
    int num_names = 0;
    HyperParams host_values = source.values;  // for parameters on the CPU
    // Where the scalars of a (step, is first) are, for those that occur in the group; the ones of
    // the parameter before fit the next one as a rule.
    std::map<std::pair<double, bool>, int32_t> scalars = {};
    std::pair<double, bool> last_key = {-1, false};
    int32_t last_scalars = -1;
  };

  // What scalars follow from: the group, the number of the step, whether the state is new.
  struct ScalarsKey {
    size_t group;
    std::pair<double, bool> info;
  };

  enum class StepType : uint8_t { kFloat32, kFloat64, kInt64 };

  // What is kept of a parameter beside its ParamUpdate.
  struct ParamCache {
    uint64_t fingerprint = kNoFingerprint;  // of the param, its states and step together
    uint64_t grad_form = kNoFingerprint;    // of the grad
    int64_t grad_offset = 0;                // bytes from the grad's storage to its memory
    void* step = nullptr;  // the count, or for optimizers without one its stand-in on a GPU
    double next_step = 0;
    const void* checked_grad = nullptr;  // the grad's memory, when it was compared with all others'
    StepType step_type = StepType::kFloat32;
    bool step_on_gpu = false;
    bool counts_steps = false;
    StochasticRounding rounding = StochasticRounding::kNone;  // as its group has it
    uint8_t device = kIdle;  // as in ParamUpdate, whether there is a grad or not
    bool is_first = false;
    bool is_fresh = false;      // its first state was created here, and not loaded
    bool recognizable = false;  // equal fingerprints mean that the update stands
    bool is_disjoint = false;   // what the update writes has been compared with all others'
    bool reads_others = false;  // the grad is memory of another parameter
  };

  // An operand that a step writes, as owner of a Region.
  struct Written {
    uint32_t owner : 31;
    uint32_t starts_chain : 1;  // it begins behind the ends of all that begin before it
  };

  // torch.amp.GradScaler's part in a step: None, or tensors on a GPU.
  struct Scaling {
    pybind11::object grad_scale = pybind11::none();
    pybind11::object found_inf = pybind11::none();
    bool is_on_gpu() const { return !grad_scale.is_none() || !found_inf.is_none(); }
  };

  // What the drivers are to do, and what holds the memory of that.
  struct Launches {
    std::vector<Layout> layouts;
    std::vector<cuda::HyperParamsRef> groups;
    std::vector<pybind11::object> kept;  // copies of the scaling tensors, where they are read
    std::vector<cuda::DeviceStep> device_steps;  // one for each GPU
    bool captured;                               // and replayed, perhaps
  };

  // What is found out while all parameters are collected, once.
  struct StepContext {
    std::vector<Group> groups;
    PyObject* state;      // borrowed from the caller of step()
    bool state_is_plain;  // see is_plain_dict()
    GradInfo grads;
    bool gpu_counts;          // GPUs count the steps of their parameters and compute the scalars
    bool is_second;           // after the creation of missing state
    Py_ssize_t state_at = 0;  // PyDict_Next's position in `state`, whose order is nearly always
    // of the parameters: the parameter whose entry was found there in place of another's
    pybind11::object next_param = {};
    std::vector<Dims> dims = {};
    std::vector<Scalars> scalars = {};
    std::vector<ScalarsKey> scalars_keys = {};  // what each of them is for
    bool clips = false;                         // a group limits the norm of the grads
    bool has_subclasses = false;                // params that are DTensors
    bool has_cpu = false;                       // parameters to step there
    bool has_gpu_counts = false;                // step counts that only a GPU knows
    std::vector<bool> gpus = {};                // with parameters to step, by number
    pybind11::list missing = pybind11::list();  // (group, index)
    pybind11::list written = pybind11::list();  // params
  };

  // The tensors of one parameter, which held_ keeps; null for state that is missing or not in use.
  struct ParamTensors {
    PyObject* tensors[kMaxOperands] = {};
    PyObject* step = nullptr;
    PyObject* state = nullptr;            // the dict they are from
    const Key* names[kMaxOperands] = {};  // of the states in use, as in the state's dict
    int num_names = 0;
    Master master = Master::kNone;
    bool is_complete = false;
  };

  void begin();
  StepContext collect(const pybind11::object& param_groups, const pybind11::object& state,
                      const GradInfo& grads, bool is_second);
  void collect_params(StepContext& context);
  void collect_param(StepContext& context, Group& group, const ParamId& id, size_t at);
  void visit(StepContext& context, Group& group, const ParamId& id, const ParamTensors& found,
             size_t at);
  void keep_layout(StepContext& context, ParamUpdate& update, ParamCache& cache) const;
  PyObject* find_state_dict(StepContext& context, const Group& group, PyObject* param, bool active,
                            const ParamId& id);
  void name_states(Group& group) const;
  void name_states(const Group& group, const ParamId& id, ParamTensors& found);
  bool uses_less(const ParamUpdate& update, const ParamCache& cache, const ParamTensors& found,
                 const Group& group) const;
  bool has_unused_state(const ParamTensors& found, const Group& group) const;
  bool find_state(PyObject* state, const Group& group, const ParamId& id, ParamTensors& found);
  void take_over(const Group& group, const ParamTensors& found, Operands& operands,
                 ParamCache& cache) const;
  enum class Unchanged { kNothing, kAllButGrad, kAll };
  Unchanged compare(const ParamTensors& found, bool is_known, ParamUpdate& update,
                    ParamCache& cache) const;
  void read_param_and_grad(Operands& operands, ParamCache& cache);
  void align_grad(Operands& operands) const;
  void read_rest(StepContext& context, Operands& operands, bool found, ParamUpdate& update,
                 ParamCache& cache);
  void find_step(const Operands& operands, ParamCache& cache) const;
  void set_counter(StepContext& context, const Group& group, const ParamId& id, bool is_complete,
                   size_t at);
  void read_step(const ParamId& id, ParamCache& cache) const;
  uint8_t rounded_stochastically(const Operands& operands) const;
  void fill(StepContext& context, const Operands& operands, ParamUpdate& update, ParamCache& cache);
  void lay_out(StepContext& context, const Operands& operands, ParamUpdate& update) const;
  int32_t step_scalars(StepContext& context, Group& group, const ParamCache& cache) const;
  const Dims* dims_of(const ParamUpdate& update) const;  // nullptr: it is dense
  Region region_of(size_t at, int operand) const;
  void refuse_overlap(const StepContext& context);
  bool check_grads(const StepContext& context);
  bool meets_written(const Region& region, size_t& guess) const;
  bool reads_others(const StepContext& context, size_t at);
  std::string name_of(const StepContext& context, int64_t owner) const;
  std::string name_of_state(const ParamUpdate& update, int operand) const;
  bool refuse_capture(const StepContext& context) const;
  void count_first_steps(StepContext& context);
  void prepare(const StepContext& context, const Scaling& scaling, bool reads_grads,
               Launches& launches);
  void plan_cpu_chunks();
  bool sum_squares(StepContext& context, const pybind11::object& reductions, const Scaling& scaling,
                   Launches& launches, int num_threads, bool checks_grads);
  static bool skips_for(const Scaling& scaling);
  pybind11::object classify_grads(const StepContext& context);
  void sum_on_cpu(int num_threads, double* totals, int64_t num_classes);
  void combine(Launches& launches, const pybind11::object& reductions,
               std::vector<pybind11::object>& numbers, std::vector<double*>& data);
  void rescale(StepContext& context) const;
  void run(StepContext& context, const Launches& launches, int num_threads);
  void launch(const StepContext& context, const Launches& launches);
  void run_on_cpu(StepContext& context, const std::vector<Layout>& layouts, int num_threads);
  void write_steps(const StepContext& context) const;
  void set_status(pybind11::object status);

  const OptimizerRow& row_;
  States second_moments_ = 0;  // of the rule
  const cpu::Isa isa_;
  const int64_t chunk_elements_;
  std::atomic_flag running_ = ATOMIC_FLAG_INIT;
  size_t num_held_ = 0;  // in the step before
  References held_;      // all that the step touches, until it ends

  // One entry for each parameter, in the order of the groups.
  std::vector<ParamUpdate> updates_;
  std::vector<ParamCache> caches_;
  std::vector<Dims> dims_;  // of updates that are not dense
  std::vector<ChunkStart> chunks_;
  std::vector<ChunkStart> leaves_;   // of the norm, if it was needed, for grads of
  std::vector<int64_t> leaf_sizes_;  // these sizes
  std::vector<Written> written_;  // all operands that works_ write, by address, as refuse_overlap()
  bool disjoint_ = false;         // left it, which stands if this is true: they do not overlap
  int64_t overlap_checks_ = 0;
  bool in_order_ = false;                    // in this step, the order of the parameters counts
  bool is_collected_ = true;                 // the last collection came to its end
  bool chunked_ = false;                     // chunks_ fit works_
  std::vector<cuda::StepCounter> counters_;  // of this step, if GPUs count

  mutable std::mutex status_mutex_;
  pybind11::object status_ = pybind11::none();
  std::vector<pybind11::object> captured_;  // what captured graphs write to
  pybind11::list changed_;  // (group, index) of params that use less state than in the step before

  std::unique_ptr<cuda::Driver> driver_;  // made when it is needed
  bool gpu_counts_ = false;               // some step counts were on a GPU in the step before
  std::vector<std::shared_ptr<void>> first_steps_;  // see count_first_steps()
};

}  // namespace fusedopt
