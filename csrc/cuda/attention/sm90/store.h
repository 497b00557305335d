// Writes a finished tile: out = O / sum, lse = ln 2 * (base + log2(sum)). Each warp stores its own 16 rows and waits
// for no other warp: where outputs are staged, in whole lines by way of shared memory, else from registers, as they lie
// there. Not by TMA: until it sees what was just staged (a fence between proxies) takes longer than to read that back.
#pragma once

#include "../../common/steps.h"
#include "config.h"
#include "softmax.h"

namespace bsfa::cuda::attn::sm90 {

// Four 8 x 8 matrices of 16-bit elements, from the accumulator layout to rows of 16 bytes; lane i gives the address of
// row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// The lane's number, not to be known outside: what follows from it would be kept in registers through the loops around.
__device__ __forceinline__ uint32_t lane_here() {
  uint32_t lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

// Stores without a branch, behind which ptxas would serialise the products in the loops around (C7520).
__device__ __forceinline__ void store_if(bool wanted, float* address, float value) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %0, 0;\n"
      "@wanted st.global.f32 [%1], %2;\n"
      "}\n" ::"r"(static_cast<int>(wanted)),
      "l"(address), "f"(value)
      : "memory");
}
__device__ __forceinline__ void store_if(bool wanted, void* address, const uint4& value) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %0, 0;\n"
      "@wanted st.global.v4.u32 [%1], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(static_cast<int>(wanted)),
      "l"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

// What this thread's two rows of O are multiplied by in the end, and their lse.
struct RowEnds {
  float factor[2];
  float lse[2];

  __device__ __forceinline__ explicit RowEnds(const SoftmaxRows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_over_quad(rows.sum[r]);
      factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      lse[r] = sum == 0.0f ? -INFINITY : (rows.base[r] + log2f(sum)) * 0.6931471805599453f;
    }
  }

  // Pair i of this thread's share of the output: 2 * j + r is of column tile j and row r.
  template <class Element, class Tensor>
  __device__ __forceinline__ uint32_t pair(const Tensor& o, int i) const {
    return pack<Element>(o(2 * i) * factor[i % 2], o(2 * i + 1) * factor[i % 2]);
  }
};

// All of them.
template <class Config>
using PackedOutputs = decltype(cute::make_tensor<uint32_t>(cute::Int<Config::Outputs::kDim / 4>{}));

// Where a finished tile goes, read from shared memory some time before it does.
template <class Element>
struct Destination {
  Element* out;                // of the tile's row 0
  float* lse;                  // likewise; null: not wanted
  int32_t row_begin, row_end;  // of the tile's rows, those that are stored

  __device__ __forceinline__ Destination(const TileInfo& info, const KernelParams& p)
      : lse(info.lse), row_begin(info.tile.row_begin), row_end(info.tile.row_end) {
    out = static_cast<Element*>(p.out_data) + info.tile.query_batch * p.out_batch_stride +
          info.head * p.out_head_stride + info.tile.query_token * p.out_token_stride;
  }
  __device__ __forceinline__ bool has(int row) const { return row >= row_begin && row < row_end; }
};

// The finished rows of a warp, from registers to memory, in two steps between which something else may be done. Where
// outputs are staged they go through shared memory and are written in lines of 128 bytes: the lanes take four rows of a
// piece at a time, 16 bytes each. `pair(i)`: as of RowEnds.
template <class Config>
class RowStore {
  using Element = typename Config::Element;
  using Outputs = typename Config::Outputs;

 public:
  // `buffer`, of kStaged: the tile's query slot, whose queries are done with.
  __device__ __forceinline__ RowStore(const KernelParams& p, const Destination<Element>& to, int warp, char* buffer)
      : p_(p),
        to_(to),
        first_row_(warp * kStoreRows),
        lane_(lane_here()),
        staged_(shared_address(buffer) + first_row_ * kRowBytes) {}

  template <class Pair>
  __device__ __forceinline__ void begin(const Pair& pair) const {
    if constexpr (Config::kStaged) {
      if (p_.wide_rows) {
        stage(pair);
        return;
      }
    }
    store_pairs(pair);
  }

