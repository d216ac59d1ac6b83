#pragma once

#include <cstdint>

// How a step is spread over a GPU. No result depends on these numbers.
namespace fusedopt::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kBlockThreads = 128;
inline constexpr int kBlockWarps = kBlockThreads / kWarp;

// 128 bits for each thread and access.
inline constexpr int kVectorBytes = 16;

// Whether to tell the caches that vectors are read, or written, just once.
inline constexpr bool kStreamLoads = false;
inline constexpr bool kStreamStores = false;

// A tensor up to this size is left to one warp; larger ones are cut into chunks for a block each.
inline constexpr int64_t kWarpElements = 256;

// Chunks get larger until there are about this many: enough of them that the last ones to finish
// do not matter, few enough that handing them out does not.
inline constexpr int64_t kEnoughChunks = 32768;
inline constexpr int64_t kMinChunkElements = 512;

}  // namespace fusedopt::cuda
