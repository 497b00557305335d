// token_mask: the bits of the keys that each query row may see, and of the 128 x 128 blocks that hold one.
//
// Tile      one CTA per mask row (query tile), whose sequence and tile it finds first (place.h).
// Threads   one warp per query row at a time. It reads the row's indices, 16 bytes a lane and four loads in flight,
//           sets bits in its own piece of shared memory, and writes the row once, 16 bytes a lane. Those 16 bytes are a
//           KV block, so a ballot over what the lanes write gives a word of the block mask.
// Order     bits are set by atomicOr, invalid indices counted by integer atomics: no order changes a result.
// Memory    4 KiB of shared memory per warp, 32K keys; longer rows take several passes over their indices, which stay
//           in L2. Indices are read and words written once: 16K rows of 2048 indices are 128 MB and 32 MB.
// Waits     for nothing but its own loads.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../common/launch.h"
#include "../common/place.h"
#include "../common/warp.h"
#include "bsfa/cuda.h"
#include "bsfa/geometry.h"

namespace bsfa::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kPassWords = 1024;   // of a row; a multiple of 128, the words of 32 blocks
constexpr int kLoadsInFlight = 4;  // of 16 bytes, per lane
constexpr int kBlock = 128;        // tokens of a block, and of a tile
static_assert(kPassWords % 128 == 0 && sizeof(uint4) * 8 == kBlock);

__device__ __forceinline__ int32_t bits_of(uint4 x) { return __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w); }

// What one lane gathers from the indices of its row.
class Marker {
 public:
  // Keys [0, seen) of a sequence of seqlen_k; a pass sets words [first_word, first_word + count) of the row in `bits`.
  __device__ Marker(uint32_t* bits, int32_t seqlen_k, int32_t seen, int32_t first_word, int32_t count)
      : bits_(bits), seqlen_k_(seqlen_k), seen_(seen), first_word_(first_word), count_(count) {}

  __device__ __forceinline__ void mark(int32_t key, int64_t place) {
    if (static_cast<uint32_t>(key) >= static_cast<uint32_t>(seqlen_k_)) {  // negative ones as well
      if (key != -1) {
        ++invalid_;
        first_ = min(first_, static_cast<unsigned long long>(place));
      }
      return;
    }
    if (key >= seen_) return;
    const int32_t word = key / 32 - first_word_;
    if (static_cast<uint32_t>(word) >= static_cast<uint32_t>(count_)) return;
    if (word != word_) {
      flush();
      word_ = word;
    }
    pending_ |= 1u << (key % 32);
  }

  // Neighbouring keys, as of sorted sets, mostly share a word: they are set together.
  __device__ __forceinline__ void flush() {
    if (pending_ != 0) atomicOr(bits_ + word_, pending_);
    pending_ = 0;
  }

  __device__ uint32_t invalid() const { return invalid_; }
  __device__ unsigned long long first() const { return first_; }

 private:
  uint32_t* bits_;
  int32_t seqlen_k_, seen_, first_word_, count_;
  int32_t word_ = 0;
  uint32_t pending_ = 0;
  uint32_t invalid_ = 0;
  unsigned long long first_ = ~0ull;
};

// Marks the lane's share of a row's indices. `wide`: the row starts at a multiple of 16 bytes.
__device__ __forceinline__ void mark_row(const int32_t* indices, int32_t topk, bool wide, int64_t place,
                                         Marker& marker) {
  const int lane = threadIdx.x % 32;
  const int32_t quads = wide ? topk / 4 : 0;
  const int4* rows = reinterpret_cast<const int4*>(indices);
  for (int32_t begin = 0; begin < quads; begin += 32 * kLoadsInFlight) {
    int4 keys[kLoadsInFlight];
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      const int32_t i = begin + u * 32 + lane;
      keys[u] = i < quads ? __ldg(rows + i) : make_int4(-1, -1, -1, -1);
    }
#pragma unroll
    for (int u = 0; u < kLoadsInFlight; ++u) {
      const int64_t at = place + (begin + u * 32 + lane) * int64_t{4};
      marker.mark(keys[u].x, at);
      marker.mark(keys[u].y, at + 1);
      marker.mark(keys[u].z, at + 2);
      marker.mark(keys[u].w, at + 3);
    }
  }
  for (int32_t i = quads * 4 + lane; i < topk; i += 32) marker.mark(__ldg(indices + i), place + i);
  marker.flush();
}

// `bits` holds the pass's words of the row: they go to `target` and become zeros. Returns the lane's set bits; marks
// non-empty blocks, of which the pass's first is bit 0 of block_words[0].
__device__ __forceinline__ int32_t write_pass(uint4* bits, int32_t blocks, uint4* target, uint32_t* block_words) {
  const int lane = threadIdx.x % 32;
  int32_t count = 0;
  for (int32_t begin = 0; begin < blocks; begin += 32) {
    const int32_t block = begin + lane;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (block < blocks) {
      x = bits[block];
      bits[block] = make_uint4(0, 0, 0, 0);
      target[block] = x;
    }
    count += bits_of(x);
    const uint32_t filled = __ballot_sync(kAllLanes, (x.x | x.y | x.z | x.w) != 0);
    if (lane == 0 && filled != 0) atomicOr(block_words + begin / 32, filled);
  }
  return count;
}

