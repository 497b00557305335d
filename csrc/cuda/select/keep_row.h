// Which blocks of one row are best, without sorting: scores become keys, unsigned numbers in the same order, and a cut
// among them is found by bisection. Ties go to the lower block, so a cut is a key and an end among its equals.
//
// All functions are called by every thread of a team, warps that work on one row whose keys lie in shared memory. Sums
// are taken in one fixed order: the same keys give the same cut.
#pragma once

#include <cstdint>

#include "../common/warp.h"

namespace bsfa::cuda::select {

// Ranks before every score, infinity included.
constexpr uint32_t kFirstKey = 0xffffffffu;

template <int kWarps>
struct TeamScratch {
  double sums[kWarps];
  uint32_t numbers[kWarps];
};

// One warp of a CTA, or a whole CTA of kWarps warps.
template <int kWarps>
struct Team {
  static_assert(kWarps >= 1 && kWarps <= 32 && (kWarps & (kWarps - 1)) == 0, "sums halve the warps");
  static constexpr int kThreads = 32 * kWarps;
  int thread = 0;                          // 0 .. kThreads - 1
  TeamScratch<kWarps>* scratch = nullptr;  // shared memory; null for one warp

  // Shared memory that any thread of the team wrote can be read by all.
  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  __device__ __forceinline__ double sum(double value) const {
    return reduce(value, kWarps > 1 ? scratch->sums : nullptr, [](double a, double b) { return a + b; });
  }
  __device__ __forceinline__ uint32_t sum(uint32_t value) const {
    return reduce(value, numbers(), [](uint32_t a, uint32_t b) { return a + b; });
  }
  __device__ __forceinline__ uint32_t largest(uint32_t value) const {
    return reduce(value, numbers(), [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  }
  __device__ __forceinline__ uint32_t smallest(uint32_t value) const {
    return reduce(value, numbers(), [](uint32_t a, uint32_t b) { return a < b ? a : b; });
  }
  __device__ __forceinline__ bool any(bool value) const { return largest(value ? 1u : 0u) != 0; }

 private:
  __device__ __forceinline__ uint32_t* numbers() const { return kWarps > 1 ? scratch->numbers : nullptr; }

  template <typename T, typename Op>
  __device__ __forceinline__ T reduce(T value, T* partial, Op op) const {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, d));
    if constexpr (kWarps > 1) {
      __syncthreads();  // the results of the reduction before have been read
      if (thread % 32 == 0) partial[thread / 32] = value;
      __syncthreads();
      value = partial[thread % kWarps];
#pragma unroll
      for (int d = kWarps / 2; d > 0; d /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, d));
    }
    return value;
  }
};

// Keys order like scores; NaN like -infinity, both zeros alike.
__device__ __forceinline__ uint32_t key_of(float score) {
  if (score != score) score = -INFINITY;
  if (score == 0.0f) score = 0.0f;
  const uint32_t bits = __float_as_uint(score);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key ^ (~static_cast<uint32_t>(static_cast<int32_t>(key) >> 31) | 0x80000000u));
}

// Blocks that rank before a place in the row.
struct Cut {
  uint32_t key = kFirstKey;
  int32_t tie_end = 0;  // of the blocks with this very key, those below tie_end

  __device__ __forceinline__ bool keeps(uint32_t block_key, int32_t block) const {
    return (block_key > key) | ((block_key == key) & (block < tie_end));
  }
};

// Keeps what one of the two keeps: they are ends in the same order.
__device__ __forceinline__ Cut wider(const Cut& a, const Cut& b) {
  return a.key < b.key || (a.key == b.key && a.tie_end > b.tie_end) ? a : b;
}

// How many of the n keys satisfy `test(key, block)`.
template <int kWarps, typename Test>
__device__ uint32_t count_keys(const Team<kWarps>& team, const uint32_t* keys, int32_t n, Test test) {
  uint32_t count = 0;
  for (int32_t j = team.thread; j < n; j += Team<kWarps>::kThreads) count += test(keys[j], j) ? 1u : 0u;
  return team.sum(count);
}

// All keys above `key`, and the first `ties` blocks of those that equal it.
template <int kWarps>
__device__ Cut cut_with_ties(const Team<kWarps>& team, const uint32_t* keys, int32_t n, uint32_t key, uint32_t ties) {
  const auto equal_below = [&](int32_t end) {
    return count_keys(team, keys, n, [=](uint32_t k, int32_t j) { return k == key && j < end; });
  };
  if (ties >= equal_below(n)) return {key, n};
  int32_t low = 0, high = n;  // the smallest end that takes in `ties` blocks
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (equal_below(middle) >= ties) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {key, low};
}

