// CUDA operations. Each launches on `stream` of the current device, allocates nothing and does not synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "bsfa/params.h"

namespace bsfa::cuda {

// float16 and bfloat16, any head_dim, page size and strides (rows on 16 bytes are fastest), batch up to 65535.
cudaError_t pool_blocks(const PoolParams& params, cudaStream_t stream);

}  // namespace bsfa::cuda
