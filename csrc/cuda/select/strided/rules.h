// What becomes of a tile of group scores: 64 rows (query groups) x 256 columns (key groups) per warpgroup.
//
// A thread's accumulators: element 4 * j + 2 * h + c is row 16 * warp + lane / 4 + 8 * h of the warpgroup and column
// 8 * j + 2 * (lane % 4) + c. A query tile is 128 / stride rows, a KV block as many columns, so everything below is a
// reduction over a power of two of neighbours. Reductions over lanes halve: a lane keeps one half of its values and
// gives the other away, so that in the end every lane has values of its own to store.
//
// Both rules have to_logits() (products to base-2 logits), take() (one tile) and finish() (the segment's end).
#pragma once

#include "config.h"

namespace bsfa::cuda::select::strided {

constexpr int kColumnTiles = kKeyGroups / 8;

// The thread's place, and the unit it works on.
struct Unit {
  const Segment& segment;  // in shared memory
  int32_t head;
  int warpgroup;
  int warp;  // of the warpgroup
  int lane;

  // Query group of the segment: row h of this thread.
  __device__ int row(int h) const { return warpgroup * 64 + warp * 16 + lane / 4 + 8 * h; }
  __device__ bool exists(int row, int32_t stride) const {
    return (row + 1) * stride > segment.query_begin && row * stride < segment.query_end;
  }
};

// Where the scores of a unit go: tile of the segment x block, if the tile exists and sees the block.
class Target {
 public:
  __device__ Target(const KernelParams& p, const Unit& unit)
      : scores_(p.scores + (int64_t{unit.segment.row} * p.num_heads + unit.head) * p.max_blocks),
        row_stride_(int64_t{p.num_heads} * p.max_blocks),
        tiles_(unit.segment.tiles),
        limit_(p.max_blocks),
        first_(0),
        slope_(0) {
    // Causal: a tile sees the blocks up to its own. Else all.
    if (p.causal) {
      first_ = ((unit.segment.first_group << p.stride_shift) >> kTileShift) + 1;
      slope_ = 1;
    } else {
      first_ = ceil_div(unit.segment.seqlen_k, kBlockKeys);
    }
  }
  __device__ bool sees(int tile, int32_t block) const {
    return tile < tiles_ && block < min(first_ + slope_ * tile, limit_);
  }
  __device__ float* at(int tile, int32_t block) const { return scores_ + tile * row_stride_ + block; }

 private:
  static constexpr int kTileShift = 7;
  static_assert(1 << kTileShift == kTileRows);
  float* scores_;
  int64_t row_stride_;
  int32_t tiles_, limit_, first_, slope_;
};

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Softcap of a scaled product, through exp, tanh(x) = 1 - 2 / (exp(2 x) + 1): the tanh instruction's error of 2^-11,
// times the cap, would show.
__device__ __forceinline__ float capped(float x, const KernelParams& p) {
  return p.cap_log2 - 2.0f * p.cap_log2 * reciprocal(exp2f(x) + 1.0f);
}

// The larger one; NaN if one is: a NaN must show in the block's score.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Lanes that differ in bit kBit of their number share kCount values each: the one whose bit is set keeps the sums of
// the upper half, the other those of the lower.
template <int kCount, int kBit, int kSize>
__device__ __forceinline__ void halve(float (&v)[kSize], int lane) {
  static_assert(kCount % 2 == 0 && kCount <= kSize);
  const bool upper = lane & kBit;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float give = upper ? v[i] : v[i + kCount / 2];
    const float keep = upper ? v[i + kCount / 2] : v[i];
    v[i] = keep + __shfl_xor_sync(kAllLanes, give, kBit);
  }
}

