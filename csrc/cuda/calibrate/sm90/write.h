// The warp that writes: joins what the consumers' warps found, in a fixed order, one step per lane.
#pragma once

#include "bsfa/keep.h"
#include "compute.h"
#include "load.h"

namespace bsfa::cuda::measure {

template <Quantity kQuantity>
__device__ __forceinline__ float join(float a, float b) {
  if constexpr (kQuantity == Quantity::kMass) return a + b;
  return __int_as_float(max(__float_as_int(a), __float_as_int(b)));  // integers, see ordered()
}

// What becomes of a joined result; `inverse`: of the number of rows.
template <Quantity kQuantity>
__device__ __forceinline__ float finished(float result, float inverse, float unit) {
  if constexpr (kQuantity == Quantity::kMass) return result * inverse;
  return from_ordered(__float_as_int(result)) * unit;
}

template <Quantity kQuantity, class Config>
__device__ void write_results(SharedStorage<Config>& shared, const KernelParams& p) {
  const int lane = threadIdx.x % 32;
  RingPosition<kWorkSlots> slot;
  RingPosition<kResultSlots> result;
  for (;;) {
    const Work work = take_work(shared, slot);
    if (work.head < 0) return;
    const int32_t begin = work.tile.row_begin, end = work.tile.row_end;
    const int32_t rows[2] = {max(min(end, kGroupRows) - begin, 0), max(end - max(begin, kGroupRows), 0)};
    const auto target = [&](int group) {
      return p.out + (static_cast<int64_t>(work.row[group]) * p.num_heads + work.head) * p.max_blocks;
    };
    for (int32_t first = 0; first < work.blocks; first += kBatch, result.advance()) {
      shared.result_full[result.slot].wait(result.parity);
      const int32_t step = first + lane;
      if (step < work.blocks) {
        const float* found = shared.results[result.slot][lane];
        const int32_t block = block_of_step(step, work.blocks);
        float groups[2];
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const float* of = found + 4 * g;
          groups[g] = join<kQuantity>(join<kQuantity>(of[0], of[1]), join<kQuantity>(of[2], of[3]));
        }
        if (p.first_rows == nullptr) {
          const float all = join<kQuantity>(groups[0], groups[1]);
          target(0)[block] = finished<kQuantity>(all, 1.0f / static_cast<float>(rows[0] + rows[1]), p.unit);
        } else {
#pragma unroll
          for (int g = 0; g < 2; ++g) {  // a group without rows is no row of the results
            if (rows[g] == 0) continue;
            target(g)[block] = finished<kQuantity>(groups[g], 1.0f / static_cast<float>(rows[g]), p.unit);
          }
        }
      }
      __syncwarp();
      if (lane == 0) shared.result_empty[result.slot].arrive();
    }
  }
}

// In place of results a row of a mask: the blocks whose maximum over all rows of the tile is not below the threshold,
// and those that are always kept. Nobody else writes the row; its words are set bit by bit since their blocks come in
// the order of visits.
template <Quantity kQuantity, class Config>
__device__ void write_mask(SharedStorage<Config>& shared, const KernelParams& p) {
  const MaskOutput& mask = p.mask;
  const int lane = threadIdx.x % 32;
  RingPosition<kWorkSlots> slot;
  RingPosition<kResultSlots> result;
  for (;;) {
    const Work work = take_work(shared, slot);
    if (work.head < 0) return;
    const SequenceGeometry geometry = sequence_geometry(mask.problem, work.tile.sequence);
    const AlwaysKept always =
        always_kept(geometry, local_tile(geometry, work.tile), mask.sink_blocks, mask.window_blocks);
    const float threshold = mask.threshold(work.head, absolute_tile(work.tile));
    const int64_t row = int64_t{work.row[0]} * p.num_heads + work.head;
    int32_t* words = mask.words + row * mask.num_words;
    Walk<true> walk(work);
    int32_t count = 0;
    for (int32_t first = 0; first < work.steps; first += kBatch, result.advance()) {
      const int32_t steps = min(kBatch, work.steps - first);
      int32_t block = 0;  // of step first + lane
      for (int32_t i = 0; i < steps; ++i) {
        const int32_t next = walk.next();
        if (i == lane) block = next;
      }
      shared.result_full[result.slot].wait(result.parity);
      bool keep = false;
      if (lane < steps) {
        const float* found = shared.results[result.slot][lane];
        float largest = found[0];
#pragma unroll
        for (int w = 1; w < kConsumerWarps; ++w) largest = join<kQuantity>(largest, found[w]);
        const float value = finished<kQuantity>(largest, 1.0f, p.unit);
        keep = always(block) || !(value < threshold);  // NaN on either side keeps
        if (keep) atomicOr(words + block / 32, static_cast<int32_t>(1u << (block % 32)));
      }
      count += __popc(__ballot_sync(kAllLanes, keep));
      __syncwarp();
      if (lane == 0) shared.result_empty[result.slot].arrive();
    }
    if (lane == 0) {
      mask.counts[row] = count;
      // Groups of rows that see these blocks: all that have rows, since tiles begin where blocks do.
      const int groups = (work.tile.row_begin < kGroupRows) + (work.tile.row_end > kGroupRows);
      atomicAdd(mask.skips + 2 * work.head, static_cast<unsigned long long>(work.steps) * groups);
      atomicAdd(mask.skips + 2 * work.head + 1, static_cast<unsigned long long>(work.steps - count) * groups);
    }
  }
}

}  // namespace bsfa::cuda::measure
