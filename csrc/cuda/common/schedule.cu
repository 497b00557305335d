// Orders the (query tile, head) pairs of a call by the number of KV blocks that each will visit (schedule.h).
//
// count    one CTA per mask row. Finds the row's sequence and tile (by division where all sequences are alike, else by
//          a scan over the sequences' tile counts), writes its TileRow, and counts, one warp per head, the mask's bits
//          within the visible range; without a mask the range itself.
// order    one CTA. Natural order runs through one KV head's rows, last tile first, the group's query heads side by
//          side, before the next KV head's: tiles at work together then read the same keys, from L2. Only tiles so long
//          that they could keep one CTA busy when the others are done (more than 1 / long_share of a CTA's share of all
//          work) leave that order and go first, in logarithmic buckets of their length, longest first. The pairs at
//          its end are sorted likewise, and stay there (sorted_end): by itself it ends with the short tiles of a few
//          heads, which need not be short if a mask keeps more in these.
//          Each warp owns one contiguous piece: count, scan, scatter. Stable, so the same inputs give the same order.
//          Of at most kFewPairs pairs it makes the rows and counts too: a kernel less in the way of a short call.
//          Of these, those that workers begin with (first_pairs) come before all others, unsorted.
// level    where the keys of one KV head outgrow L2: sorts that order by length in windows. CTAs that work on pairs of
//          one length side by side walk the same keys at the same time, from L2. Windows are of two pairs a CTA where
//          each takes its next pair only when its tile is nearly done (taken_late): who is first done with one of the
//          longer half takes the longest of the shorter half, so that after each window all are in step again.
// known    instead of count and order where the order is a formula: one thread per pair writes its entry.
// Memory   the words of the mask once; 4 bytes written and thrice read per pair, 8 bytes written.
// Waits    count and known for the stream; order for count or whatever came before, and attention for order or known,
//          each launched while the one before still runs (programmatic dependent launch). Attention whose workers begin
//          before there is an order is launched when order has waited.
#include <cutlass/fast_math.h>

#include <algorithm>
#include <utility>

#include "alignment.h"
#include "launch.h"
#include "place.h"
#include "scan.h"
#include "schedule.h"
#include "warp.h"

