#include "bindings/aliases.h"

#include <algorithm>

#include "bindings/operands.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

int64_t owner_of(size_t at, int operand) {
  return static_cast<int64_t>(at) * kMaxTensors + operand;
}

// Where an operand, or the scales of one, begin; nullptr for what is not there.
const void* memory_of(const ParamUpdate& update, int operand) {
  return operand < kFirstScale ? update.data[operand] : update.scales[operand - kFirstScale];
}

bool have_common_bytes(const Region& a, const Region& b) {
  return a.base < end_of(b) && b.base < end_of(a);
}

// True if every element of the one lies where the same element of the other does.
bool are_same_elements(const Region& a, const Region& b) {
  if (a.base != b.base || a.item != b.item || a.bytes != b.bytes) return false;
  if (a.dims == nullptr) return true;
  return std::all_of(a.dims->begin(), a.dims->end(), [&](const Dim& dim) {
    return dim.strides[a.operand] == dim.strides[b.operand];
  });
}

// Exact test. A grad may meet itself (an expanded tensor): it is only read.
bool share_elements(const Region& a, const Region& b) {
  if (!have_common_bytes(a, b)) return false;
  if (a.dims == nullptr && b.dims == nullptr) return true;
  Marks marks(std::min(a.base, b.base), std::max(end_of(a), end_of(b)));
  marks.add(a);
  return marks.meets(b);
}

}  // namespace

// The memory of one operand.
Region AliasCheck::region_of(size_t at, int operand) const {
  const ParamUpdate& update = table_.updates[at];
  if (operand >= kFirstScale)
    return {reinterpret_cast<uintptr_t>(memory_of(update, operand)),
            sizeof(float),
            num_groups(update.numel) * static_cast<int64_t>(sizeof(float)),
            nullptr,
            operand,
            owner_of(at, operand)};
  const int64_t item = item_size(update.formats.dtypes[operand]);
  // Of a param with rows that are not updated, all count: which ones are is another matter in each
  // step. Its grad has been made for this step, without gaps.
  const bool is_rows_grad = operand == kGrad && table_.is_of_rows(update);
  const Dims* const strided = is_rows_grad ? nullptr : table_.dims_of(update);
  const int64_t elements = strided ? extent(*strided, operand) : update.numel;
  return {reinterpret_cast<uintptr_t>(update.data[operand]),
          item,
          elements * item,
          strided,
          operand,
          owner_of(at, operand)};
}

// "exp_avg of parameter 'fc.weight' (group 0, index 3)" for an owner of a region.
std::string AliasCheck::name_of(const StepContext& context, int64_t owner) const {
  auto at = owner / kMaxTensors;
  const auto operand = static_cast<int>(owner % kMaxTensors);
  size_t g = 0;
  for (; at >= context.groups[g].size(); ++g) at -= context.groups[g].size();
  const Group& group = context.groups[g];
  const std::string param = ParamId{group.dict.ptr(), static_cast<int64_t>(g), at}.text();
  if (operand == kParam) return param;
  const int named = operand < kFirstScale ? operand : kFirstState + operand - kFirstScale;
  const std::string name = group.options.names[named]->name();
  return name + (operand < kFirstScale ? "" : kScalesSuffix) + " of " + param;
}

