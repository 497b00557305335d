// Rows of 16-bit elements rounded to e4m3, with the norms of what they were and of what was lost.
#pragma once

#include <cuda_fp8.h>

#include "../../common/scalar.h"
#include "config.h"

namespace bsfa::cuda::bound {

// Sums of squares, in units of the row's power of two.
struct Squares {
  float whole = 0.0f;  // of the elements
  float held = 0.0f;   // of what e4m3 holds of them
  float lost = 0.0f;   // of the difference
};

// The largest magnitude of eight elements' worth of words; NaN is left to the sums.
template <class Element, int kWords>
__device__ __forceinline__ float largest_of(const uint32_t (&words)[kWords]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const float2 x = unpack(words[i], Element{});
    largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
  }
  return largest;
}

// Four elements, times `up`, in e4m3.
template <class Element>
__device__ __forceinline__ uint32_t round_four(const uint32_t (&words)[2], float up, Squares& squares) {
  uint32_t rounded = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float2 x = unpack(words[i], Element{});
    x.x *= up;
    x.y *= up;
    const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE, __NV_E4M3);
    const float2 held = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    rounded |= static_cast<uint32_t>(pair) << (16 * i);
    const float lost[2] = {x.x - held.x, x.y - held.y};
    squares.whole += x.x * x.x + x.y * x.y;
    squares.held += held.x * held.x + held.y * held.y;
    squares.lost += lost[0] * lost[0] + lost[1] * lost[1];
  }
  return rounded;
}

// Over `kLanes` lanes side by side, which share a row.
template <int kLanes>
__device__ __forceinline__ float max_over(float x) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}
template <int kLanes>
__device__ __forceinline__ Squares sum_over(Squares s) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    s.whole += __shfl_xor_sync(kAllLanes, s.whole, d);
    s.held += __shfl_xor_sync(kAllLanes, s.held, d);
    s.lost += __shfl_xor_sync(kAllLanes, s.lost, d);
  }
  return s;
}

// Norms from squares, in the elements' own units.
__device__ __forceinline__ float norm_of(float squares, float down) { return sqrtf(squares) * kUp * down; }

}  // namespace bsfa::cuda::bound
