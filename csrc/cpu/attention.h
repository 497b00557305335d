// Attention of one query tile over its kept KV blocks, exact, with the log-sum-exp.
//
//   t = log2(e) * cap(scale * q . k) for visible (row, key) pairs of kept blocks; m = running max of t
//   l = sum 2^(t - m);  O = sum 2^(t - m) v / l;  LSE = ln(2) * m + ln(l);  nothing seen: O = 0, LSE = -inf
//
// Tiling: K and V of a kept block are packed to float32 once per item, in chunks of kChunk keys, and used by all
// subtiles (kRows query rows as vector lanes) of all heads that keep the block. Max, sum and rescaling are per lane, so
// there is no reduction across lanes, and a row's bits do not depend on which rows share its vector.
// Masks are applied only to chunks that some row sees in part, as -inf on the logits. A hidden key then weighs 0, but
// 0 * NaN is NaN: chunks whose values are not all finite take a slower path that looks at visibility again.
// A token mask hides keys of single rows in the same way.
// Mean correction: the blocks that a mask drops and that every row of the tile sees whole follow as keys of their own,
// one mean key and value each, gathered kChunk at a time; log2 of their number of tokens is added to t.
// Memory per worker: Q and O panels of pass_rows() rows, one K, V and S panel of kChunk keys.
#pragma once

#include "pack.h"
#include "product.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

// Keys that a row at position p sees: [p - left, p] where limited, else all.
struct Visibility {
  bool upper = false;
  bool lower = false;
  int32_t left = 0;
};

BSFA_INLINE Int visible_lanes(const Visibility& visibility, Int position, int32_t key) {
  Int visible = splat(-1);
  if (visibility.upper) visible &= position >= key;
  if (visibility.lower) visible &= position - visibility.left <= key;
  return visible;
}

// The words of a token mask, of each lane's query row; a lane without a row sees nothing.
struct TokenRows {
  const int32_t* row[kRows];
};

static void find_token_rows(const AttentionParams& params, int32_t sequence, const Subtile& subtile,
                            TokenRows* tokens) {
  const int32_t* starts = params.problem.query.cu_seqlens;
  const int32_t* first = params.token_words + (starts != nullptr ? starts[sequence] * params.token_row_stride
                                                                 : sequence * params.token_batch_stride);
  for (int32_t i = 0; i < kRows; ++i) {
    tokens->row[i] = i < subtile.count ? first + subtile.row[i] * params.token_row_stride : nullptr;
  }
}

// Word `word` of the rows of vector `v`.
BSFA_INLINE Int token_words(const TokenRows& tokens, int32_t v, int32_t word) {
  Int words = {};
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const int32_t* row = tokens.row[v * kLanes + lane];
    words[lane] = row != nullptr ? row[word] : 0;
  }
  return words;
}

// All bits of the lanes whose word has this bit.
BSFA_INLINE Int lanes_with_bit(Int words, int32_t bit) { return -(Int)(((Uint)words >> bit) & 1u); }

static __attribute__((noinline)) void mask_tokens(const TokenRows& tokens, int32_t vectors, int32_t first_key,
                                                  int32_t count, float* s) {
  for (int32_t v = 0; v < vectors; ++v) {
    Int words = token_words(tokens, v, first_key / 32);
    for (int32_t n = 0; n < count; ++n) {
      const int32_t key = first_key + n;
      if (key % 32 == 0) words = token_words(tokens, v, key / 32);
      float* p = s + n * kRows + v * kLanes;
      store(p, select(lanes_with_bit(words, key % 32), load(p), splat(-kInfinity)));
    }
  }
}

static __attribute__((noinline)) void mask_logits(const Visibility& visibility, const Subtile& subtile,
                                                  int32_t first_key, int32_t count, float* s) {
  for (int32_t v = 0; v < subtile.vectors; ++v) {
    const Int position = load(subtile.position + v * kLanes);
    for (int32_t n = 0; n < count; ++n) {
      float* p = s + n * kRows + v * kLanes;
      store(p, select(visible_lanes(visibility, position, first_key + n), load(p), splat(-kInfinity)));
    }
  }
}

