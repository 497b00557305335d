// The two producer warps: one hands out tiles, one walks their masks and fetches queries, keys and values by TMA.
#pragma once

#include "config.h"

namespace bsfa::cuda::attn::sm90 {

constexpr unsigned kAllLanes = 0xffffffffu;

// The kept blocks of a tile, last one first. Warp-collective; each lane holds one word of the mask.
class BlockWalk {
 public:
  __device__ BlockWalk(const int32_t* words, BlockRange range, uint32_t word, int lane)
      : words_(words), range_(range), lane_(lane), chunk_(last_chunk(range)) {
    word_ = word & range_.bits_of_word(chunk_ * kMaskChunk + lane_);
  }

  // The chunk of words where the walk starts.
  static __device__ int32_t last_chunk(BlockRange range) { return max(range.end - 1, 0) / (32 * kMaskChunk); }

  // A lane's word of a chunk, as it lies in memory.
  static __device__ uint32_t load(const int32_t* words, BlockRange range, int32_t chunk, int lane) {
    const int32_t w = chunk * kMaskChunk + lane;
    if (w * 32 >= range.end) return 0;
    return words == nullptr ? ~0u : static_cast<uint32_t>(__ldg(words + w));
  }

  // The next block, or -1.
  __device__ int32_t next() {
    unsigned lanes = __ballot_sync(kAllLanes, word_ != 0);
    while (lanes == 0) {
      if (chunk_ * kMaskChunk * 32 <= range_.begin) return -1;
      --chunk_;
      word_ = load(words_, range_, chunk_, lane_) & range_.bits_of_word(chunk_ * kMaskChunk + lane_);
      lanes = __ballot_sync(kAllLanes, word_ != 0);
    }
    const int top = 31 - __clz(lanes);
    const int bit = 31 - __clz(__shfl_sync(kAllLanes, word_, top));
    if (lane_ == top) word_ ^= 1u << bit;
    return (chunk_ * kMaskChunk + top) * 32 + bit;
  }

 private:
  const int32_t* words_;
  BlockRange range_;
  int lane_;
  int32_t chunk_;
  uint32_t word_;
};

// Takes pairs from the queue, one tile ahead of the load warp, so that none of these reads is waited for.
template <class Config>
__device__ void schedule(SharedStorage<Config>& shared, const KernelParams& p) {
  const int lane = threadIdx.x % 32;
  const Workspace& workspace = p.workspace;
  const int32_t total = workspace.queue->total;
  RingPosition<kWorkSlots> slot;
  for (int32_t index = blockIdx.x;; slot.advance()) {
    Work& work = shared.work[slot.slot];
    shared.work_empty[slot.slot].wait(slot.parity ^ 1);
    if (index >= total) {
      if (lane == 0) {
        work.head = -1;
        shared.work_full[slot.slot].arrive();
      }
      return;
    }
    int32_t next = 0;
    if (lane == 0) next = gridDim.x + atomicAdd(&workspace.queue->next, 1);
    const Pair pair = workspace.order[index];
    const TileRow tile = workspace.rows[pair.row];
    const BlockRange range = visible_range(tile, p.causal, p.window_left);
    const int32_t* words = nullptr;
    if (p.words != nullptr) {
      words = p.words + (static_cast<int64_t>(pair.row) * p.mask_heads + pair.head / p.heads_per_mask_head) * p.num_words;
    }
    work.chunk[lane] = BlockWalk::load(words, range, BlockWalk::last_chunk(range), lane);
    if (lane == 0) {
      work.tile = tile;
      work.head = pair.head;
      work.range = range;
      work.words = words;
    }
    __syncwarp();
    if (lane == 0) shared.work_full[slot.slot].arrive();
    index = __shfl_sync(kAllLanes, next, 0);
  }
}

// Fetches one tile after the other. V runs one block behind K, also from one tile to the next, which is the order in
// which the consumers want them.
template <class Config>
class Loader {
 public:
  __device__ Loader(SharedStorage<Config>& shared, const KernelParams& p)
      : shared_(shared), p_(p), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    RingPosition<kWorkSlots> work_slot;
    for (;; work_slot.advance()) {
      const Work& work = shared_.work[work_slot.slot];
      shared_.work_full[work_slot.slot].wait(work_slot.parity);
      const int32_t head = work.head;
      if (head < 0) break;
      const TileRow tile = work.tile;
      BlockWalk walk(work.words, work.range, work.chunk[lane_], lane_);
      __syncwarp();
      if (lane_ == 0) shared_.work_empty[work_slot.slot].arrive();
      load_tile(tile, head, walk);
    }
    // The end, as a K block that is none; then the V block that is still owed.
    shared_.key_empty[key_.slot].wait(key_.parity ^ 1);
    if (lane_ == 0) {
      shared_.steps[key_.slot] = {0, kEnd};
      shared_.key_full[key_.slot].arrive();
    }
    load_pending_value();
  }

