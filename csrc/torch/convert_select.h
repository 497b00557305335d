// convert.h for the operators that choose blocks or tokens: pooling, selection, probe, patterns, token masks.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <tuple>

#include "bsfa/geometry.h"
#include "bsfa/params.h"
#include "bsfa/summary.h"
#include "convert.h"

namespace bsfa::torch_ops {

inline Pooling to_pooling(const std::string& name) {
  return to_enum<Pooling>(name, "pooling",
                          {{"mean", Pooling::kMean}, {"maxabs", Pooling::kMaxAbs}, {"center", Pooling::kCenter}});
}

inline ScoreRule to_rule(const std::string& name) {
  return to_enum<ScoreRule>(name, "score rule",
                            {{"relative_max", ScoreRule::kRelativeMax},
                             {"pooled", ScoreRule::kPooled},
                             {"flat64", ScoreRule::kFlat64},
                             {"antidiagonal", ScoreRule::kAntidiagonal}});
}

inline HeadSharing to_sharing(const std::string& name) {
  return to_enum<HeadSharing>(
      name, "head sharing",
      {{"none", HeadSharing::kNone}, {"union", HeadSharing::kUnion}, {"group", HeadSharing::kGroup}});
}

inline PoolParams pool_params(const Tensor& k, const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                              const OptionalTensor& seqlens_k, int64_t max_seqlen_k, int64_t block_n,
                              const std::string& pooling) {
  STD_TORCH_CHECK(block_n >= 1 && block_n <= 4096, "block_n must be 1 .. 4096");
  PoolParams p;
  p.dtype = to_dtype(k, "k");
  p.pooling = to_pooling(pooling);
  p.k = view_of(k, "k");
  p.kv = kv_layout(k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k);
  p.batch = to_int32(batch_of_kv(k, cu_seqlens_k, block_table), "batch");
  p.num_kv_heads = to_int32(k.size(k.dim() - 2), "KV heads");
  p.head_dim = to_int32(k.size(k.dim() - 1), "head_dim");
  p.block_n = static_cast<int32_t>(block_n);
  p.max_blocks = ceil_div(p.kv.max_seqlen, p.block_n);
  return p;
}

// Operators score_blocks and select_blocks up to their outputs. Values of index tensors are not read.
inline ScoreParams score_params(const Tensor& q, const OptionalTensor& summary, const OptionalTensor& k,
                                const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                                int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows, int64_t block_m,
                                int64_t block_n, bool causal, double softmax_scale, double softcap,
                                const std::string& rule, const std::string& pooling, int64_t stride,
                                const std::string& sharing, int64_t sink_blocks, int64_t window_blocks) {
  ScoreParams s;
  s.rule = to_rule(rule);
  s.pooling = to_pooling(pooling);
  s.sharing = to_sharing(sharing);
  STD_TORCH_CHECK(s.sharing != HeadSharing::kGroup || s.rule == ScoreRule::kRelativeMax,
                  "sharing \"group\" is relative_max's alone");
  s.sink_blocks = to_int32(sink_blocks, "sink_blocks");
  s.window_blocks = to_int32(window_blocks, "window_blocks");
  s.stride = to_int32(stride, "stride");
  s.num_rows = num_rows;
  if (s.rule == ScoreRule::kFlat64 || s.rule == ScoreRule::kAntidiagonal) {
    const int64_t step = s.rule == ScoreRule::kFlat64 ? 64 : stride;
    STD_TORCH_CHECK(step > 0 && block_m % step == 0 && block_n % step == 0, rule, " needs block sizes divisible by ",
                    step);
    STD_TORCH_CHECK(k.has_value() && !summary.has_value(), rule, " needs k, and no summary");
    check_keys(*k, q);
    s.problem = make_problem(q, cu_seqlens_q, batch_of_kv(*k, cu_seqlens_k, block_table), k->size(k->dim() - 2),
                             max_seqlen_q, block_m, block_n, causal, softmax_scale, softcap);
    s.problem.kv = kv_layout(*k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k);
    s.k = view_of(*k, "k");
  } else {
    STD_TORCH_CHECK(summary.has_value() && summary->dim() == 4 && !k.has_value() && !block_table.has_value(), rule,
                    " needs a summary [batch, blocks, KV heads, dim], and neither k nor block_table");
    const int64_t batch = summary->size(0);
    s.problem = make_problem(q, cu_seqlens_q, batch, summary->size(2), max_seqlen_q, block_m, block_n, causal,
                             softmax_scale, softcap);
    s.problem.kv = kv_lengths(cu_seqlens_k, seqlens_k, max_seqlen_k, batch, q);
    check_summary(*summary, q, s.problem, s.problem.head_dim, "summary");
    s.summary = summary->data_ptr();
  }
  s.q = view_of(q, "q");
  s.max_blocks = ceil_div(s.problem.kv.max_seqlen, s.problem.block_n);
  return s;
}

// What summary_entries and summary_window have in common.
inline SummaryParams summary_params(const Tensor& block_table, const Tensor& seqlens_k, int64_t page_size,
                                    int64_t block_n) {
  SummaryParams p;
  p.batch = to_int32(seqlens_k.size(0), "batch");
  p.block_table = index_ptr(block_table, 2, p.batch, seqlens_k, "block_table");
  p.block_table_stride = block_table.stride(0);
  p.columns = to_int32(block_table.size(1), "columns of block_table");
  p.seqlens = index_ptr(seqlens_k, 1, p.batch, seqlens_k, "seqlens_k");
  p.page_size = to_int32(page_size, "page_size");
  p.block_n = to_int32(block_n, "block_n");
  STD_TORCH_CHECK(p.page_size > 0 && p.block_n > 0 && (p.page_size % p.block_n == 0 || p.block_n % p.page_size == 0),
                  "page_size must divide block_n or be a multiple of it");
  return p;
}

inline SummaryParams summary_entries_params(const Tensor& block_table, const Tensor& seqlens_k, int64_t page_size,
                                            int64_t block_n, int64_t blocks, int64_t num_pages) {
  SummaryParams p = summary_params(block_table, seqlens_k, page_size, block_n);
  p.blocks = to_int32(blocks, "blocks");
  p.num_pages = to_int32(num_pages, "num_pages");
  return p;
}

inline SummaryParams summary_window_params(const Tensor& block_table, const Tensor& seqlens_k, const Tensor& lengths_q,
                                           int64_t page_size, int64_t block_n, int64_t units) {
  SummaryParams p = summary_params(block_table, seqlens_k, page_size, block_n);
  p.lengths_q = index_ptr(lengths_q, 1, p.batch, seqlens_k, "lengths_q");
  p.units = to_int32(units, "units");
  STD_TORCH_CHECK(p.columns > 0 || p.batch == 0, "block_table has no columns");
  STD_TORCH_CHECK(units * p.unit() <= std::numeric_limits<int32_t>::max(), "units are too many");
  return p;
}

inline SelectParams select_params(const ScoreParams& score, const Tensor& q, const OptionalTensor& thresholds,
                                  int64_t last_tiles, int64_t min_blocks, double min_ratio, double probability,
                                  int64_t rescue_stride, double rescue_probability, int64_t rescue_seed,
                                  const OptionalTensor& prompt_lens, double threshold) {
  SelectParams p;
  p.score = score;
  if (thresholds.has_value()) {
    const Tensor& t = *thresholds;
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 1 &&
                        t.size(0) == score.score_heads() && same_device(t, q),
                    "thresholds must be contiguous float32 [", score.score_heads(), "] on the device of q");
    p.thresholds = static_cast<const float*>(t.data_ptr());
  }
  p.threshold = static_cast<float>(threshold);
  p.last_tiles = to_int32(last_tiles, "last_tiles");
  p.min_blocks = to_int32(min_blocks, "min_blocks");
  for (const double share : {min_ratio, probability, rescue_probability}) {
    STD_TORCH_CHECK(share >= 0.0 && share <= 1.0, "min_ratio, probability and rescue_probability must be 0 .. 1");
  }
  p.min_ratio = static_cast<float>(min_ratio);
  p.probability = static_cast<float>(probability);
  p.rescue_stride = to_int32(rescue_stride, "rescue_stride");
  p.rescue_probability = static_cast<float>(rescue_probability);
  p.rescue_seed = to_int32(rescue_seed, "rescue_seed");
  p.prompt_lens = index_ptr(prompt_lens, 1, score.problem.batch, q, "prompt_lens");
  p.num_words = ceil_div(score.max_blocks, 32);
  return p;
}

