// pool_blocks, attention, skip_mask, block_mass and tile_max: from parameters to work items for the kernels. (Scores:
// select.cpp.)
#include <algorithm>
#include <cstring>
#include <limits>

#include "bsfa/cpu.h"
#include "schedule.h"

namespace bsfa::cpu {

void pool_blocks(const PoolParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const int64_t count = int64_t{params.batch} * params.max_blocks;
  for_each_item(executor, count, k.pool_scratch(params), [&](int64_t index, float* scratch) {
    const int32_t sequence = static_cast<int32_t>(index / params.max_blocks);
    const int32_t block = static_cast<int32_t>(index % params.max_blocks);
    k.pool_block(params, sequence, seqlen_k(params.kv, sequence), block, scratch);
  });
}

void attention(const AttentionParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const Schedule schedule = make_schedule(params.problem, params.words != nullptr ? params.num_rows : -1, params.words,
                                          params.mask_heads, params.num_words);
  const bool skips = params.skip.form != SkipForm::kNone;
  const auto tile = skips ? k.skip_tile : k.attention_tile;
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()),
                skips ? k.skip_scratch(params) : k.attention_scratch(params),
                [&](int64_t index, float* scratch) { tile(params, schedule.items[index], scratch); });
}

void skip_mask(const SkipMaskParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const AttentionParams& a = params.attention;
  const Schedule schedule = make_schedule(a.problem, a.num_rows, a.words, a.mask_heads, a.num_words);
  const int64_t heads = a.problem.num_q_heads;
  const int64_t unused = (a.num_rows - schedule.used_rows) * heads;
  std::memset(params.words + schedule.used_rows * heads * params.num_words, 0,
              sizeof(int32_t) * unused * params.num_words);
  std::memset(params.counts + schedule.used_rows * heads, 0, sizeof(int32_t) * unused);
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()), k.skip_mask_scratch(params),
                [&](int64_t index, float* scratch) { k.skip_mask_tile(params, schedule.items[index], scratch); });
}

void block_mass(const BlockMassParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const Schedule schedule = make_schedule(params.problem, params.num_rows);
  const int64_t row_size = int64_t{params.problem.num_q_heads} * params.max_blocks;
  std::fill(params.mass + schedule.used_rows * row_size, params.mass + params.num_rows * row_size, 0.0f);
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()), k.block_mass_scratch(params),
                [&](int64_t index, float* scratch) { k.block_mass_tile(params, schedule.items[index], scratch); });
}

void tile_max(const TileMaxParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const Schedule schedule = make_schedule(params.problem, params.num_rows);
  const int64_t row_size = int64_t{params.problem.num_q_heads} * params.max_blocks;
  std::fill(params.maxima + schedule.used_rows * row_size, params.maxima + params.num_rows * row_size,
            -std::numeric_limits<float>::infinity());
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()), k.tile_max_scratch(params),
                [&](int64_t index, float* scratch) { k.tile_max_tile(params, schedule.items[index], scratch); });
}

}  // namespace bsfa::cpu
