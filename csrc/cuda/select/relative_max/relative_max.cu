// The relative-max kernel's host side: from SelectParams to the kernel that fits.
#include <algorithm>

#include "../relative_max.h"
#include "config.h"
#include "launch.h"

namespace bsfa::cuda::select {
namespace {

constexpr int kSharedBytes = 227 * 1024;  // of one SM
constexpr int kFixedBytes = sizeof(SharedStorage<Config<cute::bfloat16_t, 128, false>>);

int32_t energy_stride(const ScoreParams& params) { return ceil_div(params.max_blocks, kStepBlocks) * kStepBlocks; }

int32_t energy_slots(const ScoreParams& params) {
  const int64_t row = int64_t{energy_stride(params)} * sizeof(float);
  return kFixedBytes + 2 * row <= kSharedBytes ? 2 : kFixedBytes + row <= kSharedBytes ? 1 : 0;
}

cudaError_t make_maps(const ScoreParams& params, KernelParams& k) {
  const Problem& p = params.problem;
  const int halves = p.head_dim / kBoxColumns;
  const TensorExtent q{p.head_dim, params.q.tokens, p.num_q_heads, params.q.batch_size};
  const cudaError_t error = make_tensor_map(&k.q, params.q, q, p.dtype, kTileRows, halves);
  if (error != cudaSuccess) return error;
  TensorView means;  // blocks stand where tokens do
  means.data = const_cast<void*>(params.summary);
  means.head_stride = p.head_dim;
  means.token_stride = means.head_stride * p.num_kv_heads;
  means.batch_stride = means.token_stride * params.max_blocks;
  const TensorExtent extent{p.head_dim, params.max_blocks, p.num_kv_heads, p.batch};
  return make_tensor_map(&k.means, means, extent, p.dtype, kStepBlocks, halves);
}

}  // namespace

bool relative_max_fits(const ScoreParams& params) { return energy_slots(params) > 0; }

cudaError_t relative_max(const SelectParams& params, const Workspace& workspace, int num_sms, cudaStream_t stream) {
  const ScoreParams& score = params.score;
  const Problem& p = score.problem;
  const int64_t pairs = score.num_rows * score.score_heads();
  if (pairs == 0 || score.max_blocks == 0) return cudaSuccess;
  if (score.sharing == HeadSharing::kUnion || !relative_max_fits(score)) return cudaErrorInvalidValue;

  KernelParams k{};
  k.select = params;
  k.workspace = workspace;
  k.scale = logit_scale(p);
  k.rescue = rescue_of(params);
  k.heads_per_score_head = p.num_q_heads / score.score_heads();
  k.heads_per_kv_head = p.num_q_heads / p.num_kv_heads;
  k.energy_slots = energy_slots(score);
  k.energy_stride = energy_stride(score);
  const cudaError_t error = make_maps(score, k);
  if (error != cudaSuccess) return error;
  const int ctas = static_cast<int>(std::min<int64_t>(num_sms, pairs));
  const bool bf16 = p.dtype == DType::kBFloat16;
  if (p.head_dim == 64) return bf16 ? launch_bf16_d64(k, ctas, stream) : launch_fp16_d64(k, ctas, stream);
  return bf16 ? launch_bf16_d128(k, ctas, stream) : launch_fp16_d128(k, ctas, stream);
}

}  // namespace bsfa::cuda::select
