// The CPU half of the torch operators: checks, allocation, and the call into csrc/cpu.
#include <functional>
#include <tuple>

#include "bsfa/cpu.h"
#include "bsfa/geometry.h"
#include "convert.h"
#include "convert_select.h"
#include "convert_skip.h"
#include "schedule.h"
#include "schemas.h"

namespace bsfa::torch_ops {
namespace {

cpu::Executor executor() {
  cpu::Executor e;
  e.num_workers = static_cast<int>(torch::stable::get_num_threads());
  e.run = [n = e.num_workers](const std::function<void(int)>& body) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) body(static_cast<int>(w));
    });
  };
  return e;
}

// Values are on the host here, so what would read out of bounds is refused.
void check_cu_seqlens(const int32_t* cu, int32_t batch, int32_t max_seqlen, int64_t total, const char* name) {
  STD_TORCH_CHECK(cu[0] == 0, name, " must start with 0");
  for (int32_t b = 0; b < batch; ++b) {
    const int64_t len = static_cast<int64_t>(cu[b + 1]) - cu[b];
    STD_TORCH_CHECK(len >= 0, name, " must not decrease");
    STD_TORCH_CHECK(len <= max_seqlen, name, ": a sequence has ", len, " tokens, more than max_seqlen ", max_seqlen);
  }
  STD_TORCH_CHECK(cu[batch] == total, name, " ends at ", cu[batch], " but there are ", total, " tokens");
}

void check_kv_values(const KvLayout& kv, const Tensor& k, int32_t batch) {
  if (kv.cu_seqlens != nullptr) check_cu_seqlens(kv.cu_seqlens, batch, kv.max_seqlen, k.size(0), "cu_seqlens_k");
  if (kv.block_table == nullptr) return;
  for (int32_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(kv.seqlens[b] >= 0 && kv.seqlens[b] <= kv.max_seqlen, "seqlens_k[", b, "] = ", kv.seqlens[b],
                    " is not in 0 .. max_seqlen_k");
    for (int32_t i = 0; i < ceil_div(kv.seqlens[b], kv.page_size); ++i) {
      const int32_t page = kv.block_table[b * kv.block_table_stride + i];
      STD_TORCH_CHECK(page >= 0 && page < k.size(0), "block_table[", b, ", ", i, "] = ", page, " is not a page");
    }
  }
}

void check_problem_values(const Problem& p, const Tensor& q, int64_t num_rows) {
  if (p.query.cu_seqlens != nullptr) {
    check_cu_seqlens(p.query.cu_seqlens, p.batch, p.query.max_seqlen, q.size(0), "cu_seqlens_q");
  }
  if (num_rows < 0) return;
  int64_t rows = 0;
  for (int32_t b = 0; b < p.batch; ++b) rows += sequence_geometry(p, b).num_tiles();
  STD_TORCH_CHECK(rows <= num_rows, "the mask has ", num_rows, " rows, this problem needs ", rows);
}

Tensor pool_blocks(const Tensor& k, const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                   const OptionalTensor& seqlens_k, int64_t max_seqlen_k, int64_t block_n, std::string pooling) {
  PoolParams p = pool_params(k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k, block_n, pooling);
  check_kv_values(p.kv, k, p.batch);
  Tensor out = new_tensor(k, {p.batch, p.max_blocks, p.num_kv_heads, p.head_dim}, k.scalar_type());
  p.out = out.data_ptr();
  if (out.numel() > 0) cpu::pool_blocks(p, executor());
  return out;
}

Tensor summary_entries(const Tensor& block_table, const Tensor& seqlens_k, int64_t page_size, int64_t block_n,
                       int64_t blocks, int64_t num_pages) {
  SummaryParams p = summary_entries_params(block_table, seqlens_k, page_size, block_n, blocks, num_pages);
  Tensor entries = new_tensor(seqlens_k, {p.batch, p.blocks}, ScalarType::Long);
  p.entries = static_cast<int64_t*>(entries.data_ptr());
  for (int32_t b = 0; b < p.batch; ++b) {
    for (int32_t j = 0; j < p.blocks; ++j) {
      STD_TORCH_CHECK(p.column_of(p.seqlens[b], j) < p.columns, "seqlens_k exceeds what block_table can hold");
      const int64_t entry = p.entry(b, j);
      STD_TORCH_CHECK(entry >= 0 && entry <= p.num_pages * p.blocks_per_page(), "block_table names no page");
      p.entries[int64_t{b} * p.blocks + j] = entry;
    }
  }
  return entries;
}

