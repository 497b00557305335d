// Attention of the last R = min(block_m, seqlen_q) query rows of each sequence, its probe, summed over the rows:
//
//   t = log2(e) * cap(scale * q_r . k_j);  p[r, j] = 2^(t - lse_r);  position of row r: P + r, P = seqlen_k - R
//   vertical[j] = sum over r of p[r, j] / R;  slash[d] = sum over r of p[r, P + r - d] / R (causal)
//
// maxima    grid (query head, span of kSpan keys, sequence): maximum and sum of every row over the span.
// join      grid (query head, sequence): the LSE of every row, from all its spans in order.
// spread    grid as maxima: the scores again, now as probabilities. A CTA owns its keys of `vertical` and, of `slash`,
//           the distances from row 0 to its keys: P - first key - (0 .. kSpan - 1). Its other rows reach up to 127
//           above them, which are the span's before: those sums go to `tails`.
// finish    grid as maxima: adds the tails, writes zeros past the end.
//
// Warps     each of the 4 has 32 rows, as two 16-row fragments in registers, and goes through the keys in order.
//           Lane (g, c), g = lane / 4, holds rows 8 i + g (i < 4) and, per step of 8 keys, columns 2 c and 2 c + 1.
// Diagonals e = row - key. Over i and the step n, elements of one lane share a diagonal where i - n is the same: sums
//           move from i to i + 1 with each step, and leave at i = 3. Of the 8 x 8 sums that leave at a step, those with
//           g < column lie on the diagonals of the step before, 8 below: kept for one step, they make whole cyclic
//           diagonals, which three shuffles add up. Every diagonal of a warp so gets one value: no atomics.
// Memory    K twice from global memory (heads of a group run side by side, so that L2 serves them), two tiles of 64
//           keys in shared memory by cp.async; tokens past the end are zeros and are masked, never read.
// Waits     each kernel for the one before it. All sums run in a fixed order: same inputs, same bits.
#include <algorithm>
#include <utility>

#include "../common/alignment.h"
#include "../common/launch.h"
#include "../common/mbarrier.h"
#include "bsfa/cuda.h"
#include "bsfa/geometry.h"
#include "probe.h"

namespace bsfa::cuda {
namespace {

using namespace probe;

constexpr int kJoinGroups = 4;

struct Workspace {
  float2* statistics = nullptr;  // [B, Hq, spans, kRows]: maximum and sum, base 2
  float* lse = nullptr;          // [B, Hq, kRows]; +inf where nothing is seen
  float* tails = nullptr;        // [B, Hq, spans, kTailStride]
};

struct KernelParams {
  ProbeParams probe;
  Workspace workspace;
  int32_t spans = 0;  // of the longest sequence
  float factor = 1.0f;
  float cap = 0.0f;  // 0: off; then factor includes log2(e)
};

// One sequence's probe.
struct Place {
  int32_t rows;      // R
  int32_t seqlen_k;  // 0 if there are no rows: nothing is to be done
  int32_t position;  // P, of row 0; may be negative
  int32_t first_query;

  __device__ Place(const Problem& problem, int32_t sequence) {
    const int32_t queries = seqlen_q(problem.query, sequence);
    rows = min(queries, min(problem.block_m, kRows));
    seqlen_k = rows > 0 ? max(min(bsfa::seqlen_k(problem.kv, sequence), problem.kv.max_seqlen), 0) : 0;
    position = seqlen_k - rows;
    first_query = queries - rows;
  }
};

// Where the keys of one sequence and head lie.
template <typename T>
class Keys {
 public:
  __device__ Keys(const ProbeParams& params, int32_t sequence, int32_t head)
      : kv_(params.problem.kv), token_stride_(params.k.token_stride), page_stride_(params.k.batch_stride) {
    data_ = static_cast<const T*>(params.k.data) + head * params.k.head_stride;
    if (kv_.block_table != nullptr) {
      table_ = kv_.block_table + sequence * kv_.block_table_stride;
    } else if (kv_.cu_seqlens != nullptr) {
      data_ += kv_.cu_seqlens[sequence] * token_stride_;
    } else {
      data_ += sequence * page_stride_;
    }
  }

