#include "bindings/plan.h"

#include <algorithm>
#include <exception>
#include <optional>

#include "core/overlap.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

const Key kParams("params");

cpu::Isa find_isa(const std::string& name) {
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512})
    if (name == cpu::isa_name(isa) && isa <= cpu::best_isa()) return isa;
  throw py::value_error("instruction set '" + name + "' is unknown or not available here; '" +
                        cpu::isa_name(cpu::best_isa()) + "' is the highest that is");
}

// Clears a flag and drops what a step holds, however it ends.
template <class F>
class AtExit {
 public:
  explicit AtExit(F f) : f_(std::move(f)) {}
  ~AtExit() { f_(); }
  AtExit(const AtExit&) = delete;
  AtExit& operator=(const AtExit&) = delete;

 private:
  F f_;
};

// The memory of one operand that a step writes. `owner` tells work and operand.
Region region_of(const Work& work, const std::vector<Dims>& dims, size_t at, int operand) {
  const int64_t item = item_size(work.dtypes[operand]);
  const Dims* strided = work.layout == kDense ? nullptr : &dims[static_cast<size_t>(work.layout)];
  const int64_t elements = strided ? extent(*strided, operand) : work.numel;
  return {reinterpret_cast<uintptr_t>(work.data[operand]),  item, elements * item, strided, operand,
          static_cast<int64_t>(at) * kMaxOperands + operand};
}

}  // namespace

Plan::Plan(const std::string& optimizer, const std::string& isa, int64_t chunk_elements)
    : row_(find_optimizer(optimizer)), isa_(find_isa(isa)), chunk_elements_(chunk_elements) {
  if (chunk_elements < 0) throw py::value_error("chunk_elements must not be negative");
}

void Plan::step(const py::list& param_groups, const py::dict& state, double grad_scale,
                const py::function& create_state, int num_threads) {
  if (running_)
    throw std::runtime_error("step() of this optimizer is already running in another thread");
  running_ = true;
  const AtExit at_exit([this] {
    release_grads();
    running_ = false;
  });
  if (!(grad_scale > 0)) throw py::value_error("grad_scale must be positive");

  const auto start_walk = [&](bool is_second) {
    Walk walk{{}, state.ptr(), grad_scale, is_second};
    walk.groups.reserve(param_groups.size());
    walk.scalars.reserve(param_groups.size());
    for (const py::handle group : param_groups) {
      const auto index = static_cast<int64_t>(walk.groups.size());
      const Hyper hyper = row_.read(GroupReader(group.ptr(), index));
      PyObject* const params = PyDict_GetItemWithError(group.ptr(), kParams.object());
      if (params == nullptr || !PyList_Check(params))
        throw py::type_error("params of param group " + std::to_string(index) + " must be a list");
      walk.groups.push_back({group.ptr(), params, hyper, row_.num_states(hyper),
                             static_cast<uint8_t>(row_.variant(hyper))});
    }
    this->walk(walk);
    return walk;
  };

  Walk walk = start_walk(false);
  if (!disjoint_) refuse_overlap(walk);
  disjoint_ = true;
  if (!walk.missing.empty()) {
    const py::object discard = create_state(walk.missing);
    try {
      release_grads();
      walk = start_walk(true);
      if (!walk.missing.empty()) throw std::runtime_error("state that was created is not there");
    } catch (...) {
      discard();
      throw;
    }
  }
  run(walk, num_threads);
}

void Plan::run(Walk& walk, int num_threads) {
  if (!chunked_) {
    std::vector<int64_t> sizes;
    for (const Work& work : works_) sizes.push_back(work.numel);
    chunks_ = plan_chunks(sizes, chunk_elements_ > 0 ? chunk_elements_ : chunk_elements_for(sizes));
    chunks_.shrink_to_fit();
    chunked_ = true;
  }
  std::vector<Layout> layouts;
  for (const Dims& dims : dims_) layouts.push_back({dims.data(), static_cast<int>(dims.size())});

  const Step step = {row_.rule,      works_.data(),  walk.scalars.data(),
                     layouts.data(), chunks_.data(), static_cast<int64_t>(chunks_.size()) - 1};
  if (row_.counts_steps) write_steps();
  std::exception_ptr error;  // Ctrl-C, say: the step is then done before it is raised
  {
    std::optional<py::gil_scoped_release> release;
    cpu::run(step, isa_, num_threads, [&] {
      try {
        increment_versions(walk.written.ptr());
      } catch (...) {
        error = std::current_exception();
      }
      release.emplace();
    });
  }
  if (!error) return;
  increment_versions(walk.written.ptr());
  std::rethrow_exception(error);
}

void Plan::write_steps() const {
  for (size_t at = 0; at < works_.size(); ++at) {
    if (!works_[at].active) continue;
    const Slot& slot = slots_[at];
    if (slot.step_dtype == DType::kFloat32)
      *static_cast<float*>(slot.step) = static_cast<float>(slot.next_step);
    else
      *static_cast<double*>(slot.step) = slot.next_step;
  }
}

void Plan::refuse_overlap(const Walk& walk) const {
  std::vector<Region> regions;
  for (size_t at = 0; at < works_.size(); ++at)
    for (int k = 0; works_[at].active && works_[at].numel > 0 && k < works_[at].num_operands; ++k)
      if (k != kGrad && works_[at].data[k] != nullptr)
        regions.push_back(region_of(works_[at], dims_, at, k));
  const auto found = find_overlap(regions);
  if (!found) return;
  const auto name = [&](int64_t owner) {
    auto at = owner / kMaxOperands;
    const auto operand = static_cast<int>(owner % kMaxOperands);
    int64_t g = 0;
    for (; at >= PyList_GET_SIZE(walk.groups[static_cast<size_t>(g)].params); ++g)
      at -= PyList_GET_SIZE(walk.groups[static_cast<size_t>(g)].params);
    const std::string param = Place{walk.groups[static_cast<size_t>(g)].dict, g, at}.text();
    if (operand == kParam) return param;
    return row_.state_names[static_cast<size_t>(operand - kFirstState)].name() + (" of " + param);
  };
  if (found->first == found->second)
    throw py::value_error("elements of " + name(found->first) +
                          " share memory (an expanded tensor?); clone() it first");
  throw py::value_error(name(found->first) + " and " + name(found->second) +
                        " share memory, so one step would update it twice");
}

void Plan::release_grads() {
  for (Slot& slot : slots_) Py_CLEAR(slot.grad);
}

int64_t Plan::bookkeeping_bytes() const {
  size_t bytes = sizeof(*this) + works_.capacity() * sizeof(Work) +
                 slots_.capacity() * sizeof(Slot) + chunks_.capacity() * sizeof(ChunkStart);
  for (const Dims& dims : dims_) bytes += sizeof(Dims) + dims.capacity() * sizeof(Dim);
  return static_cast<int64_t>(bytes);
}

}  // namespace fusedopt
