// Tile constants of the pooling kernel (see docs/kernels/pool_blocks.md for what was measured).
#pragma once

namespace bsfa::cuda::pool {

constexpr int kThreads = 256;
constexpr int kChunk = 128;        // consecutive elements of the flattened (KV head, dim) axis that one CTA averages
constexpr int kLoadsInFlight = 8;  // independent loads that a thread issues before its first addition
constexpr int kMinCtasPerSm = 4;   // 64 registers a thread; left alone, ptxas takes 32 and puts the loads in a row
constexpr int kWideVec = 8;        // 16-bit elements in a 16-byte load

// kVec elements per load: kWideVec where every row allows it, else 1. The CTA's threads: kRows tokens x kColumns loads.
template <int kVec>
struct Tile {
  static constexpr int kColumns = kChunk / kVec;
  static constexpr int kRows = kThreads / kColumns;
  static constexpr int kTokens = kRows * kLoadsInFlight;  // tokens of one trip of the main loop

  static_assert(kChunk % kVec == 0, "a chunk is a whole number of loads");
  static_assert(kThreads % kColumns == 0, "every thread has a column");
  static_assert(kThreads >= kChunk, "the last step gives each element of the chunk one thread");
  static_assert(kRows * kChunk * sizeof(float) + kTokens * sizeof(long long) <= 48 * 1024, "static shared memory");
};

}  // namespace bsfa::cuda::pool