  __device__ const T* row(int32_t token) const {
    if (kv_.block_table == nullptr) return data_ + token * token_stride_;
    const uint32_t page = static_cast<uint32_t>(token) / static_cast<uint32_t>(kv_.page_size);
    const uint32_t slot = token - page * kv_.page_size;
    return data_ + table_[page] * page_stride_ + slot * token_stride_;
  }
  __device__ const T* anywhere() const { return data_; }  // for copies that read nothing

 private:
  const KvLayout& kv_;
  const T* data_;
  const int32_t* table_ = nullptr;
  int64_t token_stride_, page_stride_;
};

// What a CTA needs to make the scores of its rows, and does with every span.
template <typename T, int kHeadDim>
struct Scores {
  static constexpr int kPieces = kHeadDim / 8;      // 16-byte pieces of a row
  static constexpr int kRowsAtOnce = 32 / kPieces;  // that one warp copies with one instruction
  static constexpr int kWarpKeys = kTileKeys / kWarps;
  static constexpr int kDepth = kHeadDim / 16;

  const KernelParams& params;
  const Place& place;
  Shared<kHeadDim>& shared;
  Keys<T> keys;
  int32_t first_key, end_key;
  uint32_t queries[kFragments][kDepth][4];
  int32_t limit[kFragments * 2];  // last key that each of the lane's rows sees; negative: none
  int32_t least_limit;            // of all rows of the warp

  __device__ Scores(const KernelParams& params, const Place& place, Shared<kHeadDim>& shared, int32_t sequence,
                    int32_t head, int32_t span)
      : params(params),
        place(place),
        shared(shared),
        keys(params.probe, sequence, head / (params.probe.problem.num_q_heads / params.probe.problem.num_kv_heads)),
        first_key(span * kSpan),
        end_key(min(first_key + kSpan, place.seqlen_k)) {
    load_queries(sequence, head);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kFragments * 2; ++i) {
      limit[i] = limit_of(warp * kWarpRows + 8 * i + lane / 4);
    }
    least_limit = __reduce_min_sync(kAllLanes, limit_of(warp * kWarpRows + lane));
  }

  __device__ int32_t limit_of(int row) const {
    if (row >= place.rows) return -1;
    return params.probe.problem.causal ? place.position + row : place.seqlen_k - 1;
  }

  __device__ int tiles() const { return (end_key - first_key + kTileKeys - 1) / kTileKeys; }

  __device__ void load_queries(int32_t sequence, int32_t head) {
    const QueryLayout& layout = params.probe.problem.query;
    const TensorView& q = params.probe.q;
    const T* data = static_cast<const T*>(q.data) + head * q.head_stride;
    int64_t token = place.first_query;
    if (layout.cu_seqlens != nullptr) {
      token += layout.cu_seqlens[sequence];
    } else {
      data += sequence * q.batch_stride;
    }
    const uint32_t base = shared_address(shared.keys);
    for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool valid = row < place.rows;
      const T* source = valid ? data + (token + row) * q.token_stride + piece * 8 : data;
      copy_16(base + probe::place<kHeadDim>(row, piece), source, valid);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int row = warp * kWarpRows + f * 16 + lane % 16;
        load_matrices(queries[f][d], base + probe::place<kHeadDim>(row, 2 * d + lane / 16));
      }
    }
    __syncthreads();  // keys will lie there
  }

  // The row of one key per lane: of key `lane` of those that this warp copies of a tile. Read one tile ahead.
  __device__ const T* find(int tile) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t key = first_key + tile * kTileKeys + warp * kWarpKeys + lane;
    return lane < kWarpKeys && key < end_key ? keys.row(key) : nullptr;
  }

  __device__ void copy(int tile, const T* row_of_lane) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t base = shared_address(shared.keys[tile % kStages]);
