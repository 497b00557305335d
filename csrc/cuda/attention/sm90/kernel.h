// Attention on Hopper: out[i] = sum_j softmax_j(scale * q_i . k_j) v_j over the keys j of the kept 128-token blocks.
//
// Tile      128 query rows x 128 keys; a CTA works on one (tile, query head) after the other until the queue is empty.
// Means     with a mean correction, the blocks that a mask drops and that all rows of a tile see follow as steps of
//           their own, 128 blocks each: a block's mean key is one column, log2(its tokens) is added to its score.
// Tokens    with a token mask, a block's K comes with the words of its tile's rows: kernels of their own.
// Skipping  steps whose scores are all low end after their scores (skip.h, skip_compute.h): kernels of their own.
// Roles     warpgroup 0: warps 0 and 1 fetch by TMA (load.h), warp 2 hands out tiles (schedule.h, load.h), warp 3
//           leaves; warpgroups 1 and 2 compute 64 rows each (compute.h) and store them (store.h).
// Memory    query tiles and K blocks share one pool (pool.h), or have rings, of two query tiles or of one (config.h);
//           a tile's output is staged where its queries were, unless there is only one slot for these; a ring of V.
// Waits     each ring has full and empty mbarriers. A step's full barrier stands for its K, its Step, and the V of the
//           step before, which the consumers want together; a query slot's also guards its TileInfo. Consumers wait for
//           steps and queries; the load warps for free slots and for work; nobody for the host.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../../common/launch.h"
#include "bsfa/cuda.h"
#include "compute.h"
#include "load.h"
#include "paired_compute.h"
#include "skip_compute.h"

namespace bsfa::cuda::attn::sm90 {

template <class Config>
__global__ void __launch_bounds__(kThreads, Config::kCtas) attention_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(memory);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    shared.work_full.init(1);
    shared.work_empty.init(2);
    for (Mbarrier& full : shared.query_full) full.init(1);
    for (Mbarrier& full : shared.full) full.init(2);
    for (Mbarrier& empty : shared.query_empty) empty.init(kConsumerWarps);
    for (Mbarrier& empty : shared.key_empty) empty.init(kConsumerWarps);
    for (Mbarrier& empty : shared.value_empty) empty.init(kConsumerWarps);
    shared.value_tail.init(1);
    if constexpr (Config::kSkip) {
      for (auto& words : shared.skip.votes) {
        for (int32_t& word : words) word = -1;
      }
    }
    fence_barrier_init();
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v, &p.out, &p.k_means, &p.v_means, &p.tokens}) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    }
  }
  __syncthreads();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    if (warp == 0) {
      KeyLoader<Config>(shared, p).run();
    } else if (warp == 1) {
      ValueLoader<Config>(shared, p).run();
    } else if (warp == 2) {
      schedule(shared, p);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    using PlainConsumer = std::conditional_t<Config::kPaired, PairedConsumer<Config>, Consumer<Config>>;
    std::conditional_t<Config::kSkip, SkipConsumer<Config>, PlainConsumer>(shared, p).run();
  }
}

template <class Config>
cudaError_t launch_kernel(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage<Config>);
  static_assert(Config::kCtas * (kBytes + 1024) <= 228 * 1024, "shared memory of one SM");
  const auto kernel = attention_kernel<Config>;
  static DevicesDone prepared;
  const int carveout = Config::kPaired ? cudaSharedmemCarveoutMaxShared : cudaSharedmemCarveoutDefault;
  const cudaError_t error = allow_shared_memory(prepared, kernel, kBytes, carveout);
  if (error != cudaSuccess) return error;
  const bool after_own = params.workspace.queue != nullptr;  // the kernel before is the one that wrote the order
  return launch_on_stream(after_own, kernel, num_ctas, kThreads, kBytes, stream, params);
}

template <typename Element, int kHeadDim, int kHeadDimV, Variant kVariant = Variant::kPlain>
cudaError_t launch(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  return params.scale.transform == Transform::kNone
             ? launch_kernel<Config<Element, kHeadDim, kHeadDimV, false, kVariant>>(params, num_ctas, stream)
             : launch_kernel<Config<Element, kHeadDim, kHeadDimV, true, kVariant>>(params, num_ctas, stream);
}

}  // namespace bsfa::cuda::attn::sm90
