// The producer warps: one hands out tiles; two walk their masks and fetch by TMA, one queries and keys, one values.
#pragma once

#include <type_traits>

#include "config.h"
#include "walk.h"

namespace bsfa::cuda::attn::sm90 {

// Of words of 4 bytes.
template <class T>
__device__ __forceinline__ T load_past_l1(const T* source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(int32_t) == 0);
  T result;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / sizeof(int32_t); ++i) {
    reinterpret_cast<int32_t*>(&result)[i] = __ldcg(reinterpret_cast<const int32_t*>(source) + i);
  }
  return result;
}

// Takes pairs from the queue, each when the load warps are nearly done with the one before: what is taken sooner binds
// a CTA that may be behind, and in the end the others wait for it. The steps that are left, and those that the load
// warps are ahead of the consumers, are time enough for what is read here. Where the pair that it begins with is known,
// the kernel that makes the order is waited for after that; what that kernel has waited for before this one was
// launched, the mask too, may be read at once. What kernels before have written is read past L1: a CTA of the call
// before may just have used this SM, and this workspace.
template <class Config>
__device__ void schedule(SharedStorage<Config>& shared, const KernelParams& p) {
  const int lane = threadIdx.x % 32;
  const Workspace& workspace = p.workspace;
  const bool dealt = workspace.queue == nullptr;  // all is known
  int32_t total = p.known.total;
  const auto await_order = [&] {
    cudaGridDependencySynchronize();
    total = __ldcg(&workspace.queue->total);
  };
  if (!dealt && total == 0) await_order();  // everything else in this kernel waits for this warp's work
  Work& work = shared.work;
  uint32_t parity = 0;
  for (int32_t index = blockIdx.x; index < total; parity ^= 1) {
    const bool known = index < p.known.total;
    const Pair pair = known ? p.known.pair(index) : load_past_l1(workspace.order + index);
    const TileRow tile = known ? tile_row(p.known, pair.row) : load_past_l1(workspace.rows + pair.row);
    const BlockRange range = visible_range(tile, p.causal, p.window_left);
    const int32_t* words = nullptr;
    if (p.words != nullptr) {
      words =
          p.words + (static_cast<int64_t>(pair.row) * p.mask_heads + pair.head / p.heads_per_mask_head) * p.num_words;
    }
    work.chunk[lane] = BlockWalk::load(words, range, BlockWalk::last_chunk(range), lane);
    if constexpr (Config::kSkip) {
      if (lane == 0) {
        const int32_t column = min(max(tile.position, 0) / kTileRows, p.skip.columns - 1);
        work.cut = __ldcg(p.skip.thresholds + int64_t{pair.head} * p.skip.columns + column) * p.skip.unit;
        work.sink = range.begin < range.end && (words == nullptr || (__ldcg(words) & 1) != 0);
      }
    }
    if (lane == 0) {
      work.tile = tile;
      work.head = pair.head;
      work.kv_head = pair.head / p.heads_per_kv_head;
      const int64_t at = natural_index(pair, p.num_rows, p.heads_per_kv_head);
      const int32_t steps = known ? 0 : __ldcg(workspace.counts + at);
      work.early_steps = max(steps - kLateSteps, 0);
      work.range = range;
      work.words = words;
    }
    __syncwarp();
    if (lane == 0) shared.work_full.arrive();
    shared.work_empty.wait(parity);
    if (dealt) {
      index = p.known.dealt_after(index, gridDim.x);
      continue;
    }
    if (known) await_order();
    const int32_t next = lane == 0 ? gridDim.x + atomicAdd(&workspace.queue->next, 1) : 0;
    index = __shfl_sync(kAllLanes, next, 0);
  }
  if (lane == 0) {
    work.head = -1;
    shared.work_full.arrive();
  }
  // The next call's order may be launched: while the last tiles are worked on it comes as far as it can by itself.
  cudaTriggerProgrammaticLaunchCompletion();
}

