// Attention of a sequence's probe rows, its last queries, over one span of keys. Two passes:
//
//   maxima   statistics of each row: m = max of t, l = sum 2^(t - m), t = log2(e) * cap(scale * q . k)
//   spread   p = 2^(t - lse) with the LSE of all spans; vertical[key] = sum of p over the rows, and
//            slash[position - key] = sum of p along the diagonals
//
// Tiling as in attention.h without V: keys are packed once per item and shared by its heads. Subtiles hold rows of one
// head only, which follow each other: for one key their distances do too, so a diagonal sum is an addition of vectors
// to consecutive floats. Memory per worker: Q panels of pass_rows() rows, one K and one S panel.
#pragma once

#include "attention.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

struct ProbeScratch {
  Subtile* subtiles;
  float *queries, *keys, *s, *rescale, *row, *maxima, *sums;
};

static int64_t probe_layout(const ProbeParams& params, float* base, ProbeScratch* scratch) {
  const Problem& problem = params.problem;
  const int32_t heads = heads_per_item(problem);
  const int64_t subtiles = int64_t{heads} * ((pass_rows_per_head(problem, heads) + kRows - 1) / kRows);
  Arena arena{base};
  scratch->subtiles = reinterpret_cast<Subtile*>(arena.take(subtiles * int64_t{sizeof(Subtile)} / 4));
  scratch->queries = arena.take(subtiles * problem.head_dim * kRows);
  scratch->maxima = arena.take(subtiles * kRows);
  scratch->sums = arena.take(subtiles * kRows);
  scratch->keys = arena.take((kChunk + 1) * int64_t{problem.head_dim});
  scratch->s = arena.take((kChunk + 1) * kRows);
  scratch->rescale = arena.take(kRows);
  scratch->row = arena.take(problem.head_dim + kLanes);
  return arena.next - base;
}

static int64_t probe_scratch(const ProbeParams& params) {
  ProbeScratch scratch;
  float origin;
  return probe_layout(params, &origin, &scratch);
}

// Calls visit(subtile number, first key, keys) with the logits of every subtile and chunk of the span in scratch.s;
// begin(subtiles) before and end(subtiles) after each pass over the span.
template <typename Begin, typename Visit, typename End>
BSFA_INLINE void for_each_probe_chunk(const ProbeParams& params, const ProbeItem& item, const ProbeScratch& scratch,
                                      Begin begin, Visit visit, End end) {
  const Problem& problem = params.problem;
  const TileItem& tile = item.tile;
  const LogitScale scale = logit_scale(problem);
  Visibility visibility;
  visibility.upper = problem.causal;
  const int32_t dim = problem.head_dim;
  const int32_t step = pass_rows_per_head(problem, heads_per_item(problem));
  for (int32_t row = item.row_begin; row < tile.geometry.seqlen_q; row += step) {
    const int32_t row_end = min(row + step, tile.geometry.seqlen_q);
    const int32_t subtiles = make_subtiles(tile, row, row_end, false, scratch.subtiles);
    for (int32_t i = 0; i < subtiles; ++i) {
      pack_queries(problem, params.q, tile.sequence, scratch.subtiles[i], scale.factor, scratch.row,
                   scratch.queries + int64_t{i} * dim * kRows);
    }
    begin(subtiles);
    for (int32_t key = item.key_begin; key < item.key_end; key += kChunk) {
      const int32_t packed = min(kChunk, item.key_end - key);
      pack_keys(problem.dtype, problem.kv, params.k, tile.sequence, tile.kv_head, key, packed, dim, dim, scratch.keys);
      for (int32_t i = 0; i < subtiles; ++i) {
        const Subtile& subtile = scratch.subtiles[i];
        const int32_t count = visibility.upper ? min(packed, subtile.max_position - key + 1) : packed;
        if (count <= 0) continue;
        query_keys(subtile.vectors, scratch.keys, count, scratch.queries + int64_t{i} * dim * kRows, dim, scratch.s);
        if (scale.cap != 0.0f) cap_logits(scale.cap, subtile.vectors, count, scratch.s);
        if (visibility.upper && subtile.min_position < key + count - 1) {
          mask_logits(visibility, subtile, key, count, scratch.s);
        }
        visit(i, key, count);
      }
    }
    end(subtiles);
  }
}

