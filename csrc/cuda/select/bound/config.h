// Bounds of logits from products of 8-bit integers: what both kernels share, for one head_dim.
//
// q and k are rounded to integers of -127 .. 127 times a factor, of its own for each row of q, and for each block of
// 128 keys of a head. With q' and k' what they become, Cauchy and Schwarz give
//
//   |q . k - q' . k'| = |q . (k - k') + (q - q') . k'| <= |q| |k - k'| + |q - q'| |k'|
//
// where the norms of what rounding took away are known, and the product of integers is exact.
#pragma once

#include <cute/tensor.hpp>

#include "../../common/mask_output.h"
#include "../../common/mbarrier.h"
#include "../../common/schedule.h"
#include "../../common/warp.h"
#include "bsfa/keep.h"

namespace bsfa::cuda::bound {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that compute, 64 query rows each
constexpr int kGroupRows = kTileRows / kConsumers;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kFetchingWarps = 2;
constexpr int kCtasPerSm = 2;
// setmaxnreg, per thread: what a CTA has at its launch, handed out anew.
constexpr int kProducerRegisters = 32, kConsumerRegisters = 104;
constexpr int kLaunchRegisters = 65536 / (kCtasPerSm * kThreads) / 8 * 8;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters);
constexpr int kStages = 5;                 // KV blocks in shared memory
constexpr int kHalfKeys = kBlockKeys / 2;  // of one product
constexpr int kQuantizeThreads = 256;
static_assert(kGroupRows == kSkipRows);

// Of one KV block and head: what a bulk copy takes at least.
struct alignas(16) BlockFacts {
  float factor;   // k is k' times this
  float lost;     // largest |k - k'|
  float norm;     // largest |k| or |k'|
  int32_t block;  // its number in the sequence
};
static_assert(sizeof(BlockFacts) == 16);

template <int kHeadDim_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kSteps = kHeadDim / 32;  // of 32 terms
  static constexpr int kImageBytes = kBlockKeys * kHeadDim;
  // A block's image in memory is what lies in shared memory: rows swizzled as the product wants them.
  using Atom = std::conditional_t<kHeadDim == 128, cute::SM90::GMMA::Layout_K_SW128_Atom<int8_t>,
                                  cute::SM90::GMMA::Layout_K_SW64_Atom<int8_t>>;
  using KeyLayout = decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kBlockKeys>, cute::Int<kHeadDim>>{}));
  // The same bytes in halves: [key, column, half of a stage].
  using HalvesLayout = decltype(cute::tile_to_shape(
      Atom{}, cute::Shape<cute::Int<kHalfKeys>, cute::Int<kHeadDim>, cute::Int<2 * kStages>>{}));
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::rs_op_selector<
          int8_t, int8_t, int32_t, cute::Shape<cute::Int<kGroupRows>, cute::Int<kHalfKeys>, cute::Int<kHeadDim>>>()));
};

// Images [Hkv, blocks, kImageBytes] and facts [Hkv, blocks] of all sequences.
struct QuantizedKeys {
  uint8_t* images;
  BlockFacts* facts;
  int64_t blocks;      // of all sequences together
  int32_t max_blocks;  // of one

  // Where the blocks of a sequence begin. Packed: no two sequences' blocks meet, since floor(a / 128) + ceil(n / 128)
  // is at most floor((a + n) / 128) + 1.
  __device__ int64_t first_block(const KvLayout& kv, int32_t sequence) const {
    if (kv.cu_seqlens != nullptr) return int64_t{kv.cu_seqlens[sequence] / kBlockKeys} + sequence;
    return int64_t{sequence} * max_blocks;
  }
};

struct KernelParams : MaskOutput {
  TensorView q, k;
  QuantizedKeys keys;
  int64_t num_rows;  // of the mask
};

// What brings `largest` to 127, and its inverse. Beyond 1e30 either way values are held badly, or not at all, which the
// norms of what is lost then say.
struct Factor {
  float up, down;
};
__device__ __forceinline__ Factor factor_for(float largest) {
  const float x = fminf(fmaxf(largest, 1e-30f), 1e30f);
  return {127.0f / x, x / 127.0f};
}

// Norms are rounded up by a little more than what the sums of their squares can be off. To what is lost belongs what
// float32 loses (kRounding of the norm), here and in the sums of the scores that decide, which are not known to be off
// by more than 8e-6 of |q| |k|; and what it loses of numbers below its normal ones.
constexpr float kUp = 1.0f + 1e-5f;
constexpr float kRounding = 1e-5f;
constexpr float kSubnormal = 2e-37f;

}  // namespace bsfa::cuda::bound
