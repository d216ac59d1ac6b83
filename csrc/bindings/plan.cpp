#include "bindings/plan.h"

#include <algorithm>
#include <exception>
#include <optional>

#include "bindings/fingerprint.h"
#include "bindings/scalars.h"
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

// Whether all grads are read before the step.
bool needs_grads(const StepCall& call, const StepContext& context) {
  return context.clips || call.checks_grads;
}

// Whether GPUs count the steps of their parameters and compute the scalars.
bool counts_on_gpu(const StepCall& call, const StepContext& context) {
  const bool has_options_there =
      std::any_of(context.groups.begin(), context.groups.end(),
                  [](const Group& group) { return group.options.scalars_gpu >= 0; });
  return !context.gpus.empty() &&
         (context.has_gpu_counts || call.is_scaled_on_gpu() || needs_grads(call, context) ||
          has_options_there || context.any_group(&GroupOptions::capturable));
}

}  // namespace

Plan::Running::Running(Plan& plan) : plan_(&plan) {
  if (plan.running_.test_and_set(std::memory_order_acquire))
    throw std::runtime_error("step() of this optimizer is already running in another thread");
  try {
    plan.held_.reserve(plan.num_held_);
  } catch (...) {
    end();
    throw;
  }
}

void Plan::Running::end() {
  Plan* const plan = std::exchange(plan_, nullptr);
  if (plan == nullptr) return;
  if (plan->held_.size() > 0) plan->num_held_ = plan->held_.size();
  const References done = plan->held_.take();  // to be let go of last, for that may run anything
  plan->running_.clear(std::memory_order_release);
}

Plan::Plan(const std::string& optimizer, const std::string& isa, int64_t chunk_elements)
    : row_(find_optimizer(optimizer)),
      isa_(find_isa(isa)),
      chunk_elements_(chunk_elements),
      collector_(row_, table_, held_),
      aliases_(table_),
      norm_(isa_) {
  if (chunk_elements < 0) throw py::value_error("chunk_elements must not be negative");
}

py::object Plan::step(const py::object& param_groups, const py::object& state,
                      const py::object& grad_scale, const py::object& found_inf, int num_threads,
                      bool checks_grads, const py::list& norm_groups, const py::object& grad_norm) {
  Running running(*this);
  norm_.set_status(py::none());
  const bool is_on_gpu = is_tensor(grad_scale.ptr());
  StepCall call = {param_groups, state,       is_on_gpu ? grad_scale : py::none(),
                   found_inf,    norm_groups, grad_norm,
                   num_threads,  checks_grads};
  if (!is_on_gpu) call.grads.scale = grad_scale.cast<double>();
  if (!(call.grads.scale > 0)) throw py::value_error("grad_scale must be positive");

  StepContext context = collector_.collect(param_groups, state, /*is_second=*/false);
  if (!grad_norm.is_none() && !needs_grads(call, context))
    throw py::value_error("grad_norm is given, but no param group has a max_grad_norm");
  context.is_captured = Gpus::is_captured(context);
  if (!read_scaler(call, context)) return py::none();
  prepare(call, context);
  if (context.missing.empty() && context.maybe_written.empty()) return run(call, context);
  if (!measure_before_creating(call, context)) return py::none();
  return py::cast(PendingStep(py::cast(this), std::move(running), std::move(call), context));
}

py::object PendingStep::run() {
  Plan& plan = plan_.cast<Plan&>();
  if (!running_.is_on()) throw std::runtime_error("this step is over");
  StepContext context =
      plan.collector_.collect(call_.param_groups, call_.state, /*is_second=*/true);
  context.is_captured = Gpus::is_captured(context);
  if (!plan.read_scaler(call_, context)) return py::none();
  plan.prepare(call_, context);
  if (!context.missing.empty())
    throw std::runtime_error(
        "state that was created is not there: another thread has taken it away");
  return plan.run(call_, context);
}

// A scaler's tensors on a GPU are for kernels to look at; but where something is on the CPU, the
// host has to know.
bool Plan::read_scaler(StepCall& call, const StepContext& context) const {
  if (!context.has_cpu || !call.is_scaled_on_gpu()) return true;
  if (call.has_found_inf()) return false;
  if (!call.grad_scale.is_none()) call.grads.scale = py::float_(call.grad_scale).cast<double>();
  return true;
}

// What is to be known before anything is written or created.
void Plan::prepare(const StepCall& call, StepContext& context) {
  context.counts_on_gpu = counts_on_gpu(call, context);
  find_scalars(row_, call.grads, table_, context);
  aliases_.refuse_overlap(context);
  context.in_order = aliases_.check_grads(context);
}

// What the host can know about the grads, it knows before state is created.
bool Plan::measure_before_creating(StepCall& call, const StepContext& context) {
  if (context.is_captured)
    throw std::runtime_error(
        "step() is captured into a CUDA graph, but the state of some parameters is not there, "
        "their step is on the CPU, or they have master weights and were written to since the last "
        "step (a clamp, a loaded model), and every replay would set them up again; make a step "
        "before the capture, and write to no parameter in between");
  if (!needs_grads(call, context) || !context.gpus.empty()) return true;
  norm_.classify(table_, context);
  const std::vector<Layout> layouts = table_.layouts();
  GpuStep on_no_gpu;
  if (!find_norm(step_on_cpu(context, layouts), call, context, on_no_gpu)) return false;
  call.is_measured = true;  // other processes take part in it once
  return true;
}

