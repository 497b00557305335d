// convert.h for attention that skips, and for what is measured to choose its thresholds.
#pragma once

#include <cstdint>
#include <string>

#include "bsfa/geometry.h"
#include "bsfa/params.h"
#include "convert.h"

namespace bsfa::torch_ops {

inline SkipForm to_form(const std::string& name) {
  return to_enum<SkipForm>(name, "skip form", {{"absolute", SkipForm::kAbsolute}, {"relative", SkipForm::kRelative}});
}

// Turns `p`, made by attention_params, into attention that skips; `skips`: zeroed int64 [Hq, 2].
inline void set_skip(AttentionParams& p, const Tensor& q, const Tensor& thresholds, const std::string& form,
                     int64_t sink_blocks, int64_t window_blocks, bool counted, const Tensor& skips) {
  STD_TORCH_CHECK(thresholds.scalar_type() == ScalarType::Float && thresholds.is_contiguous() &&
                      thresholds.dim() == 2 && thresholds.size(0) == p.problem.num_q_heads && thresholds.size(1) > 0 &&
                      same_device(thresholds, q),
                  "thresholds must be contiguous float32 [query heads, columns] on the device of q");
  p.skip.form = to_form(form);
  p.skip.thresholds = static_cast<const float*>(thresholds.data_ptr());
  p.skip.columns = to_int32(thresholds.size(1), "columns of thresholds");
  p.skip.sink_blocks = to_int32(sink_blocks, "sink_blocks");
  p.skip.window_blocks = to_int32(window_blocks, "window_blocks");
  STD_TORCH_CHECK(window_blocks >= 1, "window_blocks must be at least 1");
  p.skip.counted = counted;
  p.skip.counts = static_cast<int64_t*>(skips.data_ptr());
}

// Operator skip_mask up to its outputs. Values of index tensors are not read.
inline SkipMaskParams skip_mask_params(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                       const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                       const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                       int64_t num_rows, const OptionalTensor& mask_words, int64_t block_m,
                                       int64_t block_n, bool causal, double softmax_scale, double softcap,
                                       const Tensor& thresholds, const std::string& form, int64_t sink_blocks,
                                       int64_t window_blocks, const Tensor& skips) {
  SkipMaskParams p;
  p.attention = attention_params(q, k, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                 max_seqlen_k, mask_words, std::nullopt, std::nullopt, std::nullopt, block_m, block_n,
                                 causal, softmax_scale, softcap, -1);
  set_skip(p.attention, q, thresholds, form, sink_blocks, window_blocks, false, skips);
  STD_TORCH_CHECK(!mask_words.has_value() || p.attention.num_rows == num_rows, "mask_words has ", p.attention.num_rows,
                  " rows, not num_rows = ", num_rows);
  p.attention.num_rows = num_rows;
  p.num_words = ceil_div(ceil_div(p.attention.problem.kv.max_seqlen, p.attention.problem.block_n), 32);
  return p;
}

// Operator tile_max up to its output. Values of index tensors are not read.
inline TileMaxParams tile_max_params(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                     const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                     const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                     int64_t num_rows, int64_t block_m, int64_t block_n, bool causal,
                                     double softmax_scale, double softcap, const std::string& form) {
  TileMaxParams p;
  check_keys(k, q);
  p.problem = make_problem(q, cu_seqlens_q, batch_of_kv(k, cu_seqlens_k, block_table), k.size(k.dim() - 2),
                           max_seqlen_q, block_m, block_n, causal, softmax_scale, softcap);
  p.problem.kv = kv_layout(k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k);
  p.q = view_of(q, "q");
  p.k = view_of(k, "k");
  p.form = to_form(form);
  p.num_rows = num_rows;
  p.max_blocks = ceil_div(p.problem.kv.max_seqlen, p.problem.block_n);
  return p;
}

// Operator block_mass up to its output. Values of index tensors are not read.
inline BlockMassParams block_mass_params(const Tensor& q, const Tensor& k, const Tensor& lse,
                                         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                         const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                                         int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows, int64_t block_m,
                                         int64_t block_n, bool causal, double softmax_scale, double softcap) {
  BlockMassParams p;
  check_keys(k, q);
  p.problem = make_problem(q, cu_seqlens_q, batch_of_kv(k, cu_seqlens_k, block_table), k.size(k.dim() - 2),
                           max_seqlen_q, block_m, block_n, causal, softmax_scale, softcap);
  p.problem.kv = kv_layout(k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k);
  p.q = view_of(q, "q");
  p.k = view_of(k, "k");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && same_device(lse, q),
                  "lse must be contiguous float32 on the device of q");
  STD_TORCH_CHECK(lse.numel() * q.size(q.dim() - 1) == q.numel(), "lse does not match q");
  p.lse = static_cast<const float*>(lse.data_ptr());
  set_lse_strides(q, &p.lse_batch_stride, &p.lse_head_stride);
  p.num_rows = num_rows;
  p.max_blocks = ceil_div(p.problem.kv.max_seqlen, p.problem.block_n);
  return p;
}

}  // namespace bsfa::torch_ops
