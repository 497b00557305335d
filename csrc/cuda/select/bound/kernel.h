// Which blocks a tile is sure to skip, by bounds of its logits (config.h), for attention that skips (SkipParams).
//
// Tile      a CTA takes one (tile, query head) pair: 128 rows against 128 keys a step. Two CTAs share an SM, so that four
//           warpgroups fill the tensor cores; what one waits for, the others hide.
// Roles     both warpgroups compute, 64 rows each; one thread also fetches the images of blocks, three steps ahead.
// Products  two sets of scores in turn: one is made while the other is looked at.
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
  float cut;               // nats; NaN: nothing is left out

  __device__ bool keeps_all() const { return cut != cut; }

  // Blocks of word w that may be kept; those of them that are kept whatever the bounds say.
  __device__ __forceinline__ uint32_t candidates(int32_t w) const {
    return (within != nullptr ? within[w] : ~0u) & visible.bits_of_word(w);
  }
  __device__ __forceinline__ uint32_t forced(int32_t w) const {
    return BlockRange{0, always.sink_end}.bits_of_word(w) |
           BlockRange{always.window_begin, always.window_end}.bits_of_word(w);
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
  int32_t count = 0, last = -1;
  const auto put = [&](int32_t block) {
    if (lane == 0) steps[count] = static_cast<uint16_t>(block);
    ++count;
  };
  if constexpr (kRelative) {  // the last one and block 0 come first
    for (int32_t w = words - 1; w >= 0 && last < 0; --w) {
      const uint32_t bits = work.candidates(w);
      if (bits != 0) last = w * 32 + 31 - __clz(bits);
    }
    if (last < 0) return 0;
    put(last);
    if (last > 0 && (work.candidates(0) & 1u) != 0) put(0);
  }
  for (int32_t end = words; end > 0; end -= 32) {
    const int32_t w = end - 1 - lane;
    uint32_t bits = w >= 0 ? work.candidates(w) : 0;
    if constexpr (kRelative) {
      if (w == last / 32) bits &= ~(1u << (last % 32));
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

// The largest of the thread's scores of each row. Word 2 j + r of the accumulator holds row r, columns
// 8 j + 2 (lane % 4) and the next.
template <class Tensor>
__device__ __forceinline__ float largest_of_row(const Tensor& words, int r) {
  const auto at = [&](int j) {
    const uint32_t word = words(2 * j + r);
    return *reinterpret_cast<const __half2*>(&word);
  };
  __half2 tops[4] = {at(0), at(1), at(2), at(3)};
#pragma unroll
  for (int j = 4; j < kBlockKeys / 8; ++j) tops[j % 4] = __hmax2(tops[j % 4], at(j));
  const __half2 top = __hmax2(__hmax2(tops[0], tops[1]), __hmax2(tops[2], tops[3]));
  return fmaxf(__low2float(top), __high2float(top));
}

// Scores of keys that a row does not see become -inf.
template <class Tensor>
__device__ __forceinline__ void mask_scores(Tensor& words, const TileRow& tile, int32_t first_key, int first_row,
                                            bool causal) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t position = tile.position + first_row + 8 * r;
    const int32_t end =
        (causal ? min(position + 1, tile.seqlen_k) : tile.seqlen_k) - first_key - 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < kBlockKeys / 8; ++j) {
      constexpr uint32_t kNone = 0xfc00;  // -inf
      uint32_t& word = words(2 * j + r);
      if (8 * j >= end) word = (word & 0xffff0000u) | kNone;
      if (8 * j + 1 >= end) word = (word & 0xffffu) | kNone << 16;
    }
  }
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
  const auto keys =
      make_tensor(make_smem_ptr(reinterpret_cast<typename C::Fp8*>(shared.key[0])),
                  tile_to_shape(typename C::KeyLayout{}, Shape<Int<kBlockKeys>, Int<C::kHeadDim>, Int<kStages>>{}));
  const auto key_part = slice.partition_fragment_B(keys);
  auto even = partition_fragment_C(mma, Shape<Int<kGroupRows>, Int<kBlockKeys>>{});
  auto odd = partition_fragment_C(mma, Shape<Int<kGroupRows>, Int<kBlockKeys>>{});
  auto query_part = make_tensor<typename C::Fp8>(Shape<Shape<_4, _2, _2>, _1, Int<C::kSteps>>{});
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
  // What becomes of a step's scores.
  const auto judge = [&](auto& s, int32_t block, const BlockFacts& facts) __attribute__((always_inline)) {
    auto scores = recast<uint32_t>(s);
    if (kRelative && block >= whole) mask_scores(scores, work.tile, block * kBlockKeys, first_row, p.problem.causal);
    bool keep = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float middle = rows.factor[r] * facts.factor * largest_of_row(scores, r);
      const float error = rows.error(r, facts);
      const float above = bound_above(middle + error, cap);
      const float limit = kRelative ? floor[r] + cut : cut;
      keep |= rows.counts[r] & !(above < limit);  // NaN keeps
      if constexpr (kRelative) floor[r] = fmaxf(floor[r], max_over_quad(bound_below(middle - error, cap)));
    }
    keep = __any_sync(kAllLanes, keep);
    if (block / 32 != word) {
      flush();
      word = block / 32;
      kept = 0;
    }
    kept |= static_cast<uint32_t>(keep) << (block % 32);
  };
  if (num_steps == 0) return;
  int32_t step = 0, block = 0;
  BlockFacts facts;
  const auto start = [&](auto& s) __attribute__((always_inline)) {
    shared.key_full[slot.slot].wait(slot.parity);
    issue(mma, query_part, key_part(_, _, _, slot.slot), s, false);
  };
  const auto finish = [&](auto& s) __attribute__((always_inline)) {
    block = __shfl_sync(kAllLanes, static_cast<int32_t>(steps[step]), 0);
    facts = shared.facts[slot.slot];
    warpgroup_wait<0>();
    warpgroup_fence_operand(s);
    if (lane == 0) shared.key_empty[slot.slot].arrive();
    slot.advance();
    ++step;
  };
  warpgroup_fence_operand(query_part);
  start(even);
  finish(even);
  // Judges the scores `s` of the step before while those of the next one are made; false if there is none.
  const auto advance = [&](auto& s, auto& other) __attribute__((always_inline)) {
    if (step == num_steps) {
      judge(s, block, facts);
      return false;
    }
    start(other);
    if (fetches) loader.load(step + kAhead - 1, num_steps);
    __syncwarp();
    judge(s, block, facts);
    finish(other);
    return true;
  };
  while (advance(even, odd) && advance(odd, even)) {
  }
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
