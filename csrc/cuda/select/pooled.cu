// ScoreRule::kPooled: base-2 logits of pooled query tiles against what stands for the KV blocks.
//
//   pooled[tile, h, :] = mean, maxabs or center of the tile's queries of head h, float32, times the logit's factor
//   score[tile, h, J]  = pooled[tile, h, :] . summary[sequence, J, h / group, :], then the softcap, in units of log2
//
// pool      one CTA per (tile, kChunk elements of the flattened (head, dim) axis). A thread owns one load's width of a
//           column and 1 / kRows of the tile's 128 rows, in order; the parts meet in shared memory, in order too.
// score     one CTA per (kTiles tiles of the slab, kBlocks blocks, query head): a float32 product with kTileStep x
//           kBlockStep results per thread, kDims dims at a time in shared memory. Tiles of other sequences than the
//           first one's need other keys: one pass per sequence. What no tile sees is neither computed nor written.
// Memory    reads the queries once, 4 * Hq * D bytes of scratch per tile; summaries are read through L2 by every CTA.
//           score: 20 KB of shared memory.
// Waits     score for pool, by the stream. No tensor cores: float32 sums keep ties and near ties where they belong.
#include <cstdint>
#include <type_traits>

#include "../common/alignment.h"
#include "../common/scalar.h"
#include "score.h"

namespace bsfa::cuda::select {
namespace {

constexpr int kWideVec = 8;  // 16-bit elements in a 16-byte load

// kVec elements as float32.
template <typename T>
__device__ __forceinline__ void widen(uint4 bits, float (&x)[kWideVec], T) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i], T{});
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}
template <typename T>
__device__ __forceinline__ void widen(uint16_t bits, float (&x)[1], T) {
  x[0] = unpack(bits, T{}).x;
}

// What a load of kVec elements brings.
template <int kVec>
using Bits = std::conditional_t<kVec == kWideVec, uint4, uint16_t>;

template <int kVec, typename T>
__device__ __forceinline__ Bits<kVec> load(const T* p) {
  return __ldg(reinterpret_cast<const Bits<kVec>*>(p));
}

// How a logit's product becomes a base-2 exponent: factor, and with a softcap the tanh of it times `cap`.
struct Scale {
  float factor;
  float cap;  // 0: none
};

Scale scale_of(const Problem& problem) {
  if (problem.softcap > 0.0f) return {problem.softmax_scale / problem.softcap, problem.softcap * kLog2e};
  return {problem.softmax_scale * kLog2e, 0.0f};
}

// --- pool ------------------------------------------------------------------------------------------------------------

constexpr int kPoolThreads = 256;
constexpr int kChunk = 128;
constexpr int kLoadsInFlight = 8;
constexpr int kMinCtasPerSm = 4;  // 64 registers a thread; left alone, ptxas takes fewer and puts the loads in a row

// The later of two tokens or parts, `x`, joins the earlier ones. Of maxabs a NaN wins, and stays.
template <Pooling kPooling>
__device__ __forceinline__ float join(float earlier, float x) {
  if constexpr (kPooling == Pooling::kMean) return earlier + x;
  return earlier == earlier && !(fabsf(x) <= fabsf(earlier)) ? x : earlier;
}

