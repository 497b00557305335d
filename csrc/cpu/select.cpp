// score_blocks and select_blocks: what is done with the scores that the kernels make for one query tile.
//
//   kRelativeMax     score as it comes (score.h); kept iff score > 0 and score >= threshold, or threshold < 0
//   kPooled  softmax over the visible blocks in float64, ranked by descending logit (ties: lower block first);
//                    score = mass of the blocks ranked before, summed in rank order; kept iff score < threshold, and
//                    the best always
//
// Also kept: sink blocks, the window around the tile's own positions, everything in the last tiles of the prompt, the
// best min_blocks by score (where NaN ranks last). Blocks whose score is NaN are kept.
// Memory per worker: the scores of one tile, [heads of the item, max_blocks], and one row of indices.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "bsfa/cpu.h"
#include "bsfa/keep.h"
#include "schedule.h"

namespace bsfa::cpu {
namespace {

struct Ranking {
  std::vector<int32_t> order;
  std::vector<float> keys;
  std::vector<double> weights;
};

// order = block indices by descending key, ties: lower first; only the first `top` places are in order.
void rank(const float* scores, int32_t count, int32_t top, Ranking* ranking) {
  ranking->order.resize(count);
  ranking->keys.resize(count);
  for (int32_t j = 0; j < count; ++j) {
    const float key = scores[j];
    ranking->order[j] = j;
    ranking->keys[j] = std::isnan(key) ? -std::numeric_limits<float>::infinity() : key;
  }
  const float* keys = ranking->keys.data();
  const auto better = [keys](int32_t a, int32_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); };
  if (top < count) {
    std::partial_sort(ranking->order.begin(), ranking->order.begin() + top, ranking->order.end(), better);
  } else {
    std::sort(ranking->order.begin(), ranking->order.end(), better);
  }
}

// Base-2 logits become the mass that ranks strictly before each block; ranking->order is the order.
void cumulative_mass(float* scores, int32_t count, Ranking* ranking) {
  rank(scores, count, count, ranking);
  const double top = scores[ranking->order[0]];
  ranking->weights.resize(count);
  double total = 0.0;
  for (int32_t i = 0; i < count; ++i) {
    ranking->weights[i] = i == 0 ? 1.0 : std::exp2(static_cast<double>(scores[ranking->order[i]]) - top);
    total += ranking->weights[i];
  }
  double before = 0.0;
  for (int32_t i = 0; i < count; ++i) {
    scores[ranking->order[i]] = static_cast<float>(before / total);
    before += ranking->weights[i];
  }
}

// Scores of the item's heads as the contract has them, [head_count, max_blocks], visible blocks only. For
// kPooled, best[h * count + i] is the head's i-th block by logit, i < count: in float32 the masses before
// blocks of little weight are equal, so the scores do not tell their order.
void score_item(const Kernels& k, const ScoreParams& params, const TileItem& item, float* scratch, float* scores,
                Ranking* ranking, int32_t count = 0, int32_t* best = nullptr) {
  const int32_t visible = item.geometry.visible_blocks(item.tile);
  if (visible == 0) return;
  k.score_tile(params, item, scratch, scores);
  if (params.rule == ScoreRule::kRelativeMax) return;
  for (int32_t h = 0; h < item.head_count; ++h) {
    cumulative_mass(scores + int64_t{h} * params.max_blocks, visible, ranking);
    std::copy_n(ranking->order.begin(), count, best + h * count);
  }
}

// A NaN score is kept: the block holds a NaN, and dropping it would hide that.
bool keeps(bool cumulative, float score, float threshold) {
  if (cumulative) return !(score >= threshold);
  return threshold < 0.0f || !(score < threshold || score <= 0.0f);
}

void set_range(uint32_t* words, int32_t begin, int32_t end) {
  for (int32_t j = begin; j < end; ++j) words[j / 32] |= 1u << (j % 32);
}

bool keeps_everything(const SelectParams& params, const TileItem& item) {
  const int32_t prompt_len = params.prompt_lens != nullptr ? params.prompt_lens[item.sequence] : -1;
  return is_last_tile(item.geometry, item.tile, params.last_tiles, prompt_len);
}

// Sink and window, which depend on the tile alone.
void set_always_kept(const ScoreParams& params, const TileItem& item, uint32_t* words) {
  const AlwaysKept kept = always_kept(item.geometry, item.tile, params.sink_blocks, params.window_blocks);
  set_range(words, 0, kept.sink_end);
  set_range(words, kept.window_begin, kept.window_end);
}

}  // namespace