namespace bsfa::cuda {
namespace {

constexpr int kCountThreads = 1024;
constexpr int kOrderThreads = 1024;
constexpr int kOrderWarps = kOrderThreads / 32;
constexpr int kWindow = 1024;  // pairs, at most
// Longest sequence whose keys stay in L2 in any order of tiles: 16 MB of K in 16 bits and head_dim 128, as much of V.
constexpr int32_t kLevelKeys = 1 << 16;
constexpr int kKnownThreads = 256;
constexpr int kFewPairs = 4096;  // that one CTA counts
constexpr int kFewOfThread = kFewPairs / kOrderThreads;
constexpr int kFewRows = kOrderThreads;                // and of how many rows and sequences: one thread each
constexpr int kLengths = (32 - kSubBits) << kSubBits;  // buckets of any count that fits in 31 bits
constexpr int kNatural = kLengths;                     // after those of long tiles, before those of the end
constexpr int kBuckets = 2 * kLengths + 1;

static_assert(kBuckets <= kOrderThreads, "one thread per bucket in the scan");

// 0 for the longest. A tile without blocks costs about as much as one with a block.
__device__ int bucket_of(int32_t count) {
  const int32_t cost = max(count, 1) << kSubBits;
  const int octave = 31 - __clz(cost);
  const int sub = (cost >> (octave - kSubBits)) & ((1 << kSubBits) - 1);
  return kLengths - 1 - (((octave - kSubBits) << kSubBits) | sub);
}

// The row belongs to no sequence: `threads` threads zero what of it nobody else will write.
__device__ void clear_unused(const Tiling& tiling, int64_t row, int thread, int threads) {
  if (tiling.unused_words == nullptr) return;
  for (int32_t i = thread; i < tiling.unused_row_words; i += threads) {
    tiling.unused_words[row * tiling.unused_row_words + i] = 0;
  }
  for (int32_t i = thread; i < tiling.unused_row_counts; i += threads) {
    tiling.unused_counts[row * tiling.unused_row_counts + i] = 0;
  }
}

// Counts of a mask are handed over, so they may be anything: below 0 the tile would be left out, far above overflows
// bucket_of.
__device__ int32_t possible_count(int32_t count, int32_t visible) { return min(max(count, 0), visible); }

__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const __grid_constant__ Tiling tiling, const Workspace workspace) {
  cudaTriggerProgrammaticLaunchCompletion();
  const Problem& problem = tiling.problem;
  const int32_t row = blockIdx.x;
  const int32_t heads = tiling.heads, group = tiling.group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto natural = [&](int32_t head) { return natural_index({row, head}, tiling.num_rows, group); };

  const Place place = find_place<kCountThreads>(problem, row);
  if (place.sequence < 0) {
    for (int32_t head = threadIdx.x; head < heads; head += kCountThreads) workspace.counts[natural(head)] = -1;
    if (threadIdx.x == 0) {
      TileRow none{};
      none.sequence = -1;
      workspace.rows[row] = none;
    }
    clear_unused(tiling, row, threadIdx.x, kCountThreads);
    return;
  }
  const TileRow tile = tile_row(problem, place.sequence, place.tile);
  if (threadIdx.x == 0) workspace.rows[row] = tile;

  const BlockRange range = visible_range(tile, problem.causal, tiling.window_left);
  for (int32_t head = warp; head < heads; head += kCountThreads / 32) {
    const int64_t mask_row = int64_t{row} * tiling.mask_heads + head / (heads / max(tiling.mask_heads, 1));
    int32_t count = max(range.end - range.begin, 0);
    if (tiling.counts != nullptr) {
      count = possible_count(tiling.counts[mask_row], count);
    } else if (tiling.words != nullptr) {
      const int32_t* words = tiling.words + mask_row * tiling.num_words;
      count = 0;
      for (int32_t w = range.begin / 32 + lane; w * 32 < range.end; w += 32) {
        count += __popc(static_cast<uint32_t>(words[w]) & range.bits_of_word(w));
      }
      count = __reduce_add_sync(kAllLanes, count);
    }
    if (lane == 0) workspace.counts[natural(head)] = count;
  }
}

// Natural order, its divisions made cheap: where one CTA orders all pairs, instructions are what it takes.
struct NaturalOrder {
  cutlass::FastDivmod rows, group, heads_per_mask_head;

  explicit NaturalOrder(const Tiling& tiling)
      : rows(std::max(static_cast<int>(tiling.num_rows), 1)),
        group(tiling.group),
        heads_per_mask_head(tiling.mask_heads > 0 ? tiling.heads / tiling.mask_heads : 1) {}

