// Sums over the threads of a CTA.
#pragma once

#include <cstdint>

#include "warp.h"

namespace bsfa::cuda {

// Inclusive sum over the CTA's threads. `scratch` has one entry per warp; all threads must call.
template <int kThreads>
__device__ int32_t inclusive_sum(int32_t value, int32_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto sum_of_lanes = [lane](int32_t x) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int32_t below = __shfl_up_sync(kAllLanes, x, d);
      if (lane >= d) x += below;
    }
    return x;
  };
  value = sum_of_lanes(value);
  __syncthreads();
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  const int32_t warps = sum_of_lanes(lane < kThreads / 32 ? scratch[lane] : 0);
  const int32_t before = __shfl_sync(kAllLanes, warps, max(warp - 1, 0));
  return warp > 0 ? value + before : value;
}

}  // namespace bsfa::cuda
