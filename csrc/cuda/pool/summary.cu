// Which entries a summary's blocks are kept at, and the part of a page table that new tokens lie in (summary.h): one
// thread for each number. Memory: tables and lengths once. Waits for the stream.
#include "bsfa/cuda.h"
#include "bsfa/summary.h"

namespace bsfa::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) entries_kernel(const __grid_constant__ SummaryParams p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= int64_t{p.batch} * p.blocks) return;
  const auto sequence = static_cast<int32_t>(index / p.blocks);
  p.entries[index] = p.entry(sequence, static_cast<int32_t>(index - int64_t{sequence} * p.blocks));
}

__global__ void __launch_bounds__(kThreads) window_kernel(const __grid_constant__ SummaryParams p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int32_t width = p.units * p.pages_of_unit();
  if (index >= int64_t{p.batch} * width) return;
  const auto sequence = static_cast<int32_t>(index / width);
  const auto column = static_cast<int32_t>(index - int64_t{sequence} * width);
  p.table[index] = p.window_page(sequence, column);
  if (column == 0) p.window_seqlens[sequence] = p.window_seqlen(sequence);
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, const SummaryParams& params, int64_t threads, cudaStream_t stream) {
  if (threads == 0) return cudaSuccess;
  const int64_t ctas = (threads + kThreads - 1) / kThreads;
  if (ctas > INT32_MAX) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t summary_entries(const SummaryParams& params, cudaStream_t stream) {
  return launch(entries_kernel, params, int64_t{params.batch} * params.blocks, stream);
}

cudaError_t summary_window(const SummaryParams& params, cudaStream_t stream) {
  return launch(window_kernel, params, int64_t{params.batch} * params.units * params.pages_of_unit(), stream);
}

}  // namespace bsfa::cuda