#pragma unroll
    for (int i = 0; i < kWarpKeys / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane / kPieces, piece = lane % kPieces;
      const auto bits = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row_of_lane), row);
      const T* source = reinterpret_cast<const T*>(bits);
      const bool valid = source != nullptr;
      copy_16(base + probe::place<kHeadDim>(warp * kWarpKeys + row, piece),
              valid ? source + piece * 8 : keys.anywhere(), valid);
    }
    commit_copies();
  }

  // Base-2 logits of kGroupKeys keys from `column` of the tile: t[i][n][j] of row 8 i + g, key 8 n + 2 c + j.
  __device__ void make(int tile, int column, float (&t)[kFragments * 2][kGroupKeys / 8][2]) const {
    const int lane = threadIdx.x % 32;
    const uint32_t base = shared_address(shared.keys[tile % kStages]);
#pragma unroll
    for (int n = 0; n < kGroupKeys / 8; ++n) {
      float sum[kFragments][4] = {};
#pragma unroll
      for (int d = 0; d < kDepth; d += 2) {  // four pieces: the keys of two steps of 16 dimensions
        uint32_t b[4];
        load_matrices(b, base + probe::place<kHeadDim>(column + 8 * n + lane % 8, 2 * d + lane / 8));
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          multiply(sum[f], queries[f][d], b[0], b[1], T{});
          multiply(sum[f], queries[f][d + 1], b[2], b[3], T{});
        }
      }
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int x = 0; x < 4; ++x) t[2 * f + x / 2][n][x % 2] = sum[f][x] * params.factor;
      }
    }
    if (params.cap != 0.0f) {
#pragma unroll
      for (int i = 0; i < kFragments * 2; ++i) {
#pragma unroll
        for (int n = 0; n < kGroupKeys / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) t[i][n][j] = capped(t[i][n][j], params.cap);
        }
      }
    }
    const int32_t key = first_key + tile * kTileKeys + column;
    if (key + kGroupKeys - 1 <= least_limit) return;
    const int32_t mine = key + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kFragments * 2; ++i) {
#pragma unroll
      for (int n = 0; n < kGroupKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (mine + 8 * n + j > limit[i]) t[i][n][j] = -INFINITY;
        }
      }
    }
  }

  // Calls use(first column within the span, t) for all groups of keys of the span, in order.
  template <typename Use>
  __device__ void for_each_group(Use use) {
    const int count = tiles();
    copy(0, find(0));
    const T* ahead = find(1);
    for (int tile = 0; tile < count; ++tile) {
      if (tile + 1 < count) {
        copy(tile + 1, ahead);
        ahead = find(tile + 2);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
#pragma unroll 1
      for (int column = 0; column < kTileKeys; column += kGroupKeys) {
        float t[kFragments * 2][kGroupKeys / 8][2];
        make(tile, column, t);
        use(tile * kTileKeys + column, t);
      }
      __syncthreads();
    }
  }
};

// t - base for a base of a row that has seen nothing: -inf, not NaN.
__device__ __forceinline__ float finite_base(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kMinCtasPerSm) maxima_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(128) char memory[];
  const int32_t head = blockIdx.x, span = blockIdx.y, sequence = blockIdx.z;
  const Place place(params.probe.problem, sequence);
  if (int64_t{span} * kSpan >= place.seqlen_k) return;
  Scores<T, kHeadDim> scores(params, place, *reinterpret_cast<Shared<kHeadDim>*>(memory), sequence, head, span);
  float maximum[kFragments * 2], sum[kFragments * 2];
#pragma unroll
  for (int i = 0; i < kFragments * 2; ++i) maximum[i] = -INFINITY, sum[i] = 0.0f;
  scores.for_each_group([&](int, const auto& t) {
#pragma unroll
    for (int i = 0; i < kFragments * 2; ++i) {
      float top = maximum[i];
#pragma unroll
      for (int n = 0; n < kGroupKeys / 8; ++n) top = fmaxf(top, fmaxf(t[i][n][0], t[i][n][1]));
      const float base = finite_base(top);
      sum[i] *= exp2f(maximum[i] - base);
#pragma unroll
      for (int n = 0; n < kGroupKeys / 8; ++n) sum[i] += exp2f(t[i][n][0] - base) + exp2f(t[i][n][1] - base);
      maximum[i] = top;
    }
  });
  // The four lanes of a row.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = ((int64_t{sequence} * gridDim.x + head) * params.spans + span) * kRows;
