// pattern_mask: the words of each mask row, one row at a time (bsfa/pattern.h says how a word is made).
#include "bsfa/pattern.h"

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bsfa/cpu.h"
#include "schedule.h"

namespace bsfa::cpu {

void pattern_mask(const PatternParams& params, const Executor& executor) {
  const Problem& problem = params.problem;
  std::vector<std::pair<int32_t, int32_t>> places;  // sequence and tile of the rows in use
  for (int32_t b = 0; b < problem.batch; ++b) {
    const int32_t tiles = sequence_geometry(problem, b).num_tiles();
    for (int32_t t = 0; t < tiles; ++t) places.emplace_back(b, t);
  }
  const auto used = static_cast<int64_t>(places.size());
  if (used > params.num_rows) throw std::invalid_argument("bsfa: the mask has fewer rows than there are query tiles");
  const int32_t heads = problem.num_q_heads;
  const int64_t row_words = int64_t{heads} * params.num_words;
  std::fill(params.words + used * row_words, params.words + params.num_rows * row_words, 0);
  std::fill(params.counts + used * heads, params.counts + params.num_rows * heads, 0);
  for_each_item(executor, used, 0, [&](int64_t index, float*) {
    const PatternRow row = pattern_row(params, places[index].first, places[index].second);
    for (int32_t h = 0; h < heads; ++h) {
      int32_t count = 0;
      for (int32_t w = 0; w < params.num_words; ++w) {
        const uint32_t bits = pattern_word(params, row, index, h, w);
        params.words[index * row_words + int64_t{h} * params.num_words + w] = static_cast<int32_t>(bits);
        count += __builtin_popcount(bits);
      }
      params.counts[index * heads + h] = count;
    }
  });
}

}  // namespace bsfa::cpu
