// Scores of a slab of mask rows, for the rules whose blocks are picked from scores by a kernel of their own (pick.h).
#pragma once

#include <cuda_runtime_api.h>

#include "../common/schedule.h"
#include "bsfa/params.h"

namespace bsfa::cuda::select {

// Mask rows [row_begin, row_end) whose scores are made at a time; scores [row_end - row_begin, Hq, max_blocks].
struct Slab {
  const TileRow* rows;  // of all mask rows
  int32_t row_begin;
  int32_t row_end;
  float* scores;
};

// kPooled: base-2 logits (log2(e) * logit after softcap). Visible blocks only; others are left as they are.
int64_t pooled_scratch_bytes(const ScoreParams& params, int32_t slab_rows);
cudaError_t score_pooled(const ScoreParams& params, const Slab& slab, void* scratch, cudaStream_t stream);

// kFlat64: base-2 logits. kAntidiagonal: weights. Visible blocks only.
int64_t strided_scratch_bytes(const ScoreParams& params, int32_t slab_rows, int num_sms);
cudaError_t score_strided(const ScoreParams& params, const Slab& slab, void* scratch, int num_sms, cudaStream_t stream);

}  // namespace bsfa::cuda::select
