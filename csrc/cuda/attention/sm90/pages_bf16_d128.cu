#include "kernel.h"
#include "launch.h"

namespace bsfa::cuda::attn::sm90 {

cudaError_t launch_pages_bf16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  return launch<cutlass::bfloat16_t, 128, 128, Variant::kPages>(params, num_ctas, stream);
}

}  // namespace bsfa::cuda::attn::sm90
