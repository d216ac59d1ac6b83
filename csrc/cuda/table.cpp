#include "cuda/table.h"

#include <algorithm>
#include <cstddef>

#include "cuda/grid.h"

namespace fusedopt::cuda {
namespace {

constexpr int64_t kPartAlignment = 256;

int64_t with_room(int64_t count) {
  int64_t room = 16;
  while (room < count) room *= 2;
  return room;
}

int64_t count_dims(const Share& share) {
  int64_t count = 0;
  for (int64_t i = 0; i < share.num_layouts; ++i) count += share.layouts[i].num_dims;
  return count;
}

// Of a column's table, with room for so many.
int64_t scalars_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(Scalars)) + kPartAlignment - 1) / kPartAlignment *
         kPartAlignment;
}

// Scalars in the types of a column, as bytes. What works of other rules use comes along, without
// meaning.
std::vector<uint8_t> converted(const Share& share, const Column& column) {
  const auto count = static_cast<size_t>(share.num_scalars);
  std::vector<uint8_t> bytes(count * sizeof(Scalars));
  with_types(column, [&](auto rule, auto number) {
    for (size_t i = 0; i < count; ++i) {
      const auto scalars =
          share.scalars[i].template of<decltype(rule)>().template as<decltype(number)>();
      std::memcpy(bytes.data() + i * sizeof(scalars), &scalars, sizeof(scalars));
    }
  });
  return bytes;
}

}  // namespace

bool Arrangement::update(const Share& share) {
  const auto own_device = static_cast<uint8_t>(kFirstGpu + share.gpu);
  bool changed = members_.size() != static_cast<size_t>(share.num_works);
  if (changed) members_.assign(static_cast<size_t>(share.num_works), Member());
  for (size_t w = 0; w < members_.size(); ++w) {
    const Work& work = share.works[w];
    if (work.device == kIdle) continue;  // what is known of it still holds
    const bool is_here = work.device == own_device;
    const Member found = is_here ? Member{true, column_of(work), work.numel} : Member();
    Member& member = members_[w];
    changed = changed || found.is_here != member.is_here || found.numel != member.numel ||
              !(found.column == member.column);
    member = found;
  }
  if (changed) arrange();
  return changed;
}

void Arrangement::arrange() {
  rows_.clear();
  columns_.clear();
  num_scalars_tables_ = 0;
  chunks_.clear();
  leaves_.clear();
  std::vector<Column> found;  // in the order of the works
  for (const Member& member : members_)
    if (member.is_here && std::find(found.begin(), found.end(), member.column) == found.end())
      found.push_back(member.column);
  for (const Column& column : found) {
    std::vector<int64_t> sizes;
    const auto first_row = static_cast<int64_t>(rows_.size());
    for (size_t w = 0; w < members_.size(); ++w) {
      if (!members_[w].is_here || !(members_[w].column == column)) continue;
      rows_.push_back(static_cast<int64_t>(w));
      sizes.push_back(members_[w].numel);
    }
    const std::vector<ChunkStart> chunks = plan_grid(sizes);
    const auto same = std::find_if(columns_.begin(), columns_.end(), [&](const Rows& rows) {
      return rows.column.rule == column.rule &&
             rows.column.formats.in_double() == column.formats.in_double();
    });
    columns_.push_back({column, first_row, static_cast<int64_t>(sizes.size()),
                        static_cast<int64_t>(chunks_.size()),
                        static_cast<int64_t>(chunks.size()) - 1,
                        same != columns_.end() ? same->scalars : num_scalars_tables_++});
    chunks_.insert(chunks_.end(), chunks.begin(), chunks.end());
  }
}

const std::vector<ChunkStart>& Arrangement::find_leaves(const Share& share) {
  std::vector<int64_t> sizes(members_.size(), 0), rows(members_.size());
  for (size_t row = 0; row < rows_.size(); ++row) {
    const auto w = static_cast<size_t>(rows_[row]);
    if (share.works[w].device != kIdle) sizes[w] = members_[w].numel;
    rows[w] = static_cast<int64_t>(row);
  }
  if (!leaves_.empty() && sizes == leaf_sizes_) return leaves_;
  leaves_ = plan_leaves(sizes);
  leaf_sizes_.swap(sizes);
  for (size_t i = 0; i + 1 < leaves_.size(); ++i)
    leaves_[i].work = rows[static_cast<size_t>(leaves_[i].work)];
  return leaves_;
}

int64_t Arrangement::max_leaves() const {
  std::vector<int64_t> sizes;
  for (const Member& member : members_) sizes.push_back(member.numel);
  return static_cast<int64_t>(plan_leaves(sizes).size());
}

bool has_few_scalars(const Share& share) {
  int64_t few = share.num_scalars;
  for (int rule = 0; rule < Rules::kSize; ++rule)
    for (const bool in_double : {false, true})
      with_types(static_cast<RuleId>(rule), in_double, [&](auto known, auto type) {
        few = std::min<int64_t>(few, UpdateArguments<decltype(known), decltype(type)>::kFew);
      });
  return share.clocks == nullptr && share.num_scalars == few;
}

