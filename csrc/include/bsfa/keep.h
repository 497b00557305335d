// Blocks that are kept whatever they score: sinks, the window, the last tiles of a prompt, and BFLA's rescue. For host
// and device.
#pragma once

#include <cstdint>

#include "bsfa/geometry.h"
#include "bsfa/params.h"

namespace bsfa {

// Blocks [0, sink_end) and [window_begin, window_end) of a tile's visible ones.
struct AlwaysKept {
  int32_t sink_end = 0;
  int32_t window_begin = 0;
  int32_t window_end = 0;

  BSFA_HOST_DEVICE bool operator()(int32_t block) const {
    return block < sink_end || (block >= window_begin && block < window_end);
  }
};

BSFA_HOST_DEVICE inline AlwaysKept always_kept(const SequenceGeometry& g, int32_t local_tile, int32_t sink_blocks,
                                               int32_t window_blocks) {
  const auto min = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto max = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int32_t visible = g.visible_blocks(local_tile);
  if (visible == 0) return {};
  const int64_t window = max(window_blocks, 1), limit = visible - 1;
  const int64_t tile = int64_t{g.first_tile()} + local_tile;
  const int64_t first_position = max(tile * g.block_m, 0);
  const int64_t last_position = min((tile + 1) * g.block_m, g.causal ? g.seqlen_k : g.seqlen_q) - 1;
  const int64_t first_block = min(first_position / g.block_n, limit);
  const int64_t last_block = min(max(first_block, last_position / g.block_n), limit);
  AlwaysKept kept;
  kept.sink_end = static_cast<int32_t>(min(sink_blocks, visible));
  kept.window_begin = static_cast<int32_t>(max(first_block - window + 1, 0));
  kept.window_end = static_cast<int32_t>(g.causal ? last_block + 1 : min(last_block + window, visible));
  return kept;
}

// Whether the tile is one of the last `last_tiles` of its prompt. `prompt_len`: the prompt's length where it is known
// and the call is causal, else negative.
BSFA_HOST_DEVICE inline bool is_last_tile(const SequenceGeometry& g, int32_t local_tile, int32_t last_tiles,
                                          int32_t prompt_len) {
  if (last_tiles <= 0) return false;
  const int32_t length = !g.causal ? g.seqlen_q : prompt_len >= 0 ? prompt_len : g.seqlen_k;
  return g.first_tile() + local_tile >= ceil_div(length, g.block_m) - last_tiles;
}

// How many of the best blocks are kept whatever the threshold. The product is rounded to float32 before the floor.
BSFA_HOST_DEVICE inline int32_t best_blocks(int32_t min_blocks, float min_ratio, int32_t visible) {
  if (min_ratio >= 1.0f) return visible;
  const int32_t by_ratio = min_ratio > 0.0f ? static_cast<int32_t>(min_ratio * static_cast<float>(visible)) : 0;
  const int32_t best = min_blocks > by_ratio ? min_blocks : by_ratio;
  return best < visible ? best : visible;
}

// BFLA's rescue of blocks that every rule drops. `tile` is absolute; `head` counts the mask's heads, so that a mask
// that is shared by a group draws once.
struct Rescue {
  int32_t stride = 0;  // 0: off
  int32_t parts = 0;   // of a million: the share of blocks that the hash keeps; 0: off
  int32_t seed = 1;

  BSFA_HOST_DEVICE bool operator()(int32_t tile, int32_t block, int32_t head) const {
    if (stride > 0 && (int64_t{131} * tile + int64_t{17} * block + seed) % stride == 0) return true;
    if (parts <= 0) return false;
    const uint64_t hash = (uint64_t(tile) + 1) * 1103515245u + (uint64_t(block) + 1) * 12345u +
                          (uint64_t(head) + 1) * 2654435761u + uint64_t(seed);
    return (hash & 0x7fffffffu) % 1000000u < uint32_t(parts);
  }
};

inline Rescue rescue_of(const SelectParams& params) {
  const double parts = double{params.rescue_probability} * 1e6;
  return {params.rescue_stride, parts >= 1e6 ? 1000000 : static_cast<int32_t>(parts), params.rescue_seed};
}

}  // namespace bsfa
