// Which sequence and query tile a mask row is: by division where all sequences are alike, else by a scan over the
// sequences' tile counts, as many at a time as the CTA has threads.
#pragma once

#include <cstdint>

#include "bsfa/geometry.h"
#include "scan.h"

namespace bsfa::cuda {

struct Place {
  int32_t sequence;  // -1: the row belongs to none
  int32_t tile;      // local
};

// All threads of the CTA, kThreads, must call.
template <int kThreads>
__device__ Place find_place(const Problem& problem, int32_t row) {
  if (all_alike(problem)) {
    const int32_t tiles = sequence_geometry(problem, 0).num_tiles();
    const int32_t sequence = row / max(tiles, 1);
    return {tiles > 0 && sequence < problem.batch ? sequence : -1, row - sequence * tiles};
  }
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
    const int32_t tiles = sequence < problem.batch ? sequence_geometry(problem, sequence).num_tiles() : 0;
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

}  // namespace bsfa::cuda