// s becomes 2^(s - max); the running max and sum move on; rescale = 2^(old max - new max).
static __attribute__((noinline)) void softmax_step(int32_t vectors, int32_t count, float* s, float* running_max,
                                                   float* running_sum, float* rescale) {
  for (int32_t v = 0; v < vectors; ++v) {
    float* column = s + v * kLanes;
    const Float old_max = load(running_max + v * kLanes);
    Float max0 = old_max, max1 = old_max;
    int32_t n = 0;
    for (; n + 2 <= count; n += 2) {
      max0 = max(load(column + n * kRows), max0);
      max1 = max(load(column + (n + 1) * kRows), max1);
    }
    if (n < count) max0 = max(load(column + n * kRows), max0);
    const Float new_max = max(max0, max1);
    const Float base = select(new_max == -kInfinity, Float{}, new_max);
    const Float factor = exp2_small(old_max - base);
    Float sum = load(running_sum + v * kLanes) * factor;
    for (n = 0; n < count; ++n) {
      const Float p = exp2_small(load(column + n * kRows) - base);
      sum += p;
      store(column + n * kRows, p);
    }
    store(running_max + v * kLanes, new_max);
    store(running_sum + v * kLanes, sum);
    store(rescale + v * kLanes, factor);
  }
}

static __attribute__((noinline)) bool all_finite(const float* panel, int64_t count) {
  Float sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += load(panel + i) * 0.0f;
  float sum = horizontal_sum(sums);
  for (; i < count; ++i) sum += panel[i] * 0.0f;
  return sum == 0.0f;
}

// add_values for values that are not finite: hidden keys are left out, not multiplied by zero.
static __attribute__((noinline)) void add_visible_values(const Visibility& visibility, const TokenRows* tokens,
                                                         const Subtile& subtile, int32_t first_key, const float* values,
                                                         int32_t stride, int32_t count, const float* p,
                                                         const float* rescale, float* o) {
  for (int32_t v = 0; v < subtile.vectors; ++v) {
    const Int position = load(subtile.position + v * kLanes);
    for (int32_t d = 0; d < stride; ++d) {
      float* target = o + d * kRows + v * kLanes;
      Float sum = load(target) * load(rescale + v * kLanes);
      for (int32_t n = 0; n < count; ++n) {
        const Float next = sum + values[int64_t{n} * stride + d] * load(p + n * kRows + v * kLanes);
        Int visible = visible_lanes(visibility, position, first_key + n);
        if (tokens != nullptr) {
          visible &= lanes_with_bit(token_words(*tokens, v, (first_key + n) / 32), (first_key + n) % 32);
        }
        sum = select(visible, next, sum);
      }
      store(target, sum);
    }
  }
}

// The logits of means: a key that stands for n tokens counts n times.
static __attribute__((noinline)) void add_log_counts(const float* log_counts, int32_t vectors, int32_t count,
                                                     float* s) {
  for (int32_t n = 0; n < count; ++n) {
    for (int32_t v = 0; v < vectors; ++v) {
      float* p = s + n * kRows + v * kLanes;
      store(p, load(p) + log_counts[n]);
    }
  }
}

struct AttentionScratch {
  Subtile* subtiles;
  float *queries, *outputs, *running_max, *running_sum;  // per subtile
  float *keys, *values, *s, *rescale, *row;
};

