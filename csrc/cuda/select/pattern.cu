// pattern_mask: mask words from vertical and slash patterns; bsfa/pattern.h says how a word is made.
//
// Tile      one CTA per mask row, whose sequence and tile it finds first (place.h).
// Threads   one warp per query head at a time, one word per lane. A row of slashes is a bit string mirrored at the
//           tile's own block: two words of it, shifted and reversed.
// Memory    base once, where its head is query-aware, words written once; patterns are small and stay in cache.
// Waits     for nothing but its own loads.
#include <cstdint>

#include "../common/place.h"
#include "../common/warp.h"
#include "bsfa/cuda.h"
#include "bsfa/pattern.h"

namespace bsfa::cuda {
namespace {

constexpr int kPatternThreads = 256;

__global__ void __launch_bounds__(kPatternThreads) pattern_kernel(const __grid_constant__ PatternParams params) {
  const int64_t index = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Place place = find_place<kPatternThreads>(params.problem, static_cast<int32_t>(index));
  const bool used = place.sequence >= 0;
  const PatternRow row = used ? pattern_row(params, place.sequence, place.tile) : PatternRow{};
  const int32_t heads = params.problem.num_q_heads;
  for (int32_t head = warp; head < heads; head += kPatternThreads / 32) {
    int32_t* words = params.words + (index * heads + head) * params.num_words;
    int32_t count = 0;
    for (int32_t w = lane; w < params.num_words; w += 32) {
      const uint32_t bits = used ? pattern_word(params, row, index, head, w) : 0u;
      words[w] = static_cast<int32_t>(bits);
      count += __popc(bits);
    }
    count = __reduce_add_sync(kAllLanes, count);
    if (lane == 0) params.counts[index * heads + head] = count;
  }
}

}  // namespace

cudaError_t pattern_mask(const PatternParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.problem.num_q_heads == 0) return cudaSuccess;
  if (params.num_rows > INT32_MAX) return cudaErrorInvalidValue;
  pattern_kernel<<<static_cast<unsigned>(params.num_rows), kPatternThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace bsfa::cuda
