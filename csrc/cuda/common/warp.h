// Sums and maxima over the lanes of a warp.
#pragma once

namespace bsfa::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(__CUDACC__)

// Over four lanes side by side, which hold the columns of one row of a product.
__device__ __forceinline__ float max_over_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float sum_over_quad(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

#endif

}  // namespace bsfa::cuda
