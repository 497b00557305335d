#include "kernel.h"
#include "launch.h"

namespace bsfa::cuda::attn::sm90 {

cudaError_t launch_pages_fp16_d128(const KernelParams& params, int num_ctas, cudaStream_t stream) {
  return launch<cutlass::half_t, 128, 128, Variant::kPages>(params, num_ctas, stream);
}

}  // namespace bsfa::cuda::attn::sm90
