// The producer warpgroup: hands out units, and brings one token of every group, 64 columns of it, to each ring slot.
//
// Two ways lead into a slot. TMA takes whole tiles: a tensor map with dimensions {column, group, token of the group,
// head, batch or page} reads every stride-th token in one copy. Where a tile is cut (the ends of a sequence, of the
// call's queries) or its keys lie in pages of less than 8 groups, all threads copy 16 bytes at a time by cp.async, with
// zeros for tokens that do not count. Q and K choose independently, tile by tile.
//
// full[slot] has 5 arrivals: the issuing lane's, which carries the bytes of TMA (possibly none), and one per warp: at
// once if the warp has copied nothing, else when its copies have landed, which is looked at one step later. At that time
// the producer has seen slot s + 1 empty, so the consumers have let go of step s - 3; they do that before they wait for
// step s: no deadlock with 4 slots.
#pragma once

#include "config.h"

namespace bsfa::cuda::select::strided {

__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <class Config>
class Loader {
 public:
  __device__ Loader(SharedStorage& shared, const KernelParams& p)
      : shared_(shared),
        p_(p),
        warp_(__shfl_sync(kAllLanes, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32),
        row_(threadIdx.x / kChunks),
        target_(row_ * kRowBytes + (threadIdx.x % kChunks ^ row_ % 8) * 16) {}

  __device__ void run() {
    const int32_t segments = p_.queue->segments;
    int32_t index = blockIdx.x;
    RingPosition<kWorkSlots> slot;
    for (;; slot.advance()) {
      Work& work = shared_.work[slot.slot];
      if (warp_ == 0) {
        shared_.work_empty[slot.slot].wait(slot.parity ^ 1);
        int32_t next = 0;
        if (lane_ == 0) {
          hand_out(index, segments, work);
          shared_.work_full[slot.slot].arrive();
          next = gridDim.x + atomicAdd(&p_.queue->next, 1);
        }
        index = __shfl_sync(kAllLanes, next, 0);
      }
      shared_.work_full[slot.slot].wait(slot.parity);
      if (work.head < 0) break;
      for (int32_t tile = 0; tile < work.segment.key_tiles; ++tile) {
        load_tile(work.segment, work.head, tile * kKeyGroups);
      }
      __syncwarp();
      if (lane_ == 0) shared_.work_empty[slot.slot].arrive();
    }
    finish_copies<0>();
  }

 private:
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kCopyRows = kWarpgroup / kChunks;  // rows that the warpgroup copies at once
  static constexpr int kQueryCopies = kQueryGroups / kCopyRows;
  static constexpr int kKeyCopies = kKeyGroups / kCopyRows;
  static constexpr int kWarpRows = 32 / kChunks;
  static constexpr int kWarpGroups = kWarpRows * kKeyCopies;  // key groups that a warp copies
  static_assert(kWarpGroups % 32 == 0);
  static_assert(kCopyRows % 8 == 0, "the swizzle of a thread's rows is the same");

  // Unit `index`. A KV head whose units keep all SMs busy is worked off before the next, so that its keys are read from
  // L2; else long units go first, whatever their head. Segments are in order, longest first.
  __device__ void hand_out(int32_t index, int32_t segments, Work& work) const {
    const int64_t per_kv_head = int64_t{segments} * p_.heads_per_kv_head;
    if (index >= int64_t{segments} * p_.num_heads) {
      work.head = -1;
      return;
    }
    int32_t segment, head;
    if (per_kv_head >= gridDim.x) {
      const int32_t kv_head = static_cast<int32_t>(index / per_kv_head);
      const int32_t rest = static_cast<int32_t>(index - kv_head * per_kv_head);
      segment = rest / p_.heads_per_kv_head;
      head = kv_head * p_.heads_per_kv_head + rest - segment * p_.heads_per_kv_head;
    } else {
      segment = index / p_.num_heads;
      head = index - segment * p_.num_heads;
    }
    work.segment = p_.segments[segment];
    work.head = head;
  }

  // All steps of one output tile.
  __device__ void load_tile(const Segment& segment, int32_t head, int32_t first_group) {
    const int32_t stride = p_.stride, shift = p_.stride_shift;
    const int32_t kv_head = head / p_.heads_per_kv_head;
    const int32_t key_batch = p_.keys_packed ? 0 : segment.sequence;
    const int32_t first_key = segment.key_token + (first_group << shift);  // if not paged
    const int32_t* pages = p_.block_table + segment.sequence * p_.block_table_stride;

    // Groups of the view from token T on are whole up to its last whole group, counted from T's own phase.
    const auto groups_end = [&](int32_t token, int32_t groups) { return ((token + stride - 1) >> shift) + groups; };
    const bool q_by_tma = p_.q_by_tma && segment.query_begin <= 0 && segment.query_end >= kQueryGroups << shift &&
                          groups_end(segment.query_token, kQueryGroups) <= p_.q_groups;
    const bool k_by_tma = p_.k_by_tma && (first_group + kKeyGroups) << shift <= segment.seqlen_k &&
                          (p_.block_table != nullptr || groups_end(first_key, kKeyGroups) <= p_.k_groups);
    const int32_t boxes = k_by_tma ? kKeyGroups / p_.box_rows : 0;
    const uint32_t bytes = (q_by_tma ? kQueryBytes : 0) + (k_by_tma ? kKeyBytes : 0);

    // This lane's box of keys.
    int32_t box_token = first_key, box_batch = key_batch;
    if (p_.block_table != nullptr && lane_ < boxes) {
      int page;
      p_.page_size(page, box_token, (first_group + lane_ * p_.box_rows) << shift);
      box_batch = __ldg(pages + page);
    }

    const uint16_t* query = p_.q + segment.query_batch * p_.q_batch_stride + head * p_.q_head_stride +
                            (int64_t{segment.query_token} + row_ * stride) * p_.q_token_stride + column();
    const uint16_t* key = p_.k + kv_head * p_.k_head_stride + column();
    const bool paged = p_.block_table != nullptr;
    const Keys keys{pages, paged ? 0 : key_batch * p_.k_batch_stride + int64_t{segment.key_token} * p_.k_token_stride,
                    first_group, segment.seqlen_k};

    for (int32_t t = 0; t < stride; ++t) {
      const int32_t query_t = Config::kRule == Rule::kFlat ? t : stride - 1 - t;
      if (!k_by_tma && (t == 0 || p_.groups_cross_pages)) locate_keys(keys, t);
      for (int32_t half = 0; half < p_.halves; ++half) {
        const int s = slot_.slot;
        Mbarrier& full = shared_.full[s];
        shared_.empty[s].wait(slot_.parity ^ 1);
        if (warp_ == 0) {
          if (lane_ == 0) full.arrive_expect(bytes);
          __syncwarp();
          if (lane_ < boxes) {
            const int32_t token = box_token + t;
            load_box(p_.k_map, full, shared_.key[s] + lane_ * p_.box_rows * kRowBytes,
                     cute::TMA::CacheHintSm90::EVICT_LAST, half, token, kv_head, box_batch);
          }
          if (q_by_tma && lane_ == 0) {
            load_box(p_.q_map, full, shared_.query[s], cute::TMA::CacheHintSm90::EVICT_NORMAL, half,
                     segment.query_token + query_t, head, segment.query_batch);
          }
          __syncwarp();
        }
        if (!q_by_tma) copy_queries(segment, query, query_t, half, s);
        if (!k_by_tma) copy_keys(keys, key, t, half, s);
        if (q_by_tma && k_by_tma) {
          finish_copies<0>();
          if (lane_ == 0) full.arrive();
        } else {
          copy_async_commit();
          finish_copies<1>();
          copied_slot_ = s;
        }
        slot_.advance();
      }
    }
  }

  __device__ void load_box(const CUtensorMap& map, Mbarrier& full, char* target, cute::TMA::CacheHintSm90 hint,
                           int32_t half, int32_t token, int32_t head, int32_t batch) const {
    cute::SM90_TMA_LOAD_5D::copy(&map, &full.state, static_cast<uint64_t>(hint), target, half * kBoxColumns,
                                 token >> p_.stride_shift, token & (p_.stride - 1), head, batch);
  }

  struct Keys {
    const int32_t* pages;
    int64_t start;        // of the sequence, elements; 0 if paged
    int32_t first_group;  // of the tile
    int32_t seqlen;
  };

  // Where the groups that this warp copies begin, elements; or, if they cross pages, would begin if all lay where token t
  // does. Each lane looks up two of them for all.
  __device__ void locate_keys(const Keys& keys, int32_t t) const {
    __syncwarp();  // the last ones have been read
#pragma unroll
    for (int n = 0; n < kWarpGroups / 32; ++n) {
      const int entry = n * 32 + lane_;
      const int row = warp_ * kWarpRows + entry / kKeyCopies + entry % kKeyCopies * kCopyRows;
      const int32_t token = ((keys.first_group + row) << p_.stride_shift) + t;
      int64_t offset = 0;
      if (token < keys.seqlen) {
        int page = 0, place = token;
        if (p_.block_table != nullptr) p_.page_size(page, place, token);
        offset = keys.start + int64_t{place - t} * p_.k_token_stride;
        if (p_.block_table != nullptr) offset += __ldg(keys.pages + page) * p_.k_batch_stride;
      }
      shared_.key_offset[warp_ * kWarpGroups + entry] = offset;
    }
    __syncwarp();
  }

  // Tokens that do not count are not read: their address is one that surely exists.
  __device__ void copy_keys(const Keys& keys, const uint16_t* key, int32_t t, int32_t half, int slot) const {
    const uint32_t target = shared_address(shared_.key[slot]) + target_;
    const uint16_t* source = key + t * p_.k_token_stride + half * kBoxColumns;
    const int64_t* offsets = shared_.key_offset + row_ * kKeyCopies;
    const int32_t first = ((keys.first_group + row_) << p_.stride_shift) + t;
#pragma unroll
    for (int i = 0; i < kKeyCopies; ++i) {
      const bool valid = first + (i * kCopyRows << p_.stride_shift) < keys.seqlen;
      copy_async(target + i * (kCopyRows * kRowBytes), valid ? source + offsets[i] : p_.k, valid);
    }
  }

  __device__ void copy_queries(const Segment& segment, const uint16_t* query, int32_t t, int32_t half, int slot) const {
    const uint32_t target = shared_address(shared_.query[slot]) + target_;
    const uint16_t* source = query + t * p_.q_token_stride + half * kBoxColumns;
    const int64_t step = (kCopyRows * p_.q_token_stride) << p_.stride_shift;
#pragma unroll
    for (int i = 0; i < kQueryCopies; ++i) {
      const int32_t token = ((row_ + i * kCopyRows) << p_.stride_shift) + t;
      const bool valid = token >= segment.query_begin && token < segment.query_end;
      copy_async(target + i * (kCopyRows * kRowBytes), valid ? source + i * step : p_.q, valid);
    }
  }

  // Hands over the slot that was copied to last, once its copies have landed; kLater groups were issued since.
  template <int kLater>
  __device__ void finish_copies() {
    if (copied_slot_ < 0) return;
    copy_async_wait<kLater>();
    fence_async_proxy();
    __syncwarp();
    if (lane_ == 0) shared_.full[copied_slot_].arrive();
    copied_slot_ = -1;
  }

  __device__ int32_t column() const { return threadIdx.x % kChunks * 8; }

  SharedStorage& shared_;
  const KernelParams& p_;
  const int warp_;
  const int lane_;
  const int row_;          // first row that this thread copies
  const uint32_t target_;  // and where, in the slot
  RingPosition<kStages> slot_;
  int copied_slot_ = -1;  // whose copies by this warp may still be under way
};

}  // namespace bsfa::cuda::select::strided
