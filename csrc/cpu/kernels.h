// The seam between the drivers (operations.cpp, select.cpp: ordinary C++, compiled once) and the kernels (compiled once
// per instruction set). A kernel handles one work item on one thread; it sees plain structs and a scratch buffer, calls
// no standard library template, and reaches the drivers only through the table below. That way no inline function that
// was compiled with AVX-512 can be merged by the linker with the one that an older machine runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bsfa/geometry.h"
#include "bsfa/keep.h"
#include "bsfa/params.h"

namespace bsfa::cpu {

// One query tile of one KV head; heads [head_begin, head_begin + head_count) all read kv_head.
struct TileItem {
  SequenceGeometry geometry;
  int32_t sequence = 0;
  int32_t tile = 0;  // local index
  int32_t kv_head = 0;
  int32_t head_begin = 0;
  int32_t head_count = 0;
  int64_t mask_row = 0;  // row of masks, scores and mass
  int64_t weight = 0;    // amount of work, for the order only
};

// The probe rows of one sequence, [row_begin, seqlen_q), of one group of heads, against a span of keys.
struct ProbeItem {
  TileItem tile;  // its tile, mask_row and weight are not used
  int32_t row_begin = 0;
  int32_t key_begin = 0;
  int32_t key_end = 0;

  // The least distance of a row from a key of the span; may be negative. Causal only.
  int32_t first_distance() const { return tile.geometry.offset() + row_begin - (key_end - 1); }
};

// Floats that probe_spread may add zeros to after the last distance: a subtile of the widest vectors.
constexpr int32_t kProbePadding = 64;

// Query rows, over all heads of an item, whose state a kernel keeps at a time (a tile of more rows takes several passes
// over its blocks). The state of a row is D + Dv floats; together at most 512 KiB.
constexpr int32_t pass_rows(int32_t head_dim, int32_t head_dim_v) { return head_dim + head_dim_v > 256 ? 256 : 512; }

constexpr int32_t pass_rows_per_head(const Problem& problem, int32_t head_count) {
  const int32_t rows = pass_rows(problem.head_dim, problem.head_dim_v) / head_count;
  return rows < problem.block_m ? (rows > 0 ? rows : 1) : problem.block_m;
}

// How many heads of a group one item takes: they share the packed keys and values.
constexpr int32_t heads_per_item(const Problem& problem) {
  const int32_t group = problem.num_q_heads / problem.num_kv_heads;
  const int32_t heads = pass_rows(problem.head_dim, problem.head_dim_v) / problem.block_m;
  return heads < 1 ? 1 : (heads < group ? heads : group);
}

// The same for scores: where heads share a mask, one item takes the whole group.
constexpr int32_t heads_per_item(const ScoreParams& params) {
  const int32_t group = params.problem.num_q_heads / params.problem.num_kv_heads;
  return params.sharing == HeadSharing::kNone ? heads_per_item(params.problem) : group;
}

// Keys that are packed and multiplied at a time: a KV block, or a part of a larger one.
constexpr int32_t kChunk = 128;

// Scratch is 64-byte aligned; each operation says how many floats it wants.
struct Kernels {
  const char* name;
  // What stands for KV block `block` of `sequence`, all heads, into params.out.
  int64_t (*pool_scratch)(const PoolParams& params);
  void (*pool_block)(const PoolParams& params, int32_t sequence, int32_t seqlen, int32_t block, float* scratch);
  // scores[h * max_blocks + j], j < visible: the score of block j for kRelativeMax (kGroup: one row for all heads), its
  // base-2 logit for kPooled and kFlat64, its weight for kAntidiagonal.
  int64_t (*score_scratch)(const ScoreParams& params);
  void (*score_tile)(const ScoreParams& params, const TileItem& item, float* scratch, float* scores);
  int64_t (*attention_scratch)(const AttentionParams& params);
  void (*attention_tile)(const AttentionParams& params, const TileItem& item, float* scratch);
  // Attention with params.skip.form set; adds to params.skip.counts.
  int64_t (*skip_scratch)(const AttentionParams& params);
  void (*skip_tile)(const AttentionParams& params, const TileItem& item, float* scratch);
  // One row of the mask for each of the item's heads; adds to params.attention.skip.counts.
  int64_t (*skip_mask_scratch)(const SkipMaskParams& params);
  void (*skip_mask_tile)(const SkipMaskParams& params, const TileItem& item, float* scratch);
  int64_t (*block_mass_scratch)(const BlockMassParams& params);
  void (*block_mass_tile)(const BlockMassParams& params, const TileItem& item, float* scratch);
  int64_t (*tile_max_scratch)(const TileMaxParams& params);
  void (*tile_max_tile)(const TileMaxParams& params, const TileItem& item, float* scratch);
  // The two passes of probe_attention over a span of keys; see probe.h for what they fill.
  int64_t (*probe_scratch)(const ProbeParams& params);
  void (*probe_maxima)(const ProbeParams& params, const ProbeItem& item, float* statistics, float* scratch);
  void (*probe_spread)(const ProbeParams& params, const ProbeItem& item, const float* lse, float* vertical,
                       float* slash, int64_t slash_stride, float* scratch);
};

const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The table in use: the best that this machine runs, unless a test has forced another.
const Kernels& kernels();
// Forces "generic", "avx2" or "avx512"; null goes back to the best. Returns false, and changes nothing, where the
// machine lacks it. For tests; not thread-safe against running operations.
bool set_instruction_set(const char* name);

}  // namespace bsfa::cpu
