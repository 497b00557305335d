// Running sums over the threads of a warp or CTA.
#pragma once

#include <cstdint>

#include "warp.h"

namespace bsfa::cuda {

// Inclusive sum over the lanes of a warp, in one fixed order.
template <class T>
__device__ __forceinline__ T inclusive_sum_of_lanes(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, d);
    if (lane >= d) value += below;
  }
  return value;
}

// Inclusive sum over the CTA's threads. `scratch` has one entry per warp; all threads must call.
template <int kThreads>
__device__ int32_t inclusive_sum(int32_t value, int32_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = inclusive_sum_of_lanes(value);
  __syncthreads();
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  const int32_t warps = inclusive_sum_of_lanes(lane < kThreads / 32 ? scratch[lane] : 0);
  const int32_t before = __shfl_sync(kAllLanes, warps, max(warp - 1, 0));
  return warp > 0 ? value + before : value;
}

}  // namespace bsfa::cuda
