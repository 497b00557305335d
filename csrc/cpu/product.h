// The micro-kernel of everything here: C[i][lane] = sum over k of A(i, k) * B[k][lane].
//
// B is a panel [depth][kRows] whose lanes are query rows; A is read as scalars and broadcast, so that keys and values
// need no transposition: S = K Q^T reads A(i, k) = K[i][k], O = V^T P reads A(i, k) = V[k][i]. An NI x RV block of C
// stays in registers (6 x 4 of 32 registers, 6 x 2 of 16) over the whole depth. Columns left over are computed in steps
// of 2 (never less): A and C must have room for an even number of them.
#pragma once

#include "simd.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

template <int RV, int NI>
BSFA_INLINE void product_block(const float* a, int64_t a_stride_i, int64_t a_stride_k, const float* b, int32_t depth,
                               Float (&c)[NI][RV]) {
  for (int32_t k = 0; k < depth; ++k) {
    Float rows[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) rows[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < NI; ++i) {
      const Float scalar = splat(a[i * a_stride_i]);
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) c[i][v] += scalar * rows[v];
    }
    a += a_stride_k;
    b += kRows;
  }
}

// s[n][lane] = sum over d of keys[n][d] * queries[d][lane]
template <int RV, int NI>
BSFA_INLINE void query_key_block(const float* keys, const float* queries, int32_t dim, float* s) {
  Float c[NI][RV] = {};
  product_block<RV, NI>(keys, dim, 1, queries, dim, c);
#pragma GCC unroll 8
  for (int i = 0; i < NI; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) store(s + i * kRows + v * kLanes, c[i][v]);
  }
}

template <int RV>
static __attribute__((noinline)) void query_keys_rows(const float* keys, int32_t count, const float* queries,
                                                      int32_t dim, float* s) {
  int32_t n = 0;
  for (; n + 5 <= count; n += 6) query_key_block<RV, 6>(keys + int64_t{n} * dim, queries, dim, s + n * kRows);
  if (n + 2 < count) {
    query_key_block<RV, 4>(keys + int64_t{n} * dim, queries, dim, s + n * kRows);
  } else if (n < count) {
    query_key_block<RV, 2>(keys + int64_t{n} * dim, queries, dim, s + n * kRows);
  }
}

BSFA_INLINE void query_keys(int32_t vectors, const float* keys, int32_t count, const float* queries, int32_t dim,
                            float* s) {
#if BSFA_ROW_VECTORS == 4
  if (vectors == 4) return query_keys_rows<4>(keys, count, queries, dim, s);
  if (vectors == 3) return query_keys_rows<3>(keys, count, queries, dim, s);
#endif
  if (vectors == 2) return query_keys_rows<2>(keys, count, queries, dim, s);
  return query_keys_rows<1>(keys, count, queries, dim, s);
}

// o[i][lane] = o[i][lane] * rescale[lane] + sum over n of values[n][i] * p[n][lane]
template <int RV, int NI>
BSFA_INLINE void value_block(const float* values, int32_t stride, int32_t count, const float* p, const float* rescale,
                             float* o) {
  Float c[NI][RV];
#pragma GCC unroll 8
  for (int i = 0; i < NI; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) c[i][v] = load(o + i * kRows + v * kLanes) * load(rescale + v * kLanes);
  }
  product_block<RV, NI>(values, 1, stride, p, count, c);
#pragma GCC unroll 8
  for (int i = 0; i < NI; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) store(o + i * kRows + v * kLanes, c[i][v]);
  }
}

template <int RV>
static __attribute__((noinline)) void add_values_rows(const float* values, int32_t stride, int32_t count,
                                                      const float* p, const float* rescale, float* o) {
  int32_t i = 0;
  for (; i + 5 <= stride; i += 6) value_block<RV, 6>(values + i, stride, count, p, rescale, o + i * kRows);
  if (i + 2 < stride) {
    value_block<RV, 4>(values + i, stride, count, p, rescale, o + i * kRows);
  } else if (i < stride) {
    value_block<RV, 2>(values + i, stride, count, p, rescale, o + i * kRows);
  }
}

BSFA_INLINE void add_values(int32_t vectors, const float* values, int32_t stride, int32_t count, const float* p,
                            const float* rescale, float* o) {
#if BSFA_ROW_VECTORS == 4
  if (vectors == 4) return add_values_rows<4>(values, stride, count, p, rescale, o);
  if (vectors == 3) return add_values_rows<3>(values, stride, count, p, rescale, o);
#endif
  if (vectors == 2) return add_values_rows<2>(values, stride, count, p, rescale, o);
  return add_values_rows<1>(values, stride, count, p, rescale, o);
}

// Logits in base 2 from plain products: what queries are multiplied by as they are packed, and what remains to be done
// to the products.
struct LogitScale {
  float factor = 1.0f;
  float cap = 0.0f;  // 0: nothing remains; else s -> cap * tanh(s)
};

BSFA_INLINE LogitScale logit_scale(const Problem& problem) {
  LogitScale scale;
  if (problem.softcap > 0.0f) {
    scale.factor = problem.softmax_scale / problem.softcap;
    scale.cap = problem.softcap * kLog2E;
  } else {
    scale.factor = problem.softmax_scale * kLog2E;
  }
  return scale;
}

static __attribute__((noinline)) void cap_logits(float cap, int32_t vectors, int32_t count, float* s) {
  for (int32_t n = 0; n < count; ++n) {
    for (int32_t v = 0; v < vectors; ++v) {
      float* p = s + n * kRows + v * kLanes;
      store(p, tanh(load(p)) * cap);
    }
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
