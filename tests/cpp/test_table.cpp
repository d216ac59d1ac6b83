// What the driver keeps on a device and how much of it a step sends.
#include "check.h"
#include "device_memory.h"

#include "cuda/image.h"
#include "cuda/table.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

bool changes(const Image& image, int64_t first, int64_t bytes) {
  return image.bytes_changed() == bytes && (bytes == 0 || image.first_change() == first);
}

void test_image_ranges() {
  Image image(64);
  CHECK(changes(image, 0, 64));  // a new block of memory has nothing yet
  const uint8_t bytes[] = {1, 2, 3, 4};
  image.put(8, bytes, 4);
  CHECK(changes(image, 0, 64));
  image.is_sent();
  CHECK(changes(image, 0, 0));
  image.put(8, bytes, 4);  // as it is already
  image.put(64, bytes, 0);
  CHECK(changes(image, 0, 0));
  image.put(40, bytes, 4);
  CHECK(changes(image, 40, 4));
  CHECK(std::memcmp(image.changes(), bytes, 4) == 0);
  image.put(60, bytes, 4);
  image.put(20, bytes, 2);
  CHECK(changes(image, 20, 44));
  CHECK(std::memcmp(image.changes(), bytes, 2) == 0);
  image.is_sent();
  image.put(0, bytes, 4);
  CHECK(changes(image, 0, 4));
}

void test_empty_image() {
  Image image(0);
  CHECK(image.size() == 0 && image.bytes_changed() == 0);
  image.put(0, nullptr, 0);
  image.is_sent();
  CHECK(image.bytes_changed() == 0);
}

constexpr int kGpu = 1;
void* const kElsewhere = reinterpret_cast<void*>(uintptr_t{1} << 20);
constexpr auto kOwn = static_cast<uint8_t>(kFirstGpu + kGpu);

// A share of four columns: SGD in bfloat16, float32 and float64, and Adam in float32, where one
// work is strided. Entry i of the scalars is for rule i % 2.
class Given {
 public:
  Given() : scalars_(3), dims_({{5, {2, 1}}, {7, {20, 5}}}) {
    for (int i = 0; i < 12; ++i)
      add(i < 5   ? kIdOf<Sgd>
          : i < 8 ? kIdOf<Adam>
                  : static_cast<RuleId>(i % 2),
          i % 4 == 0 ? DType::kBFloat16 : DType::kFloat32, 10 + 100 * i);
    for (Work& work : works)
      if (work.rule == kIdOf<Sgd> && &work - works.data() > 7) set_dtypes(work, DType::kFloat64);
    add_layouts(2);
    works[11].layout = 1;
    for (size_t i = 0; i < scalars_.size(); ++i) set_scalars_of(i, static_cast<double>(i));
  }

  void add(RuleId rule, DType dtype, int64_t numel) {
    Work work = {};
    for (int k = 0; k < 2; ++k)
      work.data[k] = reinterpret_cast<void*>(uintptr_t{4096} * (2 * works.size() + 7 + k));
    set_dtypes(work, dtype);
    work.numel = numel;
    work.layout = kDense;
    work.rule = rule;
    work.scalars = rule;
    work.device = kOwn;
    works.push_back(work);
  }

  static void set_dtypes(Work& work, DType dtype) {
    for (int k = 0; k < 2; ++k) work.formats.dtypes[k] = dtype;
  }

  void add_layouts(int count) {
    layouts_.insert(layouts_.end(), static_cast<size_t>(count), Layout{dims_.data(), 2});
  }

  void set_scalars(int64_t count) { scalars_.resize(static_cast<size_t>(count)); }
  // Scalars that are recognised by this number.
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

  void add_clocks() {
    groups.resize(2);
    for (size_t i = 0; i < works.size(); ++i)
      clocks.push_back({reinterpret_cast<void*>(64 + 8 * i), static_cast<int32_t>(i % 2),
                        DType::kFloat32, true, false, false});
  }

  Share share() const {
    Share share = {};
    share.gpu = kGpu;
    share.works = works.data();
    share.num_works = static_cast<int64_t>(works.size());
    share.layouts = layouts_.data();
    share.num_layouts = static_cast<int64_t>(layouts_.size());
    share.scalars = scalars_.data();
    share.num_scalars = static_cast<int64_t>(scalars_.size());
    share.clocks = clocks.empty() ? nullptr : clocks.data();
    share.groups = groups.data();
    share.num_groups = static_cast<int64_t>(groups.size());
    return share;
  }

  std::vector<Work> works;
  std::vector<Clock> clocks;
  std::vector<HyperSource> groups;

