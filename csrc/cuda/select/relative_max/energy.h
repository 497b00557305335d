// The consumer warpgroups: energies of 64 KV blocks for one query tile at a time.
//
//   E_J = sum over the tile's rows r that see all of block J of 2^x[r, J],  x = scale_log2 * f(q_r . kbar_J)
//
// kept as log2 E_J, so that nothing overflows and no maximum has to be agreed on between warps. Accumulators of m64n8
// tiles: element 4 * j + 2 * r + c is KV block lane / 4 + 8 * r of the warp's 16 and query row
// 8 * j + 2 * (lane % 4) + c: a block is spread over the four lanes of a quad.
//
// The steps of an item are dealt out to the warpgroups in turn, where the item before has stopped: while one waits for
// its product, the others make exponentials. All heads of an item go to the same warpgroups, so that a block's energy
// has one owner.
#pragma once

#include "../../common/mma.h"
#include "config.h"

namespace bsfa::cuda::select {

constexpr int kScores = kTileRows / 2;  // per thread
constexpr int kColumnTiles = kTileRows / 8;

template <class Config>
class Consumer {
  using Element = typename Config::Element;

 public:
  __device__ Consumer(const Shared<Config>& shared, const KernelParams& p)
      : shared_(shared),
        control_(shared.control),
        p_(p),
        warp_(uniform(threadIdx.x / 32) - 4),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    using namespace cute;
    typename Config::Mma mma;
    const auto slice = mma.get_thread_slice(threadIdx.x % kWarpgroup);
    const auto tensor_of = [](char* p, auto layout) {
      return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(p)), layout);
    };
    const auto means = slice.partition_fragment_A(tensor_of(shared_.mean, typename Config::MeanLayout{}));
    const auto queries = slice.partition_fragment_B(tensor_of(shared_.query, typename Config::QueryLayout{}));
    auto s = partition_fragment_C(mma, Shape<Int<kStepBlocks>, Int<kTileRows>>{});
    static_assert(size(decltype(s){}) == kScores);

    const int warpgroup = warp_ / 4;
    RingPosition<kWorkSlots> slot;
    RuntimePosition query{p_.query_slots}, energy{p_.energy_slots};
    uint32_t passed = 0;  // steps of all items and heads before this one
    int turn = 0;         // the warpgroup that the next item begins with
    for (;; slot.advance()) {
      control_.work_full[slot.slot].wait(slot.parity);
      const Work& work = control_.work[slot.slot];
      const int32_t steps = uniform(work.steps);
      const bool end = uniform(work.head) < 0;
      const Item item{work.tile.position, work.tile.row_begin, work.tile.row_end, work.tile.seqlen_k,
                      uniform(work.visible)};
      __syncwarp();
      if (lane_ == 0) control_.work_empty[slot.slot].arrive();
      if (end) return;
      if (steps == 0) continue;
      control_.energy_empty[energy.slot].wait(energy.parity ^ 1);
      const int first = (warpgroup - turn) & (kConsumers - 1);
      for (int head = 0; head < p_.heads_per_score_head; ++head) {
        control_.query_full[query.slot].wait(query.parity);
        if (first >= steps && lane_ == 0) control_.query_empty[query.slot].arrive();
        for (int i = first; i < steps; i += kConsumers) {
          const uint32_t step = passed + i, mean = step % kMeanSlots;
          control_.mean_full[mean].wait(step / kMeanSlots % 2);
          issue(mma, means(_, _, _, mean), queries(_, _, _, query.slot), s, false);
          warpgroup_wait<0>();
          warpgroup_fence_operand(s);
          if (lane_ == 0) {
            control_.mean_empty[mean].arrive();
            if (i + kConsumers >= steps) control_.query_empty[query.slot].arrive();
          }
          take_in(s, item, i * kStepBlocks + warp_ % 4 * kWarpBlocks, shared_.energy + energy.slot * p_.energy_stride,
                  head > 0);
        }
        passed += steps;
        query.advance();
      }
      turn = (turn + steps) & (kConsumers - 1);
      __syncwarp();
      if (lane_ == 0) control_.energy_full[energy.slot].arrive();
      energy.advance();
    }
  }

 private:
  // What is to be known of an item.
  struct Item {
    int32_t position, row_begin, row_end, seqlen_k;
    int32_t visible;
  };

  static __device__ int32_t uniform(int32_t x) { return __shfl_sync(kAllLanes, x, 0); }

  // Energies of the warp's 16 blocks from first_block on; `merge`: with those of the heads before.
  template <class Tensor>
  __device__ __forceinline__ void take_in(Tensor& s, const Item& item, int32_t first_block, float* energies,
                                          bool merge) const {
    if (first_block >= item.visible) return;
    if constexpr (Config::kTransform) transform_scores(s, p_.scale);
    const int32_t own = p_.select.score.problem.causal ? item.position / kBlockKeys : -1;
    const bool whole = item.row_begin == 0 && item.row_end == kTileRows;
    if (!whole || (own >= first_block && own < first_block + kWarpBlocks)) mask(s, item, first_block, own);
    float value[2];
    log_energies(s, value);
    if (lane_ % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float& target = energies[first_block + lane_ / 4 + 8 * r];
      target = merge ? log_sum(target, value[r]) : value[r];
    }
  }

  // Rows that are not of the sequence, and rows that do not see all of their own block, do not count.
  template <class Tensor>
  __device__ void mask(Tensor& s, const Item& item, int32_t first_block, int32_t own) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t block = first_block + lane_ / 4 + 8 * r;
      int32_t begin = item.row_begin;
      if (block == own) begin = max(begin, min((block + 1) * kBlockKeys, item.seqlen_k) - 1 - item.position);
      const int32_t low = begin - 2 * (lane_ % 4), high = item.row_end - 2 * (lane_ % 4);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s(4 * j + 2 * r + c);
          x = 8 * j + c >= low && 8 * j + c < high ? x : -INFINITY;
        }
      }
    }
  }

  // log2 of the sums of 2^(scale * s) over the thread's two rows of the tile; NaN if one is. Sums are made of the powers
  // as they are. Only where one may have left float32's range are they taken relative to the block's largest score;
  // which of the two a block gets is decided by its own scores alone.
  template <class Tensor>
  __device__ __forceinline__ void log_energies(const Tensor& s, float (&value)[2]) const {
    constexpr float kLow = 0x1p-90f, kHigh = 0x1p+126f;
    const float none[2] = {0.0f, 0.0f};
    float sum[2];
    sum_powers(s, none, sum);
    const bool safe[2] = {sum[0] > kLow && sum[0]<kHigh, sum[1]> kLow && sum[1] < kHigh};
#pragma unroll
    for (int r = 0; r < 2; ++r) value[r] = log2f(sum[r]);
    if (__all_sync(kAllLanes, safe[0] && safe[1])) return;
    float minus[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) top = fmaxf(top, fmaxf(s(4 * j + 2 * r), s(4 * j + 2 * r + 1)));
      top = max_over_quad(top);
      minus[r] = top == -INFINITY ? 0.0f : -top * p_.scale.scale_log2;
    }
    sum_powers(s, minus, sum);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!safe[r]) value[r] = log2f(sum[r]) - minus[r];
    }
  }

  // Sums over a quad's scores of 2^(scale * s + plus), of the thread's two blocks.
  template <class Tensor>
  __device__ __forceinline__ void sum_powers(const Tensor& s, const float (&plus)[2], float (&sum)[2]) const {
    const float scale = p_.scale.scale_log2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sums[2] = {};
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) sums[c] += exp2f(s(4 * j + 2 * r + c) * scale + plus[r]);
      }
      sum[r] = sum_over_quad(sums[0] + sums[1]);
    }
  }

  static __device__ float log_sum(float a, float b) {
    const float top = fmaxf(a, b);
    if (top == -INFINITY) return a + b;  // -inf, or NaN if one is
    return top + log2f(exp2f(a - top) + exp2f(b - top));
  }

  const Shared<Config>& shared_;
  Control& control_;
  const KernelParams& p_;
  const int warp_;  // among the consumers
  const int lane_;
};

}  // namespace bsfa::cuda::select