// What the two load warps have in common: they walk the same tiles and blocks, one fetching queries and keys, the other
// values: rows of `Operand`. All that can be is computed before a slot is waited for: what follows the wait is latency.
template <class Config, class Operand>
class Loader {
 public:
  // Calls begin(tile, head, cut) for every tile, load(tile, block, is_first, is_last) for its blocks, last one first,
  // and then load_means(tile, means, columns, is_first, is_last) for the means that it adds. A tile without any of them
  // has one block without keys: its output is written like any other.
  //
  // load_unmasked(block, share, head, is_last) is for a block that is not its tile's first, of which nothing has to be
  // masked, and which takes a copy a lane at most: nearly all are. A load warp shares a scheduler with two warps that
  // compute, and for what it executes there the others of their warpgroups wait too. So copies are dealt to the lanes
  // for as many blocks at a time as there are lanes for, and each lane looks up one.
  template <class Begin, class Load, class LoadUnmasked, class LoadMeans>
  __device__ void for_each_step(const Begin& begin, const Load& load, const LoadUnmasked& load_unmasked,
                                const LoadMeans& load_means) {
    const Work& work = shared_.work;
    for (uint32_t parity = 0;; parity ^= 1) {
      shared_.work_full.wait(parity);
      const int32_t head = work.head;
      if (head < 0) return;
      const int32_t kv_head = work.kv_head;
      const TileRow tile = work.tile;
      const float cut = work.cut;
      const uint32_t word = work.chunk[lane_];
      auto walk = [&] {
        if constexpr (Config::kSkip) {
          return SkipWalk(work.words, work.range, word, work.sink, lane_);
        } else {
          return BlockWalk(work.words, work.range, word, lane_);
        }
      }();
      int32_t early_steps = work.early_steps;
      // Nothing is corrected where steps are skipped.
      const int32_t corrected = !Config::kSkip && p_.has_means ? whole_blocks(tile, p_.causal) : 0;
      const BlockRange range = work.range;
      const int32_t* words = work.words;
      const auto walk_means = [&](uint32_t word) { return MeansWalk(words, range, word, corrected, lane_); };
      uint32_t columns = 0;
      const bool adds_means = corrected > 0 && walk_means(word).next(&columns) >= 0;
      const auto next_tile = [&] {
        __syncwarp();
        if (lane_ == 0) shared_.work_empty.arrive();
      };
      if (early_steps == 0) next_tile();

      const Keys keys{p_.block_table + tile.sequence * p_.block_table_stride, tile.key_token,
                      p_.keys_packed ? 0 : tile.sequence, kv_head};
      bool first = true;
      const auto load_all = [&](auto short_way, auto one_copy) __attribute__((always_inline)) {
        constexpr bool kShortWay = decltype(short_way)::value, kOneCopy = decltype(one_copy)::value;
        // Where each lane has a copy, a group has no more blocks than there are lanes for.
        const int32_t copy_shift = kOneCopy ? 0 : kBlockShift - p_.box_shift;  // copies of a block
        const int32_t group_size = kShortWay ? 32 >> copy_shift : 32;
        const BlockRange unmasked = kShortWay ? unmasked_blocks(tile, p_.causal, p_.window_left) : BlockRange{0, 0};
        BlockGroup group = walk.next(group_size);
        const Copy own_copy = kOneCopy ? Copy{} : copy_of(lane_ & ((1 << copy_shift) - 1));
        Share share{0, own_copy.row, own_copy.offset, {}};
        // Looks up where the group's blocks lie, all at once, or brings near what says so.
        const auto enter_group = [&]() __attribute__((always_inline)) {
          if constexpr (kShortWay) {
            share.block = group.first + (group.last_bit() & -group_size) + (lane_ >> copy_shift);
            if (share.block >= unmasked.begin && share.block < unmasked.end) {
              share.place = place_of(keys, share.block * kBlockKeys + share.row);
            }
          } else {
            prefetch_pages(keys, group.last(), tile.seqlen_k);
          }
        };
        if (group.empty()) group = {-1, 1};  // no block
        enter_group();
        begin(tile, head, cut);
        if (group.first < 0 && adds_means) return;
        BlockRange short_ways{0, 0};  // not for the first block
        do {
          const int32_t index = group.last();
          group.drop_last();
          // Whether another group follows is said with this one's last block.
          const bool ends = group.empty();
          if (ends) group = walk.next(group_size);
          const bool last = group.empty() && !adds_means;
          if (kShortWay && index >= short_ways.begin && index < short_ways.end) {
            load_unmasked(index, share, keys.head, last);
          } else {
            const int32_t first_key = index < 0 ? tile.seqlen_k : index * kBlockKeys;
            load(tile, block_at<kOneCopy>(keys, first_key, tile.seqlen_k), first, last);
          }
          if (!kShortWay || ends) enter_group();
          first = false;
          short_ways = unmasked;
          if (early_steps > 0 && --early_steps == 0) next_tile();
        } while (!group.empty());
      };
      // Not with token masks, which come with the keys.
      using ShortWay = std::bool_constant<!Config::kTokens>;
      if (ShortWay::value && p_.box_rows == kBlockKeys) {
        load_all(ShortWay{}, ShortWay{});
      } else {
        load_all(std::bool_constant<Config::kPages>{}, std::false_type{});
      }
      if (adds_means) {  // walked anew, lest it take registers where there are none
        MeansWalk means = walk_means(BlockWalk::load(words, range, BlockWalk::last_chunk(range), lane_));
        int32_t first_mean = means.next(&columns);
        do {
          const Block block = means_at(keys.head, tile.sequence, first_mean);
          const uint32_t these = columns;
          first_mean = means.next(&columns);
          load_means(tile, block, these, first, first_mean < 0);
          first = false;
        } while (first_mean >= 0);
      }
      if (early_steps > 0) next_tile();  // counts that came with a mask may say more than there is
    }
  }

