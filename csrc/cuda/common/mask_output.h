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
