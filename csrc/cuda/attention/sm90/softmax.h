// Online softmax of one thread's share of 128 rows of scores: two rows, a quarter of the columns.
//
// Accumulators of m64n8 tiles: element 4 * j + 2 * r + c is row lane / 4 + 8 * r of the warp's 16, column
// 8 * j + 2 * (lane % 4) + c. A row is spread over the four lanes of a quad.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "config.h"

namespace bsfa::cuda::attn::sm90 {

// Two elements of 16 bits, the low one first.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  const cutlass::Array<float, 2> pair{low, high};
  const cutlass::Array<Element, 2> packed = convert(pair);
  return reinterpret_cast<const uint32_t&>(packed);
}

// Scores or exponentials, in pairs of neighbours.
template <class Element, class Tensor, class Packed>
__device__ __forceinline__ void pack_all(const Tensor& s, Packed& packed) {
  static_assert(cute::size(Tensor{}) == 2 * cute::size(Packed{}));
#pragma unroll
  for (int i = 0; i < cute::size(packed); ++i) packed(i) = pack<Element>(s(2 * i), s(2 * i + 1));
}

template <class Tensor>
constexpr int kColumnTiles = cute::size(Tensor{}) / 4;

// Both in units of log2: a score counts 2^(scale * score - base). The base is the row's largest scaled score at some
// time, not always the latest: as long as no score outgrows it by more than kHeadroom, nothing overflows, and what was
// summed need not be rescaled (the idea is FlashAttention-4's).
constexpr float kHeadroom = 8.0f;

struct SoftmaxRows {
  float base[2];  // -inf: the row has seen nothing
  float sum[2];   // this thread's share
};

// Scores beyond the row's limits become -inf, whatever they were. Rows that are not of the sequence get +inf: their
// base is then +inf, and they have no say in what the warp decides for all its rows. `first_row`: of this thread, in
// the tile.
template <class Tensor>
__device__ __forceinline__ void mask_scores(Tensor& s, const TileRow& tile, int32_t first_key, int first_row,
                                            bool causal, int32_t window_left) {
  const int first_column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t row = first_row + 8 * r, position = tile.position + row;
    const bool foreign = row < tile.row_begin || row >= tile.row_end;
    const int32_t end = (causal ? min(position + 1, tile.seqlen_k) : tile.seqlen_k) - first_key - first_column;
    const int32_t begin = window_left < 0 ? 0 : position - window_left - first_key - first_column;
#pragma unroll
    for (int j = 0; j < kColumnTiles<Tensor>; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s(4 * j + 2 * r + c);
        x = foreign ? INFINITY : 8 * j + c < end && 8 * j + c >= begin ? x : -INFINITY;
      }
    }
  }
}

// What mask_scores does where causality alone masks, and row i of the tile sees the block's first i + 1 keys: one
// comparison serves two rows, of which the second sees 8 keys more. `first_column`: of the scores, in the block. Only
// column tiles [kBegin, kEnd) are looked at.
template <int kBegin, int kEnd, class Tensor>
__device__ __forceinline__ void mask_diagonal(Tensor& s, int first_row, int first_column) {
  const int last = first_row - first_column - 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int j = kBegin; j <= kEnd; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool hidden = 8 * (j - 1) + c > last;
      const auto hide = [&](int i) { s(i) = hidden ? -INFINITY : s(i); };
      if (j > kBegin) hide(4 * (j - 1) + c);
      if (j < kEnd) hide(4 * j + 2 + c);
    }
  }
}

// A token mask's words of the thread's two rows, for the columns of one block.
struct RowTokens {
  uint4 words[2];

  // The rows' words lie one after the other, 16 bytes each. `first_row`: of this thread, in the tile.
  __device__ __forceinline__ void read(const TokenWords& block, int first_row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) words[r] = *reinterpret_cast<const uint4*>(block.words[first_row + 8 * r]);
  }
  __device__ __forceinline__ bool all() const {
    return (words[0].x & words[0].y & words[0].z & words[0].w & words[1].x & words[1].y & words[1].z & words[1].w) ==
           ~0u;
  }
};

// Scores of tokens that the mask does not name become -inf.
template <class Tensor>
__device__ __forceinline__ void mask_tokens(Tensor& s, const RowTokens& tokens) {
  const int first_column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t words[4] = {tokens.words[r].x, tokens.words[r].y, tokens.words[r].z, tokens.words[r].w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t bits = words[w] >> first_column;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = 4 * w + i / 2, c = i % 2;
        float& x = s(4 * j + 2 * r + c);
        x = bits >> (8 * (j % 4) + c) & 1u ? x : -INFINITY;
      }
    }
  }
}

