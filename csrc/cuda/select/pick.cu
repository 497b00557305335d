// Masks from scores, for the rules whose threshold is a share of the row's weight (ScoreRule from kPooled on).
//
// weight    kPooled, kFlat64: 2^(score - largest score of the row); kAntidiagonal: the score itself
// kept      blocks before which less than the threshold's share of all weight ranks (keep_sorted.h for rows of up to
//           1024 blocks, else keep_row.h), the best block, the best min_blocks and floor(min_ratio * visible), blocks
//           of more than `probability` of the weight, and those of keep.h. kAntidiagonal: sinks and window rank before
//           all others, in the order of their index.
// NaN       a row that holds a NaN, or has no finite weight, keeps all it sees: dropping blocks would hide that.
// Tile      one CTA of 1, 4 or 16 warps per (mask row, mask head), by the length of the row. HeadSharing::kUnion: it
//           goes through the group's query heads in turn and keeps what any of them keeps; one rescue for all.
// Memory    reads the visible scores once; shared: a key per block, and the mask's words. Writes words and counts.
// Waits     for the scores. One warp: sorts in registers, no barrier, the same work whatever the scores are. More
//           warps: about thirty trips over the row in shared memory. No atomics.
#include <cstdint>

#include "../common/launch.h"
#include "bsfa/cuda.h"
#include "bsfa/keep.h"
#include "keep_row.h"
#include "keep_sorted.h"
#include "pick.h"

namespace bsfa::cuda {
namespace select {
namespace {

constexpr int32_t kShortRow = 1024;  // blocks that one warp works on
constexpr int32_t kLongRow = 8192;   // and four

constexpr int64_t words_of(int64_t blocks) { return (blocks + 31) / 32; }
// Words, and keys for all their bits.
constexpr int64_t shared_bytes(int64_t blocks) { return 33 * words_of(blocks) * sizeof(uint32_t); }
static_assert(shared_bytes(kMaxSelectBlocks) + sizeof(TeamScratch<16>) + 128 <= kMostSharedBytes,
              "the longest row fits");

// The keys of one head's row, and what its weights add up to.
template <int kWarps>
struct Row {
  Team<kWarps> team;
  uint32_t* keys;
  int32_t visible;
  bool antidiagonal;
  float largest;  // of the scores, unless antidiagonal
  double first;   // weight of the blocks that rank before all others
  double total;

  __device__ __forceinline__ float relative_weight(float score) const { return exp2f(score - largest); }
  __device__ __forceinline__ float weight(float score) const { return antidiagonal ? score : relative_weight(score); }

  // False: the row keeps everything. Leaves the keys in shared memory.
  __device__ bool read(const float* scores, const AlwaysKept& always) {
    bool nan = false;
    uint32_t highest = 0;
    for (int32_t j = team.thread; j < visible; j += Team<kWarps>::kThreads) {
      const float score = scores[j];
      const uint32_t key = key_of(score);
      nan |= score != score;
      highest = max(highest, key);
      keys[j] = key;
    }
    team.sync();
    nan = team.any(nan);
    largest = score_of(team.largest(highest));
    double of_first = 0.0, of_others = 0.0;
    for (int32_t j = team.thread; j < visible; j += Team<kWarps>::kThreads) {
      const double w = static_cast<double>(weight(score_of(keys[j])));
      if (antidiagonal && always(j)) {
        of_first += w;
        keys[j] = kFirstKey;
      } else {
        of_others += w;
      }
    }
    team.sync();
    first = team.sum(of_first);
    total = first + team.sum(of_others);
    return !nan && has_weight();
  }

