// Attention with skipping, skip_mask and tile_max on the CPU against the rule in float64, decision by decision, on
// every instruction set that this machine has. Built as cpu_kernels_test.cpp is.
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

using bsfa::SkipForm;

// How near to its threshold a decision may be before rounding can turn it.
constexpr double kNear = 2e-5;

// A fixture that works every logit out once.
struct SkipFixture : Fixture {
  std::vector<std::vector<double>> rows;  // [sequence][(head * seqlen_q + row) * seqlen_k + key]
  explicit SkipFixture(const Case& c) : Fixture(c) {
    for (size_t b = 0; b < c.lengths.size(); ++b) {
      rows.emplace_back();
      for (int h = 0; h < c.hq; ++h) {
        for (int r = 0; r < lq(b); ++r) {
          for (int n = 0; n < lk(b); ++n) rows[b].push_back(sees(b, r, n) ? Fixture::logit(b, r, h, n) : 0.0);
        }
      }
    }
  }
  double logit(int b, int row, int h, int key) const { return rows[b][(int64_t{h} * lq(b) + row) * lk(b) + key]; }
};

struct Options {
  SkipForm form = SkipForm::kAbsolute;
  int mask_heads = 0;  // 0: dense
  int sink = 1, window = 1;
  bool counted = false;
};

// Blocks that a tile's head keeps whatever they score; written out anew from the definition.
bool always(const SkipFixture& f, int b, int t, int block, const Options& o) {
  const Case& c = f.c;
  const int tile = f.first_tile(b) + t, visible = f.visible(b, t);
  const int first = std::min(std::max(tile * c.block_m, 0) / c.block_n, visible - 1);
  const int end = std::min((tile + 1) * c.block_m, c.causal ? f.lk(b) : f.lq(b));
  const int own = std::min(std::max((end - 1) / c.block_n, first), visible - 1);
  return block < o.sink || (block > first - o.window && block <= own + (c.causal ? 0 : o.window - 1));
}

std::vector<int> visits(const std::vector<int>& kept) {  // kept: rising
  if (kept.empty()) return {};
  std::vector<int> order{kept.back()};
  if (kept.size() > 1 && kept[0] == 0) order.push_back(0);
  for (int i = static_cast<int>(kept.size()) - 2; i >= 0; --i) {
    if (kept[i] > 0) order.push_back(kept[i]);
  }
  return order;
}

// Largest visible logit of a row in a block; -inf: none.
double row_top(const SkipFixture& f, int b, int row, int h, int block) {
  double top = -kInf;
  for (int n = block * f.c.block_n; n < std::min((block + 1) * f.c.block_n, f.lk(b)); ++n) {
    if (f.sees(b, row, n)) top = std::max(top, f.logit(b, row, h, n));
  }
  return top;
}

// What is compared, of the rows of a group or tile that see the block. Moves `running` on if `meet`.
double compared(const SkipFixture& f, int b, const std::vector<int>& rows, int h, int block, SkipForm form,
                const std::vector<double>& running, std::vector<double>* tops) {
  double value = -kInf;
  tops->clear();
  for (size_t i = 0; i < rows.size(); ++i) {
    tops->push_back(row_top(f, b, rows[i], h, block));
    if (!f.sees(b, rows[i], block * f.c.block_n)) continue;
    const double gap = running[i] == -kInf ? kInf : tops->back() - running[i];
    value = std::max(value, form == SkipForm::kAbsolute ? tops->back() : gap);
  }
  return value;
}

