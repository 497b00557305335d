// SkipMaskParams, as the kernels that decide ahead of attention want it: those of calibrate/ by logits, that of
// select/bound/ by bounds.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bsfa/params.h"

namespace bsfa::cuda {

struct MaskOutput {
  Problem problem;
  const int32_t* within;  // null: all visible blocks
  int32_t within_heads;
  int32_t heads_per_within_head;
  int32_t num_words;  // of a row and head
  const float* thresholds;
  int32_t columns;
  int32_t sink_blocks;
  int32_t window_blocks;
  int32_t* words;  // null: no mask is wanted
  int32_t* counts;
  unsigned long long* skips;  // zeroed, for atomicAdd

  // The words of `within` for a row of the mask and a query head; null: all visible blocks.
  __host__ __device__ const uint32_t* within_row(int64_t row, int32_t head) const {
    if (within == nullptr) return nullptr;
    return reinterpret_cast<const uint32_t*>(within) + (row * within_heads + head / heads_per_within_head) * num_words;
  }
  // Of a head, for the absolute number of a query tile.
  __host__ __device__ float threshold(int32_t head, int32_t tile) const {
    const int32_t column = tile < 0 ? 0 : tile < columns ? tile : columns - 1;
    return thresholds[int64_t{head} * columns + column];
  }
};

inline MaskOutput mask_output(const SkipMaskParams& params) {
  const AttentionParams& a = params.attention;
  MaskOutput mask{};
  mask.problem = a.problem;
  mask.within = a.words;
  mask.within_heads = a.mask_heads;
  mask.heads_per_within_head = a.problem.num_q_heads / std::max(a.mask_heads, 1);
  mask.num_words = params.num_words;
  mask.thresholds = a.skip.thresholds;
  mask.columns = a.skip.columns;
  mask.sink_blocks = a.skip.sink_blocks;
  mask.window_blocks = a.skip.window_blocks;
  mask.words = params.words;
  mask.counts = params.counts;
  static_assert(sizeof(unsigned long long) == sizeof(int64_t));
  mask.skips = reinterpret_cast<unsigned long long*>(a.skip.counts);
  return mask;
}

}  // namespace bsfa::cuda
