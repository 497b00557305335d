// The CPU kernels against a float64 oracle that shares no code with them: every operation, dtype, layout and
// instruction set that this machine has. Prints what failed and exits nonzero. No framework:
//   g++ -O2 -std=c++17 -fno-math-errno -ffp-contract=fast -Icsrc/include csrc/cpu/*.cpp
//       csrc/tests/cpu_kernels_test.cpp -pthread -o cpu_kernels_test && ./cpu_kernels_test
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "bsfa/cpu.h"
#include "cpu_test_fixture.h"

namespace {

enum class Mask { kDense, kPlain, kCorrected, kTokens };

std::vector<float> check_attention(Fixture& f, const std::string& where, int mask_heads, Mask kind) {
  const bool dense = kind == Mask::kDense, corrected = kind == Mask::kCorrected;
  const Case& c = f.c;
  const int num_words = (f.max_blocks + 31) / 32;
  std::vector<int32_t> words(int64_t{f.num_rows} * mask_heads * num_words + 1);
  for (int32_t& w : words) w = f.random() % 3 == 0 ? 0 : static_cast<int32_t>(f.random() | f.random());
  if (num_words > 0) std::fill(words.begin(), words.begin() + num_words, 0);  // a row that keeps nothing
  std::vector<float> lse(int64_t{f.total_q} * c.hq + 1, kNaN);
  bsfa::AttentionParams params = f.attention();
  params.lse = lse.data();
  params.lse_batch_stride = int64_t{c.hq} * f.lq(0);
  params.lse_head_stride = c.layout == Layout::kBatched ? f.lq(0) : f.total_q;
  params.words = dense ? nullptr : words.data();
  params.num_rows = f.num_rows;
  params.mask_heads = mask_heads;
  params.num_words = num_words;
  params.window_left = c.window_left;
  Storage k_means, v_means;  // any numbers will do
  if (corrected) {
    const int64_t count = int64_t{f.problem.batch} * f.max_blocks * c.hkv;
    std::normal_distribution<double> normal;
    for (auto [means, size] : {std::pair(&k_means, count * c.d), std::pair(&v_means, count * c.dv)}) {
      means->resize(c.dtype, size + 1);
      for (int64_t i = 0; i < size; ++i) means->set(i, normal(f.random));
    }
    params.k_means = k_means.bytes.data();
    params.v_means = v_means.bytes.data();
  }
  const int token_words = (f.max_k + 127) / 128 * 4;
  std::vector<int32_t> tokens(int64_t{f.total_q} * token_words + 4);
  for (int32_t& w : tokens) w = f.random() % 4 == 0 ? 0 : static_cast<int32_t>(f.random());
  const auto token_row = [&](int b, int r) {
    return f.problem.query.cu_seqlens != nullptr ? f.cu_q[b] + r : b * f.problem.query.max_seqlen + r;
  };
  if (kind == Mask::kTokens) {
    params.token_words = tokens.data();
    params.token_row_stride = token_words;
    params.token_batch_stride = int64_t{f.problem.query.max_seqlen} * token_words;
  }
  bsfa::cpu::attention(params, threads(1));
  const std::vector<unsigned char> first_out = f.out.bytes;
  const std::vector<float> first_lse = lse;
  std::fill(f.out.bytes.begin(), f.out.bytes.end(), 0xff);
  std::fill(lse.begin(), lse.end(), kNaN);
  bsfa::cpu::attention(params, threads(3));
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    for (int h = 0; h < c.hq; ++h) {
      const int mask_head = mask_heads == c.hq ? h : mask_heads == c.hkv ? h / f.group() : 0;
      for (int r = 0; r < f.lq(b); ++r) {
        const int64_t row = int64_t{f.mask_row(b, r)} * mask_heads + mask_head;
        std::vector<std::pair<int, double>> seen;
        double top = -kInf;
        for (int n = 0; n < f.lk(b); ++n) {
          if (!f.sees(b, r, n) || (!dense && !bit(words, row, num_words, n / c.block_n))) continue;
          if (kind == Mask::kTokens && !bit(tokens, token_row(b, r), token_words, n)) continue;
          seen.emplace_back(n, f.logit(b, r, h, n));
          top = std::max(top, seen.back().second);
        }
        const int first_row = f.rows_of(b, f.mask_row(b, r) - f.rows_before[b]).front();
        const auto mean_row = [&](int j) {
          return (static_cast<int64_t>(b) * f.max_blocks + j) * c.hkv + h / f.group();
        };
        for (int j = 0; corrected && j < f.blocks(b); ++j) {
          if (bit(words, row, num_words, j) || (c.causal && (j + 1) * c.block_n > f.position(b, first_row) + 1))
            continue;
          const int tokens = std::min(c.block_n, f.lk(b) - j * c.block_n);
          double s = 0.0;
          for (int i = 0; i < c.d; ++i)
            s += f.q.get(f.q_index(f.q_view, b, r, h) + i) * k_means.get(mean_row(j) * c.d + i);
          seen.emplace_back(-1 - j, f.cap(s) + std::log(tokens));  // numbers below 0: means
          top = std::max(top, seen.back().second);
        }
        std::vector<double> sum(c.dv);
        double total = 0.0;
        for (const auto& [n, s] : seen) {
          const double p = std::exp(s - top);
          total += p;
          for (int i = 0; i < c.dv; ++i) {
            sum[i] += p * (n < 0 ? v_means.get(mean_row(-1 - n) * c.dv + i)
                                 : f.v.get(f.k_index(f.v_view, b, n, h / f.group()) + i));
          }
        }
        const double want_lse = seen.empty() ? -kInf : top + std::log(total);
        const int64_t li = f.lse_index(b, r, h), oi = f.q_index(f.out_view, b, r, h);
        if (!close(lse[li], want_lse, 2e-5, 1e-6)) fail(where, "lse", lse[li], want_lse);
        if (std::memcmp(&lse[li], &first_lse[li], 4) != 0) fail(where, "lse by workers", lse[li], first_lse[li]);
        for (int i = 0; i < c.dv; ++i) {
          const double want = seen.empty() ? 0.0 : sum[i] / total, got = f.out.get(oi + i);
          if (!close(got, want, 1e-5, output_error(c.dtype))) fail(where, "out", got, want);
          const int64_t width = c.dtype == DType::kFloat32 ? 4 : 2;
          if (std::memcmp(&f.out.bytes[(oi + i) * width], &first_out[(oi + i) * width], width) != 0) {
            fail(where, "out by workers", got, want);
          }
        }
      }
    }
  }
  return lse;
}

