// The cuts of keep_row.h for a row that fits into the registers of one warp: the keys are sorted there, highest first,
// after which a cut is a place in that order. No trips over the row, and the same work whatever the scores are.
//
// Lane l holds places l * kPerLane to (l + 1) * kPerLane - 1; places beyond the row hold kNoKey. All functions are
// called by all lanes. Sums are taken in one fixed order.
#pragma once

#include <cstdint>

#include "../common/warp.h"
#include "keep_row.h"

namespace bsfa::cuda::select {

constexpr uint32_t kNoKey = 0;  // below the key of -infinity

__device__ __forceinline__ void order(uint32_t& first, uint32_t& second) {
  const uint32_t high = max(first, second);
  second = min(first, second);
  first = high;
}

// What one of two lanes keeps: the higher key, or the lower if it is the second.
__device__ __forceinline__ uint32_t kept_of(uint32_t mine, uint32_t other, bool second) {
  return (other > mine) != second ? other : mine;
}

// Two bitonic halves of each `kSize` keys in turn into order; `kSize` a power of two.
template <int kPerLane, int kSize>
__device__ __forceinline__ void clean_halves(uint32_t (&keys)[kPerLane]) {
  if constexpr (kSize > 1) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i % kSize < kSize / 2) order(keys[i], keys[i + kSize / 2]);
    }
    clean_halves<kPerLane, kSize / 2>(keys);
  }
}

// Each lane's keys into order.
template <int kPerLane, int kSize = 2>
__device__ __forceinline__ void sort_lane(uint32_t (&keys)[kPerLane]) {
  if constexpr (kSize <= kPerLane) {
    // Two sorted halves, the second against the first read backwards.
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i % kSize < kSize / 2) order(keys[i], keys[i / kSize * kSize + kSize - 1 - i % kSize]);
    }
    clean_halves<kPerLane, kSize / 2>(keys);
    sort_lane<kPerLane, kSize * 2>(keys);
  }
}

template <int kPerLane>
__device__ __forceinline__ void sort_warp(uint32_t (&keys)[kPerLane], int lane) {
  static_assert(kPerLane >= 2 && (kPerLane & (kPerLane - 1)) == 0, "a power of two");
  sort_lane(keys);
#pragma unroll 1
  for (int size = 2; size <= 32; size *= 2) {  // lanes that will be in order
    const bool second = (lane & (size / 2)) != 0;
#pragma unroll
    for (int i = 0; i < kPerLane / 2; ++i) {
      const uint32_t a = __shfl_xor_sync(kAllLanes, keys[kPerLane - 1 - i], size - 1);
      const uint32_t b = __shfl_xor_sync(kAllLanes, keys[i], size - 1);
      keys[i] = kept_of(keys[i], a, second);
      keys[kPerLane - 1 - i] = kept_of(keys[kPerLane - 1 - i], b, second);
    }
#pragma unroll 1
    for (int d = size / 4; d > 0; d /= 2) {
      const bool second = (lane & d) != 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, keys[i], d);
        keys[i] = kept_of(keys[i], other, second);
      }
    }
    clean_halves<kPerLane, kPerLane>(keys);
  }
}

// The weight of a block that is neither beyond the row nor among the first of all.
template <typename Weight>
__device__ __forceinline__ double weigh(uint32_t key, Weight weight) {
  const float w = weight(score_of(key));
  return static_cast<double>(key == kNoKey || key == kFirstKey ? 0.0f : w);
}

// The sum of the lanes below this one.
__device__ __forceinline__ double sum_before(double value, int lane) {
  double sum = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const double other = __shfl_up_sync(kAllLanes, sum, d);
    if (lane >= d) sum += other;
  }
  const double before = __shfl_up_sync(kAllLanes, sum, 1);
  return lane > 0 ? before : 0.0;
}

template <int kPerLane>
struct SortedRow {
  uint32_t keys[kPerLane];  // of the places of this lane
  const uint32_t* blocks;   // shared memory: the keys in the order of their blocks
  uint32_t* window;         // shared memory: 32 numbers, aligned to 16 bytes
  int lane;
  int32_t n;

  // `keys` and `blocks` hold the row, the first in any order.
  __device__ __forceinline__ void sort() { sort_warp(keys, lane); }

  // The best `count` blocks of n.
  __device__ Cut best(int32_t count) const {
    if (count <= 0 || n <= 0) return {};
    if (count >= n) return {0, n};
    const int holder = (count - 1) / kPerLane;
    return cut_after(holder, count - holder * kPerLane, show(holder));
  }

  // As mass_cut of keep_row.h.
  template <typename Weight>
  __device__ Cut mass(double first, double total, float threshold, Weight weight) const {
    const auto below = [=](double before) { return static_cast<float>(before / total) < threshold; };
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += weigh(keys[i], weight);
    const double before = first + sum_before(sum, lane);
    const uint32_t begun = __ballot_sync(kAllLanes, lane * kPerLane < n && below(before));
    if (begun == 0) return {};
    const int holder = __popc(begun) - 1;  // the last lane whose first block passes
    const uint32_t key = show(holder);
    const double above = __shfl_sync(kAllLanes, before, holder) + sum_before(weigh(key, weight), lane);
    const bool passes = lane == 0 || (key != kNoKey && below(above));
    return cut_after(holder, __popc(__ballot_sync(kAllLanes, passes)), key);
  }

 private:
  // The keys of lane `holder`, one for each lane.
  __device__ __forceinline__ uint32_t show(int holder) const {
    __syncwarp();  // what the window held has been read
    if (lane == holder) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        *reinterpret_cast<uint4*>(window + i) = make_uint4(keys[i], keys[i + 1], keys[i + 2], keys[i + 3]);
      }
    }
    __syncwarp();
    return lane < kPerLane ? window[lane] : kNoKey;
  }

  // All blocks up to the `count`-th (from 1) of lane `holder`, whose keys are `shown`.
  __device__ Cut cut_after(int holder, int count, uint32_t shown) const {
    const uint32_t key = __shfl_sync(kAllLanes, shown, count - 1);
    const uint32_t of_lane = __shfl_sync(kAllLanes, shown, count % 32);
    const uint32_t of_next_lane = __shfl_sync(kAllLanes, keys[0], (holder + 1) % 32);
    const uint32_t next = count < kPerLane ? of_lane : holder < 31 ? of_next_lane : kNoKey;
    if (next != key) return {key, n};
    // Some of the equals stay out: those of the highest blocks.
    uint32_t greater = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) greater += keys[i] > key ? 1u : 0u;
    int32_t ties = holder * kPerLane + count - static_cast<int32_t>(__reduce_add_sync(kAllLanes, greater));
    for (int32_t begin = 0; begin < n; begin += 32) {
      const bool equal = begin + lane < n && blocks[begin + lane] == key;
      const uint32_t bits = __ballot_sync(kAllLanes, equal);
      const int32_t here = __popc(bits);
      if (here >= ties) {
        const bool last = equal && __popc(bits & ((1u << lane) - 1)) == ties - 1;
        return {key, begin + __ffs(static_cast<int>(__ballot_sync(kAllLanes, last)))};
      }
      ties -= here;
    }
    return {key, n};
  }
};

}  // namespace bsfa::cuda::select