template <typename T, int kVec, Pooling kPooling>
__global__ void __launch_bounds__(kPoolThreads, kMinCtasPerSm)
    pool_kernel(const __grid_constant__ ScoreParams params, const __grid_constant__ Slab slab, const float factor,
                float* __restrict__ pooled) {
  constexpr int kColumns = kChunk / kVec;
  constexpr int kRows = kPoolThreads / kColumns;
  constexpr int kOwn = kTileRows / kRows;
  static_assert(kOwn % kLoadsInFlight == 0, "a thread's rows are whole trips");
  __shared__ alignas(16) float parts[kRows][kChunk];

  const TileRow tile = slab.rows[slab.row_begin + static_cast<int32_t>(blockIdx.x)];
  const int32_t begin = tile.row_begin, end = tile.row_end;
  if (tile.sequence < 0 || end <= begin) return;
  const int32_t dim = params.problem.head_dim;
  const int32_t width = params.problem.num_q_heads * dim;
  const int thread = threadIdx.x;
  const int row = thread / kColumns, column = thread % kColumns;
  // Columns beyond the last head read the last column's data again and drop it.
  const int32_t first_element = static_cast<int32_t>(blockIdx.y) * kChunk;
  const int32_t element = min(first_element + column * kVec, width - kVec);
  const int32_t head = element / dim;
  const T* source = static_cast<const T*>(params.q.data) + tile.query_batch * params.q.batch_stride +
                    tile.query_token * params.q.token_stride + head * params.q.head_stride + (element - head * dim);
  const int64_t token_stride = params.q.token_stride;

  float result[kVec] = {};
  if constexpr (kPooling == Pooling::kCenter) {
    if (row == 0) widen(load<kVec>(source + (begin + (end - begin) / 2) * token_stride), result, T{});
  } else {
    // Rows outside the tile read its nearest row again: a load without a branch is issued early. Doing that twice
    // changes no maximum; a mean leaves them out.
    const int32_t own = row * kOwn;
#pragma unroll 1
    for (int32_t trip = own; trip < own + kOwn; trip += kLoadsInFlight) {
      Bits<kVec> bits[kLoadsInFlight];
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        bits[i] = load<kVec>(source + min(max(trip + i, begin), end - 1) * token_stride);
      }
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        const bool inside = trip + i >= begin && trip + i < end;
        float x[kVec];
        widen(bits[i], x, T{});
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (kPooling == Pooling::kMean) {
            result[e] += inside ? x[e] : 0.0f;
          } else {
            result[e] = trip == own && i == 0 ? x[e] : join<kPooling>(result[e], x[e]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e) parts[row][column * kVec + e] = result[e];
  __syncthreads();
  if (thread >= kChunk || first_element + thread >= width) return;
  float value = parts[0][thread];
  if constexpr (kPooling != Pooling::kCenter) {
#pragma unroll
    for (int r = 1; r < kRows; ++r) value = join<kPooling>(value, parts[r][thread]);
  }
  if constexpr (kPooling == Pooling::kMean) value /= static_cast<float>(end - begin);
  pooled[int64_t{blockIdx.x} * width + first_element + thread] = value * factor;
}

// --- score -----------------------------------------------------------------------------------------------------------

constexpr int kTiles = 32;
constexpr int kBlocks = 128;
constexpr int kDims = 32;
constexpr int kTileStep = 8;
constexpr int kBlockStep = 4;
constexpr int kScoreThreads = (kTiles / kTileStep) * (kBlocks / kBlockStep);
constexpr int kTileDims = kTiles * kDims / kScoreThreads;  // elements of the queries that a thread stages

static_assert(kScoreThreads == kBlocks, "a thread stages one block's dims");
static_assert(kBlocks / kBlockStep == 32, "a warp shares its tiles");
static_assert(kDims % kWideVec == 0 && kTileDims == kWideVec, "staging");

// Dims [from, from + kVec) of a row of `dim`, zeros beyond its end.
template <typename T, int kVec>
__device__ __forceinline__ void load_dims(const T* row, int32_t from, int32_t dim, float (&x)[kVec]) {
  if (from + kVec <= dim) {
    widen(load<kVec>(row + from), x, T{});
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) x[e] = 0.0f;
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kScoreThreads)
    score_kernel(const __grid_constant__ ScoreParams params, const __grid_constant__ Slab slab, const float cap,
                 const float* __restrict__ pooled) {
  __shared__ alignas(16) float queries[kDims][kTiles];
  __shared__ alignas(16) float keys[kDims][kBlocks];
  __shared__ int32_t sequences[kTiles];
  __shared__ int32_t visible[kTiles];

  const Problem& problem = params.problem;
  const int thread = threadIdx.x;
  const int32_t first_block = static_cast<int32_t>(blockIdx.x) * kBlocks;
  const int32_t first_tile = static_cast<int32_t>(blockIdx.y) * kTiles;  // in the slab
  const int32_t tiles = min(kTiles, slab.row_end - slab.row_begin - first_tile);
  const int32_t head = blockIdx.z;
  const int32_t kv_head = head / (problem.num_q_heads / problem.num_kv_heads);
  const int32_t dim = problem.head_dim;
  bool sees = false;
  if (thread < kTiles) {
    TileRow tile;
    tile.sequence = -1;
    if (thread < tiles) tile = slab.rows[slab.row_begin + first_tile + thread];
    sequences[thread] = tile.sequence;
    const int32_t end = tile.sequence < 0 ? 0 : min(visible_range(tile, problem.causal, -1).end, params.max_blocks);
    visible[thread] = end;
    sees = end > first_block;
  }
  if (!__syncthreads_or(sees)) return;

  const int tile_at = thread / 32 * kTileStep, block_at = thread % 32 * kBlockStep;
  const int32_t block = first_block + thread;  // that the thread stages
  const int staged_tile = thread % kTiles, staged_dims = thread / kTiles * kTileDims;
  const float* query = pooled + (int64_t{first_tile + staged_tile} * problem.num_q_heads + head) * dim;
  for (int32_t begin = 0, end = 0; begin < tiles; begin = end) {
    const int32_t sequence = sequences[begin];
    int32_t furthest = 0;
    for (end = begin; end < tiles && sequences[end] == sequence; ++end) furthest = max(furthest, visible[end]);
    if (sequence < 0 || furthest <= first_block) continue;

    const bool has_query = staged_tile >= begin && staged_tile < end;
    const T* key = static_cast<const T*>(params.summary) +
                   ((int64_t{sequence} * params.max_blocks + block) * problem.num_kv_heads + kv_head) * dim;
    float sum[kTileStep][kBlockStep] = {};
    for (int32_t from = 0; from < dim; from += kDims) {
      __syncthreads();  // the dims before have been read
#pragma unroll
      for (int d = 0; d < kTileDims; ++d) {
        const int32_t at = from + staged_dims + d;
        queries[staged_dims + d][staged_tile] = has_query && at < dim ? query[at] : 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kDims; d += kVec) {
        float x[kVec] = {};
        if (block < furthest) load_dims(key, from + d, dim, x);
#pragma unroll
        for (int e = 0; e < kVec; ++e) keys[d + e][thread] = x[e];
      }
      __syncthreads();
#pragma unroll 8
      for (int d = 0; d < kDims; ++d) {
        const float4 low = *reinterpret_cast<const float4*>(&queries[d][tile_at]);
        const float4 high = *reinterpret_cast<const float4*>(&queries[d][tile_at + 4]);
        const float4 k4 = *reinterpret_cast<const float4*>(&keys[d][block_at]);
        const float a[kTileStep] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float b[kBlockStep] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
        for (int t = 0; t < kTileStep; ++t) {
#pragma unroll
          for (int j = 0; j < kBlockStep; ++j) sum[t][j] = fmaf(a[t], b[j], sum[t][j]);
        }
      }
    }
    const int32_t first = first_block + block_at;
#pragma unroll
    for (int t = 0; t < kTileStep; ++t) {
      const int32_t tile = tile_at + t;
      if (tile < begin || tile >= end) continue;
      if (cap != 0.0f) {
#pragma unroll
        for (int j = 0; j < kBlockStep; ++j) sum[t][j] = capped(sum[t][j], cap);
      }
      float* out = slab.scores + (int64_t{first_tile + tile} * problem.num_q_heads + head) * params.max_blocks + first;
      if (first + kBlockStep <= visible[tile] && reinterpret_cast<uintptr_t>(out) % sizeof(float4) == 0) {
        *reinterpret_cast<float4*>(out) = {sum[t][0], sum[t][1], sum[t][2], sum[t][3]};
      } else {
#pragma unroll
        for (int j = 0; j < kBlockStep; ++j) {
          if (first + j < visible[tile]) out[j] = sum[t][j];
        }
      }
    }
  }
}

// --- host ------------------------------------------------------------------------------------------------------------

template <typename T, int kVec>
void launch_pool(const ScoreParams& params, const Slab& slab, float factor, float* pooled, cudaStream_t stream) {
  const int32_t width = params.problem.num_q_heads * params.problem.head_dim;
  const dim3 grid(slab.row_end - slab.row_begin, (width + kChunk - 1) / kChunk);
  switch (params.pooling) {
    case Pooling::kMean:
      pool_kernel<T, kVec, Pooling::kMean><<<grid, kPoolThreads, 0, stream>>>(params, slab, factor, pooled);
      break;
    case Pooling::kMaxAbs:
      pool_kernel<T, kVec, Pooling::kMaxAbs><<<grid, kPoolThreads, 0, stream>>>(params, slab, factor, pooled);
      break;
    case Pooling::kCenter:
      pool_kernel<T, kVec, Pooling::kCenter><<<grid, kPoolThreads, 0, stream>>>(params, slab, factor, pooled);
      break;
  }
}

template <typename T>
cudaError_t score(const ScoreParams& params, const Slab& slab, float* pooled, cudaStream_t stream) {
  const Scale scale = scale_of(params.problem);
  if (rows_on_16_bytes(params.q, params.problem.num_q_heads, params.problem.head_dim)) {
    launch_pool<T, kWideVec>(params, slab, scale.factor, pooled, stream);
  } else {
    launch_pool<T, 1>(params, slab, scale.factor, pooled, stream);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int32_t rows = slab.row_end - slab.row_begin;
  const dim3 grid((params.max_blocks + kBlocks - 1) / kBlocks, (rows + kTiles - 1) / kTiles,
                  params.problem.num_q_heads);
  if (on_16_bytes(params.summary) && params.problem.head_dim % kWideVec == 0) {
    score_kernel<T, kWideVec><<<grid, kScoreThreads, 0, stream>>>(params, slab, scale.cap, pooled);
  } else {
    score_kernel<T, 1><<<grid, kScoreThreads, 0, stream>>>(params, slab, scale.cap, pooled);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t pooled_scratch_bytes(const ScoreParams& params, int32_t slab_rows) {
  return int64_t{slab_rows} * params.problem.num_q_heads * params.problem.head_dim * sizeof(float);
}

cudaError_t score_pooled(const ScoreParams& params, const Slab& slab, void* scratch, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int32_t rows = slab.row_end - slab.row_begin;
  if (rows <= 0 || params.max_blocks == 0) return cudaSuccess;
  if (problem.num_q_heads > 65535 || rows > 65535 * kTiles || problem.head_dim > 256 ||
      int64_t{problem.num_q_heads} * problem.head_dim > int64_t{65535} * kChunk) {
    return cudaErrorInvalidValue;
  }
  float* pooled = static_cast<float*>(scratch);
  switch (problem.dtype) {
    case DType::kBFloat16:
      return score<__nv_bfloat16>(params, slab, pooled, stream);
    case DType::kFloat16:
      return score<__half>(params, slab, pooled, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace bsfa::cuda::select