void check_block_mass(Fixture& f, const std::string& where, const std::vector<float>& lse) {
  const Case& c = f.c;
  bsfa::BlockMassParams params;
  params.problem = f.problem;
  params.q = f.q_view;
  params.k = f.k_view;
  params.lse = lse.data();
  params.lse_batch_stride = int64_t{c.hq} * f.lq(0);
  params.lse_head_stride = c.layout == Layout::kBatched ? f.lq(0) : f.total_q;
  params.num_rows = f.num_rows;
  params.max_blocks = f.max_blocks;
  std::vector<float> mass(int64_t{f.num_rows} * c.hq * f.max_blocks + 1, kNaN), other = mass;
  params.mass = other.data();
  bsfa::cpu::block_mass(params, threads(3));
  params.mass = mass.data();
  bsfa::cpu::block_mass(params, threads(1));
  if (std::memcmp(mass.data(), other.data(), mass.size() * 4) != 0) {
    fail(where, "mass by workers", 0, 0);
  }
  std::vector<double> want(mass.size(), 0.0);
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    for (int t = 0; t < f.tiles(b); ++t) {
      const std::vector<int> rows = f.rows_of(b, t);
      for (int h = 0; h < c.hq; ++h) {
        for (int r : rows) {
          const double l = lse[f.lse_index(b, r, h)];
          for (int n = 0; n < f.lk(b) && l != -kInf; ++n) {
            if (c.causal && n > f.position(b, r)) continue;
            want[(int64_t{f.rows_before[b] + t} * c.hq + h) * f.max_blocks + n / c.block_n] +=
                std::exp(f.logit(b, r, h, n) - l) / rows.size();
          }
        }
      }
    }
  }
  for (size_t i = 0; i + 1 < want.size(); ++i) {
    if (!close(mass[i], want[i], 1e-6, 3e-5)) fail(where, "mass", mass[i], want[i]);
  }
}

