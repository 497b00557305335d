// Warpgroup matrix products.
#pragma once

#include <cute/tensor.hpp>

namespace bsfa::cuda {

// Issues c = a b (+ c) as one group of warpgroup products; c may not be touched before the group was waited for.
template <class Mma, class A, class B, class C>
__device__ __forceinline__ void issue(Mma& mma, const A& a, const B& b, C& c, bool accumulate) {
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  mma.accumulate_ = accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
#pragma unroll
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::SM90::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

}  // namespace bsfa::cuda
