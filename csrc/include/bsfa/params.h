// Parameter structs of the bsfa operations: plain pointers, int64 strides, no torch.
//
// Notation: B sequences, Hq query heads, Hkv KV heads (Hq % Hkv == 0; query head h reads KV head h / (Hq / Hkv)),
// D head_dim of q and k, Dv head_dim of v. All strides are in elements; the last dimension has unit stride.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BSFA_HOST_DEVICE __host__ __device__
#else
#define BSFA_HOST_DEVICE
#endif

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

// What stands for the tokens of a KV block (BFLA's modes). Queries are pooled per tile in the same way.
enum class Pooling : int32_t {
  kMean = 0,
  kMaxAbs = 1,  // per dimension the value of largest magnitude, with its sign; ties: the earlier token
  kCenter = 2,  // the token in the middle: number count / 2 of the block's `count` tokens
};

// out[b, j, h, :] = the tokens of KV block j, pooled; contiguous [B, max_blocks, Hkv, D], dtype of k;
// zeros past the end.
struct PoolParams {
  DType dtype = DType::kFloat32;
  int32_t batch = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_n = 128;
  int32_t max_blocks = 0;  // ceil(kv.max_seqlen / block_n)
  Pooling pooling = Pooling::kMean;
  KvLayout kv;
  TensorView k;
  void* out = nullptr;
};

// How the score of a (query tile, KV block) pair is made, and compared with the head's threshold.
//
// The rules from kPooled on make weights w_J = exp(logit) or masses, and the score of a block is the share of the
// tile's total weight that is ranked strictly before it (descending weight; ties: lower block first). Kept iff
// score < threshold; the best block always.
enum class ScoreRule : int32_t {
  // FlashPrefill: energy of a block = sum over rows of exp(scale * q_r . mean_k - tile max), divided by the largest
  // energy of the tile. Kept iff score >= threshold and score > 0; a negative threshold keeps everything.
  kRelativeMax = 0,
  // BFLA: logit = scale * pooled_q . pooled_k.
  kPooled = 1,
  // BFLA's flat64: logit = scale / 64 * max over the tile's groups g and the block's groups r of 64 tokens of
  // sum over t < 64 of q[64 g + t] . k[64 r + t]. Tokens beyond the sequence count as zeros.
  kFlat64 = 2,
  // XAttention: groups of `stride` tokens at absolute positions; logit of query group r and key group c <= r (causal)
  // is scale / stride * sum over s of q[r * stride + stride - 1 - s] . k[c * stride + s]; the weight of a block is the
  // sum over the tile's groups of the softmax over key groups that falls into it. The blocks that sink_blocks and
  // window_blocks keep are ranked before all others, in order of their index.
  kAntidiagonal = 3,
};

// What the query heads of one KV head have in common.
enum class HeadSharing : int32_t {
  kNone = 0,   // nothing: one mask per query head
  kUnion = 1,  // one mask per KV head: the union of its query heads' masks
  kGroup =
      2,  // one mask and one score per KV head (kRelativeMax): energies are summed over the group's heads, with one
          // maximum
};

// Rows of scores and masks: one per (sequence, query tile), see geometry.h; `num_rows` may exceed what is used.
struct ScoreParams {
  Problem problem;
  TensorView q;
  const void* summary = nullptr;  // kRelativeMax, kPooled: [B, max_blocks, Hkv, D] contiguous, dtype of q
  TensorView k;                   // kFlat64, kAntidiagonal: the keys themselves, laid out as problem.kv says
  int32_t max_blocks = 0;
  ScoreRule rule = ScoreRule::kRelativeMax;
  Pooling pooling = Pooling::kMean;  // of the queries, for kPooled
  int32_t stride = 16;               // of kAntidiagonal, tokens; divides block_m and block_n
  HeadSharing sharing = HeadSharing::kNone;
  int32_t sink_blocks = 0;    // first blocks of the sequence, always kept
  int32_t window_blocks = 1;  // blocks up to and including the tile's own, always kept (at least 1)
  int64_t num_rows = 0;
  float* scores = nullptr;  // [num_rows, score_heads, max_blocks]; -1 where the block is not visible

  BSFA_HOST_DEVICE int32_t score_heads() const {
    return sharing == HeadSharing::kGroup ? problem.num_kv_heads : problem.num_q_heads;
  }
  BSFA_HOST_DEVICE int32_t mask_heads() const {
    return sharing == HeadSharing::kNone ? problem.num_q_heads : problem.num_kv_heads;
  }
};