void check_skip(SkipFixture& f, const std::string& where, const Options& o) {
  const Case& c = f.c;
  const int num_words = (f.max_blocks + 31) / 32, columns = 2;
  std::vector<int32_t> words(int64_t{f.num_rows} * std::max(o.mask_heads, 1) * num_words + 1);
  for (int32_t& w : words) w = static_cast<int32_t>(f.random() | f.random());
  if (num_words > 0) std::fill(words.begin(), words.begin() + num_words, 0);  // a row that keeps nothing
  std::vector<float> thresholds(c.hq * columns);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (float& x : thresholds) x = (o.form == SkipForm::kAbsolute ? 2.5f : -0.3f) + uniform(f.random);
  std::vector<float> lse(int64_t{f.total_q} * c.hq + 1, kNaN);
  std::vector<int64_t> counts(2 * c.hq, 100), again(2 * c.hq, 0);
  bsfa::AttentionParams params = f.attention();
  params.lse = lse.data();
  params.lse_batch_stride = int64_t{c.hq} * f.lq(0);
  params.lse_head_stride = c.layout == Layout::kBatched ? f.lq(0) : f.total_q;
  params.words = o.mask_heads == 0 ? nullptr : words.data();
  params.num_rows = f.num_rows;
  params.mask_heads = o.mask_heads;
  params.num_words = num_words;
  params.skip.form = o.form;
  params.skip.thresholds = thresholds.data();
  params.skip.columns = columns;
  params.skip.sink_blocks = o.sink;
  params.skip.window_blocks = o.window;
  params.skip.counted = o.counted;
  params.skip.counts = counts.data();
  std::fill(f.out.bytes.begin(), f.out.bytes.end(), 0xff);
  bsfa::cpu::attention(params, threads(1));
  const std::vector<unsigned char> first_out = f.out.bytes;
  const std::vector<float> first_lse = lse;
  std::fill(f.out.bytes.begin(), f.out.bytes.end(), 0xff);
  std::fill(lse.begin(), lse.end(), kNaN);
  params.skip.counts = again.data();
  bsfa::cpu::attention(params, threads(3));
  if (first_out != f.out.bytes || std::memcmp(lse.data(), first_lse.data(), lse.size() * 4) != 0) {
    fail(where, "bits by workers", 0, 1);
  }

  std::vector<int64_t> want(2 * c.hq, 0);
  bool near = false;
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    for (int t = 0; t < f.tiles(b); ++t) {
      const int tile = f.first_tile(b) + t;
      for (int h = 0; h < c.hq; ++h) {
        const int heads = o.mask_heads;
        const int mask_head = heads == c.hq ? h : heads == c.hkv ? h / f.group() : 0;
        const int64_t row = int64_t{f.rows_before[b] + t} * heads + mask_head;
        const double threshold = thresholds[h * columns + std::min(std::max(tile, 0), columns - 1)];
        std::vector<int> kept;
        for (int j = 0; j < f.visible(b, t); ++j) {
          if (heads == 0 || bit(words, row, num_words, j)) kept.push_back(j);
        }
        for (int group = 0; group * bsfa::kSkipRows < c.block_m; ++group) {
          std::vector<int> rows;
          for (int r : f.rows_of(b, t)) {
            if ((f.position(b, r) - tile * c.block_m) / bsfa::kSkipRows == group) rows.push_back(r);
          }
          if (rows.empty()) continue;
          std::vector<double> running(rows.size(), -kInf), tops;
          std::vector<int> state(f.max_blocks, 0);  // 1: skipped, 2: taken
          for (int j : visits(kept)) {
            if (!f.sees(b, rows.back(), j * c.block_n)) continue;
            ++want[2 * h];
            const double value = compared(f, b, rows, h, j, o.form, running, &tops);
            const bool free = !always(f, b, t, j, o);
            near |= free && std::fabs(value - threshold) < kNear;
            state[j] = free && value < threshold ? 1 : 2;
            if (state[j] == 1) ++want[2 * h + 1];
            for (size_t i = 0; state[j] == 2 && i < rows.size(); ++i) running[i] = std::max(running[i], tops[i]);
          }
          for (int r : rows) {
            double top = -kInf, total = 0.0;
            std::vector<double> sum(c.dv);
            const auto enters = [&](int n) {
              const int s = state[n / c.block_n];
              return f.sees(b, r, n) && (s == 2 || (s == 1 && o.counted));
            };
            for (int n = 0; n < f.lk(b); ++n) {
              if (enters(n)) top = std::max(top, f.logit(b, r, h, n));
            }
            for (int n = 0; n < f.lk(b); ++n) {
              if (!enters(n)) continue;
              const double p = std::exp(f.logit(b, r, h, n) - top);
              total += p;
              for (int i = 0; state[n / c.block_n] == 2 && i < c.dv; ++i) {
                sum[i] += p * f.v.get(f.k_index(f.v_view, b, n, h / f.group()) + i);
              }
            }
            if (near) continue;
            const double want_lse = total == 0.0 ? -kInf : top + std::log(total);
            const float got_lse = lse[f.lse_index(b, r, h)];
            if (!close(got_lse, want_lse, 2e-5, 1e-6)) fail(where, "lse", got_lse, want_lse);
            for (int i = 0; i < c.dv; ++i) {
              const double wanted = total == 0.0 ? 0.0 : sum[i] / total;
              const double got = f.out.get(f.q_index(f.out_view, b, r, h) + i);
              if (!close(got, wanted, 1e-5, output_error(c.dtype))) fail(where, "out", got, wanted);
            }
          }
        }
      }
    }
  }
  if (near) {
    std::printf("%s: a threshold lies too near to a maximum, nothing is compared\n", where.c_str());
    return;
  }
  for (size_t i = 0; i < want.size(); ++i) {
    if (counts[i] != want[i] + 100 || again[i] != want[i]) fail(where, "counts", again[i], want[i]);
  }
}

