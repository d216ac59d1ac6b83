#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/gpu.h"
#include "cuda/host_mirror.h"
#include "cuda/launch.h"

// The device's side of a step: what its kernels read, in one block of device memory.
namespace fusedopt::cuda {

// Works of one column, neighbours in the table, and the launch that does them.
struct Rows {
  LaunchKey key;
  int64_t first_row, num_rows;
  int64_t first_chunk, num_chunks;  // and one more start, the end
  int64_t scalars;                  // which table of scalars: columns of the same types share one
};

// The works of one device, sorted by column. All of it follows from what their columns and sizes
// are.
class Partition {
 public:
  // Takes in what a step brings; true if something is not as it was.
  bool update(const DeviceStep& device_step);

  const std::vector<int64_t>& rows() const { return rows_; }  // numbers of works
  const std::vector<Rows>& keys() const { return keys_; }
  int64_t num_scalars_tables() const { return num_scalars_tables_; }
  const std::vector<ChunkStart>& chunks() const { return chunks_; }  // rows count from first_row
  // Leaves of the global norm of the grads that there are, in the order of the works; rows count
  // from 0. They take no more room than those of all grads.
  const std::vector<ChunkStart>& find_leaves(const DeviceStep& device_step);
  int64_t max_leaves() const;  // and the end

 private:
  void divide_up();

  struct Member {
    bool is_here = false;  // on this device
    LaunchKey key = {};
    int64_t numel = 0;
  };
  std::vector<Member> members_;  // one for each work of the optimizer
  std::vector<int64_t> rows_;
  std::vector<Rows> keys_;
  int64_t num_scalars_tables_ = 0;
  std::vector<ChunkStart> chunks_;
  std::vector<ChunkStart> leaves_;  // of grads of
  std::vector<int64_t> leaf_sizes_;
};

// The block's parts, by their offsets: those that change most often come last.
struct TableLayout {
  int64_t chunks, leaves, dims, layouts, groups, counters, updates;
  int64_t scalars;       // tables, Rows::scalars
  int64_t mirror_bytes;  // of all these
  int64_t computed;      // scalars that the device computes, sizeof(Scalars) for each row
  int64_t sums;          // a PartialSum for each leaf
  int64_t bytes;
  // What there is room for.
  int64_t max_dims, max_layouts, max_groups, max_scalars;
  bool has_counters;
  bool has_leaves;
};

class DeviceTable {
 public:
  DeviceTable(const TableLayout& parts, std::shared_ptr<void> memory, void* stream)
      : parts_(parts), memory_(std::move(memory)), stream_(stream), mirror_(parts.mirror_bytes) {}

  // Whether a step's share has room here.
  bool fits(const DeviceStep& device_step) const;
  const std::shared_ptr<void>& memory() const { return memory_; }
  HostMirror& mirror() { return mirror_; }
  uint8_t* at(int64_t offset) const { return static_cast<uint8_t*>(memory_.get()) + offset; }
  const TableLayout& parts() const { return parts_; }
  int64_t scalars_of(const Rows& rows) const;  // where that table is

  // Brings the image up to date.
  void fill(const DeviceStep& device_step, Partition& partition);

 private:
  void fill_layouts(const DeviceStep& device_step);
  void fill_updates(const DeviceStep& device_step, const Partition& partition);

  TableLayout parts_;
  std::shared_ptr<void> memory_;
  void* stream_;
  HostMirror mirror_;
};

// Room for a share, and some more.
TableLayout plan_table(const DeviceStep& device_step, const Partition& partition);

// True if the scalars of all columns travel with the kernel's arguments.
bool has_few_scalars(const DeviceStep& device_step);

}  // namespace fusedopt::cuda
