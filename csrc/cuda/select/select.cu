// Block selection on CUDA: from ScoreParams and SelectParams to the kernels that the rule needs.
//
//   kRelativeMax   one kernel for scores and masks (relative_max.h), in the order that make_order finds
//   all others     slab by slab of mask rows: scores (score.h) into scratch memory of a fixed size, then masks from
//                  them (pick.h). So memory does not grow with tiles x blocks.
#include <algorithm>

#include "../common/alignment.h"
#include "../common/schedule.h"
#include "bsfa/cuda.h"
#include "pick.h"
#include "relative_max.h"
#include "score.h"

namespace bsfa::cuda {
namespace {

// Scores of a slab, and what grows with them. kFlat64 works on 64 mask rows at a time, which at a million tokens and 32
// heads are 68 MB. The other rules could do with less; the strided kernels lose time at the end of every slab.
constexpr int64_t kSlabBytes = 40 << 20;
constexpr int64_t kStridedSlabBytes = 72 << 20;
constexpr int32_t kSlabStep = 16;  // rows
constexpr int32_t kMostSlabRows = 1 << 20;
constexpr int kUsualSms = 132;  // of an H100 or H200, to speak of memory where there is no device

bool is_strided(ScoreRule rule) { return rule == ScoreRule::kFlat64 || rule == ScoreRule::kAntidiagonal; }

// Mask rows whose scores are made at a time: whole steps of the score kernels where the memory allows it.
int32_t slab_rows(const ScoreParams& params) {
  const int64_t row_bytes =
      int64_t{params.problem.num_q_heads} * (params.max_blocks + params.problem.head_dim) * sizeof(float);
  const int64_t bytes = is_strided(params.rule) ? kStridedSlabBytes : kSlabBytes;
  const int64_t fits = std::max<int64_t>(bytes / std::max<int64_t>(row_bytes, 1), 1);
  const int64_t group = params.rule == ScoreRule::kFlat64 ? 64 : params.stride;  // tokens: rows of one output tile
  int64_t step = kSlabStep;
  for (const int64_t wanted : {group, 2 * group}) {
    if (is_strided(params.rule) && wanted > step && fits >= wanted) step = wanted;
  }
  const int64_t rows = std::min<int64_t>(fits >= step ? fits / step * step : fits, kMostSlabRows);
  return static_cast<int32_t>(std::min(rows, params.num_rows));
}

int64_t scratch_bytes(const ScoreParams& params, int sms) {
  const int32_t rows = slab_rows(params);
  return is_strided(params.rule) ? select::strided_scratch_bytes(params, rows, sms)
                                 : select::pooled_scratch_bytes(params, rows);
}

// Heads that the order of tiles tells apart: the slabs only need to know where the tiles lie.
int32_t order_heads(const ScoreParams& params) {
  return params.rule == ScoreRule::kRelativeMax ? params.score_heads() : 1;
}

Tiling tiling_of(const ScoreParams& params) {
  const int32_t heads = order_heads(params);
  return {params.problem, params.num_rows, heads, std::max(heads / params.problem.num_kv_heads, 1)};
}

// The same for both operators: [what make_order writes | the score kernel's scratch | scores of a slab].
struct Memory {
  Workspace order;
  void* scratch;
  float* scores;
};

Memory cut_up(const ScoreParams& params, void* workspace, int sms) {
  char* at = static_cast<char*>(workspace);
  Memory memory{};
  memory.order = Workspace::in(at, params.num_rows, order_heads(params));
  if (params.rule == ScoreRule::kRelativeMax) return memory;
  at += Workspace::bytes(params.num_rows, order_heads(params));
  memory.scratch = at;
  memory.scores = reinterpret_cast<float*>(at + aligned(scratch_bytes(params, sms)));
  return memory;
}

bool runs(const ScoreParams& params) {
  return select_supports(params) && params.num_rows <= INT32_MAX &&
         params.num_rows * params.problem.num_q_heads <= INT32_MAX;
}

// Scores every slab and hands it to `use(slab)`. `scores`: of all rows, or null for the scratch memory.
template <typename Use>
cudaError_t for_each_slab(const ScoreParams& params, const Memory& memory, float* scores, int sms, cudaStream_t stream,
                          Use use) {
  const int64_t row_size = int64_t{params.problem.num_q_heads} * params.max_blocks;
  const int64_t step = slab_rows(params);
  for (int64_t begin = 0; begin < params.num_rows; begin += step) {
    const int64_t end = std::min(begin + step, params.num_rows);
    select::Slab slab{memory.order.rows, static_cast<int32_t>(begin), static_cast<int32_t>(end), memory.scores};
    if (scores != nullptr) slab.scores = scores + begin * row_size;
    cudaError_t error = is_strided(params.rule) ? select::score_strided(params, slab, memory.scratch, sms, stream)
                                                : select::score_pooled(params, slab, memory.scratch, stream);
    if (error == cudaSuccess) error = use(slab);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Whether every mask row holds a query tile, and natural order, which kRelativeMax's kernel then follows by itself,
// needs no look at lengths: nothing is prepared, and the workspace stays untouched.
bool in_natural_order(const ScoreParams& params) {
  return params.rule == ScoreRule::kRelativeMax && all_alike(params.problem) &&
         params.num_rows == max_mask_rows(params.problem, params.q.tokens);
}

bool has_queries(const ScoreParams& params) { return params.q.tokens > 0 && params.q.batch_size > 0; }

}  // namespace

bool select_supports(const ScoreParams& params) {
  const Problem& p = params.problem;
  const bool halves = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  if (!halves || p.block_m != kTileRows || p.block_n != kBlockKeys) return false;
  if (params.rule == ScoreRule::kPooled) return p.head_dim >= 1 && p.head_dim <= 256;
  if (params.rule == ScoreRule::kRelativeMax && params.sharing == HeadSharing::kUnion) return false;
  const bool stride_fits = params.rule != ScoreRule::kAntidiagonal || (params.stride >= 4 && params.stride <= 64);
  return stride_fits && (p.head_dim == 64 || p.head_dim == 128);
}

bool select_fits(const ScoreParams& params) {
  return params.rule == ScoreRule::kRelativeMax ? select::relative_max_fits(params)
                                                : params.max_blocks <= kMaxSelectBlocks;
}

int64_t select_workspace_bytes(const ScoreParams& params) {
  if (params.num_rows == 0 || in_natural_order(params)) return 0;
  const int64_t order = Workspace::bytes(params.num_rows, order_heads(params));
  if (params.rule == ScoreRule::kRelativeMax) return order;
  int sms = kUsualSms;
  if (num_sms(&sms) != cudaSuccess) {
    sms = kUsualSms;
    cudaGetLastError();  // having no device is no error here
  }
  const int64_t slab = int64_t{slab_rows(params)} * params.problem.num_q_heads * params.max_blocks * sizeof(float);
  return order + aligned(scratch_bytes(params, sms)) + slab;
}

cudaError_t select_blocks(const SelectParams& params, void* workspace, cudaStream_t stream) {
  const ScoreParams& score = params.score;
  const int64_t mask_rows = score.num_rows * score.mask_heads();
  if (!runs(score) || !select_fits(score)) return cudaErrorInvalidValue;
  if (mask_rows == 0) return cudaSuccess;
  const bool nothing = !has_queries(score) || score.max_blocks == 0;
  const bool fused = score.rule == ScoreRule::kRelativeMax;
  if (nothing) {
    cudaError_t error = cudaMemsetAsync(params.counts, 0, mask_rows * sizeof(int32_t), stream);
    if (error == cudaSuccess && params.num_words > 0) {
      error = cudaMemsetAsync(params.words, 0, mask_rows * params.num_words * sizeof(int32_t), stream);
    }
    return error;
  }
  int sms = 0;
  cudaError_t error = num_sms(&sms);
  if (error != cudaSuccess) return error;
  if (in_natural_order(score)) return select::relative_max(params, {}, sms, stream);
  const Memory memory = cut_up(score, workspace, sms);
  Tiling tiling = tiling_of(score);
  if (fused) {  // whose kernel leaves out rows that hold no query
    tiling.unused_words = params.words;
    tiling.unused_counts = params.counts;
    tiling.unused_row_counts = score.mask_heads();
    tiling.unused_row_words = tiling.unused_row_counts * params.num_words;
  }
  error = make_order(tiling, memory.order, sms, stream);
  if (error != cudaSuccess) return error;
  if (fused) return select::relative_max(params, memory.order, sms, stream);
  return for_each_slab(score, memory, nullptr, sms, stream,
                       [&](const select::Slab& slab) { return select::pick_blocks(params, slab, stream); });
}

cudaError_t score_blocks(const ScoreParams& params, void* workspace, cudaStream_t stream) {
  if (!runs(params) || !select_fits(params)) return cudaErrorInvalidValue;
  const int64_t count = params.num_rows * params.score_heads() * params.max_blocks;
  if (count == 0) return cudaSuccess;
  const bool fused = params.rule == ScoreRule::kRelativeMax;
  if ((fused && !in_natural_order(params)) || !has_queries(params)) {
    const cudaError_t error = select::fill_invisible(params.scores, count, stream);
    if (error != cudaSuccess || !has_queries(params)) return error;
  }
  int sms = 0;
  cudaError_t error = num_sms(&sms);
  if (error != cudaSuccess) return error;
  SelectParams select;
  select.score = params;
  if (in_natural_order(params)) return select::relative_max(select, {}, sms, stream);
  const Memory memory = cut_up(params, workspace, sms);
  error = make_order(tiling_of(params), memory.order, sms, stream);
  if (error != cudaSuccess) return error;
  if (fused) return select::relative_max(select, memory.order, sms, stream);
  return for_each_slab(params, memory, params.scores, sms, stream,
                       [&](const select::Slab& slab) { return select::rank_blocks(params, slab, stream); });
}

}  // namespace bsfa::cuda