void check_probe(Fixture& f, const std::string& where) {
  const Case& c = f.c;
  const int width = f.problem.kv.max_seqlen;
  bsfa::ProbeParams params;
  params.problem = f.problem;
  params.q = f.q_view;
  params.k = f.k_view;
  std::vector<float> vertical(int64_t{f.problem.batch} * c.hq * width + 1, kNaN), slash = vertical;
  params.vertical = vertical.data();
  params.slash = slash.data();
  bsfa::cpu::probe_attention(params, threads(3));
  const std::vector<float> first_vertical = vertical, first_slash = slash;
  bsfa::cpu::probe_attention(params, threads(1));
  if (std::memcmp(vertical.data(), first_vertical.data(), vertical.size() * 4) != 0 ||
      std::memcmp(slash.data(), first_slash.data(), slash.size() * 4) != 0) {
    fail(where, "probe by workers", 0, 0);
  }
  std::vector<double> want_vertical(vertical.size(), 0.0), want_slash(slash.size(), 0.0);
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    const int rows = std::min(f.problem.block_m, f.lq(b));
    for (int h = 0; h < c.hq; ++h) {
      const int64_t first = (static_cast<int64_t>(b) * c.hq + h) * width;
      for (int r = f.lq(b) - rows; r < f.lq(b); ++r) {
        const int end = c.causal ? std::min(f.position(b, r) + 1, f.lk(b)) : f.lk(b);
        std::vector<double> p(std::max(end, 0));
        double top = -kInf, total = 0.0;
        for (int n = 0; n < end; ++n) top = std::max(top, p[n] = f.logit(b, r, h, n));
        for (double& x : p) total += x = std::exp(x - top);
        for (int n = 0; n < end; ++n) {
          want_vertical[first + n] += p[n] / total / rows;
          if (c.causal) want_slash[first + f.position(b, r) - n] += p[n] / total / rows;
        }
      }
    }
  }
  for (size_t i = 0; i + 1 < vertical.size(); ++i) {
    if (!close(vertical[i], want_vertical[i], 1e-6, 3e-5)) fail(where, "vertical", vertical[i], want_vertical[i]);
    if (!close(slash[i], want_slash[i], 1e-6, 3e-5)) fail(where, "slash", slash[i], want_slash[i]);
  }
}

Storage check_pool(Fixture& f, const std::string& where) {
  const Case& c = f.c;
  bsfa::PoolParams params;
  params.dtype = c.dtype;
  params.batch = f.problem.batch;
  params.num_kv_heads = c.hkv;
  params.head_dim = c.d;
  params.block_n = c.block_n;
  params.max_blocks = f.max_blocks;
  params.kv = f.problem.kv;
  params.k = f.k_view;
  Storage out;
  out.resize(c.dtype, int64_t{f.problem.batch} * f.max_blocks * c.hkv * c.d + 1);
  params.out = out.bytes.data();
  bsfa::cpu::pool_blocks(params, threads(3));
  for (int b = 0; b < f.problem.batch; ++b) {
    for (int j = 0; j < f.max_blocks; ++j) {
      const int begin = j * c.block_n, end = std::min(begin + c.block_n, f.lk(b));
      for (int h = 0; h < c.hkv; ++h) {
        for (int i = 0; i < c.d; ++i) {
          double sum = 0.0, size = 0.0;
          for (int n = begin; n < end; ++n) {
            const double x = f.k.get(f.k_index(f.k_view, b, n, h) + i);
            sum += x;
            size += std::fabs(x);
          }
          const double want = end > begin ? sum / (end - begin) : 0.0;
          const double got = out.get(((int64_t{b} * f.max_blocks + j) * c.hkv + h) * c.d + i);
          // float32 sums: rounded right, or the sum lay that close to the middle of two neighbours.
          const double slack = end > begin ? 1e-6 * size / (end - begin) : 0.0;
          if (std::fabs(got - want) > 0.5 * step_of(c.dtype, want) + slack) fail(where, "mean", got, want);
        }
      }
    }
  }
  return out;
}

