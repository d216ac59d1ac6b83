#include "bindings/plan.h"

#include <algorithm>
#include <exception>
#include <optional>

#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

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

}  // namespace

Plan::Plan(const std::string& optimizer, const std::string& isa, int64_t chunk_elements)
    : row_(find_optimizer(optimizer)), isa_(find_isa(isa)), chunk_elements_(chunk_elements) {
  if (chunk_elements < 0) throw py::value_error("chunk_elements must not be negative");
  with_rule(row_.rule, [&](auto rule) {
    for (int s = 0; s < rule.kNumStates; ++s)
      if (rule.is_second_moment(s)) second_moments_ |= 1u << s;
  });
}

// Of all that a plan does, one thing at a time. To be ended by running_.clear().
void Plan::begin() {
  if (running_.test_and_set(std::memory_order_acquire))
    throw std::runtime_error("step() of this optimizer is already running in another thread");
}

py::object Plan::step(const py::object& param_groups, const py::object& state,
                      const py::object& grad_scale, const py::object& found_inf,
                      const py::function& create_state, int num_threads, bool checks_grads) {
  begin();
  held_.reserve(num_held_);
  const AtExit at_exit([this] {
    num_held_ = held_.size();
    const References done = held_.take();  // to be let go of last, for that may run anything
    running_.clear(std::memory_order_release);
  });
  set_status(py::none());
  Scaling scaling;
  scaling.found_inf = found_inf;
  if (is_tensor(grad_scale.ptr())) scaling.grad_scale = grad_scale;
  GradInfo grads;
  grads.scale = scaling.grad_scale.is_none() ? grad_scale.cast<double>() : 1.0;
  if (!(grads.scale > 0)) throw py::value_error("grad_scale must be positive");

  gpu_counts_ = gpu_counts_ || scaling.is_on_gpu();
  StepContext context = collect(param_groups, state, grads, false);
  const bool capturing = refuse_capture(context);
  if (context.has_cpu && scaling.is_on_gpu()) {  // only now does the host need to know
    if (!found_inf.is_none() && py::float_(found_inf).cast<double>() > 0) return py::none();
    if (!scaling.grad_scale.is_none()) grads.scale = py::float_(grad_scale).cast<double>();
    context = collect(param_groups, state, grads, false);
  }
  const bool reads_grads = context.clips || checks_grads;
  const bool gpu_counts =
      !context.gpus.empty() &&
      (context.has_gpu_counts || scaling.is_on_gpu() || reads_grads ||
       std::any_of(context.groups.begin(), context.groups.end(),
                   [](const Group& group) { return group.capturable || group.scalars_gpu >= 0; }));
  if (gpu_counts != context.gpu_counts) {
    gpu_counts_ = gpu_counts;
    context = collect(param_groups, state, grads, false);
  }
  if (capturing && !context.missing.empty())
    throw std::runtime_error(
        "step() is captured into a CUDA graph, but the state of some parameters is not there or "
        "their step is on the CPU, and every replay would set them up again; make a step before "
        "the capture");
  refuse_overlap(context);
  in_order_ = check_grads(context);

  Launches launches = {};
  launches.captured = capturing;
  py::object reductions = reads_grads ? classify_grads(context) : py::none();
  if (reads_grads && context.gpus.empty() &&
      sum_squares(context, reductions, scaling, launches, num_threads, checks_grads))
    return py::none();  // before anything is created
  py::object discard = py::none();
  bool skips = false;
  try {
    if (!context.missing.empty()) {
      discard = create_state(context.missing, context.gpu_counts);
      context = collect(param_groups, state, context.grads, true);
      if (!context.missing.empty())
        throw std::runtime_error(
            "state that was created is not there: another thread has taken it away");
      if (context.gpu_counts && (reads_grads || !found_inf.is_none())) count_first_steps(context);
      if (reads_grads) reductions = classify_grads(context);
    }
    prepare(context, scaling, reads_grads, launches);
    if (reads_grads && !context.gpus.empty())
      skips = sum_squares(context, reductions, scaling, launches, num_threads, checks_grads);
    if (skips && !discard.is_none()) discard();
  } catch (...) {
    if (!discard.is_none()) discard();
    throw;
  }
  if (!skips) run(context, launches, num_threads);
  if (skips || changed_.empty()) return py::none();
  const py::object changed = std::move(changed_);
  changed_ = py::list();
  return changed;
}

