#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fusedopt::cuda {

// What a block of device memory is to hold, and which part of it the device does not have yet.
class HostMirror {
 public:
  explicit HostMirror(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)), first_(0), last_(bytes) {}

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

  void put(int64_t offset, const void* data, int64_t bytes) {
    uint8_t* const to = bytes_.data() + offset;
    if (bytes == 0 || std::memcmp(to, data, static_cast<size_t>(bytes)) == 0) return;
    std::memcpy(to, data, static_cast<size_t>(bytes));
    first_ = std::min(first_, offset);
    last_ = std::max(last_, offset + bytes);
  }

  // The part that changed: all of it lies between these.
  int64_t first_change() const { return std::min(first_, last_); }
  int64_t bytes_changed() const { return std::max<int64_t>(last_ - first_, 0); }
  const void* changes() const { return bytes_.data() + first_change(); }

  void is_sent() {
    first_ = size();
    last_ = 0;
  }

 private:
  std::vector<uint8_t> bytes_;
  int64_t first_, last_;  // of what changed; last_ <= first_: nothing
};

}  // namespace fusedopt::cuda