void score_blocks(const ScoreParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const Schedule schedule = make_schedule(params.problem, params.num_rows);
  const int64_t heads = params.problem.num_q_heads;
  const int64_t row_size = heads * params.max_blocks;
  std::fill(params.scores + schedule.used_rows * row_size, params.scores + params.num_rows * row_size, -1.0f);
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()), k.score_scratch(params),
                [&](int64_t index, float* scratch) {
                  const TileItem& item = schedule.items[index];
                  const int32_t visible = item.geometry.visible_blocks(item.tile);
                  float* scores = params.scores + (item.mask_row * heads + item.head_begin) * params.max_blocks;
                  Ranking ranking;
                  score_item(k, params, item, scratch, scores, &ranking);
                  for (int32_t h = 0; h < item.head_count; ++h) {
                    float* row = scores + int64_t{h} * params.max_blocks;
                    std::fill(row + visible, row + params.max_blocks, -1.0f);
                  }
                });
}

void select_blocks(const SelectParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const ScoreParams& score = params.score;
  const Schedule schedule = make_schedule(score.problem, score.num_rows);
  const int64_t heads = score.problem.num_q_heads;
  std::memset(params.words + schedule.used_rows * heads * params.num_words, 0,
              sizeof(int32_t) * (score.num_rows - schedule.used_rows) * heads * params.num_words);
  std::memset(params.counts + schedule.used_rows * heads, 0,
              sizeof(int32_t) * (score.num_rows - schedule.used_rows) * heads);
  const int64_t kernel_floats = ceil_div(static_cast<int32_t>(k.score_scratch(score)), 16) * 16;
  const int64_t score_floats = int64_t{heads_per_item(score.problem)} * score.max_blocks;
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()), kernel_floats + score_floats,
                [&](int64_t index, float* scratch) {
                  const TileItem& item = schedule.items[index];
                  const int32_t visible = item.geometry.visible_blocks(item.tile);
                  const int64_t first_row = item.mask_row * heads + item.head_begin;
                  uint32_t* words = reinterpret_cast<uint32_t*>(params.words) + first_row * params.num_words;
                  std::memset(words, 0, sizeof(int32_t) * item.head_count * params.num_words);
                  float* scores = scratch + kernel_floats;
                  Ranking ranking;
                  const bool cumulative = score.rule != ScoreRule::kRelativeMax;
                  const int32_t top = std::min(std::max(params.min_blocks, cumulative ? 1 : 0), visible);
                  std::vector<int32_t> best(cumulative ? int64_t{top} * item.head_count : 0);
                  const bool everything = keeps_everything(params, item);
                  if (!everything) {
                    score_item(k, score, item, scratch, scores, &ranking, cumulative ? top : 0, best.data());
                  }
                  for (int32_t h = 0; h < item.head_count; ++h, words += params.num_words, scores += score.max_blocks) {
                    int32_t& count = params.counts[first_row + h];
                    count = 0;
                    if (visible == 0) continue;
                    if (everything) {
                      set_range(words, 0, visible);
                      count = visible;
                      continue;
                    }
                    const float threshold = params.thresholds[item.head_begin + h];
                    for (int32_t j = 0; j < visible; ++j) {
                      const bool keep = keeps(cumulative, scores[j], threshold);
                      words[j / 32] |= static_cast<uint32_t>(keep) << (j % 32);
                    }
                    set_always_kept(score, item, words);
                    if (!cumulative && top > 0) rank(scores, visible, top, &ranking);
                    const int32_t* order = cumulative ? best.data() + int64_t{h} * top : ranking.order.data();
                    for (int32_t i = 0; i < top; ++i) set_range(words, order[i], order[i] + 1);
                    for (int32_t w = 0; w < params.num_words; ++w) count += __builtin_popcount(words[w]);
                  }
                });
}

}  // namespace bsfa::cpu
