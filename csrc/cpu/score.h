// Scores of all (query tile, KV block) pairs of one tile, by the rules of params.h.
//
// kRelativeMax:   x[r, J] = cap(scale * q_r . kbar_J) for the rows r that see all of block J (causal: position >= the
//                 block's last token); E_J = sum over r of exp(x[r, J] - max of all x); score = E_J / max_J E_J. With
//                 kGroup the rows of all heads of the group are the rows of one tile.
// kPooled:        log2(e) * cap(scale * qbar . kbar_J), qbar = the tile's rows, pooled.
// kFlat64,
// kAntidiagonal:  score_groups.h. For these and kPooled, what becomes of logits and weights is select.cpp's.
//
// Tiling: the means are the keys of the attention micro-kernel, kChunk of them at a time. For kRelativeMax every
// (subtile, chunk) has its own maximum, so E_J is kept as a pair (exponent, sum) and merged; nothing overflows, and no
// row x block matrix exists. For kPooled the lanes of a vector are heads.
// Memory per worker: Q panels of pass_rows() rows, one K and one S panel, an exponent per (head, block); for groups of
// tokens also a second S panel, and for kAntidiagonal a pair of floats per (lane, block).
#pragma once

#include "pool.h"
#include "score_groups.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

static int64_t score_layout(const ScoreParams& params, float* base, ScoreScratch* scratch) {
  const Problem& problem = params.problem;
  const int32_t heads = heads_per_item(problem);
  const int64_t subtiles = int64_t{heads} * ((pass_rows_per_head(problem, heads) + kRows - 1) / kRows);
  const bool groups = params.rule == ScoreRule::kFlat64 || params.rule == ScoreRule::kAntidiagonal;
  const int64_t rows = params.rule == ScoreRule::kAntidiagonal ? kRows
                       : params.sharing == HeadSharing::kGroup ? 1
                                                               : heads_per_item(params);
  Arena arena{base};
  scratch->subtiles = reinterpret_cast<Subtile*>(arena.take(subtiles * int64_t{sizeof(Subtile)} / 4));
  scratch->queries = arena.take((groups ? 1 : subtiles) * problem.head_dim * kRows);
  scratch->exponents = arena.take(rows * params.max_blocks);
  scratch->keys = arena.take((kChunk + 1) * int64_t{problem.head_dim});
  scratch->s = arena.take((kChunk + 1) * kRows);
  scratch->row = arena.take(problem.head_dim + kLanes);
  scratch->mean = arena.take(problem.head_dim + kLanes);
  scratch->sums = arena.take(params.rule == ScoreRule::kAntidiagonal ? rows * params.max_blocks : kChunk);
  scratch->products = arena.take(groups ? kChunk * kRows : 0);
  return arena.next - base;
}

static int64_t score_scratch(const ScoreParams& params) {
  ScoreScratch scratch;
  float origin;
  return score_layout(params, &origin, &scratch);
}

static void pack_means(const ScoreParams& params, const TileItem& item, int32_t begin, int32_t count, float* keys) {
  const Problem& problem = params.problem;
  TensorView view;
  view.data = const_cast<void*>(params.summary);
  view.head_stride = problem.head_dim;
  view.token_stride = view.head_stride * problem.num_kv_heads;
  view.batch_stride = view.token_stride * params.max_blocks;
  pack_keys(problem.dtype, KvLayout{}, view, item.sequence, item.kv_head, begin, count, problem.head_dim,
            problem.head_dim, keys);
}

// Hides rows from blocks that they do not see whole, and unused lanes. Returns the largest logit left.
static __attribute__((noinline)) float mask_means(const Problem& problem, const SequenceGeometry& geometry,
                                                  const Subtile& subtile, int32_t first_block, int32_t count,
                                                  float* s) {
  Int lane = {};
  for (int32_t i = 0; i < kLanes; ++i) lane[i] = i;
  Float largest = splat(-kInfinity);
  for (int32_t n = 0; n < count; ++n) {
    const int32_t last_token = min((first_block + n + 1) * problem.block_n, geometry.seqlen_k) - 1;
    const bool hide = problem.causal && subtile.min_position < last_token;
    for (int32_t v = 0; v < subtile.vectors; ++v) {
      float* p = s + n * kRows + v * kLanes;
      Float x = load(p);
      Int sees = lane + v * kLanes < subtile.count;
      if (hide) sees &= load(subtile.position + v * kLanes) >= last_token;
      x = select(sees, x, splat(-kInfinity));
      store(p, x);
      largest = max(x, largest);
    }
  }
  return horizontal_max(largest);
}

