// The consumers: two warpgroups, 64 query rows each, over one stream of steps (a step is one KV block of one tile).
//
// The stream does not stop between tiles. While the product P V of a step is under way, the scores of the next step are
// made and turned into exponentials, also when that next step begins another tile; the finished tile is stored in
// between.
//
//   issue S' = Q K'      scores of the next step          (tensor cores)
//   issue O += P V       of the current step              (tensor cores)
//   softmax of S'        while P V is under way
//   current step was its tile's last: O in 16 bits, beside the exponentials, and stored; else O *= rescale
//   P = S' in 16 bits    packed: beside the next step's S'
//
// The warpgroups run freely, and by themselves fall into a step in which one's products run under the other's softmax.
// Issuing in turns ("pingpong", by named barriers) only cost time.
#pragma once

#include "../../common/mma.h"
#include "../../common/steps.h"
#include "operands.h"
#include "softmax.h"
#include "store.h"

namespace bsfa::cuda::attn::sm90 {

// Which tile it is, in one register: the position in the ring of its queries, and the slot of what is known of it.
template <class Config>
class TilePosition {
 public:
  __device__ int query() const { return kOneQuery ? 0 : info(); }
  __device__ uint32_t parity() const { return kOneQuery ? at_ % 2 : at_ >= kSlots; }
  __device__ int info() const { return at_ < kSlots ? at_ : at_ - kSlots; }
  __device__ void advance() { at_ = at_ + 1 == 2 * kSlots ? 0 : at_ + 1; }

 private:
  static constexpr int kSlots = Config::kInfoSlots;
  static constexpr bool kOneQuery = Config::kQuerySlots == 1;
  static_assert(kOneQuery || Config::kQuerySlots == kSlots);
  int at_ = 0;
};

template <class Config>
class Consumer {
 public:
  __device__ Consumer(SharedStorage<Config>& shared, const KernelParams& p)
      : shared_(shared),
        p_(p),
        thread_(threadIdx.x - kWarpgroup),
        warp_(__shfl_sync(kAllLanes, thread_ / 32, 0)),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    using namespace cute;
    typename Config::ScoreMma score_mma;
    typename Config::OutputMma output_mma;
    const auto parts = operand_parts<Config>(shared_, thread_);
    const auto query_part = get<0>(parts);
    const auto key_part = get<1>(parts);
    const auto value_part = get<2>(parts);

    auto s = partition_fragment_C(score_mma, Shape<Int<kTileRows>, Int<Config::kScoreKeys>>{});
    auto o = partition_fragment_C(output_mma, Shape<Int<kTileRows>, Int<Config::kHeadDimV>>{});
    auto probabilities = make_probabilities<Config>();
    Packed packed;

    float rescale[2];

    // The first step of all.
    await_step();
    Step step = read_step(shared_.steps[key_.slot]);
    if (step.flags & kEnd) return;
    await_query();
    issue(score_mma, query_part(_, _, _, query_slot()), key_part(_, _, _, key_slot()), s, false);
    read_tokens();
    warpgroup_wait<0>();
    warpgroup_fence_operand(s);
    scores_made(step);
    next_step(step);
    softmax(s, step, rescale, packed);
    if constexpr (!kPacked) convert(s, probabilities);

    const auto begin_output = [&](bool accumulate) __attribute__((always_inline)) {
      if constexpr (kPacked) move(packed, probabilities);
      issue(output_mma, probabilities, value_part(_, _, _, value_.slot), o, accumulate);
    };
    // The scores of the next step, beside the product of this one, which is its tile's first or not.
    const auto begin = [&](bool first) __attribute__((always_inline)) {
      issue(score_mma, query_part(_, _, _, query_slot()), key_part(_, _, _, key_slot()), s, false);
      begin_output(!first);
      step = read_step(shared_.steps[key_.slot]);
      read_tokens();
    };
    const auto end_scores = [&]() __attribute__((always_inline)) {
      warpgroup_wait<1>();
      warpgroup_fence_operand(s);
      scores_made(step);
    };
    const auto end_output = [&]() __attribute__((always_inline)) {
      warpgroup_fence_operand(s);
      warpgroup_wait<0>();
      warpgroup_fence_operand(o);
      release(shared_.value_empty[value_.slot], lane_);
      next_step(step);  // here, and not before the softmax, which is 2 % slower
      value_.advance();
    };

