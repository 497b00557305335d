// The CUDA half of the torch operators: checks, allocation, and the launch on torch's current stream.
//
// Built into libbsfa_cuda.so, which is loaded after the extension that registers the schemas (schemas.h) and only where
// torch has CUDA. Lengths and page tables stay on the device: what they say is trusted, reading them would synchronise.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bsfa/cuda.h"
#include "bsfa/geometry.h"
#include "convert.h"
#include "convert_select.h"
#include "convert_skip.h"

namespace bsfa::torch_ops {
namespace {

// Makes the tensor's device current, and knows torch's current stream there.
class Launch {
 public:
  explicit Launch(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0,
                    "torch gave no CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "bsfa::", op, ": ", cudaGetErrorString(error));
}

void check_half_precision(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half, name,
                  " must be bfloat16 or float16 on CUDA");
}

Tensor new_workspace(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

Tensor pool_blocks(const Tensor& k, const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                   const OptionalTensor& seqlens_k, int64_t max_seqlen_k, int64_t block_n, std::string pooling) {
  check_half_precision(k, "k");
  PoolParams p = pool_params(k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k, block_n, pooling);
  STD_TORCH_CHECK(p.batch <= 65535, "at most 65535 sequences on CUDA");
  const Launch launch(k);
  Tensor out = new_tensor(k, {p.batch, p.max_blocks, p.num_kv_heads, p.head_dim}, k.scalar_type());
  p.out = out.data_ptr();
  check_launch(cuda::pool_blocks(p, launch.stream()), "pool_blocks");
  return out;
}

Tensor summary_entries(const Tensor& block_table, const Tensor& seqlens_k, int64_t page_size, int64_t block_n,
                       int64_t blocks, int64_t num_pages) {
  SummaryParams p = summary_entries_params(block_table, seqlens_k, page_size, block_n, blocks, num_pages);
  const Launch launch(seqlens_k);
  Tensor entries = new_tensor(seqlens_k, {p.batch, p.blocks}, ScalarType::Long);
  p.entries = static_cast<int64_t*>(entries.data_ptr());
  check_launch(cuda::summary_entries(p, launch.stream()), "summary_entries");
  return entries;
}

std::tuple<Tensor, Tensor> summary_window(const Tensor& block_table, const Tensor& seqlens_k, const Tensor& lengths_q,
                                          int64_t page_size, int64_t block_n, int64_t units) {
  SummaryParams p = summary_window_params(block_table, seqlens_k, lengths_q, page_size, block_n, units);
  const Launch launch(seqlens_k);
  Tensor table = new_tensor(seqlens_k, {p.batch, int64_t{p.units} * p.pages_of_unit()}, ScalarType::Int);
  Tensor seqlens = new_tensor(seqlens_k, {p.batch}, ScalarType::Int);
  p.table = static_cast<int32_t*>(table.data_ptr());
  p.window_seqlens = static_cast<int32_t*>(seqlens.data_ptr());
  check_launch(cuda::summary_window(p, launch.stream()), "summary_window");
  return {table, seqlens};
}

void check_selection(const ScoreParams& s) {
  STD_TORCH_CHECK(cuda::select_supports(s),
                  "this dtype, head_dim, block size, stride or head sharing has no CUDA kernel");
  STD_TORCH_CHECK(cuda::select_fits(s), s.max_blocks,
                  " KV blocks are more than the CUDA kernels of this rule can rank");
  const int64_t rows = max_mask_rows(s.problem, s.q.tokens);
  STD_TORCH_CHECK(s.num_rows >= rows, "the mask has ", s.num_rows, " rows, this problem needs ", rows);
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
  check_selection(s);
  const Launch launch(q);
  Tensor scores = new_tensor(q, {num_rows, s.score_heads(), s.max_blocks}, ScalarType::Float);
  s.scores = static_cast<float*>(scores.data_ptr());
  if (scores.numel() == 0) return scores;
  Tensor workspace = new_workspace(q, cuda::select_workspace_bytes(s));
  check_launch(cuda::score_blocks(s, workspace.data_ptr(), launch.stream()), "score_blocks");
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
  check_selection(s);
  SelectParams p = select_params(s, q, thresholds, last_tiles, min_blocks, min_ratio, probability, rescue_stride,
                                 rescue_probability, rescue_seed, prompt_lens, threshold);
  const Launch launch(q);
  Tensor words = new_tensor(q, {num_rows, s.mask_heads(), p.num_words}, ScalarType::Int);
  Tensor counts = new_tensor(q, {num_rows, s.mask_heads()}, ScalarType::Int);
  p.words = static_cast<int32_t*>(words.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  if (counts.numel() == 0) return {words, counts};
  Tensor workspace = new_workspace(q, cuda::select_workspace_bytes(s));
  check_launch(cuda::select_blocks(p, workspace.data_ptr(), launch.stream()), "select_blocks");
  return {words, counts};
}

// Scratch memory of select_blocks for a mask per query head, without the mask itself; asks no tensor.
int64_t select_workspace_bytes(int64_t num_rows, int64_t heads, int64_t max_seqlen_k, int64_t head_dim,
                               std::string rule, int64_t stride) {
  ScoreParams s;
  s.rule = to_rule(rule);
  s.stride = to_int32(stride, "stride");
  s.num_rows = num_rows;
  Problem& p = s.problem;
  p.dtype = DType::kBFloat16;
  p.batch = 1;
  p.num_q_heads = to_int32(heads, "heads");
  p.num_kv_heads = p.num_q_heads;
  p.head_dim = to_int32(head_dim, "head_dim");
  p.kv.max_seqlen = to_int32(max_seqlen_k, "max_seqlen_k");
  s.max_blocks = ceil_div(p.kv.max_seqlen, p.block_n);
  STD_TORCH_CHECK(num_rows >= 0 && heads > 0 && head_dim > 0 && stride > 0 && p.block_m % stride == 0,
                  "rows must be at least 0, heads and head_dim positive, stride a divisor of ", p.block_m);
  return cuda::select_workspace_bytes(s);
}

TokenMaskTensors token_mask(const Tensor& indices, const OptionalTensor& cu_seqlens_q,
                            const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                            int64_t max_seqlen_k, int64_t num_rows, int64_t block_m, int64_t block_n, bool causal) {
  TokenMaskParams p = token_mask_params(indices, cu_seqlens_q, cu_seqlens_k, seqlens_k, max_seqlen_q, max_seqlen_k,
                                        num_rows, block_m, block_n, causal);
  STD_TORCH_CHECK(block_m == 128 && block_n == 128, "token_mask has CUDA kernels for blocks of 128 x 128 tokens only");
  STD_TORCH_CHECK(p.row_words / 4 <= cuda::kMaxTokenBlocks, "max_seqlen_k is more than the CUDA kernel can take");
  const int64_t tokens = indices.dim() == 2 ? indices.size(0) : indices.size(0) * indices.size(1);
  const int64_t rows = max_mask_rows(p.problem, tokens);
  STD_TORCH_CHECK(num_rows >= rows, "num_rows is ", num_rows, ", this problem needs ", rows);
  const Launch launch(indices);
  TokenMaskTensors made = new_token_mask(p, indices);
  check_launch(cuda::token_mask(p, launch.stream()), "token_mask");
  return made;
}

// Checks `p`, made by attention_params, and completes it but for its outputs.
void finish_attention_params(AttentionParams& p) {
  STD_TORCH_CHECK(cuda::attention_supports(p.problem), "this dtype, head_dim or block size has no CUDA kernel");
  const int64_t rows = max_mask_rows(p.problem, p.q.tokens);
  STD_TORCH_CHECK(p.words == nullptr || p.num_rows >= rows, "the mask has ", p.num_rows, " rows, this problem needs ",
                  rows);
  p.num_rows = rows;
}

// Launches what `p`, made by attention_params, describes.
void run_attention(AttentionParams p, const Tensor& q, const Tensor& out, const OptionalTensor& lse, const char* op) {
  finish_attention_params(p);
  set_attention_outputs(p, q, out, lse);
  if (q.numel() == 0) return;
  const Launch launch(q);
  cuda::AttentionCall call;
  check_launch(cuda::prepare_attention(p, &call), op);
  const int64_t bytes = cuda::attention_workspace_bytes(call);
  const OptionalTensor workspace = bytes > 0 ? OptionalTensor(new_workspace(q, bytes)) : std::nullopt;
  check_launch(cuda::run_attention(call, workspace ? workspace->data_ptr() : nullptr, launch.stream()), op);
}

Tensor attention_out(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v,
                     const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                     const OptionalTensor& block_table, const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                     int64_t max_seqlen_k, const OptionalTensor& mask_words, const OptionalTensor& mask_counts,
                     const OptionalTensor& k_means, const OptionalTensor& v_means, int64_t block_m, int64_t block_n,
                     bool causal, double softmax_scale, double softcap, int64_t window_left,
                     const OptionalTensor& token_words) {
  const AttentionParams p = attention_params(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                             max_seqlen_k, mask_words, mask_counts, k_means, v_means, block_m, block_n,
                                             causal, softmax_scale, softcap, window_left, token_words);
  Tensor lse = new_lse(q);
  run_attention(p, q, out, lse, "attention");
  return lse;
}

Tensor dense_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double softmax_scale,
                       double softcap, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                       const OptionalTensor& block_table, const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                       int64_t max_seqlen_k) {
  const AttentionParams p = dense_params(q, k, v, causal, softmax_scale, softcap, cu_seqlens_q, cu_seqlens_k,
                                         block_table, seqlens_k, max_seqlen_q, max_seqlen_k);
  Tensor out = new_attention_out(q, v);
  run_attention(p, q, out, std::nullopt, "dense_attention");
  return out;
}

// A call of dense_attention but for where its tensors lie.
struct PreparedDense {
  cuda::AttentionCall call;
  int32_t device;
};

// The bytes of a PreparedDense, on the CPU; none if other addresses alone would not do for another call.
Tensor prepare_dense(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double softmax_scale,
                     double softcap) {
  PreparedDense prepared;
  int64_t bytes = 0;
  if (q.numel() > 0) {
    AttentionParams p = dense_params(q, k, v, causal, softmax_scale, softcap, std::nullopt, std::nullopt, std::nullopt,
                                     std::nullopt, 0, 0);
    finish_attention_params(p);
    const int64_t row = int64_t{p.problem.num_q_heads} * p.problem.head_dim_v;
    // Where it will lie comes with each call; until then any place does.
    p.out = {p.q.data, p.q.tokens * row, row, p.problem.head_dim_v, p.q.batch_size, p.q.tokens};
    const Launch launch(q);
    check_launch(cuda::prepare_attention(p, &prepared.call), "prepare_dense");
    prepared.device = q.get_device_index();
    if (cuda::attention_moves(prepared.call)) bytes = sizeof(prepared);
  }
  const int64_t step = 1;
  AtenTensorHandle made = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_empty_strided(1, &bytes, &step, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &made) == 0,
      "torch could not allocate a tensor");
  Tensor answer(made);
  if (bytes > 0) std::memcpy(answer.data_ptr(), &prepared, bytes);
  return answer;
}

// Runs a PreparedDense on q, k, v, out; 0 if it did. Called by csrc/python/prepared.cpp.
int run_prepared(const void* prepared, void* const* tensors) {
  PreparedDense call;
  std::memcpy(&call, prepared, sizeof(call));
  void* stream = nullptr;
  if (cuda::move_attention(call.call, tensors[0], tensors[1], tensors[2], tensors[3]) != cudaSuccess ||
      aoti_torch_get_current_cuda_stream(call.device, &stream) != 0) {
    return 1;
  }
  return cuda::run_attention(call.call, nullptr, static_cast<cudaStream_t>(stream)) == cudaSuccess ? 0 : 1;
}

// Where run_prepared() lies.
int64_t prepared_runner() { return reinterpret_cast<int64_t>(&run_prepared); }

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
  const Launch launch(q);
  Tensor skips = new_tensor(q, {p.problem.num_q_heads, 2}, ScalarType::Long);
  check_launch(cudaMemsetAsync(skips.data_ptr(), 0, skips.numel() * sizeof(int64_t), launch.stream()),
               "skip_attention");
  set_skip(p, q, thresholds, form, sink_blocks, window_blocks, counted, skips);
  Tensor lse = new_lse(q);
  run_attention(p, q, out, lse, "skip_attention");
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

std::tuple<Tensor, Tensor> probe_attention(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                           const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                           const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                           int64_t block_m, bool causal, double softmax_scale, double softcap) {
  ProbeParams p = probe_params(q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q, max_seqlen_k,
                               block_m, causal, softmax_scale, softcap);
  STD_TORCH_CHECK(cuda::probe_attention_supports(p),
                  "this dtype, head_dim, block_m or these strides have no CUDA kernel of probe_attention");
  const Launch launch(q);
  Tensor vertical = new_tensor(q, {p.problem.batch, p.problem.num_q_heads, max_seqlen_k}, ScalarType::Float);
  Tensor slash = new_tensor(q, {p.problem.batch, p.problem.num_q_heads, max_seqlen_k}, ScalarType::Float);
  if (vertical.numel() == 0) return {vertical, slash};
  p.vertical = static_cast<float*>(vertical.data_ptr());
  p.slash = static_cast<float*>(slash.data_ptr());
  Tensor workspace = new_workspace(q, cuda::probe_attention_workspace_bytes(p));
  check_launch(cuda::probe_attention(p, workspace.data_ptr(), launch.stream()), "probe_attention");
  return {vertical, slash};
}

std::tuple<Tensor, Tensor> pattern_mask(const Tensor& base, const Tensor& query_aware, const Tensor& vertical,
                                        const Tensor& slash, const OptionalTensor& cu_seqlens_q,
                                        const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k,
                                        int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t block_m, int64_t block_n,
                                        bool causal, int64_t sink_blocks, int64_t window_blocks) {
  PatternParams p = pattern_params(base, query_aware, vertical, slash, cu_seqlens_q, cu_seqlens_k, seqlens_k,
                                   max_seqlen_q, max_seqlen_k, block_m, block_n, causal, sink_blocks, window_blocks);
  const Launch launch(base);
  Tensor words = new_tensor(base, {p.num_rows, p.problem.num_q_heads, p.num_words}, ScalarType::Int);
  Tensor counts = new_tensor(base, {p.num_rows, p.problem.num_q_heads}, ScalarType::Int);
  p.words = static_cast<int32_t*>(words.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  check_launch(cuda::pattern_mask(p, launch.stream()), "pattern_mask");
  return {words, counts};
}

void check_measurement(const Problem& p, const TensorView& q, int64_t num_rows) {
  STD_TORCH_CHECK(cuda::measure_supports(p), "this dtype, head_dim or block size has no CUDA kernel");
  const int64_t rows = max_mask_rows(p, q.tokens);
  STD_TORCH_CHECK(num_rows >= rows, "num_rows is ", num_rows, ", this problem needs ", rows);
}

Tensor block_mass(const Tensor& q, const Tensor& k, const Tensor& lse, const OptionalTensor& cu_seqlens_q,
                  const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                  const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows,
                  int64_t block_m, int64_t block_n, bool causal, double softmax_scale, double softcap) {
  BlockMassParams p = block_mass_params(q, k, lse, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                        max_seqlen_k, num_rows, block_m, block_n, causal, softmax_scale, softcap);
  check_measurement(p.problem, p.q, num_rows);
  const Launch launch(q);
  Tensor mass = new_tensor(q, {num_rows, p.problem.num_q_heads, p.max_blocks}, ScalarType::Float);
  if (mass.numel() == 0) return mass;
  p.mass = static_cast<float*>(mass.data_ptr());
  Tensor workspace = new_workspace(q, cuda::measure_workspace_bytes(p.problem, p.q.tokens));
  check_launch(cuda::block_mass(p, workspace.data_ptr(), launch.stream()), "block_mass");
  return mass;
}

// New tensors for the mask of skip_mask or bound_mask; `p` points at them.
std::tuple<Tensor, Tensor> new_skip_mask(SkipMaskParams& p, const Tensor& q) {
  const Problem& problem = p.attention.problem;
  const int64_t num_rows = p.attention.num_rows, rows = max_mask_rows(problem, p.attention.q.tokens);
  STD_TORCH_CHECK(num_rows >= rows, "num_rows is ", num_rows, ", this problem needs ", rows);
  Tensor words = new_tensor(q, {num_rows, problem.num_q_heads, p.num_words}, ScalarType::Int);
  Tensor counts = new_tensor(q, {num_rows, problem.num_q_heads}, ScalarType::Int);
  p.words = static_cast<int32_t*>(words.data_ptr());
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  return {words, counts};
}

std::tuple<Tensor, Tensor, Tensor> skip_mask(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                             const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                             const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                                             int64_t max_seqlen_k, int64_t num_rows, const OptionalTensor& mask_words,
                                             int64_t block_m, int64_t block_n, bool causal, double softmax_scale,
                                             double softcap, const Tensor& thresholds, std::string form,
                                             int64_t sink_blocks, int64_t window_blocks) {
  const Launch launch(q);
  Tensor skips = new_tensor(q, {q.size(q.dim() - 2), 2}, ScalarType::Long);
  SkipMaskParams p = skip_mask_params(q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                      max_seqlen_k, num_rows, mask_words, block_m, block_n, causal, softmax_scale,
                                      softcap, thresholds, form, sink_blocks, window_blocks, skips);
  const Problem& problem = p.attention.problem;
  STD_TORCH_CHECK(cuda::skip_mask_supports(problem), "this dtype, head_dim or block size has no CUDA kernel");
  auto [words, counts] = new_skip_mask(p, q);
  Tensor workspace = new_workspace(q, cuda::measure_workspace_bytes(problem, p.attention.q.tokens));
  check_launch(cuda::skip_mask(p, workspace.data_ptr(), launch.stream()), "skip_mask");
  return {words, counts, skips};
}

std::tuple<Tensor, Tensor, Tensor> bound_mask(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                                              const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                              const OptionalTensor& seqlens_k, int64_t max_seqlen_q,
                                              int64_t max_seqlen_k, int64_t num_rows, const OptionalTensor& mask_words,
                                              int64_t block_m, int64_t block_n, bool causal, double softmax_scale,
                                              double softcap, const Tensor& thresholds, std::string form,
                                              int64_t sink_blocks, int64_t window_blocks) {
  const Launch launch(q);
  Tensor skips = new_tensor(q, {q.size(q.dim() - 2), 2}, ScalarType::Long);
  SkipMaskParams p = skip_mask_params(q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                      max_seqlen_k, num_rows, mask_words, block_m, block_n, causal, softmax_scale,
                                      softcap, thresholds, form, sink_blocks, window_blocks, skips);
  STD_TORCH_CHECK(cuda::bound_mask_supports(p.attention.problem),
                  "this dtype, head_dim or block size has no CUDA kernel, or sequences are too long or too many");
  auto [words, counts] = new_skip_mask(p, q);
  if (words.numel() == 0 || q.numel() == 0 || k.numel() == 0) {  // nobody sees anything
    for (const auto& [tensor, bytes] : {std::pair(words, 4), std::pair(counts, 4), std::pair(skips, 8)}) {
      if (tensor.numel() == 0) continue;
      check_launch(cudaMemsetAsync(tensor.data_ptr(), 0, tensor.numel() * bytes, launch.stream()), "bound_mask");
    }
    return {words, counts, skips};
  }
  Tensor workspace = new_workspace(q, cuda::bound_mask_workspace_bytes(p));
  check_launch(cuda::bound_mask(p, workspace.data_ptr(), launch.stream()), "bound_mask");
  return {words, counts, skips};
}

Tensor tile_max(const Tensor& q, const Tensor& k, const OptionalTensor& cu_seqlens_q,
                const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_rows, int64_t block_m, int64_t block_n,
                bool causal, double softmax_scale, double softcap, std::string form) {
  TileMaxParams p = tile_max_params(q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k, max_seqlen_q,
                                    max_seqlen_k, num_rows, block_m, block_n, causal, softmax_scale, softcap, form);
  check_measurement(p.problem, p.q, num_rows);
  const Launch launch(q);
  Tensor maxima = new_tensor(q, {num_rows, p.problem.num_q_heads, p.max_blocks}, ScalarType::Float);
  if (maxima.numel() == 0) return maxima;
  p.maxima = static_cast<float*>(maxima.data_ptr());
  Tensor workspace = new_workspace(q, cuda::measure_workspace_bytes(p.problem, p.q.tokens));
  check_launch(cuda::tile_max(p, workspace.data_ptr(), launch.stream()), "tile_max");
  return maxima;
}

// Rows of cuda_kernels() for score_blocks or select_blocks, which run the same kernels; each ends with a comma.
std::string selection_rows(const std::string& op) {
  const auto row = [&op](int32_t max_blocks, const char* rest) {
    return R"({"device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "blocks": "128x128", "op": ")" + op +
           "\", \"max_blocks\": " + std::to_string(max_blocks) + ", " + rest + "},\n    ";
  };
  return row(cuda::kMaxRelativeMaxBlocks,
             R"("head_dim": "64, 128", "rule": "relative_max", "sharing": "none, group")") +
         row(cuda::kMaxSelectBlocks, R"("head_dim": "64, 128", "rule": "flat64, antidiagonal", "stride": "4..64")") +
         row(cuda::kMaxSelectBlocks, R"("head_dim": "1..256", "rule": "pooled")");
}

// JSON: one row per compiled CUDA kernel, with the keys of bsfa._C.kernels(); a head_dim 192/128 is one of 128 in v.
// Where a row does not take all of them also `rule` and `sharing` (as in schemas.h), `stride` of antidiagonals, and
// `max_blocks`, the KV blocks of a mask row.
std::string cuda_kernels() {
  return R"([
    {"op": "pool_blocks", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "head_dim": "any"},
    )" + selection_rows("score_blocks") +
         selection_rows("select_blocks") +
         R"({"op": "probe_attention", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16",
     "head_dim": "64, 128", "blocks": "128x128"},
    {"op": "pattern_mask", "device": "cuda", "arch": "sm_90a", "dtypes": "int32", "head_dim": "any"},
    {"op": "token_mask", "device": "cuda", "arch": "sm_90a", "dtypes": "int32", "head_dim": "any",
     "blocks": "128x128", "max_blocks": )" +
         std::to_string(cuda::kMaxTokenBlocks) + R"(},
    {"op": "attention", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16",
     "head_dim": "64, 128, 192/128", "blocks": "128x128"},
    {"op": "skip_attention", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16",
     "head_dim": "64, 128", "blocks": "128x128"},
    {"op": "skip_mask", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "head_dim": "64, 128",
     "blocks": "128x128"},
    {"op": "bound_mask", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "head_dim": "64, 128",
     "blocks": "128x128", "max_blocks": )" +
         std::to_string(cuda::kMaxBoundBlocks) + R"(},
    {"op": "block_mass", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "head_dim": "64, 128",
     "blocks": "64x128, 128x128"},
    {"op": "tile_max", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "head_dim": "64, 128",
     "blocks": "64x128, 128x128"}
  ])";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bsfa, m) {
  m.def("cuda_kernels() -> str");
  m.def("prepare_dense(Tensor q, Tensor k, Tensor v, bool causal, float softmax_scale, float softcap) -> Tensor");
  m.def("prepared_runner() -> int");
  m.def(
      "select_workspace_bytes(SymInt num_rows, int heads, SymInt max_seqlen_k, int head_dim, str rule, int stride) -> "
      "int");
}