  // The same for one warp, with the row in registers as well: blocks lane, lane + 32, ... and kNoKey beyond its end. In
  // shared memory, too, kNoKey fills the last word's blocks. A lane reads there what it wrote itself.
  template <int kPerLane>
  __device__ __forceinline__ bool read_short(const float* scores, const AlwaysKept& always,
                                             uint32_t (&mine)[kPerLane]) {
    static_assert(kWarps == 1, "lanes of one warp");
    const int32_t lane = team.thread;
    bool nan = false;
    float loaded[kPerLane];  // all on their way before the first is looked at
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) loaded[i] = lane + 32 * i < visible ? scores[lane + 32 * i] : 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      nan |= loaded[i] != loaded[i];
      mine[i] = lane + 32 * i < visible ? key_of(loaded[i]) : kNoKey;
      if (32 * i < visible) keys[lane + 32 * i] = mine[i];
    }
    if (__any_sync(kAllLanes, nan)) return false;
    double of_first = 0.0, of_others = 0.0;
    if (antidiagonal) {
      for (int32_t j = lane; j < min(always.sink_end, visible); j += 32) of_first += move_first(j);
      for (int32_t j = always.window_begin / 32 * 32 + lane; j < min(always.window_end, visible); j += 32) {
        if (j >= max(always.window_begin, always.sink_end)) of_first += move_first(j);
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (32 * i < visible) mine[i] = keys[lane + 32 * i];
        of_others += weigh(mine[i], [](float score) { return score; });
      }
    } else {
      uint32_t highest = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) highest = max(highest, mine[i]);
      largest = score_of(__reduce_max_sync(kAllLanes, highest));
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        of_others += weigh(mine[i], [this](float score) { return relative_weight(score); });
      }
    }
    team.sync();
    first = team.sum(of_first);
    total = first + team.sum(of_others);
    return has_weight();
  }

 private:
  __device__ __forceinline__ bool has_weight() const { return total > 0.0 && total < static_cast<double>(INFINITY); }

  // Block j ranks before all others from now on. Returns its weight.
  __device__ __forceinline__ double move_first(int32_t j) {
    const double w = static_cast<double>(weight(score_of(keys[j])));
    keys[j] = kFirstKey;
    return w;
  }
};

__device__ __forceinline__ int32_t at_least(const SelectParams& params, int32_t visible) {
  return max(best_blocks(params.min_blocks, params.min_ratio, visible), 1);
}

// What a row keeps beside the blocks of keep.h. False: it keeps everything.
template <int kWarps>
__device__ bool choose_long(Row<kWarps>& row, const float* scores, const AlwaysKept& always, const SelectParams& params,
                            float threshold, Cut& cut) {
  if (!row.read(scores, always)) return false;
  const auto weight = [&row](float score) { return row.weight(score); };
  const Cut mass = mass_cut(row.team, row.keys, row.visible, row.first, row.total, threshold, weight);
  cut = wider(mass, best_cut(row.team, row.keys, row.visible, at_least(params, row.visible)));
  return true;
}

template <int kPerLane>
__device__ bool choose_sorted(Row<1>& row, const float* scores, const AlwaysKept& always, const SelectParams& params,
                              float threshold, uint32_t* window, Cut& cut) {
  SortedRow<kPerLane> sorted;
  sorted.blocks = row.keys;
  sorted.window = window;
  sorted.lane = row.team.thread;
  sorted.n = row.visible;
  if (!row.read_short(scores, always, sorted.keys)) return false;
  sorted.sort();
  Cut mass;
  if (row.antidiagonal) {
    mass = sorted.mass(row.first, row.total, threshold, [](float score) { return score; });
  } else {
    const auto weight = [&row](float score) { return row.relative_weight(score); };
    mass = sorted.mass(row.first, row.total, threshold, weight);
  }
  cut = wider(mass, sorted.best(at_least(params, row.visible)));
  return true;
}

// The same for a row of at most kShortRow blocks.
__device__ __forceinline__ bool choose_short(Row<1>& row, const float* scores, const AlwaysKept& always,
                                             const SelectParams& params, float threshold, uint32_t* window, Cut& cut) {
  static_assert(kShortRow == 32 * 32, "32 keys in a lane");
  if (row.visible > 512) return choose_sorted<32>(row, scores, always, params, threshold, window, cut);
  if (row.visible > 256) return choose_sorted<16>(row, scores, always, params, threshold, window, cut);
  if (row.visible > 128) return choose_sorted<8>(row, scores, always, params, threshold, window, cut);
  return choose_sorted<4>(row, scores, always, params, threshold, window, cut);
}

