// The order that schedule.cu makes, as a formula: where there is no mask and all sequences are alike, the host knows
// every length, and the number of KV blocks of a tile depends on nothing but its place in its sequence.
//
// Tiles of a sequence, last one first, never get longer. So every bucket of lengths is a run of neighbouring tiles, and
// in the order a run has as many pairs as its tiles have in all sequences and heads: one division finds it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bsfa/geometry.h"

namespace bsfa::cuda {

struct Pair {
  int32_t row;
  int32_t head;
};

constexpr int kSubBits = 2;  // buckets of long tiles in an octave: 2^kSubBits

BSFA_HOST_DEVICE inline int floor_log2(int32_t positive) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(positive);
#else
  return 31 - __builtin_clz(static_cast<unsigned>(positive));
#endif
}

struct KnownOrder {
  SequenceGeometry geometry;  // of every sequence; tiles and blocks of 128 tokens
  int32_t batch = 0;
  int32_t heads = 0;
  int32_t group = 1;  // of heads that follow each other
  int32_t tiles = 0;  // of a sequence
  int32_t total = 0;  // pairs; 0: the order is not known
  int32_t first_count = 0;
  int32_t longest_short = 0;  // blocks; at least 1

  // Blocks that local tile t visits.
  BSFA_HOST_DEVICE int32_t count(int32_t t) const {
    const int32_t n = geometry.causal ? first_count + t : first_count;
    return n > 0 ? n : 0;
  }

  // Entry `index` of the order.
  BSFA_HOST_DEVICE Pair pair(int32_t index) const {
    const int32_t pairs_of_tile = batch * heads;
    int32_t first = 0, last = tiles - 1;  // tiles of the run that the entry lies in
    if (geometry.causal) {
      const int32_t blocks = count(tiles - 1 - index / pairs_of_tile);
      if (blocks <= longest_short) {
        last = lesser(longest_short - first_count, last);
      } else {
        const int32_t cost = blocks << kSubBits, shift = floor_log2(cost) - kSubBits;
        const int32_t least = cost >> shift << shift, most = least + (1 << shift) - 1;
        const int32_t fewest = (least + (1 << kSubBits) - 1) >> kSubBits;
        first = greater(greater(fewest, longest_short + 1) - first_count, 0);
        last = lesser((most >> kSubBits) - first_count, last);
      }
    }
    // Natural order within the run: groups of heads, sequences and tiles from the last to the first, the group's heads.
    int32_t rest = index - (tiles - 1 - last) * pairs_of_tile;
    const int32_t of_group = rest / group, in_group = rest - of_group * group;
    const int32_t run = last - first + 1;
    rest = of_group / run;
    const int32_t tile = last - (of_group - rest * run);
    const int32_t groups_before = rest / batch;
    const int32_t sequence = batch - 1 - (rest - groups_before * batch);
    return {sequence * tiles + tile, groups_before * group + in_group};
  }

  // Where the order is dealt out to `ctas` CTAs, at most two entries each: what follows entry `index` for its CTA,
  // which begins with the entry of its own number. The CTA that has the longest tile gets the shortest one beside it.
  BSFA_HOST_DEVICE int32_t dealt_after(int32_t index, int32_t ctas) const {
    return index < ctas ? 2 * ctas - 1 - index : total;
  }

 private:
  static BSFA_HOST_DEVICE int32_t lesser(int32_t a, int32_t b) { return a < b ? a : b; }
  static BSFA_HOST_DEVICE int32_t greater(int32_t a, int32_t b) { return a > b ? a : b; }
};

// Of a problem with tiles and blocks of 128 tokens whose sequences are all alike, without a mask or window. Tiles of
// more blocks than all work divided by `shares` are long.
inline KnownOrder known_order(const Problem& problem, int32_t heads, int32_t group, int64_t shares) {
  KnownOrder order;
  order.geometry = sequence_geometry(problem, 0);
  order.batch = problem.batch;
  order.heads = heads;
  order.group = group;
  order.tiles = order.geometry.num_tiles();
  order.total = order.batch * order.tiles * heads;
  order.first_count = problem.causal ? order.geometry.first_tile() + 1 : order.geometry.num_blocks();
  int64_t work = int64_t{order.count(0)} * order.tiles;
  if (problem.causal) {
    const int64_t least = std::max(order.first_count, 1), most = int64_t{order.first_count} + order.tiles - 1;
    work = most < least ? 0 : (least + most) * (most - least + 1) / 2;
  }
  work *= int64_t{order.batch} * heads;
  const int64_t longest = std::max(int64_t{order.first_count} + order.tiles, int64_t{1});
  order.longest_short = static_cast<int32_t>(std::clamp<int64_t>(work / shares, 1, longest));
  return order;
}

// Natural order, of the same problems: all tiles count as short.
inline KnownOrder natural_order(const Problem& problem, int32_t heads, int32_t group) {
  KnownOrder order = known_order(problem, heads, group, 1);
  order.longest_short = std::max(order.first_count + order.tiles, 1);
  return order;
}

}  // namespace bsfa::cuda
