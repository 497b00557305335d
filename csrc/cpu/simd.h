// Vectors of floats, written with the vector extensions of GCC and Clang so that one source serves every instruction
// set. The including file defines BSFA_ISA (a namespace), BSFA_VECTOR_BYTES and BSFA_ROW_VECTORS.
//
//   Float, Int       kLanes floats / int32s in one register
//   exp2             2^x: n = round(x) by the 1.5 * 2^23 addition, degree-6 polynomial for 2^(x - n), times the float
//                    whose exponent bits are n. At most 1 ulp off; exactly 0 for x < -126.5 (and -inf); NaN stays NaN;
//                    x > 127 is taken as 127
//   exp2_small       the same, for x that is known to be small
//   tanh             odd polynomial below 0.35, 1 - 2 / (exp(2x) + 1) above
//   widen, narrow    bfloat16 and float16 from and to float32, round to nearest even, NaN stays NaN
#pragma once

#include "kernels.h"

#define BSFA_INLINE static inline __attribute__((always_inline))

namespace bsfa::cpu::BSFA_ISA {
namespace {

constexpr int kLanes = BSFA_VECTOR_BYTES / 4;
constexpr int kRowVectors = BSFA_ROW_VECTORS;  // row vectors of the micro-kernel, chosen to fill the register file
constexpr int kRows = kRowVectors * kLanes;    // query rows of a subtile

typedef float Float __attribute__((vector_size(BSFA_VECTOR_BYTES)));
typedef int32_t Int __attribute__((vector_size(BSFA_VECTOR_BYTES)));
typedef uint32_t Uint __attribute__((vector_size(BSFA_VECTOR_BYTES)));
typedef uint16_t Half __attribute__((vector_size(BSFA_VECTOR_BYTES / 2)));
// The same in memory: any alignment, may alias anything.
typedef Float FloatMemory __attribute__((aligned(4), may_alias));
typedef Int IntMemory __attribute__((aligned(4), may_alias));
typedef Half HalfMemory __attribute__((aligned(2), may_alias));

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

BSFA_INLINE Float load(const float* p) { return *reinterpret_cast<const FloatMemory*>(p); }
BSFA_INLINE void store(float* p, Float x) { *reinterpret_cast<FloatMemory*>(p) = x; }
BSFA_INLINE Int load(const int32_t* p) { return *reinterpret_cast<const IntMemory*>(p); }
BSFA_INLINE Half load(const uint16_t* p) { return *reinterpret_cast<const HalfMemory*>(p); }
BSFA_INLINE void store(uint16_t* p, Half x) { *reinterpret_cast<HalfMemory*>(p) = x; }

BSFA_INLINE Float splat(float x) { return x - Float{}; }
BSFA_INLINE Int splat(int32_t x) { return x - Int{}; }
BSFA_INLINE Float select(Int mask, Float a, Float b) { return mask ? a : b; }
BSFA_INLINE Int select(Int mask, Int a, Int b) { return mask ? a : b; }
// A NaN in the second operand is returned, one in the first is ignored.
BSFA_INLINE Float max(Float a, Float b) { return a > b ? a : b; }
BSFA_INLINE Float min(Float a, Float b) { return a < b ? a : b; }
BSFA_INLINE int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
BSFA_INLINE int32_t max(int32_t a, int32_t b) { return a > b ? a : b; }
BSFA_INLINE int32_t round_up(int32_t a, int32_t b) { return (a + b - 1) / b * b; }

BSFA_INLINE float horizontal_sum(Float x) {
  float sum[kLanes];
  store(sum, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

BSFA_INLINE float horizontal_max(Float x) {
  float result = -kInfinity;
  for (int i = 0; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// x <= 127.
BSFA_INLINE Float exp2_small(Float x) {
  x = max(splat(-127.0f), x);
  const Float shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the low mantissa bits become round(x) + 127
  const Float power = (Float)((Uint)shifted << 23);
  const Float f = x - (shifted - 12583039.0f);
  Float p = splat(0x1.41fbbcp-13f);
  p = p * f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return p * power;
}

BSFA_INLINE Float exp2(Float x) { return exp2_small(min(splat(127.0f), x)); }

BSFA_INLINE Float tanh(Float x) {
  const Float square = x * x;
  Float small = splat(0.02186949f);  // 62 / 2835
  small = small * square - 0.05396825f;
  small = small * square + 0.13333333f;
  small = small * square - 0.33333333f;
  small = small * square * x + x;
  const Float clamped = min(splat(10.0f), max(splat(-10.0f), x));
  const Float large = 1.0f - 2.0f / (exp2(clamped * (2.0f * kLog2E)) + 1.0f);
  return select(square < 0.1225f, small, large);
}

BSFA_INLINE Float widen_bfloat16(Half x) { return (Float)(__builtin_convertvector(x, Uint) << 16); }

BSFA_INLINE Float widen_float16(Half x) {
  const Int bits = (Int) __builtin_convertvector(x, Uint);
  const Int sign = (bits & 0x8000) << 16;
  const Int magnitude = bits & 0x7fff;
  const Int normal = (magnitude << 13) + (112 << 23);
  const Int special = (magnitude << 13) | 0x7f800000;  // infinity, NaN
  const Int subnormal = (Int)(__builtin_convertvector(magnitude, Float) * 0x1p-24f);
  const Int value = select(magnitude >= 0x7c00, special, select(magnitude >= 0x0400, normal, subnormal));
  return (Float)(value | sign);
}

BSFA_INLINE Half narrow_bfloat16(Float x) {
  const Uint bits = (Uint)x;
  const Uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Uint nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((Uint)select(x != x, (Int)nan, (Int)rounded), Half);
}

BSFA_INLINE Half narrow_float16(Float x) {
  const Int bits = (Int)x;
  const Int sign = (Int)(((Uint)bits >> 16) & 0x8000u);
  const Int magnitude = bits & 0x7fffffff;
  const Float value = (Float)magnitude;
  // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, the step of float16's subnormals.
  const Int subnormal = (Int)(value + 0.5f) - 0x3f000000;
  const Int normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Int result = select(value < 0x1p-14f, subnormal, normal);
  result = select(value >= 65520.0f, splat(0x7c00), result);
  result = select(x != x, splat(0x7e00), result);
  return __builtin_convertvector((Uint)(result | sign), Half);
}

BSFA_INLINE Float widen(DType dtype, Half x) {
  return dtype == DType::kBFloat16 ? widen_bfloat16(x) : widen_float16(x);
}
BSFA_INLINE Half narrow(DType dtype, Float x) {
  return dtype == DType::kBFloat16 ? narrow_bfloat16(x) : narrow_float16(x);
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