    for (;;) {
      bool first = true;
      while (!(step.flags & kLast)) {
        await_step();
        begin(first);
        end_scores();
        const bool rescaled = softmax(s, step, rescale, packed);
        end_output();
        if constexpr (!kPacked) convert(s, probabilities);
        if (rescaled) {
#pragma unroll
          for (int i = 0; i < size(o); ++i) o(i) *= rescale[i / 2 % 2];
        }
        if (first) give_back_stored();
        first = false;
      }
      give_back_stored();  // of a tile of one step; the next tile's queries may want the slot
      const int finished_slot = query_slot(), finished_info = info_slot();
      next_tile(step);
      await_step();
      if (__any_sync(kAllLanes, shared_.steps[key_.slot].flags & kEnd)) {
        begin_output(!first);
        warpgroup_wait<0>();
        warpgroup_fence_operand(o);
        finish_tile(o, rows_, finished_slot, finished_info);
        if (Config::kStaged && lane_ == 0) tma_store_wait<0>();  // shared memory must outlive the stores
        return;
      }
      await_query();
      begin(first);
      // Of the tile before, beside the products.
      const RowEnds ends(rows_);
      end_scores();
      float minus[2];
      const bool half = sees_half(step);
      if (is_usual(step)) {
        // Never, at a tile's first step. But without this branch ptxas gives up uniform registers in the loop above: 48
        // R2UR instead of 16, and a tenth of the time.
        minus[0] = -rows_.base[0];
        minus[1] = -rows_.base[1];
      } else {
        begin_rows(s, step, half, minus);
      }
      end_output();
      const Destination to(shared_.tiles[finished_info]);
      const auto pair = [&](int i) { return ends.template pair<typename Config::Element>(o, i); };
      if constexpr (kPacked) {
        using Element = typename Config::Element;
        constexpr int kPairs = size(decltype(s){}) / 2;
        PackedOutputs<Config> pairs;
        const auto convert_pair = [&](int i) { pairs(i) = pair(i); };
        if (half) {
          exponentials_packed<Element, kPairs / 2>(s, p_.scale.scale_log2, minus, packed, rows_.sum, convert_pair);
        } else {
          exponentials_packed<Element, kPairs>(s, p_.scale.scale_log2, minus, packed, rows_.sum, convert_pair);
        }
        store_pairs([&](int i) { return pairs(i); }, ends, finished_slot, to);
      } else {
        exponentials(s, p_.scale.scale_log2, minus, rows_.sum);
        convert(s, probabilities);
        store_pairs(pair, ends, finished_slot, to);
      }
    }
  }

 protected:
  // The step's K, the V of the one before, and the step itself have arrived.
  __device__ void await_step() const { shared_.full[key_.slot].wait(key_.parity); }
  __device__ void await_query() const { shared_.query_full[tile_.query()].wait(tile_.parity()); }
  // Where what is known of the current tile lies.
  __device__ int info_slot() const { return tile_.info(); }
  // Where the tile's queries lie, and the step's keys.
  __device__ int query_slot() const { return Config::kPool ? query_slot_ : tile_.query(); }
  __device__ int key_slot() const { return Config::kPool ? key_slot_ : key_.slot; }
  __device__ Mbarrier& query_empty(int slot) const {
    return Config::kPool ? shared_.key_empty[slot] : shared_.query_empty[slot];
  }
  // To the step after `step`, and to the tile after the one that `step` ended. In a pool `step` says where they lie,
  // in uniform registers, where descriptors want that.
  __device__ void next_step(const Step& step) {
    key_.advance();
    if constexpr (Config::kPool) key_slot_ = uniform(step.flags >> kFirstSlotShift);
  }
  __device__ void next_tile(const Step& step) {
    tile_.advance();
    if constexpr (Config::kPool) {
      query_slot_ = key_slot_;
      key_slot_ = uniform(step.flags >> kSecondSlotShift & (kPoolSlots - 1));
    }
  }

