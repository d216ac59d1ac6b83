// What the CUDA driver keeps in its table on a device, and how much of it a step sends.
#include "check.h"
#include "device_memory.h"

#include "cuda/host_mirror.h"
#include "cuda/table.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

// Which of this thread's next allocations fails; 0 for none.
thread_local int failing_allocation = 0;

}  // namespace

void* operator new(size_t bytes) {
  if (failing_allocation > 0 && --failing_allocation == 0) throw std::bad_alloc();
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

bool changes(const HostMirror& mirror, int64_t first, int64_t bytes) {
  return mirror.bytes_changed() == bytes && (bytes == 0 || mirror.first_change() == first);
}

void test_image_ranges() {
  HostMirror mirror(64);
  CHECK(changes(mirror, 0, 64));  // all of a new block of memory is to be sent
  const uint8_t bytes[] = {1, 2, 3, 4};
  mirror.put(8, bytes, 4);
  CHECK(changes(mirror, 0, 64));
  mirror.is_sent();
  CHECK(changes(mirror, 0, 0));
  mirror.put(8, bytes, 4);  // the same bytes as before
  mirror.put(64, bytes, 0);
  CHECK(changes(mirror, 0, 0));
  mirror.put(40, bytes, 4);
  CHECK(changes(mirror, 40, 4));
  CHECK(std::memcmp(mirror.changes(), bytes, 4) == 0);
  mirror.put(60, bytes, 4);
  mirror.put(20, bytes, 2);
  CHECK(changes(mirror, 20, 44));
  CHECK(std::memcmp(mirror.changes(), bytes, 2) == 0);
  mirror.is_sent();
  mirror.put(0, bytes, 4);
  CHECK(changes(mirror, 0, 4));
}

void test_empty_image() {
  HostMirror mirror(0);
  CHECK(mirror.size() == 0 && mirror.bytes_changed() == 0);
  mirror.put(0, nullptr, 0);
  mirror.is_sent();
  CHECK(mirror.bytes_changed() == 0);
}

constexpr int kGpu = 1;
void* const kElsewhere = reinterpret_cast<void*>(uintptr_t{1} << 20);
constexpr auto kOwn = static_cast<uint8_t>(kFirstGpu + kGpu);

// A step of four launches on one device: SGD in bfloat16, float32 and float64, and Adam in float32,
// where one update is strided. Entry i of the scalars is for rule i % 2.
class Given {
 public:
  Given() : scalars_(3), dims_({{5, {2, 1}}, {7, {20, 5}}}) {
    for (int i = 0; i < 12; ++i)
      add(i < 5   ? kIdOf<Sgd>
          : i < 8 ? kIdOf<Adam>
                  : static_cast<RuleId>(i % 2),
          i % 4 == 0 ? DType::kBFloat16 : DType::kFloat32, 10 + 100 * i);
    for (ParamUpdate& update : updates)
      if (update.rule == kIdOf<Sgd> && &update - updates.data() > 7)
        set_dtypes(update, DType::kFloat64);
    add_layouts(2);
    updates[11].layout = 1;
    for (size_t i = 0; i < scalars_.size(); ++i) set_scalars_of(i, static_cast<double>(i));
  }

  void add(RuleId rule, DType dtype, int64_t numel) {
    ParamUpdate update = {};
    for (int k = 0; k < 2; ++k)
      update.data[k] = reinterpret_cast<void*>(uintptr_t{4096} * (2 * updates.size() + 7 + k));
    set_dtypes(update, dtype);
    update.numel = numel;
    update.layout = kDense;
    update.rule = rule;
    update.scalars = rule;
    update.device = kOwn;
    updates.push_back(update);
  }

  static void set_dtypes(ParamUpdate& update, DType dtype) {
    for (int k = 0; k < 2; ++k) update.formats.dtypes[k] = dtype;
  }

  void add_layouts(int count) {
    layouts_.insert(layouts_.end(), static_cast<size_t>(count), Layout{dims_.data(), 2});
  }

  void set_scalars(int64_t count) { scalars_.resize(static_cast<size_t>(count)); }
  // Sets scalars that can be recognised by this number.
  void set_scalars_of(size_t at, double number) {
    if (at % 2 == kIdOf<Sgd>) {
      StepScalars<Sgd, double> scalars = {};
      scalars.rule.lr = number;
      scalars_[at].set<Sgd>(scalars);
    } else {
      StepScalars<Adam, double> scalars = {};
      scalars.rule.step_size = number;
      scalars_[at].set<Adam>(scalars);
    }
  }
  Dim& dim(size_t at) { return dims_[at]; }

  void add_counters() {
    groups.resize(2);
    for (size_t i = 0; i < updates.size(); ++i)
      counters.push_back({reinterpret_cast<void*>(64 + 8 * i), static_cast<int32_t>(i % 2),
                          DType::kFloat32, true, false, false});
  }

  DeviceStep device_step() const {
    DeviceStep device_step = {};
    device_step.gpu = kGpu;
    device_step.updates = updates.data();
    device_step.num_updates = static_cast<int64_t>(updates.size());
    device_step.layouts = layouts_.data();
    device_step.num_layouts = static_cast<int64_t>(layouts_.size());
    device_step.scalars = scalars_.data();
    device_step.num_scalars = static_cast<int64_t>(scalars_.size());
    device_step.counters = counters.empty() ? nullptr : counters.data();
    device_step.groups = groups.data();
    device_step.num_groups = static_cast<int64_t>(groups.size());
    return device_step;
  }

  std::vector<ParamUpdate> updates;
  std::vector<StepCounter> counters;
  std::vector<HyperParamsRef> groups;

 private:
  std::vector<Scalars> scalars_;
  std::vector<Dim> dims_;
  std::vector<Layout> layouts_;
};

// A table, and what the driver does with it in a step.
struct Sender {
  Partition partition;
  std::unique_ptr<DeviceTable> table;

  // Returns the number of bytes that this step sends.
  int64_t send(const Given& step) {
    const DeviceStep device_step = step.device_step();
    if (partition.update(device_step) || !table || !table->fits(device_step)) {
      const TableLayout parts = plan_table(device_step, partition);
      table = std::make_unique<DeviceTable>(parts, device_memory(parts.bytes), device_step.stream);
    }
    table->fill(device_step, partition);
    const int64_t bytes = first_bytes();
    table->mirror().is_sent();
    return bytes;
  }

  template <class Row>
  const Row* rows_at(int64_t offset) const {
    return reinterpret_cast<const Row*>(table->at(offset));
  }

  int64_t first = 0;  // offset of the first byte that the last step has sent

 private:
  int64_t first_bytes() {
    const HostMirror& mirror = table->mirror();
    first = mirror.first_change();
    std::memcpy(table->at(first), mirror.changes(), static_cast<size_t>(mirror.bytes_changed()));
    return mirror.bytes_changed();
  }
};

// The row of an update on the device.
int64_t row_of(const Sender& sender, int64_t update) {
  const auto& rows = sender.partition.rows();
  return std::find(rows.begin(), rows.end(), update) - rows.begin();
}

// The table of scalars of a launch. Only those of its own rule have a meaning.
template <class Rule, class T>
void check_scalars(const StepScalars<Rule, T>* found, const DeviceStep& device_step) {
  for (int64_t i = kIdOf<Rule>; i < device_step.num_scalars; i += 2) {
    const auto expected = device_step.scalars[i].of<Rule>().template as<T>();
    CHECK(std::memcmp(&found[i], &expected, sizeof(expected)) == 0);
  }
}

// All that the kernels read is what the step has.
void check_device(const Sender& sender, const Given& step) {
  const TableLayout& parts = sender.table->parts();
  const DeviceStep device_step = step.device_step();
  for (size_t row = 0; row < sender.partition.rows().size(); ++row) {
    const auto index = static_cast<size_t>(sender.partition.rows()[row]);
    ParamUpdate expected = step.updates[index];
    if (device_step.counters != nullptr) expected.scalars = -1;
    ParamUpdate found = sender.rows_at<ParamUpdate>(parts.updates)[row];
    if (device_step.counters != nullptr) found.scalars = -1;
    CHECK(std::memcmp(&found, &expected, sizeof(ParamUpdate)) == 0);
  }
  for (int64_t i = 0; i < device_step.num_layouts; ++i) {
    const Layout& layout = sender.rows_at<Layout>(parts.layouts)[i];
    const Layout& expected = device_step.layouts[i];
    CHECK(layout.num_dims == expected.num_dims && layout.dims != expected.dims);
    CHECK(std::equal(layout.dims, layout.dims + layout.num_dims, expected.dims));
  }
  if (device_step.counters == nullptr && !has_few_scalars(device_step))
    for (const Launch& launch : sender.partition.launches())
      with_types(launch.key, [&](auto rule, auto number) {
        using Rule = decltype(rule);
        using T = decltype(number);
        check_scalars<Rule, T>(
            sender.rows_at<StepScalars<Rule, T>>(sender.table->scalars_of(launch)), device_step);
      });
  const auto& chunks = sender.partition.chunks();
  CHECK(std::memcmp(sender.table->at(parts.chunks), chunks.data(),
                    chunks.size() * sizeof(ChunkStart)) == 0);
}

// The rows of every launch are neighbours, and each update of the device is in one of them.
void check_partition(const Partition& partition, const Given& step) {
  int64_t row = 0, chunk = 0;
  for (const Launch& launch : partition.launches()) {
    CHECK(launch.first_row == row && launch.first_chunk == chunk && launch.num_rows > 0);
    CHECK(partition.chunks()[static_cast<size_t>(chunk + launch.num_chunks)].update ==
          launch.num_rows);
    for (; row < launch.first_row + launch.num_rows; ++row) {
      const ParamUpdate& update =
          step.updates[static_cast<size_t>(partition.rows()[static_cast<size_t>(row)])];
      if (update.device == kIdle) continue;
      CHECK(update.device == kOwn && launch_key_of(update) == launch.key);
    }
    chunk += launch.num_chunks + 1;
  }
  CHECK(row == static_cast<int64_t>(partition.rows().size()));
  CHECK(chunk == static_cast<int64_t>(partition.chunks().size()));
  for (size_t index = 0; index < step.updates.size(); ++index)
    CHECK(step.updates[index].device != kOwn ||
          std::count(partition.rows().begin(), partition.rows().end(),
                     static_cast<int64_t>(index)) == 1);
}

void test_unchanged_steps_send_nothing() {
  Given step;
  for (const bool many : {false, true}) {
    if (many) step.set_scalars(300);
    Sender sender;
    CHECK(sender.send(step) == sender.table->mirror().size());
    check_device(sender, step);
    check_partition(sender.partition, step);
    const DeviceTable* const table = sender.table.get();
    CHECK(sender.send(step) == 0 && sender.send(Given(step)) == 0);
    CHECK(sender.table.get() == table);
  }
  step.add_counters();
  Sender sender;
  sender.send(step);
  check_device(sender, step);
  CHECK(sender.send(step) == 0);
}

// A pointer that changes sends one row.
void test_changed_pointers() {
  Given step;
  Sender sender;
  sender.send(step);
  for (const int64_t index : {0, 4, 5, 11}) {
    step.updates[static_cast<size_t>(index)].data[kGrad] = kElsewhere;
    CHECK(sender.send(step) == sizeof(ParamUpdate));
    CHECK(sender.first == sender.table->parts().updates +
                              row_of(sender, index) * static_cast<int64_t>(sizeof(ParamUpdate)));
    check_device(sender, step);
  }
  step.updates[1].data[kParam] = step.updates[3].data[kParam] = kElsewhere;
  CHECK(sender.send(step) == 3 * sizeof(ParamUpdate));  // and the row between them
  check_device(sender, step);
}

void test_changed_numbers() {
  Given step;
  Sender sender;
  sender.send(step);
  step.set_scalars_of(1, 7);  // these are among the kernel's arguments
  CHECK(sender.send(step) == 0);
  step.dim(1).strides[kGrad] = 9;
  CHECK(sender.send(step) > 0);
  check_device(sender, step);

  step.set_scalars(300);
  CHECK(sender.send(step) ==
        sender.table->mirror().size());  // a new table, as the old one had no room
  step.set_scalars_of(299, 8);
  const int64_t sent = sender.send(step);
  CHECK(sent > 0 && sender.first >= sender.table->parts().scalars);
  check_device(sender, step);
  CHECK(sender.send(step) == 0);
  step.set_scalars(3);  // few again, and then many again
  CHECK(sender.send(step) == 0);
  step.set_scalars(310);
  sender.send(step);
  check_device(sender, step);
}

void test_changed_counters() {
  Given step;
  step.add_counters();
  Sender sender;
  sender.send(step);
  const TableLayout& parts = sender.table->parts();
  step.groups[1].values.lr = 3;
  CHECK(sender.send(step) > 0);
  CHECK(sender.first >= parts.groups && sender.first < parts.counters);
  step.counters[2].active = false;
  CHECK(sender.send(step) == sizeof(StepCounter));
  for (size_t row = 0; row < step.updates.size(); ++row) {
    const auto index = static_cast<size_t>(sender.partition.rows()[row]);
    const StepCounter& counter = sender.rows_at<StepCounter>(parts.counters)[row];
    CHECK(counter.step == step.counters[index].step &&
          counter.active == step.counters[index].active);
  }
  // The device writes the scalars of a row where the update of that row looks for them.
  for (const Launch& launch : sender.partition.launches())
    for (int64_t row = 0; row < launch.num_rows; ++row)
      CHECK(sender.rows_at<ParamUpdate>(parts.updates)[launch.first_row + row].scalars == row);
  const HyperParamsRef& group = sender.rows_at<HyperParamsRef>(parts.groups)[1];
  CHECK(group.values.lr == 3);
}

// Params without a grad keep their rows: to unfreeze one sends its row and nothing else.
void test_idle_updates() {
  Given step;
  step.updates[2].device = kIdle;  // idle from the start, so nothing is known of it
  Sender sender;
  sender.send(step);
  CHECK(sender.partition.rows().size() == step.updates.size() - 1);
  step.updates[2].device = kOwn;
  CHECK(sender.send(step) == sender.table->mirror().size());
  const std::vector<int64_t> rows = sender.partition.rows();
  for (const uint8_t device : {kIdle, kOwn}) {
    step.updates[2].device = device;
    CHECK(sender.send(step) == sizeof(ParamUpdate));
    CHECK(sender.partition.rows() == rows);
    check_device(sender, step);
    check_partition(sender.partition, step);
  }
  for (ParamUpdate& update : step.updates) update.device = kIdle;
  sender.send(step);
  CHECK(sender.partition.rows() == rows);
  check_device(sender, step);
}

void test_moving_updates() {
  Given step;
  Sender sender;
  const auto moves = [&] {
    CHECK(sender.send(step) == sender.table->mirror().size());  // a new table
    check_partition(sender.partition, step);
    check_device(sender, step);
    CHECK(sender.send(step) == 0);
  };
  moves();
  step.updates[3].numel *= 2;
  moves();
  Given::set_dtypes(step.updates[3], DType::kFloat64);
  moves();
  step.updates[3].rule = kIdOf<Adam>;  // where no other update is in double
  moves();
  step.updates[3].formats.dtypes[kMaster] = DType::kFloat32;
  moves();
  Given::set_dtypes(step.updates[5], DType::kFloat16);
  moves();
  step.updates[1].data[kGrad] = static_cast<char*>(kElsewhere) + 4;  // aligned until now
  moves();
  step.updates[4].layout = 0;                                // dense until now
  CHECK(sender.send(step) < sender.table->mirror().size());  // the rows stay where they are
  check_partition(sender.partition, step);
  check_device(sender, step);
  step.updates[0].device = kOwn + 1;
  moves();
  step.updates[1].device = kCpu;
  moves();
  step.updates[0].device = kOwn;
  moves();
  step.add(kIdOf<Sgd>, DType::kFloat16, 3);
  moves();
  step.updates.erase(step.updates.begin() + 5, step.updates.end());
  moves();
  for (ParamUpdate& update : step.updates) update.device = kCpu;  // none is left on this device
  CHECK(sender.send(step) == sender.table->mirror().size());
  CHECK(sender.partition.rows().empty() && sender.partition.launches().empty());
}

// A step that memory ran out for leaves nothing behind that the next one would take for its own.
void test_partition_without_memory() {
  int failures = 0;
  for (bool fails = true; fails; ++failures) {
    Given step;
    Partition partition;
    partition.update(step.device_step());
    step.add(kIdOf<Sgd>, DType::kFloat16, 3);
    failing_allocation = failures + 1;
    try {
      partition.update(step.device_step());
      fails = false;
    } catch (const std::bad_alloc&) {
      failing_allocation = 0;
      CHECK(partition.update(step.device_step()));
    }
    failing_allocation = 0;
    check_partition(partition, step);
  }
  CHECK(failures > 3);
}

void test_room() {
  Given step;
  Sender sender;
  sender.send(step);
  const TableLayout parts = sender.table->parts();
  CHECK(parts.max_layouts >= 2 && parts.max_dims >= 4 && parts.max_scalars == 0);
  step.add_layouts(static_cast<int>(parts.max_layouts) - 2);
  CHECK(!sender.table->fits(
      step.device_step()));  // there is room for the layouts, but not for their dims
  sender.send(step);
  check_device(sender, step);
  const int64_t max_layouts = sender.table->parts().max_layouts;
  step.add_layouts(static_cast<int>(max_layouts) + 1);
  CHECK(!sender.table->fits(step.device_step()));
  CHECK(sender.send(step) == sender.table->mirror().size());
  check_device(sender, step);

  DeviceStep device_step = step.device_step();
  CHECK(sender.table->fits(device_step));
  device_step.stream = &step;
  CHECK(!sender.table->fits(device_step));
  step.add_counters();
  CHECK(!sender.table->fits(step.device_step()));
  sender.send(step);
  step.groups.resize(1000);
  CHECK(!sender.table->fits(step.device_step()));
  step.counters.clear();
  CHECK(!sender.table->fits(step.device_step()));
}

void check_parts(const Given& step) {
  const DeviceStep device_step = step.device_step();
  Partition partition;
  partition.update(device_step);
  const TableLayout parts = plan_table(device_step, partition);
  const auto rows = static_cast<int64_t>(partition.rows().size());
  // SGD in float and in double, Adam in float.
  const int64_t tables = partition.num_scalars_tables();
  CHECK(tables == (rows == 0 ? 0 : 3));
  using Part = std::pair<int64_t, size_t>;  // offset, bytes
  std::vector<Part> all = {{parts.chunks, partition.chunks().size() * sizeof(ChunkStart)},
                           {parts.dims, parts.max_dims * sizeof(Dim)},
                           {parts.layouts, parts.max_layouts * sizeof(Layout)},
                           {parts.groups, parts.max_groups * sizeof(HyperParamsRef)},
                           {parts.counters, parts.has_counters ? rows * sizeof(StepCounter) : 0},
                           {parts.updates, rows * sizeof(ParamUpdate)},
                           {parts.scalars, tables * parts.max_scalars * sizeof(Scalars)},
                           {parts.mirror_bytes, 0},
                           {parts.computed, parts.has_counters ? rows * sizeof(Scalars) : 0},
                           {parts.bytes, 0}};
  int64_t end = 0;
  for (const auto& [from, bytes] : all) {
    CHECK(from >= end);
    CHECK(from % static_cast<int64_t>(alignof(ParamUpdate)) == 0);
    end = from + static_cast<int64_t>(bytes);
  }
}

void test_parts() {
  Given step;
  check_parts(step);
  step.add_layouts(1000);
  step.set_scalars(1000);
  check_parts(step);
  step.add_counters();
  check_parts(step);
  step = Given();
  step.updates.clear();
  check_parts(step);
}

}  // namespace

void test_host_mirror() {
  test_image_ranges();
  test_empty_image();
}

void test_table() {
  test_unchanged_steps_send_nothing();
  test_changed_pointers();
  test_changed_numbers();
  test_changed_counters();
  test_idle_updates();
  test_moving_updates();
  test_partition_without_memory();
  test_room();
  test_parts();
}