// Operator probe_attention up to its outputs. Values of index tensors are not read.
inline ProbeParams probe_params(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                int64_t block_m, bool causal, double softmax_scale, double softcap) {
  ProbeParams p;
  check_keys(k, q);
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
  PatternParams p;
  const int64_t batch = query_aware.size(0), heads = base.size(1);
  p.problem.batch = to_int32(batch, "batch");
  p.problem.num_q_heads = p.problem.num_kv_heads = to_int32(heads, "query heads");
  set_block_sizes(p.problem, block_m, block_n);
  p.problem.causal = causal;
  p.problem.query.max_seqlen = to_int32(max_seqlen_q, "max_seqlen_q");
  p.problem.query.cu_seqlens = index_ptr(cu_seqlens_q, 1, batch + 1, base, "cu_seqlens_q");
  p.problem.kv = kv_lengths(cu_seqlens_k, seqlens_k, max_seqlen_k, batch, base);
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

// Operator token_mask up to its outputs. Values are not read.
inline TokenMaskParams token_mask_params(const Tensor& indices, const OptionalTensor& cu_seqlens_q,
                                         const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k,
                                         int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows, int64_t block_m,
                                         int64_t block_n, bool causal) {
  TokenMaskParams p;
  const bool packed = cu_seqlens_q.has_value();
  const int64_t dim = packed ? 2 : 3;
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int && indices.dim() == dim,
                  "indices must be int32 [B, seqlen_q, topk], or [total_q, topk] with cu_seqlens_q");
  STD_TORCH_CHECK(indices.size(dim - 1) <= 1 || indices.stride(dim - 1) == 1,
                  "indices must be contiguous in their last dimension");
  STD_TORCH_CHECK(packed || indices.size(1) == max_seqlen_q, "batched indices must be [B, max_seqlen_q, topk]");
  const int64_t batch = packed ? cu_seqlens_q->size(0) - 1 : indices.size(0);
  p.problem.batch = to_int32(batch, "batch");
  p.problem.num_q_heads = p.problem.num_kv_heads = 1;
  set_block_sizes(p.problem, block_m, block_n);
  p.problem.causal = causal;
  p.problem.query.max_seqlen = to_int32(max_seqlen_q, "max_seqlen_q");
  p.problem.query.cu_seqlens = index_ptr(cu_seqlens_q, 1, batch + 1, indices, "cu_seqlens_q");
  p.problem.kv = kv_lengths(cu_seqlens_k, seqlens_k, max_seqlen_k, batch, indices);
  p.indices = static_cast<const int32_t*>(indices.data_ptr());
  p.index_batch_stride = packed ? 0 : indices.stride(0);
  p.index_row_stride = indices.stride(dim - 2);
  p.topk = to_int32(indices.size(dim - 1), "topk");
  STD_TORCH_CHECK(max_seqlen_k <= std::numeric_limits<int32_t>::max() - 128, "max_seqlen_k is out of range");
  p.row_words = ceil_div(p.problem.kv.max_seqlen, 128) * 4;
  p.num_rows = num_rows;
  p.num_words = ceil_div(ceil_div(p.problem.kv.max_seqlen, p.problem.block_n), 32);
  return p;
}

using TokenMaskTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// New tensors for what operator token_mask returns, in its order; `p` points at them.
inline TokenMaskTensors new_token_mask(TokenMaskParams& p, const Tensor& indices) {
  const bool packed = indices.dim() == 2;
  const int64_t rows = indices.size(0), columns = packed ? 1 : indices.size(1);
  Tensor words = packed ? new_tensor(indices, {rows, p.row_words}, ScalarType::Int)
                        : new_tensor(indices, {rows, columns, p.row_words}, ScalarType::Int);
  Tensor counts =
      packed ? new_tensor(indices, {rows}, ScalarType::Int) : new_tensor(indices, {rows, columns}, ScalarType::Int);
  Tensor block_words = new_tensor(indices, {p.num_rows, 1, p.num_words}, ScalarType::Int);
  Tensor block_counts = new_tensor(indices, {p.num_rows, 1}, ScalarType::Int);
  Tensor status = new_tensor(indices, {2}, ScalarType::Long);
  p.words = static_cast<int32_t*>(words.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  p.block_words = static_cast<int32_t*>(block_words.data_ptr());
  p.block_counts = static_cast<int32_t*>(block_counts.data_ptr());
  p.status = static_cast<int64_t*>(status.data_ptr());
  return {words, counts, block_words, block_counts, status};
}

}  // namespace bsfa::torch_ops
