// The KV blocks that a tile's rows see, all of them or some (csrc/cuda/common/tile_row.h), against what each row sees.
#include "../cuda/common/tile_row.h"

#include <cstdio>
#include <initializer_list>

namespace {

using bsfa::BlockRange;
using bsfa::cuda::kBlockKeys;
using bsfa::cuda::TileRow;

// Keys that one row sees of a block.
int seen(const TileRow& tile, int row, int block, bool causal, int window_left) {
  const int position = tile.position + row;
  int keys = 0;
  for (int key = block * kBlockKeys; key < (block + 1) * kBlockKeys && key < tile.seqlen_k; ++key) {
    keys += (!causal || key <= position) && (window_left < 0 || key >= position - window_left);
  }
  return keys;
}

bool check(const TileRow& tile, bool causal, int window_left) {
  const BlockRange visible = visible_range(tile, causal, window_left);
  const BlockRange unmasked = unmasked_blocks(tile, causal, window_left);
  const int whole = whole_blocks(tile, causal);
  bool good = true;
  for (int block = 0; block * kBlockKeys < tile.seqlen_k; ++block) {
    const int keys = tile.seqlen_k - block * kBlockKeys;
    bool some = false, all = true, full = true;
    for (int row = tile.row_begin; row < tile.row_end; ++row) {
      const int n = seen(tile, row, block, causal, window_left);
      some |= n > 0;
      all &= n == (keys < kBlockKeys ? keys : kBlockKeys);
      full &= n == kBlockKeys;
    }
    good &= !some || (block >= visible.begin && block < visible.end);
    good &= full == (block >= unmasked.begin && block < unmasked.end);
    // A causal block counts as whole only if all 128 of its tokens do; windows are not asked about.
    if (window_left < 0) good &= (all && (!causal || full)) == (block < whole);
  }
  if (!good) {
    std::printf("wrong: position %d, rows %d to %d, %d keys, causal %d, window %d\n", tile.position, tile.row_begin,
                tile.row_end, tile.seqlen_k, causal, window_left);
  }
  return good;
}

}  // namespace

int main() {
  int cases = 0, wrong = 0;
  for (int position : {-200, -128, -127, -1, 0, 1, 127, 128, 129, 300, 384, 511, 512}) {
    for (int begin : {0, 1, 64, 127}) {
      for (int end : {1, 2, 64, 128}) {
        if (begin >= end) continue;
        for (int keys : {0, 1, 127, 128, 129, 255, 256, 511, 512, 700}) {
          for (int window : {-1, 0, 1, 127, 128, 129, 255, 300}) {
            TileRow tile{};
            tile.position = position;
            tile.row_begin = begin;
            tile.row_end = end;
            tile.seqlen_k = keys;
            ++cases;
            if (position + end <= keys) wrong += !check(tile, true, window);  // no row lies past the keys
            if (window < 0) wrong += !check(tile, false, window);
          }
        }
      }
    }
  }
  std::printf("%d tiles, %d wrong\n", cases, wrong);
  return wrong != 0;
}
