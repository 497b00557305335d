// The pool of slots of the attention kernel (csrc/cuda/attention/sm90/pool.h): both load warps and the eight warps that
// compute, as lists of actions that block on mbarriers, run in random order, with tiles of few and of many steps. What
// each warp finds in a slot must be what it is about to use, and all lists must come to their end.
#include "../cuda/attention/sm90/pool.h"

#include <algorithm>
#include <cstdio>
#include <deque>
#include <functional>
#include <random>
#include <vector>

namespace {

using namespace bsfa::cuda::attn::sm90;

constexpr int kRing = kPoolSlots - 1, kValueSlots = 3, kWarps = 8;

struct Barrier {
  int arrivals = 1;  // of a phase
  int missing = 1;
  int copies = 0;  // under way
  int phase = 0;

  void init(int count) { arrivals = missing = count; }
  bool ended(int parity) const { return phase % 2 != parity; }
  void arrive(int with_copies = 0) {
    copies += with_copies;
    --missing;
    turn();
  }
  void copied() {
    --copies;
    turn();
  }

 private:
  void turn() {
    if (missing != 0 || copies != 0) return;
    ++phase;
    missing = arrivals;
  }
};

// What a slot holds: the keys or values of step n as n, the queries of tile n as -1 - n.
constexpr int kNothing = 1 << 30;
int queries(int tile) { return -1 - tile; }

struct Record {
  int number, first_slot, second_slot;
};

struct Copy {
  int* target;
  int what;
  Barrier* barrier;
};

struct Warp {
  int query = kFirstQuery, key = kFirstKey, second = -1;
  int before = -1;        // the query slot of the tile before
  int output = kNothing;  // stands for what was staged there
  bool stored = false;
};

class Play {
 public:
  explicit Play(const std::vector<int>& lengths) : lengths_(lengths), warps_(kWarps), agents_(2 + kWarps) {
    for (Barrier& barrier : full_) barrier.init(2);
    for (Barrier& barrier : empty_) barrier.init(kWarps);
    for (Barrier& barrier : value_empty_) barrier.init(kWarps);
    load_keys(agents_[0]);
    load_values(agents_[1]);
    for (int w = 0; w < kWarps; ++w) compute(warps_[w], agents_[2 + w]);
  }

  // True if all warps came to their end, and found what they expected.
  bool run(std::mt19937& random) {
    // Some runs hold one warp, or all copies, back.
    const unsigned slow = random() % 16;
    for (int idle = 0; good_ && idle < 50000;) {
      const unsigned pick = random() % 11;
      if (pick == slow && random() % 16 != 0) continue;
      const bool moved = pick == 10 ? copy(random) : step(agents_[pick]);
      idle = moved ? 0 : idle + 1;
    }
    return good_ && copies_.empty() &&
           std::all_of(agents_.begin(), agents_.end(), [](const Agent& agent) { return agent.empty(); });
  }

 private:
  using Agent = std::deque<std::function<bool()>>;  // an action that returns false blocks

  static bool step(Agent& agent) {
    if (agent.empty() || !agent.front()()) return false;
    agent.pop_front();
    return true;
  }
  bool copy(std::mt19937& random) {
    if (copies_.empty()) return false;
    const size_t i = random() % copies_.size();
    const Copy done = copies_[i];
    copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(i));
    *done.target = done.what;
    done.barrier->copied();
    return true;
  }

  static void wait(Agent& agent, const Barrier& barrier, int parity) {
    agent.push_back([&barrier, parity] { return barrier.ended(parity); });
  }
  template <class Act>
  static void act(Agent& agent, const Act& f) {
    agent.push_back([f] {
      f();
      return true;
    });
  }
  static int parity(int number, int slots) { return number / slots % 2; }
  void check(bool fact) { good_ = good_ && fact; }

  void fetch(int& target, int what, Barrier& barrier) {
    target = kNothing;
    copies_.push_back({&target, what, &barrier});
    barrier.arrive(1);
  }

  void load_keys(Agent& agent) {
    PoolOrder order;
    const auto await_slot = [&](uint32_t entry) {
      const int slot = static_cast<int>(entry >> 1);
      wait(agent, empty_[slot], static_cast<int>(entry & 1) ^ 1);
      act(agent, [=] { check(users_[slot] == 0); });
      return slot;
    };
    int number = 0;
    for (int tile = 0; tile < static_cast<int>(lengths_.size()); ++tile) {
      const int slot = await_slot(order.take_query());
      act(agent, [=] {
        users_[slot] = kWarps;
        tiles_[tile % kRing] = tile;
        fetch(slots_[slot], queries(tile), query_full_[tile % kRing]);
      });
      for (int i = 0; i < lengths_[tile]; ++i, ++number) {
        const int slot = await_slot(order.take_keys(i < 2));
        const Record record{number, static_cast<int>(order.first()), static_cast<int>(order.second())};
        act(agent, [=] {
          users_[slot] = kWarps;
          steps_[record.number % kRing] = record;
          fetch(slots_[slot], record.number, full_[record.number % kRing]);
        });
      }
    }
    await_slot(order.take_keys(false));
    act(agent, [=] {  // the end
      steps_[number % kRing] = {number, -1, -1};
      full_[number % kRing].arrive();
    });
  }

