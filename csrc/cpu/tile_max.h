// The quantity that attention with skipping compares with its threshold (SkipParams), for whole query tiles:
//
//   kAbsolute  max over the tile's rows of (row's largest logit in block j)
//   kRelative  max over the tile's rows that see block j of (row's largest logit in block j - row's running maximum)
//
// One pass over K per tile (or per pass_rows() rows of a large one), blocks in visiting order; K is packed and
// multiplied as in attention.h, kChunk keys at a time, and nothing but a maximum per row is kept. A lane is a row, so
// its bits do not depend on which rows share its vector: attention decides on the very numbers that this writes.
// A NaN logit makes the block's value NaN, but does not enter running maxima. The item owns its rows of `maxima`.
#pragma once

#include "attention.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

// Where block number `visit` of `count` lies in the order of visits: the last, block 0, the others from last to first.
BSFA_INLINE int32_t visited_block(int32_t visit, int32_t count) {
  if (visit == 0) return count - 1;
  return visit == 1 ? 0 : count - visit;
}

// Per lane of a subtile, logits in base 2: of the block at hand `top` (-inf: nothing is visible) and `odd`, which is 0
// or, where a logit is NaN, NaN; and `met`, the running maximum of the blocks before.
struct RowMaxima {
  float *top, *odd, *met;
};

BSFA_INLINE RowMaxima maxima_of(const RowMaxima& all, int32_t subtile) {
  return {all.top + subtile * kRows, all.odd + subtile * kRows, all.met + subtile * kRows};
}

BSFA_INLINE void clear_block(const RowMaxima& rows) {
  for (int32_t i = 0; i < kRows; ++i) {
    rows.top[i] = -kInfinity;
    rows.odd[i] = 0.0f;
  }
}

// Takes `count` keys of the block.
static __attribute__((noinline)) void add_logits(int32_t vectors, int32_t count, const float* s,
                                                 const RowMaxima& rows) {
  for (int32_t v = 0; v < vectors; ++v) {
    Float top = load(rows.top + v * kLanes), odd = load(rows.odd + v * kLanes);
    for (int32_t n = 0; n < count; ++n) {
      const Float x = load(s + n * kRows + v * kLanes);
      top = max(x, top);
      odd = select(x != x, x, odd);
    }
    store(rows.top + v * kLanes, top);
    store(rows.odd + v * kLanes, odd);
  }
}

// The block has been met, and was not skipped.
BSFA_INLINE void meet_block(int32_t vectors, const RowMaxima& rows) {
  for (int32_t v = 0; v < vectors; ++v) {
    store(rows.met + v * kLanes, max(load(rows.top + v * kLanes), load(rows.met + v * kLanes)));
  }
}

// The larger one, NaN if one is.
BSFA_INLINE float larger(float a, float b) {
  if (a != a || b != b) return a + b;
  return a > b ? a : b;
}

// What the threshold is compared with, over the rows of one subtile that see key `first_key`, the block's first one; in
// natural units.
static __attribute__((noinline)) float compared(SkipForm form, bool causal, const Subtile& subtile, int32_t first_key,
                                                const RowMaxima& rows) {
  float result = -kInfinity;
  for (int32_t i = 0; i < subtile.count; ++i) {
    if (causal && subtile.position[i] < first_key) continue;
    const float top = rows.top[i] + rows.odd[i];
    float value = top * kLn2;
    if (form == SkipForm::kRelative) {
      value = (top - rows.met[i]) * kLn2;
      if (rows.met[i] == -kInfinity && top == top) value = kInfinity;
    }
    result = larger(result, value);
  }
  return result;
}

// The logits in base 2 of a subtile and the packed keys from `first_key` on, -inf for hidden ones. Returns how many
// keys some row sees: only these are written (and one that may follow).
static int32_t tile_logits(const Problem& problem, const LogitScale& scale, const Visibility& visibility,
                           const Subtile& subtile, const float* queries, const float* keys, int32_t first_key,
                           int32_t packed, float* s) {
  const int32_t count = visibility.upper ? min(packed, subtile.max_position - first_key + 1) : packed;
  if (count <= 0) return 0;
  query_keys(subtile.vectors, keys, count, queries, problem.head_dim, s);
  if (scale.cap != 0.0f) cap_logits(scale.cap, subtile.vectors, count, s);
  if (visibility.upper && subtile.min_position < first_key + count - 1) {
    mask_logits(visibility, subtile, first_key, count, s);
  }
  return count;
}

