// Tiles, rings, shared memory and registers of the relative-max kernel, for one element type and head_dim.
#pragma once

#include <cute/tensor.hpp>

#include "../../common/logits.h"
#include "../../common/mbarrier.h"
#include "../../common/schedule.h"
#include "../../common/tensor_map.h"
#include "bsfa/keep.h"

namespace bsfa::cuda::select {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 4;    // warpgroups that compute, each a step of its own
constexpr int kStepBlocks = 64;  // KV blocks of one step
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kWarpBlocks = kStepBlocks / 4;  // KV blocks of one warp: 16
constexpr int kEmitters = 2;                  // warps that turn energies into masks

// setmaxnreg, per thread; the kernel starts with 96 each.
constexpr int kProducerRegisters = 64;
constexpr int kConsumerRegisters = 104;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * 96, "the register file");

constexpr int kMaxQuerySlots = 4;  // query tiles in shared memory, where energies leave room; at least 2
constexpr int kMinQuerySlots = 2;
constexpr int kMeanSlots = 6;  // steps of block means in shared memory
// Rows of energies, where there is room; else one for each emitter, or one alone. A row is wanted while its blocks are
// scored and while its words are made, which take about as long: with two, the consumers wait for it at every item.
constexpr int kMaxEnergySlots = 2 * kEmitters;
constexpr int kWorkSlots = kMaxEnergySlots + 4;  // items that the scheduler warp is ahead of the slower emitter

// kTransform: scores are transformed before their maximum is sought (Transform in logits.h is not kNone).
template <typename Element_, int kHeadDim_, bool kTransform_>
struct Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kTransform = kTransform_;
  static constexpr int kHalves = kHeadDim / kBoxColumns;
  static constexpr int kQueryBytes = kTileRows * kHeadDim * sizeof(Element);
  static constexpr int kMeanBytes = kStepBlocks * kHeadDim * sizeof(Element);
  static_assert(kTileRows == 128 && kStepBlocks == 64 && sizeof(Element) == 2 && kHeadDim % kBoxColumns == 0);

  // Queries and means alike: [half][row][64 columns], each row of 128 bytes swizzled within its group of 8.
  using Atom = cute::SM90::GMMA::Layout_K_SW128_Atom<Element>;
  using QueryLayout = decltype(cute::tile_to_shape(
      Atom{}, cute::Shape<cute::Int<kTileRows>, cute::Int<kHeadDim>, cute::Int<kMaxQuerySlots>>{}));
  using MeanLayout = decltype(cute::tile_to_shape(
      Atom{}, cute::Shape<cute::Int<kStepBlocks>, cute::Int<kHeadDim>, cute::Int<kMeanSlots>>{}));

  // Blocks are the rows of the product and queries its columns: a block's energy is then the sum of a row, which one
  // thread sums almost alone.
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<
          Element, Element, float, cute::Shape<cute::Int<kStepBlocks>, cute::Int<kTileRows>, cute::Int<kHeadDim>>>()));
};

// One (tile, score head) pair: from the scheduler warp to all others. What takes divisions is found there, where the
// lanes do it for 32 pairs at once.
struct Work {
  TileRow tile;
  int32_t row;      // of scores and masks
  int32_t head;     // score head; -1: no more work
  int32_t visible;  // KV blocks
  int32_t steps;    // for each of its query heads; 0: nothing is scored
  AlwaysKept always;
  bool everything;  // is kept
  float threshold;
};

struct alignas(TileRow) Control {
  Mbarrier work_full[kWorkSlots], work_empty[kWorkSlots];
  Mbarrier query_full[kMaxQuerySlots], query_empty[kMaxQuerySlots];
  Mbarrier mean_full[kMeanSlots], mean_empty[kMeanSlots];
  Mbarrier energy_full[kMaxEnergySlots], energy_empty[kMaxEnergySlots];
  Work work[kWorkSlots];
};

// By value: the descriptors must lie in parameter memory.
struct KernelParams {
  CUtensorMap q, means;
  SelectParams select;
  Workspace workspace;
  LogitScale scale;
  Rescue rescue;
  int32_t group;  // score heads side by side in the natural order
  int32_t heads_per_score_head;
  int32_t heads_per_kv_head;
  int32_t query_slots;
  int32_t energy_slots;   // 1, or a multiple of kEmitters
  int32_t energy_stride;  // floats, a multiple of kStepBlocks
};

// Shared memory: block means, queries, Control, and rows of energies: base-2 logarithms, one per KV block.
template <class Config>
struct Shared {
  char* mean;
  char* query;
  Control& control;
  float* energy;

  static constexpr int bytes(int query_slots, int energy_slots, int energy_stride) {
    return kMeanSlots * Config::kMeanBytes + query_slots * Config::kQueryBytes + static_cast<int>(sizeof(Control)) +
           energy_slots * energy_stride * static_cast<int>(sizeof(float));
  }
  static __device__ Shared in(char* memory, int query_slots) {
    char* query = memory + kMeanSlots * Config::kMeanBytes;
    char* control = query + query_slots * Config::kQueryBytes;
    return {memory, query, *reinterpret_cast<Control*>(control), reinterpret_cast<float*>(control + sizeof(Control))};
  }
};

// Position in a ring whose number of slots is known at run time only.
struct RuntimePosition {
  int32_t slots;
  int32_t slot = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace bsfa::cuda::select
