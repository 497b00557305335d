// One pool of four slots for queries and keys (Config::kPool): in the middle of a tile three of them hold keys; at its
// end one of these is taken for the next tile's queries, while the finished tile's output lies where its own were.
//
// Order    The load warp fetches in one order, a tile's queries and then its keys. It takes slots in the order in which
//          they come free: that of keys when their scores are made; that of queries when the output staged there was
//          stored, after the next tile's second step, or its only one. The steps alone say that: nothing is polled.
// Numbers  A Step tells the consumers which slots come after it. They know them a step ahead, and never wait for them.
// Waits    No deadlock: what a fetch waits for needs earlier fetches only. If keys were in the slot, it is given back
//          after their own step. If queries: their slot stays the last of the three in the order until two steps of
//          the next tile have been fetched, or its only one, and is given back after these. Values have a ring and a
//          warp of their own, which wait for no slot of the pool.
// Rings    Barriers and records that announce a step (full, Step) or a tile (query_full, TileInfo) are rings of three,
//          by number. Step s + 3 is not fetched before the slot of s was given back: if it was not taken again, it is
//          the first of three, before those of s + 1 and s + 2. Nor are the queries of t + 3 before those of t: at the
//          end of tile t + 1 their slot is among the three, and tile t + 2 takes two at least.
//
// csrc/tests/pool_test.cpp plays this with warps that run in any order.
#pragma once

#include <cstdint>

#include "bsfa/params.h"

namespace bsfa::cuda::attn::sm90 {

constexpr int kPoolSlots = 4;

// The load warp's: slots in the order in which they are taken, then that of the current queries. Four entries of three
// bits in one word; an entry is the slot's number << 1 | the parity of its barrier, as in a RingPosition.
class PoolOrder {
 public:
  // The first two slots.
  BSFA_HOST_DEVICE uint32_t first() const { return entries_ >> 1 & 3; }
  BSFA_HOST_DEVICE uint32_t second() const { return entries_ >> 4 & 3; }

  // A tile's queries take the first slot, and that of the tile before comes last, to stay there for two steps. Returns
  // the entry to wait for.
  BSFA_HOST_DEVICE uint32_t take_query() {
    const uint32_t entry = entries_ & 7;
    entries_ = entries_ >> 3 | (entry ^ 1) << 9;
    return entry;
  }

  // A step's keys take the first slot. `early`: the step is one of the first two of its tile.
  BSFA_HOST_DEVICE uint32_t take_keys(bool early) {
    const uint32_t entry = entries_ & 7;
    const uint32_t kept = early ? 07700 : 07000;  // places behind those that move up by one
    entries_ = (entries_ & kept) | (entries_ & ~kept) >> 3 | (entry ^ 1) << (early ? 3 : 6);
    return entry;
  }

 private:
  uint32_t entries_ = 06420;
};

constexpr int kFirstQuery = 0, kFirstKey = 1;  // of all: where PoolOrder begins

}  // namespace bsfa::cuda::attn::sm90