// (exponent, sum) pairs of `count` blocks take in sums relative to `exponent`.
static __attribute__((noinline)) void merge_energies(int32_t count, float exponent, const float* sums, float* exponents,
                                                     float* energies) {
  for (int32_t n = 0; n < count; n += kLanes) {
    const int32_t used = min(kLanes, count - n);
    Float old_exponent = splat(-kInfinity), old_energy = {}, sum = {};
    for (int32_t i = 0; i < used; ++i) {
      old_exponent[i] = exponents[n + i];
      old_energy[i] = energies[n + i];
      sum[i] = sums[n + i];
    }
    const Float top = max(old_exponent, splat(exponent));
    const Float energy = old_energy * exp2(old_exponent - top) + sum * exp2(splat(exponent) - top);
    for (int32_t i = 0; i < used; ++i) {
      exponents[n + i] = top[i];
      energies[n + i] = energy[i];
    }
  }
}

// Energies over the whole tile become scores: relative to the largest of the `count` blocks.
static void normalise(int32_t count, const float* exponents, float* energies) {
  float top = -kInfinity;
  for (int32_t j = 0; j < count; ++j) top = exponents[j] > top ? exponents[j] : top;
  float largest = 0.0f;
  for (int32_t j = 0; j < count; ++j) {
    energies[j] = top == -kInfinity ? 0.0f : energies[j] * exp2(splat(exponents[j] - top))[0];
    largest = energies[j] > largest ? energies[j] : largest;
  }
  for (int32_t j = 0; j < count && largest > 0.0f; ++j) energies[j] /= largest;
}

// Adds the energies of the item's heads, at most heads_per_item(problem) of them; kGroup: to one row.
static void add_energies(const ScoreParams& params, const TileItem& item, const ScoreScratch& scratch, float* exponents,
                         float* scores) {
  const Problem& problem = params.problem;
  const SequenceGeometry& geometry = item.geometry;
  const LogitScale scale = logit_scale(problem);
  const bool group = params.sharing == HeadSharing::kGroup;
  const int32_t dim = problem.head_dim;
  const int32_t visible = geometry.visible_blocks(item.tile);
  const int32_t step = pass_rows_per_head(problem, heads_per_item(problem));
  const int32_t row_end = geometry.row_end(item.tile);
  for (int32_t row = geometry.row_begin(item.tile); row < row_end; row += step) {
    const int32_t subtiles = make_subtiles(item, row, min(row + step, row_end), group, scratch.subtiles);
    for (int32_t i = 0; i < subtiles; ++i) {
      pack_queries(problem, params.q, item.sequence, scratch.subtiles[i], scale.factor, scratch.row,
                   scratch.queries + int64_t{i} * dim * kRows);
    }
    for (int32_t block = 0; block < visible; block += kChunk) {
      const int32_t count = min(kChunk, visible - block);
      pack_means(params, item, block, count, scratch.keys);
      for (int32_t i = 0; i < subtiles; ++i) {
        const Subtile& subtile = scratch.subtiles[i];
        query_keys(subtile.vectors, scratch.keys, count, scratch.queries + int64_t{i} * dim * kRows, dim, scratch.s);
        if (scale.cap != 0.0f) cap_logits(scale.cap, subtile.vectors, count, scratch.s);
        const float largest = mask_means(problem, geometry, subtile, block, count, scratch.s);
        const Float base = splat(largest == -kInfinity ? 0.0f : largest);
        for (int32_t n = 0; n < count; ++n) {
          Float sum = {};
          for (int32_t v = 0; v < subtile.vectors; ++v) sum += exp2(load(scratch.s + n * kRows + v * kLanes) - base);
          scratch.sums[n] = horizontal_sum(sum);
        }
        const int64_t first = int64_t{subtile.mask_index} * params.max_blocks + block;
        if (largest == -kInfinity) {
          // Nothing to merge but a NaN that some row may have brought.
          for (int32_t n = 0; n < count; ++n) scores[first + n] += scratch.sums[n];
        } else {
          merge_energies(count, largest, scratch.sums, exponents + first, scores + first);
        }
      }
    }
  }
}

