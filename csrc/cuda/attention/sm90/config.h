// Tiles, rings, shared memory and registers of the Hopper attention kernel, for one element type and pair of head_dims.
#pragma once

#include <cutlass/fast_math.h>

#include <cute/tensor.hpp>
#include <type_traits>

#include "../../common/logits.h"
#include "../../common/mbarrier.h"
#include "../../common/schedule.h"
#include "../../common/tensor_map.h"
#include "../../common/warp.h"
#include "pool.h"

namespace bsfa::cuda::attn::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that compute, 64 query rows each
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr int kStoreRows = 16;  // rows that one warp owns, and stores at once
constexpr int kGroupRows = 8;   // of a swizzle atom

constexpr int kLateSteps = 4;   // left of a tile when the next one is taken
constexpr int kMaskChunk = 32;  // mask words that a warp holds at once, one per lane

// What a kernel does beside attention over kept blocks: nothing; skipping of steps whose scores are all low (skip.h);
// leaving out the keys that a token mask does not name; or nothing, but it fetches pages of 8 n tokens with fewer
// copies.
enum class Variant { kPlain, kSkip, kTokens, kPages };

// At head_dim 64 a block's products take half as long as at 128, but its softmax as long: two CTAs share an SM there,
// so that four warpgroups fill each other's waits (paired_compute.h).
constexpr int ctas_per_sm(int head_dim, Variant variant) {
  return head_dim == 64 && variant == Variant::kPlain ? 2 : 1;
}

// Of queries, keys, values or outputs: tiles of 128 rows of kDim columns, in pieces of 64 columns. A row of a piece is
// 128 bytes, swizzled within its group of 8. They lie as [piece][row]; or, kGrouped, as [row / 8][piece][row % 8]: then
// any 8 n rows lie together with all their columns, and are one copy.
template <int kDim_, bool kGrouped = false>
struct Operand {
  static constexpr int kDim = kDim_;
  static constexpr int kPieces = kDim / kBoxColumns;             // swizzle atoms side by side
  static constexpr int kBoxBytes = kTileRows * kBoxColumns * 2;  // 128 rows of one piece
  static constexpr int kTileBytes = kPieces * kBoxBytes;
  static_assert(kTileRows == 128 && kBlockKeys == 128 && kDim % kBoxColumns == 0);

  // Of a row of a piece, in the tile.
  static __host__ __device__ constexpr int offset(int row, int piece) {
    constexpr int kRowBytes = kBoxColumns * 2;
    if (!kGrouped) return piece * kBoxBytes + row * kRowBytes;
    return ((row / kGroupRows * kPieces + piece) * kGroupRows + row % kGroupRows) * kRowBytes;
  }
};

