// Tiles, ring, shared memory and registers of the strided score kernel, for one element type and rule.
//
// A group is `stride` consecutive tokens of a sequence, at absolute positions. Scores of groups are a matrix product
// whose inner dimension runs through the tokens of a group and the columns of a head: one step is one token of every
// group and 64 columns.
#pragma once

#include <cutlass/fast_math.h>

#include <cute/tensor.hpp>

#include "../../common/mbarrier.h"
#include "../../common/schedule.h"
#include "../../common/tensor_map.h"
#include "../../common/warp.h"

namespace bsfa::cuda::select::strided {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that compute, 64 query groups each
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kProducerWarps = 4;
constexpr int kConsumerWarps = kConsumers * 4;

// setmaxnreg, per thread. The pool is what the CTA is launched with, 168 a thread: to ask for more than that would wait
// for ever.
constexpr int kLaunchRegisters = 168;
constexpr int kProducerRegisters = 72;
constexpr int kConsumerRegisters = 216;
static_assert(kLaunchRegisters * kThreads <= 65536 && kLaunchRegisters % 8 == 0, "the register file");
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= kLaunchRegisters * (1 + kConsumers), "the pool");

constexpr int kQueryGroups = 128;  // of an output tile
constexpr int kKeyGroups = 256;
constexpr int kStages = 4;     // steps in flight; at least 4, see load.h
constexpr int kWorkSlots = 2;  // units that the producer is ahead
constexpr int kRowBytes = kBoxColumns * 2;
constexpr int kQueryBytes = kQueryGroups * kRowBytes;  // of a step
constexpr int kKeyBytes = kKeyGroups * kRowBytes;
constexpr int kChunks = kRowBytes / 16;          // copies of 16 bytes in a row
constexpr int kCopyRows = kWarpgroup / kChunks;  // rows that the producer's threads copy at once
constexpr int kQueryCopies = kQueryGroups / kCopyRows;
constexpr int kKeyCopies = kKeyGroups / kCopyRows;
constexpr int kOffsetPitch = kKeyCopies + 1;
constexpr int kFlatStride = 64;
constexpr int kMinStride = 4, kMaxStride = 64;
static_assert(kStages >= 4);
static_assert(kTileRows == kBlockKeys && kTileRows % kMaxStride == 0, "a tile's own block has its own number");

template <typename Element_, bool kFlat_>
struct Config {
  using Element = Element_;
  static constexpr bool kFlat = kFlat_;  // kFlat64, else kAntidiagonal
  static_assert(sizeof(Element) == 2);

  // Rows of 128 bytes, each swizzled within its group of 8.
  template <int kRows>
  using Rows =
      decltype(cute::tile_to_shape(cute::SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kRows>, cute::Int<kBoxColumns>, cute::Int<kStages>>{}));
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<Element, Element, float,
                                       cute::Shape<cute::_64, cute::Int<kKeyGroups>, cute::Int<kBoxColumns>>>(),
      cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));
};

// Consecutive mask rows of one sequence whose groups are the rows of one output tile: those whose tile has the same
// absolute number / stride. With a query head it is a unit of work.
struct alignas(16) Segment {
  int32_t row;          // first mask row, counted from the slab's first
  int32_t tiles;        // mask rows
  int32_t query_token;  // token coordinate in q of the first tile's row 0 (may be negative)
  int32_t query_batch;
  int32_t query_begin;  // tokens [query_begin, query_end), counted from query_token, are the call's
  int32_t query_end;
  int32_t first_group;  // absolute number of the first query group, may be negative
  int32_t sequence;
  int32_t key_token;  // token coordinate of the sequence's first key
  int32_t seqlen_k;
  int32_t key_groups;  // [0, key_groups) are looked at
  int32_t key_tiles;   // of kKeyGroups
};

struct Queue {
  int32_t next;      // units handed out beyond the first one of each CTA
  int32_t segments;  // in the list
};

struct Work {
  Segment segment;
  int32_t head;  // -1: no more work
};

struct SharedStorage {
  alignas(1024) char query[kStages][kQueryBytes];
  alignas(1024) char key[kStages][kKeyBytes];
  // [row % 16][row / 16], padded against bank conflicts: where the tile's key groups begin (load.h)
  int64_t key_offset[kCopyRows * kOffsetPitch];
  Mbarrier full[kStages], empty[kStages];
  Mbarrier work_full[kWorkSlots], work_empty[kWorkSlots];
  Work work[kWorkSlots];
};

// What the launch passes to the kernel, by value: the descriptors must lie in parameter memory.
struct KernelParams {
  CUtensorMap q_map, k_map;  // boxes of rows of groups (tensor_map.h); used only if the flags below say so
  bool q_by_tma, k_by_tma;
  int32_t q_groups, k_groups;  // that the maps reach, from token 0 of the view (k: not paged)
  int32_t box_rows;            // key groups of one copy: all, or what lies in one page
  const uint16_t *q, *k;
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  const int32_t* block_table;  // null: not paged
  int64_t block_table_stride;
  cutlass::FastDivmod page_size;
  bool groups_cross_pages;  // tokens of a group may lie in several pages
  bool keys_packed;
  bool causal;
  int32_t num_heads;
  int32_t heads_per_kv_head;
  int32_t stride;
  int32_t stride_shift;  // stride = 1 << stride_shift
  int32_t halves;        // steps per token: head_dim / 64
  // A product x is the base-2 logit x * scale or, capped, cap_log2 * (1 - 2 / (2^(x * scale) + 1)).
  float scale;
  float cap_log2;  // 0: off
  float* scores;
  int32_t max_blocks;
  Queue* queue;
  const Segment* segments;
  float4* stash;         // kAntidiagonal: [CTA, key tile, stride / 4, thread]
  int64_t stash_stride;  // of a CTA
};

}  // namespace bsfa::cuda::select::strided
