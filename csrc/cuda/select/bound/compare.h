// The warpgroups that look at blocks, 64 query rows each.
//
// Relative  one pass over the list: all keys of a block count for the running maxima.
// Absolute  a block is kept if any of its bounds says so, so a quarter of it may do: 64 rows against 64 keys. The first
//           pass looks at one quarter of every block, the second at the rest of those that it did not keep. What is
//           found by the first costs a quarter of the work, and where bounds decide nothing most of it is found so.
//
// Products are of 64 keys each. What a warpgroup waits for, the three others of the SM hide: with two sets of scores,
// and so more registers, there would be no warp for fetching. No warp waits for another one: each sets the bits of what
// it keeps in the row of words in shared memory.
#pragma once

#include "../../common/mma.h"
#include "queries.h"
#include "steps.h"

namespace bsfa::cuda::bound {

// Less than any score.
constexpr int32_t kUnseen = INT32_MIN;

// The largest of the thread's scores of row r, in a half of a block; `score(i)` is element i. Element 4 j + 2 r + c is
// column 8 j + 2 (lane % 4) + c.
template <class Score>
__device__ __forceinline__ int32_t largest_of_row(const Score& score, int r) {
  int32_t tops[2];
#pragma unroll
  for (int j = 0; j < kHalfKeys / 8; ++j) {
    const int32_t a = score(4 * j + 2 * r), b = score(4 * j + 2 * r + 1);
    tops[j % 2] = j < 2 ? max(a, b) : __vimax3_s32(tops[j % 2], a, b);
  }
  return max(tops[0], tops[1]);
}

// The same over the keys that the row sees: those before `end`, counted from the half's first one.
template <class Score>
__device__ __forceinline__ int32_t largest_seen(const Score& score, int r, int32_t end) {
  end -= 2 * static_cast<int>(threadIdx.x % 4);
  return largest_of_row([&](int i) { return i / 4 * 8 + i % 2 < end ? score(i) : kUnseen; }, r);
}

// What softcap makes of a bound; off by `kCapLoss` caps at most.
constexpr float kCapLoss = 1e-5f;
__device__ __forceinline__ float bound_above(float x, float cap) {
  return cap == 0.0f ? x : capped(x / cap, cap) + kCapLoss * cap;
}
__device__ __forceinline__ float bound_below(float x, float cap) {
  return cap == 0.0f ? x : capped(x / cap, cap) - kCapLoss * cap;
}

// Waits for all threads of the CTA, wherever in the code they are.
__device__ __forceinline__ void sync_cta() { asm volatile("barrier.cta.sync 1, %0;" ::"n"(kThreads) : "memory"); }

// The first of a consuming thread's two rows of the tile.
__device__ __forceinline__ int consumer_row() {
  return (static_cast<int>(threadIdx.x) - kWarpgroup) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
}

template <class Element, class C, bool kRelative>
class Comparer {
 public:
  __device__ Comparer(SharedStorage<C>& shared, uint32_t* kept_words, const KernelParams& p, const Rows& rows)
      : shared_(shared),
        work_(shared.work),
        kept_words_(kept_words),
        p_(p),
        group_(__shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0) - 1),
        lane_(threadIdx.x % 32),
        first_row_(consumer_row()),
        whole_(min(whole_blocks(work_.tile, p.problem.causal), work_.tile.seqlen_k / kBlockKeys)),
        rows_(rows),
        cut_(work_.cut) {}

