// The order in which query tiles are worked on: long ones first, by their real number of KV blocks.
//
// Two small kernels prepare it on the device, so that no length and no mask is ever read by the host:
//   count   one CTA per mask row: where the tile lies (TileRow), and how many blocks each of its heads will visit
//   order   one CTA: a stable counting sort of all (tile, head) pairs; where there are few, it also does the first's
//           work
// Where there is no mask and all sequences are alike the order is a formula (known_order.h): one kernel writes it out.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "bsfa/geometry.h"
#include "bsfa/params.h"
#include "known_order.h"
#include "tile_row.h"

namespace bsfa::cuda {

// What is to be ordered: the tiles of all mask rows, for `heads` heads each. `group` heads follow each other.
struct Tiling {
  Problem problem;
  int64_t num_rows = 0;  // at least max_mask_rows (geometry.h)
  int32_t heads = 0;
  int32_t group = 1;  // divides heads
  int32_t window_left = -1;
  // The blocks that will be visited; both null: all visible ones.
  const int32_t* words = nullptr;   // [num_rows, mask_heads, num_words]
  const int32_t* counts = nullptr;  // [num_rows, mask_heads] their bits, where they are known
  int32_t mask_heads = 0;
  int32_t num_words = 0;
  // What to fill with zeros in rows that belong to no sequence, since nobody works on them; null: nothing.
  int32_t* unused_words = nullptr;   // [num_rows, unused_row_words]
  int32_t* unused_counts = nullptr;  // [num_rows, unused_row_counts]
  int32_t unused_row_words = 0;
  int32_t unused_row_counts = 0;
  // Tiles longer than 1 / long_share of a worker's share of all blocks leave natural order and go first.
  int32_t long_share = 16;
  // So many pairs at the end of natural order are sorted by length: then what workers end with is short.
  int32_t sorted_end = 0;
  // Workers take their next pair when their tile is nearly done.
  bool taken_late = false;
  // So many pairs of natural order come first, whatever their length: workers begin with them (first_pairs).
  int32_t first = 0;
};

#if defined(__CUDACC__)
// Where local tile `tile` of `sequence` lies; query_token and key_token: of the sequence's first query and key.
__device__ inline TileRow tile_row(const SequenceGeometry& geometry, int32_t sequence, int32_t tile,
                                   int32_t query_token, int32_t query_batch, int32_t key_token) {
  const int32_t first_row = (geometry.first_tile() + tile) * kTileRows - geometry.offset();
  TileRow row;
  row.query_token = first_row + query_token;
  row.query_batch = query_batch;
  row.sequence = sequence;
  row.key_token = key_token;
  row.position = first_row + geometry.offset();
  row.row_begin = geometry.row_begin(tile) - first_row;
  row.row_end = geometry.row_end(tile) - first_row;
  row.seqlen_k = geometry.seqlen_k;
  return row;
}

__device__ inline TileRow tile_row(const Problem& problem, int32_t sequence, int32_t tile) {
  const bool packed = problem.query.cu_seqlens != nullptr;
  return tile_row(sequence_geometry(problem, sequence), sequence, tile, packed ? problem.query.cu_seqlens[sequence] : 0,
                  packed ? 0 : sequence, problem.kv.cu_seqlens != nullptr ? problem.kv.cu_seqlens[sequence] : 0);
}

// Where row `row` of a problem lies whose order is known.
__device__ inline TileRow tile_row(const KnownOrder& order, int32_t row) {
  const int32_t sequence = row / order.tiles;
  return tile_row(order.geometry, sequence, row - sequence * order.tiles, 0, sequence, 0);
}

__device__ inline int32_t absolute_tile(const TileRow& tile) { return floor_div(tile.position, kTileRows); }

// Index of a tile among those of its sequence.
__device__ inline int32_t local_tile(const SequenceGeometry& geometry, const TileRow& tile) {
  return absolute_tile(tile) - geometry.first_tile();
}
#endif

// What the kernel that follows the order reads and advances.
struct Queue {
  int32_t next;   // tiles handed out beyond the first one of each CTA
  int32_t total;  // pairs in `order`
};

#if defined(__CUDACC__)
// Natural order, without a look at lengths: groups of heads, rows from the last to the first, the group's heads.
__device__ inline Pair natural_pair(int32_t index, int32_t num_rows, int32_t group) {
  const int32_t of_group = index / group;
  const int32_t groups_before = of_group / num_rows;
  return {num_rows - 1 - (of_group - groups_before * num_rows), groups_before * group + (index - of_group * group)};
}

// The other way round.
__device__ inline int64_t natural_index(Pair pair, int64_t num_rows, int32_t group) {
  return (pair.head / group * num_rows + (num_rows - 1 - pair.row)) * group + pair.head % group;
}
#endif

// One allocation, cut up.
struct Workspace {
  Queue* queue = nullptr;
  TileRow* rows = nullptr;    // [num_rows]
  Pair* order = nullptr;      // [num_rows * heads]
  int32_t* counts = nullptr;  // [num_rows * heads], -1 for rows that belong to no sequence

  static int64_t bytes(int64_t num_rows, int64_t num_heads);
  static Workspace in(void* memory, int64_t num_rows, int64_t num_heads);
};

// The order of this work where it is a formula, else one without pairs. `workers`: as for make_order.
KnownOrder order_of(const Tiling& tiling, int workers);

// Pairs that workers can begin with before the order is made, the first of natural order, one each; none where the host
// does not know all lengths, and where an order would not be waited for long. Their number goes into Tiling::first.
KnownOrder first_pairs(const Tiling& tiling, int workers);

// Whether the order keeps workers in step (`level` in schedule.cu).
bool keeps_in_step(const Tiling& tiling);

// Fills the workspace. `workers`: CTAs that will work on it at a time.
cudaError_t make_order(const Tiling& tiling, const Workspace& workspace, int workers, cudaStream_t stream);

// The same where order_of has been asked.
cudaError_t make_order(const Tiling& tiling, const KnownOrder& known, const Workspace& workspace, int workers,
                       cudaStream_t stream);

// SMs of the current device, which is asked once.
cudaError_t num_sms(int* count);

}  // namespace bsfa::cuda
