// Sums and maxima over the lanes of a warp.
#pragma once

#include <cstdint>

namespace bsfa::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(__CUDACC__)

// What all lanes have alike, in a uniform register: a reduction writes one. Descriptors of products, and TMA's operands,
// are such.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(kAllLanes, x); }
__device__ __forceinline__ int32_t uniform(int32_t x) {
  return static_cast<int32_t>(uniform(static_cast<uint32_t>(x)));
}

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
