// One launch function per element type; each stands in a file of its own, since each takes a while to compile.
#pragma once

#include <cuda_runtime_api.h>

namespace bsfa::cuda::select::strided {

struct KernelParams;

cudaError_t launch_bf16(const KernelParams& params, bool flat, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16(const KernelParams& params, bool flat, int num_ctas, cudaStream_t stream);

}  // namespace bsfa::cuda::select::strided