// Lays the scratch out from `base` (null: only counts). Returns the floats used.
static int64_t attention_layout(const AttentionParams& params, float* base, AttentionScratch* scratch) {
  const Problem& problem = params.problem;
  const int32_t heads = heads_per_item(problem);
  const int32_t rows = pass_rows_per_head(problem, heads);
  const int64_t subtiles = int64_t{heads} * ((rows + kRows - 1) / kRows);
  const int64_t dim = problem.head_dim, dim_v = round_up(problem.head_dim_v, 2);
  Arena arena{base};
  scratch->subtiles = reinterpret_cast<Subtile*>(arena.take(subtiles * int64_t{sizeof(Subtile)} / 4));
  scratch->queries = arena.take(subtiles * dim * kRows);
  scratch->outputs = arena.take(subtiles * dim_v * kRows);
  scratch->running_max = arena.take(subtiles * kRows);
  scratch->running_sum = arena.take(subtiles * kRows);
  scratch->keys = arena.take((kChunk + 1) * dim);
  scratch->values = arena.take(kChunk * dim_v);
  scratch->s = arena.take((kChunk + 1) * kRows);
  scratch->rescale = arena.take(kRows);
  scratch->row = arena.take(max(problem.head_dim, problem.head_dim_v) + kLanes);
  return arena.next - base;
}

static int64_t attention_scratch(const AttentionParams& params) {
  AttentionScratch scratch;
  float origin;
  return attention_layout(params, &origin, &scratch);
}

static void store_outputs(const AttentionParams& params, int32_t sequence, const Subtile& subtile, const float* o,
                          const float* running_max, const float* running_sum, float* row) {
  const Problem& problem = params.problem;
  for (int32_t i = 0; i < subtile.count; ++i) {
    const float sum = running_sum[i];
    const float inverse = 1.0f / sum;
    const bool empty = sum == 0.0f;
    for (int32_t d = 0; d < problem.head_dim_v; ++d) row[d] = empty ? 0.0f : o[d * kRows + i] * inverse;
    write_row(problem.dtype, row, problem.head_dim_v,
              query_address(problem, params.out, sequence, subtile.row[i], subtile.head[i]));
    if (params.lse != nullptr) {
      params.lse[lse_index(problem, params.lse_batch_stride, params.lse_head_stride, sequence, subtile.row[i],
                           subtile.head[i])] = empty ? -kInfinity : kLn2 * running_max[i] + __builtin_logf(sum);
    }
  }
}

// Everything one subtile does with one chunk of packed keys and values.
static void attend_chunk(const AttentionParams& params, int32_t sequence, const LogitScale& scale,
                         const Visibility& visibility, const AttentionScratch& scratch, int32_t index,
                         int32_t first_key, int32_t packed, int32_t* finite) {
  const Problem& problem = params.problem;
  const Subtile& subtile = scratch.subtiles[index];
  int32_t count = packed;
  if (visibility.upper) count = min(count, subtile.max_position - first_key + 1);
  if (count <= 0 || (visibility.lower && first_key + count - 1 < subtile.min_position - visibility.left)) return;
  const int32_t dim = problem.head_dim, dim_v = round_up(problem.head_dim_v, 2);
  float* o = scratch.outputs + int64_t{index} * dim_v * kRows;
  query_keys(subtile.vectors, scratch.keys, count, scratch.queries + int64_t{index} * dim * kRows, dim, scratch.s);
  if (scale.cap != 0.0f) cap_logits(scale.cap, subtile.vectors, count, scratch.s);
  const bool cut = (visibility.upper && subtile.min_position < first_key + count - 1) ||
                   (visibility.lower && subtile.max_position - visibility.left > first_key);
  if (cut) mask_logits(visibility, subtile, first_key, count, scratch.s);
  TokenRows rows;
  const TokenRows* tokens = nullptr;
  if (params.token_words != nullptr) {
    find_token_rows(params, sequence, subtile, &rows);
    mask_tokens(rows, subtile.vectors, first_key, count, scratch.s);
    tokens = &rows;
  }
  softmax_step(subtile.vectors, count, scratch.s, scratch.running_max + index * kRows,
               scratch.running_sum + index * kRows, scratch.rescale);
  if (cut || tokens != nullptr) {
    if (*finite < 0) *finite = all_finite(scratch.values, int64_t{packed} * dim_v);
    if (*finite == 0) {
      return add_visible_values(visibility, tokens, subtile, first_key, scratch.values, dim_v, count, scratch.s,
                                scratch.rescale, o);
    }
  }
  add_values(subtile.vectors, scratch.values, dim_v, count, scratch.s, scratch.rescale, o);
}