__global__ void __launch_bounds__(kThreads)
    token_mask_kernel(const __grid_constant__ TokenMaskParams params, int32_t pass_words, bool wide) {
  extern __shared__ uint4 shared[];  // [kWarps][pass_words / 4], then the tile's block words
  uint32_t* block_words = reinterpret_cast<uint32_t*>(shared + kWarps * (pass_words / 4));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t index = blockIdx.x;
  const Place place = find_place<kThreads>(params.problem, static_cast<int32_t>(index));
  uint4* bits = shared + warp * (pass_words / 4);
  for (int32_t i = lane; i < pass_words / 4; i += 32) bits[i] = make_uint4(0, 0, 0, 0);
  for (int32_t w = threadIdx.x; w < params.num_words; w += kThreads) block_words[w] = 0;
  __syncthreads();

  if (place.sequence >= 0) {
    const Problem& problem = params.problem;
    const SequenceGeometry geometry = sequence_geometry(problem, place.sequence);
    const bool packed = problem.query.cu_seqlens != nullptr;
    const int64_t first =
        packed ? int64_t{problem.query.cu_seqlens[place.sequence]} : int64_t{place.sequence} * problem.query.max_seqlen;
    const int32_t row_end = geometry.row_end(place.tile);
    for (int32_t row = geometry.row_begin(place.tile) + warp; row < row_end; row += kWarps) {
      const int64_t r = first + row;
      const int64_t offset = packed ? r * params.index_row_stride
                                    : place.sequence * params.index_batch_stride + row * params.index_row_stride;
      const int32_t seen = geometry.causal ? min(geometry.seqlen_k, geometry.offset() + row + 1) : geometry.seqlen_k;
      int32_t count = 0;
      int32_t word = 0;
      do {  // at least once: without keys there still may be invalid indices
        const int32_t words = min(pass_words, params.row_words - word);
        Marker marker(reinterpret_cast<uint32_t*>(bits), geometry.seqlen_k, seen, word, words);
        mark_row(params.indices + offset, params.topk, wide, r * params.topk, marker);
        __syncwarp();
        uint4* target = reinterpret_cast<uint4*>(params.words + r * params.row_words + word);
        count += write_pass(bits, words / 4, target, block_words + word / 128);
        __syncwarp();
        if (word == 0 && marker.invalid() != 0) {  // every pass meets all indices
          auto* status = reinterpret_cast<unsigned long long*>(params.status);
          atomicAdd(status, static_cast<unsigned long long>(marker.invalid()));
          atomicMin(status + 1, marker.first());
        }
        word += pass_words;
      } while (word < params.row_words);
      count = __reduce_add_sync(kAllLanes, count);
      if (lane == 0) params.counts[r] = count;
    }
  }
  __syncthreads();

  if (warp != 0) return;
  int32_t count = 0;
  for (int32_t w = lane; w < params.num_words; w += 32) {
    params.block_words[index * params.num_words + w] = static_cast<int32_t>(block_words[w]);
    count += __popc(block_words[w]);
  }
  count = __reduce_add_sync(kAllLanes, count);
  if (lane == 0) params.block_counts[index] = count;
}

bool on_16_bytes(int64_t stride) { return stride % 4 == 0; }

}  // namespace

cudaError_t token_mask(const TokenMaskParams& params, cudaStream_t stream) {
  // No invalid index: count 0, the first at -1, which is the largest unsigned number.
  cudaError_t error = cudaMemsetAsync(params.status, 0, sizeof(int64_t), stream);
  if (error == cudaSuccess) error = cudaMemsetAsync(params.status + 1, 0xff, sizeof(int64_t), stream);
  if (error != cudaSuccess || params.num_rows == 0) return error;
  const Problem& problem = params.problem;
  const bool fits = problem.block_m == kBlock && problem.block_n == kBlock &&
                    params.row_words == ceil_div(problem.kv.max_seqlen, kBlock) * 4 &&
                    params.row_words / 4 <= kMaxTokenBlocks && params.num_rows <= INT32_MAX;
  if (!fits) return cudaErrorInvalidValue;
  const bool wide = reinterpret_cast<uintptr_t>(params.indices) % 16 == 0 && on_16_bytes(params.index_row_stride) &&
                    on_16_bytes(params.index_batch_stride);
  const int32_t pass_words = std::min(params.row_words, kPassWords);
  const int bytes = kWarps * pass_words * 4 + params.num_words * 4;
  static DevicesDone allowed;
  error = allow_shared_memory(allowed, token_mask_kernel, kWarps * kPassWords * 4 + (kMaxTokenBlocks / 32) * 4);
  if (error != cudaSuccess) return error;
  token_mask_kernel<<<static_cast<unsigned>(params.num_rows), kThreads, bytes, stream>>>(params, pass_words, wide);
  return cudaGetLastError();
}

}  // namespace bsfa::cuda
