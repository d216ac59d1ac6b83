#include "bindings/scalars.h"

#include <cmath>

#include "bindings/operands.h"
#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

using StepType = ParamCache::StepType;

Scalars scalars_for(RuleId rule, const HyperParams& hyper, Group::StepKey step,
                    const GradInfo& grads) {
  const StepInfo info = {static_cast<uint64_t>(step.first), step.second};
  Scalars scalars;
  with_rule(rule, [&](auto of) {
    using Rule = decltype(of);
    scalars.set(fusedopt::step_scalars<Rule>(hyper, info, grads));
  });
  return scalars;
}

// Reads a count on the host.
void read_step(const ParamId& id, ParamCache& cache) {
  const double step = cache.step_type == StepType::kFloat32
                          ? double{*static_cast<float*>(cache.step)}
                      : cache.step_type == StepType::kFloat64
                          ? *static_cast<double*>(cache.step)
                          : static_cast<double>(*static_cast<int64_t*>(cache.step));
  const bool is_count = step >= 0 && step < kTooManySteps;
  if (!is_count || step != std::floor(step))
    throw py::value_error("step of " + id.text() + " is " + std::string(py::str(py::float_(step))) +
                          ", but must be a whole number that is not negative" +
                          (is_count                ? "; round it"
                           : step >= kTooManySteps ? " and below 9.2e18"
                                                   : ""));
  cache.next_step = step + 1;
}

// Index of the scalars for a parameter at its next step.
int32_t scalars_at(const OptimizerRow& row, const GradInfo& grads, size_t group_index,
                   const ParamCache& cache, StepContext& context) {
  Group& group = context.groups[group_index];
  const Group::StepKey key(group.options.counts_steps ? cache.next_step : 0, cache.is_first);
  if (group.last_scalars >= 0 && key == group.last_key) return group.last_scalars;
  auto index = static_cast<int32_t>(context.scalars.size());
  if (group.last_scalars >= 0) {  // the group has parameters at different steps
    group.scalars.emplace(group.last_key, group.last_scalars);
    index = group.scalars.emplace(key, index).first->second;
  }
  if (index == static_cast<int32_t>(context.scalars.size())) {
    if (group.options.scalars_gpu >= 0) {  // a param on the CPU needs to know what is on the GPU
      GroupReader reader(group.dict.ptr(), static_cast<int64_t>(group_index),
                         /*leave_on_gpu=*/false);
      group.host_values = read_hyper(row, reader).values;
    }
    context.scalars.push_back(scalars_for(group.options.rule, group.host_values, key, grads));
    context.scalars_keys.push_back({group_index, key});
  }
  group.last_key = key;
  return group.last_scalars = index;
}

// What the GPU needs to know to count a parameter's step.
void set_counter(const Group& group, const ParamId& id, const ParamCache& cache,
                 cuda::StepCounter& counter, StepContext& context) {
  const int gpu = cache.device - kFirstGpu;
  const int scalars_gpu = group.options.scalars_gpu;
  if (scalars_gpu >= 0 && scalars_gpu != gpu)
    throw py::value_error("options of param group " + std::to_string(id.group_index) +
                          " are tensors on cuda:" + std::to_string(scalars_gpu) + ", but " +
                          id.text() + " is on cuda:" + std::to_string(gpu));
  // A count on the host is moved as one that is missing is created; where both are one there is
  // nothing to move.
  if (group.options.counts_steps && !cache.step_on_gpu && !cuda::is_emulated() && cache.is_complete)
    context.missing.append(py::make_tuple(id.group_index, id.index));
  counter = {cache.step,
             static_cast<int32_t>(id.group_index),
             cache.step_type == StepType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
             true,
             cache.is_first,
             cache.is_fresh};
}

}  // namespace

void find_scalars(const OptimizerRow& row, const GradInfo& grads, ParamTable& table,
                  StepContext& context) {
  if (context.counts_on_gpu) table.counters.assign(table.updates.size(), {});
  size_t at = 0;
  for (size_t g = 0; g < context.groups.size(); ++g) {
    const Group& group = context.groups[g];
    for (Py_ssize_t i = 0; i < group.size(); ++i, ++at) {
      ParamUpdate& update = table.updates[at];
      ParamCache& cache = table.caches[at];
      if (update.device == kIdle) continue;
      const ParamId id = {group.dict.ptr(), static_cast<int64_t>(g), i};
      if (update.device != kCpu && context.counts_on_gpu) {
        set_counter(group, id, cache, table.counters[at], context);
        continue;
      }
      if (group.options.counts_steps && cache.is_complete && !cache.step_on_gpu)
        read_step(id, cache);
      update.scalars = scalars_at(row, grads, g, cache, context);
    }
  }
}

void rescale(const GradInfo& grads, StepContext& context) {
  for (size_t i = 0; i < context.scalars.size(); ++i) {
    const auto& key = context.scalars_keys[i];
    const Group& group = context.groups[key.group];
    context.scalars[i] = scalars_for(group.options.rule, group.host_values, key.step, grads);
  }
}

void count_first_steps(ParamTable& table, const StepContext& context,
                       std::vector<std::shared_ptr<void>>& kept) {
  for (size_t at = 0; at < table.counters.size(); ++at) {
    ParamCache& cache = table.caches[at];
    cuda::StepCounter& counter = table.counters[at];
    if (cache.counts_steps || !counter.active || !cache.is_first || cache.step != nullptr) continue;
    const Group& group = context.groups[static_cast<size_t>(counter.group)];
    if (group.options.source.values.dampening == 0) continue;
    kept.push_back(allocate(cache.device - kFirstGpu, sizeof(float), cuda::Memory::kZeros));
    counter.step = cache.step = kept.back().get();
    counter.is_fresh = cache.is_fresh = true;
    cache.step_on_gpu = true;
    cache.step_type = StepType::kFloat32;
    counter.dtype = DType::kFloat32;
  }
}

void write_steps(const ParamTable& table, const StepContext& context) {
  for (size_t at = 0; at < table.updates.size(); ++at) {
    const ParamCache& cache = table.caches[at];
    if (table.updates[at].device == kIdle || !cache.counts_steps) continue;
    if (cache.device != kCpu && context.counts_on_gpu) continue;
    if (cache.step_type == StepType::kFloat32)
      *static_cast<float*>(cache.step) = static_cast<float>(cache.next_step);
    else if (cache.step_type == StepType::kFloat64)
      *static_cast<double*>(cache.step) = cache.next_step;
    else
      *static_cast<int64_t*>(cache.step) = static_cast<int64_t>(cache.next_step);
  }
}

}  // namespace fusedopt
