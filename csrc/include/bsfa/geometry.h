// Which query tiles and KV blocks exist, and where: the one statement of bsfa's coordinates, for host and device.
//
// KV blocks count from the start of the sequence. Query tiles are aligned to absolute positions too: with causal
// attention query row i sits at position p = seqlen_k - seqlen_q + i and belongs to tile floor(p / block_m), so a
// prompt has the same tiles however it is cut into chunks. Without causality rows sit at position i. Positions can be
// negative (causal, seqlen_q > seqlen_k): such rows see nothing.
#pragma once

#include <cstdint>

#include "bsfa/params.h"

namespace bsfa {

BSFA_HOST_DEVICE constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

BSFA_HOST_DEVICE constexpr int32_t floor_div(int32_t a, int32_t b) {
  return a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
}

// KV blocks [begin, end).
struct BlockRange {
  int32_t begin;
  int32_t end;

  // The bits of mask word w whose blocks lie in the range.
  BSFA_HOST_DEVICE uint32_t bits_of_word(int32_t w) const {
    const int32_t low = begin - w * 32, high = end - w * 32;
    if (low >= 32 || high <= 0) return 0;
    return (low > 0 ? ~0u << low : ~0u) & (high < 32 ? ~(~0u << high) : ~0u);
  }
};

struct SequenceGeometry {
  int32_t seqlen_q = 0;
  int32_t seqlen_k = 0;
  int32_t block_m = 128;
  int32_t block_n = 128;
  bool causal = true;

  // Position of query row 0.
  BSFA_HOST_DEVICE int32_t offset() const { return causal ? seqlen_k - seqlen_q : 0; }
  // Absolute index of the first tile (negative if positions are).
  BSFA_HOST_DEVICE int32_t first_tile() const { return floor_div(offset(), block_m); }
  BSFA_HOST_DEVICE int32_t num_tiles() const {
    return seqlen_q == 0 ? 0 : floor_div(offset() + seqlen_q - 1, block_m) - first_tile() + 1;
  }
  BSFA_HOST_DEVICE int32_t num_blocks() const { return ceil_div(seqlen_k, block_n); }

  // Query rows [row_begin, row_end) of this call that local tile t covers.
  BSFA_HOST_DEVICE int32_t row_begin(int32_t t) const {
    const int32_t r = (first_tile() + t) * block_m - offset();
    return r > 0 ? r : 0;
  }
  BSFA_HOST_DEVICE int32_t row_end(int32_t t) const {
    const int32_t r = (first_tile() + t + 1) * block_m - offset();
    return r < seqlen_q ? r : seqlen_q;
  }
  // KV blocks [0, visible_blocks(t)) have at least one token that some row of tile t may attend to.
  BSFA_HOST_DEVICE int32_t visible_blocks(int32_t t) const {
    if (!causal) return num_blocks();
    const int32_t last = offset() + row_end(t) - 1;
    return last < 0 ? 0 : last / block_n + 1;
  }
  // KV blocks [0, whole_blocks(t)) are seen whole by every row of tile t that belongs to this call.
  BSFA_HOST_DEVICE int32_t whole_blocks(int32_t t) const {
    if (!causal) return num_blocks();
    const int32_t first = offset() + row_begin(t);
    return first < 0 ? 0 : (first + 1) / block_n;
  }
};

BSFA_HOST_DEVICE inline int32_t seqlen_q(const QueryLayout& query, int32_t sequence) {
  return query.cu_seqlens != nullptr ? query.cu_seqlens[sequence + 1] - query.cu_seqlens[sequence] : query.max_seqlen;
}

BSFA_HOST_DEVICE inline int32_t seqlen_k(const KvLayout& kv, int32_t sequence) {
  if (kv.cu_seqlens != nullptr) return kv.cu_seqlens[sequence + 1] - kv.cu_seqlens[sequence];
  return kv.seqlens != nullptr ? kv.seqlens[sequence] : kv.max_seqlen;
}

BSFA_HOST_DEVICE inline SequenceGeometry sequence_geometry(const Problem& problem, int32_t sequence) {
  SequenceGeometry geometry;
  geometry.seqlen_q = seqlen_q(problem.query, sequence);
  geometry.seqlen_k = seqlen_k(problem.kv, sequence);
  geometry.block_m = problem.block_m;
  geometry.block_n = problem.block_n;
  geometry.causal = problem.causal;
  return geometry;
}

// Whether all sequences have the same lengths, known on the host.
BSFA_HOST_DEVICE inline bool all_alike(const Problem& problem) {
  return problem.query.cu_seqlens == nullptr && problem.kv.cu_seqlens == nullptr && problem.kv.seqlens == nullptr;
}

// Rows that a mask needs: exact where all sequences are alike, else an upper bound that no device value goes into.
// `tokens` of all sequences together, for packed queries. The same as Layout.num_mask_rows in Python.
inline int64_t max_mask_rows(const Problem& problem, int64_t tokens) {
  if (problem.query.cu_seqlens != nullptr) return tokens / problem.block_m + int64_t{2} * problem.batch;
  if (problem.query.max_seqlen == 0 || problem.batch == 0) return 0;
  const int64_t tiles = all_alike(problem)
                            ? sequence_geometry(problem, 0).num_tiles()
                            : (int64_t{problem.query.max_seqlen} + problem.block_m - 2) / problem.block_m + 1;
  return problem.batch * tiles;
}

}  // namespace bsfa
