// Which sequence and query tile a mask row is: by division where all sequences are alike, else from running sums of the
// sequences' tile counts.
//
// find_place         one row for the whole CTA, any number of sequences: a scan, as many of them at a time as the CTA
//                    has threads.
// place_among_few    a row for each thread, no more sequences than threads: one scan, then a search of its own by each
//                    thread. With find_place the rows would follow one another, a scan and its barriers each.
#pragma once

#include <cstdint>

#include "bsfa/geometry.h"
#include "scan.h"

namespace bsfa::cuda {

struct Place {
  int32_t sequence;  // -1: the row belongs to none
  int32_t tile;      // local
};

// Of sequences that are all alike.
__device__ inline Place place_among_alike(const Problem& problem, int32_t row) {
  const int32_t tiles = sequence_geometry(problem, 0).num_tiles();
  const int32_t sequence = row / max(tiles, 1);
  return {tiles > 0 && sequence < problem.batch ? sequence : -1, row - sequence * tiles};
}

// Query tiles of a sequence; 0 past the last one.
__device__ inline int32_t tiles_of(const Problem& problem, int32_t sequence) {
  return sequence < problem.batch ? sequence_geometry(problem, sequence).num_tiles() : 0;
}

// All threads of the CTA, kThreads, must call, with the same row.
template <int kThreads>
__device__ Place find_place(const Problem& problem, int32_t row) {
  if (all_alike(problem)) return place_among_alike(problem, row);
  __shared__ int32_t scratch[kThreads / 32];
  __shared__ Place found;
  __shared__ int32_t passed;  // tiles of the sequences of all trips so far
  if (threadIdx.x == 0) {
    found = {-1, 0};
    passed = 0;
  }
  __syncthreads();
  for (int32_t first = 0; first < problem.batch; first += kThreads) {
    const int32_t sequence = first + static_cast<int32_t>(threadIdx.x);
    const int32_t tiles = tiles_of(problem, sequence);
    const int32_t before = passed;
    const int32_t end = before + inclusive_sum<kThreads>(tiles, scratch);
    if (row >= end - tiles && row < end) found = {sequence, row - (end - tiles)};
    __syncthreads();
    if (threadIdx.x == kThreads - 1) passed = end;
    __syncthreads();
    if (passed > row) break;
  }
  return found;
}

// All threads of the CTA, kThreads, must call, each with its row; at most kThreads sequences. `ends`: shared memory for
// as many numbers; `scratch`: for one per warp.
template <int kThreads>
__device__ Place place_among_few(const Problem& problem, int32_t row, int32_t* ends, int32_t* scratch) {
  if (all_alike(problem)) return place_among_alike(problem, row);
  ends[threadIdx.x] = inclusive_sum<kThreads>(tiles_of(problem, static_cast<int32_t>(threadIdx.x)), scratch);
  __syncthreads();
  if (row >= ends[kThreads - 1]) return {-1, 0};
  int32_t low = 0, high = kThreads - 1;  // the first sequence that ends behind the row
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (ends[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {low, low > 0 ? row - ends[low - 1] : row};
}

}  // namespace bsfa::cuda
