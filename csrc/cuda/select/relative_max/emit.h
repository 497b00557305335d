// The emitter warps: from a row of energies to its words and count, and to scores where they are asked for.
#pragma once

#include "../keep_row.h"
#include "config.h"

namespace bsfa::cuda::select {

// One row of the mask; what is not written by the constructor's user is zero. Warp-collective.
class Emitter {
 public:
  __device__ Emitter(const KernelParams& p, const Work& work)
      : p_(p),
        work_(work),
        lane_(threadIdx.x % 32),
        row_(int64_t{work.row} * p.select.score.score_heads() + work.head) {}

  // log2 of the energies of the visible blocks; null if nothing was scored.
  __device__ void emit(float* energy) const {
    float top = -INFINITY;
    if (energy != nullptr) {
#pragma unroll 4
      for (int32_t j = lane_; j < work_.visible; j += 32) top = fmaxf(top, energy[j]);
      for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, d));
    }
    if (p_.select.score.scores != nullptr) write_scores(energy, top);
    if (p_.select.words != nullptr) write_words(energy, top);
  }

 private:
  __device__ static float score(float energy, float top) {
    return top == -INFINITY && !isnan(energy) ? 0.0f : exp2f(energy - top);
  }

  __device__ void write_scores(const float* energy, float top) const {
    const int32_t blocks = p_.select.score.max_blocks;
    float* scores = p_.select.score.scores + row_ * blocks;
    for (int32_t j = lane_; j < blocks; j += 32) scores[j] = j < work_.visible ? score(energy[j], top) : -1.0f;
  }

  __device__ void write_words(float* energy, float top) const {
    const SelectParams& p = p_.select;
    const float threshold = work_.threshold;
    int32_t count;
    if (work_.everything || threshold < 0.0f) {
      count = for_each_word([](int32_t) { return true; });
    } else {
      count = for_each_word([&](int32_t j) {
        const float x = score(energy[j], top);
        return !(x < threshold || x <= 0.0f);
      });
      if (p_.rescue.stride > 0 || p_.rescue.parts > 0) {
        const int32_t tile = absolute_tile(work_.tile);
        count = for_each_word([&](int32_t j) { return kept(j) || p_.rescue(tile, j, work_.head); });
      }
      const int32_t at_least = best_blocks(p.min_blocks, p.min_ratio, work_.visible);
      if (at_least > 0) {
        // The row's energies are not needed any more: its scores take their place, as keys.
        auto* keys = reinterpret_cast<uint32_t*>(energy);
        for (int32_t j = lane_; j < work_.visible; j += 32) keys[j] = key_of(score(energy[j], top));
        __syncwarp();
        const Cut best = best_cut(Team<1>{lane_}, keys, work_.visible, at_least);
        count = for_each_word([&](int32_t j) { return kept(j) || best.keeps(keys[j], j); });
      }
    }
    if (lane_ == 0) p.counts[row_] = count;
  }

  // Whether an earlier for_each_word has kept block j.
  __device__ bool kept(int32_t j) const {
    return (static_cast<uint32_t>(p_.select.words[row_ * p_.select.num_words + j / 32]) >> (j % 32) & 1) != 0;
  }

  // Sets the bits of the visible blocks that `keeps` says or that are always kept, clears all others; returns the
  // number of bits. Four words at a time, so that one does not wait for another.
  template <class Keeps>
  __device__ int32_t for_each_word(const Keeps& keeps) const {
    constexpr int kAtOnce = 4;
    const int32_t num_words = p_.select.num_words, visible = work_.visible;
    int32_t* words = p_.select.words + row_ * num_words;
    const BlockRange sink{0, work_.always.sink_end}, window{work_.always.window_begin, work_.always.window_end};
    int32_t count = 0;
    for (int32_t first = 0; first < num_words; first += 32) {
      uint32_t mine = 0;  // word first + lane
      for (int32_t w = first; w < first + 32 && w * 32 < visible; w += kAtOnce) {
        uint32_t word[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int32_t j = (w + i) * 32 + lane_;
          word[i] = __ballot_sync(kAllLanes, j < visible && keeps(j));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (lane_ == w + i - first) mine = word[i];
        }
      }
      const int32_t at = first + lane_;
      mine |= sink.bits_of_word(at) | window.bits_of_word(at);
      count += __popc(mine);
      if (at < num_words) words[at] = static_cast<int32_t>(mine);
      __syncwarp();
    }
    return static_cast<int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(count)));
  }

  const KernelParams& p_;
  const Work& work_;
  const int lane_;
  const int64_t row_;
};

// Emitter `index` of kEmitters: its own are the items of every kEmitters-th energy slot, so that it sees every phase of
// their barriers, and every kEmitters-th of those that have no energies.
inline __device__ void emit(Control& control, float* energies, const KernelParams& p, int index) {
  const int lane = threadIdx.x % 32;
  RingPosition<kWorkSlots> slot;
  RuntimePosition energy{p.energy_slots};
  for (int turn = 0;; slot.advance()) {
    control.work_full[slot.slot].wait(slot.parity);
    const Work work = control.work[slot.slot];
    __syncwarp();
    if (lane == 0) control.work_empty[slot.slot].arrive();
    if (work.head < 0) return;
    const bool scored = work.steps > 0;
    if (scored) {
      if (energy.slot % kEmitters == index) {
        control.energy_full[energy.slot].wait(energy.parity);
        Emitter(p, work).emit(energies + energy.slot * p.energy_stride);
        __syncwarp();
        if (lane == 0) control.energy_empty[energy.slot].arrive();
      }
      energy.advance();
    } else {
      if (turn == index) Emitter(p, work).emit(nullptr);
      turn = (turn + 1) % kEmitters;
    }
  }
}

}  // namespace bsfa::cuda::select