  __device__ Pair pair(int32_t index) const {
    int32_t of_group, head, groups_before, from_last;
    group(of_group, head, index);
    rows(groups_before, from_last, of_group);
    return {rows.divisor - 1 - from_last, groups_before * group.divisor + head};
  }
};

// What count_kernel does, by one CTA, for few pairs whose counts need no look at the mask's words. `each(f)` calls f(i,
// place in `pairs` and `counts`) for the caller's pairs.
template <class Each>
__device__ void count_few(const Tiling& tiling, const NaturalOrder& natural, const Workspace& workspace,
                          const Each& each, Pair* pairs, int32_t* counts, int32_t* scratch) {
  __shared__ int32_t visible[kFewRows];  // blocks of each row; -1: it belongs to no sequence
  __shared__ int32_t ends[kFewRows];
  const auto row = static_cast<int32_t>(threadIdx.x), num_rows = static_cast<int32_t>(tiling.num_rows);
  const Place place = place_among_few<kFewRows>(tiling.problem, row, ends, scratch);
  TileRow tile{};
  tile.sequence = -1;
  if (row < num_rows) {
    visible[row] = -1;
    if (place.sequence >= 0) {
      tile = tile_row(tiling.problem, place.sequence, place.tile);
      const BlockRange range = visible_range(tile, tiling.problem.causal, tiling.window_left);
      visible[row] = max(range.end - range.begin, 0);
    }
  }
  each([&](int32_t i, int j) { pairs[j] = natural.pair(i); });
  cudaGridDependencySynchronize();
  if (tiling.first > 0) cudaTriggerProgrammaticLaunchCompletion();
  if (row < num_rows) workspace.rows[row] = tile;
  if (tiling.counts != nullptr) {
    each([&](int32_t, int j) {
      const int64_t mask_row = int64_t{pairs[j].row} * tiling.mask_heads;
      counts[j] = tiling.counts[mask_row + natural.heads_per_mask_head.div(pairs[j].head)];
    });
  }
  __syncthreads();
  each([&](int32_t i, int j) {
    const int32_t blocks = visible[pairs[j].row];
    counts[j] = tiling.counts == nullptr || blocks < 0 ? blocks : possible_count(counts[j], blocks);
    workspace.counts[i] = counts[j];
  });
  for (int32_t r = threadIdx.x / 32; r < num_rows; r += kOrderWarps) {
    if (visible[r] < 0) clear_unused(tiling, r, threadIdx.x % 32, 32);
  }
}

template <bool kFew>
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(const __grid_constant__ Tiling tiling, const __grid_constant__ NaturalOrder natural,
                 const Workspace workspace, const uint32_t shares) {
  __shared__ int32_t offsets[kOrderWarps][kBuckets];
  __shared__ int32_t scratch[kOrderWarps];
  __shared__ unsigned long long all_work;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t total = static_cast<int32_t>(tiling.num_rows) * tiling.heads;
  const int32_t piece = (total + kOrderThreads - 1) / kOrderThreads * 32;
  const int32_t begin = min(warp * piece, total), end = min(begin + piece, total);
  // Calls f(i, j) for this thread's pairs i; of few the j-th stays in registers. `all_lanes`: i may be past the end.
  const auto each_of = [&](bool all_lanes, const auto& f) {
    if constexpr (kFew) {
#pragma unroll
      for (int j = 0; j < kFewOfThread; ++j) {
        const int32_t first = begin + 32 * j;
        if (first < end && (all_lanes || first + lane < end)) f(first + lane, j);
      }
    } else {
#pragma unroll 4
      for (int32_t first = begin; first < end; first += 32) {
        if (all_lanes || first + lane < end) f(first + lane, 0);
      }
    }
  };
  const auto each = [&](const auto& f) { each_of(false, f); };
  int32_t counts[kFewOfThread]{};  // of few
  Pair pairs[kFewOfThread]{};

  if (tiling.first == 0) cudaTriggerProgrammaticLaunchCompletion();
  for (int i = threadIdx.x; i < kBuckets * kOrderWarps; i += kOrderThreads) (&offsets[0][0])[i] = 0;
  if (threadIdx.x == 0) all_work = 0;
  __syncthreads();
  // Where few tiles lie is known without a look at memory if all sequences are alike; count_few waits later then.
  if (!kFew || !all_alike(tiling.problem)) cudaGridDependencySynchronize();
  if constexpr (kFew) count_few(tiling, natural, workspace, each, pairs, counts, scratch);
  const auto count_at = [&](int32_t i, int j) { return kFew ? counts[j] : workspace.counts[i]; };
  uint64_t work = 0;
  each([&](int32_t i, int j) { work += max(count_at(i, j), 0); });
  for (int d = 16; d > 0; d /= 2) work += __shfl_xor_sync(kAllLanes, work, d);
  if (lane == 0) atomicAdd(&all_work, static_cast<unsigned long long>(work));
  __syncthreads();
  const uint64_t of_all = all_work;
  const int32_t end_of_natural = total - tiling.sorted_end;
  // Lanes with the same bucket find each other; the first of them counts for all.
  const auto bucket_at = [&](int32_t i, int j) {
    const int32_t count = i >= tiling.first && i < end ? count_at(i, j) : -1;
    if (count < 0) return -1;
    if (uint64_t{static_cast<uint32_t>(count)} * shares > of_all) return bucket_of(count);
    return i < end_of_natural ? kNatural : kNatural + 1 + bucket_of(count);
  };
  each_of(true, [&](int32_t i, int j) {
    const int bucket = bucket_at(i, j);
    const unsigned peers = __match_any_sync(kAllLanes, bucket);
    if (bucket >= 0 && lane == __ffs(peers) - 1) offsets[warp][bucket] += __popc(peers);
    __syncwarp();
  });
  __syncthreads();
  int32_t size = 0;
  if (threadIdx.x < kBuckets) {
    for (int w = 0; w < kOrderWarps; ++w) size += offsets[w][threadIdx.x];
  }
  int32_t here = tiling.first + inclusive_sum<kOrderThreads>(size, scratch) - size;
  if (threadIdx.x == kOrderThreads - 1) *workspace.queue = {0, here + size};
  if (threadIdx.x < kBuckets) {
    for (int w = 0; w < kOrderWarps; ++w) {
      const int32_t n = offsets[w][threadIdx.x];
      offsets[w][threadIdx.x] = here;
      here += n;
    }
  }
  __syncthreads();
  each_of(true, [&](int32_t i, int j) {
    const int bucket = bucket_at(i, j);
    const unsigned peers = __match_any_sync(kAllLanes, bucket);
    int32_t at = 0;
    if (bucket >= 0) at = offsets[warp][bucket] + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    if (bucket >= 0) {
      if (lane == __ffs(peers) - 1) offsets[warp][bucket] += __popc(peers);
      workspace.order[at] = kFew ? pairs[j] : natural.pair(i);
    }
    __syncwarp();
  });
}

__global__ void __launch_bounds__(kKnownThreads)
    known_kernel(const __grid_constant__ KnownOrder order, const Workspace workspace) {
  cudaTriggerProgrammaticLaunchCompletion();
  const int64_t index = int64_t{blockIdx.x} * kKnownThreads + threadIdx.x;
  const int32_t num_rows = order.batch * order.tiles;
  const auto i = static_cast<int32_t>(min(index, int64_t{order.total} - 1));
  const Pair pair = order.pair(i);
  const int32_t count = order.count(pair.row % order.tiles);
  cudaGridDependencySynchronize();  // the workspace may be that of the call before
  if (index >= order.total) return;
  if (i == 0) *workspace.queue = {0, order.total};
  if (i < num_rows) workspace.rows[i] = tile_row(order, i);  // there are as many pairs as rows, or more
  workspace.order[i] = pair;
  workspace.counts[natural_index(pair, num_rows, order.group)] = count;
}

// Bitonic sort of one window, longest first; equal ones stay in order.
__global__ void __launch_bounds__(kWindow)
    level_kernel(const Workspace workspace, const int32_t num_rows, const int32_t group, const int window) {
  __shared__ uint64_t keys[kWindow];
  __shared__ Pair pairs[kWindow];
  const int i = threadIdx.x;
  const int32_t begin = blockIdx.x * window;
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  const int32_t size = min(workspace.queue->total - begin, window);
  if (size <= 0) return;
  keys[i] = ~uint64_t{0};  // past all pairs
  if (i < size) {
    const Pair pair = workspace.order[begin + i];
    const auto count = static_cast<uint32_t>(workspace.counts[natural_index(pair, num_rows, group)]);
    keys[i] = uint64_t{0x7fffffffu - count} << 32 | static_cast<uint32_t>(i);
    pairs[i] = pair;
  }
  for (int run = 2; run <= kWindow; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      const int other = i ^ step;
      if (other > i && (keys[i] > keys[other]) == ((i & run) == 0)) {
        const uint64_t key = keys[i];
        keys[i] = keys[other];
        keys[other] = key;
      }
    }
  }
  __syncthreads();
  if (i < size) workspace.order[begin + i] = pairs[static_cast<uint32_t>(keys[i])];
}

