// One launch function per compiled kernel; each stands in a file of its own, since each takes a minute to compile.
#pragma once

#include <cuda_runtime_api.h>

namespace bsfa::cuda::attn::sm90 {

struct KernelParams;

cudaError_t launch_bf16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_bf16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_fp16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);

}  // namespace bsfa::cuda::attn::sm90
