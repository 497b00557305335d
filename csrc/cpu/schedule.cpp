#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace bsfa::cpu {
namespace {

int64_t kept_blocks(const int32_t* words, int32_t visible) {
  const BlockRange seen{0, visible};
  int64_t kept = 0;
  for (int32_t w = 0; w * 32 < visible; ++w) {
    kept += __builtin_popcount(static_cast<uint32_t>(words[w]) & seen.bits_of_word(w));
  }
  return kept;
}

}  // namespace

Schedule make_schedule(const Problem& problem, int64_t num_rows, const int32_t* words, int32_t mask_heads,
                       int32_t num_words, int32_t heads) {
  Schedule schedule;
  const int32_t group = problem.num_q_heads / problem.num_kv_heads;
  const int32_t step = heads > 0 ? heads : heads_per_item(problem);
  for (int32_t b = 0; b < problem.batch; ++b) {
    TileItem item;
    item.sequence = b;
    item.geometry = sequence_geometry(problem, b);
    const int32_t tiles = item.geometry.num_tiles();
    if (num_rows >= 0 && schedule.used_rows + tiles > num_rows) {
      throw std::invalid_argument("bsfa: num_rows = " + std::to_string(num_rows) + " is less than the query tiles");
    }
    for (item.tile = 0; item.tile < tiles; ++item.tile) {
      item.mask_row = schedule.used_rows + item.tile;
      const int32_t visible = item.geometry.visible_blocks(item.tile);
      for (item.kv_head = 0; item.kv_head < problem.num_kv_heads; ++item.kv_head) {
        for (int32_t first = 0; first < group; first += step) {
          item.head_begin = item.kv_head * group + first;
          item.head_count = std::min(step, group - first);
          item.weight = int64_t{visible} * item.head_count;
          if (words != nullptr) {
            const bool per_head = mask_heads == problem.num_q_heads;
            const int32_t head = per_head ? item.head_begin : mask_heads == problem.num_kv_heads ? item.kv_head : 0;
            const int32_t* row = words + (item.mask_row * mask_heads + head) * num_words;
            item.weight = 0;
            for (int32_t h = 0; h < item.head_count; ++h) {
              item.weight += kept_blocks(row + (per_head ? int64_t{h} * num_words : 0), visible);
            }
          }
          schedule.items.push_back(item);
        }
      }
    }
    schedule.used_rows += tiles;
  }
  std::stable_sort(schedule.items.begin(), schedule.items.end(),
                   [](const TileItem& a, const TileItem& b) { return a.weight > b.weight; });
  return schedule;
}

void for_each_item(const Executor& executor, int64_t count, int64_t scratch_floats,
                   const std::function<void(int64_t, float*)>& body) {
  constexpr int64_t kAlignment = 64;
  std::atomic<int64_t> next{0};
  executor.run([&](int) {
    int64_t index = next.fetch_add(1, std::memory_order_relaxed);
    if (index >= count) return;
    std::vector<float> buffer(scratch_floats + kAlignment / 4);
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    float* scratch = buffer.data() + (kAlignment - address % kAlignment) % kAlignment / 4;
    for (; index < count; index = next.fetch_add(1, std::memory_order_relaxed)) body(index, scratch);
  });
}

}  // namespace bsfa::cpu
