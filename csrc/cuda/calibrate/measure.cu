// block_mass, tile_max and skip_mask on CUDA: from their parameters to the kernel that fits. It works on tiles of 128
// query rows; with block_m = 64 each half of one is a row of the results.
#include <algorithm>

#include "../common/key_boxes.h"
#include "../common/scan.h"
#include "../common/schedule.h"
#include "bsfa/cuda.h"
#include "sm90/config.h"
#include "sm90/launch.h"

namespace bsfa::cuda {
namespace {

using measure::KernelParams;
using measure::Quantity;

constexpr int kPrepareThreads = 256;

// Fills the results with what rows of no tile and blocks that no row sees hold. And, for results whose tiles are not
// those of the kernel: first_rows[b] = (row of sequence b's first tile) - (absolute number of that tile).
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(float* out, const int64_t count, const float fill, const __grid_constant__ Problem problem,
                   int32_t* first_rows) {
  const int64_t step = int64_t{gridDim.x} * kPrepareThreads;
  for (int64_t i = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x; i < count; i += step) out[i] = fill;
  if (first_rows == nullptr || blockIdx.x > 0) return;
  __shared__ int32_t scratch[kPrepareThreads / 32];
  __shared__ int32_t total;
  int32_t before = 0;  // tiles of the sequences of all trips so far
  for (int32_t first = 0; first < problem.batch; first += kPrepareThreads) {
    const int32_t sequence = first + static_cast<int32_t>(threadIdx.x);
    SequenceGeometry geometry;
    if (sequence < problem.batch) geometry = sequence_geometry(problem, sequence);
    const int32_t tiles = sequence < problem.batch ? geometry.num_tiles() : 0;
    const int32_t end = before + inclusive_sum<kPrepareThreads>(tiles, scratch);
    if (sequence < problem.batch) first_rows[sequence] = end - tiles - geometry.first_tile();
    if (threadIdx.x == kPrepareThreads - 1) total = end;
    __syncthreads();
    before = total;  // written again behind the barriers of the next sum
  }
}

// The problem as the kernel sees it, in tiles of its own size.
Problem in_work_tiles(const Problem& problem) {
  Problem p = problem;
  p.block_m = kTileRows;
  return p;
}

// What block_mass and tile_max have in common.
struct Measurement {
  const Problem& problem;
  const TensorView& q;
  const TensorView& k;
  int64_t num_rows;
  int32_t max_blocks;
  float* out;

