// plan_grid, whose result is read as the threads of the update kernel read it.
#include "check.h"

#include "cuda/grid.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

using Sizes = std::vector<int64_t>;

// Goes through updates part by part, and checks that none is left out or taken twice.
class Coverage {
 public:
  explicit Coverage(const Sizes& sizes) : sizes_(sizes) {}

  // The next part must begin where the one before it ended.
  void take(int64_t update, int64_t begin, int64_t end) {
    CHECK(update == update_ && begin == element_ && begin <= end);
    CHECK(end - begin <= INT32_MAX);  // threads count in 32 bits
    if (update >= count()) return;
    CHECK(end <= sizes_[static_cast<size_t>(update)]);
    CHECK(begin < end || sizes_[static_cast<size_t>(update)] == 0);
    const bool is_done = end == sizes_[static_cast<size_t>(update)];
    update_ = update + (is_done ? 1 : 0);
    element_ = is_done ? 0 : end;
  }

  bool is_done() const { return update_ == count() && element_ == 0; }
  int64_t count() const { return static_cast<int64_t>(sizes_.size()); }

 private:
  const Sizes& sizes_;
  int64_t update_ = 0, element_ = 0;
};

// A part of one update, for a whole block.
void take_part(Coverage& coverage, const Sizes& sizes, ChunkStart from, ChunkStart to) {
  CHECK(from.element % cuda::kMinChunkElements == 0);
  const bool to_the_end = to.update != from.update;
  coverage.take(from.update, from.element,
                to_the_end ? sizes[static_cast<size_t>(from.update)] : to.element);
  if (to_the_end) CHECK(to.element == 0);
}

// Several whole updates, one for each warp.
void take_updates(Coverage& coverage, const Sizes& sizes, ChunkStart from, ChunkStart to) {
  CHECK(from.element == 0 && to.element == 0);
  CHECK(to.update - from.update <= kBlockWarps);
  for (int64_t update = from.update; update < to.update; ++update) {
    CHECK(sizes[static_cast<size_t>(update)] <= kWarpElements);
    coverage.take(update, 0, sizes[static_cast<size_t>(update)]);
  }
}

// Returns the number of chunks.
int64_t check_grid(const Sizes& sizes) {
  const std::vector<ChunkStart> starts = plan_grid(sizes);
  Coverage coverage(sizes);
  for (size_t chunk = 0; chunk + 1 < starts.size(); ++chunk) {
    const ChunkStart from = starts[chunk], to = starts[chunk + 1];
    const bool is_shared = to.update - from.update <= 1;
    (is_shared ? take_part : take_updates)(coverage, sizes, from, to);
  }
  CHECK(coverage.is_done());
  CHECK(starts.back().update == coverage.count() && starts.back().element == 0);
  const auto count = static_cast<int64_t>(starts.size()) - 1;
  CHECK(count <= cuda::kEnoughChunks + coverage.count());
  return count;
}

void test_boundaries() {
  Sizes around;
  for (const int64_t size : {int64_t{1}, kWarpElements, cuda::kMinChunkElements,
                             2 * cuda::kMinChunkElements, cuda::kMinChunkElements * 7})
    for (const int64_t by : {-1, 0, 1}) around.push_back(size + by);
  for (const int64_t a : around) {
    check_grid({a});
    for (const int64_t b : around) {
      check_grid({a, b});
      check_grid({a, 0, b, b, b, b, b, 0, a});
    }
  }
  check_grid({});
  check_grid(Sizes(9, 0));
}

void test_random_lists() {
  std::mt19937_64 random(1);
  for (int run = 0; run < 500; ++run) {
    Sizes sizes(random() % 40);
    const uint64_t bits = 1 + random() % 36;
    for (int64_t& size : sizes)
      size = static_cast<int64_t>(random() % (uint64_t{1} << (random() % bits + 1)));
    check_grid(sizes);
  }
}

// One tensor of 64 Ki, and ten thousand tiny ones, make enough blocks for every GPU.
void test_many_blocks() {
  CHECK(check_grid({65536}) == 65536 / cuda::kMinChunkElements);
  CHECK(check_grid(Sizes(10000, 64)) == 10000 / kBlockWarps);
  CHECK(check_grid(Sizes(10000, 1)) == 10000 / kBlockWarps);
  CHECK(check_grid(Sizes(1000, cuda::kMinChunkElements)) == 1000);
  CHECK(check_grid(Sizes(1000, cuda::kMinChunkElements + 1)) == 2000);
}

void test_huge() {
  for (const int shift : {31, 32, 40})
    for (const int64_t by : {-1, 0, 1, 4096}) {
      const int64_t size = (int64_t{1} << shift) + by;
      CHECK(check_grid({size}) > cuda::kEnoughChunks / 2);
      check_grid({5, size, 5, 5, size, 700});
    }
}

}  // namespace

void test_grid() {
  test_boundaries();
  test_random_lists();
  test_many_blocks();
  test_huge();
}
