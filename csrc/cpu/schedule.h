// How an operation becomes work items, and how workers take them.
//
// Items are sorted by weight, heaviest first, and handed out through one atomic counter. Each item owns what it writes,
// so results depend neither on the number of workers nor on timing.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "bsfa/cpu.h"
#include "kernels.h"

namespace bsfa::cpu {

struct Schedule {
  std::vector<TileItem> items;
  int64_t used_rows = 0;  // rows of masks and scores that belong to a tile
};

// One item per (sequence, query tile, group of heads that is computed together). The weight is the number of visible
// (head, block) pairs, or of kept ones if `words` is given. `heads`: how many of a group's heads an item takes; 0:
// heads_per_item(problem). Throws std::invalid_argument if num_rows >= 0 is too small.
Schedule make_schedule(const Problem& problem, int64_t num_rows, const int32_t* words = nullptr, int32_t mask_heads = 0,
                       int32_t num_words = 0, int32_t heads = 0);

// Calls body(index, scratch) for index = 0 .. count - 1, in parallel. Every worker has its own scratch of
// `scratch_floats` zeroed floats, 64-byte aligned.
void for_each_item(const Executor& executor, int64_t count, int64_t scratch_floats,
                   const std::function<void(int64_t index, float* scratch)>& body);

}  // namespace bsfa::cpu
