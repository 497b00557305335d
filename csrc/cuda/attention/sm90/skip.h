// Skipping after the exact product (SkipParams in bsfa/params.h): how the two consumers and the warp that fetches V agree.
//
// A warpgroup decides for its 64 rows once the scores of a step are made: it keeps the step if one of its threads holds a
// score that is not below its row's limit (a reduction over a named barrier).
//
// The first warpgroup that keeps a step makes the V warp fetch its block; a block that both skip is never fetched. V
// slots are taken in the order of fetches, which a consumer cannot know: it reads the slot of a step's V from `ready`,
// and then waits for the slot's barrier. A slot is free once every warp is done with the step that had it.
//
// All words between warps carry step numbers, so none has to be reset, and a reader that comes late sees that.
#pragma once

#include "load.h"
#include "softmax.h"

namespace bsfa::cuda::attn::sm90 {

__device__ __forceinline__ void publish(int32_t& word, int32_t value) {
  asm volatile("st.volatile.shared.s32 [%0], %1;" ::"r"(shared_address(&word)), "r"(value) : "memory");
}
__device__ __forceinline__ int32_t observe(const int32_t& word) {
  int32_t value;
  asm volatile("ld.volatile.shared.s32 %0, [%1];" : "=r"(value) : "r"(shared_address(&word)) : "memory");
  return value;
}

// Position in a ring by step number.
template <int kSlots>
struct StepCount {
  int32_t number = -1;
  int slot = kSlots - 1;

  __device__ __forceinline__ void advance() {
    ++number;
    if (++slot == kSlots) slot = 0;
  }
};

// A warpgroup's decisions. All its warps call decide(), in step.
template <class Config>
class Ballot {
  static constexpr int kFirstBarrier = 1;  // 0 is __syncthreads'

 public:
  __device__ Ballot(SkipStorage<Config>& shared, int warp, int lane)
      : shared_(shared), warpgroup_(warp / 4), leads_(warp % 4 == 0 && lane == 0) {}

  // Whether the warpgroup keeps step `at`: if one of its threads wants to.
  __device__ __forceinline__ bool decide(const StepCount<SkipStorage<Config>::kRing>& at, bool keep) const {
    uint32_t kept;
    asm volatile(
        "{\n\t"
        ".reg .pred mine, any;\n\t"
        "setp.ne.u32 mine, %3, 0;\n\t"
        "bar.red.or.pred any, %1, %2, mine;\n\t"
        "selp.u32 %0, 1, 0, any;\n\t"
        "}"
        : "=r"(kept)
        : "r"(kFirstBarrier + warpgroup_), "n"(kWarpgroup), "r"(static_cast<uint32_t>(keep))
        : "memory");
    kept = __shfl_sync(kAllLanes, kept, 0);  // makes branches on it uniform
    if (leads_) publish(shared_.votes[warpgroup_][at.slot], at.number << 1 | static_cast<int32_t>(kept));
    return kept != 0;
  }

 private:
  SkipStorage<Config>& shared_;
  const int warpgroup_;
  const bool leads_;
};

// Fetches the values of steps that some warpgroup keeps.
template <class Config>
class SkipValueLoader : public ValueLoader<Config> {
  using Base = ValueLoader<Config>;
  using typename Base::Block;

 public:
  __device__ SkipValueLoader(SharedStorage<Config>& shared, const KernelParams& p) : Base(shared, p) {}

  __device__ void run() {
    this->for_each_step([](const TileRow&, int32_t, float) {},
                        [this](const TileRow&, const Block& block, bool, bool) { load_if_kept(block); },
                        [](const TileRow&, const Block&, uint32_t, bool, bool) {});
  }

 private:
  __device__ void load_if_kept(const Block& block) {
    step_.advance();
    auto& skip = this->shared_.skip;
    const int lane = this->lane_;
    const int32_t yes = step_.number << 1 | 1;
    const int32_t before = __shfl_sync(kAllLanes, user_, this->value_.slot);
    const int32_t* word = lane < kConsumers                    ? &skip.votes[lane][step_.slot]
                          : lane < kConsumers + kConsumerWarps ? &skip.done[lane - kConsumers]
                                                               : nullptr;
    for (;;) {
      const int32_t value = word != nullptr ? observe(*word) : 0;
      const bool votes = lane < kConsumers;
      // A vote on a later step: a warpgroup that had kept this one would still wait for its values.
      const bool kept = __any_sync(kAllLanes, votes && value == yes);
      if (__all_sync(kAllLanes, !votes || (value >> 1 >= step_.number && value != yes))) break;
      if (kept && __all_sync(kAllLanes, votes || word == nullptr || value >= before)) {
        if (lane == 0) {
          publish(skip.ready[step_.slot],
                  step_.number << 4 | this->value_.slot << 1 | static_cast<int32_t>(this->value_.parity));
        }
        __syncwarp();
        this->load_value(this->p_.v, block, skip.value_full[this->value_.slot], this->shared_.value[this->value_.slot]);
        if (lane == this->value_.slot) user_ = step_.number;
        this->value_.advance();
        break;
      }
    }
  }

  StepCount<SkipStorage<Config>::kRing> step_;
  int32_t user_ = -1;  // lane i: the step whose values slot i held last
};

}  // namespace bsfa::cuda::attn::sm90
