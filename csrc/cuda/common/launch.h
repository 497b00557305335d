// How kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

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
  // By address: kernels may take a kilobyte, which the driver copies anyway.
  const auto launch = [&](const Parameters&... parameters) {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
  };
  return launch(arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int ctas, int threads, int shared_bytes, cudaStream_t stream,
                         const Arguments&... arguments) {
  return launch_on_stream(true, kernel, ctas, threads, shared_bytes, stream, arguments...);
}

// A number of each device, asked for once; those of later devices than kMostDevices each time.
class PerDevice {
 public:
  static constexpr int kMostDevices = 64;

  // The current device's. `find`: gives a cudaError_t for (device, pointer to the number); what it finds is not 0.
  template <class Function>
  cudaError_t get(int* value, const Function& find) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const bool keeps = device < kMostDevices;
    if (keeps) *value = known_[device].load(std::memory_order_acquire);
    if (keeps && *value != 0) return cudaSuccess;
    error = find(device, value);
    if (error == cudaSuccess && keeps) known_[device].store(*value, std::memory_order_release);
    return error;
  }

 private:
  std::atomic<int> known_[kMostDevices] = {};  // 0: not asked yet
};

// What has been done for which devices.
class DevicesDone {
 public:
  // Does `what`, a function that gives a cudaError_t, unless it has succeeded for the current device before.
  template <class Function>
  cudaError_t once(const Function& what) {
    int done = 0;
    return done_.get(&done, [&](int, int* value) {
      *value = 1;
      return what();
    });
  }

 private:
  PerDevice done_;
};

constexpr int kMostSharedBytes = 227 * 1024;  // that a CTA may have

// Lets launches of a kernel on the current device have up to `bytes` of dynamic shared memory. `allowed` belongs to
// this kernel alone: what it says is done is not done again. `carveout`: of an SM's memory, cudaSharedmemCarveout...
template <class Kernel>
cudaError_t allow_shared_memory(DevicesDone& allowed, Kernel* kernel, int bytes,
                                int carveout = cudaSharedmemCarveoutDefault) {
  return allowed.once([=] {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess || carveout == cudaSharedmemCarveoutDefault) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
  });
}

}  // namespace bsfa::cuda