 private:
  // Where the keys of one sequence and KV head lie.
  struct Keys {
    int32_t first_token;  // coordinate of key 0 (not paged)
    int32_t batch;
    int32_t head;
    int32_t seqlen;
    const int32_t* pages;
  };
  struct PendingValue {
    Keys keys;
    int32_t first_key = -1;
  };

  __device__ void load_tile(const TileRow& tile, int32_t head, BlockWalk& walk) {
    const Keys keys{tile.key_token, p_.keys_packed ? 0 : tile.sequence, head / p_.heads_per_kv_head, tile.seqlen_k,
                    p_.block_table + tile.sequence * p_.block_table_stride};
    int32_t block = walk.next();
    prefetch_pages(keys, block);

    shared_.query_empty[query_.slot].wait(query_.parity ^ 1);
    if (lane_ == 0) {
      shared_.tiles[query_.slot] = {tile, head};
      Mbarrier& full = shared_.query_full[query_.slot];
      full.arrive_expect(Config::kTileBytes);
      for (int half = 0; half < Config::kHalves; ++half) {
        load_box(p_.q, full, shared_.query[query_.slot] + half * Config::kBoxBytes, cute::TMA::CacheHintSm90::EVICT_FIRST,
                 half, tile.query_token, head, tile.query_batch);
      }
    }
    query_.advance();

    // A tile that keeps nothing visits one block of which no key is seen: its output is written like any other.
    uint32_t flags = kFirst;
    do {
      const int32_t first_key = block < 0 ? tile.seqlen_k : block * kBlockKeys;
      const int32_t following = block < 0 ? -1 : walk.next();
      prefetch_pages(keys, following);
      if (following < 0) flags |= kLast;
      if (is_masked(tile, first_key)) flags |= kMasked;

      shared_.key_empty[key_.slot].wait(key_.parity ^ 1);
      Mbarrier& full = shared_.key_full[key_.slot];
      if (lane_ == 0) {
        shared_.steps[key_.slot] = {first_key, flags};
        full.arrive_expect(block_bytes(keys, first_key));
      }
      __syncwarp();
      load_block(p_.k, keys, first_key, full, shared_.key[key_.slot]);
      key_.advance();

      load_pending_value();
      pending_.keys = keys;
      pending_.first_key = first_key;
      block = following;
      flags = 0;
    } while (block >= 0);
  }

  __device__ bool is_masked(const TileRow& tile, int32_t first_key) const {
    if (first_key + kBlockKeys > tile.seqlen_k) return true;
    if (!p_.causal) return false;
    return first_key + kBlockKeys - 1 > tile.position + tile.row_begin ||
           (p_.window_left >= 0 && first_key < tile.position + tile.row_end - 1 - p_.window_left);
  }

