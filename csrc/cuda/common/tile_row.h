// One query tile, and the KV blocks that its rows see.
#pragma once

#include <cstdint>

#include "bsfa/geometry.h"

namespace bsfa::cuda {

constexpr int32_t kTileRows = 128;   // query rows of a tile
constexpr int32_t kBlockKeys = 128;  // tokens of a KV block

// Where one query tile lies. Only rows [row_begin, row_end) of its 128 belong to the sequence.
struct alignas(32) TileRow {
  int32_t query_token;  // token coordinate of row 0 in q (may be negative, or in the sequence before)
  int32_t query_batch;  // batch coordinate in q: 0 when the queries are packed
  int32_t sequence;     // negative: the row belongs to none
  int32_t key_token;    // token coordinate of the sequence's first key: 0 unless the keys are packed
  int32_t position;     // of row 0, may be negative
  int32_t row_begin;
  int32_t row_end;
  int32_t seqlen_k;
};

// KV blocks that hold a key which some row of the tile may see.
BSFA_HOST_DEVICE inline BlockRange visible_range(const TileRow& tile, bool causal, int32_t window_left) {
  BlockRange range{0, ceil_div(tile.seqlen_k, kBlockKeys)};
  if (!causal) return range;
  const int32_t last = tile.position + tile.row_end - 1;
  range.end = last < 0 ? 0 : last / kBlockKeys + 1;
  if (window_left >= 0) {
    const int32_t first = tile.position + tile.row_begin - window_left;
    range.begin = first > 0 ? first / kBlockKeys : 0;
  }
  return range;
}

// KV blocks [0, whole_blocks) are seen whole by every row of the tile.
BSFA_HOST_DEVICE inline int32_t whole_blocks(const TileRow& tile, bool causal) {
  if (!causal) return ceil_div(tile.seqlen_k, kBlockKeys);
  const int32_t end = tile.position + tile.row_begin + 1;
  return end > 0 ? end / kBlockKeys : 0;
}

// KV blocks of which nothing has to be masked: all their keys exist, and every row of the tile sees all of them.
BSFA_HOST_DEVICE inline BlockRange unmasked_blocks(const TileRow& tile, bool causal, int32_t window_left) {
  BlockRange range{0, tile.seqlen_k / kBlockKeys};
  const int32_t seen = whole_blocks(tile, causal);
  if (seen < range.end) range.end = seen;
  if (window_left >= 0) {
    const int32_t first = tile.position + tile.row_end - 1 - window_left;
    range.begin = first > 0 ? ceil_div(first, kBlockKeys) : 0;
  }
  return range;
}

}  // namespace bsfa::cuda