std::tuple<Tensor, Tensor> summary_window(const Tensor& block_table, const Tensor& seqlens_k, const Tensor& lengths_q,
                                          int64_t page_size, int64_t block_n, int64_t units) {
  SummaryParams p = summary_window_params(block_table, seqlens_k, lengths_q, page_size, block_n, units);
  Tensor table = new_tensor(seqlens_k, {p.batch, int64_t{p.units} * p.pages_of_unit()}, ScalarType::Int);
  Tensor seqlens = new_tensor(seqlens_k, {p.batch}, ScalarType::Int);
  p.table = static_cast<int32_t*>(table.data_ptr());
  p.window_seqlens = static_cast<int32_t*>(seqlens.data_ptr());
  const int32_t width = p.units * p.pages_of_unit();
  for (int32_t b = 0; b < p.batch; ++b) {
    STD_TORCH_CHECK(p.lengths_q[b] >= 0 && p.seqlens[b] >= 0, "lengths must not be negative");
    for (int32_t i = 0; i < width; ++i) p.table[int64_t{b} * width + i] = p.window_page(b, i);
    p.window_seqlens[b] = p.window_seqlen(b);
  }
  return {table, seqlens};
}

void check_score_values(const ScoreParams& s, const Tensor& q, const OptionalTensor& k) {
  const KvLayout& kv = s.problem.kv;
  if (k.has_value()) check_kv_values(kv, *k, s.problem.batch);
  for (int32_t b = 0; b < s.problem.batch; ++b) {
    const int32_t len = seqlen_k(kv, b);
    STD_TORCH_CHECK(len >= 0 && len <= kv.max_seqlen, "KV length ", len, " is not in 0 .. max_seqlen_k");
  }
  check_problem_values(s.problem, q, s.num_rows);
}

Tensor score_blocks(const Tensor& q, const OptionalTensor& summary, const OptionalTensor& k,
                    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                    const OptionalTensor& block_table, const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                    int64_t max_seqlen_k, int64_t num_rows, int64_t block_m, int64_t block_n, bool causal,
                    double softmax_scale, double softcap, std::string rule, std::string pooling, int64_t stride,
                    std::string sharing, int64_t sink_blocks, int64_t window_blocks) {
  ScoreParams s = score_params(q, summary, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                               max_seqlen_k, num_rows, block_m, block_n, causal, softmax_scale, softcap, rule, pooling,
                               stride, sharing, sink_blocks, window_blocks);
  check_score_values(s, q, k);
  Tensor scores = new_tensor(q, {num_rows, s.score_heads(), s.max_blocks}, ScalarType::Float);
  s.scores = static_cast<float*>(scores.data_ptr());
  if (scores.numel() > 0) cpu::score_blocks(s, executor());
  return scores;
}

