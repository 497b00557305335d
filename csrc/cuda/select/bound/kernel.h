// Which blocks a tile is sure to skip, by bounds of its logits (config.h), for attention that skips (SkipParams).
//
// Tile      a CTA takes one (tile, query head) pair: 128 rows against 128 keys a step. Two CTAs share an SM, so that
//           four warpgroups fill the tensor cores; what one waits for, the others hide.
// Roles     warpgroup 0: a warp makes the list, two fetch the images of blocks (steps.h), one keeps them company;
//           warpgroups 1 and 2 compute, 64 rows each (compare.h). A warp that did both would hold up its warpgroup's
//           products.
// Order     the blocks in question are listed before the first step. Absolute: from the last to the first, without
//           those that are always kept. Relative: all, in the order of visits of SkipParams, with lower bounds of the
//           running maxima.
// Result    each warp, or warpgroup, sets the bits of what it keeps in the row of words in shared memory.
// Waits     key_full (bytes of the image and the facts), key_empty (8 warps).
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../../common/launch.h"
#include "../../common/place.h"
#include "compare.h"

namespace bsfa::cuda::bound {

// The threshold, a little lower: what its own arithmetic and that of the kernel that decides can be off.
template <bool kRelative>
__device__ __forceinline__ float safe_cut(float cut) {
  if (cut == INFINITY && !kRelative) return cut;
  // -inf leaves nothing out. Beyond 0 a relative one would have to know which blocks are skipped.
  if (!(cut > -INFINITY) || (kRelative && cut > 0.0f)) return __int_as_float(0x7fffffff);
  return cut - 1e-6f * fabsf(cut) - 1e-30f;
}

template <bool kRelative>
__device__ Work work_of(const KernelParams& p, const Pair& pair, const Place& place) {
  Work work;
  work.tile = tile_row(p.problem, place.sequence, place.tile);
  work.head = pair.head;
  work.always = always_kept(sequence_geometry(p.problem, place.sequence), place.tile, p.sink_blocks, p.window_blocks);
  work.visible = visible_range(work.tile, p.problem.causal, -1);
  work.within = p.within_row(pair.row, pair.head);
  work.last = -1;
  for (int32_t w = ceil_div(work.visible.end, 32) - 1; w >= 0 && work.last < 0; --w) {
    const uint32_t bits = work.candidates(w);
    if (bits != 0) work.last = w * 32 + 31 - __clz(bits);
  }
  work.cut = safe_cut<kRelative>(p.threshold(pair.head, absolute_tile(work.tile)));
  return work;
}

template <class Element, int kHeadDim, bool kRelative>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) bound_kernel(const __grid_constant__ KernelParams p) {
  using C = Config<kHeadDim>;
  extern __shared__ char memory[];
  const uint32_t unaligned = shared_address(memory);
  auto& shared = *reinterpret_cast<SharedStorage<C>*>(memory + ((unaligned + 1023) / 1024 * 1024 - unaligned));
  auto* kept_words = reinterpret_cast<uint32_t*>(&shared + 1);
  auto* entries = reinterpret_cast<uint16_t*>(kept_words + p.num_words);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  const Pair pair = natural_pair(static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(p.num_rows),
                                 p.problem.num_q_heads / p.problem.num_kv_heads);
  const Place place = find_place<kThreads>(p.problem, pair.row);
  const int64_t target = int64_t{pair.row} * p.problem.num_q_heads + pair.head;
  int32_t* words = p.words + target * p.num_words;
  if (place.sequence < 0) {
    for (int32_t w = threadIdx.x; w < p.num_words; w += kThreads) words[w] = 0;
    if (threadIdx.x == 0) p.counts[target] = 0;
    return;
  }
  if (warp < kWarpgroup / 32) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) {
        shared.work = work_of<kRelative>(p, pair, place);
        for (int i = 0; i < kStages; ++i) {
          shared.key_full[i].init(kFetchingWarps);
          shared.key_empty[i].init(kConsumerWarps);
        }
        fence_barrier_init();
      }
      __syncwarp();
      const int32_t count = shared.work.keeps_all() ? 0 : list_blocks<kRelative>(shared.work, entries);
      if (lane == 0) shared.list = {count, ceil_div(count, 2)};
    } else {
      for (int32_t w = threadIdx.x - 32; w < p.num_words; w += kWarpgroup - 32) kept_words[w] = 0;
    }
    sync_cta();                       // with the consumers
    cudaGridDependencySynchronize();  // the images are the kernel's before
    KeyLoader<C> loader(shared, entries, p, warp);
    const bool fetches = warp < kFetchingWarps;
    if constexpr (kRelative) {
      if (fetches) loader.template run<Pass::kAll>();
    } else {
      if (fetches) loader.template run<Pass::kSample>();
      sync_cta();
      if (warp == 0) {
        const List left = without_kept(shared.list, entries, kept_words);
        __syncwarp();
        if (lane == 0) shared.list = left;
      }
      sync_cta();
      if (fetches) loader.template run<Pass::kRest>();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    // Queries are read and rounded while the list is made.
    const TileRow tile = tile_row(p.problem, place.sequence, place.tile);
    uint32_t fragment[kHeadDim / 8];
    const Rows rows = take_rows<Element, kHeadDim>(p, tile, pair.head, consumer_row(), fragment);
    sync_cta();
    Comparer<Element, C, kRelative>(shared, kept_words, p, rows).run(fragment);
  }
  const Work& work = shared.work;
  __syncthreads();
  if (warp > 0) return;
  int32_t count = 0, met = 0;
  for (int32_t w = lane; w < p.num_words; w += 32) {
    const uint32_t candidates = work.candidates(w);
    const uint32_t keep = work.keeps_all() ? candidates : candidates & (kept_words[w] | work.forced(w));
    words[w] = static_cast<int32_t>(keep);
    count += __popc(keep);
    met += __popc(candidates);
  }
  count = __reduce_add_sync(kAllLanes, count);
  met = __reduce_add_sync(kAllLanes, met);
  if (lane > 0) return;
  p.counts[target] = count;
  const int groups = (work.tile.row_begin < kGroupRows) + (work.tile.row_end > kGroupRows);
  atomicAdd(p.skips + 2 * work.head, static_cast<unsigned long long>(met) * groups);
  atomicAdd(p.skips + 2 * work.head + 1, static_cast<unsigned long long>(met - count) * groups);
}

}  // namespace bsfa::cuda::bound
