// 16-bit elements as float32, and the softcap of a score.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace bsfa::cuda {

constexpr float kLog2e = 1.4426950408889634f;

#if defined(__CUDACC__)

// The two elements of a word; the last parameter says of which type.
__device__ __forceinline__ float2 unpack(uint32_t bits, __nv_bfloat16) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack(uint32_t bits, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// The larger one; NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// cap * tanh(x), through exp: the tanh instruction's error of 2^-11, times the cap, would show. Of a large x the power
// is +inf, and the result the cap.
__device__ __forceinline__ float capped(float x, float cap) {
  return cap * (1.0f - __fdividef(2.0f, exp2f(x * (2.0f * kLog2e)) + 1.0f));
}

#endif

}  // namespace bsfa::cuda
