#include "kernel.h"
#include "launch.h"

namespace bsfa::cuda::attn::sm90 {

cudaError_t launch_tokens_fp16_d64(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  return launch<cutlass::half_t, 64, 64, Variant::kTokens>(params, num_ctas, stream);
}

}  // namespace bsfa::cuda::attn::sm90
