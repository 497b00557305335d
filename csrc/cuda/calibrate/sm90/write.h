// The warp that writes: joins what the consumers' warps found, in a fixed order, one step per lane.
#pragma once

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

}  // namespace bsfa::cuda::measure