  // `fragment`: the rows' integers, as take_rows() has them.
  __device__ void run(const uint32_t (&fragment)[C::kHeadDim / 8]) {
    using namespace cute;
    typename C::Mma mma;
    const auto slice = mma.get_thread_slice(threadIdx.x % kWarpgroup);
    const auto keys = make_tensor(make_smem_ptr(reinterpret_cast<int8_t*>(shared_.key)), typename C::HalvesLayout{});
    const auto key_part = slice.partition_fragment_B(keys);
    auto scores = partition_fragment_C(mma, Shape<Int<kGroupRows>, Int<kHalfKeys>>{});
    auto query_part = make_tensor<int8_t>(Shape<Shape<_4, _2, _2>, _1, Int<C::kSteps>>{});
    auto words = recast<uint32_t>(query_part);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 8; ++i) words(i) = fragment[i];
    warpgroup_fence_operand(query_part);
    const auto issue_half = [&](int half) __attribute__((always_inline)) {
      issue(mma, query_part, key_part(_, _, _, 2 * slot_.slot + half), scores, false);
    };
    if constexpr (kRelative) {
      look_through<Pass::kAll>(issue_half, scores);
    } else {
      look_through<Pass::kSample>(issue_half, scores);
      sync_cta();  // the bits are complete
      sync_cta();  // what they say is off the list
      look_through<Pass::kRest>(issue_half, scores);
    }
  }

 private:
  template <Pass kPass, class Issue, class Scores>
  __device__ __forceinline__ void look_through(const Issue& issue_half, Scores& scores) {
    const List list = shared_.list;
    const int32_t num_steps = list.steps<kPass>();
    for (int32_t step = 0; step < num_steps; ++step) {
      shared_.key_full[slot_.slot].wait(slot_.parity);
      const int first = kPass == Pass::kSample ? group_ : kPass == Pass::kRest && list.sampler(step) == group_;
      const BlockFacts facts = shared_.facts[slot_.slot][kPass == Pass::kSample ? group_ : 0];
      int32_t tops[2] = {kUnseen, kUnseen};
      for (int half = first;; ++half) {
        issue_half(half);
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(scores);
        const bool last = kPass == Pass::kSample || half == 1;
        if (last && lane_ == 0) shared_.key_empty[slot_.slot].arrive();
        look(scores, facts.block, half, tops);
        if (last) break;
      }
      slot_.advance();
      if (__any_sync(kAllLanes, wants(tops, facts)) && lane_ == 0) keep(facts.block);
    }
  }

  __device__ __forceinline__ void keep(int32_t block) const { atomicOr(kept_words_ + block / 32, 1u << (block % 32)); }

  // Raises `tops` to the largest of the thread's scores of its two rows, in a half of a block.
  template <class Scores>
  __device__ __forceinline__ void look(const Scores& scores, int32_t block, int half, int32_t (&tops)[2]) const {
    const auto score = [&](int i) { return scores(i); };
    if (kRelative && block >= whole_) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int32_t seqlen = work_.tile.seqlen_k;
        const int32_t seen = p_.problem.causal ? min(work_.tile.position + first_row_ + 8 * r + 1, seqlen) : seqlen;
        tops[r] = max(tops[r], largest_seen(score, r, seen - block * kBlockKeys - half * kHalfKeys));
      }
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) tops[r] = max(tops[r], largest_of_row(score, r));
  }

  // Whether a row may keep a block in which `tops` are the largest scores.
  __device__ __forceinline__ bool wants(const int32_t (&tops)[2], const BlockFacts& facts) {
    const float cap = p_.problem.softcap;
    bool keep = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float middle = rows_.factor[r] * facts.factor * static_cast<float>(tops[r]);
      const float error = rows_.error(r, facts);
      const float limit = kRelative ? floor_[r] + cut_ : cut_;
      keep |= rows_.counts[r] & !(bound_above(middle + error, cap) < limit);  // NaN keeps
      if constexpr (kRelative) {
        const float below = tops[r] == kUnseen ? -INFINITY : bound_below(middle - error, cap);
        floor_[r] = fmaxf(floor_[r], max_over_quad(below));
      }
    }
    return keep;
  }

  SharedStorage<C>& shared_;
  const Work& work_;
  uint32_t* const kept_words_;
  const KernelParams& p_;
  const int group_;
  const int lane_;
  RingPosition<kStages> slot_;
  const int first_row_;
  const int32_t whole_;  // blocks that every row of the tile sees whole
  const Rows rows_;
  const float cut_;
  float floor_[2] = {-INFINITY, -INFINITY};  // of the running maxima
};

}  // namespace bsfa::cuda::bound