// What mask_scores does, for part `part` of a step of means, whose columns are blocks: those that are not to be added
// become -inf, the others get the logarithm of their number of tokens. `unit`: log2 in units of the scores.
template <class Tensor>
__device__ __forceinline__ void weigh_means(Tensor& s, const TileRow& tile, int32_t first_block, const Columns& columns,
                                            int part, int first_row, float unit) {
  constexpr int kWords = kColumnTiles<Tensor> / 4;
  const int first_column = 2 * (threadIdx.x % 4);
  first_block += part * kWords * 32;
  // Only the last block of a sequence may be shorter. (If it is not, there is no block of that number.)
  const int32_t tail = tile.seqlen_k / kBlockKeys - first_block - first_column;
  const float whole = 7.0f * unit, partial = log2f(static_cast<float>(tile.seqlen_k % kBlockKeys)) * unit;
  static_assert(kBlockKeys == 1 << 7, "log2 of a whole block's tokens");
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t bits = columns.words[part * kWords + w] >> first_column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = first_row + 8 * r;
      const bool foreign = row < tile.row_begin || row >= tile.row_end;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = 4 * w + i / 2, c = i % 2;
        float& x = s(4 * j + 2 * r + c);
        const float weighed = x + (8 * j + c == tail ? partial : whole);
        x = foreign ? INFINITY : bits >> (8 * (j % 4) + c) & 1u ? weighed : -INFINITY;
      }
    }
  }
}

// Of the first kTiles column tiles; 0: of all. kNan: NaN if one of them is; else NaN is passed over.
template <bool kNan = false, int kTiles = 0, class Tensor>
__device__ __forceinline__ float max_of_row(const Tensor& s, int r) {
  const auto larger = [](float a, float b) { return kNan ? max_or_nan(a, b) : fmaxf(a, b); };
  float tops[4];
#pragma unroll
  for (int j = 0; j < (kTiles > 0 ? kTiles : kColumnTiles<Tensor>); ++j) {
    const float pair = larger(s(4 * j + 2 * r), s(4 * j + 2 * r + 1));
    tops[j % 4] = j < 4 ? pair : larger(tops[j % 4], pair);
  }
  return larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
}

// s -> 2^(scale * s + minus), each row with its own; returns the rows' sums.
template <class Tensor>
__device__ __forceinline__ void exponentials(Tensor& s, float scale, const float (&minus)[2], float (&sum)[2]) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < cute::size(s); ++i) {
    s(i) = exp2f(s(i) * scale + minus[i / 2 % 2]);
    sum[i / 2 % 2] += s(i);
  }
}

// Any step: scores may be -inf, rows may have seen nothing (or nothing yet, if `first`). `top`: the rows' largest
// scores of this thread's. Bases become the largest so far; exponents are `minus` more; what was summed before must be
// multiplied by `rescale`. True if all rows of the warp have seen something.
__device__ __forceinline__ bool raise_any(const float (&top)[2], SoftmaxRows& rows, float (&rescale)[2],
                                          float (&minus)[2], bool first, float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = first ? -INFINITY : rows.base[r];
    rows.base[r] = fmaxf(before, max_over_quad(top[r]) * scale);
    minus[r] = rows.base[r] == -INFINITY ? 0.0f : -rows.base[r];
    rescale[r] = exp2f(before + minus[r]);
  }
  return __all_sync(kAllLanes, rows.base[0] != -INFINITY && rows.base[1] != -INFINITY);
}

// The same, and turns scores into exponentials and takes them into `rows`.
template <class Tensor>
__device__ __forceinline__ bool softmax_any(Tensor& s, const float (&top)[2], SoftmaxRows& rows, float (&rescale)[2],
                                            bool first, float scale) {
  float minus[2], sum[2];
  const bool all = raise_any(top, rows, rescale, minus, first, scale);
  exponentials(s, scale, minus, sum);
#pragma unroll
  for (int r = 0; r < 2; ++r) rows.sum[r] = first ? sum[r] : rows.sum[r] * rescale[r] + sum[r];
  return all;
}

// Whether a row of the warp has outgrown its base. `inverse_scale`: of what `scale` is below.
__device__ __forceinline__ bool outgrown(const float (&top)[2], const SoftmaxRows& rows, float inverse_scale) {
  return __any_sync(kAllLanes, top[0] > (rows.base[0] + kHeadroom) * inverse_scale ||
                                   top[1] > (rows.base[1] + kHeadroom) * inverse_scale);
}

// The largest of a row's scores that are not negative, by their bits, three at a time; negative if all are.
template <class Tensor>
__device__ __forceinline__ float max_of_positive(const Tensor& s, int r) {
  constexpr int kScores = 2 * kColumnTiles<Tensor>, kChains = 4;
  const auto bits = [&](int i) { return __float_as_int(s(4 * (i / 2) + 2 * r + i % 2)); };
  int tops[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) tops[i] = __vimax3_s32(bits(3 * i), bits(3 * i + 1), bits(3 * i + 2));
#pragma unroll
  for (int i = 3 * kChains; i < kScores; i += 2) {
    int& top = tops[i / 2 % kChains];
    top = __vimax3_s32(top, bits(i), bits(i + 1));
  }
  return __int_as_float(max(__vimax3_s32(tops[0], tops[1], tops[2]), tops[3]));
}