// kTransform: scores are transformed before their maximum is sought (Transform in logits.h is not kNone).
template <typename Element_, int kHeadDim_, int kHeadDimV_, bool kTransform_, Variant kVariant>
struct Config {
  using Element = Element_;
  static_assert(sizeof(Element) == 2);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kTransform = kTransform_;
  static constexpr bool kSkip = kVariant == Variant::kSkip;
  static constexpr bool kTokens = kVariant == Variant::kTokens;
  static constexpr bool kPages = kVariant == Variant::kPages;
  static constexpr int kCtas = ctas_per_sm(kHeadDim, kVariant);  // of an SM
  static constexpr bool kPaired = kCtas == 2;
  // Queries and keys share slots (pool.h). Then kKeySlots and kQuerySlots only say how many of them there are at most.
  static constexpr bool kPool = kHeadDim == 128 && (kVariant == Variant::kPlain || kPages);
  // setmaxnreg, per thread: what a CTA has at its launch, handed out anew.
  static constexpr int kProducerRegisters = kPaired ? 32 : kPool || kSkip ? 56 : 40;
  static constexpr int kConsumerRegisters = kPaired ? 104 : kPool || kSkip ? 224 : 232;
  static constexpr int kLaunchRegisters = 65536 / (kCtas * kThreads) / 8 * 8;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters);
  // Keys of one product: a block, or half of one where the registers do not hold the scores of a whole one.
  static constexpr int kScoreKeys = kPaired ? kBlockKeys / 2 : kBlockKeys;
  using Queries = Operand<kHeadDim>;
  using Keys = Operand<kHeadDim, kPages>;
  using Values = Operand<kHeadDimV, kPages>;
  using Outputs = Operand<kHeadDimV>;
  // Blocks in flight. A slot of K is free once its scores are made, one of V only after the softmax that runs beside
  // its product: V gets a third one where there is room.
  static constexpr int kKeySlots = kPool ? 3 : kHeadDim == 64 && !kPaired ? 5 : 2;
  static constexpr int kValueSlots = kHeadDim == 64 && !kPaired ? 5 : kHeadDim == 128 ? 3 : 2;
  // Query tiles in shared memory, two where there is room for them. Then the output of a tile is staged in its query
  // slot. One alone is given to the next tile as soon as the last scores are made, and outputs are stored from
  // registers.
  static constexpr int kQuerySlots = kPool ? 3 : kHeadDim == 64 || (kHeadDim == 128 && !kTokens) ? 2 : 1;
  static constexpr bool kStaged = kQuerySlots > 1;
  // What the consumers know of a tile is wanted until it is stored, beside the next tile's first step, which may be
  // that tile's last one and give its queries back.
  static constexpr int kInfoSlots = kStaged ? kQuerySlots : 3;
  static_assert(!kStaged || kHeadDimV <= kHeadDim, "an output fits where its queries were");
  static_assert(!kSkip || kStaged);
  static_assert(!kPool || (kKeySlots == kPoolSlots - 1 && kQuerySlots == kPoolSlots - 1));
  static_assert(!kPool || Queries::kTileBytes == Keys::kTileBytes);

  template <bool kGrouped>
  using Order = std::conditional_t<kGrouped, cute::Step<cute::_2, cute::_1>,
                                   cute::Step<cute::_1, cute::_2>>;  // of {rows, columns}
  template <int kRows, bool kGrouped>
  using RowsLayout =
      decltype(cute::tile_to_shape(cute::SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>>{}, Order<kGrouped>{}));
  // V as the second product sees it: [column, token] of the same bytes.
  using ColumnsShape = cute::Shape<cute::Int<kHeadDimV>, cute::Int<kScoreKeys>>;
  using ColumnsLayout = decltype(cute::tile_to_shape(cute::SM90::GMMA::Layout_MN_SW128_Atom<Element>{}, ColumnsShape{},
                                                     Order<!kPages>{}));

  using Warpgroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<Element, Element, float,
                                       cute::Shape<cute::_64, cute::Int<kScoreKeys>, cute::Int<kHeadDim>>>(),
      Warpgroups{}));
  using OutputMma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::rs_op_selector<Element, Element, float,
                                       cute::Shape<cute::_64, cute::Int<kHeadDimV>, cute::Int<kScoreKeys>>,
                                       cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>(),
      Warpgroups{}));
};

// One (tile, head) pair, from the scheduler warp to both load warps.
struct Work {
  TileRow tile;
  int32_t head;  // -1: no more work
  int32_t kv_head;
  int32_t early_steps;  // blocks before the next tile is taken; 0: it is when this one begins
  BlockRange range;
  const int32_t* words;        // the mask's row of this tile and head; null: dense
  float cut;                   // of kSkip: in units of the scores
  bool sink;                   // of kSkip: block 0 is among the blocks
  uint32_t chunk[kMaskChunk];  // its words that hold the last visible blocks
};

// What the consumers know about the tile whose queries lie in a slot.
struct TileInfo {
  TileRow tile;
  int32_t head;
  float cut;   // of kSkip
  float* lse;  // of the tile's row 0; null: not wanted
};

// One KV block of one tile, from the key load warp to both consumers: both sides read one list. Or, in a step of means,
// the means of kBlockKeys blocks instead of as many tokens.
struct Step {
  int32_t first_key;  // of means: the first block
  uint32_t flags;     // StepFlags, and slots
};
enum StepFlags : uint32_t {
  kFirst = 1,   // of its tile
  kLast = 2,    // of its tile
  kMasked = 4,  // some row of the tile does not see the whole block, or (first step) is not of the sequence; or means
  kEnd = 8,     // no block: there is no more work
  kMeans = 16,
  kKeep = 32,       // of kSkip: never skipped
  kNone = 64,       // of kSkip: the tile sees nothing, and this step has no keys
  kDiagonal = 128,  // masked by causality alone, key i for rows before i: what nearly every tile begins with
};
// Above the flags. Of means: the slot of their columns. Of a pool: the first two slots in its order after this step.
// The first one takes the next step's keys; after the last step of a tile, the next tile's queries, and the second one
// its first keys.
constexpr int kColumnsShift = 8, kSecondSlotShift = 28, kFirstSlotShift = 30;
constexpr uint32_t kColumnsMask = 7;

// Which means of a step enter the softmax, one bit each.
struct Columns {
  uint32_t words[kBlockKeys / 32];
};

