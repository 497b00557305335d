// The consumers: two warpgroups, 64 query rows each, over one stream of steps (a step is one KV block of one tile). Two
// sets of scores in turn, so that the tensor cores go on, also from one tile to the next:
//
//   issue S' = Q K'           scores of the next step
//   results of S              while S' is under way: a mass or a maximum of each warp's 16 rows
//   wait for S'
//
// Accumulators of m64n8 tiles: element 4 * j + 2 * r + c is row lane / 4 + 8 * r of the warp's 16, column
// 8 * j + 2 * (lane % 4) + c. A row is spread over the four lanes of a quad.
#pragma once

#include "../../common/mma.h"
#include "../../common/steps.h"
#include "config.h"

namespace bsfa::cuda::measure {

constexpr int kScores = kBlockKeys / 2;  // per thread: two rows, 32 columns each
constexpr int kColumnTiles = kBlockKeys / 8;

// Integers in the order of the floats, NaN the largest; and back.
__device__ __forceinline__ int32_t ordered(float x) {
  const int32_t bits = __float_as_int(x);
  return x != x ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}
__device__ __forceinline__ float from_ordered(int32_t x) { return __int_as_float(x ^ (x >> 31 & INT32_MAX)); }

// Scores beyond what a row sees become -inf, whatever they were. `first_row`: of this thread, in the tile.
template <class Tensor>
__device__ __forceinline__ void mask_scores(Tensor& s, const TileRow& tile, int32_t first_key, int first_row,
                                            bool causal) {
  const int first_column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t position = tile.position + first_row + 8 * r;
    const int32_t end = (causal ? min(position + 1, tile.seqlen_k) : tile.seqlen_k) - first_key - first_column;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s(4 * j + 2 * r + c);
        x = 8 * j + c < end ? x : -INFINITY;
      }
    }
  }
}

// Sum of 2^(scale * s + minus) over the thread's scores; rows with a minus of -inf add nothing, whatever their scores.
template <class Tensor>
__device__ __forceinline__ float sum_of_exponentials(const Tensor& s, float scale, const float (&minus)[2]) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kScores; ++i) sums[i % 4] += exp2f(s(i) * scale + minus[i / 2 % 2]);
  const float first = sums[0] + sums[1], second = sums[2] + sums[3];
  return (minus[0] == -INFINITY ? 0.0f : first) + (minus[1] == -INFINITY ? 0.0f : second);
}

// The largest of the thread's scores of row r, by `larger` of two.
template <class Tensor, class Larger>
__device__ __forceinline__ float max_of_row(const Tensor& s, int r, const Larger& larger) {
  float tops[4];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const float pair = larger(s(4 * j + 2 * r), s(4 * j + 2 * r + 1));
    tops[j % 4] = j < 4 ? pair : larger(tops[j % 4], pair);
  }
  return larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
}

template <Quantity kQuantity, class Config>
class Consumer {
  using Element = typename Config::Element;