 protected:
  // `head_pieces`: of kPages.
  __device__ Loader(SharedStorage<Config>& shared, const KernelParams& p, int32_t head_pieces)
      : shared_(shared), p_(p), lane_(threadIdx.x % 32), head_pieces_(head_pieces) {}

  // Where the keys of one sequence and KV head lie.
  struct Keys {
    const int32_t* pages;
    int32_t first_token;  // coordinate of key 0, if not paged
    int32_t batch;        // likewise
    int32_t head;
  };
  // One TMA copy of a block: a box of rows, of one piece of the columns unless the box is the whole block.
  struct Copy {
    int32_t row;
    int32_t piece;
    int32_t offset;  // in the slot, bytes
  };
  struct Place {
    int32_t token;
    int32_t batch;
  };
  // A lane's copy of one of a group's blocks.
  struct Share {
    int32_t block;
    int32_t row;     // first one
    int32_t offset;  // in the slot, bytes
    Place place;
  };
  struct Block {
    Keys keys;
    int32_t first_key;
    int32_t valid;  // keys of the sequence in it; none: nothing is fetched
    int32_t copies;
    uint32_t bytes;
    Copy copy;    // this lane's first one
    Place place;  // of that
  };

  // Issues a block's copies, each lane its share; they complete on `full`.
  __device__ void load_block(const CUtensorMap& map, const Block& block, Mbarrier& full, char* target) {
    constexpr auto kHint = cute::TMA::CacheHintSm90::EVICT_LAST;
    if (lane_ == 0) full.arrive_expect(block.bytes);
    __syncwarp();
    if constexpr (Config::kPages) {
      if (lane_ >= block.copies) return;
      if (block.keys.pages != nullptr) {
        load_pages(map, full, target + block.copy.offset, kHint, block.keys.head * head_pieces_, block.place);
      } else {  // means
        const int32_t row = lane_ * kGroupRows;
        load_box(map, full, target + Operand::offset(row, 0), kHint, 0, block.place.token + row, block.keys.head,
                 block.place.batch);
      }
      return;
    }
    if (lane_ < block.copies) {
      load_box(map, full, target + block.copy.offset, kHint, block.copy.piece, block.place.token, block.keys.head,
               block.place.batch);
    }
#pragma unroll 1
    for (int32_t i = lane_ + 32; i < block.copies; i += 32) {  // boxes of few rows
      const Copy next = copy_of(i);
      const Place place = place_of(block.keys, block.first_key + next.row);
      load_box(map, full, target + next.offset, kHint, next.piece, place.token, block.keys.head, place.batch);
    }
  }