  // `empty`, of kStaged: of the query slot, which is given back as soon as what lies there has been read.
  __device__ __forceinline__ void end(const RowEnds& ends, Mbarrier* empty) const {
    if constexpr (Config::kStaged) store_staged(*empty);
    // The first two lanes of each quad have a row each.
    const int lse_row = first_row_ + static_cast<int>(lane_ / 4 + 8 * (lane_ % 4));
    const bool has_lse = lane_ % 4 < 2 && to_.lse != nullptr && to_.has(lse_row);
    store_if(has_lse, to_.lse + lse_row, lane_ % 4 == 0 ? ends.lse[0] : ends.lse[1]);
  }

 private:
  static constexpr int kColumnTiles = Outputs::kDim / 8, kRowBytes = kBoxColumns * 2, kLanesOfRow = kRowBytes / 16;
  static constexpr int kRowsAtOnce = 32 / kLanesOfRow, kRounds = kStoreRows / kRowsAtOnce;

  template <class Pair>
  __device__ __forceinline__ void stage(const Pair& pair) const {
    // Lane i addresses rows 0-7 or 8-15 (i / 8 % 2) of column tiles j or j + 1 (i / 16), 16 bytes each, swizzled.
    const uint32_t own = staged_ + lane_ % 16 * kRowBytes + (lane_ / 16 ^ lane_ % 8) * 16;
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      store_matrices((own ^ j % 8 * 16) + j / 8 * Outputs::kBoxBytes, pair(2 * j), pair(2 * j + 1), pair(2 * j + 2),
                     pair(2 * j + 3));
    }
  }

  __device__ __forceinline__ void store_staged(Mbarrier& empty) const {
    const uint32_t row = lane_ / kLanesOfRow, part = lane_ % kLanesOfRow;
    const uint32_t source = staged_ + row * kRowBytes + (part ^ row) * 16;
    uint4 lines[kRounds][Outputs::kPieces];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
#pragma unroll
      for (int piece = 0; piece < Outputs::kPieces; ++piece) {
        // Rows i * 4 + row: of the swizzle's three bits the upper one changes.
        const uint32_t address = (source ^ i * kRowsAtOnce % 8 * 16) + i * kRowsAtOnce * kRowBytes;
        lines[i][piece] = load_shared(address + piece * Outputs::kBoxBytes);
      }
    }
    __syncwarp();
    release(empty, static_cast<int>(lane_));
    const int first = first_row_ + static_cast<int>(row);
    auto* target = reinterpret_cast<char*>(to_.out + first * p_.out_token_stride) + part * 16;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const bool wanted = p_.wide_rows && to_.has(first + i * kRowsAtOnce);
#pragma unroll
      for (int piece = 0; piece < Outputs::kPieces; ++piece) {
        store_if(wanted, target + piece * kRowBytes, lines[i][piece]);
      }
      target += kRowsAtOnce * 2 * p_.out_token_stride;
    }
  }

  template <class Pair>
  __device__ __forceinline__ void store_pairs(const Pair& pair) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row_ + static_cast<int>(lane_ / 4) + 8 * r;
      if (!to_.has(row)) continue;
      Element* target = to_.out + row * p_.out_token_stride + 2 * (lane_ % 4);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const uint32_t both = pair(2 * j + r);
        if (!Config::kStaged && p_.wide_rows) {
          *reinterpret_cast<uint32_t*>(target + 8 * j) = both;
          continue;
        }
        // An `out` of the caller's may start its rows on odd elements.
        target[8 * j] = reinterpret_cast<const Element*>(&both)[0];
        target[8 * j + 1] = reinterpret_cast<const Element*>(&both)[1];
      }
    }
  }

  const KernelParams& p_;
  const Destination<Element> to_;
  const int first_row_;
  const uint32_t lane_;
  const uint32_t staged_;  // where the warp's rows begin
};

}  // namespace bsfa::cuda::attn::sm90
