// Problems for the CPU kernel test: random data in any dtype and layout, NaN wherever no valid token lies, and the
// arithmetic of the oracle. Shares no code with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bsfa/cpu.h"

namespace {

using bsfa::DType;

const float kNaN = std::numeric_limits<float>::quiet_NaN();
const double kInf = std::numeric_limits<double>::infinity();
int failures = 0;

void fail(const std::string& where, const char* what, double got, double want) {
  if (++failures <= 40) std::printf("FAIL %s: %s: got %.9g, want %.9g\n", where.c_str(), what, got, want);
}

bsfa::cpu::Executor threads(int workers) {
  bsfa::cpu::Executor executor;
  executor.num_workers = workers;
  executor.run = [workers](const std::function<void(int)>& body) {
    std::vector<std::thread> pool;
    for (int w = 1; w < workers; ++w) pool.emplace_back(body, w);
    body(0);
    for (std::thread& t : pool) t.join();
  };
  return executor;
}

// ---- Numbers of the three storage types, one at a time and by arithmetic alone. ----

double step_of(DType dtype, double x) {  // distance of neighbours near x
  const int bits = dtype == DType::kFloat32 ? 24 : dtype == DType::kBFloat16 ? 8 : 11;
  const int smallest = dtype == DType::kFloat16 ? -14 : -126;
  const int exponent = x == 0.0 ? smallest : std::max(std::ilogb(x), smallest);
  return std::ldexp(1.0, exponent - bits + 1);
}

double nearest(DType dtype, double x) {
  if (std::isnan(x) || std::isinf(x) || x == 0.0) return x;
  const double step = step_of(dtype, x);
  return std::nearbyint(x / step) * step;
}

struct Storage {
  DType dtype = DType::kFloat32;
  std::vector<unsigned char> bytes;
  void resize(DType type, int64_t count) {
    dtype = type;
    bytes.assign(count * (type == DType::kFloat32 ? 4 : 2), 0);
    for (int64_t i = 0; i < count; ++i) set(i, kNaN);
  }
  void set(int64_t i, double x) {
    if (dtype == DType::kFloat32) {
      const float f = static_cast<float>(x);
      std::memcpy(&bytes[i * 4], &f, 4);
      return;
    }
    const int fraction = dtype == DType::kBFloat16 ? 7 : 10, width = dtype == DType::kBFloat16 ? 8 : 5;
    const int bias = (1 << (width - 1)) - 1;
    int bits = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) {
      bits |= (((1 << width) - 1) << fraction) | (1 << (fraction - 1));
    } else if (std::isinf(x)) {
      bits |= ((1 << width) - 1) << fraction;
    } else if (x != 0.0) {
      const double y = std::fabs(nearest(dtype, x));
      const int exponent = std::max(std::ilogb(y), 1 - bias);
      const int mantissa = static_cast<int>(std::ldexp(y, fraction - exponent));
      bits |= ((exponent + bias - 1) << fraction) + mantissa;
    }
    const uint16_t h = static_cast<uint16_t>(bits);
    std::memcpy(&bytes[i * 2], &h, 2);
  }
  double get(int64_t i) const {
    if (dtype == DType::kFloat32) {
      float f;
      std::memcpy(&f, &bytes[i * 4], 4);
      return f;
    }
    uint16_t h;
    std::memcpy(&h, &bytes[i * 2], 2);
    const int fraction = dtype == DType::kBFloat16 ? 7 : 10, width = dtype == DType::kBFloat16 ? 8 : 5;
    const int bias = (1 << (width - 1)) - 1;
    const int exponent = (h & 0x7fff) >> fraction, mantissa = h & ((1 << fraction) - 1);
    double x;
    if (exponent == (1 << width) - 1) {
      x = mantissa ? kNaN : kInf;
    } else if (exponent == 0) {
      x = std::ldexp(mantissa, 1 - bias - fraction);
    } else {
      x = std::ldexp(mantissa + (1 << fraction), exponent - bias - fraction);
    }
    return h & 0x8000 ? -x : x;
  }
};

// ---- A problem: shapes, layout, data. ----

enum class Layout { kBatched, kPacked, kPaged };

