// What lies on which multiple of bytes.
#pragma once

#include <cstdint>

#include "bsfa/params.h"

namespace bsfa::cuda {

// Bytes that a part of a workspace takes, so that the next one begins on 128.
constexpr int64_t aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every row (one token of one head, of 16-bit elements) starts on 16 bytes and is a whole number of them. A
// stride that nothing is multiplied by does not count.
inline bool rows_on_16_bytes(const TensorView& view, int64_t heads, int64_t head_dim) {
  const auto fits = [](int64_t elements, int64_t count) { return count <= 1 || elements % 8 == 0; };
  return on_16_bytes(view.data) && head_dim % 8 == 0 && fits(view.token_stride, view.tokens) &&
         fits(view.head_stride, heads) && fits(view.batch_stride, view.batch_size);
}

}  // namespace bsfa::cuda
