// Which block of the update kernel does what. A pure function of the tensors' sizes, so that it can
// be tested alone and is found once for all steps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/chunks.h"
#include "cuda/tuning.h"

namespace fusedopt::cuda {

// Divides updates of these sizes among blocks, one chunk for each: a part of one update, or up to
// kBlockWarps whole updates that are small enough for a warp each. So a model of many small tensors
// does not leave most threads of its blocks idle. Returns one more start than there are chunks.
inline std::vector<ChunkStart> plan_grid(const std::vector<int64_t>& sizes) {
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  const int64_t units = total / kEnoughChunks / kMinChunkElements + 1;
  const int64_t chunk_elements = units * kMinChunkElements;
  const auto num_updates = static_cast<int64_t>(sizes.size());
  std::vector<ChunkStart> starts;
  int small = 0;  // updates in the current chunk of small ones; 0: the next one starts a chunk
  for (int64_t update = 0; update < num_updates; ++update) {
    const int64_t size = sizes[static_cast<size_t>(update)];
    if (size <= kWarpElements) {
      if (small == 0) starts.push_back({update, 0});
      small = (small + 1) % kBlockWarps;
      continue;
    }
    small = 0;
    for (int64_t element = 0; element < size; element += chunk_elements)
      starts.push_back({update, element});
  }
  starts.push_back({num_updates, 0});
  return starts;
}

// Cuts grads of these sizes into leaves, whose squares are summed by a block each.
inline std::vector<ChunkStart> plan_leaves(const std::vector<int64_t>& sizes) {
  std::vector<ChunkStart> starts;
  const auto num_updates = static_cast<int64_t>(sizes.size());
  for (int64_t update = 0; update < num_updates; ++update)
    for (int64_t element = 0; element < sizes[static_cast<size_t>(update)];
         element += kLeafElements)
      starts.push_back({update, element});
  starts.push_back({num_updates, 0});
  return starts;
}

}  // namespace fusedopt::cuda