void AliasCheck::refuse_overlap(const StepContext& context) {
  if (table_.is_disjoint) return;
  ++num_checks_;
  std::vector<Region> regions;
  const auto collect = [&](bool with_resting) {
    regions.clear();
    for (size_t at = 0; at < table_.updates.size(); ++at) {
      const ParamUpdate& update = table_.updates[at];
      const bool counts = update.device != kIdle || (with_resting && table_.caches[at].is_disjoint);
      for (int k = 0; counts && update.numel > 0 && k < kMaxTensors; ++k)
        if (k != kGrad && memory_of(update, k) != nullptr) regions.push_back(region_of(at, k));
    }
  };
  const auto is_resting = [&](int64_t owner) {
    return table_.updates[static_cast<size_t>(owner / kMaxTensors)].device == kIdle;
  };
  collect(/*with_resting=*/true);
  auto found = find_overlap(regions);
  if (found && (is_resting(found->first) || is_resting(found->second))) {
    // Its memory may be another's by now.
    for (size_t at = 0; at < table_.updates.size(); ++at)
      if (table_.updates[at].device == kIdle) table_.caches[at].is_disjoint = false;
    collect(/*with_resting=*/false);
    found = find_overlap(regions);
  }
  if (found && found->first == found->second)
    throw py::value_error("elements of " + name_of(context, found->first) +
                          " share memory (an expanded tensor?); clone() it first");
  if (found)
    throw py::value_error(name_of(context, found->first) + " and " +
                          name_of(context, found->second) +
                          " share memory, so one step would update it twice");
  for (size_t at = 0; at < table_.updates.size(); ++at) {
    if (table_.updates[at].device != kIdle) table_.caches[at].is_disjoint = true;
    table_.caches[at].checked_grad = nullptr;
  }
  written_.clear();
  written_.reserve(regions.size());
  uintptr_t end = 0;
  for (const Region& region : regions) {  // sorted by their beginnings
    written_.push_back({static_cast<uint32_t>(region.owner), region.base >= end});
    end = std::max(end, end_of(region));
  }
  table_.is_disjoint = true;
}

bool AliasCheck::check_grads(const StepContext& context) {
  bool in_order = false;
  size_t guess = 0;
  for (size_t at = 0; at < table_.updates.size(); ++at) {
    const ParamUpdate& update = table_.updates[at];
    ParamCache& cache = table_.caches[at];
    if (update.device == kIdle || update.numel == 0) continue;
    if (cache.checked_grad != update.data[kGrad]) {
      cache.reads_others = meets_written(region_of(at, kGrad), guess) && reads_others(context, at);
      cache.checked_grad = update.data[kGrad];
    }
    in_order = in_order || cache.reads_others;
  }
  return in_order;
}

// True if bytes of the region may be among those that the step writes. `guess`: where the region
// before it would be in written_; grads often lie in the order of their parameters.
bool AliasCheck::meets_written(const Region& region, size_t& guess) const {
  const auto at = [&](size_t i) {
    const auto owner = static_cast<size_t>(written_[i].owner);
    return region_of(owner / kMaxTensors, static_cast<int>(owner % kMaxTensors));
  };
  const uintptr_t end = end_of(region);
  const auto is_before = [&](size_t i) {
    const auto owner = static_cast<size_t>(written_[i].owner);
    return reinterpret_cast<uintptr_t>(
               memory_of(table_.updates[owner / kMaxTensors], owner % kMaxTensors)) < end;
  };
  const bool good = guess <= written_.size() && (guess == 0 || is_before(guess - 1)) &&
                    (guess == written_.size() || !is_before(guess));
  if (!good) {
    size_t low = 0, high = written_.size();
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if (is_before(middle))
        low = middle + 1;
      else
        high = middle;
    }
    guess = low;
  }
  // Regions that overlap in their extents (interleaved slices) form chains; chains lie apart.
  for (size_t i = guess; i-- > 0;) {
    if (end_of(at(i)) > region.base) return true;
    if (written_[i].starts_chain) break;
  }
  return false;
}

// The exact answer for one grad: whether it is memory of another parameter's.
bool AliasCheck::reads_others(const StepContext& context, size_t at) {
  const Region grad = region_of(at, kGrad);
  bool others = false;
  for (const Written& written : written_) {
    const auto owner = static_cast<size_t>(written.owner) / kMaxTensors;
    const Region region = region_of(owner, static_cast<int>(written.owner % kMaxTensors));
    if (!have_common_bytes(grad, region)) continue;
    if (table_.updates[owner].device == kIdle) {
      // Not written to; its memory may be the grad's by now.
      table_.is_disjoint = table_.caches[owner].is_disjoint = false;
      continue;
    }
    if (owner == at && are_same_elements(grad, region)) continue;  // read before it is written
    if (!share_elements(grad, region)) continue;
    if (owner == at || table_.updates[at].device != kCpu)
      throw py::value_error(
          "grad of " + name_of(context, owner_of(at, kParam)) + " and " +
          (region.owner == owner_of(at, kParam) ? "the parameter itself"
                                                : name_of(context, region.owner)) +
          " share memory, so that the step would write to elements of the grad that it has yet to "
          "read; clone() the grad");
    others = true;
  }
  return others;
}

}  // namespace fusedopt
