// Attention of one query tile with skipping (SkipParams): the logits of a block come first and are held, then each
// group of kSkipRows rows of each head decides, and those that do not skip go on to the softmax and the product with V.
//
//   per block, in visiting order:  S = Q K^T of every group that meets the block, and its rows' maxima
//                                  skip = compared < threshold, unless the block is sink or window
//                                  S -> 2^(S - m), l, O as in attention.h, for the groups that do not skip
//                                  counted: also for those that do, without V
//
// Heads whose masks differ meet blocks in different orders; a block is packed once per place in the order. V is packed
// only if a group wants it. Groups lie at absolute positions, subtiles hold rows of one group of one head, and all that
// a row goes through depends on its group alone: chunks of a prompt cut at groups' edges have the bits of the whole.
// Memory per worker: as attention.h, and the logits of all rows of a pass for one block.
#pragma once

#include "attention.h"
#include "tile_max.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

enum class Verdict : int32_t { kAway, kTaken, kSkipped };  // kAway: does not meet the block

// The rows of one head that decide together: subtiles [first, first + count).
struct SkipGroup {
  int32_t head = 0;  // of the item's
  int32_t first = 0;
  int32_t count = 0;
  int32_t max_position = 0;
  int32_t last = -1;               // the tile's last block that the head's mask keeps, met first
  const int32_t* words = nullptr;  // the head's mask; null: dense
  float threshold = 0.0f;
  int64_t met = 0, skipped = 0;
  Verdict verdict = Verdict::kAway;
};

struct SkipScratch {
  Subtile* subtiles;
  SkipGroup* groups;
  RowMaxima rows;
  float *queries, *outputs, *running_max, *running_sum;  // per subtile
  float* s;                                              // [subtiles][block_stride]
  int64_t s_stride;
  float *keys, *values, *rescale, *row;
};

static int64_t skip_layout(const AttentionParams& params, float* base, SkipScratch* scratch) {
  const Problem& problem = params.problem;
  const int32_t heads = heads_per_item(problem);
  const int32_t rows = pass_rows_per_head(problem, heads);
  const int64_t groups = int64_t{heads} * ((rows + kSkipRows - 1) / kSkipRows);
  const int64_t subtiles = groups * ((min(rows, kSkipRows) + kRows - 1) / kRows);
  const int64_t dim = problem.head_dim, dim_v = round_up(problem.head_dim_v, 2);
  Arena arena{base};
  scratch->subtiles = reinterpret_cast<Subtile*>(arena.take(subtiles * int64_t{sizeof(Subtile)} / 4));
  scratch->groups = reinterpret_cast<SkipGroup*>(arena.take(groups * int64_t{sizeof(SkipGroup)} / 4));
  scratch->rows.top = arena.take(subtiles * kRows);
  scratch->rows.odd = arena.take(subtiles * kRows);
  scratch->rows.met = arena.take(subtiles * kRows);
  scratch->queries = arena.take(subtiles * dim * kRows);
  scratch->outputs = arena.take(subtiles * dim_v * kRows);
  scratch->running_max = arena.take(subtiles * kRows);
  scratch->running_sum = arena.take(subtiles * kRows);
  scratch->s_stride = int64_t{min(problem.block_n, problem.kv.max_seqlen) + 1} * kRows;
  scratch->s = arena.take(subtiles * scratch->s_stride);
  scratch->keys = arena.take((kChunk + 1) * dim);
  scratch->values = arena.take(kChunk * dim_v);
  scratch->rescale = arena.take(kRows);
  scratch->row = arena.take(max(problem.head_dim, problem.head_dim_v) + kLanes);
  return arena.next - base;
}

static int64_t skip_scratch(const AttentionParams& params) {
  SkipScratch scratch;
  float origin;
  return skip_layout(params, &origin, &scratch);
}

