// The first of two passes of attention that skips (SkipMaskParams): a row of the mask for each head of one query tile.
//
//   per block, in visiting order:  S = Q K^T of every group that meets the block, and its rows' maxima (skip.h)
//                                  the head keeps the block if one of its groups does not skip it
//
// No logit is needed twice, and no V. Memory per worker: as skip.h. The item owns its rows of words and counts.
#pragma once

#include "skip.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

static int64_t skip_mask_scratch(const SkipMaskParams& params) { return skip_scratch(params.attention); }

static void mask_block(const SkipPass& pass, int32_t block, bool last, uint32_t* words, int32_t num_words) {
  if (!meet_groups(pass, block, last)) return;
  for (int32_t g = 0; g < pass.groups; ++g) {
    const SkipGroup& group = pass.scratch.groups[g];
    if (group.verdict == Verdict::kAway) continue;
    if (!skips(pass, group, block)) words[group.head * num_words + block / 32] |= 1u << (block % 32);
    for (int32_t i = group.first; i < group.first + group.count; ++i) {
      meet_block(pass.scratch.subtiles[i].vectors, maxima_of(pass.scratch.rows, i));
    }
  }
}

// Groups of the tile that see key `first_key`.
static int32_t groups_that_see(const SequenceGeometry& geometry, int32_t tile, bool causal, int32_t first_key) {
  const int32_t tile_row = (geometry.first_tile() + tile) * geometry.block_m - geometry.offset();
  int32_t count = 0;
  for (int32_t row = geometry.row_begin(tile), end; row < geometry.row_end(tile); row = end) {
    end = min(tile_row + ((row - tile_row) / kSkipRows + 1) * kSkipRows, geometry.row_end(tile));
    count += !causal || geometry.offset() + end - 1 >= first_key;
  }
  return count;
}

static void skip_mask_tile(const SkipMaskParams& mask, const TileItem& item, float* scratch_base) {
  const AttentionParams& params = mask.attention;
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
  const int32_t dim = problem.head_dim, blocks = geometry.visible_blocks(item.tile);
  const int64_t first_row = item.mask_row * problem.num_q_heads + item.head_begin;
  uint32_t* words = reinterpret_cast<uint32_t*>(mask.words) + first_row * mask.num_words;
  for (int64_t i = 0; i < int64_t{item.head_count} * mask.num_words; ++i) words[i] = 0;
  const int32_t row_begin = geometry.row_begin(item.tile), row_end = geometry.row_end(item.tile);
  const int32_t step = pass_rows_per_head(problem, heads_per_item(problem));
  const int32_t tile_row = (geometry.first_tile() + item.tile) * problem.block_m - geometry.offset();
  for (int32_t start = tile_row; start < row_end; start += step) {
    if (start + step <= row_begin) continue;
    make_groups(&pass, max(start, row_begin), min(start + step, row_end));
    for (int32_t i = 0; i < pass.subtiles; ++i) {
      pack_queries(problem, params.q, item.sequence, scratch.subtiles[i], pass.scale.factor, scratch.row,
                   scratch.queries + int64_t{i} * dim * kRows);
    }
    for (int64_t i = 0; i < int64_t{pass.subtiles} * kRows; ++i) scratch.rows.met[i] = -kInfinity;
    for (int32_t block = blocks - 1; block >= 0; --block) mask_block(pass, block, true, words, mask.num_words);
    for (int32_t visit = 1; visit <= blocks; ++visit) {  // the last block is not every head's
      mask_block(pass, visit == 1 ? 0 : blocks + 1 - visit, false, words, mask.num_words);
    }
  }
  for (int32_t h = 0; h < item.head_count; ++h) {
    const int32_t head = item.head_begin + h;
    const int32_t* within = nullptr;
    if (params.words != nullptr) {
      const int32_t mask_head = head / (problem.num_q_heads / params.mask_heads);
      within = params.words + (item.mask_row * params.mask_heads + mask_head) * params.num_words;
    }
    int32_t kept = 0;
    int64_t met = 0, skipped = 0;
    for (int32_t block = 0; block < blocks; ++block) {
      if (!keeps(within, block)) continue;
      const int32_t groups = groups_that_see(geometry, item.tile, problem.causal, block * problem.block_n);
      const bool keep = (words[h * mask.num_words + block / 32] >> (block % 32) & 1u) != 0;
      kept += keep;
      met += groups;
      skipped += keep ? 0 : groups;
    }
    mask.counts[first_row + h] = kept;
    if (params.skip.counts == nullptr) continue;
    __atomic_fetch_add(params.skip.counts + int64_t{head} * 2, met, __ATOMIC_RELAXED);
    __atomic_fetch_add(params.skip.counts + int64_t{head} * 2 + 1, skipped, __ATOMIC_RELAXED);
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
