// The consumers of the kernel that skips: two warpgroups, 64 query rows each, over one stream of steps, as in
// compute.h. What differs: after its scores are made a step is kept or skipped (skip.h), and the loop is in one of two
// states.
//
//   nothing pending   issue S' = Q K', wait for it.            Skipped: on to the next step. Kept: softmax, P = S'.
//   P is pending      issue S' = Q K', issue O += P V, wait    Skipped: wait for O, nothing pending. Kept: softmax of
//                     for S'.                                  S' while P V is under way, O *= rescale, P = S'.
//
// The usual step, kept after a kept one, in the middle of a tile, has code of its own in which little is asked.
//
// The tile that a step ended is stored once its last product is done: at once where its last step was skipped.
#pragma once

#include "compute.h"
#include "skip.h"

namespace bsfa::cuda::attn::sm90 {

template <class Config>
class SkipConsumer : Consumer<Config> {
  using Base = Consumer<Config>;
  using Base::await_query, Base::await_step, Base::give_back_stored, Base::info_slot, Base::key_slot, Base::next_step,
      Base::next_tile, Base::query_slot, Base::scores_made;
  using Base::key_, Base::lane_, Base::p_, Base::rows_, Base::shared_, Base::stored_slot_, Base::value_, Base::warp_;

 public:
  __device__ SkipConsumer(SharedStorage<Config>& shared, const KernelParams& p)
      : Base(shared, p), ballot_(shared.skip, warp_, lane_) {}

  __device__ void run() {
    using namespace cute;
    typename Config::ScoreMma score_mma;
    typename Config::OutputMma output_mma;
    // Descriptors depend on the warpgroup alone. If that is not in a uniform register, each product brings its descriptor
    // of queries over from a vector register. (Attention that does not skip was 1 % slower so.)
    const int group = uniform(warp_ / 4);
    const auto parts = operand_parts<Config>(shared_, group * kWarpgroup);
    const auto query_part = get<0>(parts);
    const auto key_part = get<1>(parts);
    const auto value_part = get<2>(parts);

    auto s = partition_fragment_C(score_mma, Shape<Int<kTileRows>, Int<Config::kScoreKeys>>{});
    auto o = partition_fragment_C(output_mma, Shape<Int<kTileRows>, Int<Config::kHeadDimV>>{});
    auto probabilities = make_probabilities<Config>();

    Step step{0, 0};
    float rescale[2];
    bool kept = false;  // the last step: P holds its probabilities, V has not been multiplied yet
    bool empty = true;  // O holds nothing of the tile

    const auto issue_scores = [&]() __attribute__((always_inline)) {
      issue(score_mma, query_part(_, _, _, query_slot()), key_part(_, _, _, key_slot()), s, false);
    };
    const auto issue_product = [&]() __attribute__((always_inline)) {
      issue(output_mma, probabilities, value_part(_, _, _, value_.slot), o, !empty);
    };
    const auto take_scores = [&]() __attribute__((always_inline)) {
      warpgroup_fence_operand(s);
      scores_made(step);
      ++step_;
    };
    const auto finish_product = [&]() __attribute__((always_inline)) {
      warpgroup_fence_operand(s);
      warpgroup_wait<0>();
      warpgroup_fence_operand(o);
      done_with_value();
    };
    const auto scale_output = [&]() __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < size(o); ++i) o(i) *= rescale[i / 2 % 2];
    };

