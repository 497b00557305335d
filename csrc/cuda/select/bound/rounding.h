// Rows of 16-bit elements rounded to 8-bit integers, with the norms of what they were and of what was lost.
#pragma once

#include "../../common/scalar.h"
#include "config.h"

namespace bsfa::cuda::bound {

// Sums of squares, in units of the factor.
struct Squares {
  float whole = 0.0f;  // of the elements
  float held = 0.0f;   // of the integers
  float lost = 0.0f;   // of the difference
};

// The largest magnitude of the words' elements; NaN is left to the sums.
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

// Four elements, times `up`, as integers in the bytes of a word.
template <class Element>
__device__ __forceinline__ uint32_t round_four(const uint32_t (&words)[2], float up, Squares& squares) {
  uint32_t rounded = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 pair = unpack(words[i], Element{});
    const float xs[2] = {pair.x * up, pair.y * up};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int held = __float2int_rn(fminf(fmaxf(xs[j], -127.0f), 127.0f));
      const float lost = xs[j] - static_cast<float>(held);
      rounded |= (static_cast<uint32_t>(held) & 0xffu) << (16 * i + 8 * j);
      squares.whole += xs[j] * xs[j];
      squares.held += static_cast<float>(held * held);
      squares.lost += lost * lost;
    }
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

// From squares, in the elements' own units: a norm, and one of what is lost beside it.
__device__ __forceinline__ float norm_of(float squares, float down) { return sqrtf(squares) * kUp * down; }
__device__ __forceinline__ float loss_of(float squares, float down, float norm) {
  return (norm_of(squares, down) + kRounding * norm + kSubnormal) * kUp;
}

}  // namespace bsfa::cuda::bound
