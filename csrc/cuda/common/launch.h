// How kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace bsfa::cuda {

// `early`: while the kernel before it in the stream still runs (programmatic dependent launch). It must call
// cudaGridDependencySynchronize() before it touches what that one, or any before it, has written.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_on_stream(bool early, void (*kernel)(Parameters...), int ctas, int threads, int shared_bytes,
                             cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = early ? &attribute : nullptr;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int ctas, int threads, int shared_bytes, cudaStream_t stream,
                         const Arguments&... arguments) {
  return launch_on_stream(true, kernel, ctas, threads, shared_bytes, stream, arguments...);
}

// What has been done for which devices; later ones than these are not remembered.
class DevicesDone {
 public:
  static constexpr int kMostDevices = 64;

  // Does `what`, a function that gives a cudaError_t, unless it has succeeded for the current device before.
  template <class Function>
  cudaError_t once(const Function& what) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t bit = device < kMostDevices ? uint64_t{1} << device : 0;
    if ((done_.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
    error = what();
    if (error == cudaSuccess) done_.fetch_or(bit, std::memory_order_release);
    return error;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

}  // namespace bsfa::cuda
