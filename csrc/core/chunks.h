// Divides a step on the CPU into chunks of about equal cost, whatever the sizes of its tensors: a
// chunk is a part of a large tensor, or a run of many small ones. A pure function of the sizes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fusedopt {

// A chunk goes from its start to the start of the next one.
struct ChunkStart {
  int64_t update;
  int64_t element;  // within that update
};

// Elements of a chunk: enough that the cost of handing it out does not count and memory keeps
// streaming, and few enough that all threads finish at about the same time. kEnoughChunks of them
// do for that, so chunks of a large step are larger, up to the maximum.
inline constexpr int64_t kMinChunkElements = 16384;
inline constexpr int64_t kMaxChunkElements = 65536;
inline constexpr int64_t kEnoughChunks = 64;
// The cost of starting on a tensor, expressed in elements.
inline constexpr int64_t kTensorCost = 256;
// Chunks start at multiples of this within a tensor: at least a whole cache line in every format.
inline constexpr int64_t kChunkAlignment = 64;

// The size of a chunk for a step with tensors of these sizes.
inline int64_t chunk_elements_for(const std::vector<int64_t>& sizes) {
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  return std::clamp(total / kEnoughChunks, kMinChunkElements, kMaxChunkElements);
}

// Returns one more start than there are chunks; the last is the end, {sizes.size(), 0}.
inline std::vector<ChunkStart> plan_chunks(const std::vector<int64_t>& sizes,
                                           int64_t chunk_elements) {
  std::vector<ChunkStart> starts;
  const auto num_updates = static_cast<int64_t>(sizes.size());
  int64_t room = 0;  // elements that the current chunk can still take
  for (int64_t update = 0; update < num_updates; ++update) {
    const int64_t size = sizes[static_cast<size_t>(update)];
    int64_t element = 0;
    do {
      if (room <= 0) {
        starts.push_back({update, element});
        room = chunk_elements;
      }
      const int64_t fits = std::max(room - kTensorCost, kChunkAlignment);
      const int64_t aligned = (fits + kChunkAlignment - 1) / kChunkAlignment * kChunkAlignment;
      const int64_t taken = std::min(size - element, aligned);
      element += taken;
      room -= taken + kTensorCost;
    } while (element < size);
  }
  starts.push_back({num_updates, 0});
  return starts;
}

}  // namespace fusedopt