BSFA_INLINE bool keeps(const int32_t* words, int32_t block) {
  return words == nullptr || (static_cast<uint32_t>(words[block / 32]) >> (block % 32) & 1u) != 0;
}

// What all blocks of a pass have in common.
struct SkipPass {
  const AttentionParams& params;
  const TileItem& item;
  const LogitScale scale;
  const Visibility visibility;
  const AlwaysKept always;
  const SkipScratch& scratch;
  int32_t groups = 0;
  int32_t subtiles = 0;
};

// Makes the groups of the item's heads in rows [row_begin, row_end), which lie in one pass, and their subtiles.
static void make_groups(SkipPass* pass, int32_t row_begin, int32_t row_end) {
  const AttentionParams& params = pass->params;
  const TileItem& item = pass->item;
  const SkipScratch& scratch = pass->scratch;
  const Problem& problem = params.problem;
  const int32_t tile = item.geometry.first_tile() + item.tile;
  const int32_t visible = item.geometry.visible_blocks(item.tile);
  const int32_t column = max(min(tile, params.skip.columns - 1), 0);
  const int32_t tile_row = tile * problem.block_m - item.geometry.offset();  // of its first position; may be negative
  pass->groups = pass->subtiles = 0;
  for (int32_t row = row_begin; row < row_end;) {
    const int32_t end = min(tile_row + ((row - tile_row) / kSkipRows + 1) * kSkipRows, row_end);
    const int32_t made = make_subtiles(item, row, end, false, scratch.subtiles + pass->subtiles);
    const int32_t per_head = made / item.head_count;
    for (int32_t h = 0; h < item.head_count; ++h) {
      SkipGroup& group = scratch.groups[pass->groups++];
      group = SkipGroup{};
      group.head = h;
      group.first = pass->subtiles + h * per_head;
      group.count = per_head;
      group.max_position = item.geometry.offset() + end - 1;
      group.threshold = params.skip.thresholds[int64_t{item.head_begin + h} * params.skip.columns + column];
      if (params.words != nullptr) {
        const int32_t mask_head = params.mask_heads == problem.num_q_heads    ? item.head_begin + h
                                  : params.mask_heads == problem.num_kv_heads ? item.kv_head
                                                                              : 0;
        group.words = params.words + (item.mask_row * params.mask_heads + mask_head) * params.num_words;
      }
      group.last = visible - 1;
      while (group.last >= 0 && !keeps(group.words, group.last)) --group.last;
    }
    pass->subtiles += made;
    row = end;
  }
}

// Softmax of `count` logits of one subtile, and, unless `values` is null, their product with V.
static void take_chunk(const SkipPass& pass, int32_t index, int32_t first_key, int32_t count, int32_t packed,
                       const float* values, int32_t* finite) {
  const SkipScratch& scratch = pass.scratch;
  const Problem& problem = pass.params.problem;
  const Subtile& subtile = scratch.subtiles[index];
  const int32_t dim_v = round_up(problem.head_dim_v, 2);
  float* s = scratch.s + index * scratch.s_stride + int64_t{first_key % problem.block_n} * kRows;
  float* o = scratch.outputs + int64_t{index} * dim_v * kRows;
  softmax_step(subtile.vectors, count, s, scratch.running_max + index * kRows, scratch.running_sum + index * kRows,
               scratch.rescale);
  if (values == nullptr) return add_values(subtile.vectors, scratch.values, dim_v, 0, s, scratch.rescale, o);
  if (pass.visibility.upper && subtile.min_position < first_key + count - 1) {
    if (*finite < 0) *finite = all_finite(values, int64_t{packed} * dim_v);
    if (*finite == 0) {
      return add_visible_values(pass.visibility, nullptr, subtile, first_key, values, dim_v, count, s, scratch.rescale,
                                o);
    }
  }
  add_values(subtile.vectors, values, dim_v, count, s, scratch.rescale, o);
}

