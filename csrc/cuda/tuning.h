#pragma once

#include <cstdint>

// How a step is spread over a GPU. No result depends on these numbers; those for large works were
// measured on an H200.
namespace fusedopt::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kBlockThreads = 128;
inline constexpr int kBlockWarps = kBlockThreads / kWarp;

// Pieces of work that a thread has under way in shared memory, ahead of the one it computes.
inline constexpr int kStages = 3;

// Shared memory that every GPU since sm_80 lets a block have.
inline constexpr int kMaxSharedBytes = 99 * 1024;

// What a thread computes at a time.
template <class T>
inline constexpr int kThreadElements = 32 / static_cast<int>(sizeof(T));

// A tensor up to this size is left to one warp; larger ones are cut into chunks for a block each.
inline constexpr int64_t kWarpElements = 256;

// Chunks get larger until there are about this many: enough of them that the last ones to finish
// do not matter, few enough that handing them out does not.
inline constexpr int64_t kEnoughChunks = 32768;
inline constexpr int64_t kMinChunkElements = 1024;

}  // namespace fusedopt::cuda
