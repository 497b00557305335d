// Tiles, rings and shared memory of the kernels that measure q . k, for calibration and as the first of two passes of
// skipping, for one element type and head_dim.
#pragma once

#include <cutlass/fast_math.h>

#include <cute/tensor.hpp>

#include "../../common/logits.h"
#include "../../common/mask_output.h"
#include "../../common/mbarrier.h"
#include "../../common/schedule.h"
#include "../../common/tensor_map.h"
#include "../../common/warp.h"

namespace bsfa::cuda::measure {

// What is made of the logits of one group of rows and one KV block.
enum class Quantity : int32_t {
  kMass = 0,      // BlockMassParams
  kAbsolute = 1,  // TileMaxParams, SkipForm::kAbsolute
  kRelative = 2,  // TileMaxParams, SkipForm::kRelative
};

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;   // warpgroups that compute
constexpr int kGroupRows = 64;  // query rows of one of them: half of a tile
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kWarpRows = kGroupRows / 4;
static_assert(kConsumers * kGroupRows == kTileRows && kGroupRows == kSkipRows);

// setmaxnreg, per thread: 40 * 128 + 232 * 256 registers of 65536.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 65536, "the register file");

constexpr int kWorkSlots = 4;    // tiles that the scheduler warp is ahead of the slowest of its readers
constexpr int kWorkReaders = 3;  // warps: keys, queries, results
constexpr int kQuerySlots = 2;
constexpr int kBatch = 32;  // steps whose results are written at once, one per lane
constexpr int kResultSlots = 2;

template <typename Element_, int kHeadDim_>
struct Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHalves = kHeadDim / kBoxColumns;  // swizzle atoms side by side
  static constexpr int kKeySlots = kHeadDim == 64 ? 6 : 4;
  static constexpr int kBoxBytes = kTileRows * kBoxColumns * sizeof(Element);  // 128 rows of one half
  static constexpr int kTileBytes = kHalves * kBoxBytes;
  static_assert(kTileRows == 128 && kBlockKeys == 128 && sizeof(Element) == 2 && kHeadDim % kBoxColumns == 0);

  // Every tile lies as [half][row][64 columns], each row of 128 bytes swizzled within its group of 8.
  using RowsShape = cute::Shape<cute::Int<kTileRows>, cute::Int<kHeadDim>>;
  using RowsLayout = decltype(cute::tile_to_shape(cute::SM90::GMMA::Layout_K_SW128_Atom<Element>{}, RowsShape{}));
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<
          Element, Element, float, cute::Shape<cute::Int<kGroupRows>, cute::Int<kBlockKeys>, cute::Int<kHeadDim>>>(),
      cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));
};

// One (tile, head) pair with blocks to see, from the scheduler warp to the others of its warpgroup.
struct Work {
  TileRow tile;
  int32_t head;            // -1: no more work
  int32_t blocks;          // visible ones: 0 .. blocks - 1
  int32_t steps;           // blocks to go through: all of these, or, of a mask, those that are kept
  const uint32_t* within;  // the row of that mask; null: there is none
  int32_t row[2];          // of the results: of both groups of rows, or (block_m = 128) the first one of the tile
};

// The block of step `step`: the last visible one, block 0, and the others from the last to the first (SkipParams).
__device__ __forceinline__ int32_t block_of_step(int32_t step, int32_t blocks) {
  return step == 0 ? blocks - 1 : step == 1 ? 0 : blocks - step;
}

// The blocks of a tile in that order, one call after the other; with kToMask those that a mask keeps.
template <bool kToMask>
class Walk {
 public:
  __device__ explicit Walk(const Work& work) : within_(work.within), blocks_(work.blocks) {}

  // The next one; only as often as there are steps.
  __device__ __forceinline__ int32_t next() {
    const int32_t step = step_++;
    if constexpr (!kToMask) return block_of_step(step, blocks_);
    if (step == 1 && keeps(0)) return 0;  // not the first: else that was the last one
    return at_ = below(step == 0 ? blocks_ : at_);
  }

 private:
  __device__ __forceinline__ bool keeps(int32_t block) const {
    return within_ == nullptr || (within_[block / 32] >> (block % 32) & 1) != 0;
  }
  // The last kept block before `end`, 0 if there is none.
  __device__ __forceinline__ int32_t below(int32_t end) const {
    if (within_ == nullptr) return end - 1;
    while (end > 0) {
      const int32_t word = (end - 1) / 32;
      const uint32_t bits = within_[word] & (~0u >> (31 - (end - 1) % 32));
      if (bits != 0) return word * 32 + 31 - __clz(bits);
      end = word * 32;
    }
    return 0;
  }

  const uint32_t* within_;
  const int32_t blocks_;
  int32_t step_ = 0;
  int32_t at_ = 0;  // where the way down has come to
};

// One KV block of one tile, from the key warp to both consumers.
struct Step {
  int32_t first_key;
  uint32_t flags;
};
enum StepFlags : uint32_t {
  kFirst = 1,   // of its tile
  kLast = 2,    // of its tile
  kMasked = 4,  // some row of the tile does not see all 128 keys
  kEnd = 8,     // no block: there is no more work
};

template <class Config>
struct SharedStorage {
  alignas(1024) char query[kQuerySlots][Config::kTileBytes];
  alignas(1024) char key[Config::kKeySlots][Config::kTileBytes];
  // Of each step of a batch, what each consumer warp found. Maxima as integers of the same order (compute.h).
  float results[kResultSlots][kBatch][kConsumerWarps];
  float minus_lse[kQuerySlots][kTileRows];  // of base 2; -inf: the row does not count
  Mbarrier work_full[kWorkSlots], work_empty[kWorkSlots];
  Mbarrier query_full[kQuerySlots], query_empty[kQuerySlots];
  Mbarrier key_full[Config::kKeySlots], key_empty[Config::kKeySlots];
  Mbarrier result_full[kResultSlots], result_empty[kResultSlots];
  Step steps[Config::kKeySlots];
  TileRow tiles[kQuerySlots];
  Work work[kWorkSlots];
};

// What the launch passes to the kernel, by value: the descriptors must lie in parameter memory.
struct KernelParams {
  CUtensorMap q, k;
  Workspace workspace;
  int64_t work_rows;  // its rows
  // block_m = 64: add position / 64 of a row for the row of the results, by sequence. Null: those are the tiles' rows.
  const int32_t* first_rows;
  int32_t num_heads;
  int32_t heads_per_kv_head;
  bool causal;
  // Keys: pages of page_size tokens, fetched in boxes of box_rows tokens; or one box of kBlockKeys tokens.
  const int32_t* block_table;  // null: not paged
  int64_t block_table_stride;
  cutlass::FastDivmod page_size;
  int32_t box_rows;  // 1 << box_shift
  int32_t box_shift;
  bool keys_packed;
  LogitScale scale;
  float unit;  // of maxima: natural units per unit of a (transformed) score
  const float* lse;
  int64_t lse_batch_stride, lse_head_stride;
  float* out;  // [rows, num_heads, max_blocks]
  int32_t max_blocks;
  MaskOutput mask;  // words and counts zeroed
};

}  // namespace bsfa::cuda::measure
