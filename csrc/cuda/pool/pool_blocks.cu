// Block means of K: out[b, j, h, :] = (1 / n) * sum of k[t, h, :] over the n tokens t of KV block j, float32 sums.
//
// Tile      one CTA per (sequence b, block j, chunk of kChunk elements of the flattened (head, dim) axis): when heads
//           lie beside each other in memory the chunk is one contiguous piece of every token's row.
// Threads   kRows x kColumns. A thread owns one column (one load's width) and every kRows-th token; it issues
//           kLoadsInFlight independent loads, adds them in float32, and so on. The kRows partial sums meet in shared
//           memory, where one thread per element adds them in a fixed order: same inputs, same bits.
// Paged     first the CTA's threads turn the trip's tokens into row offsets, one token each, in shared memory: one
//           division and one table read per token, not per load. Only entries below the sequence's end are read.
// Memory    reads K once, writes the means once; 8 KB of shared memory for the sums, 1 KB for the offsets.
// Waits     for nothing but its own loads. No tensor cores, no atomics, no workspace.
//
// The other modes (Pooling in params.h) have a kernel of their own, pick_kernel: one thread per element of the
// flattened axis, which walks the block's tokens in order. They are exact: a value of k comes out as it is.
#include <cstdint>

#include "../common/alignment.h"
#include "../common/scalar.h"
#include "../common/token_offset.h"
#include "bsfa/cuda.h"
#include "config.h"

namespace bsfa::cuda {
namespace {

using pool::kChunk;
using pool::kLoadsInFlight;
using pool::kMinCtasPerSm;
using pool::kThreads;
using pool::kWideVec;
using pool::Tile;

__device__ __forceinline__ void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* out, float x) { *out = __float2half_rn(x); }

// kVec elements as one register value. K is read once per CTA, so it is kept out of L1.
template <typename T, int kVec>
struct Load;

template <typename T>
struct Load<T, kWideVec> {
  uint4 bits;
  __device__ __forceinline__ void from(const T* p) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
        : "l"(p));
  }
  __device__ __forceinline__ void add_to(float (&sum)[kWideVec], bool valid) const {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack(valid ? words[i] : 0u, T{});
      sum[2 * i] += pair.x;
      sum[2 * i + 1] += pair.y;
    }
  }
};

template <typename T>
struct Load<T, 1> {
  uint16_t bits;
  __device__ __forceinline__ void from(const T* p) {
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(bits) : "l"(p));
  }
  __device__ __forceinline__ void add_to(float (&sum)[1], bool valid) const {
    sum[0] += unpack(valid ? bits : 0u, T{}).x;
  }
};

template <typename T, int kVec, bool kPaged>
__global__ void __launch_bounds__(kThreads, kMinCtasPerSm)
    pool_blocks_kernel(const __grid_constant__ PoolParams params, const int32_t num_chunks) {
  constexpr int kRows = Tile<kVec>::kRows;
  constexpr int kColumns = Tile<kVec>::kColumns;
  constexpr int kTokens = Tile<kVec>::kTokens;
  __shared__ alignas(16) float partial[kRows][kChunk];
  __shared__ int64_t row_offset[kPaged ? kTokens : 1];
  cudaTriggerProgrammaticLaunchCompletion();  // the selection that follows may prepare itself

  const KvLayout& kv = params.kv;
  const int thread = threadIdx.x;
  const uint32_t block = blockIdx.x / static_cast<uint32_t>(num_chunks);
  const int32_t chunk = blockIdx.x - block * num_chunks;
  const int32_t b = blockIdx.y;
  const int32_t first_token = block * params.block_n;
  const int32_t width = params.num_kv_heads * params.head_dim;

  int32_t seqlen = kv.max_seqlen;
  int64_t sequence_offset = b * params.k.batch_stride;
  if (kPaged) {
    seqlen = min(seqlen, kv.seqlens[b]);
    sequence_offset = 0;
  } else if (kv.cu_seqlens != nullptr) {
    const int32_t begin = kv.cu_seqlens[b];
    seqlen = min(seqlen, kv.cu_seqlens[b + 1] - begin);
    sequence_offset = begin * params.k.token_stride;
  } else if (kv.seqlens != nullptr) {
    seqlen = min(seqlen, kv.seqlens[b]);
  }
  const int32_t count = min(params.block_n, seqlen - first_token);  // tokens of this block; <= 0 past the end

  // Columns beyond the last head read the last column's data again and drop it.
  const int row = thread / kColumns;
  const int column = thread - row * kColumns;
  const uint32_t element = min(chunk * kChunk + column * kVec, width - kVec);
  const uint32_t head = element / static_cast<uint32_t>(params.head_dim);
  const int64_t token_stride = params.k.token_stride;
  const T* source = static_cast<const T*>(params.k.data) + sequence_offset + head * params.k.head_stride +
                    (element - head * params.head_dim);

  float sum[kVec] = {};
  for (int32_t begin = 0; begin < count; begin += kTokens) {
    if (kPaged) {
      if (begin > 0) __syncthreads();  // the previous trip's offsets are still being read
      const int32_t* table = kv.block_table + b * kv.block_table_stride;
      for (int i = thread; i < kTokens && begin + i < count; i += kThreads) {
        const uint32_t token = first_token + begin + i;
        const uint32_t page = token / static_cast<uint32_t>(kv.page_size);
        const uint32_t slot = token - page * kv.page_size;
        row_offset[i] = table[page] * params.k.batch_stride + slot * token_stride;
      }
      __syncthreads();
    }
    // Rows beyond the block's end read its last token again and add nothing: a load without a branch is issued early.
    Load<T, kVec> loads[kLoadsInFlight];
    const int32_t last = count - begin - 1;
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int32_t token = min(row + i * kRows, last);
      loads[i].from(source + (kPaged ? row_offset[token] : (first_token + begin + token) * token_stride));
    }
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) loads[i].add_to(sum, row + i * kRows <= last);
  }

