#include <algorithm>

#include "bindings/plan.h"
#include "core/overlap.h"

// The part of Plan that finds memory which one step would write twice, or read for one element and
// write for another.
namespace py = pybind11;

namespace fusedopt {
namespace {

int64_t owner_of(size_t at, int operand) {
  return static_cast<int64_t>(at) * kMaxOperands + operand;
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

const Dims* Plan::dims_of(const ParamUpdate& update) const {
  const auto layout = static_cast<size_t>(update.layout);
  return update.layout == kDense || layout >= dims_.size() ? nullptr : &dims_[layout];
}

// The memory of one operand.
Region Plan::region_of(size_t at, int operand) const {
  const ParamUpdate& update = updates_[at];
  const int64_t item = item_size(update.formats.dtypes[operand]);
  const Dims* const strided = dims_of(update);
  const int64_t elements = strided ? extent(*strided, operand) : update.numel;
  return {reinterpret_cast<uintptr_t>(update.data[operand]),
          item,
          elements * item,
          strided,
          operand,
          owner_of(at, operand)};
}

// "exp_avg of parameter 'fc.weight' (group 0, index 3)" for an owner of a region.
std::string Plan::name_of(const StepContext& context, int64_t owner) const {
  auto at = owner / kMaxOperands;
  const auto operand = static_cast<int>(owner % kMaxOperands);
  size_t g = 0;
  for (; at >= PyTuple_GET_SIZE(context.groups[g].params.ptr()); ++g)
    at -= PyTuple_GET_SIZE(context.groups[g].params.ptr());
  const std::string param =
      ParamId{context.groups[g].dict.ptr(), static_cast<int64_t>(g), at}.text();
  if (operand == kParam) return param;
  return name_of_state(updates_[static_cast<size_t>(owner / kMaxOperands)], operand) + " of " +
         param;
}

std::string Plan::name_of_state(const ParamUpdate& update, int operand) const {
  if (operand == kEma) return kEmaParam.name();
  if (operand == kMaster) {
    const bool is_split = master_of(update.formats.dtypes[kMaster]) == Master::kSplit;
    return (is_split ? kParamRemainder : kMasterParam).name();
  }
  return row_.state_names[static_cast<size_t>(operand - kFirstState)].name();
}

// Raises ValueError if the step would write some memory twice. Parameters that rest this time are
// looked at too if they have been before, so that the answer stands when their turn comes.
void Plan::refuse_overlap(const StepContext& context) {
  if (disjoint_) return;
  ++overlap_checks_;
  std::vector<Region> regions;
  const auto collect = [&](bool with_resting) {
    regions.clear();
    for (size_t at = 0; at < updates_.size(); ++at) {
      const ParamUpdate& update = updates_[at];
      const bool counts = update.device != kIdle || (with_resting && caches_[at].is_disjoint);
      for (int k = 0; counts && update.numel > 0 && k < kMaxOperands; ++k)
        if (k != kGrad && update.data[k] != nullptr) regions.push_back(region_of(at, k));
    }
  };
  const auto is_resting = [&](int64_t owner) {
    return updates_[static_cast<size_t>(owner / kMaxOperands)].device == kIdle;
  };
  collect(/*with_resting=*/true);
  auto found = find_overlap(regions);
  if (found && (is_resting(found->first) || is_resting(found->second))) {
    // Its memory may be another's by now.
    for (size_t at = 0; at < updates_.size(); ++at)
      if (updates_[at].device == kIdle) caches_[at].is_disjoint = false;
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
  for (size_t at = 0; at < updates_.size(); ++at) {
    if (updates_[at].device != kIdle) caches_[at].is_disjoint = true;
    caches_[at].checked_grad = nullptr;
  }
  written_.clear();
  written_.reserve(regions.size());
  uintptr_t end = 0;
  for (const Region& region : regions) {  // sorted by their beginnings
    written_.push_back({static_cast<uint32_t>(region.owner), region.base >= end});
    end = std::max(end, end_of(region));
  }
  disjoint_ = true;
}

// Compares the grads' memory with what the step writes, unless that has been done for the same
// memory before. Returns true if a grad is written to as another parameter's, so that the order of
// the parameters counts. Raises ValueError if an element is written to before another has read it.
bool Plan::check_grads(const StepContext& context) {
  bool in_order = false;
  size_t guess = 0;
  for (size_t at = 0; at < updates_.size(); ++at) {
    const ParamUpdate& update = updates_[at];
    ParamCache& cache = caches_[at];
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
bool Plan::meets_written(const Region& region, size_t& guess) const {
  const auto at = [&](size_t i) {
    const auto owner = static_cast<size_t>(written_[i].owner);
    return region_of(owner / kMaxOperands, static_cast<int>(owner % kMaxOperands));
  };
  const uintptr_t end = end_of(region);
  const auto is_before = [&](size_t i) {
    const auto owner = static_cast<size_t>(written_[i].owner);
    return reinterpret_cast<uintptr_t>(updates_[owner / kMaxOperands].data[owner % kMaxOperands]) <
           end;
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
bool Plan::reads_others(const StepContext& context, size_t at) {
  const Region grad = region_of(at, kGrad);
  bool others = false;
  for (const Written& written : written_) {
    const auto owner = static_cast<size_t>(written.owner) / kMaxOperands;
    const Region region = region_of(owner, static_cast<int>(written.owner % kMaxOperands));
    if (!have_common_bytes(grad, region)) continue;
    if (updates_[owner].device == kIdle) {  // not written to; its memory may be the grad's by now
      disjoint_ = caches_[owner].is_disjoint = false;
      continue;
    }
    if (owner == at && are_same_elements(grad, region)) continue;  // read before it is written
    if (!share_elements(grad, region)) continue;
    if (owner == at || updates_[at].device != kCpu)
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
