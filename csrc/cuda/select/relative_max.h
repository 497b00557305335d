// FlashPrefill's rule on Hopper: scores and selection in one kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/schedule.h"
#include "bsfa/params.h"

namespace bsfa::cuda::select {

// Whether the kernel can hold a row of that many blocks in shared memory.
bool relative_max_fits(const ScoreParams& params);

// Follows the order in `workspace` (make_order for the score heads); natural order if that is empty, for sequences all
// alike and no more mask rows than query tiles. `words` and `counts` may be null: scores only;
// score.scores may be null: mask only. float16 and bfloat16, head_dim 64 or 128, tiles and blocks of 128 tokens, no
// HeadSharing::kUnion.
cudaError_t relative_max(const SelectParams& params, const Workspace& workspace, int num_sms, cudaStream_t stream);

}  // namespace bsfa::cuda::select