STABLE_TORCH_LIBRARY_IMPL(bsfa, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels", TORCH_BOX(&cuda_kernels));
  m.impl("prepared_runner", TORCH_BOX(&prepared_runner));
  m.impl("select_workspace_bytes", TORCH_BOX(&select_workspace_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(bsfa, CUDA, m) {
  m.impl("pool_blocks", TORCH_BOX(&pool_blocks));
  m.impl("summary_entries", TORCH_BOX(&summary_entries));
  m.impl("summary_window", TORCH_BOX(&summary_window));
  m.impl("score_blocks", TORCH_BOX(&score_blocks));
  m.impl("select_blocks", TORCH_BOX(&select_blocks));
  m.impl("probe_attention", TORCH_BOX(&probe_attention));
  m.impl("pattern_mask", TORCH_BOX(&pattern_mask));
  m.impl("token_mask", TORCH_BOX(&token_mask));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("dense_attention", TORCH_BOX(&dense_attention));
  m.impl("prepare_dense", TORCH_BOX(&prepare_dense));
  m.impl("attention_out", TORCH_BOX(&attention_out));
  m.impl("skip_attention", TORCH_BOX(&skip_attention));
  m.impl("skip_attention_out", TORCH_BOX(&skip_attention_out));
  m.impl("block_mass", TORCH_BOX(&block_mass));
  m.impl("skip_mask", TORCH_BOX(&skip_mask));
  m.impl("bound_mask", TORCH_BOX(&bound_mask));
  m.impl("tile_max", TORCH_BOX(&tile_max));
}

}  // namespace bsfa::torch_ops
