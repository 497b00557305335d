// Scores of strided token groups on Hopper: x[r, c] = sum over t < stride of q[r, t'] . k[c, t], then kFlat64 or
// kAntidiagonal (params.h).
//
// Tile      128 query groups x 256 key groups; a CTA works on one (segment, query head) after the other, through all
//           key tiles that the segment sees, until none is left.
// Roles     warpgroup 0 fetches (load.h), its warp 0 also hands out units; warpgroups 1 and 2 compute 64 query groups
//           each (compute.h) and turn scores into logits or weights (rules.h).
// Memory    four steps of 48 KB in shared memory, 64 columns of one token of every group each; the antidiagonal rule
//           stashes one float per (query group, block) in global memory until the row's sum is known.
// Waits     full and empty mbarriers per ring slot and per unit; nobody waits for the host.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../../common/launch.h"
#include "compute.h"
#include "load.h"

namespace bsfa::cuda::select::strided {

template <class Config>
__global__ void __launch_bounds__(kThreads, 1) strided_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<SharedStorage*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      shared.full[i].init(1 + kProducerWarps);
      shared.empty[i].init(kConsumerWarps);
    }
    for (int i = 0; i < kWorkSlots; ++i) {
      shared.work_full[i].init(1);
      shared.work_empty[i].init(kProducerWarps + kConsumerWarps);
    }
    fence_barrier_init();
    if (p.q_by_tma) cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.q_map));
    if (p.k_by_tma) cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.k_map));
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    Loader<Config>(shared, p).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    Consumer<Config>(shared, p).run();
  }
}

template <class Config>
cudaError_t launch_kernel(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage);
  static_assert(kBytes <= kMostSharedBytes, "shared memory of one SM");
  const auto kernel = strided_kernel<Config>;
  static DevicesDone allowed;
  const cudaError_t error = allow_shared_memory(allowed, kernel, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_ctas, kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch(const KernelParams& params, bool flat, int num_ctas, cudaStream_t stream) {
  return flat ? launch_kernel<Config<Element, true>>(params, num_ctas, stream)
              : launch_kernel<Config<Element, false>>(params, num_ctas, stream);
}

}  // namespace bsfa::cuda::select::strided
