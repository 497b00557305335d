// Constants, shared memory and the warp-level instructions of the probe kernels (probe.cu).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../common/scalar.h"
#include "../common/warp.h"

namespace bsfa::cuda::probe {

constexpr int kRows = 128;  // probe rows of a CTA, at most
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpRows = kRows / kWarps;
constexpr int kFragments = kWarpRows / 16;  // 16-row fragments of a warp
constexpr int kTileKeys = 64;               // keys that are copied at a time
constexpr int kStages = 2;
constexpr int kSpan = 1024;         // keys of a CTA
constexpr int kGroupKeys = 32;      // keys whose scores a warp holds at a time
constexpr int kMinCtasPerSm = 3;    // 168 registers a thread
constexpr int kTailStride = kRows;  // floats per (head, span) for the distances that the span before it ends with

static_assert(kTileKeys % kWarps == 0 && kTileKeys / kWarps <= 32, "a lane finds one key's row");
static_assert(kStages * kTileKeys >= kRows, "queries are staged where keys will lie");
static_assert(kSpan % kTileKeys == 0 && kTileKeys % kGroupKeys == 0 && kSpan >= kRows, "spans");

// A diagonal of a warp, e = row - key: slot e + kSpan of kSpan + kWarpRows.
constexpr int kDiagonals = kSpan + kWarpRows;

template <int kHeadDim>
struct Shared {
  alignas(128) char keys[kStages][kTileKeys * kHeadDim * 2];
  // Of the second pass: sums of each warp's rows.
  float vertical[kWarps][kSpan];
  float slash[kWarps][kDiagonals];
};

// Byte offset of 16-byte piece `piece` of row `row`; the pieces of eight rows in a column lie in different banks.
template <int kHeadDim>
__device__ __forceinline__ uint32_t place(int row, int piece) {
  return static_cast<uint32_t>(row * (kHeadDim * 2) + ((piece ^ (row & 7)) << 4));
}

// 16 bytes from global to shared memory; zeros where not `valid`, when nothing is read.
__device__ __forceinline__ void copy_16(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kLeft` groups of this thread's copies are under way.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices; lanes 8 i .. 8 i + 7 give the rows of the i-th.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// c += a b for 16 rows, 8 keys, 16 dimensions.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace bsfa::cuda::probe