 public:
  __device__ Consumer(SharedStorage<Config>& shared, const KernelParams& p)
      : shared_(shared),
        p_(p),
        thread_(threadIdx.x - kWarpgroup),
        warp_(__shfl_sync(kAllLanes, thread_ / 32, 0)),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    using namespace cute;
    typename Config::ScoreMma mma;
    const auto staged = [](char* p, auto stages) {
      constexpr typename Config::RowsLayout layout;
      return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(p)),
                         tile_to_shape(layout, make_shape(size<0>(layout), size<1>(layout), stages)));
    };
    const auto slice = mma.get_thread_slice(thread_);
    const auto query_part = slice.partition_fragment_A(staged(shared_.query[0], Int<kQuerySlots>{}));
    const auto key_part = slice.partition_fragment_B(staged(shared_.key[0], Int<Config::kKeySlots>{}));
    auto even = partition_fragment_C(mma, Shape<Int<kTileRows>, Int<kBlockKeys>>{});
    auto odd = partition_fragment_C(mma, Shape<Int<kTileRows>, Int<kBlockKeys>>{});
    static_assert(size(decltype(even){}) == kScores);

    RingPosition<kQuerySlots> query;
    int query_slot = 0;
    const auto start = [&](const Step& step, auto& s) __attribute__((always_inline)) {
      if (step.flags & kFirst) {
        shared_.query_full[query.slot].wait(query.parity);
        query_slot = query.slot;
        query.advance();
      }
      issue(mma, query_part(_, _, _, query_slot), key_part(_, _, _, key_.slot), s, false);
    };

    Step step = await_step();
    if (step.flags & kEnd) return;
    start(step, even);
    warpgroup_wait<0>();
    warpgroup_fence_operand(even);
    release(shared_.key_empty[key_.slot], lane_);
    key_.advance();
    // Ends the step whose scores are `s`, while those of the next step are made in `other`; false if there is none.
    const auto advance = [&](auto& s, auto& other) __attribute__((always_inline)) {
      const Step next = await_step();
      if (next.flags & kEnd) {
        finish(s, step);
        return false;
      }
      start(next, other);
      finish(s, step);
      warpgroup_wait<0>();
      warpgroup_fence_operand(other);
      release(shared_.key_empty[key_.slot], lane_);
      key_.advance();
      step = next;
      return true;
    };
    while (advance(even, odd) && advance(odd, even)) {
    }
  }

 private:
  __device__ Step await_step() const {
    shared_.key_full[key_.slot].wait(key_.parity);
    return read_step(shared_.steps[key_.slot]);
  }

  template <class Tensor>
  __device__ __forceinline__ void finish(Tensor& s, const Step& step) {
    const TileRow& tile = shared_.tiles[tile_.slot];
    const int first_row = warp_ * kWarpRows + lane_ / 4;
    if (step.flags & kFirst) begin_tile(tile, first_row);
    if (p_.scale.transform != Transform::kNone) transform_scores(s, p_.scale);
    if (step.flags & kMasked) mask_scores(s, tile, step.first_key, first_row, p_.causal);
    put(result(s), step.flags & kLast);
    if (step.flags & kLast) {
      __syncwarp();
      release(shared_.query_empty[tile_.slot], lane_);
      tile_.advance();
    }
  }

  __device__ void begin_tile(const TileRow& tile, int first_row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if constexpr (kQuantity == Quantity::kMass) {
        rows_[r] = shared_.minus_lse[tile_.slot][row];
      } else {
        rows_[r] = -INFINITY;
        counts_[r] = row >= tile.row_begin && row < tile.row_end;
      }
    }
  }

  // Of the warp's rows and one block.
  template <class Tensor>
  __device__ __forceinline__ float result(const Tensor& s) {
    if constexpr (kQuantity == Quantity::kMass) {
      float sum = sum_of_exponentials(s, p_.scale.scale_log2, rows_);
#pragma unroll
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
      return sum;
    } else {
      float top[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = max_of_row(s, r, max_or_nan);
      if constexpr (kQuantity == Quantity::kRelative) {
#pragma unroll
        for (int d = 1; d <= 2; ++d) {
#pragma unroll
          for (int r = 0; r < 2; ++r) top[r] = max_or_nan(top[r], __shfl_xor_sync(kAllLanes, top[r], d));
        }
        above_running_maximum(s, top);
      }
      const float value = max_or_nan(counts_[0] ? top[0] : -INFINITY, counts_[1] ? top[1] : -INFINITY);
      return __int_as_float(__reduce_max_sync(kAllLanes, ordered(value)));
    }
  }

  // The rows' largest scores become what they exceed the running maxima by, and enter those.
  // Scores that are NaN do not.
  template <class Tensor>
  __device__ __forceinline__ void above_running_maximum(const Tensor& s, float (&top)[2]) {
    const float before[2] = {rows_[0], rows_[1]};
    float seen[2] = {top[0], top[1]};
    if (__any_sync(kAllLanes, top[0] != top[0] || top[1] != top[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        seen[r] = max_over_quad(max_of_row(s, r, [](float a, float b) { return fmaxf(a, b); }));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows_[r] = fmaxf(before[r], seen[r]);
      top[r] = before[r] == -INFINITY && top[r] == top[r] ? INFINITY : top[r] - before[r];
    }
  }

  // Hands the result of a step to the warp that writes, a whole batch or tile at a time.
  __device__ __forceinline__ void put(float result, bool last) {
    if (entry_ == 0) shared_.result_empty[result_.slot].wait(result_.parity ^ 1);
    if (lane_ == 0) shared_.results[result_.slot][entry_][warp_] = result;
    if (++entry_ == kBatch || last) {
      release(shared_.result_full[result_.slot], lane_);
      result_.advance();
      entry_ = 0;
    }
  }

  SharedStorage<Config>& shared_;
  const KernelParams& p_;
  const int thread_;
  const int warp_;
  const int lane_;
  RingPosition<Config::kKeySlots> key_;  // of the step that was issued last, or is waited for
  RingPosition<kQuerySlots> tile_;       // of the step that is being finished
  RingPosition<kResultSlots> result_;    // of the batch that is being filled
  int entry_ = 0;                        // steps in it
  float rows_[2];                        // minus the LSE, or the running maximum, of the thread's rows
  bool counts_[2];                       // whether they are of the sequence (maxima)
};

}  // namespace bsfa::cuda::measure
