// Mean of one KV block, all KV heads: out[b, j, h, :] = (sum over the block's tokens of k[token, h, :]) / token count.
//
// Sums are float32, token by token; the mean is rounded to the dtype of k. The divisor is the true number of tokens, in
// the last block too; blocks past the end of the sequence are zeros. Tokens are read once. Memory: two rows.
#pragma once

#include "pack.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

static int64_t pool_scratch(const PoolParams& params) { return 2 * round_up(params.head_dim, 16); }

static void pool_block(const PoolParams& params, int32_t sequence, int32_t seqlen, int32_t block, float* scratch) {
  const int32_t dim = params.head_dim;
  float* sum = scratch;
  float* row = scratch + round_up(dim, 16);
  const int32_t begin = min(block * params.block_n, seqlen);
  const int32_t count = min(params.block_n, seqlen - begin);
  const float inverse = 1.0f / static_cast<float>(count);
  for (int32_t head = 0; head < params.num_kv_heads; ++head) {
    for (int32_t d = 0; d < dim; ++d) sum[d] = 0.0f;
    for_each_token(params.dtype, params.kv, params.k, sequence, head, begin, count, [=](const char* address, int32_t) {
      read_row(params.dtype, address, dim, row);
      for (int32_t d = 0; d < dim; ++d) sum[d] += row[d];
    });
    if (count > 0) {
      for (int32_t d = 0; d < dim; ++d) sum[d] *= inverse;
    }
    const int64_t index = ((int64_t{sequence} * params.max_blocks + block) * params.num_kv_heads + head) * int64_t{dim};
    write_row(params.dtype, sum, dim, static_cast<char*>(params.out) + index * element_size(params.dtype));
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
