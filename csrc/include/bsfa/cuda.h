// CUDA operations. Each launches on `stream` of the current device, allocates nothing and does not synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "bsfa/params.h"

namespace bsfa::cuda {

// Supports float16 and bfloat16, head_dim a multiple of 8 up to 256, 16-byte aligned rows.
cudaError_t pool_blocks(const PoolParams& params, cudaStream_t stream);

}  // namespace bsfa::cuda
