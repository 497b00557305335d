// token_mask: bits of the keys that each query row may see, and of the blocks that hold one; a query tile at a time.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bsfa/cpu.h"
#include "bsfa/geometry.h"
#include "schedule.h"

namespace bsfa::cpu {
namespace {

// The invalid indices of some rows: how many, and the first one (-1: none).
struct Invalid {
  int64_t count = 0;
  int64_t first = -1;

  void add(int64_t place) {
    if (count++ == 0 || place < first) first = place;
  }
};

void set_bit(int32_t* words, int32_t bit) {
  words[bit / 32] = static_cast<int32_t>(static_cast<uint32_t>(words[bit / 32]) | 1u << (bit % 32));
}

int32_t set_bits(const int32_t* words, int32_t count) {
  int32_t sum = 0;
  for (int32_t w = 0; w < count; ++w) sum += __builtin_popcount(static_cast<uint32_t>(words[w]));
  return sum;
}

// The rows of one tile; `block_words` starts as zeros.
Invalid token_tile(const TokenMaskParams& params, int32_t sequence, int32_t tile, int32_t* block_words) {
  const Problem& problem = params.problem;
  const SequenceGeometry geometry = sequence_geometry(problem, sequence);
  const bool packed = problem.query.cu_seqlens != nullptr;
  const int64_t first = packed ? problem.query.cu_seqlens[sequence] : int64_t{sequence} * problem.query.max_seqlen;
  Invalid invalid;
  for (int32_t row = geometry.row_begin(tile); row < geometry.row_end(tile); ++row) {
    const int64_t r = first + row;
    const int32_t* indices =
        params.indices +
        (packed ? r * params.index_row_stride : sequence * params.index_batch_stride + row * params.index_row_stride);
    int32_t* words = params.words + r * params.row_words;
    std::fill_n(words, params.row_words, 0);
    const int32_t seen = geometry.causal ? std::min(geometry.seqlen_k, geometry.offset() + row + 1) : geometry.seqlen_k;
    for (int32_t i = 0; i < params.topk; ++i) {
      const int32_t key = indices[i];
      if (key == -1) continue;
      if (key < 0 || key >= geometry.seqlen_k) {
        invalid.add(r * params.topk + i);
      } else if (key < seen) {
        set_bit(words, key);
        set_bit(block_words, key / problem.block_n);
      }
    }
    params.counts[r] = set_bits(words, params.row_words);
  }
  return invalid;
}

}  // namespace

void token_mask(const TokenMaskParams& params, const Executor& executor) {
  const Problem& problem = params.problem;
  std::vector<std::pair<int32_t, int32_t>> places;  // sequence and tile of the rows in use
  for (int32_t b = 0; b < problem.batch; ++b) {
    const int32_t tiles = sequence_geometry(problem, b).num_tiles();
    for (int32_t t = 0; t < tiles; ++t) places.emplace_back(b, t);
  }
  const auto used = static_cast<int64_t>(places.size());
  if (used > params.num_rows) throw std::invalid_argument("bsfa: the mask has fewer rows than there are query tiles");
  std::fill_n(params.block_words, params.num_rows * params.num_words, 0);
  std::fill_n(params.block_counts, params.num_rows, 0);
  std::vector<Invalid> invalid(places.size());
  for_each_item(executor, used, 0, [&](int64_t index, float*) {
    int32_t* block_words = params.block_words + index * params.num_words;
    invalid[index] = token_tile(params, places[index].first, places[index].second, block_words);
    params.block_counts[index] = set_bits(block_words, params.num_words);
  });
  params.status[0] = 0;
  params.status[1] = -1;
  for (const Invalid& of_tile : invalid) {
    if (of_tile.count == 0) continue;
    params.status[0] += of_tile.count;
    if (params.status[1] < 0 || of_tile.first < params.status[1]) params.status[1] = of_tile.first;
  }
}

}  // namespace bsfa::cpu
