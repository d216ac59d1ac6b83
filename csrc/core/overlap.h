// Finds memory that one step would write twice: tensors that share memory, and tensors that meet
// themselves, as expanded ones do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "core/layout.h"

namespace fusedopt {

// Memory that a step writes: elements of `item` bytes at base + sum(index * stride) * item.
struct Region {
  uintptr_t base;
  int64_t item;      // bytes per element
  int64_t bytes;     // from the first byte to the last, both included
  const Dims* dims;  // nullptr: every byte of it
  int operand;       // whose strides in `dims` are meant
  int64_t owner;     // names the region to the caller
};

// Calls `visit` with the byte offset of each element from the region's base.
template <class Visit>
void for_each_element(const Region& region, Visit&& visit) {
  if (region.dims == nullptr) {
    for (int64_t at = 0; at < region.bytes; at += region.item) visit(at);
    return;
  }
  const Dims& dims = *region.dims;
  std::vector<int64_t> index(dims.size(), 0);
  int64_t at = 0;
  for (;;) {
    visit(at * region.item);
    auto d = static_cast<int64_t>(dims.size()) - 1;
    for (; d >= 0; --d) {
      const Dim& dim = dims[static_cast<size_t>(d)];
      int64_t& i = index[static_cast<size_t>(d)];
      at += dim.strides[region.operand];
      if (++i < dim.size) break;
      at -= dim.size * dim.strides[region.operand];
      i = 0;
    }
    if (d < 0) return;
  }
}

// True if the strides alone show that no two elements share a place: each stride is larger than all
// that lies within the smaller ones.
inline bool has_distinct_elements(const Region& region) {
  if (region.dims == nullptr) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (const Dim& dim : *region.dims) dims.emplace_back(dim.strides[region.operand], dim.size);
  std::sort(dims.begin(), dims.end());
  int64_t inner = 1;  // extent of the dims with smaller strides
  for (const auto& [stride, size] : dims) {
    if (size == 1) continue;  // its stride says nothing
    if (stride < inner) return false;
    inner += (size - 1) * stride;
  }
  return true;
}

// Which bytes of a span of memory have been marked.
class Marks {
 public:
  Marks(uintptr_t low, uintptr_t high) : low_(low), seen_(high - low, false) {}

  // Marks the region's bytes; true if one of them had been marked before.
  bool add(const Region& region) {
    bool clash = false;
    for_each_element(region, [&](int64_t at) {
      const size_t first = region.base - low_ + static_cast<size_t>(at);
      for (size_t byte = first; byte < first + static_cast<size_t>(region.item); ++byte) {
        clash = clash || seen_[byte];
        seen_[byte] = true;
      }
    });
    return clash;
  }

  // True if one of the region's bytes has been marked.
  bool meets(const Region& region) const {
    bool found = false;
    for_each_element(region, [&](int64_t at) {
      const size_t first = region.base - low_ + static_cast<size_t>(at);
      for (size_t byte = first; byte < first + static_cast<size_t>(region.item); ++byte)
        found = found || seen_[byte];
    });
    return found;
  }

 private:
  uintptr_t low_;
  std::vector<bool> seen_;
};

inline uintptr_t end_of(const Region& region) {
  return region.base + static_cast<uintptr_t>(region.bytes);
}

using Owners = std::pair<int64_t, int64_t>;

// The exact test for regions whose spans overlap, sorted by base: two interleaved slices of one
// buffer are fine. Only sliced tensors get here, so its cost does not matter.
inline std::optional<Owners> overlap_by_marking(const Region* first, const Region* last) {
  uintptr_t end = 0;
  for (const Region* r = first; r != last; ++r) end = std::max(end, end_of(*r));
  Marks all(first->base, end);
  for (const Region* r = first; r != last; ++r) {
    if (!all.add(*r)) continue;
    for (const Region* other = first; other != r; ++other) {
      Marks pair(first->base, end);
      pair.add(*other);
      if (pair.add(*r)) return Owners(other->owner, r->owner);
    }
    return Owners(r->owner, r->owner);
  }
  return std::nullopt;
}

// The owners of two regions that share a byte, if there are any; twice the same owner if a region
// meets itself. Sorts `regions`, and looks closer only at those whose spans overlap.
inline std::optional<Owners> find_overlap(std::vector<Region>& regions) {
  std::sort(regions.begin(), regions.end(),
            [](const Region& a, const Region& b) { return a.base < b.base; });
  const Region* const all_end = regions.data() + regions.size();
  for (const Region* first = regions.data(); first != all_end;) {
    uintptr_t end = end_of(*first);
    bool strided = first->dims != nullptr;
    const Region* last = first + 1;
    for (; last != all_end && last->base < end; ++last) {
      end = std::max(end, end_of(*last));
      strided = strided || last->dims != nullptr;
    }
    const bool alone = last - first == 1;
    if (!alone && !strided) return Owners(first->owner, first[1].owner);
    if (!alone || !has_distinct_elements(*first))
      if (const auto found = overlap_by_marking(first, last)) return found;
    first = last;
  }
  return std::nullopt;
}

}  // namespace fusedopt