 private:
  std::vector<Scalars> scalars_;
  std::vector<Dim> dims_;
  std::vector<Layout> layouts_;
};

// A table and what the driver does with it.
struct Sender {
  Arrangement arrangement;
  std::unique_ptr<Table> table;

  // Returns the number of bytes that this step sends.
  int64_t send(const Given& step) {
    const Share share = step.share();
    if (arrangement.update(share) || !table || !table->fits(share)) {
      const Parts parts = plan_parts(share, arrangement);
      table = std::make_unique<Table>(parts, device_memory(parts.bytes), share.stream);
    }
    table->fill(share, arrangement);
    const int64_t bytes = first_bytes();
    table->image().is_sent();
    return bytes;
  }

  template <class Row>
  const Row* rows_at(int64_t offset) const {
    return reinterpret_cast<const Row*>(table->at(offset));
  }

  int64_t first = 0;  // of what the last step has sent

 private:
  int64_t first_bytes() {
    const Image& image = table->image();
    first = image.first_change();
    std::memcpy(table->at(first), image.changes(), static_cast<size_t>(image.bytes_changed()));
    return image.bytes_changed();
  }
};

// Number of a work's row on the device.
int64_t row_of(const Sender& sender, int64_t work) {
  const auto& rows = sender.arrangement.rows();
  return std::find(rows.begin(), rows.end(), work) - rows.begin();
}

// A column's table of the scalars, where those of its own rule are of use.
template <class Rule, class T>
void check_scalars(const StepScalars<Rule, T>* found, const Share& share) {
  for (int64_t i = kIdOf<Rule>; i < share.num_scalars; i += 2) {
    const auto expected = share.scalars[i].of<Rule>().template as<T>();
    CHECK(std::memcmp(&found[i], &expected, sizeof(expected)) == 0);
  }
}

// All that kernels read is as the share has it.
void check_device(const Sender& sender, const Given& step) {
  const Parts& parts = sender.table->parts();
  const Share share = step.share();
  for (size_t row = 0; row < sender.arrangement.rows().size(); ++row) {
    const auto w = static_cast<size_t>(sender.arrangement.rows()[row]);
    Work expected = step.works[w];
    if (share.clocks != nullptr) expected.scalars = -1;
    Work found = sender.rows_at<Work>(parts.works)[row];
    if (share.clocks != nullptr) found.scalars = -1;
    CHECK(std::memcmp(&found, &expected, sizeof(Work)) == 0);
  }
  for (int64_t i = 0; i < share.num_layouts; ++i) {
    const Layout& layout = sender.rows_at<Layout>(parts.layouts)[i];
    const Layout& expected = share.layouts[i];
    CHECK(layout.num_dims == expected.num_dims && layout.dims != expected.dims);
    CHECK(std::equal(layout.dims, layout.dims + layout.num_dims, expected.dims));
  }
  if (share.clocks == nullptr && !has_few_scalars(share))
    for (const Rows& rows : sender.arrangement.columns())
      with_types(rows.column, [&](auto rule, auto number) {
        using Rule = decltype(rule);
        using T = decltype(number);
        check_scalars<Rule, T>(sender.rows_at<StepScalars<Rule, T>>(sender.table->scalars_of(rows)),
                               share);
      });
  const auto& chunks = sender.arrangement.chunks();
  CHECK(std::memcmp(sender.table->at(parts.chunks), chunks.data(),
                    chunks.size() * sizeof(ChunkStart)) == 0);
}

// Rows of every column are neighbours, and each work of the device is in one.
void check_arrangement(const Arrangement& arrangement, const Given& step) {
  int64_t row = 0, chunk = 0;
  for (const Rows& column : arrangement.columns()) {
    CHECK(column.first_row == row && column.first_chunk == chunk && column.num_rows > 0);
    CHECK(arrangement.chunks()[static_cast<size_t>(chunk + column.num_chunks)].work ==
          column.num_rows);
    for (; row < column.first_row + column.num_rows; ++row) {
      const Work& work =
          step.works[static_cast<size_t>(arrangement.rows()[static_cast<size_t>(row)])];
      if (work.device == kIdle) continue;
      CHECK(work.device == kOwn && column_of(work) == column.column);
    }
    chunk += column.num_chunks + 1;
  }
  CHECK(row == static_cast<int64_t>(arrangement.rows().size()));
  CHECK(chunk == static_cast<int64_t>(arrangement.chunks().size()));
  for (size_t w = 0; w < step.works.size(); ++w)
    CHECK(step.works[w].device != kOwn ||
          std::count(arrangement.rows().begin(), arrangement.rows().end(),
                     static_cast<int64_t>(w)) == 1);
}

