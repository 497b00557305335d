// Cuts of sorted rows (csrc/cuda/select/keep_sorted.h) against the definition, and against the bisection of keep_row.h:
// the device's own code, on the CPU. The lanes of a warp are contexts that take turns; each goes on until it meets the
// next operation of the whole warp.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

// --- a warp ----------------------------------------------------------------------------------------------------------

namespace {

struct Warp {
  ucontext_t caller, lanes[32];
  std::vector<char> stacks[32];
  std::function<void(int)> work;
  uint64_t said[2][32];  // by the lanes, at this meeting and at the one before
  int meetings[32];
  bool done[32];
  int lane;

  // Returns once all lanes have said something.
  const uint64_t* meet(uint64_t word) {
    const int me = lane, turn = meetings[me]++ % 2;
    said[turn][me] = word;
    swapcontext(&lanes[me], &caller);
    return said[turn];
  }
  void run(std::function<void(int)> what);
};
Warp warp;

void start_lane() {
  const int me = warp.lane;
  warp.work(me);
  warp.done[me] = true;
  for (;;) swapcontext(&warp.lanes[me], &warp.caller);
}

void Warp::run(std::function<void(int)> what) {
  work = std::move(what);
  for (int l = 0; l < 32; ++l) {
    stacks[l].resize(1 << 17);
    getcontext(&lanes[l]);
    lanes[l].uc_stack.ss_sp = stacks[l].data();
    lanes[l].uc_stack.ss_size = stacks[l].size();
    lanes[l].uc_link = nullptr;
    makecontext(&lanes[l], start_lane, 0);
    meetings[l] = 0;
    done[l] = false;
  }
  for (;;) {
    for (lane = 0; lane < 32; ++lane) swapcontext(&caller, &lanes[lane]);
    const auto ended = std::count(done, done + 32, true);
    if (ended == 32) return;
    if (ended != 0 || std::count(meetings, meetings + 32, meetings[0]) != 32) {
      std::printf("FAILED: lanes went different ways\n");
      std::exit(1);
    }
  }
}

template <typename T>
uint64_t word_of(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
T from_lane(T value, int source) {
  T result;
  std::memcpy(&result, &warp.meet(word_of(value))[source], sizeof(T));
  return result;
}
template <typename Op>
uint32_t reduced(uint32_t value, Op op) {
  const uint64_t* said = warp.meet(value);
  uint32_t result = static_cast<uint32_t>(said[0]);
  for (int l = 1; l < 32; ++l) result = op(result, static_cast<uint32_t>(said[l]));
  return result;
}

}  // namespace

// --- what the headers need of CUDA -----------------------------------------------------------------------------------

#define __CUDACC__ 1
#define __device__
#define __forceinline__ inline

struct uint4 {
  uint32_t x, y, z, w;
};

namespace {

using std::max;
using std::min;

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return from_lane(value, warp.lane ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return from_lane(value, lane % 32);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return from_lane(value, warp.lane >= delta ? warp.lane - delta : warp.lane);
}
uint32_t __ballot_sync(unsigned, bool value) {
  return reduced(value ? 1u << warp.lane : 0u, [](uint32_t a, uint32_t b) { return a | b; });
}
uint32_t __reduce_or_sync(unsigned, uint32_t value) {
  return reduced(value, [](uint32_t a, uint32_t b) { return a | b; });
}
uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  return reduced(value, [](uint32_t a, uint32_t b) { return a + b; });
}
void __syncwarp() { warp.meet(0); }
void __syncthreads() { std::abort(); }  // one warp only
int __popc(uint32_t bits) { return __builtin_popcount(bits); }
int __ffs(int bits) { return __builtin_ffs(bits); }
uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
uint32_t __float_as_uint(float value) { return static_cast<uint32_t>(word_of(value)); }
float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

#include "../cuda/select/keep_row.h"
#include "../cuda/select/keep_sorted.h"

// --- the test --------------------------------------------------------------------------------------------------------

namespace {

using namespace bsfa::cuda::select;

float weight(float score) { return std::exp2(score); }

struct Row {
  std::vector<uint32_t> keys;
  double first = 0.0, total = 0.0;
};

// `firsts` blocks rank before all others. `kind` sets how alike the scores are.
Row random_row(std::mt19937& random, int n, int kind, int firsts) {
  Row row;
  std::normal_distribution<float> normal;
  for (int j = 0; j < n; ++j) {
    float score = normal(random);
    if (kind == 1) score = std::floor(score);
    if (kind == 2) score = 0.0f;
    if (kind == 3) score = random() % 50 == 0 ? 8.0f : -8.0f;
    if (kind == 4 && random() % 3 == 0) score = -INFINITY;
    row.keys.push_back(key_of(score));
    row.total += weight(score);
  }
  for (int i = 0; i < firsts; ++i) {
    uint32_t& key = row.keys[random() % n];
    if (key != kFirstKey) row.first += weight(score_of(key));
    key = kFirstKey;
  }
  return row;
}

// The definition: blocks in order, and those before which less than the threshold's share ranks.
std::vector<bool> kept(const Row& row, float threshold, int best) {
  const int n = static_cast<int>(row.keys.size());
  std::vector<int> order(n);
  for (int j = 0; j < n; ++j) order[j] = j;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row.keys[a] > row.keys[b]; });
  std::vector<bool> result(n);
  double before = row.first;
  for (int place = 0; place < n; ++place) {
    const uint32_t key = row.keys[order[place]];
    result[order[place]] = place < best || key == kFirstKey || static_cast<float>(before / row.total) < threshold;
    if (key != kFirstKey) before += weight(score_of(key));
  }
  return result;
}

