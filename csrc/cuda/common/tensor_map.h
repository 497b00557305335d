// TMA descriptors of bsfa's [batch or page, token, head, dim] views.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "bsfa/params.h"

namespace bsfa::cuda {

// Columns (16-bit elements) of one box: the width of a 128-byte swizzle atom. Wider rows are cut into pieces of that
// width.
constexpr int kBoxColumns = 64;

// Dimensions of a view, in elements, tokens, heads and sequences (or pages).
struct TensorExtent {
  int64_t dim = 0;  // a multiple of kBoxColumns
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t batch = 0;
};

// Whether TMA can address the view: 16-byte aligned base and strides.
bool tensor_map_fits(const TensorView& view, const TensorExtent& extent);

// Describes boxes of `pieces` x `tokens` x kBoxColumns elements, in that order in shared memory, with the 128-byte
// swizzle. Coordinates of a box are {column in the piece, token, piece, head, batch}; tokens outside the extent read as
// zeros and are not written. cudaErrorInvalidValue if the view does not fit.
cudaError_t make_tensor_map(CUtensorMap* map, const TensorView& view, const TensorExtent& extent, DType dtype,
                            int32_t tokens, int32_t pieces);

// The same view with its tokens in whole groups of `stride`, a last part of a group left out: boxes of one token of
// each of `groups` groups x kBoxColumns elements. Coordinates of a box:
// {column, group, token of the group, head, batch}.
cudaError_t make_group_map(CUtensorMap* map, const TensorView& view, const TensorExtent& extent, DType dtype,
                           int32_t stride, int32_t groups);

}  // namespace bsfa::cuda