void test_unchanged_steps_send_nothing() {
  Given step;
  for (const bool many : {false, true}) {
    if (many) step.set_scalars(300);
    Sender sender;
    CHECK(sender.send(step) == sender.table->image().size());
    check_device(sender, step);
    check_arrangement(sender.arrangement, step);
    const Table* const table = sender.table.get();
    CHECK(sender.send(step) == 0 && sender.send(Given(step)) == 0);
    CHECK(sender.table.get() == table);
  }
  step.add_clocks();
  Sender sender;
  sender.send(step);
  check_device(sender, step);
  CHECK(sender.send(step) == 0);
}

// One changed pointer sends one row.
void test_changed_pointers() {
  Given step;
  Sender sender;
  sender.send(step);
  for (const int64_t w : {0, 4, 5, 11}) {
    step.works[static_cast<size_t>(w)].data[kGrad] = kElsewhere;
    CHECK(sender.send(step) == sizeof(Work));
    CHECK(sender.first ==
          sender.table->parts().works + row_of(sender, w) * static_cast<int64_t>(sizeof(Work)));
    check_device(sender, step);
  }
  step.works[1].data[kParam] = step.works[3].data[kParam] = kElsewhere;
  CHECK(sender.send(step) == 3 * sizeof(Work));  // and what lies between them
  check_device(sender, step);
}

void test_changed_numbers() {
  Given step;
  Sender sender;
  sender.send(step);
  step.set_scalars_of(1, 7);  // travels with the kernel's arguments
  CHECK(sender.send(step) == 0);
  step.dim(1).strides[kGrad] = 9;
  CHECK(sender.send(step) > 0);
  check_device(sender, step);

  step.set_scalars(300);
  CHECK(sender.send(step) == sender.table->image().size());  // had no room
  step.set_scalars_of(299, 8);
  const int64_t sent = sender.send(step);
  CHECK(sent > 0 && sender.first >= sender.table->parts().scalars);
  check_device(sender, step);
  CHECK(sender.send(step) == 0);
  step.set_scalars(3);  // few again, and many again
  CHECK(sender.send(step) == 0);
  step.set_scalars(310);
  sender.send(step);
  check_device(sender, step);
}

void test_changed_clocks() {
  Given step;
  step.add_clocks();
  Sender sender;
  sender.send(step);
  const Parts& parts = sender.table->parts();
  step.groups[1].values.lr = 3;
  CHECK(sender.send(step) > 0);
  CHECK(sender.first >= parts.groups && sender.first < parts.clocks);
  step.clocks[2].active = false;
  CHECK(sender.send(step) == sizeof(Clock));
  for (size_t row = 0; row < step.works.size(); ++row) {
    const auto w = static_cast<size_t>(sender.arrangement.rows()[row]);
    const Clock& clock = sender.rows_at<Clock>(parts.clocks)[row];
    CHECK(clock.step == step.clocks[w].step && clock.active == step.clocks[w].active);
  }
  // The device writes row r's scalars where work r looks for them.
  for (const Rows& column : sender.arrangement.columns())
    for (int64_t row = 0; row < column.num_rows; ++row)
      CHECK(sender.rows_at<Work>(parts.works)[column.first_row + row].scalars == row);
  const HyperSource& group = sender.rows_at<HyperSource>(parts.groups)[1];
  CHECK(group.values.lr == 3);
}

// Params without a grad stay where they are: unfreezing one sends its row and nothing else.
void test_idle_works() {
  Given step;
  step.works[2].device = kIdle;  // from the beginning: not known yet
  Sender sender;
  sender.send(step);
  CHECK(sender.arrangement.rows().size() == step.works.size() - 1);
  step.works[2].device = kOwn;
  CHECK(sender.send(step) == sender.table->image().size());
  const std::vector<int64_t> rows = sender.arrangement.rows();
  for (const uint8_t device : {kIdle, kOwn}) {
    step.works[2].device = device;
    CHECK(sender.send(step) == sizeof(Work));
    CHECK(sender.arrangement.rows() == rows);
    check_device(sender, step);
    check_arrangement(sender.arrangement, step);
  }
  for (Work& work : step.works) work.device = kIdle;
  sender.send(step);
  CHECK(sender.arrangement.rows() == rows);
  check_device(sender, step);
}

