#include "kernel.h"
#include "launch.h"

namespace bsfa::cuda::select::strided {

cudaError_t launch_bf16(const KernelParams& params, bool flat, int num_ctas, cudaStream_t stream) {
  return launch<cutlass::bfloat16_t>(params, flat, num_ctas, stream);
}

}  // namespace bsfa::cuda::select::strided