// The mask of the first of two passes: of the blocks of another mask, those that one of the tile's groups
// would not skip.
void check_first_pass(SkipFixture& f, const std::string& where, const Options& o) {
  const Case& c = f.c;
  const int num_words = (f.max_blocks + 31) / 32;
  std::vector<int32_t> within(int64_t{f.num_rows} * std::max(o.mask_heads, 1) * num_words + 1);
  for (int32_t& w : within) w = static_cast<int32_t>(f.random() | f.random());
  std::vector<float> thresholds(c.hq);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (float& x : thresholds) x = (o.form == SkipForm::kAbsolute ? 2.5f : -0.3f) + uniform(f.random);
  bsfa::SkipMaskParams params;
  bsfa::AttentionParams& a = params.attention;
  a.problem = f.problem;
  a.q = f.q_view;
  a.k = f.k_view;
  a.words = o.mask_heads == 0 ? nullptr : within.data();
  a.num_rows = f.num_rows;
  a.mask_heads = o.mask_heads;
  a.num_words = num_words;
  a.skip = {o.form, thresholds.data(), 1, o.sink, o.window, false, nullptr};
  params.num_words = num_words;
  const int64_t rows_and_heads = int64_t{f.num_rows} * c.hq;
  std::vector<int32_t> words(rows_and_heads * num_words + 1, -1), counts(rows_and_heads + 1, -1);
  std::vector<int32_t> other_words = words, other_counts = counts;
  std::vector<int64_t> skips(2 * c.hq, 0), other_skips = skips, want_skips = skips;
  params.words = other_words.data();
  params.counts = other_counts.data();
  a.skip.counts = other_skips.data();
  bsfa::cpu::skip_mask(params, threads(3));
  params.words = words.data();
  params.counts = counts.data();
  a.skip.counts = skips.data();
  bsfa::cpu::skip_mask(params, threads(1));
  if (words != other_words || counts != other_counts || skips != other_skips) fail(where, "bits by workers", 0, 1);

  std::vector<int32_t> want(words.size(), 0), want_counts(counts.size(), 0);
  want.back() = want_counts.back() = -1;  // past the end
  bool near = false;
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    for (int t = 0; t < f.tiles(b); ++t) {
      const int tile = f.first_tile(b) + t;
      for (int h = 0; h < c.hq; ++h) {
        const int mask_head = o.mask_heads == c.hq ? h : o.mask_heads == c.hkv ? h / f.group() : 0;
        std::vector<int> kept;
        for (int j = 0; j < f.visible(b, t); ++j) {
          const int64_t row = int64_t{f.rows_before[b] + t} * o.mask_heads + mask_head;
          if (o.mask_heads == 0 || bit(within, row, num_words, j)) kept.push_back(j);
        }
        std::vector<double> top(f.max_blocks, -kInf);
        std::vector<int> groups(f.max_blocks, 0);
        for (int group = 0; group * bsfa::kSkipRows < c.block_m; ++group) {
          std::vector<int> rows;
          for (int r : f.rows_of(b, t)) {
            if ((f.position(b, r) - tile * c.block_m) / bsfa::kSkipRows == group) rows.push_back(r);
          }
          std::vector<double> running(rows.size(), -kInf), tops;
          for (int j : visits(kept)) {
            if (rows.empty() || !f.sees(b, rows.back(), j * c.block_n)) continue;
            ++groups[j];
            top[j] = std::max(top[j], compared(f, b, rows, h, j, o.form, running, &tops));
            for (size_t i = 0; i < rows.size(); ++i) running[i] = std::max(running[i], tops[i]);
          }
        }
        const int64_t row = int64_t{f.rows_before[b] + t} * c.hq + h;
        for (int j : kept) {
          const bool free = !always(f, b, t, j, o);
          near |= free && std::fabs(top[j] - thresholds[h]) < kNear;
          want_skips[2 * h] += groups[j];
          if (free && top[j] < thresholds[h]) {
            want_skips[2 * h + 1] += groups[j];
          } else {
            want[row * num_words + j / 32] |= static_cast<int32_t>(1u << (j % 32));
            ++want_counts[row];
          }
        }
      }
    }
  }
  if (near) {
    std::printf("%s: a threshold lies too near to a maximum, nothing is compared\n", where.c_str());
    return;
  }
  for (size_t i = 0; i < want.size(); ++i) {
    if (words[i] != want[i]) fail(where, "word of the first pass", words[i], want[i]);
  }
  for (size_t i = 0; i < want_counts.size(); ++i) {
    if (counts[i] != want_counts[i]) fail(where, "count of the first pass", counts[i], want_counts[i]);
  }
  for (size_t i = 0; i < want_skips.size(); ++i) {
    if (skips[i] != want_skips[i]) fail(where, "skips of the first pass", skips[i], want_skips[i]);
  }
}

