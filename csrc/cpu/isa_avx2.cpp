// The kernels for AVX2 with FMA.
//
// Whatever is shared with other files is included before the target changes, so that no inline function of theirs is
// compiled for it; everything after it has internal linkage.
#if defined(__x86_64__)

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define BSFA_ISA avx2
#define BSFA_VECTOR_BYTES 32
#define BSFA_ROW_VECTORS 2
#include "kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace bsfa::cpu {

const Kernels& avx2_kernels() { return avx2::kTable; }

}  // namespace bsfa::cpu

#endif
