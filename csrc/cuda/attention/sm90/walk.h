// The blocks of a tile, in the order in which its producer warps fetch them.
#pragma once

#include "config.h"

namespace bsfa::cuda::attn::sm90 {

// Some neighbouring blocks: `first + i` where bit i is set.
struct BlockGroup {
  int32_t first;
  uint32_t bits;

  __device__ bool empty() const { return bits == 0; }
  __device__ int last_bit() const { return 31 - __clz(bits); }
  __device__ int32_t last() const { return first + last_bit(); }
  __device__ void drop_last() { bits &= ~(1u << last_bit()); }
};

// The kept blocks of a tile, last one first, in groups. Warp-collective; each lane holds one word of the mask.
class BlockWalk {
 public:
  __device__ BlockWalk(const int32_t* words, BlockRange range, uint32_t word, int lane)
      : words_(words), range_(range), lane_(lane), chunk_(last_chunk(range)) {
    word_ = word & range_.bits_of_word(chunk_ * kMaskChunk + lane_);
  }

  // The chunk of words where the walk starts.
  static __device__ int32_t last_chunk(BlockRange range) { return max(range.end - 1, 0) / (32 * kMaskChunk); }

  // A lane's word of a chunk, as it lies in memory. Past L1: the kernels before may have just written it (schedule()).
  static __device__ uint32_t load(const int32_t* words, BlockRange range, int32_t chunk, int lane) {
    const int32_t w = chunk * kMaskChunk + lane;
    if (w * 32 >= range.end) return 0;
    return words == nullptr ? ~0u : static_cast<uint32_t>(__ldcg(words + w));
  }

  // The next group, of `size` blocks in a row those that are kept; or an empty one. `size` is a power of two up to 32,
  // and groups begin at its multiples.
  __device__ BlockGroup next(int32_t size) {
    unsigned lanes = __ballot_sync(kAllLanes, word_ != 0);
    while (lanes == 0) {
      if (chunk_ * kMaskChunk * 32 <= range_.begin) return {};
      --chunk_;
      word_ = load(words_, range_, chunk_, lane_) & range_.bits_of_word(chunk_ * kMaskChunk + lane_);
      lanes = __ballot_sync(kAllLanes, word_ != 0);
    }
    const int top = 31 - __clz(lanes);
    BlockGroup group{(chunk_ * kMaskChunk + top) * 32, __shfl_sync(kAllLanes, word_, top)};
    group.bits &= ~0u << (group.last_bit() & -size);
    if (lane_ == top) word_ ^= group.bits;
    return group;
  }

 private:
  const int32_t* words_;
  BlockRange range_;
  int lane_;
  int32_t chunk_;
  uint32_t word_;
};

// The kept blocks in the order in which they may be skipped: the last one, block 0, then the others, last one first.
class SkipWalk {
 public:
  // `sink`: block 0 is among them.
  __device__ SkipWalk(const int32_t* words, BlockRange range, uint32_t word, bool sink, int lane)
      : walk_(words, {sink ? 1 : range.begin, range.end}, word, lane), sink_(sink) {}

  // As BlockWalk's, but the last block, and block 0 after it, are groups of their own.
  __device__ BlockGroup next(int32_t size) {
    if (!sink_ || !begun_) {
      const BlockGroup group = walk_.next(begun_ ? size : 1);
      begun_ = true;
      if (!group.empty() || !sink_) return group;
    }
    sink_ = false;
    return {0, 1};
  }

 private:
  BlockWalk walk_;
  bool sink_;  // block 0 is still to come
  bool begun_ = false;
};

// The blocks whose means a tile adds: those that all its rows see and its mask drops. In chunks of kBlockKeys,
// last one first, without those that have nothing to add. Warp-collective; each lane holds one word.
class MeansWalk {
 public:
  // `word`: what a BlockWalk over `range` starts with. `end`: the blocks that all rows see.
  __device__ MeansWalk(const int32_t* words, BlockRange range, uint32_t word, int32_t end, int lane)
      : words_(words), seen_{0, end}, lane_(lane), chunk_(BlockWalk::last_chunk(seen_)) {
    if (chunk_ != BlockWalk::last_chunk(range)) word = BlockWalk::load(words_, seen_, chunk_, lane_);
    word_ = dropped(word);
  }

  // The first block of the next chunk, or -1; `columns` becomes word lane % 4 of its four.
  __device__ int32_t next(uint32_t* columns) {
    unsigned lanes = __ballot_sync(kAllLanes, word_ != 0);
    while (lanes == 0) {
      if (chunk_ == 0) return -1;
      --chunk_;
      word_ = dropped(BlockWalk::load(words_, seen_, chunk_, lane_));
      lanes = __ballot_sync(kAllLanes, word_ != 0);
    }
    const int first = (31 - __clz(lanes)) / kWords * kWords;
    *columns = __shfl_sync(kAllLanes, word_, first + lane_ % kWords);
    if (lane_ / kWords * kWords == first) word_ = 0;
    return (chunk_ * kMaskChunk + first) * 32;
  }

 private:
  static constexpr int kWords = kBlockKeys / 32;

  __device__ uint32_t dropped(uint32_t word) const { return ~word & seen_.bits_of_word(chunk_ * kMaskChunk + lane_); }

  const int32_t* words_;
  BlockRange seen_;
  int lane_;
  int32_t chunk_;
  uint32_t word_;
};

}  // namespace bsfa::cuda::attn::sm90
