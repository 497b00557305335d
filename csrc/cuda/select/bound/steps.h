// What a CTA looks at: the list of its blocks, the passes over it, and how blocks are fetched.
#pragma once

#include "../../common/scan.h"
#include "config.h"

namespace bsfa::cuda::bound {

// The pair of a CTA.
struct Work {
  TileRow tile;
  int32_t head;
  AlwaysKept always;
  BlockRange visible;
  const uint32_t* within;  // null: all
  int32_t last;            // the last one that may be kept, -1 without any
  float cut;               // nats; NaN: nothing is left out

  __device__ bool keeps_all() const { return cut != cut; }

  // Blocks of word w that may be kept; those of them that are kept whatever the bounds say.
  __device__ __forceinline__ uint32_t candidates(int32_t w) const {
    return (within != nullptr ? within[w] : ~0u) & visible.bits_of_word(w);
  }
  // Among them the last one: attention meets it first, and its sums have other bits in another order.
  __device__ __forceinline__ uint32_t forced(int32_t w) const {
    const uint32_t met_first = last >= 0 && last / 32 == w ? 1u << (last % 32) : 0;
    return BlockRange{0, always.sink_end}.bits_of_word(w) |
           BlockRange{always.window_begin, always.window_end}.bits_of_word(w) | met_first;
  }
};

// Over the list. A step is what one slot of shared memory holds.
enum class Pass {
  kSample,  // two blocks a step, of each the first half of the keys: a warpgroup looks at one of them
  kRest,    // a block a step: what the sample did not look at
  kAll,     // a block a step
};

// The list of blocks, and how a pass goes over it.
struct List {
  int32_t count;
  int32_t front;  // entries before this one are, or were, for the first warpgroup to sample, the others for the second

