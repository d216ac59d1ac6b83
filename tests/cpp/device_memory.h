// Memory of the host that takes the place of a device's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

// It is aligned as CUDA's allocators align memory, has exactly this size, so that ASan sees every
// overrun, and is filled with bytes that no test expects.
inline std::shared_ptr<void> device_memory(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, static_cast<size_t>(bytes)) != 0) std::abort();
  std::memset(memory, 0xcd, static_cast<size_t>(bytes));
  return {memory, std::free};
}