// statistics[(head * rows + row) * 2]: m and l of the item's heads and rows.
static void probe_maxima(const ProbeParams& params, const ProbeItem& item, float* statistics, float* scratch_base) {
  ProbeScratch scratch;
  probe_layout(params, scratch_base, &scratch);
  const int32_t rows = item.tile.geometry.seqlen_q - item.row_begin;
  for_each_probe_chunk(
      params, item, scratch,
      [&](int32_t subtiles) {
        for (int64_t i = 0; i < int64_t{subtiles} * kRows; ++i) scratch.maxima[i] = -kInfinity;
        for (int64_t i = 0; i < int64_t{subtiles} * kRows; ++i) scratch.sums[i] = 0.0f;
      },
      [&](int32_t i, int32_t, int32_t count) {
        softmax_step(scratch.subtiles[i].vectors, count, scratch.s, scratch.maxima + i * kRows,
                     scratch.sums + i * kRows, scratch.rescale);
      },
      [&](int32_t subtiles) {
        for (int32_t i = 0; i < subtiles; ++i) {
          const Subtile& subtile = scratch.subtiles[i];
          for (int32_t lane = 0; lane < subtile.count; ++lane) {
            const int32_t head = subtile.head[lane] - item.tile.head_begin;
            float* pair = statistics + 2 * (int64_t{head} * rows + subtile.row[lane] - item.row_begin);
            pair[0] = scratch.maxima[i * kRows + lane];
            pair[1] = scratch.sums[i * kRows + lane];
          }
        }
      });
}

// Makes probabilities of the logits of one subtile; adds them up per key and, where `slash` is not null, along the
// diagonals: slash[lane - n] belongs to key n of the chunk.
static __attribute__((noinline)) void spread_chunk(int32_t vectors, int32_t count, const float* s, const float* lse,
                                                   float* vertical, float* slash) {
  for (int32_t n = 0; n < count; ++n) {
    Float total = {};
    for (int32_t v = 0; v < vectors; ++v) {
      const Float base = load(lse + v * kLanes);
      // Unused lanes and rows that see nothing have base +inf; a logit of NaN must not come of them.
      const Float p = select(base == kInfinity, Float{}, exp2(load(s + n * kRows + v * kLanes) - base));
      total += p;
      if (slash != nullptr) {
        float* target = slash + v * kLanes - n;
        store(target, load(target) + p);
      }
    }
    vertical[n] += horizontal_sum(total);
  }
}

// lse[head * rows + row], base 2, +inf where nothing is seen. vertical[head * max_seqlen + key] of the span's keys and
// slash[head * slash_stride + distance - first_distance()] become sums over the rows; both must be zeros before.
static void probe_spread(const ProbeParams& params, const ProbeItem& item, const float* lse, float* vertical,
                         float* slash, int64_t slash_stride, float* scratch_base) {
  ProbeScratch scratch;
  probe_layout(params, scratch_base, &scratch);
  const int32_t rows = item.tile.geometry.seqlen_q - item.row_begin;
  for_each_probe_chunk(
      params, item, scratch,
      [&](int32_t subtiles) {
        for (int32_t i = 0; i < subtiles; ++i) {
          const Subtile& subtile = scratch.subtiles[i];
          for (int32_t lane = 0; lane < kRows; ++lane) {
            float base = kInfinity;
            if (lane < subtile.count) {
              const int32_t head = subtile.head[lane] - item.tile.head_begin;
              base = lse[int64_t{head} * rows + subtile.row[lane] - item.row_begin];
            }
            scratch.sums[i * kRows + lane] = base;
          }
        }
      },
      [&](int32_t i, int32_t key, int32_t count) {
        const Subtile& subtile = scratch.subtiles[i];
        const int64_t head = subtile.head[0] - item.tile.head_begin;
        float* diagonals = nullptr;
        if (params.problem.causal) {
          diagonals = slash + head * slash_stride + (subtile.position[0] - key - item.first_distance());
        }
        spread_chunk(subtile.vectors, count, scratch.s, scratch.sums + i * kRows,
                     vertical + head * params.problem.kv.max_seqlen + key, diagonals);
      },
      [](int32_t) {});
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
