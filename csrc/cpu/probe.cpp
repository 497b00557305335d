// probe_attention: spans of keys to the kernels, what they found together again.
//
// Items are (sequence, group of heads, span of kProbeSpan keys), in two rounds with the LSE of the rows between them.
// An item owns its keys of `vertical`. A distance is touched by up to rows / kProbeSpan + 2 spans, so each span has
// diagonal sums of its own, which are added in the order of the spans: the result depends on no thread.
// Memory: 8 bytes per probe row, head and span, 4 bytes per head and distance of every span.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bsfa/cpu.h"
#include "schedule.h"

namespace bsfa::cpu {
namespace {

constexpr int32_t kProbeSpan = 2048;  // keys; several chunks of the kernels

// The items of one sequence and group of heads: spans follow each other.
struct Group {
  int64_t first_item = 0;
  int32_t spans = 0;
  int64_t statistics = 0;    // where those of the first span begin
  int64_t slash = 0;         // likewise
  int64_t slash_stride = 0;  // floats per head and span
  int64_t lse = 0;
  int32_t rows = 0;
};

struct Plan {
  std::vector<Group> groups;
  std::vector<ProbeItem> items;
  std::vector<int32_t> group_of;  // item
  int64_t statistics = 0, slash = 0, lse = 0;
};

Plan make_plan(const ProbeParams& params) {
  const Problem& problem = params.problem;
  const int32_t per_kv_head = problem.num_q_heads / problem.num_kv_heads;
  const int32_t step = heads_per_item(problem);
  Plan plan;
  for (int32_t b = 0; b < problem.batch; ++b) {
    ProbeItem item;
    item.tile.sequence = b;
    item.tile.geometry = sequence_geometry(problem, b);
    const SequenceGeometry& g = item.tile.geometry;
    const int32_t rows = std::min(problem.block_m, g.seqlen_q);
    if (rows == 0 || g.seqlen_k == 0) continue;
    item.row_begin = g.seqlen_q - rows;
    for (item.tile.kv_head = 0; item.tile.kv_head < problem.num_kv_heads; ++item.tile.kv_head) {
      for (int32_t first = 0; first < per_kv_head; first += step) {
        item.tile.head_begin = item.tile.kv_head * per_kv_head + first;
        item.tile.head_count = std::min(step, per_kv_head - first);
        Group group;
        group.first_item = static_cast<int64_t>(plan.items.size());
        group.rows = rows;
        group.statistics = plan.statistics;
        group.slash = plan.slash;
        group.lse = plan.lse;
        // Lanes beyond the last row write zeros.
        group.slash_stride = std::min(kProbeSpan, g.seqlen_k) + rows + kProbePadding;
        for (int32_t key = 0; key < g.seqlen_k; key += kProbeSpan) {
          item.key_begin = key;
          item.key_end = std::min(key + kProbeSpan, g.seqlen_k);
          plan.items.push_back(item);
          plan.group_of.push_back(static_cast<int32_t>(plan.groups.size()));
          ++group.spans;
        }
        const int64_t heads = item.tile.head_count;
        plan.lse += heads * rows;
        plan.statistics += heads * rows * 2 * group.spans;
        if (problem.causal) plan.slash += heads * group.slash_stride * group.spans;
        plan.groups.push_back(group);
      }
    }
  }
  return plan;
}

// The base-2 LSE of the group's rows from those of its spans; +inf where nothing is seen.
void join_statistics(const Plan& plan, const Group& group, const float* statistics, float* lse) {
  const int64_t count = int64_t{plan.items[group.first_item].tile.head_count} * group.rows;
  for (int64_t i = 0; i < count; ++i) {
    float top = -std::numeric_limits<float>::infinity();
    const float* pairs = statistics + group.statistics + 2 * i;
    for (int32_t s = 0; s < group.spans; ++s) top = std::max(pairs[2 * count * s], top);
    double sum = 0.0;
    for (int32_t s = 0; s < group.spans; ++s) {
      const float* pair = pairs + 2 * count * s;
      if (pair[1] != 0.0f) sum += static_cast<double>(pair[1]) * std::exp2(static_cast<double>(pair[0]) - top);
    }
    lse[group.lse + i] = sum == 0.0 ? std::numeric_limits<float>::infinity()
                                    : static_cast<float>(static_cast<double>(top) + std::log2(sum));
  }
}

// Sums become means, and the spans' diagonal sums one.
void finish(const ProbeParams& params, const Plan& plan, const Group& group, int32_t h, const float* slash_sums) {
  const TileItem& tile = plan.items[group.first_item].tile;
  const int32_t seqlen = tile.geometry.seqlen_k;
  const int64_t first =
      (int64_t{tile.sequence} * params.problem.num_q_heads + tile.head_begin + h) * params.problem.kv.max_seqlen;
  const float inverse = 1.0f / static_cast<float>(group.rows);
  float* vertical = params.vertical + first;
  for (int32_t j = 0; j < seqlen; ++j) vertical[j] *= inverse;
  if (!params.problem.causal) return;
  float* slash = params.slash + first;
  for (int32_t s = 0; s < group.spans; ++s) {
    const ProbeItem& item = plan.items[group.first_item + s];
    const float* sums = slash_sums + group.slash + (int64_t{s} * tile.head_count + h) * group.slash_stride;
    const int32_t base = item.first_distance();
    const int32_t end = std::min(base + item.key_end - item.key_begin + group.rows - 1, seqlen);
    for (int32_t d = std::max(base, 0); d < end; ++d) slash[d] += sums[d - base];
  }
  for (int32_t d = 0; d < seqlen; ++d) slash[d] *= inverse;
}

}  // namespace

void probe_attention(const ProbeParams& params, const Executor& executor) {
  const Kernels& k = kernels();
  const int64_t total = int64_t{params.problem.batch} * params.problem.num_q_heads * params.problem.kv.max_seqlen;
  std::fill(params.vertical, params.vertical + total, 0.0f);
  std::fill(params.slash, params.slash + total, 0.0f);
  const Plan plan = make_plan(params);
  const auto items = static_cast<int64_t>(plan.items.size());
  const int64_t scratch_floats = k.probe_scratch(params);
  std::vector<float> statistics(plan.statistics), slash(plan.slash), lse(plan.lse);
  for_each_item(executor, items, scratch_floats, [&](int64_t index, float* scratch) {
    const Group& group = plan.groups[plan.group_of[index]];
    const ProbeItem& item = plan.items[index];
    const int64_t size = int64_t{item.tile.head_count} * group.rows * 2;
    k.probe_maxima(params, item, statistics.data() + group.statistics + size * (index - group.first_item), scratch);
  });
  for (const Group& group : plan.groups) join_statistics(plan, group, statistics.data(), lse.data());
  for_each_item(executor, items, scratch_floats, [&](int64_t index, float* scratch) {
    const Group& group = plan.groups[plan.group_of[index]];
    const ProbeItem& item = plan.items[index];
    const int64_t size = item.tile.head_count * group.slash_stride;
    float* sums = params.problem.causal ? slash.data() + group.slash + size * (index - group.first_item) : nullptr;
    float* vertical =
        params.vertical + (int64_t{item.tile.sequence} * params.problem.num_q_heads + item.tile.head_begin) *
                              params.problem.kv.max_seqlen;
    k.probe_spread(params, item, lse.data() + group.lse, vertical, sums, group.slash_stride, scratch);
  });
  for_each_item(executor, static_cast<int64_t>(plan.groups.size()), 0, [&](int64_t index, float*) {
    const Group& group = plan.groups[index];
    const int32_t heads = plan.items[group.first_item].tile.head_count;
    for (int32_t h = 0; h < heads; ++h) finish(params, plan, group, h, slash.data());
  });
}

}  // namespace bsfa::cpu