#pragma unroll
  for (int i = 0; i < kFragments * 2; ++i) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float other_maximum = __shfl_xor_sync(kAllLanes, maximum[i], step);
      const float other_sum = __shfl_xor_sync(kAllLanes, sum[i], step);
      const float top = fmaxf(maximum[i], other_maximum);
      const float base = finite_base(top);
      sum[i] = sum[i] * exp2f(maximum[i] - base) + other_sum * exp2f(other_maximum - base);
      maximum[i] = top;
    }
    if (lane % 4 == 0) {
      params.workspace.statistics[at + warp * kWarpRows + 8 * i + lane / 4] = make_float2(maximum[i], sum[i]);
    }
  }
}

__device__ __forceinline__ float2 join(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  const float base = finite_base(top);
  return make_float2(top, a.y * exp2f(a.x - base) + b.y * exp2f(b.x - base));
}

__global__ void __launch_bounds__(kRows* kJoinGroups) join_kernel(const __grid_constant__ KernelParams params) {
  __shared__ float2 parts[kJoinGroups][kRows];
  const int32_t head = blockIdx.x, sequence = blockIdx.y;
  const Place place(params.probe.problem, sequence);
  const int32_t spans = (place.seqlen_k + kSpan - 1) / kSpan;
  const int row = threadIdx.x % kRows, group = threadIdx.x / kRows;
  const int64_t of_head = int64_t{sequence} * gridDim.x + head;
  const float2* statistics = params.workspace.statistics + of_head * params.spans * kRows + row;
  float2 total = make_float2(-INFINITY, 0.0f);
#pragma unroll 4
  for (int32_t s = group; s < spans; s += kJoinGroups) total = join(total, statistics[int64_t{s} * kRows]);
  parts[group][row] = total;
  __syncthreads();
  if (group > 0) return;
#pragma unroll
  for (int g = 1; g < kJoinGroups; ++g) total = join(total, parts[g][row]);
  params.workspace.lse[of_head * kRows + row] = total.y == 0.0f ? INFINITY : total.x + log2f(total.y);
}

// Sums along the diagonals of one warp's rows, 8 keys after 8 keys; see the head of the file.
class Diagonals {
 public:
  __device__ explicit Diagonals(float* slots) : slots_(slots) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    below_[0] = g < 2 * c;
    below_[1] = g < 2 * c + 1;
    next_row_ = (g + 1) % 8 * 4 + c;
    next_pair_ = (g + 2) % 8 * 4 + (c + 1) % 4;
    next_half_ = (g + 4) % 8 * 4 + (c + 2) % 4;
  }

  // Key step `n` (of 8 keys), with p[i][j] of row 8 i + g, column 2 c + j. The diagonals 24 - 8 n + g are complete.
  __device__ void step(int n, const float (&p)[4][2]) {
    float sum[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float leaving = carried_[j][2] + p[3][j];
      carried_[j][2] = carried_[j][1] + p[2][j];
      carried_[j][1] = carried_[j][0] + p[1][j];
      carried_[j][0] = p[0][j];
      sum[j] = below_[j] ? held_[j] : leaving;
      held_[j] = leaving;
    }
    float total = sum[0] + __shfl_sync(kAllLanes, sum[1], next_row_);
    total += __shfl_sync(kAllLanes, total, next_pair_);
    total += __shfl_sync(kAllLanes, total, next_half_);
    const int lane = threadIdx.x % 32;
    if (lane % 4 == 0) slots_[kSpan + 24 - 8 * n + lane / 4] = total;
  }

  // After the last of `steps` steps: what is still held. Diagonals from -8 * steps on are then written.
  __device__ void flush(int steps) {
    const float nothing[4][2] = {};
    for (int n = steps; n < steps + 4; ++n) step(n, nothing);
  }

 private:
  float* slots_;
  float carried_[2][3] = {};  // sums of rows 0 .. i, on their way to i + 1
  float held_[2] = {};
  bool below_[2];
  int next_row_, next_pair_, next_half_;
};