std::tuple<Tensor, Tensor> select_blocks(const Tensor& q, const OptionalTensor& summary, const OptionalTensor& k,
                                         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                         const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                                         int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows, int64_t block_m,
                                         int64_t block_n, bool causal, double softmax_scale, double softcap,
                                         std::string rule, std::string pooling, int64_t stride, std::string sharing,
                                         int64_t sink_blocks, int64_t window_blocks, const OptionalTensor& thresholds,
                                         int64_t last_tiles, int64_t min_blocks, double min_ratio, double probability,
                                         int64_t rescue_stride, double rescue_probability, int64_t rescue_seed,
                                         const OptionalTensor& prompt_lens, double threshold) {
  const ScoreParams s = score_params(q, summary, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                     max_seqlen_k, num_rows, block_m, block_n, causal, softmax_scale, softcap, rule,
                                     pooling, stride, sharing, sink_blocks, window_blocks);
  check_score_values(s, q, k);
  SelectParams p = select_params(s, q, thresholds, last_tiles, min_blocks, min_ratio, probability, rescue_stride,
                                 rescue_probability, rescue_seed, prompt_lens, threshold);
  Tensor words = new_tensor(q, {num_rows, s.mask_heads(), p.num_words}, ScalarType::Int);
  Tensor counts = new_tensor(q, {num_rows, s.mask_heads()}, ScalarType::Int);
  p.words = static_cast<int32_t*>(words.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  if (counts.numel() > 0) cpu::select_blocks(p, executor());
  return {words, counts};
}

Tensor attention_out(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v,
                     const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                     const OptionalTensor& block_table, const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                     int64_t max_seqlen_k, const OptionalTensor& mask_words, const OptionalTensor& mask_counts,
                     const OptionalTensor& k_means, const OptionalTensor& v_means, int64_t block_m, int64_t block_n,
                     bool causal, double softmax_scale, double softcap, int64_t window_left,
                     const OptionalTensor& token_words) {
  AttentionParams p = attention_params(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                       max_seqlen_k, mask_words, mask_counts, k_means, v_means, block_m, block_n,
                                       causal, softmax_scale, softcap, window_left, token_words);
  Tensor lse = new_lse(q);
  set_attention_outputs(p, q, out, lse);
  check_kv_values(p.problem.kv, k, p.problem.batch);
  check_problem_values(p.problem, q, p.words != nullptr ? p.num_rows : -1);
  if (q.numel() > 0) cpu::attention(p, executor());
  return lse;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                     const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                                     int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& mask_words,
                                     const OptionalTensor& mask_counts, const OptionalTensor& k_means,
                                     const OptionalTensor& v_means, int64_t block_m, int64_t block_n, bool causal,
                                     double softmax_scale, double softcap, int64_t window_left,
                                     const OptionalTensor& token_words) {
  Tensor out = new_attention_out(q, v);
  Tensor lse = attention_out(out, q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                             max_seqlen_k, mask_words, mask_counts, k_means, v_means, block_m, block_n, causal,
                             softmax_scale, softcap, window_left, token_words);
  return {out, lse};
}

Tensor dense_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double softmax_scale,
                       double softcap, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                       const OptionalTensor& block_table, const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                       int64_t max_seqlen_k) {
  AttentionParams p = dense_params(q, k, v, causal, softmax_scale, softcap, cu_seqlens_q, cu_seqlens_k, block_table,
                                   seqlens_k, max_seqlen_q, max_seqlen_k);
  Tensor out = new_attention_out(q, v);
  set_attention_outputs(p, q, out, std::nullopt);
  check_kv_values(p.problem.kv, k, p.problem.batch);
  check_problem_values(p.problem, q, -1);
  if (q.numel() > 0) cpu::attention(p, executor());
  return out;
}

std::tuple<Tensor, Tensor> skip_attention_out(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v,
                                              const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                              const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                                              int64_t max_seqlen_q, int64_t max_seqlen_k,
                                              const OptionalTensor& mask_words, const OptionalTensor& mask_counts,
                                              int64_t block_m, int64_t block_n, bool causal, double softmax_scale,
                                              double softcap, const Tensor& thresholds, std::string form,
                                              int64_t sink_blocks, int64_t window_blocks, bool counted) {
  AttentionParams p = attention_params(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                       max_seqlen_k, mask_words, mask_counts, std::nullopt, std::nullopt, block_m,
                                       block_n, causal, softmax_scale, softcap, -1);
  Tensor lse = new_lse(q);
  Tensor skips = new_tensor(q, {q.size(q.dim() - 2), 2}, ScalarType::Long);
  torch::stable::zero_(skips);
  set_attention_outputs(p, q, out, lse);
  set_skip(p, q, thresholds, form, sink_blocks, window_blocks, counted, skips);
  check_kv_values(p.problem.kv, k, p.problem.batch);
  check_problem_values(p.problem, q, p.words != nullptr ? p.num_rows : -1);
  if (q.numel() > 0) cpu::attention(p, executor());
  return {lse, skips};
}

