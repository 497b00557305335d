#include "kernel.h"
#include "launch.h"

namespace bsfa::cuda::attn::sm90 {

cudaError_t launch_bf16_d192(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  return launch<cutlass::bfloat16_t, 192, 128>(params, num_ctas, stream);
}

}  // namespace bsfa::cuda::attn::sm90
