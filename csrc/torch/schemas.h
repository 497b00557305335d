// The one list of bsfa's torch operators. Shapes, with B sequences, T packed tokens, R mask rows (one per sequence and
// query tile, geometry.h) and N = ceil(max_seqlen_k / block_n) KV blocks:
//   q        [B, Sq, Hq, D], or [T, Hq, D] with cu_seqlens_q
//   k, v     [B, Sk, Hkv, D], or [T, Hkv, D] with cu_seqlens_k, or [pages, page_size, Hkv, D] with block_table and
//            seqlens_k
//   summary  [B, N, Hkv, D], contiguous, dtype of k
//   words    [R, heads, ceil(N / 32)] int32, heads = Hq, Hkv or 1; counts [R, heads] int32
//   lse      [B, Hq, Sq], or [Hq, T], float32
//   out      q's shape with v's head_dim, dtype of q. attention_out writes into a given one: any strides, last one 1.
// rule is "relative_max" or "cumulative_mass" (params.h).
#pragma once

#define BSFA_FOR_EACH_SCHEMA(DEF)                                                                                     \
  DEF("pool_blocks(Tensor k, Tensor? cu_seqlens_k, Tensor? block_table, Tensor? seqlens_k, SymInt max_seqlen_k, "     \
      "int block_n) -> Tensor")                                                                                       \
  DEF("score_blocks(Tensor q, Tensor summary, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens_k, "        \
      "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, int block_m, int block_n, bool causal, "            \
      "float softmax_scale, float softcap, str rule) -> Tensor")                                                      \
  DEF("select_blocks(Tensor q, Tensor summary, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens_k, "       \
      "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, int block_m, int block_n, bool causal, "            \
      "float softmax_scale, float softcap, str rule, Tensor thresholds, int sink_blocks, int window_blocks, "         \
      "int last_tiles, int min_blocks, Tensor? prompt_lens) -> (Tensor words, Tensor counts)")                        \
  DEF("attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "     \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? mask_words, int block_m, int block_n, "   \
      "bool causal, float softmax_scale, float softcap, int window_left) -> (Tensor out, Tensor lse)")                \
  DEF("attention_out(Tensor(a!) out, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "      \
      "Tensor? block_table, Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? mask_words, "        \
      "int block_m, int block_n, bool causal, float softmax_scale, float softcap, int window_left) -> Tensor lse")    \
  DEF("block_mass(Tensor q, Tensor k, Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "  \
      "Tensor? seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_rows, int block_m, int block_n, bool " \
      "causal, "                                                                                                      \
      "float softmax_scale, float softcap) -> Tensor")