struct Case {
  const char* name;
  DType dtype;
  Layout layout;
  int page_size;
  bool causal;
  int hq, hkv, d, dv;
  int block_m, block_n;
  float softcap;
  int window_left;
  std::vector<std::pair<int, int>> lengths;  // (seqlen_q, seqlen_k) per sequence; batched: all alike
};

struct Fixture {
  Case c;
  bsfa::Problem problem;
  std::vector<int32_t> cu_q, cu_k, seqlens, table;
  std::vector<int> rows_before;  // mask row of each sequence's first tile
  int num_rows = 0, max_blocks = 0, max_k = 0, total_q = 0;
  Storage q, k, v, out;
  bsfa::TensorView q_view, k_view, v_view, out_view;
  std::mt19937 random{1234};

  static int floor_div(int a, int b) { return static_cast<int>(std::floor(static_cast<double>(a) / b)); }
  int group() const { return c.hq / c.hkv; }
  int lq(int b) const { return c.lengths[b].first; }
  int lk(int b) const { return c.lengths[b].second; }
  int position(int b, int row) const { return c.causal ? lk(b) - lq(b) + row : row; }
  int first_tile(int b) const { return floor_div(position(b, 0), c.block_m); }
  int tiles(int b) const { return lq(b) == 0 ? 0 : floor_div(position(b, lq(b) - 1), c.block_m) - first_tile(b) + 1; }
  int mask_row(int b, int row) const { return rows_before[b] + floor_div(position(b, row), c.block_m) - first_tile(b); }
  int blocks(int b) const { return (lk(b) + c.block_n - 1) / c.block_n; }
  // Rows of this call in local tile t.
  std::vector<int> rows_of(int b, int t) const {
    std::vector<int> rows;
    for (int r = 0; r < lq(b); ++r) {
      if (mask_row(b, r) - rows_before[b] == t) rows.push_back(r);
    }
    return rows;
  }
  int visible(int b, int t) const {
    if (!c.causal) return blocks(b);
    const int last = position(b, rows_of(b, t).back());
    return last < 0 ? 0 : last / c.block_n + 1;
  }
  int64_t q_index(const bsfa::TensorView& view, int b, int row, int h) const {
    const int64_t token = c.layout == Layout::kBatched ? row : cu_q[b] + row;
    return (c.layout == Layout::kBatched ? b * view.batch_stride : 0) + token * view.token_stride +
           h * view.head_stride;
  }
  int64_t k_index(const bsfa::TensorView& view, int b, int token, int h) const {
    int64_t index = h * view.head_stride;
    if (c.layout == Layout::kBatched) return index + b * view.batch_stride + token * view.token_stride;
    if (c.layout == Layout::kPacked) return index + (cu_k[b] + token) * view.token_stride;
    const int pages = problem.kv.block_table_stride;
    return index + table[b * pages + token / c.page_size] * view.batch_stride +
           (token % c.page_size) * view.token_stride;
  }
  int64_t lse_index(int b, int row, int h) const {
    return c.layout == Layout::kBatched ? (int64_t{b} * c.hq + h) * lq(0) + row : int64_t{h} * total_q + cu_q[b] + row;
  }

