// Which blocks a tile is sure to skip, by bounds of its logits (config.h), for attention that skips (SkipParams).
//
// Tile      a CTA takes one (tile, query head) pair: 128 rows against 128 keys a step. Two CTAs share an SM, so that four
//           warpgroups fill the tensor cores; what one waits for, the others hide.
// Roles     both warpgroups compute, 64 rows each; one thread also fetches the images of blocks, three steps ahead.
// Products  64 keys each, in two sets of scores: one is made while the other is looked at.
// Decision  a thread looks at the largest of its scores of a row; a warp keeps a block by one vote. No warp waits for
//           another one: each sets the bits that it keeps in the row of words in shared memory, 32 blocks at a time.
// Order     the blocks in question are listed before the first step. Absolute: from the last to the first, without those
//           that are always kept. Relative: all, in the order of visits of SkipParams, with lower bounds of the running
//           maxima.
// Waits     key_full (bytes of the image and the facts), key_empty (8 warps).
#pragma once

#include "../../common/launch.h"
#include "../../common/mma.h"
#include "../../common/place.h"
#include "queries.h"

namespace bsfa::cuda::bound {

// The pair of a CTA.
struct Work {
  TileRow tile;
  int32_t head;
  AlwaysKept always;
  BlockRange visible;
  const uint32_t* within;  // null: all
  int32_t last;            // the last one that may be kept, -1 without any
  float cut;               // nats; NaN: nothing is left out

  __device__ bool keeps_all() const { return cut != cut; }

  // Blocks of word w that may be kept; those of them that are kept whatever the bounds say.
  __device__ __forceinline__ uint32_t candidates(int32_t w) const {
    return (within != nullptr ? within[w] : ~0u) & visible.bits_of_word(w);
  }
  // Among them the last one: attention meets it first, and its sums have other bits in another order.
  __device__ __forceinline__ uint32_t forced(int32_t w) const {
    const uint32_t met_first = last >= 0 && last / 32 == w ? 1u << (last % 32) : 0;
    return BlockRange{0, always.sink_end}.bits_of_word(w) |
           BlockRange{always.window_begin, always.window_end}.bits_of_word(w) | met_first;
  }
};

template <class C>
struct SharedStorage {
  alignas(1024) uint8_t key[kStages][C::kImageBytes];
  BlockFacts facts[kStages];
  Mbarrier key_full[kStages], key_empty[kStages];
  Work work;
  int32_t num_steps;
  // Behind it: num_words words of kept blocks, and the list of steps, uint16_t, 32 for each word.
};

template <class C>
constexpr int shared_bytes(int32_t num_words) {
  constexpr int kOfWord = sizeof(uint32_t) + 32 * sizeof(uint16_t);
  return 1024 + static_cast<int>(sizeof(SharedStorage<C>)) + num_words * kOfWord;
}

// Lists the blocks of the steps; one warp. Returns how many there are.
template <bool kRelative>
__device__ __forceinline__ int32_t list_steps(const Work& work, uint16_t* steps) {
  const int lane = threadIdx.x % 32;
  const int32_t words = ceil_div(work.visible.end, 32);
  int32_t count = 0;
  const auto put = [&](int32_t block) {
    if (lane == 0) steps[count] = static_cast<uint16_t>(block);
    ++count;
  };
  if constexpr (kRelative) {  // the last one and block 0 come first
    if (work.last < 0) return 0;
    put(work.last);
    if (work.last > 0 && (work.candidates(0) & 1u) != 0) put(0);
  }
  for (int32_t end = words; end > 0; end -= 32) {
    const int32_t w = end - 1 - lane;
    uint32_t bits = w >= 0 ? work.candidates(w) : 0;
    if constexpr (kRelative) {
      if (w == work.last / 32) bits &= ~(1u << (work.last % 32));
      if (w == 0) bits &= ~1u;
    } else {
      if (w >= 0) bits &= ~work.forced(w);
    }
    int32_t until = __popc(bits);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, until, d);
      if (lane >= d) until += before;
    }
    int32_t at = count + until - __popc(bits);
    for (; bits != 0; ++at) {
      const int bit = 31 - __clz(bits);
      bits ^= 1u << bit;
      steps[at] = static_cast<uint16_t>(w * 32 + bit);
    }
    count += __shfl_sync(kAllLanes, until, 31);
  }
  return count;
}

