// The first warpgroup: one warp hands out tiles, one fetches keys, one queries with what belongs to their rows, and one
// writes results.
#pragma once

#include "config.h"

namespace bsfa::cuda::measure {

// Takes pairs from the queue, a few tiles ahead of the other warps. Tiles without steps are left out: what their rows
// hold was written before this kernel.
template <bool kToMask, class Config>
__device__ void schedule(SharedStorage<Config>& shared, const KernelParams& p) {
  const int lane = threadIdx.x % 32;
  const Workspace& workspace = p.workspace;
  cudaGridDependencySynchronize();  // everything else in this kernel waits for this warp's work
  const int32_t total = workspace.queue->total;
  RingPosition<kWorkSlots> slot;
  const auto hand_out = [&](const Work& work) {
    shared.work_empty[slot.slot].wait(slot.parity ^ 1);
    if (lane == 0) {
      shared.work[slot.slot] = work;
      shared.work_full[slot.slot].arrive();
    }
    __syncwarp();
    slot.advance();
  };
  for (int32_t index = blockIdx.x; index < total;) {
    int32_t next = 0;
    if (lane == 0) next = gridDim.x + atomicAdd(&workspace.queue->next, 1);
    const Pair pair = workspace.order[index];
    Work work{};
    work.tile = workspace.rows[pair.row];
    work.head = pair.head;
    work.blocks = visible_range(work.tile, p.causal, -1).end;
    work.steps = work.blocks;
    if constexpr (kToMask) {
      work.within = p.mask.within_row(pair.row, pair.head);
      work.steps = workspace.counts[natural_index(pair, p.work_rows, p.heads_per_kv_head)];
    }
    if (work.steps > 0) {
      work.row[0] = pair.row;
      if (p.first_rows != nullptr) {
        // A tile's position is a multiple of 128.
        work.row[0] = p.first_rows[work.tile.sequence] + work.tile.position / kGroupRows;
        work.row[1] = work.row[0] + 1;
      }
      hand_out(work);
    }
    index = __shfl_sync(kAllLanes, next, 0);
  }
  Work end{};
  end.head = -1;
  hand_out(end);
}

// The next item of work; warp-collective.
template <class Config>
__device__ __forceinline__ Work take_work(SharedStorage<Config>& shared, RingPosition<kWorkSlots>& slot) {
  shared.work_full[slot.slot].wait(slot.parity);
  const Work work = shared.work[slot.slot];
  __syncwarp();
  if (threadIdx.x % 32 == 0) shared.work_empty[slot.slot].arrive();
  slot.advance();
  return work;
}

__device__ __forceinline__ void load_box(const CUtensorMap& map, Mbarrier& full, char* target,
                                         cute::TMA::CacheHintSm90 hint, int32_t half, int32_t token, int32_t head,
                                         int32_t batch) {
  cute::SM90_TMA_LOAD_5D::copy(&map, &full.state, static_cast<uint64_t>(hint), target, 0, token, half, head, batch);
}

template <class Config, bool kWithLse>
__device__ void load_queries(SharedStorage<Config>& shared, const KernelParams& p) {
  const int lane = threadIdx.x % 32;
  RingPosition<kWorkSlots> slot;
  RingPosition<kQuerySlots> query;
  for (;; query.advance()) {
    const Work work = take_work(shared, slot);
    if (work.head < 0) return;
    const TileRow& tile = work.tile;
    float minus_lse[kTileRows / 32];
    if constexpr (kWithLse) {
      const float* lse =
          p.lse + tile.query_batch * p.lse_batch_stride + work.head * p.lse_head_stride + tile.query_token;
#pragma unroll
      for (int i = 0; i < kTileRows / 32; ++i) {
        const int row = i * 32 + lane;
        // Rows that see nothing have -inf; rows of no sequence, or of another one, are not read.
        const float value = row >= tile.row_begin && row < tile.row_end ? lse[row] : -INFINITY;
        minus_lse[i] = value == -INFINITY ? -INFINITY : -value * kLog2e;
      }
    }
    shared.query_empty[query.slot].wait(query.parity ^ 1);
    if constexpr (kWithLse) {
#pragma unroll
      for (int i = 0; i < kTileRows / 32; ++i) shared.minus_lse[query.slot][i * 32 + lane] = minus_lse[i];
    }
    if (lane == 0) shared.tiles[query.slot] = tile;
    __syncwarp();
    if (lane == 0) {
      Mbarrier& full = shared.query_full[query.slot];
      full.arrive_expect(Config::kTileBytes);
      load_box(p.q, full, shared.query[query.slot], cute::TMA::CacheHintSm90::EVICT_FIRST, 0, tile.query_token,
               work.head, tile.query_batch);
    }
  }
}

// Keys, and what the consumers are told about steps. All that can be is computed before a slot is waited for, and a
// block's page is looked up one step ahead: what follows the wait is latency.
template <bool kToMask, class Config>
class KeyLoader {
 public:
  __device__ KeyLoader(SharedStorage<Config>& shared, const KernelParams& p)
      : shared_(shared), p_(p), lane_(threadIdx.x % 32), first_copy_(copy(lane_)) {}

