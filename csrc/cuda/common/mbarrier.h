// mbarriers in shared memory, and the few PTX instructions around them. Unlike CUTLASS's wrappers these tell the
// compiler that memory changes, so that plain loads and stores of shared memory stay on their side of a wait or an
// arrival.
#pragma once

#include <cstdint>

namespace bsfa::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

struct alignas(8) Mbarrier {
  uint64_t state;

  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives, and lets the phase end only after `bytes` more have been written by TMA.
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  // Returns once the phase of this parity has ended.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n\t"
        "@!done bra again;\n\t"
        "}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// Position in a ring of kSlots slots: what both sides of a full/empty pair of barriers count. A consumer waits for
// full[slot] with `parity`, a producer for empty[slot] with `parity ^ 1`, which at first returns at once.
template <int kSlots>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Makes barrier initialisation visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary accesses of shared memory before later ones by TMA and tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace bsfa::cuda
