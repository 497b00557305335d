// How the keys of a sequence are cut into TMA boxes.
#pragma once

#include <cutlass/fast_math.h>

#include <algorithm>
#include <numeric>

#include "bsfa/params.h"
#include "schedule.h"

namespace bsfa::cuda {

// Sets what a kernel's parameters say of that: pages of page_size tokens, in boxes of box_rows (1 << box_shift) tokens
// of one page; or without pages one box of kBlockKeys tokens.
template <class KernelParams>
void set_key_boxes(const KvLayout& kv, KernelParams& k) {
  k.block_table = kv.block_table;
  k.block_table_stride = kv.block_table_stride;
  k.page_size = cutlass::FastDivmod(std::max(kv.page_size, 1));
  k.box_rows = kv.block_table != nullptr ? std::gcd(kv.page_size, kBlockKeys) : kBlockKeys;
  k.box_shift = 0;
  while (1 << k.box_shift < k.box_rows) ++k.box_shift;
  k.keys_packed = kv.cu_seqlens != nullptr;
}

}  // namespace bsfa::cuda