// Which visible blocks are kept: those that the rule, or any of the following, keeps.
struct SelectParams {
  ScoreParams score;                  // score.scores unused
  const float* thresholds = nullptr;  // [score_heads]; null: `threshold` for all
  float threshold = 0.0f;
  int32_t last_tiles = 0;           // query tiles at the end of the prompt that keep everything
  int32_t min_blocks = 0;           // the best min_blocks by score
  float min_ratio = 0.0f;           // the best floor(min_ratio * visible blocks)
  float probability = 1.0f;         // not for kRelativeMax: blocks with more than this share of the weight
  int32_t rescue_stride = 0;        // > 0: blocks with (131 * tile + 17 * block + rescue_seed) % stride == 0
  float rescue_probability = 0.0f;  // > 0: blocks whose hash says so, see keep.h
  int32_t rescue_seed = 1;
  const int32_t* prompt_lens = nullptr;  // [B] full prompt length for last_tiles; null: seqlen_k
  int32_t num_words = 0;                 // ceil(max_blocks / 32)
  int32_t* words = nullptr;              // [num_rows, mask_heads, num_words]
  int32_t* counts = nullptr;             // [num_rows, mask_heads]

  BSFA_HOST_DEVICE float threshold_of(int32_t score_head) const {
    return thresholds != nullptr ? thresholds[score_head] : threshold;
  }
};

// Attention of the last query rows of each sequence, its probe (FlexPrefill): the last min(block_m, seqlen_q) rows.
//   vertical[b, h, j] = mean over probe rows of the softmax probability of key j
//   slash[b, h, d]    = sum over probe rows of the probability of the key d tokens before the row, over their number
struct ProbeParams {
  Problem problem;
  TensorView q, k;
  float* vertical = nullptr;  // [B, Hq, kv.max_seqlen]; zeros past the end
  float* slash = nullptr;     // [B, Hq, kv.max_seqlen]; causal only
};

// A mask from vertical and slash patterns: row i keeps block j iff vertical bit j, or slash bit (own - j) with `own`
// the tile's own block and j <= own, or `base` keeps it and query_aware is set, or it is sink or window.
struct PatternParams {
  Problem problem;
  int64_t num_rows = 0;
  int32_t num_words = 0;
  const int32_t* base = nullptr;         // [num_rows, Hq, num_words]
  const int32_t* query_aware = nullptr;  // [B, Hq], 0 or 1
  const int32_t* vertical = nullptr;     // [B, Hq, num_words]
  const int32_t* slash = nullptr;        // [B, Hq, num_words]
  int32_t sink_blocks = 0;
  int32_t window_blocks = 1;
  int32_t* words = nullptr;   // [num_rows, Hq, num_words]
  int32_t* counts = nullptr;  // [num_rows, Hq]
};

// A token mask (AttentionParams::token_words) from the indices of the keys that each query row may see, and the mask of
// the blocks that hold one. Rows of indices and of words lie as those of q do.
//   -1 is padding; order and repetition mean nothing; a key that causality hides from the row is left out
//   anything else outside of 0 .. seqlen_k - 1 is invalid: it marks nothing, and is counted in `status`
struct TokenMaskParams {
  Problem problem;  // lengths, block sizes, causal; heads and dtype are not used
  const int32_t* indices = nullptr;
  int64_t index_batch_stride = 0;  // batched
  int64_t index_row_stride = 0;
  int32_t topk = 0;                 // indices of a row
  int32_t row_words = 0;            // round_up(ceil(kv.max_seqlen / 32), 4)
  int64_t num_rows = 0;             // of the block mask, one head
  int32_t num_words = 0;            // ceil(ceil(kv.max_seqlen / block_n) / 32)
  int32_t* words = nullptr;         // [B * seqlen_q or total_q, row_words]
  int32_t* counts = nullptr;        // [B * seqlen_q or total_q]: keys of each row
  int32_t* block_words = nullptr;   // [num_rows, num_words]
  int32_t* block_counts = nullptr;  // [num_rows]
  // How many indices are invalid, and the least row * topk + column of one, rows counted as in counts (-1: none).
  int64_t* status = nullptr;
};

// How a threshold on exact logits is meant (BSFA and skip-softmax).
enum class SkipForm : int32_t {
  kNone = 0,
  kAbsolute = 1,  // a tile of logits is skipped iff its largest is below the threshold
  kRelative = 2,  // iff in every row the largest is less than the row's running maximum plus the threshold
};

// Query rows that are skipped together: groups of this many at absolute positions (multiples of it within a tile).
constexpr int32_t kSkipRows = 64;