  // Of an unmasked block, by the lanes whose share it is.
  __device__ void load_share(const CUtensorMap& map, const Share& share, int32_t head, Mbarrier& full, char* target) {
    constexpr auto kHint = cute::TMA::CacheHintSm90::EVICT_LAST;
    if (share.row == 0) full.arrive_expect(Operand::kTileBytes);
    if constexpr (Config::kPages) {
      load_pages(map, full, target + share.offset, kHint, head * head_pieces_, share.place);
    } else {
      load_box(map, full, target, kHint, 0, share.place.token, head, share.place.batch);
    }
  }

  static __device__ void load_box(const CUtensorMap& map, Mbarrier& full, char* target, cute::TMA::CacheHintSm90 hint,
                                  int32_t piece, int32_t token, int32_t head, int32_t batch) {
    cute::SM90_TMA_LOAD_5D::copy(&map, &full.state, static_cast<uint64_t>(hint), target, 0, token, piece, head, batch);
  }

  // Of kPages (make_page_map): rows of a page with all their columns. `piece`: the first one of the head.
  static __device__ void load_pages(const CUtensorMap& map, Mbarrier& full, char* target, cute::TMA::CacheHintSm90 hint,
                                    int32_t piece, const Place& place) {
    cute::SM90_TMA_LOAD_5D::copy(&map, &full.state, static_cast<uint64_t>(hint), target, 0, 0, piece,
                                 place.token / kGroupRows, place.batch);
  }

  SharedStorage<Config>& shared_;
  const KernelParams& p_;
  const int lane_;

 private:
  static constexpr int kBlockShift = 7;
  static_assert(1 << kBlockShift == kBlockKeys);
  static constexpr int kPiecesOfCopy = Config::kPages ? Operand::kPieces : 1;

  __device__ Copy copy_of(int32_t i) const {
    constexpr int kCopies = Operand::kPieces / kPiecesOfCopy;  // of the same rows
    const int32_t row = i / kCopies << p_.box_shift, piece = i % kCopies;
    return {row, piece, Operand::offset(row, piece)};
  }

  __device__ Place place_of(const Keys& keys, int32_t token) const {
    if (!Config::kPages && p_.block_table == nullptr) return {keys.first_token + token, keys.batch};
    int page, slot;
    p_.page_size(page, slot, token);
    return {slot, __ldg(keys.pages + page)};
  }

  template <bool kOneCopy>
  __device__ Block block_at(const Keys& keys, int32_t first_key, int32_t seqlen) const {
    Block block{keys, first_key, seqlen - first_key, 0, 0, kOneCopy ? Copy{} : copy_of(lane_), {}};
    if (kOneCopy || p_.box_rows == kBlockKeys) {
      block.copies = block.valid > 0;
      block.bytes = block.valid > 0 ? Operand::kTileBytes : 0;
    } else {
      const int32_t boxes = (max(min(block.valid, kBlockKeys), 0) + p_.box_rows - 1) >> p_.box_shift;
      block.copies = boxes * (Operand::kPieces / kPiecesOfCopy);
      block.bytes = (boxes << p_.box_shift) * (Operand::kDim * 2);
    }
    if (lane_ < block.copies) block.place = place_of(keys, first_key + block.copy.row);
    return block;
  }

