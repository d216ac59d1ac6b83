#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/operands.h"
#include "bindings/optimizers.h"
#include "core/gpu.h"
#include "core/step.h"

// One optimizer's step: walks its tensors, checks all of them, then hands the work to the drivers.
// Every tensor is looked at in every step: what is kept of it is used only if a fingerprint shows
// that it is what it was.
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
  // `found_inf`, a tensor on a GPU or None, is above 0.
  void step(const pybind11::list& param_groups, const pybind11::dict& state,
            const pybind11::object& grad_scale, const pybind11::object& found_inf,
            const pybind11::function& create_state, int num_threads);

  // Bytes that the plan keeps between steps.
  int64_t bookkeeping_bytes() const;

 private:
  struct Group {
    PyObject* dict;  // borrowed
    PyObject* params;
    cuda::HyperSource source;
    int numbers_gpu;  // where the numbers of `source` are that are on a GPU, or -1
    int num_states;
    uint8_t variant;
    bool capturable;
    Hyper host_values = source.values;  // for parameters on the CPU
    // Where the scalars of a (step, is first) are, for those that occur in the group; the ones of
    // the parameter before fit the next one as a rule.
    std::map<std::pair<double, bool>, int32_t> scalars = {};
    std::pair<double, bool> last_key = {-1, false};
    int32_t last_scalars = -1;
  };

  // What a step keeps of a parameter beside its Work.
  struct Slot {
    PyObject* grad = nullptr;                      // a reference, held while the driver reads it
    uint64_t fingerprints[kMaxOperands + 1] = {};  // of the operands and of step
    void* step = nullptr;  // the count, or for optimizers without one its stand-in on a GPU
    double next_step = 0;
    DType step_dtype = DType::kFloat32;
    bool step_on_gpu = false;
    uint8_t device = kIdle;  // as in Work, whether there is a grad or not
    bool is_first = false;
    bool recognizable = false;  // equal fingerprints mean that the work stands
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
    std::vector<cuda::HyperSource> groups;
    std::vector<pybind11::object> kept;  // copies of the scaling tensors, where they are read
    std::vector<cuda::Share> shares;     // one for each GPU
  };

  // One walk over all parameters.
  struct Walk {
    std::vector<Group> groups;
    PyObject* state;
    double grad_scale;
    bool gpu_counts;          // GPUs count the steps of their parameters and compute the scalars
    bool is_second;           // after the creation of missing state
    Py_ssize_t state_at = 0;  // PyDict_Next's position in `state`, whose order is nearly always
    PyObject* next_param = nullptr;  // that of the parameters: the entry there, borrowed
    PyObject* next_state = nullptr;
    std::vector<Dims> dims = {};
    std::vector<Scalars> scalars = {};
    bool has_cpu = false;                       // parameters to step there
    bool has_gpu_counts = false;                // step counts that only a GPU knows
    std::vector<bool> gpus = {};                // with parameters to step, by number
    pybind11::list missing = pybind11::list();  // (group, index)
    pybind11::list written = pybind11::list();  // params
  };

  // The tensors of one parameter, borrowed; null for state that is missing or not used.
  struct Found {
    PyObject* tensors[kMaxOperands] = {};
    PyObject* step = nullptr;
    bool is_complete = false;
  };

  Walk start_walk(const pybind11::list& param_groups, const pybind11::dict& state,
                  double grad_scale, bool is_second);
  void walk(Walk& walk);
  void walk_block(Walk& walk, Group& group, int64_t group_index, Py_ssize_t first, int n,
                  size_t at);
  void visit(Walk& walk, Group& group, const Place& place, const Found& found, size_t at);
  PyObject* find_state_dict(Walk& walk, const Group& group, PyObject* param, bool active) const;
  bool find_state(PyObject* state, const Group& group, const Place& place, Found& found) const;
  enum class Unchanged { kNothing, kAllButGrad, kAll };
  Unchanged compare(const Found& found, int count, bool is_complete, Slot& slot) const;
  void read_param_and_grad(Operands& operands, Slot& slot);
  void align_grad(Operands& operands, Slot& slot) const;
  void read_rest(Walk& walk, Operands& operands, bool found, Work& work, Slot& slot);
  void find_step(const Operands& operands, Slot& slot) const;
  void set_clock(Walk& walk, const Group& group, const Place& place, const Slot& slot, size_t at);
  void read_step(const Place& place, Slot& slot) const;
  void fill(Walk& walk, const Operands& operands, Work& work);
  void lay_out(Walk& walk, const Operands& operands, Work& work) const;
  int32_t schedule(Walk& walk, Group& group, const Slot& slot) const;
  void refuse_overlap(const Walk& walk) const;
  bool refuse_capture(const Walk& walk) const;
  void count_first_steps(Walk& walk);
  void prepare(const Walk& walk, const Scaling& scaling, Launches& launches);
  void run(Walk& walk, const Launches& launches, int num_threads);
  void launch(const Walk& walk, const Launches& launches);
  void run_on_cpu(Walk& walk, const std::vector<Layout>& layouts, int num_threads);
  void write_steps(const Walk& walk) const;
  void release_grads();

  const OptimizerRow& row_;
  const cpu::Isa isa_;
  const int64_t chunk_elements_;
  bool running_ = false;

  // One entry for each parameter, in the order of the groups.
  std::vector<Work> works_;
  std::vector<Slot> slots_;
  std::vector<Dims> dims_;  // of works that are not dense
  std::vector<ChunkStart> chunks_;
  bool disjoint_ = false;            // the memory that works_ write has been checked for overlap
  bool chunked_ = false;             // chunks_ fit works_
  std::vector<cuda::Clock> clocks_;  // of this step, if GPUs count

  std::unique_ptr<cuda::Driver> driver_;  // made when it is needed
  bool gpu_counts_ = false;               // some step counts were on a GPU in the step before
  std::vector<std::shared_ptr<void>> first_steps_;  // see count_first_steps()
};

}  // namespace fusedopt