  int64_t work_rows() const { return max_mask_rows(in_work_tiles(problem), q.tokens); }
};

cudaError_t make_maps(const Measurement& m, KernelParams& k) {
  const Problem& p = m.problem;
  const int halves = p.head_dim / kBoxColumns;
  const TensorExtent q{p.head_dim, m.q.tokens, p.num_q_heads, m.q.batch_size};
  const TensorExtent key{p.head_dim, m.k.tokens, p.num_kv_heads, m.k.batch_size};
  const cudaError_t error = make_tensor_map(&k.q, m.q, q, p.dtype, kTileRows, halves);
  if (error != cudaSuccess) return error;
  // Without keys nothing is fetched; the descriptor still has to be valid.
  const bool no_keys = m.k.tokens == 0 || m.k.batch_size == 0;
  return make_tensor_map(&k.k, no_keys ? m.q : m.k, no_keys ? q : key, p.dtype, k.box_rows,
                         k.box_rows == kBlockKeys ? halves : 1);
}

// Runs the kernel over results that have been prepared. `k` holds what is the quantity's own.
cudaError_t run(const Measurement& m, Quantity quantity, KernelParams& k, void* workspace, int sms,
                cudaStream_t stream) {
  const Problem& p = m.problem;
  const int64_t rows = m.work_rows(), pairs = rows * p.num_q_heads;
  if (!measure_supports(p) || pairs > INT32_MAX || m.num_rows > INT32_MAX) return cudaErrorInvalidValue;
  if (pairs == 0 || m.q.tokens == 0 || m.q.batch_size == 0) return cudaSuccess;
  k.workspace = Workspace::in(workspace, rows, p.num_q_heads);
  k.work_rows = rows;
  k.num_heads = p.num_q_heads;
  k.heads_per_kv_head = p.num_q_heads / p.num_kv_heads;
  k.causal = p.causal;
  set_key_boxes(p.kv, k);
  k.scale = logit_scale(p);
  k.unit = k.scale.transform == Transform::kNone ? p.softmax_scale : 1.0f;
  k.out = m.out;
  k.max_blocks = m.max_blocks;
  Tiling tiling{in_work_tiles(p), rows, p.num_q_heads, k.heads_per_kv_head};
  tiling.words = k.mask.within;
  tiling.mask_heads = k.mask.within_heads;
  tiling.num_words = k.mask.num_words;
  cudaError_t error = make_maps(m, k);
  if (error == cudaSuccess) error = make_order(tiling, k.workspace, sms, stream);
  if (error != cudaSuccess) return error;
  const int ctas = static_cast<int>(std::min<int64_t>(sms, pairs));
  const bool bf16 = p.dtype == DType::kBFloat16;
  const auto launch = p.head_dim == 64 ? (bf16 ? measure::launch_bf16_d64 : measure::launch_fp16_d64)
                                       : (bf16 ? measure::launch_bf16_d128 : measure::launch_fp16_d128);
  return launch(quantity, k, ctas, stream);
}

// Fills the results with `fill` before.
cudaError_t measure_all(const Measurement& m, Quantity quantity, float fill, KernelParams& k, void* workspace,
                        cudaStream_t stream) {
  const Problem& p = m.problem;
  const int64_t count = m.num_rows * p.num_q_heads * m.max_blocks;
  if (count == 0) return cudaSuccess;
  if (!measure_supports(p)) return cudaErrorInvalidValue;
  int sms = 0;
  cudaError_t error = num_sms(&sms);
  if (error != cudaSuccess) return error;
  int32_t* first_rows = nullptr;
  if (p.block_m != kTileRows) {
    char* memory = static_cast<char*>(workspace);
    first_rows = reinterpret_cast<int32_t*>(memory + Workspace::bytes(m.work_rows(), p.num_q_heads));
  }
  k.first_rows = first_rows;
  const int64_t ctas = std::min<int64_t>((count + kPrepareThreads - 1) / kPrepareThreads, int64_t{sms} * 8);
  prepare_kernel<<<static_cast<unsigned>(ctas), kPrepareThreads, 0, stream>>>(m.out, count, fill, p, first_rows);
  error = cudaGetLastError();
  return error == cudaSuccess ? run(m, quantity, k, workspace, sms, stream) : error;
}

Quantity maxima_of(SkipForm form) { return form == SkipForm::kRelative ? Quantity::kRelative : Quantity::kAbsolute; }

}  // namespace

bool measure_supports(const Problem& p) {
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && (p.head_dim == 64 || p.head_dim == 128) &&
         (p.block_m == kTileRows || p.block_m == measure::kGroupRows) && p.block_n == kBlockKeys;
}

int64_t measure_workspace_bytes(const Problem& problem, int64_t query_tokens) {
  const int64_t rows = max_mask_rows(in_work_tiles(problem), query_tokens);
  return Workspace::bytes(rows, problem.num_q_heads) + problem.batch * static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t block_mass(const BlockMassParams& params, void* workspace, cudaStream_t stream) {
  KernelParams k{};
  k.lse = params.lse;
  k.lse_batch_stride = params.lse_batch_stride;
  k.lse_head_stride = params.lse_head_stride;
  const Measurement m{params.problem, params.q, params.k, params.num_rows, params.max_blocks, params.mass};
  return measure_all(m, Quantity::kMass, 0.0f, k, workspace, stream);
}

cudaError_t tile_max(const TileMaxParams& params, void* workspace, cudaStream_t stream) {
  KernelParams k{};
  const Measurement m{params.problem, params.q, params.k, params.num_rows, params.max_blocks, params.maxima};
  return measure_all(m, maxima_of(params.form), -INFINITY, k, workspace, stream);
}

bool skip_mask_supports(const Problem& p) { return measure_supports(p) && p.block_m == kTileRows; }

cudaError_t skip_mask(const SkipMaskParams& params, void* workspace, cudaStream_t stream) {
  const AttentionParams& a = params.attention;
  const Problem& p = a.problem;
  if (!skip_mask_supports(p)) return cudaErrorInvalidValue;
  const int64_t pairs = a.num_rows * p.num_q_heads;
  int sms = 0;
  cudaError_t error = num_sms(&sms);
  const auto clear = [&](void* memory, size_t bytes) {
    if (error == cudaSuccess && bytes > 0) error = cudaMemsetAsync(memory, 0, bytes, stream);
  };
  clear(params.words, sizeof(int32_t) * pairs * params.num_words);
  clear(params.counts, sizeof(int32_t) * pairs);
  clear(a.skip.counts, sizeof(int64_t) * 2 * p.num_q_heads);
  if (error != cudaSuccess || pairs == 0 || params.num_words == 0) return error;
  KernelParams k{};
  k.mask = mask_output(params);
  const Measurement m{p, a.q, a.k, a.num_rows, 0, nullptr};
  return run(m, maxima_of(a.skip.form), k, workspace, sms, stream);
}

}  // namespace bsfa::cuda