  // The means from `first` on, as a block: one box, or one for each group of rows.
  static __device__ Block means_at(int32_t head, int32_t sequence, int32_t first) {
    constexpr int kCopies = Config::kPages ? kBlockKeys / kGroupRows : 1;
    return {{nullptr, 0, sequence, head}, first, kBlockKeys, kCopies, Operand::kTileBytes, {}, {first, sequence}};
  }

  // Brings the page numbers of a block near, one block before they are needed.
  __device__ void prefetch_pages(const Keys& keys, int32_t index, int32_t seqlen) const {
    if (p_.block_table == nullptr || index < 0) return;
    const int32_t token = index * kBlockKeys + lane_ * (kBlockKeys / 32);
    if (token < seqlen) asm volatile("prefetch.global.L1 [%0];" ::"l"(keys.pages + p_.page_size.div(token)));
  }

  const int32_t head_pieces_;
};

// Queries, keys, and what the consumers are told about tiles and steps.
template <class Config>
class KeyLoader : public Loader<Config, typename Config::Keys> {
  using Base = Loader<Config, typename Config::Keys>;
  using typename Base::Block, typename Base::Share;

 public:
  __device__ KeyLoader(SharedStorage<Config>& shared, const KernelParams& p) : Base(shared, p, p.k_head_pieces) {}

  __device__ void run() {
    // Where there is one query slot only, it comes free while the first keys are already on their way.
    constexpr bool kQueryFirst = Config::kQuerySlots > 1;
    int32_t head_of_query = 0;
    this->for_each_step(
        [&](const TileRow& tile, int32_t head, float cut) {
          if (kQueryFirst) {
            load_query(tile, head, cut);
          } else {
            head_of_query = head;
          }
        },
        [&](const TileRow& tile, Block block, bool first, bool last) {
          Step step{block.first_key, flags_of(tile, block, first, last)};
          char* target = await_key_slot(step);
          if constexpr (Config::kTokens) load_tokens(tile, block);
          load_step(this->p_.k, block, step, target);
          if (!kQueryFirst && first) load_query(tile, head_of_query, 0.0f);
        },
        [&](int32_t index, const Share& share, int32_t head, bool last) {
          Step step{index * kBlockKeys, (last ? kLast : 0u) | keep_of(index)};
          char* target = await_key_slot(step);
          if (share.block == index) {
            if (share.row == 0) this->shared_.steps[key_.slot] = step;
            this->load_share(this->p_.k, share, head, this->shared_.full[key_.slot], target);
          }
          key_.advance();
        },
        [&](const TileRow& tile, const Block& block, uint32_t columns, bool first, bool last) {
          const uint32_t flags = kMeans | kMasked | (first ? kFirst : 0) | (last ? kLast : 0);
          Step step{block.first_key, flags | static_cast<uint32_t>(columns_.slot) << kColumnsShift};
          char* target = await_key_slot(step);
          if (this->lane_ < kBlockKeys / 32) {
            this->shared_.columns[columns_.slot].words[this->lane_] = columns;
          }
          __syncwarp();
          load_step(this->p_.k_means, block, step, target);
          columns_.advance();
          if (!kQueryFirst && first) load_query(tile, head_of_query, 0.0f);
        });
    // The end is a step without a block.
    Step end{0, kEnd};
    await_key_slot(end);
    if (this->lane_ == 0) {
      this->shared_.steps[key_.slot] = end;
      this->shared_.full[key_.slot].arrive();
    }
  }

 private:
  __device__ void load_step(const CUtensorMap& map, const Block& block, const Step& step, char* target) {
    if (this->lane_ == 0) this->shared_.steps[key_.slot] = step;
    this->load_block(map, block, this->shared_.full[key_.slot], target);
    key_.advance();
  }

