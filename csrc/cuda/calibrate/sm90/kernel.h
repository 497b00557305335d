// Calibration's measurements on Hopper, over all visible (query tile, KV block) pairs of every head:
//
//   mass      mean over the rows of a tile of sum over keys of 2^(scale_log2 * f(q . k) - lse_log2)
//   absolute  largest logit;  relative  largest, over the rows, of (largest logit in the block - running maximum)
//
// Tile      128 query rows x 128 keys a step; a CTA works on one (tile, query head) after the other until the queue is
//           empty. Results are per 128 rows or per 64, as the caller's block_m says.
// Roles     warpgroup 0: a warp each for keys and queries (TMA), for handing out tiles (load.h), and for writing
//           results (write.h); warpgroups 1 and 2 compute 64 rows each (compute.h).
// Memory    two query tiles, a ring of K blocks, two batches of results (config.h).
// Waits     each ring has full and empty mbarriers: work, queries (with their TileRow and LSE), steps (with their K),
//           results. Consumers wait for steps and queries; nobody waits for another consumer or for the host.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../../common/launch.h"
#include "compute.h"
#include "load.h"
#include "write.h"

namespace bsfa::cuda::measure {

template <Quantity kQuantity, bool kToMask, class Config>
__global__ void __launch_bounds__(kThreads, 1) measure_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SharedStorage<Config>*>(memory);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWorkSlots; ++i) {
      shared.work_full[i].init(1);
      shared.work_empty[i].init(kWorkReaders);
    }
    for (int i = 0; i < kQuerySlots; ++i) {
      shared.query_full[i].init(1);
      shared.query_empty[i].init(kConsumerWarps);
    }
    for (int i = 0; i < Config::kKeySlots; ++i) {
      shared.key_full[i].init(1);
      shared.key_empty[i].init(kConsumerWarps);
    }
    for (int i = 0; i < kResultSlots; ++i) {
      shared.result_full[i].init(kConsumerWarps);
      shared.result_empty[i].init(1);
    }
    fence_barrier_init();
    for (const CUtensorMap* map : {&p.q, &p.k}) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    }
  }
  __syncthreads();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp == 0) {
      KeyLoader<kToMask, Config>(shared, p).run();
    } else if (warp == 1) {
      load_queries<Config, kQuantity == Quantity::kMass>(shared, p);
    } else if (warp == 2) {
      schedule<kToMask>(shared, p);
    } else if constexpr (kToMask) {
      write_mask<kQuantity>(shared, p);
    } else {
      write_results<kQuantity>(shared, p);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    Consumer<kQuantity, Config>(shared, p).run();
  }
}

template <Quantity kQuantity, bool kToMask, class Config>
cudaError_t launch_kernel(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage<Config>);
  static_assert(kBytes <= kMostSharedBytes, "shared memory of one SM");
  const auto kernel = measure_kernel<kQuantity, kToMask, Config>;
  static DevicesDone allowed;
  const cudaError_t error = allow_shared_memory(allowed, kernel, kBytes);
  if (error != cudaSuccess) return error;
  return launch_early(kernel, num_ctas, kThreads, kBytes, stream, params);
}

template <typename Element, int kHeadDim>
cudaError_t launch(Quantity quantity, const KernelParams& params, int num_ctas, cudaStream_t stream) {
  using Kernel = Config<Element, kHeadDim>;
  const bool to_mask = params.mask.words != nullptr;
  switch (quantity) {
    case Quantity::kMass:
      return launch_kernel<Quantity::kMass, false, Kernel>(params, num_ctas, stream);
    case Quantity::kAbsolute:
      return to_mask ? launch_kernel<Quantity::kAbsolute, true, Kernel>(params, num_ctas, stream)
                     : launch_kernel<Quantity::kAbsolute, false, Kernel>(params, num_ctas, stream);
    case Quantity::kRelative:
      return to_mask ? launch_kernel<Quantity::kRelative, true, Kernel>(params, num_ctas, stream)
                     : launch_kernel<Quantity::kRelative, false, Kernel>(params, num_ctas, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace bsfa::cuda::measure