  template <Pass kPass>
  __device__ int32_t steps() const {
    return kPass == Pass::kSample ? front : count;
  }
  // Where the blocks that the warpgroups sample in a step stand; the second one of the last step may be one again.
  __device__ int32_t sampled(int32_t step, int group) const { return group == 0 ? step : min(front + step, count - 1); }
  // Where the block of another pass's step stands. Of what has been sampled, blocks of the one warpgroup and of the
  // other in turn, since it has one product less with its own.
  template <Pass kPass>
  __device__ int32_t place(int32_t step) const {
    if constexpr (kPass == Pass::kAll) return step;
    const int32_t behind = count - front, pairs = min(front, behind);
    if (step < 2 * pairs) return (step % 2 != 0 ? front : 0) + step / 2;
    return front > behind ? step - pairs : step;
  }
  // Which warpgroup has sampled the block of a step.
  __device__ int sampler(int32_t step) const {
    const int32_t behind = count - front;
    return step < 2 * min(front, behind) ? step % 2 : front <= behind;
  }
};

template <class C>
struct SharedStorage {
  alignas(1024) uint8_t key[kStages][2][C::kImageBytes / 2];
  BlockFacts facts[kStages][2];                    // of the halves
  Mbarrier key_full[kStages], key_empty[kStages];  // bytes of keys and facts; warps that compute
  Work work;
  List list;
  // Behind it: num_words words of kept blocks, and the list's entries, uint16_t, 32 for each word.
};

template <class C>
constexpr int shared_bytes(int32_t num_words) {
  constexpr int kOfWord = sizeof(uint32_t) + 32 * sizeof(uint16_t);
  return 1024 + static_cast<int>(sizeof(SharedStorage<C>)) + num_words * kOfWord;
}

// Lists the blocks in question; one warp. Returns how many there are.
template <bool kRelative>
__device__ __forceinline__ int32_t list_blocks(const Work& work, uint16_t* entries) {
  const int lane = threadIdx.x % 32;
  const int32_t words = ceil_div(work.visible.end, 32);
  int32_t count = 0;
  const auto put = [&](int32_t block) {
    if (lane == 0) entries[count] = static_cast<uint16_t>(block);
    ++count;
  };
  if constexpr (kRelative) {  // the last one and block 0 come first
    if (work.last < 0) return 0;
    put(work.last);
    if (work.last > 0 && (work.candidates(0) & 1u) != 0) put(0);
  }
  for (int32_t end = words; end > 0; end -= 32) {
    const int32_t w = end - 1 - lane;
    uint32_t bits = w >= 0 ? work.candidates(w) : 0;
    if constexpr (kRelative) {
      if (w == work.last / 32) bits &= ~(1u << (work.last % 32));
      if (w == 0) bits &= ~1u;
    } else {
      if (w >= 0) bits &= ~work.forced(w);
    }
    const int32_t until = inclusive_sum_of_lanes(__popc(bits));
    int32_t at = count + until - __popc(bits);
    for (; bits != 0; ++at) {
      const int bit = 31 - __clz(bits);
      bits ^= 1u << bit;
      entries[at] = static_cast<uint16_t>(w * 32 + bit);
    }
    count += __shfl_sync(kAllLanes, until, 31);
  }
  return count;
}

// Takes blocks off the list whose bits are set; one warp.
__device__ __forceinline__ List without_kept(const List& list, uint16_t* entries, const uint32_t* kept_words) {
  const int lane = threadIdx.x % 32;
  List left{0, 0};
  for (int32_t first = 0; first < list.count; first += 32) {
    const int32_t i = first + lane;
    const int32_t block = i < list.count ? entries[i] : 0;
    const bool stays = i < list.count && (kept_words[block / 32] >> (block % 32) & 1) == 0;
    const unsigned staying = __ballot_sync(kAllLanes, stays);
    // Never beyond what has been read.
    if (stays) entries[left.count + __popc(staying & ((1u << lane) - 1))] = static_cast<uint16_t>(block);
    left.count += __popc(staying);
    left.front += __popc(__ballot_sync(kAllLanes, stays && i < list.front));
  }
  return left;
}

// Fetches what the steps of a pass look at: two warps, one for each half of a slot.
template <class C>
class KeyLoader {
 public:
  __device__ KeyLoader(SharedStorage<C>& shared, const uint16_t* entries, const KernelParams& p, int half)
      : shared_(shared), entries_(entries), half_(half), lane_(threadIdx.x % 32) {
    const Work& work = shared.work;
    const int32_t kv_head = work.head / (p.problem.num_q_heads / p.problem.num_kv_heads);
    const int64_t first = kv_head * p.keys.blocks + p.keys.first_block(p.problem.kv, work.tile.sequence);
    images_ = p.keys.images + first * C::kImageBytes;
    facts_ = p.keys.facts + first;
  }

  // A lane for the keys, another one for the facts of their block.
  template <Pass kPass>
  __device__ void run() {
    constexpr int kKeyBytes = C::kImageBytes / 2;
    const List list = shared_.list;
    const bool keys = lane_ == 0;
    for (int32_t step = 0; step < list.steps<kPass>(); ++step) {
      const int32_t place = kPass == Pass::kSample ? list.sampled(step, half_) : list.template place<kPass>(step);
      const int32_t block = entries_[place];
      const uint8_t* image =
          images_ + int64_t{block} * C::kImageBytes + (kPass == Pass::kSample ? 0 : half_ * kKeyBytes);
      const void* source = keys ? static_cast<const void*>(image) : facts_ + block;
      void* target = keys ? static_cast<void*>(shared_.key[slot_.slot][half_]) : &shared_.facts[slot_.slot][half_];
      Mbarrier& full = shared_.key_full[slot_.slot];
      shared_.key_empty[slot_.slot].wait(slot_.parity ^ 1);
      if (lane_ == 0) full.arrive_expect(kKeyBytes + sizeof(BlockFacts));
      __syncwarp();
      if (lane_ < 2) {
        cute::SM90_BULK_COPY_G2S::copy(source, &full.state, target, keys ? kKeyBytes : sizeof(BlockFacts));
      }
      slot_.advance();
    }
    __syncwarp();
  }

 private:
  SharedStorage<C>& shared_;
  const uint16_t* entries_;
  const uint8_t* images_;
  const BlockFacts* facts_;
  const int half_;
  const int lane_;
  RingPosition<kStages> slot_;
};

}  // namespace bsfa::cuda::bound
