// The order as a formula (csrc/cuda/common/known_order.h) against a stable sort by the definition in schedule.cu, and
// the way in which the attention kernel deals it out when each CTA gets at most two tiles.
#include "../cuda/common/known_order.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {

using bsfa::Problem;
using bsfa::cuda::KnownOrder;
using bsfa::cuda::Pair;

struct Entry {
  Pair pair;
  int count;
  int bucket;
};

// Buckets of long tiles, longest first: four to an octave, by comparison with their bounds.
int bucket_of(int count, long long longest_short) {
  const int kLast = 1 << 20;
  if (count <= longest_short || count <= 1) return kLast;
  int bucket = kLast;
  for (double bound = 1.0; bound <= count; bound *= 2) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (bound * (4 + quarter) / 4 <= count) --bucket;
    }
  }
  return bucket;
}

// In natural order.
std::vector<Entry> all_pairs(const Problem& p, int heads, int group) {
  const bsfa::SequenceGeometry g = sequence_geometry(p, 0);
  const int tiles = g.num_tiles();
  std::vector<Entry> entries;
  for (int first = 0; first < heads; first += group) {
    for (int row = p.batch * tiles - 1; row >= 0; --row) {
      for (int head = first; head < first + group; ++head) {
        entries.push_back({{row, head}, g.visible_blocks(row % tiles), 0});
      }
    }
  }
  return entries;
}

std::vector<Entry> sorted(std::vector<Entry> entries, int sms) {
  long long work = 0;
  for (const Entry& e : entries) work += e.count;
  for (Entry& e : entries) e.bucket = bucket_of(e.count, work / (16 * sms));
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.bucket < b.bucket; });
  return entries;
}

bool is(const KnownOrder& order, const std::vector<Entry>& want) {
  if (order.total != static_cast<int>(want.size())) return false;
  for (int i = 0; i < order.total; ++i) {
    const Pair got = order.pair(i);
    if (got.row != want[i].pair.row || got.head != want[i].pair.head ||
        order.count(got.row % order.tiles) != want[i].count) {
      return false;
    }
  }
  return true;
}

bool check(int batch, int seqlen_q, int seqlen_k, int heads, int group, bool causal, int sms) {
  Problem p;
  p.batch = batch;
  p.num_q_heads = heads;
  p.num_kv_heads = heads / group;
  p.query.max_seqlen = seqlen_q;
  p.kv.max_seqlen = seqlen_k;
  p.causal = causal;
  const std::vector<Entry> natural = all_pairs(p, heads, group);
  const KnownOrder order = bsfa::cuda::known_order(p, heads, group, 16 * sms);
  bool good = is(order, sorted(natural, sms)) && is(bsfa::cuda::natural_order(p, heads, group), natural);
  const int ctas = std::min(order.total, sms);
  if (good && order.total <= 2 * ctas) {
    std::vector<int> times(order.total);
    for (int cta = 0; cta < ctas; ++cta) {
      for (int i = cta; i < order.total; i = order.dealt_after(i, ctas)) ++times[i];
    }
    good = std::all_of(times.begin(), times.end(), [](int n) { return n == 1; });
  }
  if (!good) {
    std::printf("wrong: batch %d, %d queries, %d keys, %d heads in groups of %d, causal %d, %d SMs\n", batch, seqlen_q,
                seqlen_k, heads, group, causal, sms);
  }
  return good;
}

}  // namespace

int main() {
  int cases = 0, wrong = 0;
  const int lengths[] = {1, 5, 127, 128, 129, 300, 512, 1000, 1024, 2049, 4096, 9000};
  for (int seqlen_q : lengths) {
    for (int seqlen_k : {0, 1, 128, 300, 1024, 4096, 5000, 9000, 40000}) {
      for (int batch : {1, 2, 5}) {
        for (int heads : {1, 4, 12}) {
          for (int group : {1, 4}) {
            for (int sms : {1, 3, 132}) {
              for (bool causal : {false, true}) {
                if (heads % group != 0) continue;
                ++cases;
                wrong += !check(batch, seqlen_q, seqlen_k, heads, group, causal, sms);
              }
            }
          }
        }
      }
    }
  }
  wrong += !check(1, 131072, 131072, 32, 4, true, 132);
  std::printf("%d orders, %d wrong\n", cases + 1, wrong);
  return wrong != 0;
}
