#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bindings/operands.h"
#include "bindings/optimizers.h"
#include "core/step.h"

// One optimizer's step: walks its tensors, checks all of them, then hands the work to a driver.
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
  // something; what it returns undoes that. Grads are divided by `grad_scale`.
  void step(const pybind11::list& param_groups, const pybind11::dict& state, double grad_scale,
            const pybind11::function& create_state, int num_threads);

  // Bytes that the plan keeps between steps.
  int64_t bookkeeping_bytes() const;

 private:
  struct Group {
    PyObject* dict;  // borrowed
    PyObject* params;
    Hyper hyper;
    int num_states;
    uint8_t variant;
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
    void* step = nullptr;
    double next_step = 0;
    DType step_dtype = DType::kFloat32;
    bool is_first = false;
    bool recognizable = false;  // equal fingerprints mean that the work stands
  };

  // One walk over all parameters.
  struct Walk {
    std::vector<Group> groups;
    PyObject* state;
    double grad_scale;
    bool is_second;           // after the creation of missing state
    Py_ssize_t state_at = 0;  // PyDict_Next's position in `state`, whose order is nearly always
    PyObject* next_param = nullptr;  // that of the parameters: the entry there, borrowed
    PyObject* next_state = nullptr;
    std::vector<Dims> dims = {};
    std::vector<Scalars> scalars = {};
    pybind11::list missing = pybind11::list();  // (group, index)
    pybind11::list written = pybind11::list();  // params
  };

  // The tensors of one parameter, borrowed; null for state that is missing or not used.
  struct Found {
    PyObject* tensors[kMaxOperands] = {};
    PyObject* step = nullptr;
    bool is_complete = false;
  };

  void walk(Walk& walk);
  void walk_block(Walk& walk, Group& group, int64_t group_index, Py_ssize_t first, int n,
                  size_t at);
  void visit(Walk& walk, Group& group, const Place& place, const Found& found, size_t at);
  PyObject* find_state_dict(Walk& walk, const Group& group, PyObject* param, bool active) const;
  bool find_state(PyObject* state, const Group& group, const Place& place, Found& found) const;
  enum class Unchanged { kNothing, kAllButGrad, kAll };
  Unchanged compare(const Found& found, int count, bool is_complete, Slot& slot) const;
  void read_param_and_grad(Operands& operands, Slot& slot) const;
  void align_grad(Operands& operands, Slot& slot) const;
  void read_rest(Walk& walk, Operands& operands, bool found, Work& work, Slot& slot);
  void find_step(const Operands& operands, Slot& slot) const;
  void read_step(const Place& place, Slot& slot) const;
  void fill(Walk& walk, const Operands& operands, Work& work);
  void lay_out(Walk& walk, const Operands& operands, Work& work) const;
  int32_t schedule(Walk& walk, Group& group, const Slot& slot) const;
  void refuse_overlap(const Walk& walk) const;
  void run(Walk& walk, int num_threads);
  void write_steps() const;
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
  bool disjoint_ = false;  // the memory that works_ write has been checked for overlap
  bool chunked_ = false;   // chunks_ fit works_
};

}  // namespace fusedopt
