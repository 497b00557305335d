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
constexpr int kConsumers = 2;     // warpgroups that compute, 64 KV blocks each
constexpr int kStepBlocks = 128;  // KV blocks of one step
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kWarpBlocks = kStepBlocks / kConsumerWarps;  // KV blocks of one warp: 16
constexpr int kEmitters = 2;                               // warps that turn energies into masks

// setmaxnreg, per thread.
constexpr int kProducerRegisters = 72;
constexpr int kConsumerRegisters = 216;
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 65536, "the register file");

constexpr int kWorkSlots = 4;   // items that the scheduler warp is ahead
constexpr int kQuerySlots = 2;  // query tiles in shared memory
constexpr int kMeanSlots = 3;   // steps of block means in shared memory

// kTransform: scores are transformed before their maximum is sought (Transform in logits.h is not kNone).
template <typename Element_, int kHeadDim_, bool kTransform_>
struct Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kTransform = kTransform_;
  static constexpr int kHalves = kHeadDim / kBoxColumns;
  static constexpr int kTileBytes = kTileRows * kHeadDim * sizeof(Element);  // of queries, and of means
  static_assert(kTileRows == 128 && kStepBlocks == 128 && sizeof(Element) == 2 && kHeadDim % kBoxColumns == 0);

  // Queries and means alike: [half][row][64 columns], each row of 128 bytes swizzled within its group of 8.
  using RowsShape = cute::Shape<cute::Int<kTileRows>, cute::Int<kHeadDim>>;
  using RowsLayout = decltype(cute::tile_to_shape(cute::SM90::GMMA::Layout_K_SW128_Atom<Element>{}, RowsShape{}));

  // Blocks are the rows of the product and queries its columns: a block's energy is then the sum of a row, which one
  // thread sums almost alone.
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<Element, Element, float,
                                       cute::Shape<cute::_64, cute::Int<kTileRows>, cute::Int<kHeadDim>>>(),
      cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));
};

// One (tile, score head) pair: from the scheduler warp to the load warp and the emitters.
struct Work {
  TileRow tile;
  int32_t row;      // of scores and masks
  int32_t head;     // score head; -1: no more work
  int32_t visible;  // KV blocks
  int32_t steps;    // of each of its query heads; 0: nothing is scored
};

// One product of 128 means with one query tile, from the load warp to the consumers.
struct Step {
  int32_t first_block;
  uint32_t flags;
};
enum StepFlags : uint32_t {
  kFirst = 1,      // of its query tile
  kLast = 2,       // of its query tile
  kFirstHead = 4,  // of its item
  kLastHead = 8,   // of its item
  kEnd = 16,       // no step: there is no more work
};

// What the consumers know about the item that a query slot belongs to.
struct QueryInfo {
  TileRow tile;
  int32_t visible;
};

template <class Config>
struct SharedStorage {
  alignas(1024) char query[kQuerySlots][Config::kTileBytes];
  alignas(1024) char mean[kMeanSlots][Config::kTileBytes];
  Mbarrier work_full[kWorkSlots], work_empty[kWorkSlots];
  Mbarrier query_full[kQuerySlots], query_empty[kQuerySlots];
  Mbarrier mean_full[kMeanSlots], mean_empty[kMeanSlots];
  Mbarrier energy_full[kEmitters], energy_empty[kEmitters];
  Step steps[kMeanSlots];
  QueryInfo queries[kQuerySlots];
  Work work[kWorkSlots];
  alignas(16) float energy[1];  // energy_slots rows of energy_stride floats: base-2 logarithms, one per KV block
};

// By value: the descriptors must lie in parameter memory.
struct KernelParams {
  CUtensorMap q, means;
  SelectParams select;
  Workspace workspace;
  LogitScale scale;
  Rescue rescue;
  int32_t heads_per_score_head;
  int32_t heads_per_kv_head;
  int32_t energy_slots;   // 1 or 2
  int32_t energy_stride;  // floats, a multiple of kStepBlocks
};

// Position in the ring of energy slots, whose number is known at run time only.
struct EnergyPosition {
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