// Scores of the rules for groups of `size` tokens: masses before each block, without sinks, with its own blocks.
void check_groups(Fixture& f, const std::string& where, bool flat, int size) {
  const Case& c = f.c;
  bsfa::ScoreParams params;
  params.problem = f.problem;
  params.q = f.q_view;
  params.k = f.k_view;
  params.max_blocks = f.max_blocks;
  params.rule = flat ? bsfa::ScoreRule::kFlat64 : bsfa::ScoreRule::kAntidiagonal;
  params.stride = size;
  params.num_rows = f.num_rows;
  std::vector<float> scores(int64_t{f.num_rows} * c.hq * f.max_blocks + 1, kNaN), other = scores;
  params.scores = other.data();
  bsfa::cpu::score_blocks(params, threads(3));
  params.scores = scores.data();
  bsfa::cpu::score_blocks(params, threads(1));
  if (std::memcmp(scores.data(), other.data(), scores.size() * 4) != 0) fail(where, "group scores by workers", 0, 0);
  for (int b = 0; b < f.problem.batch; ++b) {
    for (int t = 0; t < f.tiles(b); ++t) {
      const int visible = f.visible(b, t), tile = f.first_tile(b) + t;
      const int keys = std::min(visible * c.block_n, f.lk(b));
      const int first = std::max(tile * c.block_m, 0),
                last = std::min((tile + 1) * c.block_m, c.causal ? keys : f.lq(b));
      const int own_first = std::min(first / c.block_n, visible - 1);
      const int own_last = std::min(std::max((last - 1) / c.block_n, own_first), visible - 1);
      std::map<int, std::vector<int>> groups;
      for (int r : f.rows_of(b, t)) groups[Fixture::floor_div(f.position(b, r), size)].push_back(r);
      for (int h = 0; h < c.hq && visible > 0; ++h) {
        std::vector<double> weight(visible, flat ? -kInf : 0.0);
        for (const auto& [g, rows] : groups) {
          std::vector<double> x;
          for (int r = 0; r * size < keys && (flat || !c.causal || r <= g); ++r) {
            double sum = 0.0;
            for (int row : rows) {
              const int place = f.position(b, row) - g * size;
              const int key = r * size + (flat ? place : size - 1 - place);
              if (key >= f.lk(b)) continue;
              const int64_t qi = f.q_index(f.q_view, b, row, h), ki = f.k_index(f.k_view, b, key, h / f.group());
              for (int i = 0; i < c.d; ++i) sum += f.q.get(qi + i) * f.k.get(ki + i);
            }
            x.push_back(f.cap(sum / size));
            double& best = weight[r * size / c.block_n];
            if (flat) best = std::max(best, x.back());
          }
          if (flat) continue;
          double total = 0.0;
          for (double s : x) total += std::exp(s);
          for (size_t r = 0; r < x.size(); ++r) weight[r * size / c.block_n] += std::exp(x[r]) / total;
        }
        double total = 0.0;
        for (double& w : weight) total += w = flat ? std::exp(w) : w;
        const auto own = [&](int j) { return !flat && j >= own_first && j <= own_last; };
        for (int j = 0; j < f.max_blocks; ++j) {
          double want = j < visible ? 0.0 : -1.0;
          for (int i = 0; i < visible && j < visible; ++i) {
            const bool before = own(i) != own(j) ? own(i)
                                : own(i)         ? i < j
                                                 : weight[i] > weight[j] || (weight[i] == weight[j] && i < j);
            want += before ? weight[i] / total : 0.0;
          }
          const float got = scores[(int64_t{f.rows_before[b] + t} * c.hq + h) * f.max_blocks + j];
          if (!close(got, want, 2e-5, 2e-5)) fail(where, flat ? "flat64 score" : "antidiagonal score", got, want);
        }
      }
    }
  }
}