// Whether one CTA counts them.
bool are_few(const Tiling& tiling) {
  const bool counts_known = tiling.words == nullptr || tiling.counts != nullptr;
  return counts_known && tiling.num_rows <= kFewRows && tiling.problem.batch <= kFewRows &&
         tiling.num_rows * tiling.heads <= kFewPairs;
}

// Whether the host knows where all rows lie.
bool knows_lengths(const Tiling& tiling) {
  const Problem& problem = tiling.problem;
  if (!all_alike(problem) || problem.block_m != kTileRows || problem.block_n != kBlockKeys ||
      tiling.num_rows * tiling.heads > INT32_MAX) {
    return false;
  }
  // Rows beyond those of the sequences belong to none, which no formula says.
  return int64_t{problem.batch} * sequence_geometry(problem, 0).num_tiles() == tiling.num_rows;
}

}  // namespace

int64_t Workspace::bytes(int64_t num_rows, int64_t num_heads) {
  return aligned(sizeof(Queue)) + aligned(num_rows * sizeof(TileRow)) + aligned(num_rows * num_heads * sizeof(Pair)) +
         aligned(num_rows * num_heads * sizeof(int32_t));
}

Workspace Workspace::in(void* memory, int64_t num_rows, int64_t num_heads) {
  char* at = static_cast<char*>(memory);
  const auto take = [&at](int64_t bytes) { return std::exchange(at, at + aligned(bytes)); };
  Workspace w;
  w.queue = reinterpret_cast<Queue*>(take(sizeof(Queue)));
  w.rows = reinterpret_cast<TileRow*>(take(num_rows * sizeof(TileRow)));
  w.order = reinterpret_cast<Pair*>(take(num_rows * num_heads * sizeof(Pair)));
  w.counts = reinterpret_cast<int32_t*>(take(num_rows * num_heads * sizeof(int32_t)));
  return w;
}

