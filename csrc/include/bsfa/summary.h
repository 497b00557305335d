// Where the pooled blocks of a paged KV cache are kept (python/bsfa/summary.py says why there).
//
// The entry of a KV block belongs to the page that holds the block's last token so far; a page has an entry for each
// block that it holds, or one if a block spans several pages. Entries are numbered page by page; behind those of all
// pages stands one that is always zero, for blocks past a sequence's end.
#pragma once

#include <cstdint>

#include "bsfa/geometry.h"

namespace bsfa {

// page_size divides block_n, or is a multiple of it.
struct SummaryParams {
  const int32_t* block_table = nullptr;  // [batch, columns]
  int64_t block_table_stride = 0;
  const int32_t* seqlens = nullptr;  // [batch]
  int32_t batch = 0;
  int32_t columns = 0;
  int32_t page_size = 1;
  int32_t block_n = 128;

  // summary_entries()
  int32_t blocks = 0;          // of each sequence
  int64_t num_pages = 0;       // of the cache
  int64_t* entries = nullptr;  // [batch, blocks]

  // summary_window(): the units (the larger of page and block) that hold new tokens, or the last, incomplete block
  const int32_t* lengths_q = nullptr;  // [batch] new tokens
  int32_t units = 0;                   // at most
  int32_t* table = nullptr;            // [batch, units * pages_of_unit()]
  int32_t* window_seqlens = nullptr;   // [batch] tokens, counted from the window's start

  BSFA_HOST_DEVICE int32_t blocks_per_page() const { return page_size > block_n ? page_size / block_n : 1; }
  BSFA_HOST_DEVICE int32_t unit() const { return page_size > block_n ? page_size : block_n; }
  BSFA_HOST_DEVICE int32_t pages_of_unit() const { return unit() / page_size; }

  // Column of the table where the entry of a block's page stands; -1: the block is past the end.
  BSFA_HOST_DEVICE int32_t column_of(int32_t seqlen, int32_t block) const {
    const int64_t first = int64_t{block} * block_n;
    if (first >= seqlen) return -1;
    const int64_t last = first + block_n < seqlen ? first + block_n - 1 : int64_t{seqlen} - 1;
    return static_cast<int32_t>(last / page_size);
  }
  BSFA_HOST_DEVICE int64_t entry(int32_t sequence, int32_t block) const {
    const int32_t column = column_of(seqlens[sequence], block);
    if (column < 0) return num_pages * blocks_per_page();
    const int64_t page = block_table[sequence * block_table_stride + column];
    return page * blocks_per_page() + block % blocks_per_page();
  }

  BSFA_HOST_DEVICE int32_t first_unit(int32_t sequence) const {
    const int32_t before = seqlens[sequence] - lengths_q[sequence];
    return before > 0 ? before / unit() : 0;
  }
  // Columns past the table's end are past the sequence's: which page stands there does not matter.
  BSFA_HOST_DEVICE int32_t window_page(int32_t sequence, int32_t column) const {
    const int64_t at = int64_t{first_unit(sequence)} * pages_of_unit() + column;
    return block_table[sequence * block_table_stride + (at < columns ? at : int64_t{columns} - 1)];
  }
  BSFA_HOST_DEVICE int32_t window_seqlen(int32_t sequence) const {
    const int64_t rest = seqlens[sequence] - int64_t{first_unit(sequence)} * unit(), most = int64_t{units} * unit();
    return static_cast<int32_t>(rest < most ? rest : most);
  }
};

}  // namespace bsfa
