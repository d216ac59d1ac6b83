// How a step is spread over a GPU. No result depends on these numbers, only the speed. Those for
// large tensors were measured on an H200.
#pragma once

#include <cstdint>

namespace fusedopt::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kBlockThreads = 128;
inline constexpr int kBlockWarps = kBlockThreads / kWarp;

// Stages of shared memory in the pipeline of the update kernel. While a thread computes the
// elements of one stage, the copies to the other two are under way. More stages cover more latency
// of the memory, but take shared memory, and then fewer blocks fit on an SM.
inline constexpr int kStages = 3;

// Shared memory that every GPU since sm_80 lets a block have: 99 KiB on sm_86, sm_89 and sm_120.
inline constexpr int kMaxSharedBytes = 99 * 1024;

// Elements that a thread computes at a time: 32 bytes of the type that computes, 8 floats or 4
// doubles.
template <class T>
inline constexpr int kThreadElements = 32 / static_cast<int>(sizeof(T));

// Tensors up to this size are done by one warp each; larger ones are cut into chunks for a block.
inline constexpr int64_t kWarpElements = 256;

// Chunks are as large as it takes to have about this many. They are enough that the GPU is not idle
// for long while the last ones finish, and few enough that starting their blocks takes little time.
inline constexpr int64_t kEnoughChunks = 32768;
inline constexpr int64_t kMinChunkElements = 1024;

// Elements whose squares a block sums: so many that bringing its threads' sums together does not
// count, and few enough that small models have work for all of a GPU.
inline constexpr int64_t kLeafElements = 32768;

}  // namespace fusedopt::cuda