template <int kPerLane>
Cut sorted_cut(const Row& row, float threshold, int best) {
  const int n = static_cast<int>(row.keys.size());
  alignas(16) uint32_t window[32];
  Cut cuts[32];
  warp.run([&](int lane) {
    SortedRow<kPerLane> sorted;
    for (int i = 0; i < kPerLane; ++i) sorted.keys[i] = lane + 32 * i < n ? row.keys[lane + 32 * i] : kNoKey;
    sorted.blocks = row.keys.data();
    sorted.window = window;
    sorted.lane = lane;
    sorted.n = n;
    sorted.sort();
    cuts[lane] = wider(sorted.mass(row.first, row.total, threshold, weight), sorted.best(best));
  });
  for (const Cut& cut : cuts) {
    if (cut.key != cuts[0].key || cut.tie_end != cuts[0].tie_end) std::printf("FAILED: lanes differ\n"), std::exit(1);
  }
  return cuts[0];
}

Cut bisected_cut(const Row& row, float threshold, int best) {
  const int n = static_cast<int>(row.keys.size());
  Cut cut;
  warp.run([&](int lane) {
    const Team<1> team{lane};
    const Cut mass = mass_cut(team, row.keys.data(), n, row.first, row.total, threshold, weight);
    const Cut own = wider(mass, best_cut(team, row.keys.data(), n, best));
    if (lane == 0) cut = own;
  });
  return cut;
}

bool check(std::mt19937& random, int n) {
  const float thresholds[] = {0.9f, 0.5f, 1.0f, 0.0f, 1.5f, -1.0f, 0.25f};
  const int kind = static_cast<int>(random() % 5), firsts = static_cast<int>(random() % 2 * (random() % 5));
  const Row row = random_row(random, n, kind, firsts);
  const float threshold = random() % 2 ? thresholds[random() % 7] : static_cast<float>(random() % 1000) / 1000;
  const int best = static_cast<int>(random() % 3 ? 1 + random() % 3 : 1 + random() % 1100);
  const std::vector<bool> want = kept(row, threshold, best);
  const Cut sorted = n > 512   ? sorted_cut<32>(row, threshold, best)
                     : n > 256 ? sorted_cut<16>(row, threshold, best)
                     : n > 128 ? sorted_cut<8>(row, threshold, best)
                               : sorted_cut<4>(row, threshold, best);
  const Cut bisected = bisected_cut(row, threshold, best);
  for (int j = 0; j < n; ++j) {
    const uint32_t key = row.keys[j];
    if (key == kFirstKey) continue;  // kept whatever the cut says
    if (sorted.keeps(key, j) == want[j] && bisected.keeps(key, j) == want[j]) continue;
    std::printf("FAILED: block %d of %d, scores of kind %d, %d first, threshold %g, best %d: sorted %d, bisected %d\n",
                j, n, kind, firsts, static_cast<double>(threshold), best, sorted.keeps(key, j), bisected.keeps(key, j));
    return false;
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  bool good = true;
  for (int n : {1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024}) {
    for (int i = 0; i < 20; ++i) good &= check(random, n);
  }
  for (int i = 0; i < 400; ++i) good &= check(random, static_cast<int>(1 + random() % 1024));
  std::printf(good ? "passed\n" : "failed\n");
  return good ? 0 : 1;
}