  __device__ void load_pending_value() {
    const int32_t first_key = pending_.first_key;
    if (first_key < 0) return;
    shared_.value_empty[value_.slot].wait(value_.parity ^ 1);
    Mbarrier& full = shared_.value_full[value_.slot];
    char* target = shared_.value[value_.slot];
    const int32_t valid = pending_.keys.seqlen - first_key;
    // Rows past the sequence's end meet probabilities of zero, but zero times NaN is NaN: they must be zeros.
    const bool zero_tail = valid < kBlockKeys && (valid <= 0 || !p_.tails_are_zero);
    Mbarrier& arrived = zero_tail ? shared_.value_tail : full;
    if (lane_ == 0) arrived.arrive_expect(block_bytes(pending_.keys, first_key));
    __syncwarp();
    load_block(p_.v, pending_.keys, first_key, arrived, target);
    if (zero_tail) {
      arrived.wait(tail_parity_);
      tail_parity_ ^= 1;
      constexpr int kPieces = kBoxColumns * 2 / 16;  // of 16 bytes in a row
      for (int i = max(valid, 0) * kPieces + lane_; i < kBlockKeys * kPieces; i += 32) {
        for (int half = 0; half < Config::kHalves; ++half) {
          *reinterpret_cast<uint4*>(target + half * Config::kBoxBytes + i * 16) = make_uint4(0, 0, 0, 0);
        }
      }
      fence_async_proxy();
      __syncwarp();
      if (lane_ == 0) full.arrive();
    }
    value_.advance();
  }

  // Boxes (of all tokens' rows) that a block is fetched in.
  __device__ int32_t num_boxes(const Keys& keys, int32_t first_key) const {
    return ceil_div(max(min(keys.seqlen - first_key, kBlockKeys), 0), p_.box_rows);
  }
  __device__ uint32_t block_bytes(const Keys& keys, int32_t first_key) const {
    return num_boxes(keys, first_key) * p_.box_rows * (Config::kHeadDim * 2);
  }

  __device__ void load_block(const CUtensorMap& map, const Keys& keys, int32_t first_key, Mbarrier& full, char* target) {
    const int32_t copies = num_boxes(keys, first_key) * Config::kHalves;
    for (int32_t i = lane_; i < copies; i += 32) {
      const int32_t row = i / Config::kHalves * p_.box_rows, half = i % Config::kHalves;
      int32_t token = first_key + row, batch = keys.batch;
      if (p_.block_table != nullptr) {
        const int32_t page = token / p_.page_size;
        token -= page * p_.page_size;
        batch = __ldg(keys.pages + page);
      } else {
        token += keys.first_token;
      }
      load_box(map, full, target + half * Config::kBoxBytes + row * (kBoxColumns * 2), cute::TMA::CacheHintSm90::EVICT_LAST,
               half, token, keys.head, batch);
    }
  }

  // Brings the page numbers of a block near, one block before they are needed.
  __device__ void prefetch_pages(const Keys& keys, int32_t block) const {
    if (p_.block_table == nullptr || block < 0) return;
    const int32_t token = block * kBlockKeys + lane_ * (kBlockKeys / 32);
    if (token >= keys.seqlen) return;
    asm volatile("prefetch.global.L1 [%0];" ::"l"(keys.pages + token / p_.page_size));
  }

  static __device__ void load_box(const CUtensorMap& map, Mbarrier& full, char* target, cute::TMA::CacheHintSm90 hint,
                                  int32_t half, int32_t token, int32_t head, int32_t batch) {
    cute::SM90_TMA_LOAD_4D::copy(&map, &full.state, static_cast<uint64_t>(hint), target, half * kBoxColumns, token, head,
                                 batch);
  }

  SharedStorage<Config>& shared_;
  const KernelParams& p_;
  const int lane_;
  RingPosition<kQuerySlots> query_;
  RingPosition<Config::kStages> key_, value_;
  PendingValue pending_;
  uint32_t tail_parity_ = 0;
};

}  // namespace bsfa::cuda::attn::sm90
