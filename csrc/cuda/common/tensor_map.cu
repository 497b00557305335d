#include <algorithm>
#include <cstdint>

#include "tensor_map.h"

namespace bsfa::cuda {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kAlignment = 16;
constexpr int64_t kGroupTokens = 8;  // of make_page_map: the rows of a swizzle atom

// What lives in the driver, which this library does not link, is asked for by name.
void* driver_function(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? entry : nullptr;
}

decltype(&cuTensorMapEncodeTiled) encode_function() {
  static void* const function = driver_function("cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

cudaError_t encode(CUtensorMap* map, void* data, DType dtype, const cuuint64_t (&sizes)[5],
                   const cuuint64_t (&strides)[4], const cuuint32_t (&box)[5]) {
  const auto function = encode_function();
  if (function == nullptr) return cudaErrorNotSupported;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      function(map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
               data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Strides in bytes of {token, head, batch}. A dimension of one element is never stepped along: its stride may be odd.
void strides_of(const TensorView& view, const TensorExtent& extent, int64_t (&bytes)[3]) {
  const int64_t sizes[3] = {extent.tokens, extent.heads, extent.batch};
  const int64_t strides[3] = {view.token_stride, view.head_stride, view.batch_stride};
  for (int i = 0; i < 3; ++i) bytes[i] = sizes[i] > 1 ? strides[i] * kElementBytes : kAlignment;
}

}  // namespace

bool tensor_map_fits(const TensorView& view, const TensorExtent& extent) {
  int64_t bytes[3];
  strides_of(view, extent, bytes);
  return reinterpret_cast<uintptr_t>(view.data) % kAlignment == 0 && std::all_of(bytes, bytes + 3, [](int64_t s) {
           return s > 0 && s % kAlignment == 0 && s < (int64_t{1} << 40);
         });
}

cudaError_t make_tensor_map(CUtensorMap* map, const TensorView& view, const TensorExtent& extent, DType dtype,
                            int32_t tokens, int32_t pieces) {
  if (!tensor_map_fits(view, extent)) return cudaErrorInvalidValue;
  int64_t bytes[3];
  strides_of(view, extent, bytes);
  const auto at_least_one = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  const auto stride = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[5] = {kBoxColumns, at_least_one(extent.tokens), at_least_one(extent.dim / kBoxColumns),
                               at_least_one(extent.heads), at_least_one(extent.batch)};
  const cuuint64_t strides[4] = {stride(bytes[0]), kBoxColumns * kElementBytes, stride(bytes[1]), stride(bytes[2])};
  const cuuint32_t box[5] = {kBoxColumns, static_cast<cuuint32_t>(tokens), static_cast<cuuint32_t>(pieces), 1, 1};
  return encode(map, view.data, dtype, sizes, strides, box);
}

cudaError_t make_group_map(CUtensorMap* map, const TensorView& view, const TensorExtent& extent, DType dtype,
                           int32_t stride, int32_t groups) {
  if (!tensor_map_fits(view, extent) || extent.tokens < stride) return cudaErrorInvalidValue;
  int64_t bytes[3];
  strides_of(view, extent, bytes);
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[5] = {size(extent.dim), size(extent.tokens / stride), size(stride), size(extent.heads),
                               size(extent.batch)};
  const cuuint64_t strides[4] = {size(stride * bytes[0]), size(bytes[0]), size(bytes[1]), size(bytes[2])};
  const cuuint32_t box[5] = {kBoxColumns, static_cast<cuuint32_t>(groups), 1, 1, 1};
  return encode(map, view.data, dtype, sizes, strides, box);
}

int32_t page_map_head_pieces(const TensorView& view, const TensorExtent& extent) {
  if (!tensor_map_fits(view, extent) || extent.tokens == 0 || extent.tokens % kGroupTokens != 0 || extent.batch == 0) {
    return -1;
  }
  if (extent.heads <= 1) return 0;
  const int64_t pieces = view.head_stride / kBoxColumns;
  return view.head_stride % kBoxColumns != 0 || pieces * extent.heads > INT32_MAX ? -1 : static_cast<int32_t>(pieces);
}

cudaError_t make_page_map(CUtensorMap* map, const TensorView& view, const TensorExtent& extent, DType dtype,
                          int32_t tokens) {
  const int32_t head_pieces = page_map_head_pieces(view, extent);
  if (head_pieces < 0 || tokens % kGroupTokens != 0) return cudaErrorInvalidValue;
  int64_t bytes[3];
  strides_of(view, extent, bytes);
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const int64_t pieces = extent.dim / kBoxColumns;
  const cuuint64_t sizes[5] = {kBoxColumns, kGroupTokens, size((extent.heads - 1) * head_pieces + pieces),
                               size(extent.tokens / kGroupTokens), size(extent.batch)};
  const cuuint64_t strides[4] = {size(bytes[0]), kBoxColumns * kElementBytes, size(kGroupTokens * bytes[0]),
                                 size(bytes[2])};
  const cuuint32_t box[5] = {kBoxColumns, kGroupTokens, static_cast<cuuint32_t>(pieces),
                             static_cast<cuuint32_t>(tokens / kGroupTokens), 1};
  return encode(map, view.data, dtype, sizes, strides, box);
}

cudaError_t make_word_map(CUtensorMap* map, const uint32_t* data, int64_t words, int64_t token_stride,
                          int64_t batch_stride, int64_t num_tokens, int64_t batch, int32_t tokens) {
  const auto function = encode_function();
  if (function == nullptr) return cudaErrorNotSupported;
  // A dimension of one element is never stepped along: its stride may be odd.
  const int64_t rows = num_tokens > 1 ? token_stride * 4 : kAlignment;
  const int64_t batches = batch > 1 ? batch_stride * 4 : kAlignment;
  if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0 || rows <= 0 || rows % kAlignment != 0 || batches <= 0 ||
      batches % kAlignment != 0) {
    return cudaErrorInvalidValue;
  }
  const auto at_least_one = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  const cuuint64_t sizes[3] = {at_least_one(words), at_least_one(num_tokens), at_least_one(batch)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(batches)};
  const cuuint32_t box[3] = {4, static_cast<cuuint32_t>(tokens), 1}, steps[3] = {1, 1, 1};
  const CUresult result = function(map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, const_cast<uint32_t*>(data), sizes, strides,
                                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t move_tensor_map(CUtensorMap* map, void* data) {
  static void* const function = driver_function("cuTensorMapReplaceAddress");
  if (function == nullptr) return cudaErrorNotSupported;
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % kAlignment != 0) return cudaErrorInvalidValue;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapReplaceAddress)>(function)(map, data);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace bsfa::cuda
