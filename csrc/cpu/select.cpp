// score_blocks and select_blocks: what is done with the scores that the kernels make for one query tile.
//
//   kRelativeMax     score as it comes (score.h); kept iff score > 0 and score >= threshold, or threshold < 0
//   the mass rules   weights in float64: of kPooled and kFlat64 the softmax over the visible blocks, of kAntidiagonal
//                    as they come. Ranked by descending weight (ties: lower block first; kAntidiagonal: sink and window
//                    before all others, by index); score = share of the weight of the blocks ranked before, summed in
//                    rank order; kept iff score < threshold, or own share > probability, and the best block always
//
// Also kept: sink blocks, the window around the tile's own positions, everything in the last tiles of the prompt, the
// best min_blocks and the best min_ratio by rank (NaN ranks last), and what keep.h's Rescue says. Blocks whose score is
// NaN are kept. kUnion: all that for every query head, OR-ed into the mask of its KV head (the rescue once).
// Memory per worker: the scores of one tile, [heads of the item, max_blocks], and the ranking of one row.
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

// One row of scores, ranked. `keys` are what is compared; `weights` are in rank order, for the mass rules alone.
struct Ranking {
  std::vector<int32_t> order;
  std::vector<float> keys;
  std::vector<double> weights;
  double total = 0.0;
};

// order = block indices by descending key, ties: lower first; only the first `top` places are in order. NaN is last.
void rank(int32_t count, int32_t top, Ranking* ranking) {
  ranking->order.resize(count);
  for (int32_t j = 0; j < count; ++j) {
    float& key = ranking->keys[j];
    ranking->order[j] = j;
    if (std::isnan(key)) key = -std::numeric_limits<float>::infinity();
  }
  const float* keys = ranking->keys.data();
  const auto better = [keys](int32_t a, int32_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); };
  if (top < count) {
    std::partial_sort(ranking->order.begin(), ranking->order.begin() + top, ranking->order.end(), better);
  } else {
    std::sort(ranking->order.begin(), ranking->order.end(), better);
  }
}

bool is_mass_rule(const ScoreParams& params) { return params.rule != ScoreRule::kRelativeMax; }

// What a kernel of a mass rule made of one row becomes the share of the weight that ranks strictly before each block.
void cumulative_mass(const ScoreParams& params, const AlwaysKept& always, int32_t count, float* scores,
                     Ranking* ranking) {
  const bool logits = params.rule != ScoreRule::kAntidiagonal;
  ranking->keys.assign(scores, scores + count);
  if (!logits) {
    for (int32_t j = 0; j < count; ++j) {
      if (always(j)) ranking->keys[j] = std::numeric_limits<float>::infinity();
    }
  }
  rank(count, count, ranking);
  const std::vector<int32_t>& order = ranking->order;
  const double top = scores[order[0]];
  ranking->weights.resize(count);
  ranking->total = 0.0;
  for (int32_t i = 0; i < count; ++i) {
    const double x = scores[order[i]];
    ranking->weights[i] = !logits ? x : i == 0 ? 1.0 : std::exp2(x - top);
    ranking->total += ranking->weights[i];
  }
  double before = 0.0;
  for (int32_t i = 0; i < count; ++i) {
    scores[order[i]] = static_cast<float>(before / ranking->total);
    before += ranking->weights[i];
  }
}

// The rows of scores that an item makes.
int32_t score_rows(const ScoreParams& params, const TileItem& item) {
  return params.sharing == HeadSharing::kGroup ? 1 : item.head_count;
}

int32_t first_score_head(const ScoreParams& params, const TileItem& item) {
  return params.sharing == HeadSharing::kGroup ? item.kv_head : item.head_begin;
}

AlwaysKept always_kept(const ScoreParams& params, const TileItem& item) {
  return bsfa::always_kept(item.geometry, item.tile, params.sink_blocks, params.window_blocks);
}

void set_bit(uint32_t* words, int32_t j) { words[j / 32] |= 1u << (j % 32); }

void set_range(uint32_t* words, int32_t begin, int32_t end) {
  for (int32_t j = begin; j < end; ++j) set_bit(words, j);
}

bool keeps_everything(const SelectParams& params, const TileItem& item) {
  const int32_t prompt_len = params.prompt_lens != nullptr ? params.prompt_lens[item.sequence] : -1;
  return is_last_tile(item.geometry, item.tile, params.last_tiles, prompt_len);
}