std::tuple<Tensor, Tensor, Tensor> skip_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& mask_words, const OptionalTensor& mask_counts,
    int64_t block_m, int64_t block_n, bool causal, double softmax_scale, double softcap, const Tensor& thresholds,
    std::string form, int64_t sink_blocks, int64_t window_blocks, bool counted) {
  Tensor out = new_attention_out(q, v);
  auto [lse, skips] = skip_attention_out(out, q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                         max_seqlen_k, mask_words, mask_counts, block_m, block_n, causal, softmax_scale,
                                         softcap, thresholds, form, sink_blocks, window_blocks, counted);
  return {out, lse, skips};
}

std::tuple<Tensor, Tensor, Tensor> skip_mask(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                             const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                             const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                                             int64_t max_seqlen_k, int64_t num_rows, const OptionalTensor& mask_words,
                                             int64_t block_m, int64_t block_n, bool causal, double softmax_scale,
                                             double softcap, const Tensor& thresholds, std::string form,
                                             int64_t sink_blocks, int64_t window_blocks) {
  Tensor skips = new_tensor(q, {q.size(q.dim() - 2), 2}, ScalarType::Long);
  torch::stable::zero_(skips);
  SkipMaskParams p = skip_mask_params(q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                      max_seqlen_k, num_rows, mask_words, block_m, block_n, causal, softmax_scale,
                                      softcap, thresholds, form, sink_blocks, window_blocks, skips);
  check_kv_values(p.attention.problem.kv, k, p.attention.problem.batch);
  check_problem_values(p.attention.problem, q, num_rows);
  Tensor words = new_tensor(q, {num_rows, p.attention.problem.num_q_heads, p.num_words}, ScalarType::Int);
  Tensor counts = new_tensor(q, {num_rows, p.attention.problem.num_q_heads}, ScalarType::Int);
  p.words = static_cast<int32_t*>(words.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  if (counts.numel() > 0) cpu::skip_mask(p, executor());
  return {words, counts, skips};
}

Tensor tile_max(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows, int64_t block_m, int64_t block_n,
                bool causal, double softmax_scale, double softcap, std::string form) {
  TileMaxParams p = tile_max_params(q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                    max_seqlen_k, num_rows, block_m, block_n, causal, softmax_scale, softcap, form);
  check_kv_values(p.problem.kv, k, p.problem.batch);
  check_problem_values(p.problem, q, num_rows);
  Tensor maxima = new_tensor(q, {num_rows, p.problem.num_q_heads, p.max_blocks}, ScalarType::Float);
  p.maxima = static_cast<float*>(maxima.data_ptr());
  if (maxima.numel() > 0) cpu::tile_max(p, executor());
  return maxima;
}

Tensor block_mass(const Tensor& q, const Tensor& k, const Tensor& lse, const OptionalTensor& cu_seqlens_q,
                  const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                  const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows,
                  int64_t block_m, int64_t block_n, bool causal, double softmax_scale, double softcap) {
  BlockMassParams p = block_mass_params(q, k, lse, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                        max_seqlen_k, num_rows, block_m, block_n, causal, softmax_scale, softcap);
  check_kv_values(p.problem.kv, k, p.problem.batch);
  check_problem_values(p.problem, q, num_rows);
  Tensor mass = new_tensor(q, {num_rows, p.problem.num_q_heads, p.max_blocks}, ScalarType::Float);
  p.mass = static_cast<float*>(mass.data_ptr());
  if (mass.numel() > 0) cpu::block_mass(p, executor());
  return mass;
}

std::tuple<Tensor, Tensor> probe_attention(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                           const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                           const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                           int64_t block_m, bool causal, double softmax_scale, double softcap) {
  ProbeParams p = probe_params(q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q, max_seqlen_k,
                               block_m, causal, softmax_scale, softcap);
  check_kv_values(p.problem.kv, k, p.problem.batch);
  check_problem_values(p.problem, q, -1);
  Tensor vertical = new_tensor(q, {p.problem.batch, p.problem.num_q_heads, max_seqlen_k}, ScalarType::Float);
  Tensor slash = new_tensor(q, {p.problem.batch, p.problem.num_q_heads, max_seqlen_k}, ScalarType::Float);
  p.vertical = static_cast<float*>(vertical.data_ptr());
  p.slash = static_cast<float*>(slash.data_ptr());
  if (vertical.numel() > 0) cpu::probe_attention(p, executor());
  return {vertical, slash};
}

std::tuple<Tensor, Tensor> pattern_mask(const Tensor& base, const Tensor& query_aware, const Tensor& vertical,
                                        const Tensor& slash, const OptionalTensor& cu_seqlens_q,
                                        const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k,
                                        int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t block_m, int64_t block_n,
                                        bool causal, int64_t sink_blocks, int64_t window_blocks) {
  PatternParams p = pattern_params(base, query_aware, vertical, slash, cu_seqlens_q, cu_seqlens_k, seqlens_k,
                                   max_seqlen_q, max_seqlen_k, block_m, block_n, causal, sink_blocks, window_blocks);
  int64_t rows = 0;
  for (int32_t b = 0; b < p.problem.batch; ++b) {
    const SequenceGeometry g = sequence_geometry(p.problem, b);
    STD_TORCH_CHECK(g.seqlen_q >= 0 && g.seqlen_q <= max_seqlen_q && g.seqlen_k >= 0 && g.seqlen_k <= max_seqlen_k,
                    "sequence ", b, " has ", g.seqlen_q, " queries and ", g.seqlen_k, " keys: not in 0 .. max_seqlen");
    rows += g.num_tiles();
  }
  STD_TORCH_CHECK(rows <= p.num_rows, "base has ", p.num_rows, " rows, this problem needs ", rows);
  Tensor words = new_tensor(base, {p.num_rows, p.problem.num_q_heads, p.num_words}, ScalarType::Int);
  Tensor counts = new_tensor(base, {p.num_rows, p.problem.num_q_heads}, ScalarType::Int);
  p.words = static_cast<int32_t*>(words.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  if (counts.numel() > 0) cpu::pattern_mask(p, executor());
  return {words, counts};
}

TokenMaskTensors token_mask(const Tensor& indices, const OptionalTensor& cu_seqlens_q,
                            const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                            int64_t max_seqlen_k, int64_t num_rows, int64_t block_m, int64_t block_n, bool causal) {
  TokenMaskParams p = token_mask_params(indices, cu_seqlens_q, cu_seqlens_k, seqlens_k, max_seqlen_q, max_seqlen_k,
                                        num_rows, block_m, block_n, causal);
  for (int32_t b = 0; b < p.problem.batch; ++b) {
    const int32_t len = seqlen_k(p.problem.kv, b);
    STD_TORCH_CHECK(len >= 0 && len <= p.problem.kv.max_seqlen, "KV length ", len, " is not in 0 .. max_seqlen_k");
  }
  check_problem_values(p.problem, indices, num_rows);
  TokenMaskTensors made = new_token_mask(p, indices);
  cpu::token_mask(p, executor());
  return made;
}

}  // namespace

STABLE_TORCH_LIBRARY(bsfa, m) {
#define BSFA_DEF(schema) m.def(schema);
  BSFA_FOR_EACH_SCHEMA(BSFA_DEF)
#undef BSFA_DEF
}

STABLE_TORCH_LIBRARY_IMPL(bsfa, CPU, m) {
  m.impl("pool_blocks", TORCH_BOX(&pool_blocks));
  m.impl("summary_entries", TORCH_BOX(&summary_entries));
  m.impl("summary_window", TORCH_BOX(&summary_window));
  m.impl("score_blocks", TORCH_BOX(&score_blocks));
  m.impl("select_blocks", TORCH_BOX(&select_blocks));
  m.impl("token_mask", TORCH_BOX(&token_mask));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
  m.impl("attention_out", TORCH_BOX(&attention_out));
  m.impl("skip_attention", TORCH_BOX(&skip_attention));
  m.impl("skip_attention_out", TORCH_BOX(&skip_attention_out));
  m.impl("skip_mask", TORCH_BOX(&skip_mask));
  m.impl("tile_max", TORCH_BOX(&tile_max));
  m.impl("block_mass", TORCH_BOX(&block_mass));
  m.impl("probe_attention", TORCH_BOX(&probe_attention));
  m.impl("pattern_mask", TORCH_BOX(&pattern_mask));
}

}  // namespace bsfa::torch_ops