void check_tile_max(SkipFixture& f, const std::string& where, SkipForm form) {
  const Case& c = f.c;
  bsfa::TileMaxParams params;
  params.problem = f.problem;
  params.q = f.q_view;
  params.k = f.k_view;
  params.form = form;
  params.num_rows = f.num_rows;
  params.max_blocks = f.max_blocks;
  std::vector<float> maxima(int64_t{f.num_rows} * c.hq * f.max_blocks + 1, kNaN), other = maxima;
  params.maxima = other.data();
  bsfa::cpu::tile_max(params, threads(3));
  params.maxima = maxima.data();
  bsfa::cpu::tile_max(params, threads(1));
  if (std::memcmp(maxima.data(), other.data(), maxima.size() * 4) != 0) fail(where, "maxima by workers", 0, 1);
  std::vector<double> want(maxima.size(), -kInf);
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    for (int t = 0; t < f.tiles(b); ++t) {
      const std::vector<int> rows = f.rows_of(b, t);
      std::vector<int> all(f.visible(b, t));
      std::iota(all.begin(), all.end(), 0);
      for (int h = 0; h < c.hq; ++h) {
        std::vector<double> running(rows.size(), -kInf), tops;
        for (int j : visits(all)) {
          want[(int64_t{f.rows_before[b] + t} * c.hq + h) * f.max_blocks + j] =
              compared(f, b, rows, h, j, form, running, &tops);
          for (size_t i = 0; i < rows.size(); ++i) running[i] = std::max(running[i], tops[i]);
        }
      }
    }
  }
  for (size_t i = 0; i + 1 < want.size(); ++i) {
    if (!close(maxima[i], want[i], 1e-5, 3e-6)) fail(where, "maximum", maxima[i], want[i]);
  }
  if (!std::isnan(maxima.back())) fail(where, "written past the end", maxima.back(), kNaN);
}