  // The step's keys are done with, and so are the tile's queries after its last step, unless their slot is still wanted
  // for the output.
  __device__ void scores_made(const Step& step) {
    release(shared_.key_empty[key_slot()], lane_);
    if constexpr (!Config::kStaged) {
      if (step.flags & kLast) release(query_empty(tile_.query()), lane_);
    }
  }

  // The step's words of the token mask, before its slot is given back.
  __device__ void read_tokens() {
    if constexpr (Config::kTokens) {
      tokens_.read(shared_.tokens.key[key_.slot], warp_ * kStoreRows + lane_ / 4);
    }
  }

  // All scores of the step count, and all rows of this warp have a base.
  __device__ bool is_usual(const Step& step) const { return !(step.flags & (kFirst | kMasked)) && rows_complete_; }

  template <class Tensor>
  __device__ __forceinline__ void prepare_scores(Tensor& s) const {
    if constexpr (Config::kTransform) transform_scores(s, p_.scale);
    if constexpr (Config::kTokens) {
      if (!__all_sync(kAllLanes, tokens_.all())) mask_tokens(s, tokens_);
    }
  }

  // Exponentials are packed as they are made, beside the product that still reads the probabilities of the step before.
  // They take their place when the next scores are begun, whose registers are free by then.
  static constexpr bool kPacked = Config::kPool;  // elsewhere registers run out
  struct NotPacked {};
  using Packed = std::conditional_t<kPacked, PackedScores<Config>, NotPacked>;
  template <class Tensor>
  __device__ bool softmax(Tensor& s, const Step& step, float (&rescale)[2], Packed& packed) {
    if constexpr (!kPacked) {
      return softmax(s, step, rescale);
    } else {
      prepare_scores(s);
      if (is_usual(step)) {
        return softmax_packed<typename Config::Element>(s, rows_, rescale, p_.scale.scale_log2, packed);
      }
      const bool rescaled = softmax_unusual(s, step, rescale);
      pack_all<typename Config::Element>(s, packed);
      return rescaled;
    }
  }

  // Of the step's keys, or a part of them. True if what was summed before must be multiplied by `rescale`.
  template <class Tensor>
  __device__ bool softmax(Tensor& s, const Step& step, float (&rescale)[2], int part = 0) {
    prepare_scores(s);
    if (is_usual(step)) {
      bool raise = may_have_outgrown(s, rows_, p_.scale.inverse_scale_log2);
      if (raise) {
        const float top[2] = {max_of_row(s, 0), max_of_row(s, 1)};
        raise = outgrown(top, rows_, p_.scale.inverse_scale_log2);
        if (raise) raise_base(top, rows_, rescale, p_.scale.scale_log2);
      }
      add_exponentials(s, rows_, p_.scale.scale_log2);
      return raise;
    }
    return softmax_unusual(s, step, rescale, part);
  }

  template <class Tensor>
  __device__ void mask(Tensor& s, const Step& step, int part) const {
    if (step.flags & kMasked) {
      const TileRow& tile = shared_.tiles[info_slot()].tile;
      const int first_row = warp_ * kStoreRows + lane_ / 4;
      if (step.flags & kDiagonal) {
        mask_diagonal<0, kColumnTiles<Tensor>>(s, first_row, part * Config::kScoreKeys);
      } else if (step.flags & kMeans) {
        const Columns& columns = shared_.columns[step.flags >> kColumnsShift & kColumnsMask];
        weigh_means(s, tile, step.first_key, columns, part, first_row, p_.scale.inverse_scale_log2);
      } else {
        mask_scores(s, tile, step.first_key + part * Config::kScoreKeys, first_row, p_.causal, p_.window_left);
      }
    }
  }

