// pattern_mask: mask words from vertical and slash patterns; bsfa/pattern.h says how a word is made.
//
// Tile      one CTA per mask row. Its first warp finds the row's sequence and tile, by division where all sequences are
//           alike, else by a scan over the sequences' tile counts, 32 at a time.
// Threads   one warp per query head at a time, one word per lane. A row of slashes is a bit string mirrored at the
//           tile's own block: two words of it, shifted and reversed.
// Memory    base once, where its head is query-aware, words written once; patterns are small and stay in cache.
// Waits     for nothing but its own loads.
#include <cstdint>

#include "../common/warp.h"
#include "bsfa/cuda.h"
#include "bsfa/pattern.h"

namespace bsfa::cuda {
namespace {

constexpr int kPatternThreads = 256;

// Which sequence and local tile mask row `row` is; sequence -1: none. By one warp.
__device__ int2 find_row(const Problem& problem, int64_t row) {
  const bool alike =
      problem.query.cu_seqlens == nullptr && problem.kv.cu_seqlens == nullptr && problem.kv.seqlens == nullptr;
  if (alike) {
    const int32_t tiles = sequence_geometry(problem, 0).num_tiles();
    const int64_t sequence = row / max(tiles, 1);
    if (tiles == 0 || sequence >= problem.batch) return make_int2(-1, 0);
    return make_int2(static_cast<int32_t>(sequence), static_cast<int32_t>(row - sequence * tiles));
  }
  const int lane = threadIdx.x % 32;
  int64_t before = 0;  // tiles of the sequences of earlier trips
  for (int32_t first = 0; first < problem.batch; first += 32) {
    const int32_t sequence = first + lane;
    const int64_t tiles = sequence < problem.batch ? sequence_geometry(problem, sequence).num_tiles() : 0;
    int64_t end = tiles;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int64_t below = __shfl_up_sync(kAllLanes, end, d);
      if (lane >= d) end += below;
    }
    end += before;
    const unsigned found = __ballot_sync(kAllLanes, row >= end - tiles && row < end);
    if (found != 0) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      const int64_t begin = __shfl_sync(kAllLanes, end - tiles, owner);
      return make_int2(first + owner, static_cast<int32_t>(row - begin));
    }
    before = __shfl_sync(kAllLanes, end, 31);
  }
  return make_int2(-1, 0);
}

__global__ void __launch_bounds__(kPatternThreads) pattern_kernel(const __grid_constant__ PatternParams params) {
  __shared__ int2 place;
  const int64_t index = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == 0) {
    const int2 found = find_row(params.problem, index);
    if (lane == 0) place = found;
  }
  __syncthreads();
  const bool used = place.x >= 0;
  const PatternRow row = used ? pattern_row(params, place.x, place.y) : PatternRow{};
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
