// The scheduler warp, which hands out items, and the load warp, which fetches queries and block means by TMA.
#pragma once

#include "config.h"

namespace bsfa::cuda::select {

constexpr unsigned kAllLanes = 0xffffffffu;

// Local index of a tile among those of its sequence.
__device__ inline int32_t local_tile(const SequenceGeometry& geometry, const TileRow& tile) {
  return floor_div(tile.position, kTileRows) - geometry.first_tile();
}

__device__ inline bool keeps_everything(const SelectParams& p, const TileRow& tile) {
  const SequenceGeometry geometry = sequence_geometry(p.score.problem, tile.sequence);
  const int32_t prompt_len = p.prompt_lens != nullptr ? p.prompt_lens[tile.sequence] : -1;
  return is_last_tile(geometry, local_tile(geometry, tile), p.last_tiles, prompt_len);
}

template <class Config>
__device__ void schedule(SharedStorage<Config>& shared, const KernelParams& p) {
  if (threadIdx.x % 32 != 0) return;
  const Workspace& workspace = p.workspace;
  cudaGridDependencySynchronize();  // everything else in this kernel waits for this warp's work
  const int32_t total = workspace.queue->total;
  RingPosition<kWorkSlots> slot;
  for (int32_t index = blockIdx.x;; slot.advance()) {
    Work work{};
    work.head = -1;
    int32_t next = 0;
    if (index < total) {
      next = gridDim.x + atomicAdd(&workspace.queue->next, 1);
      const Pair pair = workspace.order[index];
      work.tile = workspace.rows[pair.row];
      work.row = pair.row;
      work.head = pair.head;
      work.visible = visible_range(work.tile, p.select.score.problem.causal, -1).end;
      // Where everything is kept, scores are made only for those who ask for them.
      const bool scored = p.select.score.scores != nullptr || !keeps_everything(p.select, work.tile);
      work.steps = scored ? ceil_div(work.visible, kStepBlocks) : 0;
    }
    shared.work_empty[slot.slot].wait(slot.parity ^ 1);
    shared.work[slot.slot] = work;
    shared.work_full[slot.slot].arrive();
    if (index >= total) return;
    index = next;
  }
}

template <class Config>
__device__ void load(SharedStorage<Config>& shared, const KernelParams& p) {
  if (threadIdx.x % 32 != 0) return;
  RingPosition<kWorkSlots> slot;
  RingPosition<kQuerySlots> query;
  RingPosition<kMeanSlots> mean;
  const auto fetch = [](const CUtensorMap& map, Mbarrier& full, char* target, cute::TMA::CacheHintSm90 hint,
                        int32_t token, int32_t head, int32_t batch) {
    full.arrive_expect(Config::kTileBytes);
    cute::SM90_TMA_LOAD_5D::copy(&map, &full.state, static_cast<uint64_t>(hint), target, 0, token, 0, head, batch);
  };
  for (;; slot.advance()) {
    shared.work_full[slot.slot].wait(slot.parity);
    const Work work = shared.work[slot.slot];
    shared.work_empty[slot.slot].arrive();
    if (work.head < 0) break;
    if (work.steps == 0) continue;
    const int32_t first_head = work.head * p.heads_per_score_head;
    for (int32_t h = 0; h < p.heads_per_score_head; ++h) {
      const int32_t head = first_head + h;
      shared.query_empty[query.slot].wait(query.parity ^ 1);
      shared.queries[query.slot] = {work.tile, work.visible};
      fetch(p.q, shared.query_full[query.slot], shared.query[query.slot], cute::TMA::CacheHintSm90::EVICT_FIRST,
            work.tile.query_token, head, work.tile.query_batch);
      query.advance();
      const uint32_t of_head = (h == 0 ? kFirstHead : 0) | (h == p.heads_per_score_head - 1 ? kLastHead : 0);
      for (int32_t i = 0; i < work.steps; ++i) {
        const int32_t first_block = i * kStepBlocks;
        shared.mean_empty[mean.slot].wait(mean.parity ^ 1);
        shared.steps[mean.slot] = {first_block, of_head | (i == 0 ? kFirst : 0) | (i == work.steps - 1 ? kLast : 0)};
        fetch(p.means, shared.mean_full[mean.slot], shared.mean[mean.slot], cute::TMA::CacheHintSm90::EVICT_LAST,
              first_block, head / p.heads_per_kv_head, work.tile.sequence);
        mean.advance();
      }
    }
  }
  shared.mean_empty[mean.slot].wait(mean.parity ^ 1);
  shared.steps[mean.slot] = {0, kEnd};
  shared.mean_full[mean.slot].arrive();
}

}  // namespace bsfa::cuda::select
