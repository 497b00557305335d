// One launch function per element type and head_dim; each stands in a file of its own, with its three kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bsfa::cuda::measure {

enum class Quantity : int32_t;
struct KernelParams;

cudaError_t launch_bf16_d64(Quantity quantity, const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_bf16_d128(Quantity quantity, const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d64(Quantity quantity, const KernelParams& params, int num_ctas, cudaStream_t stream);
cudaError_t launch_fp16_d128(Quantity quantity, const KernelParams& params, int num_ctas, cudaStream_t stream);

}  // namespace bsfa::cuda::measure