static void relative_max_tile(const ScoreParams& params, const TileItem& item, const ScoreScratch& scratch,
                              float* scores) {
  const bool group = params.sharing == HeadSharing::kGroup;
  const int32_t rows = group ? 1 : item.head_count;
  const int32_t step = heads_per_item(params.problem);
  for (int64_t i = 0; i < int64_t{rows} * params.max_blocks; ++i) {
    scores[i] = 0.0f;
    scratch.exponents[i] = -kInfinity;
  }
  for (int32_t first = 0; first < item.head_count; first += step) {
    TileItem part = item;
    part.head_begin += first;
    part.head_count = min(step, item.head_count - first);
    const int64_t row = group ? 0 : int64_t{first} * params.max_blocks;
    add_energies(params, part, scratch, scratch.exponents + row, scores + row);
  }
  const int32_t visible = item.geometry.visible_blocks(item.tile);
  for (int32_t h = 0; h < rows; ++h) {
    normalise(visible, scratch.exponents + int64_t{h} * params.max_blocks, scores + int64_t{h} * params.max_blocks);
  }
}

static void pooled_query_tile(const ScoreParams& params, const TileItem& item, const ScoreScratch& scratch,
                              float* scores) {
  const Problem& problem = params.problem;
  const SequenceGeometry& geometry = item.geometry;
  const LogitScale scale = logit_scale(problem);
  const int32_t dim = problem.head_dim;
  const int32_t visible = geometry.visible_blocks(item.tile);
  const int32_t row_begin = geometry.row_begin(item.tile), row_end = geometry.row_end(item.tile);
  const bool center = params.pooling == Pooling::kCenter;
  const int32_t first_row = center ? row_begin + (row_end - row_begin) / 2 : row_begin;
  const int32_t last_row = center ? first_row + 1 : row_end;
  const float inverse = params.pooling == Pooling::kMean ? 1.0f / static_cast<float>(row_end - row_begin) : 1.0f;
  for (int32_t first = 0; first < item.head_count; first += kRows) {
    const int32_t heads = min(kRows, item.head_count - first);
    const int32_t vectors = (heads + kLanes - 1) / kLanes;
    for (int32_t i = 0; i < dim * kRows; ++i) scratch.queries[i] = 0.0f;
    for (int32_t h = 0; h < heads; ++h) {
      for (int32_t d = 0; d < dim; ++d) scratch.mean[d] = 0.0f;
      for (int32_t row = first_row; row < last_row; ++row) {
        read_row(problem.dtype, query_address(problem, params.q, item.sequence, row, item.head_begin + first + h), dim,
                 scratch.row);
        pool_row(params.pooling, scratch.row, dim, scratch.mean);
      }
      for (int32_t d = 0; d < dim; ++d) scratch.queries[d * kRows + h] = scratch.mean[d] * inverse * scale.factor;
    }
    for (int32_t block = 0; block < visible; block += kChunk) {
      const int32_t count = min(kChunk, visible - block);
      pack_means(params, item, block, count, scratch.keys);
      query_keys(vectors, scratch.keys, count, scratch.queries, dim, scratch.s);
      if (scale.cap != 0.0f) cap_logits(scale.cap, vectors, count, scratch.s);
      for (int32_t h = 0; h < heads; ++h) {
        float* target = scores + int64_t{first + h} * params.max_blocks + block;
        for (int32_t n = 0; n < count; ++n) target[n] = scratch.s[n * kRows + h];
      }
    }
  }
}

static void score_tile(const ScoreParams& params, const TileItem& item, float* scratch_base, float* scores) {
  ScoreScratch scratch;
  score_layout(params, scratch_base, &scratch);
  switch (params.rule) {
    case ScoreRule::kRelativeMax:
      return relative_max_tile(params, item, scratch, scores);
    case ScoreRule::kPooled:
      return pooled_query_tile(params, item, scratch, scores);
    case ScoreRule::kFlat64:
      return flat64_tile(params, item, scratch, scores);
    case ScoreRule::kAntidiagonal:
      return antidiagonal_tile(params, item, scratch, scores);
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