// Skipping after the exact product q . k. Logits are cap(softmax_scale * q . k), natural units, over visible keys. A
// group of kSkipRows rows meets its kept blocks in this order: the tile's last one, block 0, then the others from the
// last to the first; the running maximum of a row is over the blocks that its group met before and did not skip
// (-inf: none). Sinks and window are never skipped, nor is what a NaN logit lies in. What is skipped is left out
// of the softmax, or, if `counted`, out of the product with V only: then it stays in denominator and LSE.
struct SkipParams {
  SkipForm form = SkipForm::kNone;
  const float* thresholds = nullptr;  // [Hq, columns]; NaN and -inf: nothing is skipped
  int32_t columns = 0;                // column = absolute query tile (position / block_m), the last for tiles beyond
  int32_t sink_blocks = 1;            // first blocks of the sequence
  int32_t window_blocks = 1;          // blocks up to and including the tile's own, at least 1 (always_kept in keep.h)
  bool counted = false;
  // [Hq, 2], added to: pairs (group of rows with a query, block that one of its rows sees and the mask keeps) that were
  // met, and those of them that were skipped.
  int64_t* counts = nullptr;
};

struct AttentionParams {
  Problem problem;
  TensorView q, k, v;
  TensorView out;                  // [.., token, Hq, Dv], same layout kind as q
  float* lse = nullptr;            // natural log; strides as below; null: not wanted
  int64_t lse_batch_stride = 0;    // batched: Hq * seqlen_q; packed: unused
  int64_t lse_head_stride = 0;     // batched: seqlen_q; packed: total_q
  const int32_t* words = nullptr;  // [num_rows, mask_heads, num_words]; null: dense
  int64_t num_rows = 0;            // of words; on CUDA also without: at least max_mask_rows (geometry.h)
  int32_t mask_heads = 0;          // Hq, Hkv or 1
  int32_t num_words = 0;
  const int32_t* counts = nullptr;  // [num_rows, mask_heads] set bits of words; null: they are counted (CUDA)
  int32_t window_left = -1;         // >= 0: a query at position p sees keys p - window_left .. p only
  // Mean correction (FlashPrefill V2): with both set, a block that the mask drops and that every row of the tile would
  // see whole enters the softmax as one key k_means with logit + ln(its tokens) and value v_means.
  const void* k_means = nullptr;  // [B, ceil(kv.max_seqlen / block_n), Hkv, D] contiguous, dtype of q
  const void* v_means = nullptr;  // [B, ceil(kv.max_seqlen / block_n), Hkv, Dv]
  SkipParams skip;                // not with means or window_left
  // Token mask, shared by all heads: bit j % 32 of word j / 32 of a query row says whether it may see key position j of
  // its sequence, in addition to everything else that decides that. Rows lie as those of q do: row i of sequence b at
  // b * token_batch_stride + i * token_row_stride, or packed row r at r * token_row_stride. The words of a row are
  // contiguous, at least ceil(kv.max_seqlen / 32) of them; bits past its keys are zero. Base and strides are multiples
  // of 16 bytes (4 words), and a row may be read up to the next multiple of 4 words.
  const int32_t* token_words = nullptr;  // null: none; not with means, window_left or skip
  int64_t token_batch_stride = 0;        // words; packed: unused
  int64_t token_row_stride = 0;          // words
};

// Skipping in two passes: the mask with which attention() without skipping is the second. Of the blocks that
// attention.words keeps, a tile drops those that all of its groups would skip (SkipParams), were running maxima over
// all blocks met, skipped or not. With thresholds of at most 0, and in the absolute form, these are the groups' own
// decisions in one pass, and a tile keeps what one of its groups keeps.
//
// bound_mask() fills the same struct: the mask then keeps every block that a group of the tile may keep, judged by
// upper bounds of its logits, and the last block of each tile. Attention that skips does over it what it would do over
// attention.words, to the bit. In the relative form thresholds above 0 leave nothing out.
struct SkipMaskParams {
  AttentionParams attention;  // with `skip`, not counted, and num_rows; v, out, lse and window_left have no say
  int32_t num_words = 0;      // of a row and head of the result; with attention.words its num_words
  int32_t* words = nullptr;   // [num_rows, Hq, num_words]
  int32_t* counts = nullptr;  // [num_rows, Hq] set bits
};

// The quantity that SkipParams compares with its threshold, for whole tiles of block_m rows (kSkipRows for what
// attention decides), every visible block being met and kept:
//   kAbsolute  maxima[row, h, j] = largest logit of the tile's rows over the visible keys of block j
//   kRelative  largest over the rows of (row's largest logit in block j - row's running maximum); +inf where a row has
//              met nothing before
// -inf where nothing is visible; NaN if a logit is.
struct TileMaxParams {
  Problem problem;
  TensorView q, k;
  SkipForm form = SkipForm::kAbsolute;
  int64_t num_rows = 0;
  int32_t max_blocks = 0;
  float* maxima = nullptr;  // [num_rows, Hq, max_blocks]
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
