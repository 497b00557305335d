// CUDA operations. Each launches on `stream` of the current device, allocates nothing and does not synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "bsfa/params.h"
#include "bsfa/summary.h"

namespace bsfa::cuda {

// float16 and bfloat16, any head_dim, page size and strides (rows on 16 bytes are fastest), batch up to 65535.
cudaError_t pool_blocks(const PoolParams& params, cudaStream_t stream);

// Fill `entries`; `table` and `window_seqlens`.
cudaError_t summary_entries(const SummaryParams& params, cudaStream_t stream);
cudaError_t summary_window(const SummaryParams& params, cudaStream_t stream);

// Longest row of the rules from kPooled on: 6.5 million tokens in blocks of 128.
constexpr int32_t kMaxSelectBlocks = 51200;

// Longest row of kRelativeMax, at any head_dim: 2.1 million tokens. Its energies share the memory of an SM with rings
// of queries and means.
constexpr int32_t kMaxRelativeMaxBlocks = 16384;

// Whether score_blocks() and select_blocks() have kernels for this: float16 and bfloat16 on sm_90, tiles and blocks of
// 128 tokens; head_dim 64 or 128, but 1 to 256 for kPooled; a stride of 4 to 64; kRelativeMax without kUnion.
bool select_supports(const ScoreParams& params);

// Whether a row of max_blocks fits in their shared memory: one within the limits above does.
bool select_fits(const ScoreParams& params);

// Scratch memory of score_blocks() and select_blocks(), on the device, without their outputs. 0 for kRelativeMax where
// all sequences have the same lengths, known on the host, and every mask row holds a query tile.
int64_t select_workspace_bytes(const ScoreParams& params);

// num_rows is at least max_mask_rows (geometry.h); rows that hold no query get scores of -1, or no blocks. For rules
// that read through TMA (all but kPooled) q, and k where it is read, are aligned to 16 bytes in base and strides.
// `workspace` may be reused once the kernels are done.
cudaError_t score_blocks(const ScoreParams& params, void* workspace, cudaStream_t stream);
cudaError_t select_blocks(const SelectParams& params, void* workspace, cudaStream_t stream);

// Scratch memory of probe_attention(), on the device: 1.5 KiB per query head and 1024 keys.
int64_t probe_attention_workspace_bytes(const ProbeParams& params);

// Whether probe_attention() can run this: float16 and bfloat16, head_dim 64 or 128, block_m up to 128, rows of q and k
// on 16 bytes, batch up to 65535.
bool probe_attention_supports(const ProbeParams& params);

// Any page size, page, token and head strides. Four kernels; `workspace` may be reused once they are done.
cudaError_t probe_attention(const ProbeParams& params, void* workspace, cudaStream_t stream);

// Any block sizes.
cudaError_t pattern_mask(const PatternParams& params, cudaStream_t stream);

// Longest row of token_mask(): 16.7 million keys.
constexpr int32_t kMaxTokenBlocks = 131072;

// Tiles and blocks of 128 tokens. Reads the indices at 16 bytes a time where their rows start at multiples of that.
cudaError_t token_mask(const TokenMaskParams& params, cudaStream_t stream);

// Whether attention has a kernel for this dtype, head_dim and block sizes.
bool attention_supports(const Problem& problem);

// A call of attention, as far as it is known before it is launched; its bytes may be copied. Made by prepare_attention.
struct AttentionCall {
  alignas(128) unsigned char memory[1792];
};

// float16 and bfloat16 on sm_90; head_dim = head_dim_v, 64 or 128, or (without skipping) head_dim 192 and head_dim_v
// 128; tiles and blocks of 128 tokens; skipping and token masks not together; q, k and v aligned to 16 bytes in base
// and strides. Prepared first, all but the launch: on the device that it will run on.
cudaError_t prepare_attention(const AttentionParams& params, AttentionCall* call);

// Scratch memory of a prepared call, on the device: 32 bytes per mask row and 12 per mask row and query head; none for
// dense calls of few tiles (see run_attention()).
int64_t attention_workspace_bytes(const AttentionCall& call);

// Three kernels, or four with masks over more than 64K keys; `workspace` may be reused once they are done. Two where
// there is no mask or window and all sequences are alike; one, without workspace, where besides that there are at most
// two tiles to a CTA that runs.
cudaError_t run_attention(AttentionCall& call, void* workspace, cudaStream_t stream);

// Whether a prepared call is dense, of one launch, and has no outputs but `out`; and such a call for tensors that
// differ in nothing but where they lie. An error, and nothing to run, unless they are aligned to 16 bytes and that
// device is current which the call was prepared for.
bool attention_moves(const AttentionCall& call);
cudaError_t move_attention(AttentionCall& call, void* q, void* k, void* v, void* out);

// Whether block_mass() and tile_max() have kernels for this: float16 and bfloat16 on sm_90, head_dim 64 or 128, tiles
// of 64 or 128 query rows, blocks of 128 tokens.
bool measure_supports(const Problem& problem);

// Scratch memory of either, on the device; `query_tokens`: TensorView::tokens of q.
int64_t measure_workspace_bytes(const Problem& problem, int64_t query_tokens);

// num_rows is at least max_mask_rows (geometry.h); q and k are aligned to 16 bytes in base and strides. Four kernels;
// `workspace` may be reused once they are done.
cudaError_t block_mass(const BlockMassParams& params, void* workspace, cudaStream_t stream);
cudaError_t tile_max(const TileMaxParams& params, void* workspace, cudaStream_t stream);

// Whether skip_mask() has a kernel for this: as measure_supports(), with tiles of 128 rows alone.
bool skip_mask_supports(const Problem& problem);

// Also clears the counters. Workspace and conditions of tile_max(); the queries that a tile has are multiplied with the
// blocks of attention.words alone. Three memsets, three kernels.
cudaError_t skip_mask(const SkipMaskParams& params, void* workspace, cudaStream_t stream);

// Longest row of bound_mask(): 8.4 million tokens.
constexpr int32_t kMaxBoundBlocks = 65536;

// Whether bound_mask() has a kernel for this: float16 and bfloat16 on sm_90, head_dim 64 or 128, tiles and blocks of
// 128 tokens, at most kMaxBoundBlocks of these in a sequence, and 65535 sequences.
bool bound_mask_supports(const Problem& problem);

// Scratch memory of bound_mask(), on the device: the keys in 8 bits, and 16 bytes for each block and KV head.
int64_t bound_mask_workspace_bytes(const SkipMaskParams& params);

// The blocks of attention.words (null: all visible ones) that a group of rows may keep, by bounds from products in 8
// bits: what is left out is skipped by skip attention for certain. Clears the counters, and counts there what was met
// and left out. num_rows as for tile_max(); q and k aligned to 16 bytes in base and strides. One memset, two kernels.
cudaError_t bound_mask(const SkipMaskParams& params, void* workspace, cudaStream_t stream);

}  // namespace bsfa::cuda