// The best `count` blocks of n.
template <int kWarps>
__device__ Cut best_cut(const Team<kWarps>& team, const uint32_t* keys, int32_t n, int32_t count) {
  if (count <= 0 || n <= 0) return {};
  if (count >= n) return {0, n};
  uint32_t lowest = kFirstKey, highest = 0;
  for (int32_t j = team.thread; j < n; j += Team<kWarps>::kThreads) {
    lowest = min(lowest, keys[j]);
    highest = max(highest, keys[j]);
  }
  // The largest key that `count` blocks reach.
  uint32_t high = team.largest(highest), low = count == 1 ? high : team.smallest(lowest);
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    if (count_keys(team, keys, n, [=](uint32_t k, int32_t) { return k >= middle; }) >= static_cast<uint32_t>(count)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const uint32_t above = count_keys(team, keys, n, [=](uint32_t k, int32_t) { return k > low; });
  return cut_with_ties(team, keys, n, low, static_cast<uint32_t>(count) - above);
}

// The blocks before which less than `threshold` of the total weight ranks. Blocks of key kFirstKey rank before all
// others, weigh `first` together, and are not judged here. `weight(score)` is at least 0 and does not fall with score.
template <int kWarps, typename Weight>
__device__ Cut mass_cut(const Team<kWarps>& team, const uint32_t* keys, int32_t n, double first, double total,
                        float threshold, Weight weight) {
  const auto below = [=](double before) { return static_cast<float>(before / total) < threshold; };
  uint32_t lowest = kFirstKey, highest = 0;
  for (int32_t j = team.thread; j < n; j += Team<kWarps>::kThreads) {
    const uint32_t k = keys[j];
    lowest = min(lowest, k);
    if (k != kFirstKey) highest = max(highest, k);
  }
  uint32_t low = team.smallest(lowest), high = team.largest(highest);
  if (low > high) return {};  // all are first
  // The smallest number whose greater keys weigh little enough; one above the highest key if there is none. The weight
  // changes at keys only, so both ends go to the next one. Only keys in (low, high] are still in question, and soon
  // there are few: `live` has a bit for each trip of this warp over the row (modulo 32) that may hold one.
  ++high;  // which is below kFirstKey
  constexpr int32_t kTeam = Team<kWarps>::kThreads;
  const int32_t trips = (n + kTeam - 1) / kTeam;
  uint32_t live = trips < 32 ? (1u << trips) - 1 : kAllLanes;
  double above = first;  // weight of the keys above `high`, and of the first ones
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    double sum = 0.0;
    uint32_t upper = 0, least = high;  // trips that hold keys in (middle, high], and the lowest of these
    uint32_t lower = 0, most = low;    // in (low, middle], and the highest
    for (uint32_t bits = live; bits != 0; bits &= bits - 1) {
      const int bit = __ffs(static_cast<int>(bits)) - 1;
      for (int32_t j = bit * kTeam + team.thread; j < n; j += 32 * kTeam) {
        const uint32_t k = keys[j];
        if (k <= low || k > high) continue;
        if (k > middle) {
          sum += static_cast<double>(weight(score_of(k)));
          upper |= 1u << bit;
          least = min(least, k);
        } else {
          lower |= 1u << bit;
          most = max(most, k);
        }
      }
    }
    __syncwarp();
    const double before = above + team.sum(sum);
    if (below(before)) {
      high = team.largest(most);
      above = before;
      live = __reduce_or_sync(kAllLanes, lower);
    } else {
      low = team.smallest(least);
      live = __reduce_or_sync(kAllLanes, upper);
    }
  }
  const uint32_t equal = count_keys(team, keys, n, [=](uint32_t k, int32_t) { return k == low; });
  if (equal == 0 || low == kFirstKey) return {low, 0};
  const double before = above, each = static_cast<double>(weight(score_of(low)));
  uint32_t few = 1, many = equal;  // of the equals, the first always passes; the number that pass
  while (few < many) {
    const uint32_t middle = many - (many - few) / 2;
    if (below(before + (middle - 1) * each)) {
      few = middle;
    } else {
      many = middle - 1;
    }
  }
  return cut_with_ties(team, keys, n, low, few);
}

}  // namespace bsfa::cuda::select