// Fetches the blocks of the steps; one thread.
template <class C>
class KeyLoader {
 public:
  __device__ KeyLoader(SharedStorage<C>& shared, const uint16_t* steps, const KernelParams& p, const Work& work)
      : shared_(shared), steps_(steps) {
    const int32_t kv_head = work.head / (p.problem.num_q_heads / p.problem.num_kv_heads);
    const int64_t first = kv_head * p.keys.blocks + p.keys.first_block(p.problem.kv, work.tile.sequence);
    images_ = p.keys.images + first * C::kImageBytes;
    facts_ = p.keys.facts + first;
  }

  // The next step's, if there is one: `step` < `num_steps`.
  __device__ __forceinline__ void load(int32_t step, int32_t num_steps) {
    if (step >= num_steps) return;
    const int32_t block = steps_[step];
    Mbarrier& full = shared_.key_full[slot_.slot];
    shared_.key_empty[slot_.slot].wait(slot_.parity ^ 1);
    full.arrive_expect(C::kImageBytes + sizeof(BlockFacts));
    cute::SM90_BULK_COPY_G2S::copy(images_ + int64_t{block} * C::kImageBytes, &full.state, shared_.key[slot_.slot],
                                   C::kImageBytes);
    cute::SM90_BULK_COPY_G2S::copy(facts_ + block, &full.state, &shared_.facts[slot_.slot], sizeof(BlockFacts));
    slot_.advance();
  }

 private:
  SharedStorage<C>& shared_;
  const uint16_t* steps_;
  const uint8_t* images_;
  const BlockFacts* facts_;
  RingPosition<kStages> slot_;
};

// Less than any score.
constexpr int32_t kUnseen = INT32_MIN;

// The largest of the thread's scores of row r, in a half of a block; `score(i)` is element i. Element 4 j + 2 r + c is
// column 8 j + 2 (lane % 4) + c.
template <class Score>
__device__ __forceinline__ int32_t largest_of_row(const Score& score, int r) {
  int32_t tops[2];
#pragma unroll
  for (int j = 0; j < kHalfKeys / 8; ++j) {
    const int32_t a = score(4 * j + 2 * r), b = score(4 * j + 2 * r + 1);
    tops[j % 2] = j < 2 ? max(a, b) : __vimax3_s32(tops[j % 2], a, b);
  }
  return max(tops[0], tops[1]);
}

// The same over the keys that the row sees: those before `end`, counted from the half's first one.
template <class Score>
__device__ __forceinline__ int32_t largest_seen(const Score& score, int r, int32_t end) {
  end -= 2 * static_cast<int>(threadIdx.x % 4);
  return largest_of_row([&](int i) { return i / 4 * 8 + i % 2 < end ? score(i) : kUnseen; }, r);
}

// What softcap makes of a bound; off by `kCapLoss` caps at most.
constexpr float kCapLoss = 1e-5f;
__device__ __forceinline__ float bound_above(float x, float cap) {
  return cap == 0.0f ? x : capped(x / cap, cap) + kCapLoss * cap;
}
__device__ __forceinline__ float bound_below(float x, float cap) {
  return cap == 0.0f ? x : capped(x / cap, cap) - kCapLoss * cap;
}

