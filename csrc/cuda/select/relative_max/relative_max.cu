// The relative-max kernel's host side: from SelectParams to the kernel that fits.
#include <algorithm>

#include "../../common/launch.h"
#include "../relative_max.h"
#include "bsfa/cuda.h"
#include "config.h"
#include "launch.h"

namespace bsfa::cuda::select {
namespace {

static_assert(Shared<Config<cute::bfloat16_t, 128, false>>::bytes(kMinQuerySlots, 1, kMaxRelativeMaxBlocks) <=
              kMostSharedBytes);

// As many slots of energies and queries as there is room for; false if there is none.
bool set_slots(const ScoreParams& params, KernelParams& k) {
  k.energy_stride = ceil_div(params.max_blocks, kStepBlocks) * kStepBlocks;
  const auto bytes = params.problem.head_dim == 64 ? Shared<Config<cute::bfloat16_t, 64, false>>::bytes
                                                   : Shared<Config<cute::bfloat16_t, 128, false>>::bytes;
  if (k.energy_stride > kMostSharedBytes / static_cast<int>(sizeof(float))) return false;
  for (k.energy_slots = kMaxEnergySlots; k.energy_slots > 0; k.energy_slots /= 2) {
    for (k.query_slots = kMaxQuerySlots; k.query_slots >= kMinQuerySlots; --k.query_slots) {
      if (bytes(k.query_slots, k.energy_slots, k.energy_stride) <= kMostSharedBytes) return true;
    }
  }
  return false;
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

bool relative_max_fits(const ScoreParams& params) {
  KernelParams k{};
  return set_slots(params, k);
}

cudaError_t relative_max(const SelectParams& params, const Workspace& workspace, int num_sms, cudaStream_t stream) {
  const ScoreParams& score = params.score;
  const Problem& p = score.problem;
  const int64_t pairs = score.num_rows * score.score_heads();
  if (pairs == 0 || score.max_blocks == 0) return cudaSuccess;
  KernelParams k{};
  if (score.sharing == HeadSharing::kUnion || !set_slots(score, k)) return cudaErrorInvalidValue;
  k.select = params;
  k.workspace = workspace;
  k.scale = logit_scale(p);
  k.rescue = rescue_of(params);
  k.group = std::max(score.score_heads() / p.num_kv_heads, 1);
  k.heads_per_score_head = p.num_q_heads / score.score_heads();
  k.heads_per_kv_head = p.num_q_heads / p.num_kv_heads;
  const cudaError_t error = make_maps(score, k);
  if (error != cudaSuccess) return error;
  const int ctas = static_cast<int>(std::min<int64_t>(num_sms, pairs));
  const bool bf16 = p.dtype == DType::kBFloat16;
  if (p.head_dim == 64) return bf16 ? launch_bf16_d64(k, ctas, stream) : launch_fp16_d64(k, ctas, stream);
  return bf16 ? launch_bf16_d128(k, ctas, stream) : launch_fp16_d128(k, ctas, stream);
}

}  // namespace bsfa::cuda::select