// kFlat64. The logit of a (tile, block) is the largest of its 2 x 2 pairs of groups: columns c = 0 and 1 of a thread,
// and the rows of lanes that differ in bit 4.
class FlatRule {
 public:
  __device__ FlatRule(const KernelParams& p, const Unit& unit) : target_(p, unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) exists_[h] = unit.exists(unit.row(h), kFlatStride);
  }

  template <class Tensor>
  __device__ __forceinline__ void take(Tensor& s, const KernelParams& p, const Unit& unit, int32_t tile) {
    const int32_t groups = ceil_div(unit.segment.seqlen_k, kFlatStride);
    const int32_t first_block = tile * (kKeyGroups / 2) + unit.lane % 4;
    const bool odd = unit.lane & 4;
    // Of two neighbouring lanes, the even one stores the tile of its row h = 0, the odd one that of row h = 1.
    const int out_tile = unit.row(odd) / 2;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const int32_t block = first_block + 4 * j;
      const bool both = 2 * block + 1 < groups;
      float top[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = s(4 * j + 2 * h), y = s(4 * j + 2 * h + 1);
        const float pair = both ? max_or_nan(x, y) : x;
        top[h] = exists_[h] ? pair : -INFINITY;
      }
      const float other = __shfl_xor_sync(kAllLanes, odd ? top[0] : top[1], 4);
      float logit = max_or_nan(odd ? top[1] : top[0], other) * p.scale;  // which may be negative
      if (p.cap_log2 > 0.0f) logit = capped(logit, p);
      if (target_.sees(out_tile, block)) *target_.at(out_tile, block) = logit;
    }
  }

  __device__ __forceinline__ void finish(const KernelParams&, const Unit&) {}

 private:
  Target target_;
  bool exists_[2];
};

