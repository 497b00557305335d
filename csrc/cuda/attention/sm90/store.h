// Writes a finished tile: out = O / sum, lse = ln 2 * (base + log2(sum)). Each warp stores its own 16 rows and waits
// for no other warp: through shared memory and TMA where outputs are staged and all 16 belong to the sequence, else
// from registers, row by row.
#pragma once

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

// The lane's number, not to be known outside: what follows from it would be kept in registers through the loops around.
__device__ __forceinline__ uint32_t lane_here() {
  uint32_t lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

// A store without a branch, behind which ptxas would serialise the products in the loops around (C7520).
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
struct Destination {
  int32_t token, batch, head;
  int32_t row_begin, row_end;  // of the tile's rows, those that are stored
  float* lse;

  __device__ __forceinline__ explicit Destination(const TileInfo& info)
      : token(info.tile.query_token),
        batch(info.tile.query_batch),
        head(info.head),
        row_begin(info.tile.row_begin),
        row_end(info.tile.row_end),
        lse(info.lse) {}
};

// `buffer`, of kStaged: the tile's query slot, whose queries are done with. TMA may still read it when this returns.
// pair(i): as of RowEnds.
template <class Config, class Pair>
__device__ __forceinline__ void store_tile(char* buffer, const KernelParams& p, const Destination& to, int warp,
                                           const RowEnds& ends, const Pair& pair) {
  using Element = typename Config::Element;
  using Outputs = typename Config::Outputs;
  constexpr int kColumnTiles = Outputs::kDim / 8;
  const uint32_t lane = lane_here();
  const int first_row = warp * kStoreRows;

  // The first two lanes of each quad have a row each.
  const int lse_row = first_row + static_cast<int>(lane / 4 + 8 * (lane % 4));
  const bool has_lse = lane % 4 < 2 && to.lse != nullptr && lse_row >= to.row_begin && lse_row < to.row_end;
  store_if(has_lse, to.lse + lse_row, lane % 4 == 0 ? ends.lse[0] : ends.lse[1]);
  if constexpr (Config::kStaged) {
    // All lanes alike: the shuffle tells the compiler, which else gives up uniform registers in loops around this.
    const bool whole = p.store_by_tma && first_row >= to.row_begin && first_row + kStoreRows <= to.row_end;
    if (__shfl_sync(kAllLanes, whole, 0)) {
      constexpr int kRowBytes = kBoxColumns * 2;
      char* first = buffer + first_row * kRowBytes;
      const uint32_t address = uniform(shared_address(first));
      const int32_t token = uniform(to.token + first_row);
      const int32_t head = uniform(to.head), batch = uniform(to.batch);
      // Lane i addresses rows 0-7 or 8-15 (i / 8 % 2) of column tiles j or j + 1 (i / 16), 16 bytes each, swizzled.
      const uint32_t own = address + lane % 16 * kRowBytes + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        store_matrices((own ^ j % 8 * 16) + j / 8 * Outputs::kBoxBytes, pair(2 * j), pair(2 * j + 1), pair(2 * j + 2),
                       pair(2 * j + 3));
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int piece = 0; piece < Outputs::kPieces; ++piece) {
          // The address from its uniform register.
          const void* rows = __cvta_shared_to_generic(address + piece * Outputs::kBoxBytes);
          cute::SM90_TMA_STORE_5D::copy(&p.out, rows, 0, token, piece, head, batch);
        }
        cute::tma_store_arrive();
      }
      return;
    }
  }
  auto* out = static_cast<Element*>(p.out_data) + to.batch * p.out_batch_stride + to.head * p.out_head_stride;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + static_cast<int>(lane / 4) + 8 * r;
    if (row < to.row_begin || row >= to.row_end) continue;
    Element* target = out + (to.token + row) * p.out_token_stride + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      const uint32_t both = pair(2 * j + r);
      if (!Config::kStaged && p.store_by_tma) {  // then rows are aligned
        *reinterpret_cast<uint32_t*>(target + 8 * j) = both;
        continue;
      }
      // An `out` of the caller's may start its rows on odd elements.
      target[8 * j] = reinterpret_cast<const Element*>(&both)[0];
      target[8 * j + 1] = reinterpret_cast<const Element*>(&both)[1];
    }
  }
}

// Gives the query slot of a stored tile back, once TMA has read what the warp stored from it.
__device__ __forceinline__ void release_stored(Mbarrier& empty, int lane) {
  if (lane == 0) {
    cute::tma_store_wait<0>();
    empty.arrive();
  }
  __syncwarp();
}

}  // namespace bsfa::cuda::attn::sm90