Parts plan_parts(const Share& share, const Arrangement& arrangement) {
  Parts parts = {};
  parts.has_clocks = share.clocks != nullptr;
  parts.has_leaves = share.measures;
  const auto num_leaves = share.measures ? arrangement.max_leaves() : int64_t{0};
  parts.max_layouts = share.num_layouts > 0 ? with_room(share.num_layouts) : 0;
  parts.max_dims = share.num_layouts > 0 ? with_room(count_dims(share)) : 0;
  parts.max_groups = parts.has_clocks ? with_room(share.num_groups) : 0;
  const bool few = parts.has_clocks || has_few_scalars(share);
  parts.max_scalars = few ? 0 : with_room(share.num_scalars);

  int64_t end = 0;
  const auto reserve = [&](int64_t count, int64_t size) {
    const int64_t start = end;
    end = (end + count * size + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
    return start;
  };
  const auto num_rows = static_cast<int64_t>(arrangement.rows().size());
  parts.chunks = reserve(static_cast<int64_t>(arrangement.chunks().size()), sizeof(ChunkStart));
  parts.leaves = reserve(num_leaves, sizeof(ChunkStart));
  parts.dims = reserve(parts.max_dims, sizeof(Dim));
  parts.layouts = reserve(parts.max_layouts, sizeof(Layout));
  parts.groups = reserve(parts.max_groups, sizeof(HyperSource));
  parts.clocks = reserve(parts.has_clocks ? num_rows : 0, sizeof(Clock));
  parts.works = reserve(num_rows, sizeof(Work));
  parts.scalars = reserve(arrangement.num_scalars_tables(), scalars_bytes(parts.max_scalars));
  parts.image_bytes = end;
  parts.computed = reserve(parts.has_clocks ? num_rows : 0, sizeof(Scalars));
  parts.sums = reserve(num_leaves, sizeof(GradSum));
  parts.bytes = end;
  return parts;
}

int64_t Table::scalars_of(const Rows& rows) const {
  return parts_.scalars + rows.scalars * scalars_bytes(parts_.max_scalars);
}

bool Table::fits(const Share& share) const {
  const bool few = share.clocks != nullptr || has_few_scalars(share);
  return share.stream == stream_ && parts_.has_clocks == (share.clocks != nullptr) &&
         parts_.has_leaves >= share.measures && share.num_layouts <= parts_.max_layouts &&
         count_dims(share) <= parts_.max_dims &&
         (share.clocks == nullptr || share.num_groups <= parts_.max_groups) &&
         (few || share.num_scalars <= parts_.max_scalars);
}

void Table::fill(const Share& share, Arrangement& arrangement) {
  const auto put_starts = [&](int64_t offset, const std::vector<ChunkStart>& starts) {
    image_.put(offset, starts.data(), static_cast<int64_t>(starts.size() * sizeof(ChunkStart)));
  };
  if (image_.bytes_changed() == image_.size()) {  // new: these stay
    put_starts(parts_.chunks, arrangement.chunks());
  }
  if (share.measures) put_starts(parts_.leaves, arrangement.find_leaves(share));
  fill_layouts(share);
  fill_works(share, arrangement);
  if (share.clocks != nullptr)
    for (int64_t g = 0; g < share.num_groups; ++g)
      image_.put(parts_.groups + g * static_cast<int64_t>(sizeof(HyperSource)), &share.groups[g],
                 sizeof(HyperSource));
  int64_t done = 0;
  if (share.clocks == nullptr && !has_few_scalars(share))
    for (const Rows& rows : arrangement.columns()) {
      if (rows.scalars < done) continue;
      const std::vector<uint8_t> bytes = converted(share, rows.column);
      image_.put(scalars_of(rows), bytes.data(), static_cast<int64_t>(bytes.size()));
      ++done;
    }
}

void Table::fill_layouts(const Share& share) {
  int64_t dim = parts_.dims;
  for (int64_t i = 0; i < share.num_layouts; ++i) {
    const Layout& layout = share.layouts[i];
    const Layout entry = {reinterpret_cast<const Dim*>(at(dim)), layout.num_dims};
    const int64_t bytes = layout.num_dims * static_cast<int64_t>(sizeof(Dim));
    image_.put(dim, layout.dims, bytes);
    // Member by member: what lies between them is not the same from one step to the next.
    const int64_t to = parts_.layouts + i * static_cast<int64_t>(sizeof(Layout));
    image_.put(to + static_cast<int64_t>(offsetof(Layout, dims)), &entry.dims, sizeof(entry.dims));
    image_.put(to + static_cast<int64_t>(offsetof(Layout, num_dims)), &entry.num_dims,
               sizeof(entry.num_dims));
    dim += bytes;
  }
}

void Table::fill_works(const Share& share, const Arrangement& arrangement) {
  for (const Rows& rows : arrangement.columns())
    for (int64_t row = rows.first_row; row < rows.first_row + rows.num_rows; ++row) {
      const int64_t w = arrangement.rows()[static_cast<size_t>(row)];
      Work work = share.works[w];
      if (share.clocks != nullptr) {
        work.scalars = static_cast<int32_t>(row - rows.first_row);
        image_.put(parts_.clocks + row * static_cast<int64_t>(sizeof(Clock)), &share.clocks[w],
                   sizeof(Clock));
      }
      image_.put(parts_.works + row * static_cast<int64_t>(sizeof(Work)), &work, sizeof(Work));
    }
}

}  // namespace fusedopt::cuda