Plan::StepContext Plan::collect(const py::object& param_groups, const py::object& state,
                                const GradInfo& grads, bool is_second) {
  StepContext context{{}, state.ptr(), is_plain_dict(state.ptr()), grads, gpu_counts_, is_second};
  if (!context.state_is_plain) refuse_unless_mapping(state.ptr(), "state");
  const auto groups = as_tuple(param_groups.ptr()).cast<py::tuple>();
  context.groups.reserve(groups.size());
  context.scalars.reserve(groups.size());
  for (const py::handle given : groups) {
    const auto index = static_cast<int64_t>(context.groups.size());
    const py::object group =
        PyDict_CheckExact(given.ptr())
            ? py::reinterpret_borrow<py::object>(given)
            : as_dict(given.ptr(), ("param group " + std::to_string(index)).c_str());
    GroupReader reader(group.ptr(), index, /*leave_on_gpu=*/true);
    const cuda::HyperParamsRef source = row_.read(reader);
    held_.hold(group);
    uint8_t variant = 0;
    with_rule(row_.rule, [&](auto rule) {
      variant = static_cast<uint8_t>(rule.variant(source.values).number());
    });
    context.groups.push_back({group, reader.params(), source, reader.scalars_gpu(),
                              states_in_use(row_, source.values), variant, reader.is_capturable(),
                              reader.master_weights(), counts_steps(row_, source.values),
                              reader.errs_if_nonfinite()});
    name_states(context.groups.back());
    held_.hold_all(std::move(reader.held()));
    context.clips = context.clips || source.values.max_grad_norm > 0;
  }
  collect_params(context);
  return context;
}

// All that can fail of what the GPUs are to do.
void Plan::prepare(const StepContext& context, const Scaling& scaling, bool reads_grads,
                   Launches& launches) {
  for (const Dims& dims : dims_)
    launches.layouts.push_back({dims.data(), static_cast<int>(dims.size())});
  if (context.gpu_counts)
    for (const Group& group : context.groups) launches.groups.push_back(group.source);
  for (int gpu = 0; gpu < static_cast<int>(context.gpus.size()); ++gpu) {
    if (!context.gpus[static_cast<size_t>(gpu)]) continue;
    cuda::DeviceStep device_step = {};
    device_step.gpu = gpu;
    device_step.stream = current_stream(gpu);
    device_step.updates = updates_.data();
    device_step.num_updates = static_cast<int64_t>(updates_.size());
    device_step.layouts = launches.layouts.data();
    device_step.num_layouts = static_cast<int64_t>(launches.layouts.size());
    device_step.scalars = context.scalars.data();
    device_step.num_scalars = static_cast<int64_t>(context.scalars.size());
    device_step.counters = context.gpu_counts ? counters_.data() : nullptr;
    device_step.groups = launches.groups.data();
    device_step.num_groups = static_cast<int64_t>(launches.groups.size());
    const auto read = [&](const py::object& tensor) -> const float* {
      if (tensor.is_none()) return nullptr;
      launches.kept.push_back(tensor);
      return float_on_gpu(launches.kept.back(), gpu);
    };
    device_step.grad_scale = read(scaling.grad_scale);
    device_step.found_inf = read(scaling.found_inf);
    device_step.reads_grads = reads_grads;
    device_step.clips = context.clips;
    launches.device_steps.push_back(device_step);
  }
  if (launches.device_steps.empty()) return;
  if (driver_ == nullptr) driver_ = cuda::make_driver(allocate);
  for (const cuda::DeviceStep& device_step : launches.device_steps) driver_->prepare(device_step);
}

void Plan::run(StepContext& context, const Launches& launches, int num_threads) {
  if (!launches.device_steps.empty()) launch(context, launches);
  write_steps(context);
  if (context.has_cpu) return run_on_cpu(context, launches.layouts, num_threads);
  try {
    increment_versions(context.written.ptr());
  } catch (...) {  // Ctrl-C, say
    increment_versions(context.written.ptr());
    throw;
  }
}

void Plan::launch(const StepContext& context, const Launches& launches) {
  try {
    const py::gil_scoped_release release;  // a full queue makes a launch wait
    for (const cuda::DeviceStep& device_step : launches.device_steps) driver_->launch(device_step);
  } catch (...) {
    increment_versions(context.written.ptr());  // some may have been written to
    throw;
  }
}

// Chunks of the updates that are not on a GPU.
void Plan::plan_cpu_chunks() {
  if (chunked_) return;
  std::vector<int64_t> sizes;
  for (size_t at = 0; at < updates_.size(); ++at)
    sizes.push_back(caches_[at].device < kFirstGpu ? updates_[at].numel : 0);
  chunks_ = plan_chunks(sizes, chunk_elements_ > 0 ? chunk_elements_ : chunk_elements_for(sizes));
  chunks_.shrink_to_fit();
  chunked_ = true;
}