template <class Element, class C, bool kRelative>
__device__ void compare(SharedStorage<C>& shared, uint32_t* kept_words, const uint16_t* steps, const KernelParams& p) {
  using namespace cute;
  const Work& work = shared.work;
  const int32_t num_steps = shared.num_steps;
  const bool fetches = threadIdx.x == 0;
  KeyLoader<C> loader(shared, steps, p, work);
  if (fetches) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) loader.load(i, num_steps);
  }
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % 32;
  const int first_row = threadIdx.x / 32 * 16 + lane / 4;
  typename C::Mma mma;
  const auto slice = mma.get_thread_slice(thread);
  const auto keys = make_tensor(make_smem_ptr(reinterpret_cast<int8_t*>(shared.key[0])), typename C::HalvesLayout{});
  const auto key_part = slice.partition_fragment_B(keys);
  auto low = partition_fragment_C(mma, Shape<Int<kGroupRows>, Int<kHalfKeys>>{});
  auto high = partition_fragment_C(mma, Shape<Int<kGroupRows>, Int<kHalfKeys>>{});
  auto query_part = make_tensor<int8_t>(Shape<Shape<_4, _2, _2>, _1, Int<C::kSteps>>{});
  Rows rows;
  {
    uint32_t fragment[C::kHeadDim / 8];
    rows = take_rows<Element, C::kHeadDim>(p, work.tile, work.head, first_row, fragment);
    auto words = recast<uint32_t>(query_part);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 8; ++i) words(i) = fragment[i];
  }
  // Blocks that every row of the tile sees whole.
  const int32_t whole = min(whole_blocks(work.tile, p.problem.causal), work.tile.seqlen_k / kBlockKeys);
  const float cap = p.problem.softcap, cut = work.cut;
  float floor[2] = {-INFINITY, -INFINITY};  // of the running maxima
  RingPosition<kStages> slot;
  int32_t word = -1;
  uint32_t kept = 0;  // of word
  const auto flush = [&]() {
    if (lane == 0 && kept != 0) atomicOr(kept_words + word, kept);
  };
  if (num_steps == 0) return;
  warpgroup_fence_operand(query_part);
  const auto block_of = [&](int32_t step) { return __shfl_sync(kAllLanes, static_cast<int32_t>(steps[step]), 0); };
  const auto look = [&](const auto& s, int32_t block, int half, int32_t (&tops)[2]) __attribute__((always_inline)) {
    const auto score = [&](int i) { return s(i); };
    if (kRelative && block >= whole) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int32_t seen =
            p.problem.causal ? min(work.tile.position + first_row + 8 * r + 1, work.tile.seqlen_k) : work.tile.seqlen_k;
        tops[r] = largest_seen(score, r, seen - block * kBlockKeys - half * kHalfKeys);
      }
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) tops[r] = largest_of_row(score, r);
  };
  // What becomes of a block whose rows' largest scores are `tops`.
  const auto judge = [&](const int32_t (&tops)[2], int32_t block, const BlockFacts& facts)
                         __attribute__((always_inline)) {
                           bool keep = false;
#pragma unroll
                           for (int r = 0; r < 2; ++r) {
                             const float middle = rows.factor[r] * facts.factor * static_cast<float>(tops[r]);
                             const float error = rows.error(r, facts);
                             const float above = bound_above(middle + error, cap);
                             const float limit = kRelative ? floor[r] + cut : cut;
                             keep |= rows.counts[r] & !(above < limit);  // NaN keeps
                             if constexpr (kRelative) {
                               const float below = tops[r] == kUnseen ? -INFINITY : bound_below(middle - error, cap);
                               floor[r] = fmaxf(floor[r], max_over_quad(below));
                             }
                           }
                           keep = __any_sync(kAllLanes, keep);
                           if (block / 32 != word) {
                             flush();
                             word = block / 32;
                             kept = 0;
                           }
                           kept |= static_cast<uint32_t>(keep) << (block % 32);
                         };
  int32_t block = block_of(0);
  shared.key_full[0].wait(0);
  issue(mma, query_part, key_part(_, _, _, 0), low, false);
  warpgroup_wait<0>();
  int32_t tops[2], of_high[2];
  BlockFacts facts;
  const auto join = [&]() {
#pragma unroll
    for (int r = 0; r < 2; ++r) tops[r] = max(tops[r], of_high[r]);
  };
  // The fences behind an issue keep the compiler from looking at scores before it.
  for (int32_t step = 0;;) {
    warpgroup_fence_operand(low);
    issue(mma, query_part, key_part(_, _, _, 2 * slot.slot + 1), high, false);
    warpgroup_fence_operand(low);
    facts = shared.facts[slot.slot];
    look(low, block, 0, tops);
    if (fetches) loader.load(step + kAhead, num_steps);
    __syncwarp();
    warpgroup_wait<0>();
    warpgroup_fence_operand(high);
    if (lane == 0) shared.key_empty[slot.slot].arrive();
    slot.advance();
    if (++step == num_steps) break;
    shared.key_full[slot.slot].wait(slot.parity);
    issue(mma, query_part, key_part(_, _, _, 2 * slot.slot), low, false);
    warpgroup_fence_operand(high);
    const int32_t next = block_of(step);
    look(high, block, 1, of_high);
    join();
    judge(tops, block, facts);
    block = next;
    warpgroup_wait<0>();
  }
  look(high, block, 1, of_high);
  join();
  judge(tops, block, facts);
  flush();
}

