// The kernels for AVX-512 F, BW, VL and DQ.
//
// Whatever is shared with other files is included before the target changes, so that no inline function of theirs is
// compiled for it; everything after it has internal linkage.
#if defined(__x86_64__)

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

#define BSFA_ISA avx512
#define BSFA_VECTOR_BYTES 64
#define BSFA_ROW_VECTORS 4
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace bsfa::cpu {

const Kernels& avx512_kernels() { return avx512::kTable; }

}  // namespace bsfa::cpu

#endif