#pragma unroll
  for (int i = 0; i < kVec; ++i) partial[row][column * kVec + i] = sum[i];
  __syncthreads();
  if (thread >= kChunk || chunk * kChunk + thread >= width) return;
  float total = 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) total += partial[r][thread];
  const int64_t out_block = static_cast<int64_t>(b) * params.max_blocks + block;
  T* out = static_cast<T*>(params.out) + out_block * width + chunk * kChunk + thread;
  store(out, count > 0 ? total / static_cast<float>(count) : 0.0f);
}

// kMaxAbs: the largest magnitude; ties: the earlier token. kCenter: token number count / 2. Both 16-bit types order
// their magnitudes as their bits do, with NaN above all, so the bits are all that is looked at.
template <Pooling kPooling>
__global__ void __launch_bounds__(kChunk)
    pick_kernel(const __grid_constant__ PoolParams params, const int32_t num_chunks) {
  const KvLayout& kv = params.kv;
  const uint32_t block = blockIdx.x / static_cast<uint32_t>(num_chunks);
  const int32_t chunk = blockIdx.x - block * num_chunks;
  const int32_t b = blockIdx.y;
  const int32_t width = params.num_kv_heads * params.head_dim;
  const int32_t element = chunk * kChunk + threadIdx.x;
  if (element >= width) return;
  int32_t seqlen = kv.max_seqlen;
  if (kv.cu_seqlens != nullptr) {
    seqlen = min(seqlen, kv.cu_seqlens[b + 1] - kv.cu_seqlens[b]);
  } else if (kv.seqlens != nullptr) {
    seqlen = min(seqlen, kv.seqlens[b]);
  }
  const int32_t first_token = block * params.block_n;
  const int32_t count = min(params.block_n, seqlen - first_token);  // tokens of this block; <= 0 past the end
  const int32_t head = element / params.head_dim;
  const uint16_t* source =
      static_cast<const uint16_t*>(params.k.data) + head * params.k.head_stride + (element - head * params.head_dim);

  uint16_t best = 0;
  if constexpr (kPooling == Pooling::kCenter) {
    if (count > 0) best = source[token_offset(kv, params.k, b, first_token + count / 2)];
  } else {
#pragma unroll 4
    for (int32_t i = 0; i < count; ++i) {
      const uint16_t x = source[token_offset(kv, params.k, b, first_token + i)];
      if ((x & 0x7fffu) > (best & 0x7fffu)) best = x;
    }
  }
  const int64_t out_block = static_cast<int64_t>(b) * params.max_blocks + block;
  static_cast<uint16_t*>(params.out)[out_block * width + element] = best;
}

template <typename T, int kVec>
cudaError_t launch(const PoolParams& params, int32_t num_chunks, dim3 grid, cudaStream_t stream) {
  if (params.kv.block_table != nullptr) {
    pool_blocks_kernel<T, kVec, true><<<grid, kThreads, 0, stream>>>(params, num_chunks);
  } else {
    pool_blocks_kernel<T, kVec, false><<<grid, kThreads, 0, stream>>>(params, num_chunks);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const PoolParams& params, bool wide, int32_t num_chunks, dim3 grid, cudaStream_t stream) {
  return wide ? launch<T, kWideVec>(params, num_chunks, grid, stream) : launch<T, 1>(params, num_chunks, grid, stream);
}

}  // namespace

cudaError_t pool_blocks(const PoolParams& params, cudaStream_t stream) {
  const KvLayout& kv = params.kv;
  const bool paged = kv.block_table != nullptr;
  if (params.batch < 0 || params.max_blocks < 0 || params.num_kv_heads < 0 || params.head_dim < 0 ||
      params.block_n < 1 || (paged && (kv.seqlens == nullptr || kv.page_size < 1))) {
    return cudaErrorInvalidValue;
  }
  const int64_t width = static_cast<int64_t>(params.num_kv_heads) * params.head_dim;
  const int64_t num_chunks = (width + kChunk - 1) / kChunk;
  const int64_t per_sequence = num_chunks * params.max_blocks;
  if (per_sequence == 0 || params.batch == 0) return cudaSuccess;
  if (per_sequence > INT32_MAX || width > INT32_MAX - kChunk || params.batch > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(per_sequence), static_cast<unsigned>(params.batch));
  if (params.dtype != DType::kBFloat16 && params.dtype != DType::kFloat16) return cudaErrorInvalidValue;
  const int32_t chunks = static_cast<int32_t>(num_chunks);
  if (params.pooling == Pooling::kMaxAbs) {
    pick_kernel<Pooling::kMaxAbs><<<grid, kChunk, 0, stream>>>(params, chunks);
    return cudaGetLastError();
  }
  if (params.pooling == Pooling::kCenter) {
    pick_kernel<Pooling::kCenter><<<grid, kChunk, 0, stream>>>(params, chunks);
    return cudaGetLastError();
  }

  const bool wide = rows_on_16_bytes(params.k, params.num_kv_heads, params.head_dim);  // for 16-byte loads
  return params.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(params, wide, chunks, grid, stream)
                                          : launch<__half>(params, wide, chunks, grid, stream);
}

}  // namespace bsfa::cuda
