// Online softmax of one thread's share of a 128 x 128 tile of scores: two rows, 32 columns each.
//
// Accumulators of m64n8 tiles: element 4 * j + 2 * r + c is row lane / 4 + 8 * r of the warp's 16, column
// 8 * j + 2 * (lane % 4) + c. A row is spread over the four lanes of a quad.
#pragma once

#include "config.h"

namespace bsfa::cuda::attn::sm90 {

constexpr int kScores = kBlockKeys / 2;  // per thread
constexpr int kColumnTiles = kBlockKeys / 8;

struct SoftmaxRows {
  float max[2];  // of the scores seen so far, before scaling
  float sum[2];  // of this thread's share of the exponentials
};

// Scores beyond the row's limits become -inf, whatever they were. `first_row`: of this thread, in the tile.
template <class Tensor>
__device__ __forceinline__ void mask_scores(Tensor& s, const TileRow& tile, int32_t first_key, int first_row, bool causal,
                                            int32_t window_left) {
  const int first_column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t position = tile.position + first_row + 8 * r;
    const int32_t end = (causal ? min(position + 1, tile.seqlen_k) : tile.seqlen_k) - first_key - first_column;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (8 * j + c >= end) s(4 * j + 2 * r + c) = -INFINITY;
      }
    }
    if (window_left < 0) continue;
    const int32_t begin = position - window_left - first_key - first_column;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (8 * j + c < begin) s(4 * j + 2 * r + c) = -INFINITY;
      }
    }
  }
}

template <class Tensor>
__device__ __forceinline__ void transform_scores(Tensor& s, float inner_scale, float softcap) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) s(i) *= inner_scale;
  if (softcap == 0.0f) return;
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    // tanh through exp: the tanh instruction's error of 2^-11, times the cap, would show in the result.
    const float e = exp2f(s(i) * (2.0f * 1.4426950408889634f));
    s(i) = softcap * (1.0f - __fdividef(2.0f, e + 1.0f));
  }
}

// Turns scores into exponentials, in place, and takes them into `rows`. `first`: nothing was seen before. `rescale`: what
// the exponentials summed so far must be multiplied by. A row that has seen only -inf keeps max -inf and sum 0.
template <class Tensor>
__device__ __forceinline__ void softmax_step(Tensor& s, SoftmaxRows& rows, float (&rescale)[2], bool first,
                                             float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = first ? -INFINITY : rows.max[r];
    float top = fmaxf(s(2 * r), s(2 * r + 1));
#pragma unroll
    for (int j = 1; j < kColumnTiles; ++j) top = fmaxf(top, fmaxf(s(4 * j + 2 * r), s(4 * j + 2 * r + 1)));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    top = fmaxf(top, before);
    rows.max[r] = top;
    const float base = top == -INFINITY ? 0.0f : top * scale_log2;
    rescale[r] = exp2f(before * scale_log2 - base);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s(4 * j + 2 * r + c);
        x = exp2f(x * scale_log2 - base);
        sum += x;
      }
    }
    rows.sum[r] = first ? sum : rows.sum[r] * rescale[r] + sum;
  }
}

}  // namespace bsfa::cuda::attn::sm90
