// From products q . k to exponents of two: what happens to a score before its maximum is sought, and the factor after.
#pragma once

#include <cute/tensor.hpp>

#include "bsfa/params.h"
#include "scalar.h"

namespace bsfa::cuda {

enum class Transform : int32_t {
  kNone = 0,
  kScale = 1,  // f(s) = s * inner_scale, which need not be positive
  kCap = 2,    // f(s) = softcap * tanh(s * inner_scale)
};

// A score s counts 2^(scale_log2 * f(s)); scale_log2 > 0.
struct LogitScale {
  Transform transform;
  float scale_log2;
  float inverse_scale_log2;
  float inner_scale;
  float softcap;
};

// `factor`: of the scores, beside softmax_scale. The maximum of the scores is that of the exponents only if the scale
// is positive; else they are scaled first. So they are if it is too small to be divided by.
inline LogitScale logit_scale(const Problem& problem, float factor = 1.0f) {
  const float scale = problem.softmax_scale * factor;
  const bool capped = problem.softcap != 0.0f;
  LogitScale s{};
  s.transform = capped ? Transform::kCap : scale > 1e-30f ? Transform::kNone : Transform::kScale;
  s.scale_log2 = (s.transform == Transform::kNone ? scale : 1.0f) * kLog2e;
  s.inverse_scale_log2 = 1.0f / s.scale_log2;
  s.inner_scale = capped ? scale / problem.softcap : scale;
  s.softcap = problem.softcap;
  return s;
}

#if defined(__CUDACC__)

// s -> f(s), in registers.
template <class Tensor>
__device__ __forceinline__ void transform_scores(Tensor& s, const LogitScale& scale) {
#pragma unroll
  for (int i = 0; i < cute::size(s); ++i) s(i) *= scale.inner_scale;
  if (scale.transform != Transform::kCap) return;
#pragma unroll
  for (int i = 0; i < cute::size(s); ++i) s(i) = capped(s(i), scale.softcap);
}

#endif

}  // namespace bsfa::cuda