// The threshold, a little lower: what its own arithmetic and that of the kernel that decides can be off.
template <bool kRelative>
__device__ __forceinline__ float safe_cut(float cut) {
  if (cut == INFINITY && !kRelative) return cut;
  // -inf leaves nothing out. Beyond 0 a relative one would have to know which blocks are skipped.
  if (!(cut > -INFINITY) || (kRelative && cut > 0.0f)) return __int_as_float(0x7fffffff);
  return cut - 1e-6f * fabsf(cut) - 1e-30f;
}

template <bool kRelative>
__device__ Work work_of(const KernelParams& p, const Pair& pair, const Place& place) {
  Work work;
  work.tile = tile_row(p.problem, place.sequence, place.tile);
  work.head = pair.head;
  work.always = always_kept(sequence_geometry(p.problem, place.sequence), place.tile, p.sink_blocks, p.window_blocks);
  work.visible = visible_range(work.tile, p.problem.causal, -1);
  const int64_t within = int64_t{pair.row} * p.within_heads + pair.head / p.heads_per_within_head;
  work.within = p.within != nullptr ? reinterpret_cast<const uint32_t*>(p.within) + within * p.num_words : nullptr;
  work.last = -1;
  for (int32_t w = ceil_div(work.visible.end, 32) - 1; w >= 0 && work.last < 0; --w) {
    const uint32_t bits = work.candidates(w);
    if (bits != 0) work.last = w * 32 + 31 - __clz(bits);
  }
  const int32_t column = min(max(absolute_tile(work.tile), 0), p.columns - 1);
  work.cut = safe_cut<kRelative>(p.thresholds[int64_t{pair.head} * p.columns + column]);
  return work;
}

template <class Element, int kHeadDim, bool kRelative>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) bound_kernel(const __grid_constant__ KernelParams p) {
  using C = Config<kHeadDim>;
  extern __shared__ char memory[];
  const uint32_t unaligned = shared_address(memory);
  auto& shared = *reinterpret_cast<SharedStorage<C>*>(memory + ((unaligned + 1023) / 1024 * 1024 - unaligned));
  auto* kept_words = reinterpret_cast<uint32_t*>(&shared + 1);
  auto* steps = reinterpret_cast<uint16_t*>(kept_words + p.num_words);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  const Pair pair = natural_pair(static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(p.num_rows),
                                 p.problem.num_q_heads / p.problem.num_kv_heads);
  const Place place = find_place<kThreads>(p.problem, pair.row);
  const int64_t target = int64_t{pair.row} * p.problem.num_q_heads + pair.head;
  int32_t* words = p.words + target * p.num_words;
  if (place.sequence < 0) {
    for (int32_t w = threadIdx.x; w < p.num_words; w += kThreads) words[w] = 0;
    if (threadIdx.x == 0) p.counts[target] = 0;
    return;
  }
  if (threadIdx.x == 0) shared.work = work_of<kRelative>(p, pair, place);
  for (int32_t w = threadIdx.x; w < p.num_words; w += kThreads) kept_words[w] = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      shared.key_full[i].init(1);
      shared.key_empty[i].init(kWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const Work& work = shared.work;
  if (warp == 0) {
    const int32_t count = work.keeps_all() ? 0 : list_steps<kRelative>(work, steps);
    if (lane == 0) shared.num_steps = count;
  }
  __syncthreads();
  cudaGridDependencySynchronize();  // the images are the kernel's before
  compare<Element, C, kRelative>(shared, kept_words, steps, p);
  __syncthreads();
  if (warp > 0) return;
  int32_t count = 0, met = 0;
  for (int32_t w = lane; w < p.num_words; w += 32) {
    const uint32_t candidates = work.candidates(w);
    const uint32_t keep = work.keeps_all() ? candidates : candidates & (kept_words[w] | work.forced(w));
    words[w] = static_cast<int32_t>(keep);
    count += __popc(keep);
    met += __popc(candidates);
  }
  count = __reduce_add_sync(kAllLanes, count);
  met = __reduce_add_sync(kAllLanes, met);
  if (lane > 0) return;
  p.counts[target] = count;
  const int groups = (work.tile.row_begin < kGroupRows) + (work.tile.row_end > kGroupRows);
  atomicAdd(p.skips + 2 * work.head, static_cast<unsigned long long>(met) * groups);
  atomicAdd(p.skips + 2 * work.head + 1, static_cast<unsigned long long>(met - count) * groups);
}

}  // namespace bsfa::cuda::bound
