// The words of a mask from vertical and slash patterns (PatternParams). For host and device.
#pragma once

#include <cstdint>

#include "bsfa/geometry.h"
#include "bsfa/keep.h"
#include "bsfa/params.h"

namespace bsfa {

BSFA_HOST_DEVICE inline uint32_t reversed_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __brev(x);
#else
  x = (x >> 16) | (x << 16);
  x = ((x & 0xff00ff00u) >> 8) | ((x & 0x00ff00ffu) << 8);
  x = ((x & 0xf0f0f0f0u) >> 4) | ((x & 0x0f0f0f0fu) << 4);
  x = ((x & 0xccccccccu) >> 2) | ((x & 0x33333333u) << 2);
  return ((x & 0xaaaaaaaau) >> 1) | ((x & 0x55555555u) << 1);
#endif
}

// Bit i = bit (top - i) of the bit string `words`; bits outside of it are 0.
BSFA_HOST_DEVICE inline uint32_t mirrored_word(const int32_t* words, int32_t num_words, int32_t top) {
  const int32_t first = top - 31;  // the window [first, top], which is then turned round
  const int32_t at = floor_div(first, 32), shift = first - at * 32;
  const uint32_t low = at >= 0 && at < num_words ? static_cast<uint32_t>(words[at]) : 0u;
  const uint32_t high = at + 1 >= 0 && at + 1 < num_words ? static_cast<uint32_t>(words[at + 1]) : 0u;
  return reversed_bits(shift == 0 ? low : (low >> shift) | (high << (32 - shift)));
}

// What all heads of one mask row have in common.
struct PatternRow {
  int32_t sequence = 0;
  int32_t visible = 0;  // blocks
  AlwaysKept always;
};

BSFA_HOST_DEVICE inline PatternRow pattern_row(const PatternParams& params, int32_t sequence, int32_t tile) {
  const SequenceGeometry geometry = sequence_geometry(params.problem, sequence);
  PatternRow row;
  row.sequence = sequence;
  row.visible = geometry.visible_blocks(tile);
  row.always = always_kept(geometry, tile, params.sink_blocks, params.window_blocks);
  return row;
}

// Word `word` of mask row `index`, head `head`.
BSFA_HOST_DEVICE inline uint32_t pattern_word(const PatternParams& params, const PatternRow& row, int64_t index,
                                              int32_t head, int32_t word) {
  const int32_t heads = params.problem.num_q_heads;
  const int64_t of_head = int64_t{row.sequence} * heads + head;
  uint32_t bits = static_cast<uint32_t>(params.vertical[of_head * params.num_words + word]);
  // The tile's own block, that of its last position, is the last one that it sees.
  if (params.problem.causal) {
    bits |= mirrored_word(params.slash + of_head * params.num_words, params.num_words, row.visible - 1 - word * 32);
  }
  if (params.query_aware[of_head] != 0) {
    bits |= static_cast<uint32_t>(params.base[(index * heads + head) * params.num_words + word]);
  }
  const BlockRange sink{0, row.always.sink_end}, window{row.always.window_begin, row.always.window_end};
  const BlockRange visible{0, row.visible};
  bits |= sink.bits_of_word(word) | window.bits_of_word(word);
  return bits & visible.bits_of_word(word);
}

}  // namespace bsfa
