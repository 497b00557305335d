// The one list of bsfa's torch operators. Shapes, with B sequences, T packed tokens, R mask rows (one per sequence and
// query tile, geometry.h) and N = ceil(max_seqlen_k / block_n) KV blocks:
//   q        [B, Sq, Hq, D], or [T, Hq, D] with cu_seqlens_q
//   k, v     [B, Sk, Hkv, D], or [T, Hkv, D] with cu_seqlens_k, or [pages, page_size, Hkv, D] with block_table and
//            seqlens_k
//   summary  [B, N, Hkv, D], contiguous, dtype of k; likewise k_means and v_means
//   words    [R, heads, ceil(N / 32)] int32, heads = Hq, Hkv or 1; counts [R, heads] int32
//   lse      [B, Hq, Sq], or [Hq, T], float32
//   token_words  int32 [B, Sq, W], or [T, W] for packed q; W = ceil(max_seqlen_k / 32) rounded up to a multiple of 4
//            (AttentionParams)
//   indices  int32 [B, Sq, topk], or [T, topk] with cu_seqlens_q; token_counts of its shape without topk;
//            status int64 [2] (TokenMaskParams)
//   out      q's shape with v's head_dim, dtype of q. attention_out writes into a given one: any strides, last one 1.
// dense_attention is attention without a mask, window or lse, in few arguments: reading them is most of a short call.
// max_seqlen_q goes with cu_seqlens_q, max_seqlen_k with cu_seqlens_k or block_table.
// skip_attention: thresholds float32 [Hq, columns], skips int64 [Hq, 2] (SkipParams); tile_max [R, Hq, N] float32.
// summary_entries: int64 [B, blocks], summary_window: int32 [B, units * pages of a unit] and [B] (summary.h).
// select_blocks: thresholds float32 [score heads], or none: `threshold` for all of them.
// skip_mask (SkipMaskParams): the mask for the second pass, words [R, Hq, ceil(N / 32)]; R = num_rows, also of
// mask_words. bound_mask: likewise, a mask for skip_attention or skip_mask; CUDA alone. Relative thresholds above 0
// leave nothing out: in two passes what is skipped then has a say in the running maxima.
// The enumerations of params.h go by name: form "absolute", "relative"; pooling "mean", "maxabs", "center"; rule
// "relative_max", "pooled", "flat64", "antidiagonal"; sharing "none", "union", "group".
#pragma once

#define BSFA_FOR_EACH_SCHEMA(DEF)                                                                                      \
  DEF("pool_blocks(Tensor k, Tensor? cu_seqlens_k, Tensor? block_table, Tensor? seqlens_k, SymInt max_seqlen_k, "      \
      "int block_n, str pooling) -> Tensor")                                                                           \
  DEF("summary_entries(Tensor block_table, Tensor seqlens_k, int page_size, int block_n, SymInt blocks, "              \
      "SymInt num_pages) -> Tensor")                                                                                   \
  DEF("summary_window(Tensor block_table, Tensor seqlens_k, Tensor lengths_q, int page_size, int block_n, "            \
      "SymInt units) -> (Tensor table, Tensor seqlens)")                                                               \
  DEF("score_blocks(Tensor q, Tensor? summary, Tensor? k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "                \
      "Tensor? block_table, Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, int "        \
      "block_m, "                                                                                                      \
      "int block_n, bool causal, float softmax_scale, float softcap, str rule, str pooling, int stride, str sharing, " \
      "int sink_blocks, int window_blocks) -> Tensor")                                                                 \
  DEF("select_blocks(Tensor q, Tensor? summary, Tensor? k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "               \
      "Tensor? block_table, Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, int "        \
      "block_m, "                                                                                                      \
      "int block_n, bool causal, float softmax_scale, float softcap, str rule, str pooling, int stride, str sharing, " \
      "int sink_blocks, int window_blocks, Tensor? thresholds, int last_tiles, int min_blocks, float min_ratio, "      \
      "float probability, int rescue_stride, float rescue_probability, int rescue_seed, Tensor? prompt_lens, "         \
      "float threshold=0.0) -> (Tensor words, Tensor counts)")                                                         \
  DEF("probe_attention(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "          \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int block_m, bool causal, float softmax_scale, "   \
      "float softcap) -> (Tensor vertical, Tensor slash)")                                                             \
  DEF("pattern_mask(Tensor base, Tensor query_aware, Tensor vertical, Tensor slash, Tensor? cu_seqlens_q, "            \
      "Tensor? cu_seqlens_k, Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int block_m, int block_n, "  \
      "bool causal, int sink_blocks, int window_blocks) -> (Tensor words, Tensor counts)")                             \
  DEF("token_mask(Tensor indices, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens_k, SymInt "              \
      "max_seqlen_q, "                                                                                                 \
      "SymInt max_seqlen_k, SymInt num_rows, int block_m, int block_n, bool causal) "                                  \
      "-> (Tensor token_words, Tensor token_counts, Tensor words, Tensor counts, Tensor status)")                      \
  DEF("attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "      \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? mask_words, Tensor? mask_counts, "         \
      "Tensor? k_means, Tensor? v_means, int block_m, int block_n, bool causal, float softmax_scale, float softcap, "  \
      "int window_left, Tensor? token_words=None) -> (Tensor out, Tensor lse)")                                        \
  DEF("dense_attention(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale, float softcap, "                \
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? block_table=None, Tensor? seqlens_k=None, "       \
      "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0) -> Tensor")                                                       \
  DEF("attention_out(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "       \
      "Tensor? block_table, Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? mask_words, "         \
      "Tensor? mask_counts, Tensor? k_means, Tensor? v_means, int block_m, int block_n, bool causal, "                 \
      "float softmax_scale, float softcap, int window_left, Tensor? token_words=None) -> Tensor lse")                  \
  DEF("skip_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, " \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? mask_words, Tensor? mask_counts, "         \
      "int block_m, int block_n, bool causal, float softmax_scale, float softcap, Tensor thresholds, str form, "       \
      "int sink_blocks, int window_blocks, bool counted) -> (Tensor out, Tensor lse, Tensor skips)")                   \
  DEF("skip_attention_out(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "  \
      "Tensor? block_table, Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? mask_words, "         \
      "Tensor? mask_counts, int block_m, int block_n, bool causal, float softmax_scale, float softcap, "               \
      "Tensor thresholds, str form, int sink_blocks, int window_blocks, bool counted) -> (Tensor lse, Tensor skips)")  \
  DEF("skip_mask(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "                \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, Tensor? mask_words, "             \
      "int block_m, int block_n, bool causal, float softmax_scale, float softcap, Tensor thresholds, str form, "       \
      "int sink_blocks, int window_blocks) -> (Tensor words, Tensor counts, Tensor skips)")                            \
  DEF("bound_mask(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "               \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, Tensor? mask_words, "             \
      "int block_m, int block_n, bool causal, float softmax_scale, float softcap, Tensor thresholds, str form, "       \
      "int sink_blocks, int window_blocks) -> (Tensor words, Tensor counts, Tensor skips)")                            \
  DEF("tile_max(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "                 \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, int block_m, int block_n, "       \
      "bool causal, float softmax_scale, float softcap, str form) -> Tensor")                                          \
  DEF("block_mass(Tensor q, Tensor k, Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "   \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, int block_m, int block_n, "       \
      "bool causal, float softmax_scale, float softcap) -> Tensor")