// Lets the groups meet `block` that keep it and see a part of it: those whose last block it is if `last`, else the
// others. False: none does. Their logits and maxima are left in the scratch memory, their verdict is kTaken.
static bool meet_groups(const SkipPass& pass, int32_t block, bool last) {
  const AttentionParams& params = pass.params;
  const SkipScratch& scratch = pass.scratch;
  const Problem& problem = params.problem;
  const TileItem& item = pass.item;
  const bool causal = pass.visibility.upper;
  const int32_t dim = problem.head_dim;
  const int32_t first = block * problem.block_n;
  const int32_t end = min(first + problem.block_n, item.geometry.seqlen_k);
  bool met = false;
  for (int32_t g = 0; g < pass.groups; ++g) {
    SkipGroup& group = scratch.groups[g];
    const bool meets =
        (group.last == block) == last && keeps(group.words, block) && (!causal || group.max_position >= first);
    group.verdict = meets ? Verdict::kTaken : Verdict::kAway;
    met |= meets;
    if (!meets) continue;
    ++group.met;
    for (int32_t i = group.first; i < group.first + group.count; ++i) clear_block(maxima_of(scratch.rows, i));
  }
  if (!met) return false;

  for (int32_t key = first; key < end; key += kChunk) {
    const int32_t packed = min(kChunk, end - key);
    pack_keys(problem.dtype, problem.kv, params.k, item.sequence, item.kv_head, key, packed, dim, dim, scratch.keys);
    for (int32_t g = 0; g < pass.groups; ++g) {
      const SkipGroup& group = scratch.groups[g];
      if (group.verdict == Verdict::kAway) continue;
      for (int32_t i = group.first; i < group.first + group.count; ++i) {
        const Subtile& subtile = scratch.subtiles[i];
        float* s = scratch.s + i * scratch.s_stride + int64_t{key - first} * kRows;
        const int32_t count = tile_logits(problem, pass.scale, pass.visibility, subtile,
                                          scratch.queries + int64_t{i} * dim * kRows, scratch.keys, key, packed, s);
        add_logits(subtile.vectors, count, s, maxima_of(scratch.rows, i));
      }
    }
  }
  return true;
}

// Whether a group that has met `block` skips it.
static bool skips(const SkipPass& pass, const SkipGroup& group, int32_t block) {
  if (pass.always(block)) return false;
  const int32_t first = block * pass.params.problem.block_n;
  float value = -kInfinity;
  for (int32_t i = group.first; i < group.first + group.count; ++i) {
    value = larger(value, compared(pass.params.skip.form, pass.visibility.upper, pass.scratch.subtiles[i], first,
                                   maxima_of(pass.scratch.rows, i)));
  }
  return value < group.threshold;  // false for NaN on either side
}

// Meets a block and takes it, or skips it.
static void visit_block(const SkipPass& pass, int32_t block, bool last) {
  if (!meet_groups(pass, block, last)) return;
  const AttentionParams& params = pass.params;
  const SkipScratch& scratch = pass.scratch;
  const Problem& problem = params.problem;
  const TileItem& item = pass.item;
  const bool causal = pass.visibility.upper;
  const int32_t dim_v = round_up(problem.head_dim_v, 2);
  const int32_t first = block * problem.block_n;
  const int32_t end = min(first + problem.block_n, item.geometry.seqlen_k);
  bool taken = false;
  for (int32_t g = 0; g < pass.groups; ++g) {
    SkipGroup& group = scratch.groups[g];
    if (group.verdict == Verdict::kAway) continue;
    if (skips(pass, group, block)) {
      group.verdict = Verdict::kSkipped;
      ++group.skipped;
      continue;
    }
    taken = true;
    for (int32_t i = group.first; i < group.first + group.count; ++i) {
      meet_block(scratch.subtiles[i].vectors, maxima_of(scratch.rows, i));
    }
  }
  if (!taken && !params.skip.counted) return;

  for (int32_t key = first; key < end; key += kChunk) {
    const int32_t packed = min(kChunk, end - key);
    if (taken) {
      pack_keys(problem.dtype, problem.kv, params.v, item.sequence, item.kv_head, key, packed, problem.head_dim_v,
                dim_v, scratch.values);
    }
    int32_t finite = -1;
    for (int32_t g = 0; g < pass.groups; ++g) {
      const SkipGroup& group = scratch.groups[g];
      const bool skipped = group.verdict == Verdict::kSkipped;
      if (group.verdict == Verdict::kAway || (skipped && !params.skip.counted)) continue;
      for (int32_t i = group.first; i < group.first + group.count; ++i) {
        const int32_t count = causal ? min(packed, scratch.subtiles[i].max_position - key + 1) : packed;
        if (count > 0) take_chunk(pass, i, key, count, packed, skipped ? nullptr : scratch.values, &finite);
      }
    }
  }
}