// The same number, of which the compiler knows nothing: what is made from it is not kept in registers across the main
// loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// kAntidiagonal. While key tiles pass, the sum of 2^logit over each (row, block) is stashed, as its base-2 logarithm;
// at the segment's end the sums over whole rows are known, and the weights are made from the stash. A thread reads back
// what itself has written: no barrier, and all of it in 16-byte pieces side by side.
class AntidiagonalRule {
 public:
  __device__ AntidiagonalRule(const KernelParams& p, const Unit& unit)
      : stash_(p.stash + blockIdx.x * p.stash_stride + unit.warpgroup * kWarpgroup + unit.warp * 32 + unit.lane),
        base_{-INFINITY, -INFINITY},
        sum_{0.0f, 0.0f} {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t own = unit.segment.first_group + unit.row(h) + 1;
      const int32_t limit = p.causal ? min(own, unit.segment.key_groups) : unit.segment.key_groups;
      limit_[h] = unit.exists(unit.row(h), p.stride) ? limit : 0;
    }
  }

  template <class Tensor>
  __device__ __forceinline__ void take(Tensor& s, const KernelParams& p, const Unit& unit, int32_t tile) {
#pragma unroll
    for (int i = 0; i < cute::size(Tensor{}); ++i) s(i) *= p.scale;
    if (p.cap_log2 > 0.0f) {
#pragma unroll
      for (int i = 0; i < cute::size(Tensor{}); ++i) s(i) = capped(s(i), p);
    }
    const int32_t first = tile * kKeyGroups;
    if (__any_sync(kAllLanes, min(limit_[0], limit_[1]) < first + kKeyGroups)) {
      const int32_t column = first + unit.lane % 4 * 2;
      const int32_t left[2] = {limit_[0] - column, limit_[1] - column};
#pragma unroll
      for (int i = 0; i < cute::size(Tensor{}); ++i) {
        if (i / 4 * 8 + i % 2 >= left[i / 2 % 2]) s(i) = -INFINITY;
      }
    }
    // Pairs of columns: s(4 * j + 2 * h) becomes the sum of two exponentials.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float tops[4];
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const float pair = fmaxf(s(4 * j + 2 * h), s(4 * j + 2 * h + 1));
        tops[j % 4] = j < 4 ? pair : fmaxf(tops[j % 4], pair);
      }
      const float top = max_over_quad(fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3])));
      const float before = base_[h];
      base_[h] = fmaxf(before, top);
      const float minus = base_[h] == -INFINITY ? 0.0f : -base_[h];
      float sums[4];
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        float& x = s(4 * j + 2 * h);
        x = exp2f(x + minus) + exp2f(s(4 * j + 2 * h + 1) + minus);
        sums[j % 4] = j < 4 ? x : sums[j % 4] + x;
      }
      sum_[h] = sum_[h] * exp2f(before + minus) + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    const int lane = opaque(unit.lane);
    switch (p.stride) {
      case 4:
        return put<4>(s, tile, lane);
      case 8:
        return put<8>(s, tile, lane);
      case 16:
        return put<16>(s, tile, lane);
      case 32:
        return put<32>(s, tile, lane);
      default:
        return put<64>(s, tile, lane);
    }
  }

  __device__ __forceinline__ void finish(const KernelParams& p, const Unit& unit) {
    float minus[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = sum_over_quad(sum_[h]);
      // Rows that see nothing: all their logarithms are -inf.
      minus[h] = sum == 0.0f ? 0.0f : -(base_[h] + log2f(sum));
    }
    const Unit here{unit.segment, unit.head, unit.warpgroup, opaque(unit.warp), opaque(unit.lane)};
    switch (p.stride) {
      case 4:
        return weigh<4>(p, here, minus);
      case 8:
        return weigh<8>(p, here, minus);
      case 16:
        return weigh<16>(p, here, minus);
      case 32:
        return weigh<32>(p, here, minus);
      default:
        return weigh<64>(p, here, minus);
    }
  }

 private:
  // Values per thread, row and key tile; pieces of 16 bytes that they are stashed in, and that are read at once.
  template <int kStride>
  static constexpr int kValues = kStride / 2;
  template <int kStride>
  static constexpr int kPieces = kStride / 4;
  template <int kStride>
  static constexpr int kBatch = 16;

  // Value i of a lane is that of the key tile's block
  //   stride <= 16: stride / 2 * quad + i     32: 32 * (quad % 2) + 2 * i + quad / 2     64: 4 * i + quad
  // with quad = lane % 4.
  template <int kStride>
  static __device__ __forceinline__ int block_of(int quad, int i) {
    if constexpr (kStride <= 16) return kValues<kStride> * quad + i;
    if constexpr (kStride == 32) return 32 * (quad % 2) + 2 * i + quad / 2;
    return 4 * i + quad;
  }

  template <int kStride, class Tensor>
  __device__ __forceinline__ void put(const Tensor& s, int32_t tile, int lane) {
    constexpr int kCount = kValues<kStride>;
    float out[2 * kCount];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Column tiles of one block: 128 / kStride columns.
      constexpr int kJoin = kStride < 16 ? 16 / kStride : 1;
      constexpr int kJoined = kColumnTiles / kJoin;
      float v[kJoined];
#pragma unroll
      for (int j = 0; j < kJoined; ++j) {
        v[j] = s(4 * (j * kJoin) + 2 * h);
#pragma unroll
        for (int k = 1; k < kJoin; ++k) v[j] += s(4 * (j * kJoin + k) + 2 * h);
      }
      if constexpr (kStride <= 16) {
        halve<kJoined, 2>(v, lane);
        halve<kJoined / 2, 1>(v, lane);
      } else if constexpr (kStride == 32) {
        halve<kJoined, 1>(v, lane);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[h * kCount + i] = base_[h] + log2f(v[i]);
    }
    float4* pieces = stash_ + int64_t{tile} * (kPieces<kStride> * kConsumerThreads);
#pragma unroll
    for (int i = 0; i < kPieces<kStride>; ++i) {
      __stcs(pieces + i * kConsumerThreads, make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]));
    }
  }

  template <int kStride>
  __device__ __forceinline__ void weigh(const KernelParams& p, const Unit& unit, const float (&minus)[2]) {
    // At stride 4 a tile's rows are those of two warps: the odd one adds to what the even one has stored.
    const bool second = kStride == 4 && unit.warp % 2 != 0;
    const auto warps_meet = [&] {
      if constexpr (kStride == 4) {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + unit.warpgroup), "n"(kWarpgroup) : "memory");
      }
    };
    if (second) warps_meet();
    const Target target(p, unit);
    constexpr int kTilesAtOnce = kBatch<kStride> / kPieces<kStride>;
    for (int32_t first = 0; first < unit.segment.key_tiles; first += kTilesAtOnce) {
      const int32_t left = unit.segment.key_tiles - first;
      const float4* pieces = stash_ + int64_t{first} * (kPieces<kStride> * kConsumerThreads);
      float4 batch[kBatch<kStride>];
#pragma unroll
      for (int i = 0; i < kBatch<kStride>; ++i) {
        if (i / kPieces<kStride> < left) batch[i] = __ldcs(pieces + i * kConsumerThreads);
      }
#pragma unroll
      for (int k = 0; k < kTilesAtOnce; ++k) {
        if (k >= left) break;
        float flat[4 * kPieces<kStride>];
#pragma unroll
        for (int i = 0; i < kPieces<kStride>; ++i) {
          const float4& piece = batch[k * kPieces<kStride> + i];
          flat[4 * i] = piece.x;
          flat[4 * i + 1] = piece.y;
          flat[4 * i + 2] = piece.z;
          flat[4 * i + 3] = piece.w;
        }
        float w[2][kValues<kStride>];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < kValues<kStride>; ++i) {
            w[h][i] = exp2f(flat[h * kValues<kStride> + i] + minus[h]);
          }
        }
        sum_rows<kStride>(w, unit, target, (first + k) * (2 * kStride), second);
      }
    }
    if (!second) warps_meet();
  }

  // Sums the weights over the rows of each tile, and stores them.
  template <int kStride>
  static __device__ __forceinline__ void sum_rows(float (&w)[2][kValues<kStride>], const Unit& unit,
                                                  const Target& target, int32_t first_block, bool second) {
    const int lane = unit.lane, quad = lane % 4;
    const int first_tile = unit.warpgroup * (kStride / 2);
    const auto store = [&](int tile, int value, float weight) {
      const int32_t block = first_block + block_of<kStride>(quad, value);
      if (!target.sees(first_tile + tile, block)) return;
      float* at = target.at(first_tile + tile, block);
      *at = second ? *at + weight : weight;
    };
    const auto bit = [lane](int b) { return (lane & b) != 0; };
    if constexpr (kStride == 64) {  // 2 rows
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        halve<32, 4>(w[h], lane);
#pragma unroll
        for (int i = 0; i < 16; ++i) store(8 * unit.warp + lane / 8 + 4 * h, 16 * bit(4) + i, w[h][i]);
      }
    } else if constexpr (kStride == 32) {  // 4 rows
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        halve<16, 8>(w[h], lane);
        halve<8, 4>(w[h], lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) store(4 * unit.warp + lane / 16 + 2 * h, 8 * bit(8) + 4 * bit(4) + i, w[h][i]);
      }
    } else if constexpr (kStride == 16) {  // 8 rows
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        halve<8, 16>(w[h], lane);
        halve<4, 8>(w[h], lane);
        halve<2, 4>(w[h], lane);
        store(2 * unit.warp + h, 4 * bit(16) + 2 * bit(8) + bit(4), w[h][0]);
      }
    } else if constexpr (kStride == 8) {  // 16 rows: a warp's
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = w[0][i] + w[1][i];
      halve<4, 16>(sum, lane);
      halve<2, 8>(sum, lane);
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 4);
      if (!bit(4)) store(unit.warp, 2 * bit(16) + bit(8), sum[0]);
    } else {  // 32 rows: those of two warps
      float sum[2] = {w[0][0] + w[1][0], w[0][1] + w[1][1]};
      halve<2, 16>(sum, lane);
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 8);
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 4);
      if (!bit(8) && !bit(4)) store(unit.warp / 2, bit(16), sum[0]);
    }
  }

  float4* stash_;     // of this thread
  float base_[2];     // running maximum
  float sum_[2];      // this thread's share, relative to the base
  int32_t limit_[2];  // key groups [0, limit) are visible; rows that do not exist see none
};

}  // namespace bsfa::cuda::select::strided