__device__ __forceinline__ uint32_t first_bits(int32_t count) {
  return count >= 32 ? kAllLanes : count > 0 ? (1u << count) - 1 : 0u;
}

// Word w of the mask that holds them.
__device__ __forceinline__ uint32_t word_of(const AlwaysKept& always, int32_t w) {
  const uint32_t window = first_bits(always.window_end - 32 * w) & ~first_bits(always.window_begin - 32 * w);
  return first_bits(always.sink_end - 32 * w) | window;
}

// Each lane's word of a mask of at most 32: the blocks that `cut` keeps. kNoKey fills the last word's keys.
__device__ __forceinline__ uint32_t kept_word(const Cut& cut, const uint32_t* keys, int32_t used_words, int32_t lane) {
  uint32_t mine = 0;
#pragma unroll 4
  for (int32_t w = 0; w < used_words; ++w) {
    const int32_t block = 32 * w + lane;
    const uint32_t bits = __ballot_sync(kAllLanes, cut.keeps(keys[block], block));
    mine = lane == w ? bits : mine;
  }
  return mine;
}

// kPlain: no probability and no rescue. For one warp, whose words a lane each then makes.
template <int kWarps, bool kPlain>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 1 ? 20 : 1)
    pick_kernel(const __grid_constant__ SelectParams params, const __grid_constant__ Slab slab, const Rescue rescue) {
  extern __shared__ uint32_t memory[];
  static_assert(!kPlain || kWarps == 1, "a word for each lane");
  __shared__ TeamScratch<kWarps> scratch;
  __shared__ alignas(16) uint32_t window[kWarps == 1 ? 32 : 1];
  const ScoreParams& score = params.score;
  const int32_t mask_heads = score.mask_heads();
  // From the last: the longest rows of a causal call, and the scores that were written last.
  const int32_t pair = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  const int32_t in_slab = pair / mask_heads, mask_head = pair - in_slab * mask_heads;
  const int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t mask_row = int64_t{slab.row_begin + in_slab} * mask_heads + mask_head;
  int32_t* out = params.words + mask_row * params.num_words;

  const TileRow tile = slab.rows[slab.row_begin + in_slab];
  int32_t visible = 0;
  if (tile.sequence >= 0) visible = min(visible_range(tile, score.problem.causal, -1).end, score.max_blocks);
  if (visible <= 0) {
    for (int32_t w = thread; w < params.num_words; w += 32 * kWarps) out[w] = 0;
    if (thread == 0) params.counts[mask_row] = 0;
    return;
  }
  const SequenceGeometry geometry = sequence_geometry(score.problem, tile.sequence);
  const int32_t local = local_tile(geometry, tile), absolute = absolute_tile(tile);
  const AlwaysKept always = always_kept(geometry, local, score.sink_blocks, score.window_blocks);
  const int32_t prompt_len = params.prompt_lens != nullptr ? params.prompt_lens[tile.sequence] : -1;
  const bool everything = is_last_tile(geometry, local, params.last_tiles, prompt_len);
  const bool rescues = rescue.stride > 0 || rescue.parts > 0;

  uint32_t* words = memory;
  Row<kWarps> row;
  row.team = {thread, &scratch};
  row.keys = memory + words_of(score.max_blocks);
  row.visible = visible;
  row.antidiagonal = score.rule == ScoreRule::kAntidiagonal;
  const int32_t used_words = static_cast<int32_t>(words_of(visible));
  const int32_t group = score.problem.num_q_heads / mask_heads;
  for (int32_t member = 0; member < (everything ? 1 : group); ++member) {
    const int32_t head = mask_head * group + member;
    const float threshold = params.threshold_of(head);
    const float* scores = slab.scores + (int64_t{in_slab} * score.problem.num_q_heads + head) * score.max_blocks;
    // An infinite threshold, or NaN, keeps everything, as nothing is known not to be below it.
    bool all = everything || !(threshold < INFINITY);
    Cut cut;
    if (!all) {
      if constexpr (kWarps == 1) {
        all = !choose_short(row, scores, always, params, threshold, window, cut);
      } else {
        all = !choose_long(row, scores, always, params, threshold, cut);
      }
    }
    if constexpr (kPlain) {
      const uint32_t bits = (all ? kAllLanes : kept_word(cut, row.keys, used_words, lane) | word_of(always, lane)) &
                            first_bits(visible - 32 * lane);
      if (lane < used_words) words[lane] = member == 0 ? bits : words[lane] | bits;
    } else {
      for (int32_t w = warp; w < used_words; w += kWarps) {
        const int32_t block = w * 32 + lane;
        bool keep = block < visible;
        if (keep && !all) {
          const uint32_t key = row.keys[block];
          keep = static_cast<bool>(cut.keeps(key, block) | always(block));
          if (!keep && params.probability < 1.0f) {
            keep = static_cast<double>(row.weight(score_of(key))) > static_cast<double>(params.probability) * row.total;
          }
          if (!keep && rescues) keep = rescue(absolute, block, mask_head);
        }
        const uint32_t bits = __ballot_sync(kAllLanes, keep);
        if (lane == 0) words[w] = member == 0 ? bits : words[w] | bits;
      }
    }
    row.team.sync();  // before the next head's keys
  }
  uint32_t count = 0;
  for (int32_t w = thread; w < params.num_words; w += 32 * kWarps) {
    const uint32_t bits = w < used_words ? words[w] : 0u;
    count += __popc(bits);
    out[w] = static_cast<int32_t>(bits);
  }
  count = row.team.sum(count);
  if (thread == 0) params.counts[mask_row] = static_cast<int32_t>(count);
}

