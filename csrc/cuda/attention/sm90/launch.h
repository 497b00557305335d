// One launch function per pair of compiled kernels; each stands in a file of its own, since each takes half a minute to
// compile. d192: head_dim 192, of values 128.
#pragma once

#include <cuda_runtime_api.h>

namespace bsfa::cuda::attn::sm90 {

struct KernelParams;

cudaError_t launch_bf16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_bf16_d192(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d192(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_pages_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_pages_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_bf16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_fp16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_skip_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_tokens_bf16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_tokens_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_tokens_bf16_d192(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_tokens_fp16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_tokens_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_tokens_fp16_d192(const KernelParams& params, int num_ctas, cudaStream_t stream);

}  // namespace bsfa::cuda::attn::sm90