  explicit Fixture(const Case& in) : c(in) {
    const int batch = static_cast<int>(c.lengths.size());
    problem.dtype = c.dtype;
    problem.batch = batch;
    problem.num_q_heads = c.hq;
    problem.num_kv_heads = c.hkv;
    problem.head_dim = c.d;
    problem.head_dim_v = c.dv;
    problem.block_m = c.block_m;
    problem.block_n = c.block_n;
    problem.causal = c.causal;
    problem.softmax_scale = 1.3f / std::sqrt(static_cast<float>(c.d));
    problem.softcap = c.softcap;
    cu_q = cu_k = {0};
    int max_q = 0;
    for (int b = 0; b < batch; ++b) {
      cu_q.push_back(cu_q.back() + lq(b));
      cu_k.push_back(cu_k.back() + lk(b));
      seqlens.push_back(lk(b));
      rows_before.push_back(num_rows);
      num_rows += tiles(b);
      max_q = std::max(max_q, lq(b));
      max_k = std::max(max_k, lk(b));
    }
    num_rows += 2;  // unused ones
    total_q = cu_q.back();
    max_blocks = (max_k + c.block_n - 1) / c.block_n;
    problem.query.max_seqlen = max_q;
    problem.kv.max_seqlen = max_k;
    // Rows are padded by a few elements: strides must be honoured.
    const auto make = [&](Storage* storage, bsfa::TensorView* view, int64_t slabs, int64_t tokens, int heads, int dim) {
      view->head_stride = dim + 1;
      view->token_stride = heads * view->head_stride + 3;
      view->batch_stride = tokens * view->token_stride + 5;
      storage->resize(c.dtype, slabs * view->batch_stride + 64);
      view->data = storage->bytes.data();
    };
    if (c.layout != Layout::kBatched) problem.query.cu_seqlens = cu_q.data();
    const int64_t q_slabs = c.layout == Layout::kBatched ? batch : 1;
    const int64_t q_tokens = c.layout == Layout::kBatched ? max_q : total_q;
    make(&q, &q_view, q_slabs, q_tokens, c.hq, c.d);
    make(&out, &out_view, q_slabs, q_tokens, c.hq, c.dv);
    int64_t slabs = batch, tokens = max_k;
    if (c.layout == Layout::kPacked) {
      problem.kv.cu_seqlens = cu_k.data();
      slabs = 1;
      tokens = cu_k.back();
    } else if (c.layout == Layout::kPaged) {
      const int pages = (max_k + c.page_size - 1) / c.page_size + 2;
      slabs = int64_t{pages} * batch + 3;
      tokens = c.page_size;
      std::vector<int> ids(slabs);
      std::iota(ids.begin(), ids.end(), 0);
      std::shuffle(ids.begin(), ids.end(), random);
      table.assign(pages * batch, -1);
      for (int b = 0, used = 0; b < batch; ++b) {
        for (int i = 0; i < pages; ++i) {
          const bool real = i * c.page_size < lk(b);
          table[b * pages + i] = real ? ids[used++] : (i % 2 ? -1 : 1 << 30);
        }
      }
      problem.kv.block_table = table.data();
      problem.kv.block_table_stride = pages;
      problem.kv.seqlens = seqlens.data();
      problem.kv.page_size = c.page_size;
    }
    make(&k, &k_view, slabs, tokens, c.hkv, c.d);
    make(&v, &v_view, slabs, tokens, c.hkv, c.dv);
    std::normal_distribution<double> normal;
    for (int b = 0; b < batch; ++b) {
      for (int r = 0; r < lq(b); ++r) {
        for (int h = 0; h < c.hq; ++h) {
          for (int i = 0; i < c.d; ++i) q.set(q_index(q_view, b, r, h) + i, normal(random));
        }
      }
      for (int n = 0; n < lk(b); ++n) {
        for (int h = 0; h < c.hkv; ++h) {
          for (int i = 0; i < c.d; ++i) k.set(k_index(k_view, b, n, h) + i, normal(random));
          for (int i = 0; i < c.dv; ++i) v.set(k_index(v_view, b, n, h) + i, normal(random));
        }
      }
    }
  }

  // Dense, without an LSE.
  bsfa::AttentionParams attention() const {
    bsfa::AttentionParams params;
    params.problem = problem;
    params.q = q_view;
    params.k = k_view;
    params.v = v_view;
    params.out = out_view;
    return params;
  }

  double cap(double s) const {
    s *= problem.softmax_scale;
    return c.softcap > 0 ? c.softcap * std::tanh(s / c.softcap) : s;
  }
  double logit(int b, int row, int h, int key) const {
    double s = 0.0;
    const int64_t qi = q_index(q_view, b, row, h), ki = k_index(k_view, b, key, h / group());
    for (int i = 0; i < c.d; ++i) s += q.get(qi + i) * k.get(ki + i);
    return cap(s);
  }
  bool sees(int b, int row, int key) const {
    const int p = position(b, row);
    if (c.causal && key > p) return false;
    return c.window_left < 0 || (key <= p && key >= p - c.window_left);
  }
};

bool bit(const std::vector<int32_t>& words, int64_t row, int num_words, int j) {
  return static_cast<uint32_t>(words[row * num_words + j / 32]) >> (j % 32) & 1;
}

bool close(double got, double want, double absolute, double relative) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= absolute + relative * std::fabs(want);
}

double output_error(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kBFloat16 ? 1.0 / 250 : 1.0 / 2000;
}

}  // namespace