    for (;;) {
      // Between two tiles.
      give_back_for_next();
      await_step();
      if (read_step(shared_.steps[key_.slot]).flags & kEnd) break;
      bool more = true;
      if (kept) {  // of the tile before, whose last product goes beside the first scores of this one
        const int slot = query_slot(), info = info_slot();
        const SoftmaxRows finished = rows_;
        begin_tile(step);
        issue_scores();
        issue_product();
        step = read_step(shared_.steps[key_.slot]);
        warpgroup_wait<1>();
        take_scores();
        kept = decide(s, step);
        if (kept || counts(step)) softmax(s, step, rescale);
        finish_product();
        next_step(step);
        finish_tile(o, finished, slot, info);
        if (kept) convert(s, probabilities);
        more = !(step.flags & kLast);
      } else {
        begin_tile(step);
      }
      empty = true;
      while (more) {
        await_step();
        issue_scores();
        if (!kept) {
          if (step_ >= 0) done_with_value();  // of a step that was skipped
          step = read_step(shared_.steps[key_.slot]);
          warpgroup_wait<0>();
          take_scores();
          give_back_if_read();
          kept = decide(s, step);
          if (kept || counts(step)) {
            if (softmax(s, step, rescale)) scale_output();
          }
        } else {
          issue_product();
          empty = false;
          step = read_step(shared_.steps[key_.slot]);
          warpgroup_wait<1>();
          take_scores();
          if (__builtin_expect((step.flags | unusual_) == 0, 1)) {
            kept = decide_usual(s);
            if (__builtin_expect(kept, 1)) {
              const bool rescaled = softmax_usual(s, rescale);
              finish_product();
              next_step(step);
              if (rescaled) scale_output();
              convert(s, probabilities);
              continue;
            }
          } else {
            give_back_if_read();
            kept = decide(s, step);
          }
          const bool rescaled = (kept || counts(step)) && softmax(s, step, rescale);
          finish_product();
          if (rescaled) scale_output();
        }
        next_step(step);
        if (kept) convert(s, probabilities);
        more = !(step.flags & kLast);
      }
      count_tile();
      if (!kept) {
        if (empty) clear(o);
        finish_tile(o, rows_, query_slot(), info_slot());
      }
    }
    if (kept) {
      issue_product();
      finish_product();
      finish_tile(o, rows_, query_slot(), info_slot());
    }
    if (lane_ == 0) tma_store_wait<0>();  // shared memory must outlive the stores
  }

 private:
  // The slot of the tile that was stored last is given back one step after it was stored: by then TMA has read it. But
  // before the next tile's first step, if the queries of that one may want it.
  __device__ void give_back_if_read() {
    if (!just_stored_) give_back();
    just_stored_ = false;
  }
  __device__ void give_back_for_next() {
    if (stored_slot_ != query_slot()) give_back();
  }
  __device__ void give_back() {
    give_back_stored();
    unusual_ &= ~kStored;
  }

  // On to the tile after the one that `step` ended: its queries are waited for, and its rows have seen nothing.
  __device__ void begin_tile(const Step& step) {
    if (begun_) next_tile(step);
    begun_ = true;
    await_query();
    const TileInfo& info = shared_.tiles[info_slot()];
    const int first_row = warp_ * kStoreRows + lane_ / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = first_row + 8 * r;
      const bool foreign = row < info.tile.row_begin || row >= info.tile.row_end;
      rows_.base[r] = foreign ? INFINITY : -INFINITY;
      rows_.sum[r] = 0.0f;
      // Where thresholds are absolute no maximum is of interest.
      largest_[r] = p_.skip.relative && !foreign ? -INFINITY : INFINITY;
      limit_[r] = p_.skip.relative ? -INFINITY + info.cut : info.cut;
    }
    cut_ = info.cut;
    const int group = warp_ / 4 * kSkipRows;
    has_rows_ = info.tile.row_begin < group + kSkipRows && info.tile.row_end > group;
    const bool foreign_rows = info.tile.row_begin > group || info.tile.row_end < group + kSkipRows;
    unusual_ = foreign_rows ? unusual_ | kForeign : unusual_ & ~kForeign;
    complete_ = false;
    set_ceiling();
    first_step_ = step_;
    skipped_ = 0;
  }

  // The values of the step before are not wanted any more.
  __device__ __forceinline__ void done_with_value() {
    release(shared_.value_empty[value_.slot], lane_);
    value_.advance();
  }
  // Whether the exponentials of a step that is skipped are wanted.
  __device__ bool counts(const Step& step) const { return p_.skip.counted && !(step.flags & kNone); }

  // Whether the warpgroup keeps the step `step_`, whose scores are masked here; their rows' maxima go to top_.
  template <class Tensor>
  __device__ bool decide(Tensor& s, const Step& step) {
    if constexpr (Config::kTransform) {
      transform_scores(s, p_.scale);
    }
    if (__builtin_expect(step.flags & kMasked, 0)) {
      mask_scores(s, shared_.tiles[info_slot()].tile, step.first_key, warp_ * kStoreRows + lane_ / 4, p_.causal, -1);
    }
    bool keep = step.flags & kKeep;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top_[r] = max_of_row<true>(s, r);
      // A base of +inf: the row is not of the sequence.
      keep |= wants(r) & (rows_.base[r] != INFINITY);
    }
    keep = ballot_.decide(step_, keep & !(step.flags & kNone));
    if (step.flags & kNone) ++first_step_;  // is not met
    skipped_ += !keep & !(step.flags & kNone);
    if (keep) raise_largest();
    return keep;
  }

  // The same for a step without flags.
  template <class Tensor>
  __device__ __forceinline__ bool decide_usual(Tensor& s) {
    if constexpr (Config::kTransform) {
      transform_scores(s, p_.scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) top_[r] = max_of_row<true>(s, r);
    const bool keep = ballot_.decide(step_, wants(0) | wants(1));
    if (__builtin_expect(!keep, 0)) ++skipped_;
    return keep;
  }

  // Whether row r keeps the step. A NaN is not below its limit.
  __device__ __forceinline__ bool wants(int r) const { return !(top_[r] < limit_[r]); }

  // After a step that is kept.
  __device__ __forceinline__ void raise_largest() {
    if (!__any_sync(kAllLanes, (top_[0] > largest_[0]) | (top_[1] > largest_[1]))) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest_[r] = fmaxf(largest_[r], max_over_quad(top_[r]));
      limit_[r] = largest_[r] + cut_;
    }
  }

  // What a score of row r has to stay below, or something is raised.
  __device__ __forceinline__ void set_ceiling() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ceiling_[r] = fminf(largest_[r], (rows_.base[r] + kHeadroom) * p_.scale.inverse_scale_log2);
    }
  }

  // Turns scores into exponentials. True if what was summed before must be multiplied by `rescale`.
  template <class Tensor>
  __device__ bool softmax(Tensor& s, const Step& step, float (&rescale)[2]) {
    bool raise = true;
    if (!(step.flags & kMasked) && complete_) {
      raise = outgrown(top_, rows_, p_.scale.inverse_scale_log2);
      if (raise) raise_base(top_, rows_, rescale, p_.scale.scale_log2);
      add_exponentials(s, rows_, p_.scale.scale_log2);
    } else {
      complete_ = softmax_any(s, top_, rows_, rescale, false, p_.scale.scale_log2);
    }
    set_ceiling();
    return raise;
  }

  // The same for a step without flags that is kept.
  template <class Tensor>
  __device__ __forceinline__ bool softmax_usual(Tensor& s, float (&rescale)[2]) {
    bool raise = false;
    // The ceiling of a row that has seen no key is -inf, and nothing is below it.
    if (__builtin_expect(__any_sync(kAllLanes, !(top_[0] < ceiling_[0]) | !(top_[1] < ceiling_[1])), 0)) {
      raise_largest();
      if (!complete_) {
        complete_ = softmax_any(s, top_, rows_, rescale, false, p_.scale.scale_log2);
        set_ceiling();
        return true;
      }
      raise = outgrown(top_, rows_, p_.scale.inverse_scale_log2);
      if (raise) raise_base(top_, rows_, rescale, p_.scale.scale_log2);
      set_ceiling();
    }
    add_exponentials(s, rows_, p_.scale.scale_log2);
    return raise;
  }

  // Adds what the tile met and skipped to the counters of its head.
  __device__ void count_tile() const {
    if (warp_ % 4 != 0 || lane_ != 0 || !has_rows_) return;
    unsigned long long* counts = p_.skip.counts + 2 * shared_.tiles[info_slot()].head;
    atomicAdd(counts, static_cast<unsigned long long>(step_ - first_step_));
    atomicAdd(counts + 1, static_cast<unsigned long long>(skipped_));
  }

  template <class Tensor>
  __device__ void finish_tile(const Tensor& o, const SoftmaxRows& rows, int slot, int info) {
    give_back();
    Base::finish_tile(o, rows, slot, info);
    __syncwarp();
    just_stored_ = true;
    unusual_ |= kStored;
  }

  const Ballot<Config> ballot_;
  int32_t step_ = -1;  // number of the step
  float top_[2];       // of the rows in the step, of this thread's scores
  float largest_[2];   // of the rows, over the steps met and not skipped; +inf where that is of no interest
  float limit_[2];     // a score below it does not keep a step
  float ceiling_[2];
  float cut_ = 0.0f;
  bool begun_ = false;      // some tile
  bool has_rows_ = false;   // some of the warpgroup's rows are of the sequence
  int32_t first_step_ = 0;  // number of the step before the tile's first one that counts
  uint32_t skipped_ = 0;    // steps of the tile
  bool complete_ = false;   // every row of this warp has seen a key
  // Why a step without flags needs more than the usual code: some rows of the warpgroup are not of the sequence; a
  // stored tile's slot is to be given back. The same for all its warps: they wait for products at one place.
  static constexpr uint32_t kForeign = 1u << 30, kStored = 1u << 31;
  uint32_t unusual_ = 0;
  bool just_stored_ = false;
};

}  // namespace bsfa::cuda::attn::sm90
