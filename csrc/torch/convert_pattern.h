// convert.h for operators probe_attention and pattern_mask.
#pragma once

#include "convert.h"

namespace bsfa::torch_ops {

// Operator probe_attention up to its outputs. Values of index tensors are not read.
inline ProbeParams probe_params(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                int64_t block_m, bool causal, double softmax_scale, double softcap) {
  ProbeParams p;
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && same_device(k, q), "q and k differ in dtype or device");
  STD_TORCH_CHECK(k.size(k.dim() - 1) == q.size(q.dim() - 1), "q and k differ in head_dim");
  p.q = view_of(q, "q");
  p.k = view_of(k, "k");
  p.problem = make_problem(q, cu_seqlens_q, batch_of_kv(k, cu_seqlens_k, block_table), k.size(k.dim() - 2),
                           max_seqlen_q, block_m, 128, causal, softmax_scale, softcap);
  p.problem.kv = kv_layout(k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k);
  return p;
}

// A contiguous int32 tensor of this shape, on the device of `like`.
inline const int32_t* bits_ptr(const Tensor& t, std::initializer_list<int64_t> sizes, const Tensor& like,
                               const char* name) {
  bool fits = t.scalar_type() == ScalarType::Int && t.is_contiguous() && same_device(t, like) &&
              t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) fits = fits && t.size(i++) == size;
  STD_TORCH_CHECK(fits, name, " must be contiguous int32, on the device of base, and of the shape that base implies");
  return static_cast<const int32_t*>(t.data_ptr());
}

// Operator pattern_mask up to its outputs. Values of index tensors are not read.
inline PatternParams pattern_params(const Tensor& base, const Tensor& query_aware, const Tensor& vertical,
                                    const Tensor& slash, const OptionalTensor& cu_seqlens_q,
                                    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k,
                                    int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t block_m, int64_t block_n,
                                    bool causal, int64_t sink_blocks, int64_t window_blocks) {
  STD_TORCH_CHECK(base.dim() == 3 && query_aware.dim() == 2, "base must be [rows, heads, words], query_aware [B, Hq]");
  STD_TORCH_CHECK(block_m >= 1 && block_m <= 4096 && block_n >= 1 && block_n <= 4096,
                  "block_m and block_n must be 1 .. 4096");
  STD_TORCH_CHECK(!(cu_seqlens_k.has_value() && seqlens_k.has_value()), "give cu_seqlens_k or seqlens_k, not both");
  PatternParams p;
  const int64_t batch = query_aware.size(0), heads = base.size(1);
  p.problem.batch = to_int32(batch, "batch");
  p.problem.num_q_heads = p.problem.num_kv_heads = to_int32(heads, "query heads");
  p.problem.block_m = static_cast<int32_t>(block_m);
  p.problem.block_n = static_cast<int32_t>(block_n);
  p.problem.causal = causal;
  p.problem.query.max_seqlen = to_int32(max_seqlen_q, "max_seqlen_q");
  p.problem.query.cu_seqlens = index_ptr(cu_seqlens_q, 1, batch + 1, base, "cu_seqlens_q");
  p.problem.kv.max_seqlen = to_int32(max_seqlen_k, "max_seqlen_k");
  p.problem.kv.cu_seqlens = index_ptr(cu_seqlens_k, 1, batch + 1, base, "cu_seqlens_k");
  p.problem.kv.seqlens = index_ptr(seqlens_k, 1, batch, base, "seqlens_k");
  p.num_rows = base.size(0);
  p.num_words = ceil_div(ceil_div(p.problem.kv.max_seqlen, p.problem.block_n), 32);
  p.sink_blocks = to_int32(sink_blocks, "sink_blocks");
  p.window_blocks = to_int32(window_blocks, "window_blocks");
  p.base = bits_ptr(base, {p.num_rows, heads, p.num_words}, base, "base");
  p.query_aware = bits_ptr(query_aware, {batch, heads}, base, "query_aware");
  p.vertical = bits_ptr(vertical, {batch, heads, p.num_words}, base, "vertical");
  p.slash = bits_ptr(slash, {batch, heads, p.num_words}, base, "slash");
  return p;
}

}  // namespace bsfa::torch_ops
