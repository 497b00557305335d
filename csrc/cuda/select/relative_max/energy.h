// The consumer warpgroups: energies of 128 KV blocks for one query tile.
//
//   E_J = sum over the tile's rows r that see all of block J of 2^x[r, J],  x = scale_log2 * f(q_r . kbar_J)
//
// kept as log2 E_J, so that nothing overflows and no maximum has to be agreed on between warps. Accumulators of m64n8
// tiles: element 4 * j + 2 * r + c is KV block lane / 4 + 8 * r of the warp's 16 and query row 8 * j + 2 * (lane % 4) + c:
// a block is spread over the four lanes of a quad.
//
// While the energies of one step are made, the product of the next is under way, also across tiles.
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
  __device__ Consumer(SharedStorage<Config>& shared, const KernelParams& p)
      : shared_(shared),
        p_(p),
        thread_(threadIdx.x - kWarpgroup),
        warp_(__shfl_sync(0xffffffffu, thread_ / 32, 0)),
        lane_(threadIdx.x % 32),
        energy_{p.energy_slots} {}

  __device__ void run() {
    using namespace cute;
    typename Config::Mma mma;
    const auto tiles_of = [](char* p, auto stages) {
      using Layout = typename Config::RowsLayout;
      return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(p)),
                         tile_to_shape(Layout{}, make_shape(size<0>(Layout{}), size<1>(Layout{}), stages)));
    };
    const auto slice = mma.get_thread_slice(thread_);
    const auto means = slice.partition_fragment_A(tiles_of(shared_.mean[0], Int<kMeanSlots>{}));
    const auto queries = slice.partition_fragment_B(tiles_of(shared_.query[0], Int<kQuerySlots>{}));
    auto even = partition_fragment_C(mma, Shape<Int<kStepBlocks>, Int<kTileRows>>{});
    auto odd = partition_fragment_C(mma, Shape<Int<kStepBlocks>, Int<kTileRows>>{});
    static_assert(size(decltype(even){}) == kScores);

    // The step that await_step has seen is begun in `s`; returns it.
    const auto begin = [&](auto& s) __attribute__((always_inline)) {
      Step step = shared_.steps[mean_.slot];
      step.flags = flags_;
      if (flags_ & kFirst) {
        if (started_) query_.advance();
        started_ = true;
        shared_.query_full[query_.slot].wait(query_.parity);
      }
      issue(mma, means(_, _, _, mean_.slot), queries(_, _, _, query_.slot), s, false);
      mean_.advance();
      return Begun{step.first_block, step.flags, query_.slot};
    };
    // Takes in the step in `s`, while the one begun after it is under way.
    const auto finish = [&](auto& s, const Begun& step) __attribute__((always_inline)) {
      warpgroup_fence_operand(s);
      if (lane_ == 0) shared_.mean_empty[done_.slot].arrive();
      done_.advance();
      take_in(s, step);
    };

    await_step();
    if (flags_ & kEnd) return;
    Begun first = begin(even), second;
    for (;;) {
      await_step();
      if (flags_ & kEnd) {
        warpgroup_wait<0>();
        finish(even, first);
        return;
      }
      second = begin(odd);
      warpgroup_wait<1>();
      finish(even, first);
      await_step();
      if (flags_ & kEnd) {
        warpgroup_wait<0>();
        finish(odd, second);
        return;
      }
      first = begin(even);
      warpgroup_wait<1>();
      finish(odd, second);
    }
  }

 private:
  struct Begun {
    int32_t first_block;
    uint32_t flags;
    int query_slot;
  };

  __device__ void await_step() {
    shared_.mean_full[mean_.slot].wait(mean_.parity);
    flags_ = __shfl_sync(0xffffffffu, shared_.steps[mean_.slot].flags, 0);  // makes branches on it uniform
  }

  template <class Tensor>
  __device__ __forceinline__ void take_in(Tensor& s, const Begun& step) {
    const QueryInfo& info = shared_.queries[step.query_slot];
    const auto uniform = [](int32_t x) { return __shfl_sync(0xffffffffu, x, 0); };
    const int32_t first_block = step.first_block + warp_ * kWarpBlocks;
    if ((step.flags & kFirst) && (step.flags & kFirstHead)) shared_.energy_empty[energy_.slot].wait(energy_.parity ^ 1);
    if (uniform(first_block < info.visible)) {
      if constexpr (Config::kTransform) transform_scores(s, p_.scale);
      const TileRow& tile = info.tile;
      const int32_t own = p_.select.score.problem.causal ? tile.position / kBlockKeys : -1;
      const bool whole = tile.row_begin == 0 && tile.row_end == kTileRows;
      if (uniform(!whole || (own >= first_block && own < first_block + kWarpBlocks))) mask(s, tile, first_block, own);
      float* energy = shared_.energy + energy_.slot * p_.energy_stride + first_block;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float value = log_energy(s, r);
        if (lane_ % 4 == 0) {
          float& target = energy[lane_ / 4 + 8 * r];
          target = step.flags & kFirstHead ? value : log_sum(target, value);
        }
      }
    }
    if (!(step.flags & kLast)) return;
    __syncwarp();
    if (lane_ == 0) shared_.query_empty[step.query_slot].arrive();
    if (!(step.flags & kLastHead)) return;
    if (lane_ == 0) shared_.energy_full[energy_.slot].arrive();
    energy_.advance();
  }

  // Rows that are not of the sequence, and rows that do not see all of their own block, do not count.
  template <class Tensor>
  __device__ void mask(Tensor& s, const TileRow& tile, int32_t first_block, int32_t own) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t block = first_block + lane_ / 4 + 8 * r;
      int32_t begin = tile.row_begin;
      if (block == own) begin = max(begin, min((block + 1) * kBlockKeys, tile.seqlen_k) - 1 - tile.position);
      const int32_t low = begin - 2 * (lane_ % 4), high = tile.row_end - 2 * (lane_ % 4);
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

  static __device__ __forceinline__ float over_quad(float x, float (*combine)(float, float)) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }

  // log2 of the sum of 2^(scale * s) over a row of the tile; NaN if one is. Uses up s.
  template <class Tensor>
  __device__ __forceinline__ float log_energy(Tensor& s, int r) const {
    float tops[4];
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const float pair = fmaxf(s(4 * j + 2 * r), s(4 * j + 2 * r + 1));
      tops[j % 4] = j < 4 ? pair : fmaxf(tops[j % 4], pair);
    }
    const float top = over_quad(fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3])), fmaxf) * p_.scale.scale_log2;
    const float minus = top == -INFINITY ? 0.0f : -top;
    float sums[2] = {};
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      sums[0] += exp2f(s(4 * j + 2 * r) * p_.scale.scale_log2 + minus);
      sums[1] += exp2f(s(4 * j + 2 * r + 1) * p_.scale.scale_log2 + minus);
    }
    const float sum = over_quad(sums[0] + sums[1], [](float a, float b) { return a + b; });
    return log2f(sum) - minus;
  }

  static __device__ float log_sum(float a, float b) {
    const float top = fmaxf(a, b);
    if (top == -INFINITY) return a + b;  // -inf, or NaN if one is
    return top + log2f(exp2f(a - top) + exp2f(b - top));
  }

  SharedStorage<Config>& shared_;
  const KernelParams& p_;
  const int thread_;
  const int warp_;
  const int lane_;
  RingPosition<kQuerySlots> query_;
  RingPosition<kMeanSlots> mean_, done_;
  EnergyPosition energy_;
  uint32_t flags_ = 0;  // of the step that was waited for last
  bool started_ = false;
};

}  // namespace bsfa::cuda::select