  __device__ void run() {
    RingPosition<kWorkSlots> slot;
    for (;;) {
      const Work work = take_work(shared_, slot);
      if (work.head < 0) break;
      load_tile(work);
    }
    // The end is a step without a block.
    shared_.key_empty[key_.slot].wait(key_.parity ^ 1);
    if (lane_ == 0) {
      shared_.steps[key_.slot] = {0, kEnd};
      shared_.key_full[key_.slot].arrive();
    }
  }

 private:
  // Where the keys of one sequence and KV head lie.
  struct Keys {
    const int32_t* pages;
    int32_t first_token;  // coordinate of key 0, if not paged
    int32_t batch;        // likewise
    int32_t head;
  };
  // One TMA copy of a block: a box of rows, of one half of the columns unless the box is the whole block.
  struct Copy {
    int32_t row;
    int32_t half;
    int32_t offset;  // in the slot, bytes
  };
  struct Place {
    int32_t token;
    int32_t batch;
  };
  struct Block {
    int32_t first_key;
    int32_t valid;  // keys of the sequence in it, 1 to 128
    int32_t copies;
    Place place;  // of this lane's first copy
  };

  __device__ void load_tile(const Work& work) {
    const TileRow& tile = work.tile;
    const Keys keys{p_.block_table + tile.sequence * p_.block_table_stride, tile.key_token,
                    p_.keys_packed ? 0 : tile.sequence, work.head / p_.heads_per_kv_head};
    Walk<kToMask> walk(work);
    Block next = block_at(keys, walk.next(), tile.seqlen_k);
    for (int32_t i = 0; i < work.steps; ++i) {
      const Block block = next;
      const bool last = i + 1 == work.steps;
      if (!last) next = block_at(keys, walk.next(), tile.seqlen_k);
      const bool masked =
          block.valid < kBlockKeys || (p_.causal && block.first_key + kBlockKeys - 1 > tile.position + tile.row_begin);
      const uint32_t flags = (i == 0 ? kFirst : 0) | (last ? kLast : 0) | (masked ? kMasked : 0);
      load_block(keys, block, {block.first_key, flags});
    }
  }

  __device__ Block block_at(const Keys& keys, int32_t index, int32_t seqlen) const {
    Block block{index * kBlockKeys, 0, 1, {}};
    block.valid = min(seqlen - block.first_key, kBlockKeys);
    if (p_.box_rows != kBlockKeys) {
      block.copies = ((block.valid + p_.box_rows - 1) >> p_.box_shift) * Config::kHalves;
    }
    if (lane_ < block.copies) block.place = place_of(keys, block.first_key + first_copy_.row);
    return block;
  }

  __device__ void load_block(const Keys& keys, const Block& block, const Step& step) {
    constexpr auto kHint = cute::TMA::CacheHintSm90::EVICT_LAST;
    const uint32_t bytes = p_.box_rows == kBlockKeys
                               ? Config::kTileBytes
                               : (block.copies / Config::kHalves << p_.box_shift) * (Config::kHeadDim * 2);
    Mbarrier& full = shared_.key_full[key_.slot];
    char* target = shared_.key[key_.slot];
    shared_.key_empty[key_.slot].wait(key_.parity ^ 1);
    if (lane_ == 0) {
      shared_.steps[key_.slot] = step;
      full.arrive_expect(bytes);
    }
    __syncwarp();
    if (lane_ < block.copies) {
      load_box(p_.k, full, target + first_copy_.offset, kHint, first_copy_.half, block.place.token, keys.head,
               block.place.batch);
    }
#pragma unroll 1
    for (int32_t i = lane_ + 32; i < block.copies; i += 32) {  // boxes of few rows
      const Copy next = copy(i);
      const Place place = place_of(keys, block.first_key + next.row);
      load_box(p_.k, full, target + next.offset, kHint, next.half, place.token, keys.head, place.batch);
    }
    key_.advance();
  }

  __device__ Copy copy(int32_t i) const {
    if (p_.box_rows == kBlockKeys) return {0, 0, 0};
    const int32_t row = i / Config::kHalves << p_.box_shift, half = i % Config::kHalves;
    return {row, half, half * Config::kBoxBytes + row * kBoxColumns * 2};
  }

  __device__ Place place_of(const Keys& keys, int32_t token) const {
    if (p_.block_table == nullptr) return {keys.first_token + token, keys.batch};
    int page, slot;
    p_.page_size(page, slot, token);
    return {slot, __ldg(keys.pages + page)};
  }

  SharedStorage<Config>& shared_;
  const KernelParams& p_;
  const int lane_;
  const Copy first_copy_;  // of this lane, in every block
  RingPosition<Config::kKeySlots> key_;
};

}  // namespace bsfa::cuda::measure
