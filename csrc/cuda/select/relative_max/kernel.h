// FlashPrefill's scores and selection on Hopper, for one (query tile, score head) pair after the other:
//
//   log2 E_J = log2 sum_r 2^(scale * q_r . kbar_J),  score_J = E_J / max_J E_J,
//   kept iff score_J >= threshold or forced
//
// Tile      64 KV blocks (rows) x 128 queries (columns) a step; a CTA works on pairs until the queue is empty.
// Roles     warpgroup 0: warp 0 fetches by TMA, warp 1 hands out pairs (load.h), warps 2 and 3 write masks (emit.h);
//           warpgroups 1 to 4 take steps in turn (energy.h).
// Memory    a ring of six steps of means, two to four query tiles, and one to four rows of energies: 4 bytes per KV
//           block of the longest sequence.
// Waits     full and empty mbarriers for each ring: work, queries, means, energies. Nobody waits for the host.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../../common/launch.h"
#include "emit.h"
#include "energy.h"
#include "load.h"

namespace bsfa::cuda::select {

template <class Config>
__global__ void __launch_bounds__(kThreads, 1) relative_max_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char memory[];
  cudaTriggerProgrammaticLaunchCompletion();  // attention's order, and attention, take each SM as it becomes free
  const auto shared = Shared<Config>::in(memory, p.query_slots);
  Control& control = shared.control;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWorkSlots; ++i) {
      control.work_full[i].init(1);
      control.work_empty[i].init(1 + kEmitters + kConsumerWarps);
    }
    for (int i = 0; i < p.query_slots; ++i) {
      control.query_full[i].init(1);
      control.query_empty[i].init(kConsumerWarps);
    }
    for (int i = 0; i < kMeanSlots; ++i) {
      control.mean_full[i].init(1);
      control.mean_empty[i].init(4);
    }
    for (int i = 0; i < kMaxEnergySlots; ++i) {
      control.energy_full[i].init(kConsumerWarps);
      control.energy_empty[i].init(1);
    }
    fence_barrier_init();
    for (const CUtensorMap* map : {&p.q, &p.means}) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    }
  }
  __syncthreads();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp == 0) {
      load(shared, p);
    } else if (warp == 1) {
      schedule(control, p);
    } else {
      emit(control, shared.energy, p, warp - 2);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    Consumer<Config>(shared, p).run();
  }
}

template <class Config>
cudaError_t launch_kernel(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  const int bytes = Shared<Config>::bytes(params.query_slots, params.energy_slots, params.energy_stride);
  const auto kernel = relative_max_kernel<Config>;
  static DevicesDone allowed;
  const cudaError_t error = allow_shared_memory(allowed, kernel, kMostSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_early(kernel, num_ctas, kThreads, bytes, stream, params);
}

template <typename Element, int kHeadDim>
cudaError_t launch(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  return params.scale.transform == Transform::kNone
             ? launch_kernel<Config<Element, kHeadDim, false>>(params, num_ctas, stream)
             : launch_kernel<Config<Element, kHeadDim, true>>(params, num_ctas, stream);
}

}  // namespace bsfa::cuda::select