// Adds the means of the blocks that `mask` (number `mask_index` of the item) drops, of the first `blocks`, to the
// subtiles that it applies to.
static void add_means(const AttentionParams& params, const LogitScale& scale, const TileItem& item, int32_t blocks,
                      const int32_t* mask, int32_t mask_index, const AttentionScratch& scratch, int32_t subtiles) {
  const Problem& problem = params.problem;
  const int32_t dim = problem.head_dim, dim_v = round_up(problem.head_dim_v, 2);
  const int64_t max_blocks = ceil_div(problem.kv.max_seqlen, problem.block_n), heads = problem.num_kv_heads;
  TensorView keys{const_cast<void*>(params.k_means), max_blocks * heads * dim, heads * dim, dim};
  TensorView values{const_cast<void*>(params.v_means), max_blocks * heads * problem.head_dim_v,
                    heads * problem.head_dim_v, problem.head_dim_v};
  float log_counts[kChunk];
  int32_t block = 0;
  while (block < blocks) {
    int32_t count = 0;
    for (; block < blocks && count < kChunk; ++block) {
      if ((static_cast<uint32_t>(mask[block / 32]) >> (block % 32) & 1u) != 0) continue;
      pack_keys(problem.dtype, KvLayout{}, keys, item.sequence, item.kv_head, block, 1, dim, dim,
                scratch.keys + int64_t{count} * dim);
      pack_keys(problem.dtype, KvLayout{}, values, item.sequence, item.kv_head, block, 1, problem.head_dim_v, dim_v,
                scratch.values + int64_t{count} * dim_v);
      const int32_t tokens = min(problem.block_n, item.geometry.seqlen_k - block * problem.block_n);
      log_counts[count++] = kLog2E * __builtin_logf(static_cast<float>(tokens));
    }
    if (count == 0) return;
    for (int32_t i = 0; i < subtiles; ++i) {
      const Subtile& subtile = scratch.subtiles[i];
      if (subtile.mask_index != mask_index) continue;
      query_keys(subtile.vectors, scratch.keys, count, scratch.queries + int64_t{i} * dim * kRows, dim, scratch.s);
      if (scale.cap != 0.0f) cap_logits(scale.cap, subtile.vectors, count, scratch.s);
      add_log_counts(log_counts, subtile.vectors, count, scratch.s);
      softmax_step(subtile.vectors, count, scratch.s, scratch.running_max + i * kRows, scratch.running_sum + i * kRows,
                   scratch.rescale);
      add_values(subtile.vectors, scratch.values, dim_v, count, scratch.s, scratch.rescale,
                 scratch.outputs + int64_t{i} * dim_v * kRows);
    }
  }
}

