// Parameter structs of the bsfa operations: plain pointers, int64 strides, no torch.
//
// Notation: B sequences, Hq query heads, Hkv KV heads (Hq % Hkv == 0; query head h reads KV head h / (Hq / Hkv)),
// D head_dim of q and k, Dv head_dim of v. All strides are in elements; the last dimension has unit stride.
#pragma once

#include <cstdint>

namespace bsfa {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A [batch or page, token, head, dim] view. `batch_stride` is the stride between sequences (unused when the tokens
// are packed by cu_seqlens) or between pages (when paged).
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  int64_t batch_size = 0;  // sequences or pages; 1 when packed
  int64_t tokens = 0;      // of a sequence, of a page, or of all sequences when packed
};

// Where the query tokens of each sequence lie.
struct QueryLayout {
  const int32_t* cu_seqlens = nullptr;  // [B + 1]: packed tokens. Null: batched, every sequence has max_seqlen tokens.
  int32_t max_seqlen = 0;
};

// Where the KV tokens of each sequence lie: batched (all pointers null), packed (cu_seqlens), or paged (block_table and
// seqlens): token t of sequence b is row t % page_size of page block_table[b * block_table_stride + t / page_size].
struct KvLayout {
  const int32_t* cu_seqlens = nullptr;   // [B + 1]
  const int32_t* seqlens = nullptr;      // [B]
  const int32_t* block_table = nullptr;  // [B, max_pages]
  int64_t block_table_stride = 0;
  int32_t page_size = 0;
  int32_t max_seqlen = 0;
};

// What every operation that looks at queries shares.
struct Problem {
  DType dtype = DType::kFloat32;
  int32_t batch = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t head_dim_v = 0;
  QueryLayout query;
  KvLayout kv;
  int32_t block_m = 128;  // query tile, tokens
  int32_t block_n = 128;  // KV block, tokens
  bool causal = true;     // bottom-right aligned: query row i sits at position seqlen_k - seqlen_q + i
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: off; else s -> softcap * tanh(s / softcap), after softmax_scale
};

// out[b, j, h, :] = mean of the tokens of KV block j, contiguous [B, max_blocks, Hkv, D], dtype of k; zeros past the end.
struct PoolParams {
  DType dtype = DType::kFloat32;
  int32_t batch = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_n = 128;
  int32_t max_blocks = 0;  // ceil(kv.max_seqlen / block_n)
  KvLayout kv;
  TensorView k;
  void* out = nullptr;
};

// How the score of a (query tile, KV block) pair is made, and compared with the head's threshold.
enum class ScoreRule : int32_t {
  // FlashPrefill: energy of a block = sum over rows of exp(scale * q_r . mean_k - tile max), divided by the largest
  // energy of the tile. Kept iff score >= threshold and score > 0; a negative threshold keeps everything.
  kRelativeMax = 0,
  // BFLA: softmax over blocks of scale * mean_q . mean_k; the score is the probability mass of all blocks ranked
  // strictly before this one (descending; ties: lower block first). Kept iff score < threshold; the best always.
  kCumulativeMass = 1,
};

// Rows of scores and masks: one per (sequence, query tile), see geometry.h; `num_rows` may exceed what is used.
struct ScoreParams {
  Problem problem;
  TensorView q;
  const void* summary = nullptr;  // [B, max_blocks, Hkv, D] contiguous, dtype of q
  int32_t max_blocks = 0;
  ScoreRule rule = ScoreRule::kRelativeMax;
  int64_t num_rows = 0;
  float* scores = nullptr;  // [num_rows, Hq, max_blocks]; -1 where the block is not visible
};

struct SelectParams {
  ScoreParams score;                     // score.scores unused
  const float* thresholds = nullptr;     // [Hq]
  int32_t sink_blocks = 0;               // first blocks of the sequence, always kept
  int32_t window_blocks = 1;             // blocks up to and including the tile's own, always kept (at least 1)
  int32_t last_tiles = 0;                // query tiles at the end of the prompt that keep everything
  int32_t min_blocks = 0;                // keep at least the best min_blocks by score
  const int32_t* prompt_lens = nullptr;  // [B] full prompt length for last_tiles; null: seqlen_k
  int32_t num_words = 0;                 // ceil(max_blocks / 32)
  int32_t* words = nullptr;              // [num_rows, Hq, num_words]
  int32_t* counts = nullptr;             // [num_rows, Hq]
};

struct AttentionParams {
  Problem problem;
  TensorView q, k, v;
  TensorView out;                  // [.., token, Hq, Dv], same layout kind as q
  float* lse = nullptr;            // natural log; head stride lse_head_stride, sequence stride lse_batch_stride
  int64_t lse_batch_stride = 0;    // batched: Hq * seqlen_q; packed: unused
  int64_t lse_head_stride = 0;     // batched: seqlen_q; packed: total_q
  const int32_t* words = nullptr;  // [num_rows, mask_heads, num_words]; null: dense
  int64_t num_rows = 0;            // of words; on CUDA also without: at least max_mask_rows (geometry.h)
  int32_t mask_heads = 0;          // Hq, Hkv or 1
  int32_t num_words = 0;
  int32_t window_left = -1;  // >= 0: a query at position p sees keys p - window_left .. p only
};

// mass[row, h, j] = mean over the tile's query rows of the softmax probability that falls into KV block j.
struct BlockMassParams {
  Problem problem;
  TensorView q, k;
  const float* lse = nullptr;
  int64_t lse_batch_stride = 0;
  int64_t lse_head_stride = 0;
  int64_t num_rows = 0;
  int32_t max_blocks = 0;
  float* mass = nullptr;  // [num_rows, Hq, max_blocks]
};

}  // namespace bsfa
