// True attention mass of one query tile: mass[row, h, j] = (1 / rows) * sum over the tile's rows and over the visible
// keys of block j of exp(s - lse), s = cap(scale * q . k). Rows with lse = -inf add nothing.
//
// Tiling as in attention.h without V: K is packed once per item and block, logits are made kChunk keys at a time and
// turned to probabilities at once, since the LSE is known. Subtiles hold rows of one head only; a lane sums its row
// over the block, and one reduction across lanes per (subtile, block) ends it. The item owns its rows of `mass`. Memory
// per worker: Q panels of pass_rows() rows, one K and one S panel.
#pragma once

#include "attention.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

struct BlockMassScratch {
  Subtile* subtiles;
  float *queries, *lse, *keys, *s, *row;
};

static int64_t block_mass_layout(const BlockMassParams& params, float* base, BlockMassScratch* scratch) {
  const Problem& problem = params.problem;
  const int32_t heads = heads_per_item(problem);
  const int64_t subtiles = int64_t{heads} * ((pass_rows_per_head(problem, heads) + kRows - 1) / kRows);
  Arena arena{base};
  scratch->subtiles = reinterpret_cast<Subtile*>(arena.take(subtiles * int64_t{sizeof(Subtile)} / 4));
  scratch->queries = arena.take(subtiles * problem.head_dim * kRows);
  scratch->lse = arena.take(subtiles * kRows);
  scratch->keys = arena.take((kChunk + 1) * int64_t{problem.head_dim});
  scratch->s = arena.take((kChunk + 1) * kRows);
  scratch->row = arena.take(problem.head_dim + kLanes);
  return arena.next - base;
}

static int64_t block_mass_scratch(const BlockMassParams& params) {
  BlockMassScratch scratch;
  float origin;
  return block_mass_layout(params, &origin, &scratch);
}

// Sum over the subtile's rows and `count` keys of 2^(s - lse).
static __attribute__((noinline)) float probability_sum(int32_t vectors, int32_t count, const float* s,
                                                       const float* lse) {
  Float total = {};
  for (int32_t v = 0; v < vectors; ++v) {
    const Float base = load(lse + v * kLanes);
    Float sum = {};
    for (int32_t n = 0; n < count; ++n) sum += exp2(load(s + n * kRows + v * kLanes) - base);
    // A row that sees nothing has base +inf here; s = +inf would make NaN of it.
    total += select(base == kInfinity, Float{}, sum);
  }
  return horizontal_sum(total);
}

static void block_mass_tile(const BlockMassParams& params, const TileItem& item, float* scratch_base) {
  const Problem& problem = params.problem;
  const SequenceGeometry& geometry = item.geometry;
  BlockMassScratch scratch;
  block_mass_layout(params, scratch_base, &scratch);
  const LogitScale scale = logit_scale(problem);
  Visibility visibility;
  visibility.upper = problem.causal;
  const int32_t dim = problem.head_dim;
  const int32_t visible = geometry.visible_blocks(item.tile);
  const int32_t step = pass_rows_per_head(problem, heads_per_item(problem));
  const int32_t row_begin = geometry.row_begin(item.tile), row_end = geometry.row_end(item.tile);
  float* mass = params.mass + (item.mask_row * problem.num_q_heads + item.head_begin) * params.max_blocks;
  for (int64_t i = 0; i < int64_t{item.head_count} * params.max_blocks; ++i) mass[i] = 0.0f;
  for (int32_t row = row_begin; row < row_end; row += step) {
    const int32_t subtiles = make_subtiles(item, row, min(row + step, row_end), false, scratch.subtiles);
    for (int32_t i = 0; i < subtiles; ++i) {
      const Subtile& subtile = scratch.subtiles[i];
      pack_queries(problem, params.q, item.sequence, subtile, scale.factor, scratch.row,
                   scratch.queries + int64_t{i} * dim * kRows);
      for (int32_t lane = 0; lane < kRows; ++lane) {
        float base = kInfinity;
        if (lane < subtile.count) {
          const float lse = params.lse[lse_index(problem, params.lse_batch_stride, params.lse_head_stride,
                                                 item.sequence, subtile.row[lane], subtile.head[lane])];
          if (lse != -kInfinity) base = lse * kLog2E;
        }
        scratch.lse[i * kRows + lane] = base;
      }
    }
    for (int32_t block = 0; block < visible; ++block) {
      const int32_t block_end = min((block + 1) * problem.block_n, geometry.seqlen_k);
      for (int32_t key = block * problem.block_n; key < block_end; key += kChunk) {
        const int32_t packed = min(kChunk, block_end - key);
        pack_keys(problem.dtype, problem.kv, params.k, item.sequence, item.kv_head, key, packed, dim, dim,
                  scratch.keys);
        for (int32_t i = 0; i < subtiles; ++i) {
          const Subtile& subtile = scratch.subtiles[i];
          const int32_t count = visibility.upper ? min(packed, subtile.max_position - key + 1) : packed;
          if (count <= 0) continue;
          query_keys(subtile.vectors, scratch.keys, count, scratch.queries + int64_t{i} * dim * kRows, dim, scratch.s);
          if (scale.cap != 0.0f) cap_logits(scale.cap, subtile.vectors, count, scratch.s);
          if (visibility.upper && subtile.min_position < key + count - 1) {
            mask_logits(visibility, subtile, key, count, scratch.s);
          }
          mass[int64_t{subtile.mask_index} * params.max_blocks + block] +=
              probability_sum(subtile.vectors, count, scratch.s, scratch.lse + i * kRows);
        }
      }
    }
  }
  const float inverse = 1.0f / static_cast<float>(row_end - row_begin);
  for (int64_t i = 0; i < int64_t{item.head_count} * params.max_blocks; ++i) mass[i] *= inverse;
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