struct TileMaxScratch {
  Subtile* subtiles;
  RowMaxima rows;
  float *queries, *keys, *s, *row;
};

static int64_t tile_max_layout(const TileMaxParams& params, float* base, TileMaxScratch* scratch) {
  const Problem& problem = params.problem;
  const int32_t heads = heads_per_item(problem);
  const int64_t subtiles = int64_t{heads} * ((pass_rows_per_head(problem, heads) + kRows - 1) / kRows);
  Arena arena{base};
  scratch->subtiles = reinterpret_cast<Subtile*>(arena.take(subtiles * int64_t{sizeof(Subtile)} / 4));
  scratch->rows.top = arena.take(subtiles * kRows);
  scratch->rows.odd = arena.take(subtiles * kRows);
  scratch->rows.met = arena.take(subtiles * kRows);
  scratch->queries = arena.take(subtiles * problem.head_dim * kRows);
  scratch->keys = arena.take((kChunk + 1) * int64_t{problem.head_dim});
  scratch->s = arena.take((kChunk + 1) * kRows);
  scratch->row = arena.take(problem.head_dim + kLanes);
  return arena.next - base;
}

static int64_t tile_max_scratch(const TileMaxParams& params) {
  TileMaxScratch scratch;
  float origin;
  return tile_max_layout(params, &origin, &scratch);
}

static void tile_max_tile(const TileMaxParams& params, const TileItem& item, float* scratch_base) {
  const Problem& problem = params.problem;
  const SequenceGeometry& geometry = item.geometry;
  TileMaxScratch scratch;
  tile_max_layout(params, scratch_base, &scratch);
  const LogitScale scale = logit_scale(problem);
  Visibility visibility;
  visibility.upper = problem.causal;
  const int32_t dim = problem.head_dim, visible = geometry.visible_blocks(item.tile);
  const int32_t step = pass_rows_per_head(problem, heads_per_item(problem));
  const int32_t row_end = geometry.row_end(item.tile);
  float* maxima = params.maxima + (item.mask_row * problem.num_q_heads + item.head_begin) * params.max_blocks;
  for (int64_t i = 0; i < int64_t{item.head_count} * params.max_blocks; ++i) maxima[i] = -kInfinity;
  for (int32_t row = geometry.row_begin(item.tile); row < row_end; row += step) {
    const int32_t subtiles = make_subtiles(item, row, min(row + step, row_end), false, scratch.subtiles);
    for (int32_t i = 0; i < subtiles; ++i) {
      pack_queries(problem, params.q, item.sequence, scratch.subtiles[i], scale.factor, scratch.row,
                   scratch.queries + int64_t{i} * dim * kRows);
    }
    for (int32_t i = 0; i < subtiles * kRows; ++i) scratch.rows.met[i] = -kInfinity;
    for (int32_t visit = 0; visit < visible; ++visit) {
      const int32_t block = visited_block(visit, visible), first = block * problem.block_n;
      const int32_t block_end = min(first + problem.block_n, geometry.seqlen_k);
      for (int32_t i = 0; i < subtiles; ++i) clear_block(maxima_of(scratch.rows, i));
      for (int32_t key = first; key < block_end; key += kChunk) {
        const int32_t packed = min(kChunk, block_end - key);
        pack_keys(problem.dtype, problem.kv, params.k, item.sequence, item.kv_head, key, packed, dim, dim,
                  scratch.keys);
        for (int32_t i = 0; i < subtiles; ++i) {
          const Subtile& subtile = scratch.subtiles[i];
          const int32_t count =
              tile_logits(problem, scale, visibility, subtile, scratch.queries + int64_t{i} * dim * kRows, scratch.keys,
                          key, packed, scratch.s);
          add_logits(subtile.vectors, count, scratch.s, maxima_of(scratch.rows, i));
        }
      }
      for (int32_t i = 0; i < subtiles; ++i) {
        const Subtile& subtile = scratch.subtiles[i];
        const RowMaxima rows = maxima_of(scratch.rows, i);
        float* value = maxima + int64_t{subtile.mask_index} * params.max_blocks + block;
        *value = larger(*value, compared(params.form, problem.causal, subtile, first, rows));
        meet_block(subtile.vectors, rows);
      }
    }
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