// Of kSkip. A step's number counts all steps of the CTA. The ring by that number is longer than K's: a warp that is so
// far ahead of another one of its CTA would have needed a K slot which that one still holds.
template <class Config>
struct SkipStorage {
  static constexpr int kRing = Config::kKeySlots < 4 ? 4 : 8;
  static_assert(kRing > Config::kKeySlots);
  // Number << 1 | whether the warp wants to keep the step; before that something smaller.
  int32_t votes[kConsumerWarps][kRing];
};
struct NoSkipStorage {};

// Of kTokens: the words of a tile's rows that belong to a block, beside the block's K.
struct alignas(128) TokenWords {
  uint32_t words[kTileRows][kBlockKeys / 32];
};
template <class Config>
struct TokenStorage {
  TokenWords key[Config::kKeySlots];
};
struct NoTokenStorage {};

// Slots of queries alone. Where outputs are staged, a finished tile's lies where its queries were.
template <class Config>
struct QueryTiles {
  alignas(1024) char query[Config::kQuerySlots][Config::Queries::kTileBytes];
};
struct NoQueryTiles {};

template <class Config>
struct SharedStorage : std::conditional_t<Config::kPool, NoQueryTiles, QueryTiles<Config>> {
  static constexpr int kKeyTiles = Config::kPool ? kPoolSlots : Config::kKeySlots;
  alignas(1024) char key[kKeyTiles][Config::Keys::kTileBytes];  // kPool: and queries, and outputs
  alignas(1024) char value[Config::kValueSlots][Config::Values::kTileBytes];
  std::conditional_t<Config::kTokens, TokenStorage<Config>, NoTokenStorage> tokens;
  Mbarrier work_full, work_empty;
  Mbarrier query_full[Config::kQuerySlots];
  Mbarrier query_empty[Config::kQuerySlots];  // not of kPool, where key_empty stands for all slots
  Mbarrier full[Config::kKeySlots];           // of a step: its K and the V of the step before have arrived
  Mbarrier key_empty[kKeyTiles], value_empty[Config::kValueSlots];
  Mbarrier value_tail;            // a V block whose tail is zeroed before it is handed over
  Step steps[Config::kKeySlots];  // of the K blocks
  // Of the steps of means, in turn. They are read after the K slot is given back, but before the next one is: a slot
  // more than K has is enough.
  Columns columns[Config::kKeySlots + 1];
  TileInfo tiles[Config::kInfoSlots];
  Work work;
  std::conditional_t<Config::kSkip, SkipStorage<Config>, NoSkipStorage> skip;
};

// SkipParams (bsfa/params.h), as the kernel wants it.
struct SkipKernelParams {
  const float* thresholds;
  int32_t columns;
  int32_t sink_blocks;
  int32_t window_blocks;
  bool relative;
  bool counted;
  unsigned long long* counts;
  float unit;  // one nat, in units of the scores
};

// What the launch passes to the kernel, by value: the descriptors must lie in parameter memory.
struct KernelParams {
  CUtensorMap q, k, v, out;
  CUtensorMap k_means, v_means;  // [sequence, block, head, dim]; of the mean correction
  CUtensorMap tokens;            // [batch, query token, word]; of kTokens
  bool has_means;
  Workspace workspace;   // without a queue: the order is `known`, and each CTA has at most two tiles
  KnownOrder known;      // else of the pairs that the CTAs begin with, or without any
  int32_t num_rows;      // of the workspace's counts
  const int32_t* words;  // null: dense
  int64_t num_words;     // of a row and head
  int32_t mask_heads;
  int32_t heads_per_mask_head;
  int32_t heads_per_kv_head;
  bool causal;
  int32_t window_left;
  // Keys: pages of page_size tokens, fetched in boxes of box_rows tokens; or one box of kBlockKeys tokens.
  const int32_t* block_table;  // null: not paged
  int64_t block_table_stride;
  cutlass::FastDivmod page_size;
  int32_t box_rows;  // 1 << box_shift
  int32_t box_shift;
  bool keys_packed;
  // Of kPages: pieces from one KV head to the next, in memory.
  int32_t k_head_pieces, v_head_pieces;
  bool tails_are_zero;  // TMA itself reads zeros past a sequence's end
  // Output. Tiles that are not whole, and outputs that TMA cannot address, are stored by the threads.
  void* out_data;
  int64_t out_batch_stride, out_token_stride, out_head_stride;
  bool store_by_tma;
  float* lse;  // null: not wanted
  int64_t lse_batch_stride, lse_head_stride;
  LogitScale scale;
  SkipKernelParams skip;
};

}  // namespace bsfa::cuda::attn::sm90
