// What stands for one KV block (Pooling in params.h), all KV heads: out[b, j, h, :] from its tokens k[token, h, :].
//
//   kMean    sums are float32, token by token, divided by the true number of tokens, in the last block too; rounded to
//            the dtype of k
//   kMaxAbs  per dimension the value of largest magnitude; ties: the earlier token; a NaN is larger than anything
//   kCenter  token number count / 2
//
// Blocks past the end of the sequence are zeros. Tokens are read once. Memory: two rows.
#pragma once

#include "pack.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

static int64_t pool_scratch(const PoolParams& params) { return 2 * round_up(params.head_dim, 16); }

// Joins a further token's row to what stands for those before it. `sum`: their sum, or for kMaxAbs what is largest.
BSFA_INLINE void pool_row(Pooling pooling, const float* row, int32_t dim, float* sum) {
  if (pooling == Pooling::kMaxAbs) {
    for (int32_t d = 0; d < dim; ++d) {
      const float size = __builtin_fabsf(row[d]), largest = __builtin_fabsf(sum[d]);
      sum[d] = size > largest || size != size ? row[d] : sum[d];
    }
  } else {
    for (int32_t d = 0; d < dim; ++d) sum[d] += row[d];
  }
}

static void pool_block(const PoolParams& params, int32_t sequence, int32_t seqlen, int32_t block, float* scratch) {
  const int32_t dim = params.head_dim;
  float* sum = scratch;
  float* row = scratch + round_up(dim, 16);
  const int32_t begin = min(block * params.block_n, seqlen);
  const int32_t count = min(params.block_n, seqlen - begin);
  const bool center = params.pooling == Pooling::kCenter && count > 0;
  const int32_t first = center ? begin + count / 2 : begin;
  const int32_t used = center ? 1 : count;
  for (int32_t head = 0; head < params.num_kv_heads; ++head) {
    for (int32_t d = 0; d < dim; ++d) sum[d] = 0.0f;
    for_each_token(params.dtype, params.kv, params.k, sequence, head, first, used, [=](const char* address, int32_t) {
      read_row(params.dtype, address, dim, row);
      pool_row(params.pooling, row, dim, sum);
    });
    if (params.pooling == Pooling::kMean && count > 0) {
      const float inverse = 1.0f / static_cast<float>(count);
      for (int32_t d = 0; d < dim; ++d) sum[d] *= inverse;
    }
    const int64_t index = ((int64_t{sequence} * params.max_blocks + block) * params.num_kv_heads + head) * int64_t{dim};
    write_row(params.dtype, sum, dim, static_cast<char*>(params.out) + index * element_size(params.dtype));
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