  // The slot of a step's keys, once it is free. In a pool the step says where the next one's will lie.
  __device__ char* await_key_slot(Step& step) {
    if constexpr (Config::kPool) {
      const bool first = step.flags & kFirst;
      const uint32_t entry = pool_.take_keys(first || after_first_);
      after_first_ = first;
      step.flags |= pool_.first() << kFirstSlotShift | pool_.second() << kSecondSlotShift;
      return await_pool_slot(entry);
    } else {
      this->shared_.key_empty[key_.slot].wait(key_.parity ^ 1);
      return this->shared_.key[key_.slot];
    }
  }
  // That of a tile's queries.
  __device__ char* await_query_slot() {
    if constexpr (Config::kPool) {
      return await_pool_slot(pool_.take_query());
    } else {
      this->shared_.query_empty[query_.slot].wait(query_.parity ^ 1);
      return this->shared_.query[query_.slot];
    }
  }
  __device__ char* await_pool_slot(uint32_t entry) {
    this->shared_.key_empty[entry >> 1].wait((entry & 1) ^ 1);
    return this->shared_.key[entry >> 1];
  }

  // The token mask's words of a block: they come with its keys, and are counted among its bytes.
  __device__ void load_tokens(const TileRow& tile, Block& block) {
    if (block.valid <= 0) return;
    block.bytes += sizeof(TokenWords);
    Mbarrier& full = this->shared_.full[key_.slot];
    if (this->lane_ == 0) {
      cute::SM90_TMA_LOAD_3D::copy(
          &this->p_.tokens, &full.state, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
          &this->shared_.tokens.key[key_.slot], block.first_key / 32, tile.query_token, tile.query_batch);
    }
  }

  __device__ void load_query(const TileRow& tile, int32_t head, float cut) {
    if constexpr (Config::kSkip) {
      // The window as always_kept() in bsfa/keep.h has it, where tiles are as long as blocks.
      const int32_t visible = visible_range(tile, this->p_.causal, -1).end, window = this->p_.skip.window_blocks;
      const int32_t own = min(max(tile.position, 0) / kBlockKeys, visible - 1);
      kept_ = {max(own - window, -1) + 1, this->p_.causal || window > visible - own ? visible : own + window};
    }
    char* target = await_query_slot();
    if (this->lane_ == 0) {
      this->shared_.tiles[Config::kStaged ? query_.slot : info_.slot] = {tile, head, cut, lse_of(tile, head)};
      Mbarrier& full = this->shared_.query_full[query_.slot];
      full.arrive_expect(Config::Queries::kTileBytes);
      Base::load_box(this->p_.q, full, target, cute::TMA::CacheHintSm90::EVICT_FIRST, 0, tile.query_token, head,
                     tile.query_batch);
    }
    query_.advance();
    info_.advance();
  }

  __device__ float* lse_of(const TileRow& tile, int32_t head) const {
    const KernelParams& p = this->p_;
    if (p.lse == nullptr) return nullptr;
    return p.lse + (tile.query_batch * p.lse_batch_stride + head * p.lse_head_stride + tile.query_token);
  }

  __device__ uint32_t flags_of(const TileRow& tile, const Block& block, bool first, bool last) const {
    const int32_t last_key = block.first_key + kBlockKeys - 1;
    const bool some_foreign = tile.row_begin > 0 || tile.row_end < kTileRows;
    const bool outside_window =
        this->p_.window_left >= 0 && block.first_key < tile.position + tile.row_end - 1 - this->p_.window_left;
    const bool cut =
        block.valid < kBlockKeys || (this->p_.causal && last_key > tile.position + tile.row_begin) || outside_window;
    uint32_t flags = (first ? kFirst : 0) | (last ? kLast : 0) | (cut || (first && some_foreign) ? kMasked : 0);
    if (this->p_.causal && block.first_key == tile.position && !some_foreign && !outside_window) flags |= kDiagonal;
    if (Config::kSkip && block.valid <= 0) flags |= kNone;
    return flags | keep_of(block.first_key / kBlockKeys);
  }

