// Scores as operator score_blocks returns them, in place: logits or weights become the share of the row's weight that
// ranks strictly before each block (pick.cu says what the weights are, and what comes first); -1 where nothing is seen.
//
// Tile      one CTA per (mask row, query head); a thread owns every kThreads-th block and goes through the whole row:
//           quadratic in blocks, in one fixed order, without a sort. For calibration and plots, not for selection.
// Memory    reads and writes the row once; shared: its scores.
#include <cstdint>

#include "../common/launch.h"
#include "bsfa/cuda.h"
#include "bsfa/keep.h"
#include "keep_row.h"
#include "pick.h"

namespace bsfa::cuda {
namespace select {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

__global__ void __launch_bounds__(kThreads)
    rank_kernel(const __grid_constant__ ScoreParams params, const __grid_constant__ Slab slab) {
  extern __shared__ float scores[];
  __shared__ TeamScratch<kWarps> scratch;
  const int32_t heads = params.problem.num_q_heads;
  const int32_t in_slab = blockIdx.x / heads;
  const int32_t head = blockIdx.x - in_slab * heads;
  float* out = slab.scores + (int64_t{in_slab} * heads + head) * params.max_blocks;
  const TileRow tile = slab.rows[slab.row_begin + in_slab];
  int32_t visible = 0;
  if (tile.sequence >= 0) visible = min(visible_range(tile, params.problem.causal, -1).end, params.max_blocks);
  visible = max(visible, 0);
  const Team<kWarps> team{static_cast<int>(threadIdx.x), &scratch};
  for (int32_t j = visible + team.thread; j < params.max_blocks; j += kThreads) out[j] = -1.0f;
  if (visible == 0) return;

  const bool antidiagonal = params.rule == ScoreRule::kAntidiagonal;
  AlwaysKept ahead;  // what ranks before all others
  if (antidiagonal) {
    const SequenceGeometry geometry = sequence_geometry(params.problem, tile.sequence);
    ahead = always_kept(geometry, local_tile(geometry, tile), params.sink_blocks, params.window_blocks);
  }
  bool nan = false;
  uint32_t highest = 0;
  for (int32_t j = team.thread; j < visible; j += kThreads) {
    const float score = out[j];
    nan |= score != score;
    highest = max(highest, key_of(score));
    scores[j] = score;
  }
  team.sync();
  nan = team.any(nan);
  const float largest = score_of(team.largest(highest));
  const auto weight = [=](float score) { return antidiagonal ? score : exp2f(score - largest); };
  double total = 0.0;
  for (int32_t j = team.thread; j < visible; j += kThreads) total += static_cast<double>(weight(scores[j]));
  total = team.sum(total);
  const bool fine = !nan && total > 0.0 && total < static_cast<double>(INFINITY);

  for (int32_t j = team.thread; j < visible; j += kThreads) {
    const float own = scores[j];
    const bool own_ahead = ahead(j);
    double before = 0.0;
    for (int32_t i = 0; fine && i < visible; ++i) {
      const float other = scores[i];
      const bool other_ahead = ahead(i);
      bool ranks_before = other > own || (other == own && i < j);
      if (own_ahead || other_ahead) ranks_before = other_ahead && (!own_ahead || i < j);
      if (ranks_before) before += static_cast<double>(weight(other));
    }
    out[j] = fine ? static_cast<float>(before / total) : NAN;
  }
}

__global__ void __launch_bounds__(kThreads) fill_kernel(float* scores, const int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    scores[i] = -1.0f;
  }
}

}  // namespace

cudaError_t rank_blocks(const ScoreParams& params, const Slab& slab, cudaStream_t stream) {
  if (params.max_blocks > kMaxSelectBlocks || params.rule == ScoreRule::kRelativeMax) return cudaErrorInvalidValue;
  if (slab.row_end <= slab.row_begin || params.max_blocks == 0) return cudaSuccess;
  static DevicesDone allowed;
  const cudaError_t error =
      allow_shared_memory(allowed, rank_kernel, static_cast<int>(kMaxSelectBlocks * sizeof(float)));
  if (error != cudaSuccess) return error;
  const unsigned ctas = static_cast<unsigned>(slab.row_end - slab.row_begin) * params.problem.num_q_heads;
  rank_kernel<<<ctas, kThreads, params.max_blocks * sizeof(float), stream>>>(params, slab);
  return cudaGetLastError();
}

cudaError_t fill_invisible(float* scores, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t ctas = (count + kThreads - 1) / kThreads;
  fill_kernel<<<static_cast<unsigned>(ctas < 1024 ? ctas : 1024), kThreads, 0, stream>>>(scores, count);
  return cudaGetLastError();
}

}  // namespace select
}  // namespace bsfa::cuda
