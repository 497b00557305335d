// The CPU kernels at the ends of their number formats: rounding, NaN, infinity and extreme logits, on every instruction
// set that this machine has. Built as cpu_kernels_test.cpp is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "bsfa/cpu.h"
#include "cpu_test_fixture.h"

namespace {

// Every value of the 16-bit types through a mean of one token, and every midpoint of two neighbours (ties to even).
void check_rounding(const char* isa) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int tokens = 1; tokens <= 2; ++tokens) {
      const int blocks = 256, dim = 256;
      Storage k, out;
      k.resize(dtype, blocks * tokens * dim);
      out.resize(dtype, blocks * dim);
      for (int i = 0; i < blocks * dim; ++i) {
        for (int t = 0; t < tokens; ++t) {
          const uint16_t bits = static_cast<uint16_t>(i + t);
          std::memcpy(&k.bytes[2 * ((i / dim * tokens + t) * dim + i % dim)], &bits, 2);
        }
      }
      bsfa::PoolParams params;
      params.dtype = dtype;
      params.batch = params.num_kv_heads = 1;
      params.head_dim = dim;
      params.block_n = tokens;
      params.max_blocks = blocks;
      params.kv.max_seqlen = blocks * tokens;
      params.k.data = k.bytes.data();
      params.k.token_stride = dim;
      params.out = out.bytes.data();
      bsfa::cpu::pool_blocks(params, threads(1));
      for (int i = 0; i < blocks * dim; ++i) {
        const double first = k.get(i / dim * tokens * dim + i % dim);
        const double second = k.get((i / dim * tokens + tokens - 1) * dim + i % dim);
        if (std::fabs(first) > 1e38) continue;  // the sum of two may overflow float32
        const double want = nearest(dtype, (first + second) / 2), got = out.get(i);
        if (!(got == want || (std::isnan(got) && std::isnan(want)))) fail(isa, "rounding", got, want);
      }
    }
  }
}

// A NaN or infinity in a valid token reaches the rows that see it, and no other.
void check_nan_propagation(const char* isa) {
  for (int in_k = 0; in_k < 2; ++in_k) {
    Fixture f({"nan", DType::kFloat32, Layout::kBatched, 0, true, 2, 1, 20, 20, 32, 64, 0, -1, {{100, 100}}});
    const int token = 70;
    if (in_k) {
      f.k.set(f.k_index(f.k_view, 0, token, 0) + 3, kNaN);
    } else {
      f.v.set(f.k_index(f.v_view, 0, token, 0) + 3, kNaN);
      f.v.set(f.k_index(f.v_view, 0, token, 0) + 4, kInf);
    }
    bsfa::AttentionParams params = f.attention();
    bsfa::cpu::attention(params, threads(1));
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 100; ++r) {
        for (int i = 0; i < 20; ++i) {
          const double got = f.out.get(f.q_index(f.out_view, 0, r, h) + i);
          const bool sees = r >= token;
          const bool nan = sees && (in_k || i == 3);
          const bool infinite = sees && !in_k && i == 4;
          if (std::isnan(got) != nan || std::isinf(got) != infinite) {
            fail(std::string(isa) + (in_k ? " NaN in K" : " NaN in V"), "out", got, r);
          }
        }
      }
    }
  }
}

// Extreme logits: one key far above all others, and rows whose logits are all very negative.
void check_extremes(const char* isa) {
  Fixture f({"extremes", DType::kFloat32, Layout::kBatched, 0, true, 1, 1, 8, 8, 64, 32, 0, -1, {{200, 200}}});
  for (int n = 0; n < 200; ++n) {
    for (int i = 0; i < 8; ++i) {
      f.k.set(f.k_index(f.k_view, 0, n, 0) + i, f.k.get(f.k_index(f.k_view, 0, n, 0) + i) * (n == 9 ? 1e4 : 300.0));
    }
  }
  const std::vector<float> lse = [&] {
    std::vector<float> result(200);
    bsfa::AttentionParams params = f.attention();
    params.lse = result.data();
    params.lse_batch_stride = params.lse_head_stride = 200;
    bsfa::cpu::attention(params, threads(1));
    return result;
  }();
  for (int r = 0; r < 200; ++r) {
    double top = -kInf;
    for (int n = 0; n <= r; ++n) top = std::max(top, f.logit(0, r, 0, n));
    double total = 0.0, sum = 0.0;
    for (int n = 0; n <= r; ++n) {
      const double p = std::exp(f.logit(0, r, 0, n) - top);
      total += p;
      sum += p * f.v.get(f.k_index(f.v_view, 0, n, 0));
    }
    if (!close(lse[r], top + std::log(total), 1e-4, 5e-6)) fail(isa, "extreme lse", lse[r], top + std::log(total));
    const double got = f.out.get(f.q_index(f.out_view, 0, r, 0));
    if (!close(got, sum / total, 1e-2, 1e-2)) fail(isa, "extreme out", got, sum / total);
  }
}

}  // namespace

int main() {
  for (const char* isa : {"generic", "avx2", "avx512"}) {
    if (!bsfa::cpu::set_instruction_set(isa)) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    check_rounding(isa);
    check_nan_propagation(isa);
    check_extremes(isa);
    std::printf("%s: done\n", isa);
  }
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