// Whether a row of the warp may have outgrown its base, which takes half as many instructions as to know: it has not
// where its base is so high that scores beyond it are positive, and none of them is.
template <class Tensor>
__device__ __forceinline__ bool may_have_outgrown(const Tensor& s, const SoftmaxRows& rows, float inverse_scale) {
  bool may = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float limit = (rows.base[r] + kHeadroom) * inverse_scale;
    may |= limit < 0.0f || max_of_positive(s, r) > limit;
  }
  return __any_sync(kAllLanes, may);
}

// Raises the rows' bases to their largest scores; `rescale` applies to what was summed before.
__device__ __forceinline__ void raise_base(const float (&top)[2], SoftmaxRows& rows, float (&rescale)[2], float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = rows.base[r];
    rows.base[r] = fmaxf(before, max_over_quad(top[r]) * scale);
    rescale[r] = exp2f(before - rows.base[r]);
    rows.sum[r] *= rescale[r];
  }
}

// Turns scores into exponentials and takes them into `rows`. All scores count, and all rows have a base.
template <class Tensor>
__device__ __forceinline__ void add_exponentials(Tensor& s, SoftmaxRows& rows, float scale) {
  float sum[2];
  const float minus[2] = {-rows.base[0], -rows.base[1]};
  exponentials(s, scale, minus, sum);
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
}

// 2^(scale * s + minus) as pairs of 16 bits, and the rows' sums. `beside(i)` is called with each pair: instructions
// that are issued while an exponential is made cost nothing. Pairs from kCount on are 0, whatever the scores.
template <class Element, int kCount, class Tensor, class Packed, class Beside>
__device__ __forceinline__ void exponentials_packed(const Tensor& s, float scale, const float (&minus)[2],
                                                    Packed& packed, float (&sum)[2], const Beside& beside) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < cute::size(s) / 2; ++i) {
    if (i >= kCount) {
      packed(i) = 0;
      beside(i);
      continue;
    }
    const float a = exp2f(s(2 * i) * scale + minus[i % 2]), b = exp2f(s(2 * i + 1) * scale + minus[i % 2]);
    sum[i % 2] += a;
    sum[i % 2] += b;
    packed(i) = pack<Element>(a, b);
    beside(i);
  }
}

// The same of a step whose scores all count, where all rows have a base.
template <class Element, class Tensor, class Packed>
__device__ __forceinline__ void exponentials_packed(const Tensor& s, const SoftmaxRows& rows, float scale,
                                                    Packed& packed, float (&sum)[2]) {
  const float minus[2] = {-rows.base[0], -rows.base[1]};
  exponentials_packed<Element, cute::size(Tensor{}) / 2>(s, scale, minus, packed, sum, [](int) {});
}

// Moves what was packed while a product was under way to where the next one reads it. blockIdx.y is 0, which the
// assembler does not know: it would make a mere move into none, and what is packed into operands of the product under
// way (C7513).
template <class Packed, class Probabilities>
__device__ __forceinline__ void move(const Packed& packed, Probabilities& probabilities) {
  auto pairs = cute::recast<uint32_t>(probabilities);
#pragma unroll
  for (int i = 0; i < cute::size(pairs); ++i) pairs(i) = packed(i) | blockIdx.y;
}

// A row's sum over a thread's scores of one step, below which none of these has outgrown the base.
constexpr float kMostOfStep = 512.0f;

// The usual step without a look for maxima before: its exponentials stay as they are if their sums say that no row of
// the warp has outgrown its base. Else they are made again, with bases raised. True if so; then `rescale` applies to
// what was summed before. What is NaN has no vote, nor have rows with a base of +inf, whose exponentials are 0 or NaN.
template <class Element, class Tensor, class Packed>
__device__ __forceinline__ bool softmax_packed(const Tensor& s, SoftmaxRows& rows, float (&rescale)[2], float scale,
                                               Packed& packed) {
  float sum[2];
  exponentials_packed<Element>(s, rows, scale, packed, sum);
  const bool raise = __any_sync(kAllLanes, sum[0] >= kMostOfStep || sum[1] >= kMostOfStep);
  if (raise) {
    const float top[2] = {max_of_row(s, 0), max_of_row(s, 1)};
    raise_base(top, rows, rescale, scale);
    exponentials_packed<Element>(s, rows, scale, packed, sum);
  }
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return raise;
}

}  // namespace bsfa::cuda::attn::sm90
