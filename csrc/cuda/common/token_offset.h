// Where a token's row of K or V lies.
#pragma once

#include <cstdint>

#include "bsfa/params.h"

namespace bsfa::cuda {

// In elements from the start of `view`, without the head. Only tokens of the sequence: no others have a page.
__device__ __forceinline__ int64_t token_offset(const KvLayout& kv, const TensorView& view, int32_t sequence,
                                                int32_t token) {
  if (kv.block_table != nullptr) {
    const int32_t page = token / kv.page_size;
    const int32_t slot = token - page * kv.page_size;
    return kv.block_table[sequence * kv.block_table_stride + page] * view.batch_stride + slot * view.token_stride;
  }
  if (kv.cu_seqlens != nullptr) return (int64_t{kv.cu_seqlens[sequence]} + token) * view.token_stride;
  return sequence * view.batch_stride + token * view.token_stride;
}

}  // namespace bsfa::cuda