  // Of kSkip: whether block `index` is never skipped.
  __device__ uint32_t keep_of(int32_t index) const {
    if constexpr (Config::kSkip) {
      if (index < this->p_.skip.sink_blocks || (index >= kept_.begin && index < kept_.end)) return kKeep;
    }
    return 0;
  }

  RingPosition<Config::kQuerySlots> query_;
  RingPosition<Config::kInfoSlots> info_;  // where a query slot has no TileInfo of its own
  RingPosition<Config::kKeySlots> key_;
  RingPosition<Config::kKeySlots + 1> columns_;
  PoolOrder pool_;
  bool after_first_ = false;  // of kPool: the step before was the first of its tile
  BlockRange kept_;           // of kSkip: the window of the tile, never skipped
};

// Values. A block's V is part of the step after its own, which uses it.
template <class Config>
class ValueLoader : public Loader<Config, typename Config::Values> {
  using Base = Loader<Config, typename Config::Values>;

  using typename Base::Block, typename Base::Share;

 public:
  __device__ ValueLoader(SharedStorage<Config>& shared, const KernelParams& p) : Base(shared, p, p.v_head_pieces) {}

  __device__ void run() {
    if (this->lane_ == 0) this->shared_.full[step_.slot].arrive();  // the first step of all has none
    step_.advance();
    this->for_each_step(
        [](const TileRow&, int32_t, float) {},
        [this](const TileRow&, const Block& block, bool, bool) { load_step(this->p_.v, block); },
        [this](int32_t index, const Share& share, int32_t head, bool) {
          await_slot();
          if (share.block == index) {
            this->load_share(this->p_.v, share, head, this->shared_.full[step_.slot], this->shared_.value[value_.slot]);
          }
          value_.advance();
          step_.advance();
        },
        [this](const TileRow&, const Block& block, uint32_t, bool, bool) { load_step(this->p_.v_means, block); });
  }

 private:
  __device__ void await_slot() const {
    this->shared_.value_empty[value_.slot].wait(value_.parity ^ 1);
    // The barrier must be past the step that had it before, whose K may still be missing.
    this->shared_.full[step_.slot].wait(step_.parity ^ 1);
  }

  __device__ void load_step(const CUtensorMap& map, const Block& block) {
    await_slot();
    load_value(map, block, this->shared_.full[step_.slot], this->shared_.value[value_.slot]);
    value_.advance();
    step_.advance();
  }

  __device__ void load_value(const CUtensorMap& map, const Block& block, Mbarrier& full, char* target) {
    // Rows past the sequence's end meet probabilities of zero, but zero times NaN is NaN: they must be zeros.
    const bool zero_tail = block.valid < kBlockKeys && (block.valid <= 0 || !this->p_.tails_are_zero);
    if (!zero_tail) {
      this->load_block(map, block, full, target);
      return;
    }
    Mbarrier& fetched = this->shared_.value_tail;
    this->load_block(map, block, fetched, target);
    fetched.wait(tail_parity_);
    tail_parity_ ^= 1;
    constexpr int kPieces = kBoxColumns * 2 / 16;  // of 16 bytes in a row
    for (int i = max(block.valid, 0) * kPieces + this->lane_; i < kBlockKeys * kPieces; i += 32) {
      for (int piece = 0; piece < Config::Values::kPieces; ++piece) {
        char* row = target + Config::Values::offset(i / kPieces, piece);
        *reinterpret_cast<uint4*>(row + i % kPieces * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    __syncwarp();
    if (this->lane_ == 0) full.arrive();
  }

  RingPosition<Config::kValueSlots> value_;
  RingPosition<Config::kKeySlots> step_;
  uint32_t tail_parity_ = 0;
};

}  // namespace bsfa::cuda::attn::sm90
