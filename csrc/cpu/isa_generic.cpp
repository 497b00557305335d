// The kernels for the baseline of the compiler: any x86-64, Arm, anything else with GCC or Clang.
#include "kernels.h"

#define BSFA_ISA generic
#define BSFA_VECTOR_BYTES 16
#if defined(__aarch64__)
#define BSFA_ROW_VECTORS 4
#else
#define BSFA_ROW_VECTORS 2
#endif
#include "kernel_table.h"

namespace bsfa::cpu {

const Kernels& generic_kernels() { return generic::kTable; }

}  // namespace bsfa::cpu
