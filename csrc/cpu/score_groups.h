// Scores from groups of tokens, paired token by token: no summary, the keys themselves.
//
// Both rules need P[g, r] = sum over t < size of q[size * g + t'] . k[size * r + t] for the query groups g of a tile
// and all key groups r, with t' = t (kFlat64, size 64) or size - 1 - t (kAntidiagonal, size = stride). Groups lie at
// absolute positions; tokens that the call or the sequence lacks count as zeros, groups without any token are left out.
//
//   kFlat64        max over the pairs of groups of a (tile, block), times scale / 64, capped: base-2 logits
//   kAntidiagonal  x = cap(scale / stride * P); the softmax of each query group over the key groups (causal: r <= g),
//                  summed over the groups of a block and over the tile's query groups: weights
//
// Tiling: lanes are (head, query group) pairs, kRows at a time, kChunk key groups at a time. For each t the
// micro-kernel multiplies one token of every group; the products are added up in float32. The softmax needs no second
// pass: each (lane, block) keeps its maximum and its sum relative to it.
#pragma once

#include "pack.h"
#include "product.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

struct ScoreScratch {
  Subtile* subtiles;
  float *queries, *exponents, *keys, *s, *row, *mean, *sums, *products;
};

// The (head, query group) pairs of an item, in this order, with a token of the call: calls visit(lanes) for kRows of
// them at a time. lanes.row: row of the group's first token, which may lie outside of the call; lanes.position: the
// group's absolute number.
template <typename Visit>
BSFA_INLINE void for_each_group(const TileItem& item, int32_t size, Subtile* lanes, Visit visit) {
  const SequenceGeometry& geometry = item.geometry;
  const int32_t offset = geometry.offset();
  const int32_t first = floor_div(offset + geometry.row_begin(item.tile), size);
  const int32_t last = floor_div(offset + geometry.row_end(item.tile) - 1, size);
  lanes->count = 0;
  for (int32_t h = 0; h < item.head_count; ++h) {
    for (int32_t g = first; g <= last; ++g) {
      const int32_t lane = lanes->count++;
      lanes->head[lane] = item.head_begin + h;
      lanes->row[lane] = g * size - offset;
      lanes->position[lane] = g;
      if (lanes->count < kRows && !(h == item.head_count - 1 && g == last)) continue;
      lanes->vectors = (lanes->count + kLanes - 1) / kLanes;
      for (int32_t i = lanes->count; i < kRows; ++i) lanes->position[i] = g;
      visit(*lanes);
      lanes->count = 0;
    }
  }
}

// products[n][lane] = P[lane's group, first + n], n < count.
static __attribute__((noinline)) void group_products(const ScoreParams& params, const TileItem& item,
                                                     const Subtile& lanes, int32_t size, bool reversed, int32_t first,
                                                     int32_t count, const ScoreScratch& scratch) {
  const Problem& problem = params.problem;
  const SequenceGeometry& geometry = item.geometry;
  const int32_t dim = problem.head_dim, width = lanes.vectors * kLanes;
  for (int32_t n = 0; n < count; ++n) {
    for (int32_t v = 0; v < width; v += kLanes) store(scratch.products + n * kRows + v, Float{});
  }
  for (int32_t t = 0; t < size; ++t) {
    // Only the last group can end before its token t.
    const int32_t present = (first + count - 1) * size + t < geometry.seqlen_k ? count : count - 1;
    if (present == 0) break;
    for (int32_t lane = 0; lane < width; ++lane) {
      const int32_t row = lane < lanes.count ? lanes.row[lane] + (reversed ? size - 1 - t : t) : -1;
      if (row >= 0 && row < geometry.seqlen_q) {
        read_row(problem.dtype, query_address(problem, params.q, item.sequence, row, lanes.head[lane]), dim,
                 scratch.row);
        for (int32_t d = 0; d < dim; ++d) scratch.queries[d * kRows + lane] = scratch.row[d];
      } else {
        for (int32_t d = 0; d < dim; ++d) scratch.queries[d * kRows + lane] = 0.0f;
      }
    }
    for (int32_t n = 0; n < present; ++n) {
      pack_keys(problem.dtype, problem.kv, params.k, item.sequence, item.kv_head, (first + n) * size + t, 1, dim, dim,
                scratch.keys + n * dim);
    }
    query_keys(lanes.vectors, scratch.keys, present, scratch.queries, dim, scratch.s);
    for (int32_t n = 0; n < present; ++n) {
      for (int32_t v = 0; v < width; v += kLanes) {
        float* sum = scratch.products + n * kRows + v;
        store(sum, load(sum) + load(scratch.s + n * kRows + v));
      }
    }
  }
}

// Key groups that a tile may look at.
BSFA_INLINE int32_t visible_groups(const TileItem& item, int32_t size) {
  const int64_t tokens = int64_t{item.geometry.visible_blocks(item.tile)} * item.geometry.block_n;
  return ceil_div(tokens < item.geometry.seqlen_k ? static_cast<int32_t>(tokens) : item.geometry.seqlen_k, size);
}

