// Sorts updates into launches, plans the block of device memory and fills its mirror on the host
// (cuda/table.h).

#include "cuda/table.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "cuda/grid.h"

namespace fusedopt::cuda {
namespace {

constexpr int64_t kPartAlignment = 256;  // as CUDA aligns what it allocates

int64_t with_room(int64_t count) {
  int64_t room = 16;
  while (room < count) room *= 2;
  return room;
}

int64_t count_dims(const DeviceStep& device_step) {
  int64_t count = 0;
  for (int64_t i = 0; i < device_step.num_layouts; ++i) count += device_step.layouts[i].num_dims;
  return count;
}

// Bytes of one table of scalars, with room for so many.
int64_t scalars_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(Scalars)) + kPartAlignment - 1) / kPartAlignment *
         kPartAlignment;
}

// All scalars of a step in the types of a launch, as bytes. Those that belong to other rules come
// along without meaning, so that ParamUpdate::scalars is the same index in every table.
std::vector<uint8_t> converted(const DeviceStep& device_step, const LaunchKey& key) {
  const auto count = static_cast<size_t>(device_step.num_scalars);
  std::vector<uint8_t> bytes(count * sizeof(Scalars));
  with_types(key, [&](auto rule, auto number) {
    for (size_t i = 0; i < count; ++i) {
      const auto scalars =
          device_step.scalars[i].template of<decltype(rule)>().template as<decltype(number)>();
      std::memcpy(bytes.data() + i * sizeof(scalars), &scalars, sizeof(scalars));
    }
  });
  return bytes;
}

}  // namespace

bool Partition::update(const DeviceStep& device_step) {
  const auto own_device = static_cast<uint8_t>(kFirstGpu + device_step.gpu);
  const auto size = static_cast<size_t>(device_step.num_updates);
  bool changed = !is_current_ || members_.size() != size;
  is_current_ = false;  // and stays so if memory runs out below
  if (changed) members_.assign(size, Member());
  for (size_t index = 0; index < members_.size(); ++index) {
    const ParamUpdate& update = device_step.updates[index];
    // Without a grad in this step, an update keeps its row and its chunks, and the kernel skips
    // them. So freezing and unfreezing a parameter sends its row and nothing else.
    if (update.device == kIdle) continue;
    const bool is_here = update.device == own_device;
    const Member found = is_here ? Member{true, launch_key_of(update), update.numel} : Member();
    Member& member = members_[index];
    changed = changed || found.is_here != member.is_here || found.numel != member.numel ||
              !(found.key == member.key);
    member = found;
  }
  if (changed) divide_up();
  is_current_ = true;
  return changed;
}

// Rows, chunks and leaves of every launch, in the order in which their first parameters come.
void Partition::divide_up() {
  rows_.clear();
  launches_.clear();
  num_scalars_tables_ = 0;
  chunks_.clear();
  leaves_.clear();
  std::vector<LaunchKey> found;  // few, so searching them one by one is quick enough
  for (const Member& member : members_)
    if (member.is_here && std::find(found.begin(), found.end(), member.key) == found.end())
      found.push_back(member.key);
  for (const LaunchKey& key : found) {
    std::vector<int64_t> sizes;
    const auto first_row = static_cast<int64_t>(rows_.size());
    for (size_t index = 0; index < members_.size(); ++index) {
      if (!members_[index].is_here || !(members_[index].key == key)) continue;
      rows_.push_back(static_cast<int64_t>(index));
      sizes.push_back(members_[index].numel);
    }
    const std::vector<ChunkStart> chunks = plan_grid(sizes), leaves = plan_leaves(sizes);
    const auto same = std::find_if(launches_.begin(), launches_.end(), [&](const Launch& launch) {
      return launch.key.rule == key.rule &&
             launch.key.formats.in_double() == key.formats.in_double();
    });
    launches_.push_back(
        {key, first_row, static_cast<int64_t>(sizes.size()), static_cast<int64_t>(chunks_.size()),
         static_cast<int64_t>(chunks.size()) - 1, static_cast<int64_t>(leaves_.size()),
         static_cast<int64_t>(leaves.size()) - 1,
         same != launches_.end() ? same->scalars : num_scalars_tables_++});
    chunks_.insert(chunks_.end(), chunks.begin(), chunks.end());
    leaves_.insert(leaves_.end(), leaves.begin(), leaves.end());
  }
}

bool has_few_scalars(const DeviceStep& device_step) {
  // The smallest room among all kernels decides, so that the answer depends on their number alone.
  static const int64_t most = [] {
    int64_t least_room = std::numeric_limits<int64_t>::max();
    for (int rule = 0; rule < Rules::kSize; ++rule)
      for (const bool in_double : {false, true})
        with_types(static_cast<RuleId>(rule), in_double, [&](auto known, auto type) {
          constexpr int64_t kRoom = UpdateArguments<decltype(known), decltype(type)>::kFew;
          least_room = std::min(least_room, kRoom);
        });
    return least_room;
  }();
  return device_step.counters == nullptr && device_step.num_scalars <= most;
}

