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

// A view [page, token, head, dim] by groups of 8 tokens: boxes of `tokens` (8 n) tokens with all columns of a head, in
// shared memory as [token / 8][64 columns' piece][token % 8][column], with the 128-byte swizzle. Coordinates of a box:
// {0, 0, head * head_pieces, token / 8, page}, where head_pieces is from page_map_head_pieces: the pieces from one head
// to the next in memory, or -1 if the view does not fit (heads lie within whole pieces, pages hold whole groups).
int32_t page_map_head_pieces(const TensorView& view, const TensorExtent& extent);
cudaError_t make_page_map(CUtensorMap* map, const TensorView& view, const TensorExtent& extent, DType dtype,
                          int32_t tokens);

// Rows of `words` 32-bit words, `token_stride` and `batch_stride` words apart: boxes of four words of `tokens` rows,
// without swizzle. Coordinates of a box: {word, token, batch}. cudaErrorInvalidValue unless base and strides are
// multiples of 16 bytes.
cudaError_t make_word_map(CUtensorMap* map, const uint32_t* data, int64_t words, int64_t token_stride,
                          int64_t batch_stride, int64_t num_tokens, int64_t batch, int32_t tokens);

// Of a map that one of these has made: the same view at another address. cudaErrorInvalidValue unless that is a
// multiple of 16 bytes.
cudaError_t move_tensor_map(CUtensorMap* map, void* data);

}  // namespace bsfa::cuda
