// What lies on which multiple of bytes.
#pragma once

#include <cstdint>

namespace bsfa::cuda {

// Bytes that a part of a workspace takes, so that the next one begins on 128.
constexpr int64_t aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

}  // namespace bsfa::cuda