static void skip_tile(const AttentionParams& params, const TileItem& item, float* scratch_base) {
  const Problem& problem = params.problem;
  const SequenceGeometry& geometry = item.geometry;
  SkipScratch scratch;
  skip_layout(params, scratch_base, &scratch);
  Visibility visibility;
  visibility.upper = problem.causal;
  SkipPass pass{params,
                item,
                logit_scale(problem),
                visibility,
                always_kept(geometry, item.tile, params.skip.sink_blocks, params.skip.window_blocks),
                scratch};
  const int32_t dim = problem.head_dim, dim_v = round_up(problem.head_dim_v, 2);
  const int32_t blocks = geometry.visible_blocks(item.tile);
  const int32_t row_begin = geometry.row_begin(item.tile), row_end = geometry.row_end(item.tile);
  // Passes begin at the edges of groups: they step from the tile's first position, whichever rows this call has of it.
  const int32_t step = pass_rows_per_head(problem, heads_per_item(problem));
  const int32_t tile_row = (geometry.first_tile() + item.tile) * problem.block_m - geometry.offset();
  for (int32_t start = tile_row; start < row_end; start += step) {
    if (start + step <= row_begin) continue;
    make_groups(&pass, max(start, row_begin), min(start + step, row_end));
    for (int32_t i = 0; i < pass.subtiles; ++i) {
      pack_queries(problem, params.q, item.sequence, scratch.subtiles[i], pass.scale.factor, scratch.row,
                   scratch.queries + int64_t{i} * dim * kRows);
    }
    for (int64_t i = 0; i < int64_t{pass.subtiles} * dim_v * kRows; ++i) scratch.outputs[i] = 0.0f;
    for (int64_t i = 0; i < int64_t{pass.subtiles} * kRows; ++i) {
      scratch.running_max[i] = scratch.rows.met[i] = -kInfinity;
      scratch.running_sum[i] = 0.0f;
    }
    for (int32_t block = blocks - 1; block >= 0; --block) visit_block(pass, block, true);
    for (int32_t visit = 1; visit <= blocks; ++visit) {  // the last block is not every head's
      visit_block(pass, visit == 1 ? 0 : blocks + 1 - visit, false);
    }
    for (int32_t i = 0; i < pass.subtiles; ++i) {
      store_outputs(params, item.sequence, scratch.subtiles[i], scratch.outputs + int64_t{i} * dim_v * kRows,
                    scratch.running_max + i * kRows, scratch.running_sum + i * kRows, scratch.row);
    }
    if (params.skip.counts == nullptr) continue;
    for (int32_t g = 0; g < pass.groups; ++g) {
      const SkipGroup& group = scratch.groups[g];
      int64_t* counts = params.skip.counts + int64_t{item.head_begin + group.head} * 2;
      __atomic_fetch_add(counts, group.met, __ATOMIC_RELAXED);
      __atomic_fetch_add(counts + 1, group.skipped, __ATOMIC_RELAXED);
    }
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