constexpr int32_t longest_row(int warps) { return warps == 1 ? kShortRow : warps == 4 ? kLongRow : kMaxSelectBlocks; }

template <int kWarps, bool kPlain = false>
cudaError_t launch(const SelectParams& params, const Slab& slab, cudaStream_t stream) {
  const int bytes = static_cast<int>(shared_bytes(params.score.max_blocks));
  const auto kernel = pick_kernel<kWarps, kPlain>;
  constexpr int kMostBytes = static_cast<int>(shared_bytes(longest_row(kWarps)));
  static DevicesDone allowed;
  // As many CTAs on an SM as registers allow, and no other division of its memory than the kernel before had.
  const cudaError_t error = allow_shared_memory(allowed, kernel, kMostBytes, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const unsigned ctas = static_cast<unsigned>(slab.row_end - slab.row_begin) * params.score.mask_heads();
  kernel<<<ctas, 32 * kWarps, bytes, stream>>>(params, slab, rescue_of(params));
  return cudaGetLastError();
}

}  // namespace

cudaError_t pick_blocks(const SelectParams& params, const Slab& slab, cudaStream_t stream) {
  const int32_t blocks = params.score.max_blocks;
  if (blocks > kMaxSelectBlocks || params.score.rule == ScoreRule::kRelativeMax) return cudaErrorInvalidValue;
  if (slab.row_end <= slab.row_begin) return cudaSuccess;
  const Rescue rescue = rescue_of(params);
  const bool plain = rescue.stride <= 0 && rescue.parts <= 0 && !(params.probability < 1.0f);
  if (blocks <= kShortRow) return plain ? launch<1, true>(params, slab, stream) : launch<1>(params, slab, stream);
  return blocks <= kLongRow ? launch<4>(params, slab, stream) : launch<16>(params, slab, stream);
}

}  // namespace select
}  // namespace bsfa::cuda
