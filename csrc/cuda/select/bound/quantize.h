// Keys in 8 bits: one CTA for each KV block of a head reads its 128 keys, rounds them with one factor, and writes
// their image as the products want it in shared memory, with the block's facts. Keys past the end of a sequence count
// as zeros: they are not read. Floors: K once from HBM, half of its bytes to it.
#pragma once

#include "../../common/token_offset.h"
#include "rounding.h"

namespace bsfa::cuda::bound {

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(const __grid_constant__ KernelParams p) {
  using C = Config<kHeadDim>;
  constexpr int kLanes = kHeadDim / 8;              // of a row, 16 bytes each
  constexpr int kRows = kQuantizeThreads / kLanes;  // at a time
  constexpr int kTrips = kBlockKeys / kRows;
  constexpr int kWarps = kQuantizeThreads / 32;
  __shared__ float scratch[3][kWarps];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int32_t block = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int32_t first = block * kBlockKeys;
  const int32_t keys = min(seqlen_k(p.problem.kv, sequence) - first, kBlockKeys);
  if (keys <= 0) return;

  const int column = thread % kLanes * 8;
  uint32_t words[kTrips][4];
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kTrips; ++i) {
    const int row = i * kRows + thread / kLanes;
    uint4 bits{};
    if (row < keys) {
      const auto* source = static_cast<const Element*>(p.k.data) +
                           token_offset(p.problem.kv, p.k, sequence, first + row) + head * p.k.head_stride + column;
      bits = *reinterpret_cast<const uint4*>(source);
    }
    words[i][0] = bits.x;
    words[i][1] = bits.y;
    words[i][2] = bits.z;
    words[i][3] = bits.w;
    largest = fmaxf(largest, largest_of<Element>(words[i]));
  }
  largest = max_over<32>(largest);
  if (lane == 0) scratch[0][warp] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, scratch[0][w]);
  const Factor factor = factor_for(largest);

  const int64_t index = head * p.keys.blocks + p.keys.first_block(p.problem.kv, sequence) + block;
  uint8_t* image = p.keys.images + index * C::kImageBytes;
  float norm = 0.0f, lost = 0.0f;
  const typename C::KeyLayout layout;
#pragma unroll
  for (int i = 0; i < kTrips; ++i) {
    Squares squares;
    uint2 rounded;
    rounded.x = round_four<Element>({words[i][0], words[i][1]}, factor.up, squares);
    rounded.y = round_four<Element>({words[i][2], words[i][3]}, factor.up, squares);
    *reinterpret_cast<uint2*>(image + layout(i * kRows + thread / kLanes, column)) = rounded;
    squares = sum_over<kLanes>(squares);
    norm = max_or_nan(norm, max_or_nan(squares.whole, squares.held));
    lost = max_or_nan(lost, squares.lost);
  }
  norm = max_over<32>(norm);
  lost = max_over<32>(lost);
  if (lane == 0) {
    scratch[1][warp] = norm;
    scratch[2][warp] = lost;
  }
  __syncthreads();
  if (thread > 0) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    norm = max_or_nan(norm, scratch[1][w]);
    lost = max_or_nan(lost, scratch[2][w]);
  }
  BlockFacts facts;
  facts.factor = factor.down;
  facts.norm = norm_of(norm, factor.down);
  facts.lost = loss_of(lost, factor.down, facts.norm);
  facts.block = block;
  p.keys.facts[index] = facts;
}

}  // namespace bsfa::cuda::bound
