// From the scores of a slab (score.h) to masks, or to scores as operator score_blocks returns them.
#pragma once

#include <cuda_runtime_api.h>

#include "bsfa/params.h"
#include "score.h"

namespace bsfa::cuda::select {

// Writes words and counts of the slab's rows. Rules from kPooled on; max_blocks at most kMaxSelectBlocks (bsfa/cuda.h).
cudaError_t pick_blocks(const SelectParams& params, const Slab& slab, cudaStream_t stream);

// In place: logits or weights become the share of the row's weight that ranks strictly before each block (params.h); -1
// where a block is not visible. max_blocks at most kMaxSelectBlocks.
cudaError_t rank_blocks(const ScoreParams& params, const Slab& slab, cudaStream_t stream);

// -1 everywhere: scores of rows that hold no query.
cudaError_t fill_invisible(float* scores, int64_t count, cudaStream_t stream);

}  // namespace bsfa::cuda::select