void test_moving_works() {
  Given step;
  Sender sender;
  const auto moves = [&] {
    CHECK(sender.send(step) == sender.table->image().size());  // a new table
    check_arrangement(sender.arrangement, step);
    check_device(sender, step);
    CHECK(sender.send(step) == 0);
  };
  moves();
  step.works[3].numel *= 2;
  moves();
  Given::set_dtypes(step.works[3], DType::kFloat64);
  moves();
  step.works[3].rule = kIdOf<Adam>;  // where nothing was in double
  moves();
  step.works[3].formats.dtypes[kMaster] = DType::kFloat32;
  moves();
  Given::set_dtypes(step.works[5], DType::kFloat16);
  moves();
  step.works[1].data[kGrad] = static_cast<char*>(kElsewhere) + 4;  // aligned until now
  moves();
  step.works[4].layout = 0;                                 // dense until now
  CHECK(sender.send(step) < sender.table->image().size());  // all of them stay where they are
  check_arrangement(sender.arrangement, step);
  check_device(sender, step);
  step.works[0].device = kOwn + 1;
  moves();
  step.works[1].device = kCpu;
  moves();
  step.works[0].device = kOwn;
  moves();
  step.add(kIdOf<Sgd>, DType::kFloat16, 3);
  moves();
  step.works.erase(step.works.begin() + 5, step.works.end());
  moves();
  for (Work& work : step.works) work.device = kCpu;  // nothing is left here
  CHECK(sender.send(step) == sender.table->image().size());
  CHECK(sender.arrangement.rows().empty() && sender.arrangement.columns().empty());
}

void test_room() {
  Given step;
  Sender sender;
  sender.send(step);
  const Parts parts = sender.table->parts();
  CHECK(parts.max_layouts >= 2 && parts.max_dims >= 4 && parts.max_scalars == 0);
  step.add_layouts(static_cast<int>(parts.max_layouts) - 2);
  CHECK(!sender.table->fits(step.share()));  // the layouts would, their dims do not
  sender.send(step);
  check_device(sender, step);
  const int64_t max_layouts = sender.table->parts().max_layouts;
  step.add_layouts(static_cast<int>(max_layouts) + 1);
  CHECK(!sender.table->fits(step.share()));
  CHECK(sender.send(step) == sender.table->image().size());
  check_device(sender, step);

  Share share = step.share();
  CHECK(sender.table->fits(share));
  share.stream = &step;
  CHECK(!sender.table->fits(share));
  step.add_clocks();
  CHECK(!sender.table->fits(step.share()));
  sender.send(step);
  step.groups.resize(1000);
  CHECK(!sender.table->fits(step.share()));
  step.clocks.clear();
  CHECK(!sender.table->fits(step.share()));
}

void check_parts(const Given& step) {
  const Share share = step.share();
  Arrangement arrangement;
  arrangement.update(share);
  const Parts parts = plan_parts(share, arrangement);
  const auto rows = static_cast<int64_t>(arrangement.rows().size());
  // SGD in float and in double, Adam in float.
  const int64_t tables = arrangement.num_scalars_tables();
  CHECK(tables == (rows == 0 ? 0 : 3));
  using Part = std::pair<int64_t, size_t>;  // from, bytes
  std::vector<Part> all = {{parts.chunks, arrangement.chunks().size() * sizeof(ChunkStart)},
                           {parts.dims, parts.max_dims * sizeof(Dim)},
                           {parts.layouts, parts.max_layouts * sizeof(Layout)},
                           {parts.groups, parts.max_groups * sizeof(HyperSource)},
                           {parts.clocks, parts.has_clocks ? rows * sizeof(Clock) : 0},
                           {parts.works, rows * sizeof(Work)},
                           {parts.scalars, tables * parts.max_scalars * sizeof(Scalars)},
                           {parts.image_bytes, 0},
                           {parts.computed, parts.has_clocks ? rows * sizeof(Scalars) : 0},
                           {parts.bytes, 0}};
  int64_t end = 0;
  for (const auto& [from, bytes] : all) {
    CHECK(from >= end);
    CHECK(from % static_cast<int64_t>(alignof(Work)) == 0);
    end = from + static_cast<int64_t>(bytes);
  }
}

void test_parts() {
  Given step;
  check_parts(step);
  step.add_layouts(1000);
  step.set_scalars(1000);
  check_parts(step);
  step.add_clocks();
  check_parts(step);
  step = Given();
  step.works.clear();
  check_parts(step);
}

}  // namespace

void test_image() {
  test_image_ranges();
  test_empty_image();
}

void test_table() {
  test_unchanged_steps_send_nothing();
  test_changed_pointers();
  test_changed_numbers();
  test_changed_clocks();
  test_idle_works();
  test_moving_works();
  test_room();
  test_parts();
}