void Plan::run_on_cpu(StepContext& context, const std::vector<Layout>& layouts, int num_threads) {
  plan_cpu_chunks();
  const Step step = {updates_.data(), context.scalars.data(), layouts.data(), chunks_.data(),
                     static_cast<int64_t>(chunks_.size()) - 1};
  std::exception_ptr error;  // Ctrl-C, say: the step is then done before it is raised
  {
    std::optional<py::gil_scoped_release> release;
    cpu::run(step, isa_, in_order_ ? 1 : num_threads, [&] {
      try {
        increment_versions(context.written.ptr());
      } catch (...) {
        error = std::current_exception();
      }
      release.emplace();
    });
  }
  if (!error) return;
  increment_versions(context.written.ptr());
  std::rethrow_exception(error);
}

void Plan::write_steps(const StepContext& context) const {
  for (size_t at = 0; at < updates_.size(); ++at) {
    const ParamCache& cache = caches_[at];
    if (updates_[at].device == kIdle || !cache.counts_steps) continue;
    if (cache.device != kCpu && context.gpu_counts) continue;
    if (cache.step_type == StepType::kFloat32)
      *static_cast<float*>(cache.step) = static_cast<float>(cache.next_step);
    else if (cache.step_type == StepType::kFloat64)
      *static_cast<double*>(cache.step) = cache.next_step;
    else
      *static_cast<int64_t*>(cache.step) = static_cast<int64_t>(cache.next_step);
  }
}

// True if the step is being captured into a CUDA graph; raises if it cannot be.
bool Plan::refuse_capture(const StepContext& context) const {
  bool capturing = false;
  for (int gpu = 0; gpu < static_cast<int>(context.gpus.size()); ++gpu) {
    if (!context.gpus[static_cast<size_t>(gpu)]) continue;
    if (!cuda::is_capturing(gpu, current_stream(gpu))) continue;
    capturing = true;
    for (size_t g = 0; g < context.groups.size(); ++g) {
      if (!context.groups[g].capturable)
        throw std::runtime_error(
            "step() is captured into a CUDA graph, but capturable is False in param group " +
            std::to_string(g) + "; construct the optimizer with capturable=True or set it there");
      if (context.groups[g].errs_if_nonfinite)
        throw std::runtime_error(
            "step() is captured into a CUDA graph, but error_if_nonfinite is True in param group " +
            std::to_string(g) + ", for which the host would have to wait in every replay");
    }
    if (context.has_cpu)
      throw std::runtime_error(
          "step() is captured into a CUDA graph, but some parameters are on the CPU");
  }
  return capturing;
}

// An optimizer that counts no steps treats a parameter's first one differently if it has dampening.
// Whether that step takes place under a GradScaler only the GPU knows, so it counts it.
void Plan::count_first_steps(StepContext& context) {
  for (size_t at = 0; at < updates_.size(); ++at) {
    ParamCache& cache = caches_[at];
    cuda::StepCounter& counter = counters_[at];
    if (cache.counts_steps || !counter.active || !cache.is_first || cache.step != nullptr) continue;
    if (context.groups[static_cast<size_t>(counter.group)].source.values.dampening == 0) continue;
    first_steps_.push_back(allocate(cache.device - kFirstGpu, sizeof(float), cuda::Memory::kZeros));
    counter.step = cache.step = first_steps_.back().get();
    counter.is_fresh = cache.is_fresh = true;
    cache.step_on_gpu = true;
    cache.step_type = StepType::kFloat32;
    counter.dtype = DType::kFloat32;
  }
}

py::object Plan::status() const {
  const std::lock_guard<std::mutex> lock(status_mutex_);
  return status_;
}

void Plan::set_status(py::object status) {
  const std::lock_guard<std::mutex> lock(status_mutex_);
  std::swap(status_, status);
}

int64_t Plan::bookkeeping_bytes() {
  begin();
  const AtExit at_exit([this] { running_.clear(std::memory_order_release); });
  size_t bytes = sizeof(*this) + updates_.capacity() * sizeof(ParamUpdate) +
                 caches_.capacity() * sizeof(ParamCache) +
                 (chunks_.capacity() + leaves_.capacity()) * sizeof(ChunkStart) +
                 leaf_sizes_.capacity() * sizeof(int64_t) + written_.capacity() * sizeof(Written);
  for (const Dims& dims : dims_) bytes += sizeof(Dims) + dims.capacity() * sizeof(Dim);
  return static_cast<int64_t>(bytes);
}

}  // namespace fusedopt