TableLayout plan_table(const DeviceStep& device_step, const Partition& partition) {
  TableLayout parts = {};
  parts.has_counters = device_step.counters != nullptr;
  parts.has_leaves = device_step.reads_grads;
  parts.max_layouts = device_step.num_layouts > 0 ? with_room(device_step.num_layouts) : 0;
  parts.max_dims = device_step.num_layouts > 0 ? with_room(count_dims(device_step)) : 0;
  parts.max_groups = parts.has_counters ? with_room(device_step.num_groups) : 0;
  const bool few = parts.has_counters || has_few_scalars(device_step);
  parts.max_scalars = few ? 0 : with_room(device_step.num_scalars);

  int64_t end = 0;
  const auto reserve = [&](int64_t count, int64_t size) {
    const int64_t start = end;
    end = (end + count * size + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
    return start;
  };
  const auto num_rows = static_cast<int64_t>(partition.rows().size());
  parts.chunks = reserve(static_cast<int64_t>(partition.chunks().size()), sizeof(ChunkStart));
  parts.leaves = reserve(parts.has_leaves ? static_cast<int64_t>(partition.leaves().size()) : 0,
                         sizeof(ChunkStart));
  parts.dims = reserve(parts.max_dims, sizeof(Dim));
  parts.layouts = reserve(parts.max_layouts, sizeof(Layout));
  parts.groups = reserve(parts.max_groups, sizeof(HyperParamsRef));
  parts.counters = reserve(parts.has_counters ? num_rows : 0, sizeof(StepCounter));
  parts.updates = reserve(num_rows, sizeof(ParamUpdate));
  parts.scalars = reserve(partition.num_scalars_tables(), scalars_bytes(parts.max_scalars));
  parts.mirror_bytes = end;
  parts.computed = reserve(parts.has_counters ? num_rows : 0, sizeof(Scalars));
  parts.bytes = end;
  return parts;
}

int64_t DeviceTable::scalars_of(const Launch& launch) const {
  return parts_.scalars + launch.scalars * scalars_bytes(parts_.max_scalars);
}

bool DeviceTable::fits(const DeviceStep& device_step) const {
  const bool few = device_step.counters != nullptr || has_few_scalars(device_step);
  return device_step.stream == stream_ &&
         parts_.has_counters == (device_step.counters != nullptr) &&
         parts_.has_leaves >= device_step.reads_grads &&
         device_step.num_layouts <= parts_.max_layouts &&
         count_dims(device_step) <= parts_.max_dims &&
         (device_step.counters == nullptr || device_step.num_groups <= parts_.max_groups) &&
         (few || device_step.num_scalars <= parts_.max_scalars);
}

void DeviceTable::fill(const DeviceStep& device_step, const Partition& partition) {
  const auto put_starts = [&](int64_t offset, const std::vector<ChunkStart>& starts) {
    mirror_.put(offset, starts.data(), static_cast<int64_t>(starts.size() * sizeof(ChunkStart)));
  };
  // Only a new table lacks them: with another partition the driver makes a new table.
  if (mirror_.bytes_changed() == mirror_.size()) {
    put_starts(parts_.chunks, partition.chunks());
    if (parts_.has_leaves) put_starts(parts_.leaves, partition.leaves());
  }
  fill_layouts(device_step);
  fill_updates(device_step, partition);
  if (device_step.counters != nullptr)
    for (int64_t g = 0; g < device_step.num_groups; ++g)
      mirror_.put(parts_.groups + g * static_cast<int64_t>(sizeof(HyperParamsRef)),
                  &device_step.groups[g], sizeof(HyperParamsRef));
  int64_t done = 0;
  if (device_step.counters == nullptr && !has_few_scalars(device_step))
    for (const Launch& launch : partition.launches()) {
      if (launch.scalars < done) continue;  // an earlier launch of the same types has filled it
      const std::vector<uint8_t> bytes = converted(device_step, launch.key);
      mirror_.put(scalars_of(launch), bytes.data(), static_cast<int64_t>(bytes.size()));
      ++done;
    }
}

void DeviceTable::fill_layouts(const DeviceStep& device_step) {
  int64_t dim = parts_.dims;
  for (int64_t i = 0; i < device_step.num_layouts; ++i) {
    const Layout& layout = device_step.layouts[i];
    const Layout entry = {reinterpret_cast<const Dim*>(at(dim)), layout.num_dims, layout.rows,
                          layout.num_rows};
    const int64_t bytes = layout.num_dims * static_cast<int64_t>(sizeof(Dim));
    mirror_.put(dim, layout.dims, bytes);
    // Member by member: the padding of a struct holds any bytes, and would look like a change.
    const int64_t to = parts_.layouts + i * static_cast<int64_t>(sizeof(Layout));
    mirror_.put(to + static_cast<int64_t>(offsetof(Layout, dims)), &entry.dims, sizeof(entry.dims));
    mirror_.put(to + static_cast<int64_t>(offsetof(Layout, num_dims)), &entry.num_dims,
                sizeof(entry.num_dims));
    mirror_.put(to + static_cast<int64_t>(offsetof(Layout, rows)), &entry.rows, sizeof(entry.rows));
    mirror_.put(to + static_cast<int64_t>(offsetof(Layout, num_rows)), &entry.num_rows,
                sizeof(entry.num_rows));
    dim += bytes;
  }
}

void DeviceTable::fill_updates(const DeviceStep& device_step, const Partition& partition) {
  for (const Launch& launch : partition.launches())
    for (int64_t row = launch.first_row; row < launch.first_row + launch.num_rows; ++row) {
      const int64_t index = partition.rows()[static_cast<size_t>(row)];
      ParamUpdate update = device_step.updates[index];
      if (device_step.counters != nullptr) {
        // The device computes scalars for each row, so a row finds its own at its own place.
        update.scalars = static_cast<int32_t>(row - launch.first_row);
        mirror_.put(parts_.counters + row * static_cast<int64_t>(sizeof(StepCounter)),
                    &device_step.counters[index], sizeof(StepCounter));
      }
      mirror_.put(parts_.updates + row * static_cast<int64_t>(sizeof(ParamUpdate)), &update,
                  sizeof(ParamUpdate));
    }
}

}  // namespace fusedopt::cuda