void check_scores(Fixture& f, const std::string& where, const Storage& summary, bsfa::ScoreRule rule) {
  const Case& c = f.c;
  const bool cumulative = rule == bsfa::ScoreRule::kPooled;
  bsfa::SelectParams select;
  bsfa::ScoreParams& params = select.score;
  params.problem = f.problem;
  params.q = f.q_view;
  params.summary = summary.bytes.data();
  params.max_blocks = f.max_blocks;
  params.rule = rule;
  params.num_rows = f.num_rows;
  std::vector<float> scores(int64_t{f.num_rows} * c.hq * f.max_blocks + 1, kNaN), other = scores;
  params.scores = other.data();
  bsfa::cpu::score_blocks(params, threads(3));
  params.scores = scores.data();
  bsfa::cpu::score_blocks(params, threads(1));
  if (std::memcmp(scores.data(), other.data(), scores.size() * 4) != 0) {
    fail(where, "scores by workers", 0, 0);
  }
  const auto mean = [&](int b, int j, int h, int i) {
    return summary.get(((int64_t{b} * f.max_blocks + j) * c.hkv + h / f.group()) * c.d + i);
  };
  std::vector<char> used(f.num_rows, 0);
  for (int b = 0; b < f.problem.batch; ++b) {
    for (int t = 0; t < f.tiles(b); ++t) {
      const std::vector<int> rows = f.rows_of(b, t);
      const int visible = f.visible(b, t);
      used[f.rows_before[b] + t] = 1;
      for (int h = 0; h < c.hq; ++h) {
        const float* got = &scores[(int64_t{f.rows_before[b] + t} * c.hq + h) * f.max_blocks];
        std::vector<double> want(f.max_blocks, -1.0);
        if (!cumulative) {
          std::vector<std::vector<double>> x(visible);
          double top = -kInf, largest = 0.0;
          for (int j = 0; j < visible; ++j) {
            const int last = std::min((j + 1) * c.block_n, f.lk(b)) - 1;
            for (int r : rows) {
              if (c.causal && f.position(b, r) < last) continue;
              double s = 0.0;
              for (int i = 0; i < c.d; ++i) s += f.q.get(f.q_index(f.q_view, b, r, h) + i) * mean(b, j, h, i);
              x[j].push_back(f.cap(s));
              top = std::max(top, x[j].back());
            }
          }
          for (int j = 0; j < visible; ++j) {
            want[j] = 0.0;
            for (double s : x[j]) want[j] += std::exp(s - top);
            largest = std::max(largest, want[j]);
          }
          for (int j = 0; j < visible && largest > 0.0; ++j) want[j] /= largest;
        } else if (visible > 0) {
          std::vector<double> s(visible), p(visible);
          for (int j = 0; j < visible; ++j) {
            double dot = 0.0;
            for (int i = 0; i < c.d; ++i) {
              double sum = 0.0;
              for (int r : rows) sum += f.q.get(f.q_index(f.q_view, b, r, h) + i);
              dot += sum / rows.size() * mean(b, j, h, i);
            }
            s[j] = f.cap(dot);
          }
          double total = 0.0;
          for (int j = 0; j < visible; ++j) total += p[j] = std::exp(s[j] - *std::max_element(s.begin(), s.end()));
          for (int j = 0; j < visible; ++j) {
            want[j] = 0.0;
            for (int i = 0; i < visible; ++i) want[j] += s[i] > s[j] || (s[i] == s[j] && i < j) ? p[i] / total : 0.0;
          }
        }
        for (int j = 0; j < f.max_blocks; ++j) {
          if (!close(got[j], want[j], 2e-5, 2e-5)) fail(where, cumulative ? "mass score" : "score", got[j], want[j]);
        }
      }
    }
  }
  for (int row = 0; row < f.num_rows; ++row) {
    for (int64_t i = 0; i < int64_t{c.hq} * f.max_blocks && !used[row]; ++i) {
      const float got = scores[int64_t{row} * c.hq * f.max_blocks + i];
      if (got != -1.0f) fail(where, "score of an unused row", got, -1);
    }
  }

  // Selection, from the scores just checked.
  std::vector<float> thresholds(c.hq);
  for (int h = 0; h < c.hq; ++h) thresholds[h] = 0.2f + 0.2f * h;
  std::vector<int32_t> prompt_lens;
  for (int b = 0; b < f.problem.batch; ++b) prompt_lens.push_back(f.lk(b) + c.block_m);
  const int num_words = (f.max_blocks + 31) / 32;
  for (int variant = 0; variant < 4; ++variant) {
    select.thresholds = thresholds.data();
    select.score.sink_blocks = variant;
    select.score.window_blocks = variant == 3 ? 0 : variant + 1;
    select.last_tiles = variant == 2 ? 2 : 0;
    select.min_blocks = variant == 1 ? 4 : 0;
    select.prompt_lens = variant == 2 && c.block_m == 16 ? prompt_lens.data() : nullptr;
    select.num_words = num_words;
    std::vector<int32_t> words(int64_t{f.num_rows} * c.hq * num_words + 1, -1),
        counts(int64_t{f.num_rows} * c.hq + 1, -1);
    select.words = words.data();
    select.counts = counts.data();
    bsfa::cpu::select_blocks(select, threads(2));
    std::vector<int32_t> want(words.size(), 0);
    want.back() = -1;
    for (int b = 0; b < f.problem.batch; ++b) {
      for (int t = 0; t < f.tiles(b); ++t) {
        const int tile = f.first_tile(b) + t, visible = f.visible(b, t);
        const int first = std::max(tile * c.block_m, 0), last = std::min((tile + 1) * c.block_m, f.lk(b)) - 1;
        const int length = !c.causal ? f.lq(b) : select.prompt_lens ? prompt_lens[b] : f.lk(b);
        const bool all = select.last_tiles > 0 && tile >= (length + c.block_m - 1) / c.block_m - select.last_tiles;
        for (int h = 0; h < c.hq; ++h) {
          const int64_t row = int64_t{f.rows_before[b] + t} * c.hq + h;
          const float* s = &scores[row * f.max_blocks];
          int kept = 0;
          for (int j = 0; j < visible; ++j) {
            int better = 0;
            for (int i = 0; i < visible; ++i) {
              const bool before = cumulative ? s[i] < s[j] : s[i] > s[j];
              better += before || (s[i] == s[j] && i < j);
            }
            const int window = std::max(select.score.window_blocks, 1);
            const int near_first = std::min(first / c.block_n, visible - 1);
            const int near_last = std::min(std::max(last / c.block_n, near_first), visible - 1);
            bool keep = cumulative ? s[j] < thresholds[h] || s[j] == 0.0f : s[j] > 0 && s[j] >= thresholds[h];
            keep = keep || all || j < select.score.sink_blocks || better < select.min_blocks;
            keep = keep || (j > near_first - window && j < near_last + (c.causal ? 1 : window));
            if (keep) want[row * num_words + j / 32] |= static_cast<int32_t>(1u << (j % 32));
            kept += keep;
          }
          if (counts[row] != kept) fail(where, "count", counts[row], kept);
          if (visible > 0 && kept == 0) fail(where, "a row keeps nothing", 0, 1);
        }
      }
    }
    for (size_t i = 0; i < want.size(); ++i) {
      if (words[i] != want[i]) fail(where, "words", words[i], want[i]);
    }
    for (int row = 0; row < f.num_rows; ++row) {
      for (int h = 0; h < c.hq && !used[row]; ++h) {
        if (counts[row * c.hq + h] != 0) fail(where, "count of an unused row", counts[row * c.hq + h], 0);
      }
    }
  }
}