static void attention_tile(const AttentionParams& params, const TileItem& item, float* scratch_base) {
  const Problem& problem = params.problem;
  const SequenceGeometry& geometry = item.geometry;
  AttentionScratch scratch;
  attention_layout(params, scratch_base, &scratch);
  const LogitScale scale = logit_scale(problem);
  Visibility visibility;
  visibility.lower = params.window_left >= 0;
  visibility.upper = problem.causal || visibility.lower;
  visibility.left = min(params.window_left, 1 << 30);
  const int32_t dim = problem.head_dim, dim_v = round_up(problem.head_dim_v, 2);
  // The rows of the mask that the item's heads read.
  const int32_t group = problem.num_q_heads / problem.num_kv_heads;
  const bool per_head = params.words != nullptr && params.mask_heads == problem.num_q_heads && group > 1;
  const int32_t masks = per_head ? item.head_count : 1;
  const int32_t mask_head = params.mask_heads == problem.num_q_heads    ? item.head_begin
                            : params.mask_heads == problem.num_kv_heads ? item.kv_head
                                                                        : 0;
  const int32_t* words = params.words == nullptr
                             ? nullptr
                             : params.words + (item.mask_row * params.mask_heads + mask_head) * params.num_words;
  const bool corrected = words != nullptr && params.k_means != nullptr && params.v_means != nullptr;
  const int32_t whole_blocks = corrected ? geometry.whole_blocks(item.tile) : 0;  // of the tile, not of a pass
  const int32_t step = pass_rows_per_head(problem, heads_per_item(problem));
  const int32_t row_end = geometry.row_end(item.tile);
  for (int32_t row = geometry.row_begin(item.tile); row < row_end; row += step) {
    const int32_t subtiles = make_subtiles(item, row, min(row + step, row_end), !per_head, scratch.subtiles);
    for (int32_t i = 0; i < subtiles; ++i) {
      pack_queries(problem, params.q, item.sequence, scratch.subtiles[i], scale.factor, scratch.row,
                   scratch.queries + int64_t{i} * dim * kRows);
    }
    for (int64_t i = 0; i < int64_t{subtiles} * dim_v * kRows; ++i) scratch.outputs[i] = 0.0f;
    for (int64_t i = 0; i < int64_t{subtiles} * kRows; ++i) scratch.running_max[i] = -kInfinity;
    for (int64_t i = 0; i < int64_t{subtiles} * kRows; ++i) scratch.running_sum[i] = 0.0f;

    int32_t first_block = 0, end_block = geometry.visible_blocks(item.tile);
    if (visibility.upper) {
      const int32_t last_key = geometry.offset() + min(row + step, row_end) - 1;
      end_block = last_key < 0 ? 0 : min(end_block, last_key / problem.block_n + 1);
    }
    if (visibility.lower) {
      const int32_t first_key = geometry.offset() + row - visibility.left;
      first_block = first_key > 0 ? first_key / problem.block_n : 0;
    }
    for (int32_t block = first_block; block < end_block; ++block) {
      if (words != nullptr) {
        uint32_t kept = 0;
        for (int32_t m = 0; m < masks; ++m) kept |= static_cast<uint32_t>(words[m * params.num_words + block / 32]);
        if (kept == 0) block |= 31;  // on to the next word
        if ((kept >> (block % 32) & 1u) == 0) continue;
      }
      const int32_t block_end = min((block + 1) * problem.block_n, geometry.seqlen_k);
      for (int32_t key = block * problem.block_n; key < block_end; key += kChunk) {
        const int32_t count = min(kChunk, block_end - key);
        pack_keys(problem.dtype, problem.kv, params.k, item.sequence, item.kv_head, key, count, dim, dim, scratch.keys);
        pack_keys(problem.dtype, problem.kv, params.v, item.sequence, item.kv_head, key, count, problem.head_dim_v,
                  dim_v, scratch.values);
        int32_t finite = -1;
        for (int32_t i = 0; i < subtiles; ++i) {
          if (per_head) {
            const int32_t* mask = words + scratch.subtiles[i].mask_index * params.num_words;
            if ((static_cast<uint32_t>(mask[block / 32]) >> (block % 32) & 1u) == 0) continue;
          }
          attend_chunk(params, item.sequence, scale, visibility, scratch, i, key, count, &finite);
        }
      }
    }
    for (int32_t m = 0; whole_blocks > 0 && m < masks; ++m) {
      add_means(params, scale, item, whole_blocks, words + m * params.num_words, m, scratch, subtiles);
    }
    for (int32_t i = 0; i < subtiles; ++i) {
      store_outputs(params, item.sequence, scratch.subtiles[i], scratch.outputs + int64_t{i} * dim_v * kRows,
                    scratch.running_max + i * kRows, scratch.running_sum + i * kRows, scratch.row);
    }
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