KnownOrder order_of(const Tiling& tiling, int workers) {
  const Problem& problem = tiling.problem;
  if (tiling.words != nullptr || tiling.counts != nullptr || tiling.window_left >= 0 || !knows_lengths(tiling)) {
    return {};
  }
  return known_order(problem, tiling.heads, tiling.group, int64_t{workers} * tiling.long_share);
}

KnownOrder first_pairs(const Tiling& tiling, int workers) {
  const Problem& problem = tiling.problem;
  // What it saves is worth it where there are few, but more than a tile for each worker.
  const bool worth_it = are_few(tiling) && tiling.num_rows * tiling.heads >= 4 * workers;
  if (!worth_it || !knows_lengths(tiling) || keeps_in_step(tiling)) return {};
  KnownOrder order = natural_order(problem, tiling.heads, tiling.group);
  order.total = workers;
  return order;
}

bool keeps_in_step(const Tiling& tiling) {
  return (tiling.words != nullptr || tiling.counts != nullptr) && tiling.problem.kv.max_seqlen > kLevelKeys;
}

cudaError_t make_order(const Tiling& tiling, const Workspace& workspace, int workers, cudaStream_t stream) {
  return make_order(tiling, order_of(tiling, workers), workspace, workers, stream);
}

cudaError_t make_order(const Tiling& tiling, const KnownOrder& known, const Workspace& workspace, int workers,
                       cudaStream_t stream) {
  if (known.total > 0) {
    const auto ctas = static_cast<int>((int64_t{known.total} + kKnownThreads - 1) / kKnownThreads);
    return launch_early(known_kernel, ctas, kKnownThreads, 0, stream, known, workspace);
  }
  const auto rows = static_cast<int32_t>(tiling.num_rows);
  const NaturalOrder natural(tiling);
  const auto shares = static_cast<uint32_t>(workers * tiling.long_share);
  cudaError_t ordered;
  if (are_few(tiling)) {
    ordered = launch_early(order_kernel<true>, 1, kOrderThreads, 0, stream, tiling, natural, workspace, shares);
  } else {
    count_kernel<<<static_cast<unsigned>(rows), kCountThreads, 0, stream>>>(tiling, workspace);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    ordered = launch_early(order_kernel<false>, 1, kOrderThreads, 0, stream, tiling, natural, workspace, shares);
  }
  if (ordered != cudaSuccess || !keeps_in_step(tiling)) return ordered;
  const int window = tiling.taken_late ? std::min(2 * workers, kWindow) : kWindow;
  const int windows = static_cast<int>((tiling.num_rows * tiling.heads + window - 1) / window);
  return launch_early(level_kernel, windows, kWindow, 0, stream, workspace, rows, tiling.group, window);
}

cudaError_t num_sms(int* count) {
  static PerDevice known;
  return known.get(count, [](int device, int* found) {
    return cudaDeviceGetAttribute(found, cudaDevAttrMultiProcessorCount, device);
  });
}

}  // namespace bsfa::cuda
