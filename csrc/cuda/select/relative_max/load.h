// The scheduler warp, which hands out items, and the load warp, which fetches queries and block means by TMA.
#pragma once

#include "../../common/warp.h"
#include "config.h"

namespace bsfa::cuda::select {

// A sequence's geometry in this kernel's own block sizes, which makes divisions by them shifts.
__device__ inline SequenceGeometry geometry_of(const Problem& problem, int32_t sequence) {
  SequenceGeometry geometry = sequence_geometry(problem, sequence);
  geometry.block_m = kTileRows;
  geometry.block_n = kBlockKeys;
  return geometry;
}

// What a tile keeps whatever the scores are.
__device__ inline void set_kept(const SelectParams& p, const SequenceGeometry& geometry, Work& work) {
  const int32_t tile = local_tile(geometry, work.tile);
  const int32_t prompt_len = p.prompt_lens != nullptr ? p.prompt_lens[work.tile.sequence] : -1;
  work.always = always_kept(geometry, tile, p.score.sink_blocks, p.score.window_blocks);
  work.everything = is_last_tile(geometry, tile, p.last_tiles, prompt_len);
}

// The pairs of a CTA are fixed: every gridDim.x-th of the order, back and forth so that no CTA always gets the longer
// one. What a pair costs is known beforehand, and a queue would cost a round trip to memory for each. The lanes fetch
// 32 pairs at a time.
inline __device__ void schedule(Control& control, const KernelParams& p) {
  const int lane = threadIdx.x % 32;
  const Workspace& workspace = p.workspace;
  const ScoreParams& score = p.select.score;
  const bool natural = workspace.queue == nullptr;
  // In natural order the first pairs are made while the kernel before still runs: that takes nothing from memory.
  if (!natural || p.select.prompt_lens != nullptr) cudaGridDependencySynchronize();
  const auto num_rows = static_cast<int32_t>(score.num_rows);
  const uint32_t total = natural ? num_rows * score.score_heads() : workspace.queue->total;
  const int32_t tiles = natural ? num_rows / score.problem.batch : 0;  // of each sequence
  RingPosition<kWorkSlots> slot;
  for (uint32_t round = 0;; round += 32) {
    const uint32_t mine = round + lane;
    const uint32_t index = mine * gridDim.x + (mine % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    Work work{};
    work.head = -1;
    if (index < total) {
      const Pair pair = natural ? natural_pair(index, num_rows, p.group) : workspace.order[index];
      const int32_t sequence = natural ? pair.row / tiles : workspace.rows[pair.row].sequence;
      const SequenceGeometry geometry = geometry_of(score.problem, sequence);
      work.tile = natural ? tile_row(geometry, sequence, pair.row - sequence * tiles, 0, sequence, 0)
                          : workspace.rows[pair.row];
      work.row = pair.row;
      work.head = pair.head;
      work.visible = visible_range(work.tile, score.problem.causal, -1).end;
      set_kept(p.select, geometry, work);
      // Where everything is kept, scores are made only for those who ask for them.
      const bool scored = score.scores != nullptr || !work.everything;
      work.steps = scored ? ceil_div(work.visible, kStepBlocks) : 0;
    }
    const int taken = __popc(__ballot_sync(kAllLanes, work.head >= 0));
    if (round == 0) cudaGridDependencySynchronize();  // everything else in this kernel waits for this warp's work
    if (work.head >= 0) work.threshold = p.select.threshold_of(work.head);
    for (int i = 0; i <= taken && i < 32; ++i, slot.advance()) {  // after the last pair of all, the end
      control.work_empty[slot.slot].wait(slot.parity ^ 1);
      if (lane == i) {
        control.work[slot.slot] = work;
        control.work_full[slot.slot].arrive();
      }
      __syncwarp();
    }
    if (taken < 32) return;
  }
}

template <class Config>
__device__ void load(const Shared<Config>& shared, const KernelParams& p) {
  if (threadIdx.x % 32 != 0) return;
  Control& control = shared.control;
  RingPosition<kWorkSlots> slot;
  RuntimePosition query{p.query_slots};
  RingPosition<kMeanSlots> mean;
  const auto fetch = [](const CUtensorMap& map, Mbarrier& full, char* target, int bytes, cute::TMA::CacheHintSm90 hint,
                        int32_t token, int32_t head, int32_t batch) {
    full.arrive_expect(bytes);
    cute::SM90_TMA_LOAD_5D::copy(&map, &full.state, static_cast<uint64_t>(hint), target, 0, token, 0, head, batch);
  };
  for (;; slot.advance()) {
    control.work_full[slot.slot].wait(slot.parity);
    const Work work = control.work[slot.slot];
    control.work_empty[slot.slot].arrive();
    if (work.head < 0) return;
    if (work.steps == 0) continue;
    const int32_t first_head = work.head * p.heads_per_score_head;
    for (int32_t head = first_head; head < first_head + p.heads_per_score_head; ++head) {
      control.query_empty[query.slot].wait(query.parity ^ 1);
      fetch(p.q, control.query_full[query.slot], shared.query + query.slot * Config::kQueryBytes, Config::kQueryBytes,
            cute::TMA::CacheHintSm90::EVICT_FIRST, work.tile.query_token, head, work.tile.query_batch);
      query.advance();
      for (int32_t i = 0; i < work.steps; ++i) {
        control.mean_empty[mean.slot].wait(mean.parity ^ 1);
        fetch(p.means, control.mean_full[mean.slot], shared.mean + mean.slot * Config::kMeanBytes, Config::kMeanBytes,
              cute::TMA::CacheHintSm90::EVICT_LAST, i * kStepBlocks, head / p.heads_per_kv_head, work.tile.sequence);
        mean.advance();
      }
    }
  }
}

}  // namespace bsfa::cuda::select