static_assert(kFragments * 2 == 4, "Diagonals has four rows per lane");

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kMinCtasPerSm) spread_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(memory);
  const int32_t head = blockIdx.x, span = blockIdx.y, sequence = blockIdx.z;
  const Place place(params.probe.problem, sequence);
  if (int64_t{span} * kSpan >= place.seqlen_k) return;
  const bool causal = params.probe.problem.causal;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t of_head = int64_t{sequence} * gridDim.x + head;
  Scores<T, kHeadDim> scores(params, place, shared, sequence, head, span);
  float lse[kFragments * 2];
#pragma unroll
  for (int i = 0; i < kFragments * 2; ++i) {
    lse[i] = params.workspace.lse[of_head * kRows + warp * kWarpRows + 8 * i + lane / 4];
  }
  Diagonals diagonals(shared.slash[warp]);
  scores.for_each_group([&](int column, const auto& t) {
#pragma unroll
    for (int n = 0; n < kGroupKeys / 8; ++n) {
      float p[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) p[i][j] = exp2f(t[i][n][j] - lse[i]);
      }
      // Column sums: lanes of even g go on with column 2 c, those of odd g with 2 c + 1.
      const float even = (p[0][0] + p[1][0]) + (p[2][0] + p[3][0]);
      const float odd = (p[0][1] + p[1][1]) + (p[2][1] + p[3][1]);
      const bool take_odd = lane & 4;
      float sum = (take_odd ? odd : even) + __shfl_xor_sync(kAllLanes, take_odd ? even : odd, 4);
      sum += __shfl_xor_sync(kAllLanes, sum, 8);
      sum += __shfl_xor_sync(kAllLanes, sum, 16);
      if (lane < 8) shared.vertical[warp][column + 8 * n + 2 * (lane % 4) + lane / 4] = sum;
      if (causal) diagonals.step(column / 8 + n, p);
    }
  });
  const int steps = scores.tiles() * (kTileKeys / 8);
  if (causal) diagonals.flush(steps);
  __syncthreads();

  const float inverse = 1.0f / static_cast<float>(place.rows);
  const int64_t first = of_head * params.probe.problem.kv.max_seqlen;
  float* vertical = params.probe.vertical + first + scores.first_key;
  for (int k = threadIdx.x; k < scores.end_key - scores.first_key; k += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.vertical[w][k];
    vertical[k] = sum * inverse;
  }
  if (!causal) return;
  // Diagonal e of the CTA's rows is the distance P - first_key + e, and diagonal e - 32 w of warp w.
  float* tails = params.workspace.tails + (of_head * params.spans + span) * kTailStride;
  for (int e = kRows - 1 - static_cast<int>(threadIdx.x); e > -kSpan; e -= kThreads) {
    const int32_t distance = place.position - scores.first_key + e;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int slot = e - w * kWarpRows;
      if (slot < kWarpRows && slot >= -8 * steps) sum += shared.slash[w][slot + kSpan];
    }
    if (e > 0) {
      tails[e] = sum * inverse;
    } else if (distance >= 0) {
      params.probe.slash[first + distance] = sum * inverse;
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ KernelParams params) {
  const int32_t head = blockIdx.x, span = blockIdx.y, sequence = blockIdx.z;
  const Problem& problem = params.probe.problem;
  const Place place(problem, sequence);
  const int64_t of_head = int64_t{sequence} * gridDim.x + head;
  const int64_t first = of_head * problem.kv.max_seqlen;
  const int64_t begin = int64_t{span} * kSpan;
  const int64_t end = min(begin + kSpan, int64_t{problem.kv.max_seqlen});
  const int32_t slashes = problem.causal ? place.seqlen_k : 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    if (i >= place.seqlen_k) params.probe.vertical[first + i] = 0.0f;
    if (i >= slashes) params.probe.slash[first + i] = 0.0f;
  }
  if (begin >= slashes || threadIdx.x == 0) return;  // there is no tail 0
  // The distances above those of the first span have no other owner.
  const int64_t distance = place.position - begin + threadIdx.x;
  if (distance < 0 || distance >= slashes) return;
  const float tail = params.workspace.tails[(of_head * params.spans + span) * kTailStride + threadIdx.x];
  float* target = params.probe.slash + first + distance;
  *target = span == 0 ? tail : *target + tail;
}

