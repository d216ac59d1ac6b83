#include <cmath>
#include <cstring>

#include "bindings/plan.h"
#include "bindings/torch_api.h"

// The part of Plan that finds out about the grads before a step: their global norm, and whether all
// of them are finite.
namespace py = pybind11;

namespace fusedopt {
namespace {

// A Verdict as doubles of one tensor; what a device has summed, [squares, nonfinite] of each class,
// follows.
constexpr int64_t kVerdictNumbers = sizeof(Verdict) / sizeof(double);

Verdict read_verdict(const py::object& numbers) {
  const py::object copy = numbers.attr("cpu")();
  Verdict verdict;
  std::memcpy(&verdict, data_of_numbers(copy), sizeof(verdict));
  return verdict;
}

[[noreturn]] void raise_nonfinite(const Verdict& verdict) {
  throw std::runtime_error("the norm of the grads is " +
                           std::string(py::str(py::float_(verdict.grad_norm))) + ", with " +
                           std::to_string(verdict.nonfinite) +
                           " infinite or NaN elements, so nothing was changed; to skip such steps "
                           "instead, set error_if_nonfinite=False");
}

}  // namespace

// Whether a GradScaler has found infinite grads itself, and asks for the step to be skipped.
bool Plan::knows_already(const Scaling& scaling) {
  return !scaling.found_inf.is_none() && py::float_(scaling.found_inf).cast<double>() > 0;
}

void Plan::measure_on_cpu(int num_threads, double* totals, int64_t num_classes) {
  plan_cpu_chunks();
  if (leaves_.empty()) {
    std::vector<int64_t> sizes;
    for (size_t at = 0; at < works_.size(); ++at)
      sizes.push_back(slots_[at].device < kFirstGpu ? works_[at].numel : 0);
    leaves_ = plan_leaves(sizes);
    leaves_.shrink_to_fit();
  }
  std::vector<Layout> layouts;
  for (const Dims& dims : dims_) layouts.push_back({dims.data(), static_cast<int>(dims.size())});
  const py::gil_scoped_release release;
  const std::vector<GradSum> sums =
      cpu::measure(works_.data(), layouts.data(), leaves_, isa_, num_threads);
  for (int64_t c = 0; c < num_classes; ++c)
    sum_leaves(sums.data(), static_cast<int64_t>(sums.size()), static_cast<int32_t>(c),
               totals + 2 * c);
}

// Reads all grads. What GPUs find out stays there unless the host has to know. Returns whether the
// step is to be skipped, as far as the host knows.
bool Plan::measure(Walk& walk, const py::list& param_groups, const Scaling& scaling,
                   Launches& launches, int num_threads) {
  int64_t num_classes = 1;
  py::object reductions = py::none();
  if (walk.has_subclasses) {
    const py::tuple classes = classify(param_groups);
    const py::list of_params = classes[0];
    reductions = classes[1];
    num_classes = std::max<int64_t>(1, static_cast<int64_t>(py::len(reductions)));
    for (size_t at = 0; at < works_.size(); ++at)
      works_[at].norm_class = of_params[at].cast<uint8_t>();
  }
  const bool is_alone =
      reductions.is_none() && launches.shares.size() + (walk.has_cpu ? 1 : 0) <= 1;

  // A tensor for each device, the CPU first.
  std::vector<py::object> numbers;
  std::vector<double*> data;
  const auto add_device = [&](int gpu) {
    data.push_back(nullptr);
    numbers.push_back(new_numbers(gpu, kVerdictNumbers + 2 * num_classes, data.back()));
  };
  const bool uses_cpu = walk.has_cpu || launches.shares.empty();
  if (uses_cpu) {
    add_device(-1);
    measure_on_cpu(num_threads, data.back() + kVerdictNumbers, num_classes);
  }
  for (cuda::Share& share : launches.shares) {
    add_device(share.gpu);
    share.verdict = reinterpret_cast<Verdict*>(data.back());
    share.totals = data.back() + kVerdictNumbers;
    share.num_classes = num_classes;
    share.judges = is_alone;
    driver_->measure(share);
  }
  if (!is_alone) combine(launches, reductions, numbers, data);
  verdict_ = numbers.front();
  for (const py::object& tensor : numbers) launches.kept.push_back(tensor);

  const bool errs = std::any_of(walk.groups.begin(), walk.groups.end(),
                                [](const Group& group) { return group.errs_if_nonfinite; });
  if (!uses_cpu && !errs) return false;
  if (uses_cpu) {
    const double* const totals = data.front() + kVerdictNumbers;
    const Verdict verdict = judge(totals[0], static_cast<int64_t>(totals[1]), walk.grads.scale,
                                  /*found_inf=*/false, walk.clips);
    std::memcpy(data.front(), &verdict, sizeof(verdict));
  }
  const Verdict verdict = read_verdict(numbers.front());
  const bool is_bad = verdict.nonfinite > 0 || is_nonfinite(verdict.grad_norm);
  if (errs && is_bad && !knows_already(scaling)) raise_nonfinite(verdict);
  walk.grads.norm = verdict.grad_norm;
  if (walk.clips && walk.has_cpu) rescale(walk);
  return verdict.skip > 0;
}

// Puts what all devices, and all processes that share the params, have summed into the first class
// of each.
void Plan::combine(Launches& launches, const py::object& reductions,
                   std::vector<py::object>& numbers, std::vector<double*>& data) {
  py::list totals;
  for (const py::object& tensor : numbers)
    totals.append(tensor[py::slice(kVerdictNumbers, py::len(tensor), 1)]);
  const py::list combined = combine_totals(totals, reductions);
  const bool uses_cpu = numbers.size() > launches.shares.size();
  for (size_t i = 0; i < numbers.size(); ++i) {
    const py::object total = combined[i];
    if (uses_cpu && i == 0) {
      std::memcpy(data[0] + kVerdictNumbers, data_of_numbers(total), 2 * sizeof(double));
      continue;
    }
    cuda::Share& share = launches.shares[i - (uses_cpu ? 1 : 0)];
    launches.kept.push_back(total);
    share.totals = const_cast<double*>(data_of_numbers(total));
    driver_->judge(share);
  }
}

}  // namespace fusedopt
