// One launch function per compiled kernel.
#pragma once

#include <cuda_runtime_api.h>

namespace bsfa::cuda::select {

struct KernelParams;

cudaError_t launch_bf16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);

}  // namespace bsfa::cuda::select