std::vector<Case> cases() {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  const Layout batched = Layout::kBatched, packed = Layout::kPacked, paged = Layout::kPaged;
  // name, dtype, layout, page, causal, Hq, Hkv, D, Dv, block_m, block_n, softcap, window_left, (seqlen_q, seqlen_k)
  return {
      {"batched", f32, batched, 0, true, 4, 2, 64, 64, 64, 64, 0, -1, {{200, 200}, {200, 200}}},
      {"batched bf16", bf16, batched, 0, true, 4, 2, 64, 64, 128, 128, 0, -1, {{300, 300}}},
      {"batched f16", f16, batched, 0, true, 3, 1, 40, 40, 64, 32, 0, -1, {{150, 150}}},
      {"not causal", f32, batched, 0, false, 2, 2, 40, 64, 64, 64, 0, -1, {{130, 210}}},
      {"not causal, more queries", bf16, batched, 0, false, 2, 1, 16, 8, 32, 32, 0, -1, {{210, 70}}},
      {"chunk", f32, batched, 0, true, 4, 1, 64, 32, 64, 64, 0, -1, {{100, 333}}},
      {"aligned chunk", f16, batched, 0, true, 2, 1, 32, 32, 64, 64, 0, -1, {{128, 384}}},
      {"more queries than keys", f32, batched, 0, true, 2, 1, 8, 8, 32, 16, 0, -1, {{150, 70}}},
      {"one query", f32, batched, 0, true, 4, 4, 64, 64, 128, 128, 0, -1, {{1, 259}}},
      {"D = 1", f32, batched, 0, true, 2, 1, 1, 1, 16, 16, 0, -1, {{90, 90}}},
      {"odd D", bf16, batched, 0, true, 2, 1, 33, 7, 32, 64, 0, -1, {{90, 90}}},
      {"D = 128", bf16, batched, 0, true, 2, 1, 128, 128, 128, 64, 0, -1, {{160, 160}}},
      {"D = 256", f32, batched, 0, true, 2, 1, 256, 256, 128, 128, 0, -1, {{150, 200}}},
      {"large tiles", f32, batched, 0, true, 4, 2, 16, 16, 256, 256, 0, -1, {{300, 600}}},
      {"tile of 1024", f32, batched, 0, true, 2, 1, 8, 8, 1024, 512, 0, -1, {{700, 700}}},
      {"tile of 1", f32, batched, 0, true, 2, 1, 8, 8, 1, 1, 0, -1, {{20, 70}}},
      {"odd tiles", f16, batched, 0, true, 6, 2, 24, 24, 37, 53, 0, -1, {{111, 222}}},
      {"softcap", f32, batched, 0, true, 4, 2, 64, 64, 64, 64, 0.7f, -1, {{100, 150}}},
      {"softcap 30", bf16, packed, 0, true, 2, 1, 40, 40, 64, 64, 30.0f, -1, {{90, 90}, {5, 77}}},
      {"window", f32, batched, 0, true, 4, 2, 32, 32, 64, 64, 0, 70, {{200, 300}}},
      {"window of 0", f32, batched, 0, true, 1, 1, 8, 8, 32, 32, 0, 0, {{80, 80}}},
      {"window, not causal", f32, batched, 0, false, 1, 1, 8, 8, 32, 32, 0, 20, {{90, 70}}},
      {"packed", f32, packed, 0, true, 4, 2, 64, 64, 64, 64, 0, -1, {{100, 100}, {0, 0}, {70, 190}, {1, 1}}},
      {"packed f16", f16, packed, 0, true, 8, 2, 40, 40, 128, 64, 0, -1, {{0, 60}, {130, 130}, {20, 0}}},
      {"packed, not causal", bf16, packed, 0, false, 2, 1, 64, 64, 64, 64, 0, -1, {{50, 120}, {20, 0}, {0, 30}}},
      {"page of 1", f32, paged, 1, true, 4, 2, 16, 16, 32, 32, 0, -1, {{60, 60}, {30, 100}}},
      {"page of 3", bf16, paged, 3, true, 2, 1, 64, 64, 64, 64, 0, -1, {{100, 200}, {0, 0}, {7, 7}}},
      {"page of 16", f16, paged, 16, true, 4, 1, 64, 64, 16, 16, 0, -1, {{100, 250}, {40, 41}}},
      {"page of 16, window, softcap", f32, paged, 16, true, 4, 4, 40, 24, 64, 128, 5.0f, 33, {{100, 250}, {40, 0}}},
      {"no keys", f32, batched, 0, true, 2, 1, 8, 8, 64, 64, 0, -1, {{10, 0}}},
      {"many blocks", f32, batched, 0, true, 2, 1, 8, 8, 64, 4, 0, -1, {{70, 800}}},
      {"group of 40", f32, batched, 0, true, 40, 1, 8, 8, 16, 16, 0, -1, {{20, 60}}},
  };
}

}  // namespace

