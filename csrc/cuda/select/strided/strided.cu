// Scores by kFlat64 and kAntidiagonal: from ScoreParams and a slab of mask rows to the kernel.
//
// segments   one CTA: finds the runs of mask rows whose query groups make one output tile, and puts them in order,
//            longest first (a counting sort by key tiles; the order within a length is left to chance and does not show
//            in the results)
// strided    kernel.h
// Memory     scratch: the queue, one Segment per mask row of the slab and, for the antidiagonal rule, per CTA one float
//            for each of its 128 query groups and each block.
#include <algorithm>
#include <numeric>

#include "../../common/alignment.h"
#include "../../common/scalar.h"
#include "../score.h"
#include "config.h"
#include "launch.h"

namespace bsfa::cuda::select {
namespace {

using strided::KernelParams;
using strided::kKeyGroups;
using strided::kQueryGroups;
using strided::Queue;
using strided::Segment;

constexpr int kSegmentThreads = 1024;

struct SegmentParams {
  const TileRow* rows;
  int32_t row_begin, row_end;
  int32_t stride;
  int32_t max_blocks;
  bool causal;
  bool flat;
  Queue* queue;
  Segment* segments;
};

// Whether a segment begins at this row: the first of its sequence in the slab, or of `stride` tiles.
__device__ bool begins(const SegmentParams& p, int32_t row) {
  const int32_t sequence = p.rows[row].sequence;
  if (sequence < 0) return false;
  if (row == p.row_begin || p.rows[row - 1].sequence != sequence) return true;
  return (p.rows[row].position / kTileRows & (p.stride - 1)) == 0;
}

__device__ Segment segment_at(const SegmentParams& p, int32_t row) {
  const TileRow first = p.rows[row];
  const int32_t tile = first.position / kTileRows;  // exact, also if negative
  const int32_t most = min(p.stride - (tile & (p.stride - 1)), p.row_end - row);
  int32_t tiles = 1;
  while (tiles < most && p.rows[row + tiles].sequence == first.sequence) ++tiles;
  const TileRow last = p.rows[row + tiles - 1];

  Segment s;
  s.row = row - p.row_begin;
  s.tiles = tiles;
  s.query_token = first.query_token;
  s.query_batch = first.query_batch;
  s.query_begin = first.row_begin;
  s.query_end = (tiles - 1) * kTileRows + last.row_end;
  s.first_group = tile * (kTileRows / p.stride);
  s.sequence = first.sequence;
  s.key_token = first.key_token;
  s.seqlen_k = first.seqlen_k;
  // The last key that counts: of the sequence, or, causal, what the last row sees; the flat rule's logits are of whole
  // blocks.
  int32_t keys = min(first.seqlen_k, p.max_blocks * kBlockKeys);
  if (p.causal) {
    const int32_t seen = first.position + s.query_end;  // <= 0: nothing
    const int32_t end = p.flat ? ceil_div(max(seen, 0), kBlockKeys) * kBlockKeys : seen;
    keys = min(keys, end);
  }
  s.key_groups = ceil_div(max(keys, 0), p.stride);
  s.key_tiles = ceil_div(s.key_groups, kKeyGroups);
  return s;
}

__global__ void __launch_bounds__(kSegmentThreads) segment_kernel(const SegmentParams p) {
  // Bucket 0 is for the longest. Segments that see nothing are in none: they have no scores.
  constexpr int kBuckets = kSegmentThreads;
  __shared__ int32_t ends[kBuckets];
  const int thread = threadIdx.x;
  const auto bucket_of = [](const Segment& s) { return kBuckets - min(s.key_tiles, kBuckets); };
  ends[thread] = 0;
  __syncthreads();
  for (int32_t row = p.row_begin + thread; row < p.row_end; row += kSegmentThreads) {
    if (!begins(p, row)) continue;
    const Segment s = segment_at(p, row);
    if (s.key_tiles > 0) atomicAdd(&ends[bucket_of(s)], 1);
  }
  __syncthreads();
  const int32_t size = ends[thread];
  for (int d = 1; d < kBuckets; d *= 2) {
    const int32_t before = thread >= d ? ends[thread - d] : 0;
    __syncthreads();
    ends[thread] += before;
    __syncthreads();
  }
  if (thread == kBuckets - 1) *p.queue = {0, ends[thread]};
  ends[thread] -= size;  // each bucket's own thread alone touches its entry: from here on it is where the next one goes
  __syncthreads();
  for (int32_t row = p.row_begin + thread; row < p.row_end; row += kSegmentThreads) {
    if (!begins(p, row)) continue;
    const Segment s = segment_at(p, row);
    if (s.key_tiles > 0) p.segments[atomicAdd(&ends[bucket_of(s)], 1)] = s;
  }
}

bool is_flat(const ScoreParams& params) { return params.rule == ScoreRule::kFlat64; }

int32_t stride_of(const ScoreParams& params) { return is_flat(params) ? strided::kFlatStride : params.stride; }

int shift_of(int32_t stride) {
  int shift = 0;
  while (1 << shift < stride) ++shift;
  return shift;
}

// float4s of a CTA's stash: a key tile has 2 * stride blocks.
int64_t stash_size(const ScoreParams& params) {
  if (is_flat(params)) return 0;
  const int32_t stride = stride_of(params);
  return int64_t{ceil_div(params.max_blocks, 2 * stride)} * (stride / 4) * strided::kConsumerThreads;
}

bool supports(const ScoreParams& params) {
  const Problem& p = params.problem;
  const int32_t stride = stride_of(params);
  return (params.rule == ScoreRule::kFlat64 || params.rule == ScoreRule::kAntidiagonal) &&
         (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && p.head_dim > 0 &&
         p.head_dim % kBoxColumns == 0 && p.block_m == kTileRows && p.block_n == kBlockKeys &&
         stride >= strided::kMinStride && stride <= strided::kMaxStride && (stride & (stride - 1)) == 0;
}

// Products to base-2 logits.
void set_scale(const ScoreParams& params, KernelParams& k) {
  const Problem& p = params.problem;
  const float factor = p.softmax_scale / static_cast<float>(stride_of(params));
  const bool capped = p.softcap > 0.0f;
  k.scale = capped ? 2.0f * kLog2e * (factor / p.softcap) : kLog2e * factor;
  k.cap_log2 = capped ? p.softcap * kLog2e : 0.0f;
}

void set_keys(const ScoreParams& params, KernelParams& k) {
  const KvLayout& kv = params.problem.kv;
  k.k = static_cast<const uint16_t*>(params.k.data);
  k.k_batch_stride = params.k.batch_stride;
  k.k_token_stride = params.k.token_stride;
  k.k_head_stride = params.k.head_stride;
  k.block_table = kv.block_table;
  k.block_table_stride = kv.block_table_stride;
  k.page_size = cutlass::FastDivmod(std::max(kv.page_size, 1));
  k.groups_cross_pages = kv.block_table != nullptr && kv.page_size % k.stride != 0;
  k.keys_packed = kv.cu_seqlens != nullptr;
}

// TMA where it can read whole tiles; without it everything is copied by the threads.
cudaError_t make_maps(const ScoreParams& params, KernelParams& k) {
  const Problem& p = params.problem;
  const auto extent = [&](const TensorView& view, int32_t heads) {
    return TensorExtent{p.head_dim, view.tokens, heads, view.batch_size};
  };
  const auto usable = [](const TensorView& view, const TensorExtent& e, int64_t least) {
    return e.tokens >= least && e.batch > 0 && tensor_map_fits(view, e);
  };
  const TensorExtent q = extent(params.q, p.num_q_heads), key = extent(params.k, p.num_kv_heads);
  const int64_t stride = k.stride;
  cudaError_t error = cudaSuccess;
  k.q_by_tma = usable(params.q, q, kQueryGroups * stride);
  k.q_groups = static_cast<int32_t>(q.tokens / stride);
  if (k.q_by_tma) error = make_group_map(&k.q_map, params.q, q, p.dtype, k.stride, kQueryGroups);
  // In pages: boxes of what lies in one, at least the 8 rows after which the swizzle repeats.
  k.box_rows = kKeyGroups;
  if (k.block_table != nullptr) {
    k.box_rows = k.groups_cross_pages ? 0 : std::gcd(static_cast<int32_t>(key.tokens / stride), kKeyGroups);
  }
  k.k_by_tma = k.box_rows >= 8 && usable(params.k, key, k.box_rows * stride);
  k.k_groups = static_cast<int32_t>(key.tokens / stride);
  if (error == cudaSuccess && k.k_by_tma) {
    error = make_group_map(&k.k_map, params.k, key, p.dtype, k.stride, k.box_rows);
  }
  return error;
}

}  // namespace

int64_t strided_scratch_bytes(const ScoreParams& params, int32_t slab_rows, int num_sms) {
  return aligned(sizeof(Queue)) + aligned(slab_rows * int64_t{sizeof(Segment)}) +
         num_sms * stash_size(params) * int64_t{sizeof(float4)};
}

cudaError_t score_strided(const ScoreParams& params, const Slab& slab, void* scratch, int num_sms,
                          cudaStream_t stream) {
  const Problem& p = params.problem;
  const int32_t rows = slab.row_end - slab.row_begin;
  if (!supports(params)) return cudaErrorInvalidValue;
  if (rows <= 0 || p.num_q_heads == 0 || params.max_blocks == 0) return cudaSuccess;
  if (int64_t{rows} * p.num_q_heads > INT32_MAX) return cudaErrorInvalidValue;
  const bool flat = is_flat(params);

  KernelParams k{};
  char* at = static_cast<char*>(scratch);
  k.queue = reinterpret_cast<Queue*>(at);
  at += aligned(sizeof(Queue));
  const auto segments = reinterpret_cast<Segment*>(at);
  k.segments = segments;
  at += aligned(rows * int64_t{sizeof(Segment)});
  k.stash = reinterpret_cast<float4*>(at);
  k.stash_stride = stash_size(params);
  k.stride = stride_of(params);
  k.stride_shift = shift_of(k.stride);
  k.halves = p.head_dim / kBoxColumns;
  k.causal = p.causal;
  k.num_heads = p.num_q_heads;
  k.heads_per_kv_head = p.num_q_heads / p.num_kv_heads;
  k.q = static_cast<const uint16_t*>(params.q.data);
  k.q_batch_stride = params.q.batch_stride;
  k.q_token_stride = params.q.token_stride;
  k.q_head_stride = params.q.head_stride;
  k.scores = slab.scores;
  k.max_blocks = params.max_blocks;
  set_scale(params, k);
  set_keys(params, k);
  cudaError_t error = make_maps(params, k);
  if (error != cudaSuccess) return error;

  const SegmentParams s{slab.rows, slab.row_begin, slab.row_end, k.stride, params.max_blocks,
                        p.causal,  flat,           k.queue,      segments};
  segment_kernel<<<1, kSegmentThreads, 0, stream>>>(s);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int ctas = std::min(num_sms, rows * p.num_q_heads);
  return p.dtype == DType::kBFloat16 ? strided::launch_bf16(k, flat, ctas, stream)
                                     : strided::launch_fp16(k, flat, ctas, stream);
}

}  // namespace bsfa::cuda::select
