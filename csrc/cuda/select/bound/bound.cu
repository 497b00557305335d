// bound_mask: from its parameters to the kernels that fit.
#include "bsfa/cuda.h"
#include "kernel.h"
#include "quantize.h"

namespace bsfa::cuda {
namespace {

using namespace bound;

constexpr int64_t kAlignment = 1024;

int64_t key_blocks(const SkipMaskParams& params) {
  const KvLayout& kv = params.attention.problem.kv;
  const int64_t batch = params.attention.problem.batch;
  if (kv.cu_seqlens != nullptr) return params.attention.k.tokens / kBlockKeys + batch;
  return batch * ceil_div(kv.max_seqlen, kBlockKeys);
}

template <class Element, int kHeadDim, bool kRelative>
cudaError_t launch_bounds(const KernelParams& k, cudaStream_t stream) {
  const auto kernel = bound_kernel<Element, kHeadDim, kRelative>;
  constexpr int kMostBytes = shared_bytes<Config<kHeadDim>>(kMaxBoundBlocks / 32);
  static_assert(kMostBytes + 128 <= kMostSharedBytes, "shared memory of one SM, with what finds the tile");
  static DevicesDone allowed;
  const cudaError_t error = allow_shared_memory(allowed, kernel, kMostBytes);
  if (error != cudaSuccess) return error;
  const int bytes = shared_bytes<Config<kHeadDim>>(k.num_words);
  return launch_early(kernel, static_cast<int>(k.num_rows * k.problem.num_q_heads), kThreads, bytes, stream, k);
}

template <class Element, int kHeadDim>
cudaError_t launch(const KernelParams& k, SkipForm form, cudaStream_t stream) {
  if (k.keys.max_blocks > 0 && k.problem.batch > 0) {
    const dim3 grid(k.keys.max_blocks, k.problem.num_kv_heads, k.problem.batch);
    quantize_kernel<Element, kHeadDim><<<grid, kQuantizeThreads, 0, stream>>>(k);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return form == SkipForm::kRelative ? launch_bounds<Element, kHeadDim, true>(k, stream)
                                     : launch_bounds<Element, kHeadDim, false>(k, stream);
}

template <class Element>
cudaError_t launch(const KernelParams& k, SkipForm form, cudaStream_t stream) {
  return k.problem.head_dim == 64 ? launch<Element, 64>(k, form, stream) : launch<Element, 128>(k, form, stream);
}

}  // namespace

bool bound_mask_supports(const Problem& p) {
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && (p.head_dim == 64 || p.head_dim == 128) &&
         p.block_m == kTileRows && p.block_n == kBlockKeys &&
         ceil_div(p.kv.max_seqlen, kBlockKeys) <= kMaxBoundBlocks && p.batch <= 65535 && p.num_kv_heads <= 65535;
}

int64_t bound_mask_workspace_bytes(const SkipMaskParams& params) {
  const Problem& p = params.attention.problem;
  const int64_t block = int64_t{kBlockKeys} * p.head_dim + static_cast<int64_t>(sizeof(BlockFacts));
  return key_blocks(params) * p.num_kv_heads * block + kAlignment;
}

cudaError_t bound_mask(const SkipMaskParams& params, void* workspace, cudaStream_t stream) {
  const AttentionParams& a = params.attention;
  const Problem& p = a.problem;
  const int64_t pairs = a.num_rows * p.num_q_heads;
  if (!bound_mask_supports(p) || pairs > INT32_MAX) return cudaErrorInvalidValue;
  const cudaError_t error = cudaMemsetAsync(a.skip.counts, 0, sizeof(int64_t) * 2 * p.num_q_heads, stream);
  if (error != cudaSuccess || pairs == 0) return error;
  const auto base = (reinterpret_cast<uintptr_t>(workspace) + kAlignment - 1) / kAlignment * kAlignment;
  QuantizedKeys keys{};
  keys.blocks = key_blocks(params);
  keys.max_blocks = ceil_div(p.kv.max_seqlen, kBlockKeys);
  keys.images = reinterpret_cast<uint8_t*>(base);
  keys.facts =
      reinterpret_cast<BlockFacts*>(keys.images + keys.blocks * p.num_kv_heads * int64_t{kBlockKeys} * p.head_dim);
  const KernelParams k{mask_output(params), a.q, a.k, keys, a.num_rows};
  return p.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(k, a.skip.form, stream)
                                     : launch<__half>(k, a.skip.form, stream);
}

}  // namespace bsfa::cuda