  void load_values(Agent& agent) {
    act(agent, [this] { full_[0].arrive(); });
    int number = 0;
    for (int length : lengths_) {
      for (int i = 0; i < length; ++i, ++number) {
        const int slot = number % kValueSlots, step = number + 1;
        wait(agent, value_empty_[slot], parity(number, kValueSlots) ^ 1);
        wait(agent, full_[step % kRing], parity(step, kRing) ^ 1);
        act(agent, [=] { fetch(values_[slot], step - 1, full_[step % kRing]); });
      }
    }
  }

  // As Consumer::run in compute.h.
  void compute(Warp& warp, Agent& agent) {
    const auto release = [this](int slot) {
      --users_[slot];
      empty_[slot].arrive();
    };
    const auto give_back = [=, &warp] {
      if (!warp.stored) return;
      check(slots_[warp.before] == warp.output);
      release(warp.before);
      warp.stored = false;
    };
    const auto await_step = [&](int number) {
      wait(agent, full_[number % kRing], parity(number, kRing));
      act(agent, [=] {
        check(steps_[number % kRing].number == number);
        check(number == 0 || values_[(number - 1) % kValueSlots] == number - 1);
      });
    };
    // The scores of step `number`, beside the product of the step before.
    const auto advance = [&](int number, int tile) {
      const auto operands = [=, &warp] {
        check(slots_[warp.query] == queries(tile) && slots_[warp.key] == number);
        check(number == 0 || values_[(number - 1) % kValueSlots] == number - 1);
      };
      act(agent, operands);
      act(agent, [=, &warp] {
        operands();
        const Record record = steps_[number % kRing];
        check(record.number == number);
        release(warp.key);
        warp.key = record.first_slot;
        warp.second = record.second_slot;
      });
      act(agent, [=] {
        check(tiles_[tile % kRing] == tile);  // for masks
        if (number > 0) value_empty_[(number - 1) % kValueSlots].arrive();
      });
    };
    // The output lies where the queries were until it is given back.
    const auto store = [=, &warp](int tile) {
      check(tiles_[tile % kRing] == tile && slots_[warp.before] == queries(tile));
      warp.output = slots_[warp.before];
      warp.stored = true;
    };

    int number = 0;
    for (int tile = 0; tile < static_cast<int>(lengths_.size()); ++tile) {
      await_step(number);
      act(agent, [=, &warp] {
        if (tile == 0) return;
        warp.before = warp.query;
        warp.query = warp.key;
        warp.key = warp.second;
      });
      wait(agent, query_full_[tile % kRing], parity(tile, kRing));
      advance(number++, tile);
      if (tile > 0) act(agent, [=] { store(tile - 1); });
      for (int i = 1; i < lengths_[tile]; ++i) {
        await_step(number);
        advance(number++, tile);
        if (i == 1) act(agent, give_back);
      }
      act(agent, give_back);
    }
    await_step(number);
    act(agent, [=, &warp] { check(slots_[warp.query] == queries(static_cast<int>(lengths_.size()) - 1)); });
  }

  const std::vector<int> lengths_;
  Barrier full_[kRing], query_full_[kRing], empty_[kPoolSlots], value_empty_[kValueSlots];
  Record steps_[kRing] = {};
  int tiles_[kRing] = {};
  int slots_[kPoolSlots] = {kNothing, kNothing, kNothing, kNothing};
  int values_[kValueSlots] = {kNothing, kNothing, kNothing};
  int users_[kPoolSlots] = {};  // warps that have not given the slot back
  std::vector<Copy> copies_;
  bool good_ = true;
  std::vector<Warp> warps_;
  std::vector<Agent> agents_;
};

// Two tiles of ten steps: which earlier fetch had the slot that each one of the second tile takes.
bool as_they_come_free() {
  PoolOrder order;
  const auto slot = [](uint32_t entry) { return static_cast<int>(entry >> 1); };
  const int queries = slot(order.take_query());
  std::vector<int> keys(10), next(10);
  for (int i = 0; i < 10; ++i) keys[i] = slot(order.take_keys(i < 2));
  const int next_queries = slot(order.take_query());
  for (int i = 0; i < 10; ++i) next[i] = slot(order.take_keys(i < 2));
  const std::vector<int> want{keys[8], keys[9], next[0], next[1], queries, next[2], next[3], next[4], next[5], next[6]};
  return next_queries == keys[7] && next == want;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int wrong = !as_they_come_free();
  const int plays = 3000;
  for (int play = 0; play < plays; ++play) {
    const unsigned longest = 1 + play % 7;
    std::vector<int> lengths(1 + random() % 12);
    for (int& length : lengths) length = 1 + static_cast<int>(random() % longest);
    if (Play(lengths).run(random)) continue;
    ++wrong;
    std::printf("wrong:");
    for (int length : lengths) std::printf(" %d", length);
    std::printf("\n");
  }
  std::printf("%d plays, %d wrong\n", plays, wrong);
  return wrong != 0;
}
