#include "kernel.h"
#include "launch.h"

namespace bsfa::cuda::measure {

cudaError_t launch_fp16_d128(Quantity quantity, const KernelParams& params, int num_ctas, cudaStream_t stream) {
  return launch<cutlass::half_t, 128>(quantity, params, num_ctas, stream);
}

}  // namespace bsfa::cuda::measure
