// Skipping after the exact product (SkipParams in bsfa/params.h): how the two consumers and the warp that fetches V agree.
//
// A warpgroup decides for its 64 rows once the scores of a step are made: it keeps the step if one of its warps wants to,
// because a thread holds a score that is not below its row's limit. A warp that wants to keep it knows the result and goes
// on; one that does not waits for the other three.
//
// The V warp fetches a step's block when a warp wants to keep it, and before anybody has voted if the step two before was
// kept: where all is kept, values then arrive as early as in attention that does not skip. A block that all skip is not
// fetched, or for nothing. V slots are taken in the order of fetches, which a consumer cannot know: it reads the slot of a
// step's V from `ready`, and then waits for the slot's barrier. A slot is free once every warp is done with the step that
// had it, and what was fetched for that step has arrived.
//
// All words between warps carry step numbers, so none has to be reset, and a reader that comes late sees that. The V warp
// is never so far ahead that it overwrites one in `ready` that is still wanted: of the steps from the one whose product is
// due to its own, each had a slot of V, and there are no more of these than words.
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
 public:
  __device__ Ballot(SkipStorage<Config>& shared, int warp, int lane) : shared_(shared), warp_(warp), lane_(lane) {}

  // Whether the warpgroup keeps step `at`: if one of its threads wants to.
  __device__ __forceinline__ bool decide(const StepCount<SkipStorage<Config>::kRing>& at, bool keep) const {
    const bool mine = __any_sync(kAllLanes, keep);
    if (lane_ == 0) publish(shared_.votes[warp_][at.slot], at.number << 1 | static_cast<int32_t>(mine));
    return mine || asked(at);
  }

 private:
  // Whether one of the other warps wants to keep it.
  __device__ __forceinline__ bool asked(const StepCount<SkipStorage<Config>::kRing>& at) const {
    const int32_t yes = at.number << 1 | 1;
    const int32_t& word = shared_.votes[warp_ / 4 * 4 + lane_ % 4][at.slot];
    for (;;) {
      const int32_t value = observe(word);
      if (__any_sync(kAllLanes, value == yes)) return true;
      if (__all_sync(kAllLanes, value >> 1 >= at.number)) return false;
    }
  }

  SkipStorage<Config>& shared_;
  const int warp_;
  const int lane_;
};

// Fetches the values of steps that some warpgroup keeps, or is expected to.
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
    // Shared memory must outlive what is on its way.
    for (int i = 0; i < Config::kValueSlots; ++i, this->value_.advance()) await_last();
  }

 private:
  static constexpr int kRing = SkipStorage<Config>::kRing;
  static_assert(Config::kValueSlots <= kRing && kConsumerWarps == 8 && kRing > 2);

  __device__ void load_if_kept(const Block& block) {
    const int two_before = step_.slot == 0 ? kRing - 1 : step_.slot - 1;
    step_.advance();
    auto& skip = this->shared_.skip;
    const int32_t before = __shfl_sync(kAllLanes, user_, this->value_.slot);
    // Lanes 0 to 7 look at the votes on this step, 8 to 15 at what is done with, 16 to 23 at the votes on the step two
    // before.
    const int lane = this->lane_, warp = lane % kConsumerWarps, part = lane / kConsumerWarps;
    const int32_t* word = part == 0   ? &skip.votes[warp][step_.slot]
                          : part == 1 ? &skip.done[warp]
                                      : &skip.votes[warp][two_before];
    const int32_t number = part == 2 ? step_.number - 2 : step_.number;
    const int32_t yes = number << 1 | 1;
    constexpr unsigned kOfWarps = (1u << kConsumerWarps) - 1;
    for (;;) {
      const int32_t value = observe(*word);
      const unsigned keepers = __ballot_sync(kAllLanes, part != 1 && value == yes);
      // A vote on a later step: a warpgroup that had kept this one would still wait for its values.
      const unsigned others = __ballot_sync(kAllLanes, part == 0   ? value >> 1 >= number && value != yes
                                                       : part == 1 ? value >= before
                                                                   : value == yes - 1);
      if ((others & kOfWarps) == kOfWarps) break;
      if ((keepers >> 16 & kOfWarps) != 0) {
        expected_ = true;
      } else if ((others >> 16 & kOfWarps) == kOfWarps) {
        expected_ = false;
      }
      const bool free = (others >> 8 & kOfWarps) == kOfWarps;
      if (free && (expected_ || (keepers & kOfWarps) != 0)) {
        await_last();
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

  // Until what the next slot held last has arrived: if it was fetched for nothing nobody has waited for it.
  __device__ void await_last() const { this->shared_.skip.value_full[this->value_.slot].wait(this->value_.parity ^ 1); }

  StepCount<SkipStorage<Config>::kRing> step_;
  int32_t user_ = -1;     // lane i: the step whose values slot i held last
  bool expected_ = true;  // steps are kept
};

}  // namespace bsfa::cuda::attn::sm90
