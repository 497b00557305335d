// What consumers of a stream of steps do with the ring that brings them: read a step, give a slot back.
#pragma once

#include <cstdint>

#include "mbarrier.h"
#include "warp.h"

namespace bsfa::cuda {

#if defined(__CUDACC__)

// A step that has arrived, from its slot. Its flags through a shuffle, which makes branches on them uniform.
template <class Step>
__device__ __forceinline__ Step read_step(const Step& slot) {
  const Step step = slot;
  return {step.first_key, __shfl_sync(kAllLanes, step.flags, 0)};
}

// The warp is done with a slot.
__device__ __forceinline__ void release(Mbarrier& empty, int lane) {
  if (lane == 0) empty.arrive();
}

#endif

}  // namespace bsfa::cuda