static void flat64_tile(const ScoreParams& params, const TileItem& item, const ScoreScratch& scratch, float* scores) {
  constexpr int32_t kSize = 64;
  const LogitScale scale = logit_scale(params.problem);
  const int32_t visible = item.geometry.visible_blocks(item.tile);
  const int32_t groups = visible_groups(item, kSize), per_block = params.problem.block_n / kSize;
  for (int32_t h = 0; h < item.head_count; ++h) {
    for (int32_t j = 0; j < visible; ++j) scores[int64_t{h} * params.max_blocks + j] = -kInfinity;
  }
  for_each_group(item, kSize, scratch.subtiles, [&](const Subtile& lanes) {
    for (int32_t first = 0; first < groups; first += kChunk) {
      const int32_t count = min(kChunk, groups - first);
      group_products(params, item, lanes, kSize, false, first, count, scratch);
      for (int32_t n = 0; n < count; ++n) {
        for (int32_t lane = 0; lane < lanes.count; ++lane) {
          float& best =
              scores[int64_t{lanes.head[lane] - item.head_begin} * params.max_blocks + (first + n) / per_block];
          const float x = scratch.products[n * kRows + lane];
          if (x > best || x != x) best = x;  // a NaN stays
        }
      }
    }
  });
  const float factor = scale.factor / kSize;
  for (int32_t h = 0; h < item.head_count; ++h) {
    for (int32_t j = 0; j < visible; ++j) {
      float& logit = scores[int64_t{h} * params.max_blocks + j];
      logit *= factor;
      if (scale.cap != 0.0f) logit = (tanh(splat(logit)) * scale.cap)[0];
    }
  }
}

// Blocks' maxima and sums [block][kRows] take in the logits x[n][lane] of key groups first + n.
static __attribute__((noinline)) void add_groups(int32_t vectors, const float* x, int32_t first, int32_t count,
                                                 int32_t per_block, float* exponents, float* sums) {
  for (int32_t begin = 0; begin < count;) {
    const int32_t block = (first + begin) / per_block;
    const int32_t end = min(count, (block + 1) * per_block - first);
    for (int32_t v = 0; v < vectors; ++v) {
      float* exponent = exponents + int64_t{block} * kRows + v * kLanes;
      float* sum = sums + int64_t{block} * kRows + v * kLanes;
      const Float old = load(exponent);
      Float top = old;
      for (int32_t n = begin; n < end; ++n) top = max(load(x + n * kRows + v * kLanes), top);
      const Float base = select(top == -kInfinity, Float{}, top);
      Float total = load(sum) * exp2(old - base);
      for (int32_t n = begin; n < end; ++n) total += exp2(load(x + n * kRows + v * kLanes) - base);
      store(exponent, top);
      store(sum, total);
    }
    begin = end;
  }
}

// Blocks' maxima and sums become the lanes' shares of each block, in `sums`.
static __attribute__((noinline)) void share_blocks(int32_t vectors, int32_t blocks, const float* exponents,
                                                   float* sums) {
  for (int32_t v = 0; v < vectors; ++v) {
    Float top = splat(-kInfinity), total = {};
    for (int32_t j = 0; j < blocks; ++j) top = max(load(exponents + int64_t{j} * kRows + v * kLanes), top);
    const Float base = select(top == -kInfinity, Float{}, top);
    for (int32_t j = 0; j < blocks; ++j) {
      float* sum = sums + int64_t{j} * kRows + v * kLanes;
      const Float x = load(sum) * exp2(load(exponents + int64_t{j} * kRows + v * kLanes) - base);
      store(sum, x);
      total += x;
    }
    for (int32_t j = 0; j < blocks; ++j) {
      float* sum = sums + int64_t{j} * kRows + v * kLanes;
      store(sum, load(sum) / total);
    }
  }
}

static void antidiagonal_tile(const ScoreParams& params, const TileItem& item, const ScoreScratch& scratch,
                              float* scores) {
  const int32_t size = params.stride;
  const LogitScale scale = logit_scale(params.problem);
  const float factor = scale.factor / static_cast<float>(size);
  const int32_t visible = item.geometry.visible_blocks(item.tile);
  const int32_t groups = visible_groups(item, size), per_block = params.problem.block_n / size;
  for (int32_t h = 0; h < item.head_count; ++h) {
    for (int32_t j = 0; j < visible; ++j) scores[int64_t{h} * params.max_blocks + j] = 0.0f;
  }
  for_each_group(item, size, scratch.subtiles, [&](const Subtile& lanes) {
    for (int64_t i = 0; i < int64_t{visible} * kRows; ++i) {
      scratch.exponents[i] = -kInfinity;
      scratch.sums[i] = 0.0f;
    }
    for (int32_t first = 0; first < groups; first += kChunk) {
      const int32_t count = min(kChunk, groups - first);
      group_products(params, item, lanes, size, true, first, count, scratch);
      for (int32_t n = 0; n < count; ++n) {
        for (int32_t v = 0; v < lanes.vectors; ++v) {
          float* p = scratch.products + n * kRows + v * kLanes;
          Float x = load(p) * factor;
          if (scale.cap != 0.0f) x = tanh(x) * scale.cap;
          if (params.problem.causal) {
            x = select(load(lanes.position + v * kLanes) >= first + n, x, splat(-kInfinity));
          }
          store(p, x);
        }
      }
      add_groups(lanes.vectors, scratch.products, first, count, per_block, scratch.exponents, scratch.sums);
    }
    share_blocks(lanes.vectors, visible, scratch.exponents, scratch.sums);
    for (int32_t lane = 0; lane < lanes.count; ++lane) {
      float* weights = scores + int64_t{lanes.head[lane] - item.head_begin} * params.max_blocks;
      for (int32_t j = 0; j < visible; ++j) weights[j] += scratch.sums[int64_t{j} * kRows + lane];
    }
  });
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