  template <class Tensor>
  __device__ bool softmax_unusual(Tensor& s, const Step& step, float (&rescale)[2], int part = 0) {
    mask(s, step, part);
    const float top[2] = {max_of_row(s, 0), max_of_row(s, 1)};
    rows_complete_ = softmax_any(s, top, rows_, rescale, (step.flags & kFirst) && part == 0, p_.scale.scale_log2);
    return true;
  }

  // Of a tile's first step: whether its second half is hidden from all rows of this warpgroup, and not looked at.
  __device__ bool sees_half(const Step& step) const {
    return kPacked && (step.flags & kDiagonal) && warp_ < kConsumerWarps / kConsumers;
  }

  // What of a tile's first step comes before its exponentials.
  template <class Tensor>
  __device__ void begin_rows(Tensor& s, const Step& step, bool half, float (&minus)[2]) {
    constexpr int kHalf = kColumnTiles<Tensor> / 2;
    prepare_scores(s);
    float top[2];
    if (half) {
      mask_diagonal<0, kHalf>(s, warp_ * kStoreRows + lane_ / 4, 0);
      top[0] = max_of_row<false, kHalf>(s, 0);
      top[1] = max_of_row<false, kHalf>(s, 1);
    } else {
      if (kPacked && (step.flags & kDiagonal)) {
        mask_diagonal<kHalf, 2 * kHalf>(s, warp_ * kStoreRows + lane_ / 4, 0);  // rows that see the first half
      } else {
        mask(s, step, 0);
      }
      top[0] = max_of_row(s, 0);
      top[1] = max_of_row(s, 1);
    }
    float rescale[2];
    rows_complete_ = raise_any(top, rows_, rescale, minus, true, p_.scale.scale_log2);
  }

  template <class Tensor>
  __device__ __forceinline__ void finish_tile(const Tensor& o, const SoftmaxRows& rows, int slot, int info) {
    const RowEnds ends(rows);
    const auto pair = [&](int i) { return ends.template pair<typename Config::Element>(o, i); };
    store_pairs(pair, ends, slot, Destination(shared_.tiles[info]));
  }

  template <class Pair>
  __device__ __forceinline__ void store_pairs(const Pair& pair, const RowEnds& ends, int slot, const Destination& to) {
    char* buffer;
    if constexpr (Config::kPool) {
      buffer = shared_.key[slot];
    } else {
      buffer = shared_.query[Config::kStaged ? slot : 0];
    }
    store_tile<Config>(buffer, p_, to, warp_, ends, pair);
    if (Config::kStaged) stored_slot_ = slot;
  }

  // Gives the slot of the last stored tile back, one step after it was stored: by then TMA has read it.
  __device__ void give_back_stored() {
    if (stored_slot_ < 0) return;
    release_stored(query_empty(stored_slot_), lane_);
    stored_slot_ = -1;
  }

  SharedStorage<Config>& shared_;
  const KernelParams& p_;
  const int thread_;
  const int warp_;
  const int lane_;
  TilePosition<Config> tile_;
  RingPosition<Config::kKeySlots> key_;
  RingPosition<Config::kValueSlots> value_;
  int query_slot_ = kFirstQuery, key_slot_ = kFirstKey;  // in the pool
  std::conditional_t<Config::kTokens, RowTokens, NoTokenStorage> tokens_;
  SoftmaxRows rows_{};
  bool rows_complete_ = false;  // every row of this warp has seen a key
  int stored_slot_ = -1;        // query slot of the tile that was stored last, until it is given back
};

}  // namespace bsfa::cuda::attn::sm90
