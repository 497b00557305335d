// A thread's two query rows: rounded for the product, and what their bounds need.
#pragma once

#include "rounding.h"

namespace bsfa::cuda::bound {

// Nats for scores as products give them, before the block's own factor.
struct Rows {
  float factor[2];  // of a score
  float norm[2];    // |q|, of what keys have lost
  float lost[2];    // |q - q'|, of what keys have
  bool counts[2];   // rows of the sequence

  // How far a logit of row r can be from what the product says.
  __device__ __forceinline__ float error(int r, const BlockFacts& facts) const {
    return fmaf(norm[r], facts.lost, lost[r] * facts.norm);
  }
};

// Reads, rounds and measures rows `first_row` and `first_row` + 8 of the tile, which four lanes share; fragment word
// 4 k + 2 h + r is row r, columns 32 k + 16 h + 4 (lane % 4) and three more.
template <class Element, int kHeadDim>
__device__ __forceinline__ Rows take_rows(const KernelParams& p, const TileRow& tile, int32_t head, int first_row,
                                          uint32_t (&fragment)[kHeadDim / 8]) {
  constexpr int kQuarters = kHeadDim / 16;
  const float scale = fabsf(p.problem.softmax_scale);
  const float sign = p.problem.softmax_scale < 0.0f ? -1.0f : 1.0f;
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + 8 * r;
    rows.counts[r] = row >= tile.row_begin && row < tile.row_end;
    uint32_t words[kQuarters][2] = {};
    if (rows.counts[r]) {
      const auto* source = static_cast<const Element*>(p.q.data) + tile.query_batch * p.q.batch_stride +
                           (int64_t{tile.query_token} + row) * p.q.token_stride + head * p.q.head_stride +
                           threadIdx.x % 4 * 4;
#pragma unroll
      for (int i = 0; i < kQuarters; ++i) {
        const uint2 bits = *reinterpret_cast<const uint2*>(source + 16 * i);
        words[i][0] = bits.x;
        words[i][1] = bits.y;
      }
    }
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) largest = fmaxf(largest, largest_of<Element>(words[i]));
    const Factor factor = factor_for(max_over<4>(largest));
    Squares squares;
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) fragment[2 * i + r] = round_four<Element>(words[i], sign * factor.up, squares);
    squares = sum_over<4>(squares);
    const float norm = norm_of(max_or_nan(squares.whole, squares.held), factor.down);
    rows.factor[r] = scale * factor.down;
    rows.norm[r] = scale * norm * kUp;
    rows.lost[r] = scale * loss_of(squares.lost, factor.down, norm) * kUp;
  }
  return rows;
}

}  // namespace bsfa::cuda::bound