static_assert(kThreads == kRows, "finish has one thread per tail");

int64_t spans_of(const Problem& problem) { return (int64_t{problem.kv.max_seqlen} + kSpan - 1) / kSpan; }

Workspace workspace_in(const Problem& problem, void* memory, int64_t* bytes) {
  const int64_t heads = int64_t{problem.batch} * problem.num_q_heads, spans = spans_of(problem);
  char* at = static_cast<char*>(memory);
  const auto take = [&at](int64_t size) { return std::exchange(at, at + aligned(size)); };
  Workspace w;
  w.statistics = reinterpret_cast<float2*>(take(heads * spans * kRows * static_cast<int64_t>(sizeof(float2))));
  w.lse = reinterpret_cast<float*>(take(heads * kRows * static_cast<int64_t>(sizeof(float))));
  w.tails = reinterpret_cast<float*>(take(heads * spans * kTailStride * static_cast<int64_t>(sizeof(float))));
  *bytes = at - static_cast<char*>(memory);
  return w;
}

template <typename T, int kHeadDim>
cudaError_t launch(const KernelParams& params, cudaStream_t stream) {
  const Problem& problem = params.probe.problem;
  const dim3 grid(problem.num_q_heads, params.spans, problem.batch);
  constexpr int kKeyBytes = sizeof(Shared<kHeadDim>::keys), kAllBytes = sizeof(Shared<kHeadDim>);
  static_assert(kAllBytes * kMinCtasPerSm <= kMostSharedBytes - kMinCtasPerSm * 1024, "shared memory of an SM");
  static DevicesDone allowed;
  cudaError_t error = allow_shared_memory(allowed, spread_kernel<T, kHeadDim>, kAllBytes);
  if (error != cudaSuccess) return error;
  maxima_kernel<T, kHeadDim><<<grid, kThreads, kKeyBytes, stream>>>(params);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  join_kernel<<<dim3(problem.num_q_heads, problem.batch), kRows * kJoinGroups, 0, stream>>>(params);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  spread_kernel<T, kHeadDim><<<grid, kThreads, kAllBytes, stream>>>(params);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  finish_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const KernelParams& params, cudaStream_t stream) {
  return params.probe.problem.head_dim == 64 ? launch<T, 64>(params, stream) : launch<T, 128>(params, stream);
}

}  // namespace

bool probe_attention_supports(const ProbeParams& params) {
  const Problem& p = params.problem;
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && (p.head_dim == 64 || p.head_dim == 128) &&
         p.block_m <= kRows && p.batch <= 65535 && spans_of(p) <= 65535 &&
         rows_on_16_bytes(params.q, p.num_q_heads, p.head_dim) &&
         rows_on_16_bytes(params.k, p.num_kv_heads, p.head_dim);
}

int64_t probe_attention_workspace_bytes(const ProbeParams& params) {
  int64_t bytes = 0;
  workspace_in(params.problem, nullptr, &bytes);
  return bytes;
}

cudaError_t probe_attention(const ProbeParams& params, void* workspace, cudaStream_t stream) {
  const Problem& problem = params.problem;
  if (!probe_attention_supports(params)) return cudaErrorInvalidValue;
  if (problem.batch == 0 || problem.num_q_heads == 0 || problem.kv.max_seqlen == 0) return cudaSuccess;
  KernelParams k;
  k.probe = params;
  int64_t bytes = 0;
  k.workspace = workspace_in(problem, workspace, &bytes);
  k.spans = static_cast<int32_t>(spans_of(problem));
  const bool capped = problem.softcap != 0.0f;
  k.factor = capped ? problem.softmax_scale / problem.softcap : problem.softmax_scale * kLog2e;
  k.cap = capped ? problem.softcap * kLog2e : 0.0f;
  return problem.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(k, stream) : launch<__half>(k, stream);
}

}  // namespace bsfa::cuda
