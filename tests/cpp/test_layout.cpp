// The pure functions plan_chunks, coalesce, is_dense and extent do what they promise.
#include "check.h"

#include "core/chunks.h"
#include "core/layout.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <vector>

using namespace fusedopt;

namespace {

// The dim of operands whose elements are consecutive.
Dim consecutive(int64_t size) {
  Dim dim = {size, {}};
  for (int64_t& stride : dim.strides) stride = 1;
  return dim;
}

// Marks what the chunks cover, going through them as a driver does.
void check_covers_once(const std::vector<int64_t>& sizes, int64_t chunk_elements) {
  const std::vector<ChunkStart> starts = plan_chunks(sizes, chunk_elements);
  std::vector<std::vector<int>> visits;
  for (const int64_t size : sizes) visits.emplace_back(static_cast<size_t>(size), 0);
  CHECK(starts.back().update == static_cast<int64_t>(sizes.size()) && starts.back().element == 0);
  for (size_t chunk = 0; chunk + 1 < starts.size(); ++chunk) {
    const ChunkStart from = starts[chunk], to = starts[chunk + 1];
    int64_t cost = 0;
    for (int64_t update = from.update; update <= to.update && update < starts.back().update;
         ++update) {
      const auto w = static_cast<size_t>(update);
      const int64_t begin = update == from.update ? from.element : 0;
      const int64_t end = update == to.update ? to.element : sizes[w];
      for (int64_t i = begin; i < end; ++i) ++visits[w][static_cast<size_t>(i)];
      if (update < to.update || end > begin) cost += end - begin + kTensorCost;
    }
    CHECK(from.element % kChunkAlignment == 0);
    CHECK(cost <= chunk_elements + kTensorCost + kChunkAlignment);  // chunks of about equal cost
  }
  for (const auto& update : visits)
    CHECK(std::all_of(update.begin(), update.end(), [](int count) { return count == 1; }));
}

void test_chunk_lists() {
  const std::vector<std::vector<int64_t>> lists = {
      {},
      {0},
      {1},
      {0, 0, 0},
      {kMinChunkElements},
      {kMinChunkElements - kTensorCost},
      {kMinChunkElements - kTensorCost + 1},
      {3 * kMinChunkElements + 5, 0},
      {5, 0, 100000, 1, 0, 0, 64, 63, 65, 40000, 0},  // ends in an empty tensor
      std::vector<int64_t>(500, 64),
      std::vector<int64_t>(100, kMinChunkElements),
  };
  for (const auto& sizes : lists)
    for (const int64_t chunk_elements : {int64_t{1}, int64_t{64}, int64_t{1000}, kMinChunkElements})
      check_covers_once(sizes, chunk_elements);
  std::mt19937 random(1);
  for (int run = 0; run < 100; ++run) {
    std::vector<int64_t> sizes(random() % 30);
    for (int64_t& size : sizes) size = random() % (random() % 2 == 0 ? 100 : 40000);
    check_covers_once(sizes, 1 + random() % 20000);
  }
}

void test_huge_tensor() {  // element counts beyond 32 bits
  const int64_t size = int64_t{5} << 31;
  const std::vector<ChunkStart> starts = plan_chunks({size}, int64_t{1} << 28);
  CHECK(starts.size() > 40 && starts[starts.size() - 2].element > int64_t{1} << 33);
  for (size_t chunk = 0; chunk + 2 < starts.size(); ++chunk)
    CHECK(starts[chunk].element < starts[chunk + 1].element);
}

using Offsets = std::array<int64_t, kIndex + 1>;

// The offsets of each element in all operands, and its number, as a sorted list.
std::vector<Offsets> elements(const Dims& dims) {
  std::vector<Offsets> all = {Offsets{}};
  for (const Dim& dim : dims) {
    std::vector<Offsets> next;
    for (const Offsets& at : all)
      for (int64_t i = 0; i < dim.size; ++i) {
        Offsets moved = at;
        for (size_t k = 0; k <= kIndex; ++k) moved[k] += i * dim.strides[k];
        next.push_back(moved);
      }
    all.swap(next);
  }
  std::sort(all.begin(), all.end());
  return all;
}

Dims coalesced(Dims dims) {
  coalesce(dims);
  return dims;
}

void test_coalesce() {
  const Dims contiguous = {{2, {12, 12}}, {3, {4, 4}}, {4, {1, 1}}};
  CHECK((coalesced(contiguous) == Dims{{24, {1, 1}}}));
  const Dims transposed = {{3, {1, 1}}, {5, {3, 3}}};
  CHECK((coalesced(transposed) == Dims{{15, {1, 1}}}));
  const Dims grad_transposed = {{3, {5, 1}}, {5, {1, 3}}};
  CHECK((coalesced(grad_transposed) == grad_transposed));
  const Dims grad_expanded = {{3, {5, 0}}, {5, {1, 1}}};
  CHECK((coalesced(grad_expanded) == grad_expanded));
  const Dims sliced = {{6, {25, 10}}, {10, {1, 1}}};
  CHECK((coalesced(sliced) == sliced));
  const Dims size_one = {{1, {999, 7}}, {12, {5, 5}}, {1, {777, 3}}};
  CHECK((coalesced(size_one) == Dims{{12, {5, 5}}}));
  CHECK(coalesced({}).empty() && coalesced({{1, {3, 3}}}).empty());
}

void test_coalesce_keeps_partners() {
  std::mt19937 random(2);
  for (int run = 0; run < 300; ++run) {
    Dims dims(random() % 5);
    for (Dim& dim : dims) {
      dim = {1 + static_cast<int64_t>(random() % 4), {}};
      for (int64_t& stride : dim.strides) stride = random() % 7;
    }
    CHECK(elements(coalesced(dims)) == elements(dims));
  }
}

void test_descriptions() {
  CHECK(is_dense({}, 0b11111));
  CHECK(is_dense({consecutive(9)}, (1u << kMaxOperands) - 1));
  const Dims one_apart = {{9, {1, 1, 1, 2, 1, 0}}};
  CHECK(is_dense(one_apart, 0b10111));
  CHECK(!is_dense(one_apart, 0b01000) && !is_dense(one_apart, 0b11111));
  CHECK(!is_dense(one_apart, 0b100111));
  CHECK(!is_dense({{3, {3, 3}}, {3, {1, 1}}}, 0b11));
  // Elements that are updated as one run also have consecutive numbers.
  Dim numbered_apart = consecutive(9);
  numbered_apart.strides[kIndex] = 2;
  CHECK(!is_dense({numbered_apart}, 0b11));
  CHECK(extent({}, kParam) == 1);
  CHECK(extent({{3, {10, 0}}, {4, {2, 1}}}, kParam) == 27);
  CHECK(extent({{3, {10, 0}}, {4, {2, 1}}}, kGrad) == 4);
}

}  // namespace

void test_chunks() {
  test_chunk_lists();
  test_huge_tensor();
}

void test_layout() {
  test_coalesce();
  test_coalesce_keeps_partners();
  test_descriptions();
}
