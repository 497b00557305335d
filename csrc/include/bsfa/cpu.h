// CPU operations: threaded, vectorised, instruction set chosen at run time.
#pragma once

#include <functional>

#include "bsfa/params.h"

namespace bsfa::cpu {

// Runs body(worker) for worker = 0 .. num_workers - 1, in parallel where it can, and returns when all are done.
// The caller provides it (torch's thread pool in the extension), so that the kernels own no threads.
struct Executor {
  int num_workers = 1;
  std::function<void(const std::function<void(int)>& body)> run;
};

void pool_blocks(const PoolParams& params, const Executor& executor);
void score_blocks(const ScoreParams& params, const Executor& executor);
void select_blocks(const SelectParams& params, const Executor& executor);
void attention(const AttentionParams& params, const Executor& executor);
void block_mass(const BlockMassParams& params, const Executor& executor);
void tile_max(const TileMaxParams& params, const Executor& executor);
void skip_mask(const SkipMaskParams& params, const Executor& executor);
void probe_attention(const ProbeParams& params, const Executor& executor);
void pattern_mask(const PatternParams& params, const Executor& executor);
void token_mask(const TokenMaskParams& params, const Executor& executor);

// "avx512", "avx2" or "generic": what this process uses on this machine.
const char* instruction_set();

}  // namespace bsfa::cpu