py::object Plan::run(StepCall& call, StepContext& context) {
  const bool reads_grads = needs_grads(call, context);
  if (reads_grads) norm_.classify(table_, context);
  const std::vector<Layout> layouts = table_.layouts();
  GpuStep on_gpus = gpus_.prepare(call, table_, context, layouts, reads_grads);
  const Step on_cpu = step_on_cpu(context, layouts);
  if (reads_grads && !call.is_measured && !find_norm(on_cpu, call, context, on_gpus))
    return py::none();
  if (context.clips && context.has_cpu) rescale(call.grads, context);

  call.has_run = true;  // from here on, nothing fails but CUDA
  ++num_runs_;
  if (!on_gpus.devices.empty()) {
    try {
      gpus_.launch(on_gpus);
    } catch (...) {
      tell_autograd(context);  // some may have been written to
      throw;
    }
  }
  write_steps(table_, context);
  run_on_cpu(on_cpu, context, call.num_threads);
  return collector_.take_changed();
}

// What is to be known of all grads; false if it wants the step skipped.
bool Plan::find_norm(const Step& on_cpu, StepCall& call, const StepContext& context,
                     GpuStep& on_gpus) {
  const GradNorm::Pass pass = {call, context, on_gpus, gpus_};
  return call.grad_norm.is_none() ? norm_.measure(table_, on_cpu, pass) : norm_.use_given(pass);
}

// What the CPU is to do. It borrows the context's scalars, whose values may still change.
Step Plan::step_on_cpu(const StepContext& context, const std::vector<Layout>& layouts) {
  plan_chunks_on_cpu();
  return {table_.updates.data(),
          context.scalars.data(),
          layouts.data(),
          chunks_.data(),
          static_cast<int64_t>(chunks_.size()) - 1,
          context.in_order};
}

// Runs what is on the CPU, and tells autograd of all that has been written.
void Plan::run_on_cpu(const Step& step, const StepContext& context, int num_threads) {
  if (!context.has_cpu) return tell_autograd(context);
  std::exception_ptr error;  // Ctrl-C, say: the step is then done before it is raised
  {
    std::optional<py::gil_scoped_release> release;
    cpu::run(step, isa_, context.in_order ? 1 : num_threads, [&] {
      try {
        tell_autograd(context);
      } catch (...) {
        error = std::current_exception();
      }
      release.emplace();
    });
  }
  if (error) std::rethrow_exception(error);
}

void Plan::tell_autograd(const StepContext& context) {
  py::list others;  // whose versions only torch can count
  size_t at = 0;
  for (const Group& group : context.groups)
    for (Py_ssize_t i = 0; i < group.size(); ++i) {
      PyObject* const param = PyTuple_GET_ITEM(group.params.ptr(), i);
      const bool is_written = table_.updates[at].device != kIdle;
      const bool is_known = is_plain(param) || table_.is_dtensor(at);
      if (is_written && !(is_known && increment_version(param))) append(others.ptr(), param);
      ++at;
    }
  if (others.empty()) return count_own_writes(context);
  try {
    increment_versions(others.ptr());
  } catch (...) {  // Ctrl-C, say
    increment_versions(others.ptr());
    throw;
  }
  count_own_writes(context);
}

// So that the next step knows whether somebody else has written to a param beside its master.
void Plan::count_own_writes(const StepContext& context) {
  if (!context.has_masters) return;
  size_t at = 0;
  for (const Group& group : context.groups)
    for (Py_ssize_t i = 0; i < group.size(); ++i, ++at) {
      const ParamUpdate& update = table_.updates[at];
      if (update.device != kIdle && update.formats.dtypes[kMaster] == DType::kFloat32)
        table_.caches[at].writes = count_writes(PyTuple_GET_ITEM(group.params.ptr(), i), held_);
    }
}

// Chunks of the updates that are not on a GPU, of those that rest this time, too.
void Plan::plan_chunks_on_cpu() {
  if (table_.is_chunked) return;
  std::vector<int64_t> sizes;
  for (size_t at = 0; at < table_.updates.size(); ++at)
    sizes.push_back(table_.caches[at].device < kFirstGpu ? table_.updates[at].numel : 0);
  chunks_ = plan_chunks(sizes, chunk_elements_ > 0 ? chunk_elements_ : chunk_elements_for(sizes));
  chunks_.shrink_to_fit();
  table_.is_chunked = true;
}

int64_t Plan::bookkeeping_bytes() {
  const Running running(*this);
  size_t bytes = sizeof(*this) + table_.updates.capacity() * sizeof(ParamUpdate) +
                 table_.caches.capacity() * sizeof(ParamCache) +
                 chunks_.capacity() * sizeof(ChunkStart) + aliases_.bytes();
  for (const Dims& dims : table_.dims) bytes += sizeof(Dims) + dims.capacity() * sizeof(Dim);
  return static_cast<int64_t>(bytes);
}

PendingStep::PendingStep(py::object plan, Plan::Running running, StepCall call,
                         const StepContext& context)
    : missing(context.missing),
      maybe_written(context.maybe_written),
      counts_on_gpu(context.counts_on_gpu),
      plan_(std::move(plan)),
      running_(std::move(running)),
      call_(std::move(call)) {}

}  // namespace fusedopt