// Sets the bits of what one row of scores keeps, as the kernel made them. A NaN score is kept: the block holds a NaN,
// and dropping it would hide that.
void keep_by_score(const SelectParams& params, const AlwaysKept& always, int32_t visible, float threshold,
                   float* scores, Ranking* ranking, uint32_t* words) {
  const int32_t top = best_blocks(params.min_blocks, params.min_ratio, visible);
  if (is_mass_rule(params.score)) {
    cumulative_mass(params.score, always, visible, scores, ranking);
    const double share = double{params.probability} * ranking->total;
    for (int32_t i = 0; i < visible; ++i) {
      const int32_t j = ranking->order[i];
      if (i == 0 || i < top || !(scores[j] >= threshold) || ranking->weights[i] > share) set_bit(words, j);
    }
    return;
  }
  for (int32_t j = 0; j < visible; ++j) {
    if (threshold < 0.0f || !(scores[j] < threshold || scores[j] <= 0.0f)) set_bit(words, j);
  }
  if (top == 0) return;
  ranking->keys.assign(scores, scores + visible);
  rank(visible, top, ranking);
  for (int32_t i = 0; i < top; ++i) set_bit(words, ranking->order[i]);
}

}  // namespace

void score_blocks(const ScoreParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const Schedule schedule = make_schedule(params.problem, params.num_rows, nullptr, 0, 0, heads_per_item(params));
  const int64_t heads = params.score_heads();
  const int64_t row_size = heads * params.max_blocks;
  std::fill(params.scores + schedule.used_rows * row_size, params.scores + params.num_rows * row_size, -1.0f);
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()), k.score_scratch(params),
                [&](int64_t index, float* scratch) {
                  const TileItem& item = schedule.items[index];
                  const int32_t visible = item.geometry.visible_blocks(item.tile);
                  float* scores =
                      params.scores + (item.mask_row * heads + first_score_head(params, item)) * params.max_blocks;
                  if (visible > 0) k.score_tile(params, item, scratch, scores);
                  Ranking ranking;
                  for (int32_t i = 0; i < score_rows(params, item); ++i, scores += params.max_blocks) {
                    if (visible > 0 && is_mass_rule(params)) {
                      cumulative_mass(params, always_kept(params, item), visible, scores, &ranking);
                    }
                    std::fill(scores + visible, scores + params.max_blocks, -1.0f);
                  }
                });
}

void select_blocks(const SelectParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const ScoreParams& score = params.score;
  const Schedule schedule = make_schedule(score.problem, score.num_rows, nullptr, 0, 0, heads_per_item(score));
  const int64_t mask_heads = score.mask_heads();
  const Rescue rescue = rescue_of(params);
  std::memset(params.words + schedule.used_rows * mask_heads * params.num_words, 0,
              sizeof(int32_t) * (score.num_rows - schedule.used_rows) * mask_heads * params.num_words);
  std::memset(params.counts + schedule.used_rows * mask_heads, 0,
              sizeof(int32_t) * (score.num_rows - schedule.used_rows) * mask_heads);
  const int64_t kernel_floats = (k.score_scratch(score) + 15) / 16 * 16;
  const int64_t score_floats = int64_t{heads_per_item(score)} * score.max_blocks;
  for_each_item(executor, static_cast<int64_t>(schedule.items.size()), kernel_floats + score_floats,
                [&](int64_t index, float* scratch) {
                  const TileItem& item = schedule.items[index];
                  const int32_t visible = item.geometry.visible_blocks(item.tile);
                  const bool shared = score.sharing != HeadSharing::kNone;
                  const int32_t first_head = shared ? item.kv_head : item.head_begin;
                  const int32_t rows = shared ? 1 : item.head_count;  // of the mask
                  const int64_t first_row = item.mask_row * mask_heads + first_head;
                  uint32_t* const words = reinterpret_cast<uint32_t*>(params.words) + first_row * params.num_words;
                  std::memset(words, 0, sizeof(int32_t) * rows * params.num_words);
                  const bool everything = visible > 0 && keeps_everything(params, item);
                  const AlwaysKept always = always_kept(score, item);
                  if (visible > 0 && !everything) {
                    float* scores = scratch + kernel_floats;
                    k.score_tile(score, item, scratch, scores);
                    const int32_t first_threshold = first_score_head(score, item);
                    Ranking ranking;
                    for (int32_t i = 0; i < score_rows(score, item); ++i) {
                      keep_by_score(params, always, visible, params.threshold_of(first_threshold + i),
                                    scores + int64_t{i} * score.max_blocks, &ranking,
                                    words + (shared ? 0 : int64_t{i} * params.num_words));
                    }
                  }
                  const int32_t tile = item.geometry.first_tile() + item.tile;
                  for (int32_t i = 0; i < rows; ++i) {
                    uint32_t* row = words + int64_t{i} * params.num_words;
                    if (everything) set_range(row, 0, visible);
                    set_range(row, 0, always.sink_end);
                    set_range(row, always.window_begin, always.window_end);
                    if (rescue.stride > 0 || rescue.parts > 0) {
                      for (int32_t j = 0; j < visible; ++j) {
                        if (rescue(tile, j, first_head + i)) set_bit(row, j);
                      }
                    }
                    int32_t count = 0;
                    for (int32_t w = 0; w < params.num_words; ++w) count += __builtin_popcount(row[w]);
                    params.counts[first_row + i] = count;
                  }
                });
}

}  // namespace bsfa::cpu
