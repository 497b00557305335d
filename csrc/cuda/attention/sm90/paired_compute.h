// The consumers where two CTAs share an SM (ctas_per_sm in config.h). Four warpgroups fill each other's waits there, so
// each does one thing after the other, and needs few registers: the scores of half a block, the same as probabilities,
// and the output.
//
//   for both halves of the step's keys:
//     S = Q K           wait for it
//     softmax of S; O *= rescale
//     P = S in 16 bits, in the registers of S
//     O += P V          wait for it
//   was it the tile's last step: store O
//
// Making the next S beside P V would take the registers of both: ptxas then serialises all products (C7512).
#pragma once

#include "compute.h"

namespace bsfa::cuda::attn::sm90 {

template <class Config>
class PairedConsumer : public Consumer<Config> {
 public:
  using Consumer<Config>::Consumer;

  __device__ void run() {
    using namespace cute;
    constexpr int kParts = kBlockKeys / Config::kScoreKeys;
    typename Config::ScoreMma score_mma;
    typename Config::OutputMma output_mma;
    const auto parts = operand_parts<Config>(this->shared_, this->thread_);
    const auto query_part = get<0>(parts);
    const auto key_part = get<1>(parts);
    const auto value_part = get<2>(parts);

    auto s = partition_fragment_C(score_mma, Shape<Int<kTileRows>, Int<Config::kScoreKeys>>{});
    auto o = partition_fragment_C(output_mma, Shape<Int<kTileRows>, Int<Config::kHeadDimV>>{});
    auto probabilities = make_probabilities<Config>();
    auto& shared = this->shared_;

    for (;;) {
      this->await_step();
      Step step = read_step(shared.steps[this->key_.slot]);
      if (step.flags & kEnd) break;
      this->await_query();
      bool empty = true;  // nothing in O yet
      for (;;) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          // Half of a block on the diagonal, for the upper warpgroup.
          if (part > 0 && (step.flags & kMasked) && unseen(step, part)) {
            if (part == kParts - 1) this->scores_made(step);
            continue;
          }
          issue(score_mma, query_part(_, _, _, this->tile_.query()), key_part(_, _, _, kParts * this->key_.slot + part),
                s, false);
          warpgroup_wait<0>();
          warpgroup_fence_operand(s);
          if (part == kParts - 1) this->scores_made(step);
          float rescale[2];
          if (this->softmax(s, step, rescale, part) && !empty) {
#pragma unroll
            for (int i = 0; i < size(o); ++i) o(i) *= rescale[i / 2 % 2];
          }
          convert(s, probabilities);
          if (part == 0) {
            this->give_back_stored();
            // With the next step this one's values come.
            RingPosition<Config::kKeySlots> next = this->key_;
            next.advance();
            shared.full[next.slot].wait(next.parity);
          }
          issue(output_mma, probabilities, value_part(_, _, _, kParts * this->value_.slot + part), o, !empty);
          warpgroup_wait<0>();
          warpgroup_fence_operand(o);
          empty = false;
        }
        release(shared.value_empty[this->value_.slot], this->lane_);
        this->value_.advance();
        this->key_.advance();
        if (step.flags & kLast) break;
        step = read_step(shared.steps[this->key_.slot]);
      }
      this->finish_tile(o, this->rows_, this->query_slot(), this->info_slot());
      this->tile_.advance();
    }
    if (this->lane_ == 0) tma_store_wait<0>();  // shared memory must outlive the stores
  }

 private:
  // Whether this part's keys lie past all rows of the warpgroup.
  __device__ bool unseen(const Step& step, int part) const {
    const int end = this->warp_ / 4 * kGroupEnd + kGroupEnd;
    const int32_t position = this->shared_.tiles[this->info_slot()].tile.position;
    const bool past =
        this->p_.causal && !(step.flags & kMeans) && step.first_key + part * Config::kScoreKeys >= position + end;
    return __shfl_sync(kAllLanes, past, 0);
  }

  static constexpr int kGroupEnd = kTileRows / kConsumers;
};

}  // namespace bsfa::cuda::attn::sm90
