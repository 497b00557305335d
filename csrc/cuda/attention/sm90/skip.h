// Skipping after the exact product (SkipParams in bsfa/params.h): how the warps of a consumer agree.
//
// A warpgroup decides for its 64 rows once the scores of a step are made: it keeps the step if one of its warps wants
// to, because a thread holds a score that is not below its row's limit. A warp that wants to keep it knows the result
// and goes on; one that does not waits for the other three.
//
// Votes carry step numbers, so none has to be reset, and a reader that comes late sees that.
#pragma once

#include "../../common/warp.h"
#include "config.h"

namespace bsfa::cuda::attn::sm90 {

__device__ __forceinline__ void publish(int32_t& word, int32_t value) {
  asm volatile("st.volatile.shared.s32 [%0], %1;" ::"r"(shared_address(&word)), "r"(value) : "memory");
}
__device__ __forceinline__ int32_t observe(const int32_t& word) {
  int32_t value;
  asm volatile("ld.volatile.shared.s32 %0, [%1];" : "=r"(value) : "r"(shared_address(&word)) : "memory");
  return value;
}

// A warpgroup's decisions. All its warps call decide(), in step.
template <class Config>
class Ballot {
 public:
  __device__ Ballot(SkipStorage<Config>& shared, int warp, int lane) : shared_(shared), warp_(warp), lane_(lane) {}

  // Whether the warpgroup keeps a step: if one of its threads wants to.
  __device__ __forceinline__ bool decide(int32_t step, bool keep) const {
    const bool mine = __any_sync(kAllLanes, keep);
    if (lane_ == 0) publish(shared_.votes[warp_][step & kMask], step << 1 | static_cast<int32_t>(mine));
    return mine || asked(step);
  }

 private:
  static constexpr int32_t kMask = SkipStorage<Config>::kRing - 1;

  // Whether one of the other warps wants to keep it.
  __device__ __forceinline__ bool asked(int32_t step) const {
    const int32_t yes = step << 1 | 1;
    const int32_t& word = shared_.votes[warp_ / 4 * 4 + lane_ % 4][step & kMask];
    for (;;) {
      const int32_t value = observe(word);
      if (__any_sync(kAllLanes, value == yes)) return true;
      if (__all_sync(kAllLanes, value >> 1 >= step)) return false;
    }
  }

  SkipStorage<Config>& shared_;
  const int warp_;
  const int lane_;
};

}  // namespace bsfa::cuda::attn::sm90