int main() {
  for (const char* isa : {"generic", "avx2", "avx512"}) {
    if (!bsfa::cpu::set_instruction_set(isa)) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    if (std::string(bsfa::cpu::instruction_set()) != isa) fail(isa, "instruction_set", 0, 1);
    for (const Case& c : cases()) {
      const std::string where = std::string(isa) + ", " + c.name;
      Fixture f(c);
      const Storage summary = check_pool(f, where);
      const std::vector<float> lse = check_attention(f, where + ", dense", 1, Mask::kDense);
      for (int mask_heads : {c.hq, c.hkv, 1}) {
        const std::string heads = ", mask heads " + std::to_string(mask_heads);
        check_attention(f, where + heads, mask_heads, Mask::kPlain);
        check_attention(f, where + heads + ", tokens", mask_heads, Mask::kTokens);
        if (c.window_left < 0) check_attention(f, where + heads + ", corrected", mask_heads, Mask::kCorrected);
      }
      check_probe(f, where);
      check_block_mass(f, where, lse);
      check_scores(f, where, summary, bsfa::ScoreRule::kRelativeMax);
      check_scores(f, where, summary, bsfa::ScoreRule::kPooled);
      for (int stride : {1, 4, 16}) {
        if (c.block_m % stride == 0 && c.block_n % stride == 0) check_groups(f, where, false, stride);
      }
      if (c.block_m % 64 == 0 && c.block_n % 64 == 0) check_groups(f, where, true, 64);
    }
    std::printf("%s: %zu cases\n", isa, cases().size());
  }
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