std::vector<Case> cases() {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  const Layout batched = Layout::kBatched, packed = Layout::kPacked, paged = Layout::kPaged;
  return {
      {"one token", f32, batched, 0, true, 1, 1, 8, 8, 64, 64, 0, -1, {{1, 1}}},
      {"plain", f32, batched, 0, true, 4, 2, 32, 32, 64, 64, 0, -1, {{150, 300}}},
      {"two groups a tile", bf16, batched, 0, true, 4, 2, 64, 64, 128, 64, 0, -1, {{200, 330}}},
      {"128 x 128", f16, batched, 0, true, 2, 1, 64, 64, 128, 128, 0, -1, {{260, 400}}},
      {"not causal", f32, batched, 0, false, 2, 1, 16, 16, 64, 32, 0, -1, {{130, 200}}},
      {"more queries than keys", f32, batched, 0, true, 2, 2, 16, 16, 100, 16, 0, -1, {{170, 90}}},
      {"large tiles, parts of blocks", f32, batched, 0, true, 2, 1, 160, 130, 600, 300, 0, -1, {{610, 700}}},
      {"tile of 1", f32, batched, 0, true, 2, 1, 8, 8, 1, 1, 0, -1, {{20, 70}}},
      {"odd tiles", f16, batched, 0, true, 6, 2, 24, 24, 97, 53, 0, -1, {{211, 322}}},
      {"softcap", f32, batched, 0, true, 4, 2, 40, 40, 64, 64, 3.0f, -1, {{100, 250}}},
      {"packed", bf16, packed, 0, true, 4, 2, 40, 40, 64, 16, 0, -1, {{100, 100}, {0, 0}, {70, 190}, {1, 1}}},
      {"pages of 3", f16, paged, 3, true, 4, 1, 32, 24, 64, 32, 0, -1, {{100, 200}, {0, 0}, {7, 7}, {30, 0}}},
      {"no keys", f32, batched, 0, true, 2, 1, 8, 8, 64, 64, 0, -1, {{10, 0}}},
      {"many blocks", f32, batched, 0, true, 2, 1, 8, 8, 64, 4, 0, -1, {{70, 800}}},
  };
}

}  // namespace

int main() {
  for (const char* isa : {"generic", "avx2", "avx512"}) {
    if (!bsfa::cpu::set_instruction_set(isa)) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    for (const Case& c : cases()) {
      SkipFixture f(c);
      for (const SkipForm form : {SkipForm::kAbsolute, SkipForm::kRelative}) {
        const std::string where =
            std::string(isa) + ", " + c.name + (form == SkipForm::kAbsolute ? ", absolute" : ", relative");
        check_tile_max(f, where, form);
        check_skip(f, where + ", dense", {form, 0, 1, 1, false});
        check_skip(f, where + ", counted", {form, 0, 0, 2, true});
        check_skip(f, where + ", mask of the heads", {form, c.hq, 1, 1, false});
        check_skip(f, where + ", mask of the KV heads, counted", {form, c.hkv, 1, 1, true});
        for (const int heads : {0, c.hq, c.hkv, 1}) {
          check_first_pass(f, where + ", first pass, mask heads " + std::to_string(heads), {form, heads, 1, 1, false});
        }
        check_first_pass(f, where + ", first pass, two sinks", {form, 0, 2, 2, false});
      }
    }
    std::printf("%s: %zu cases\n", isa, cases().size());
  }
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
