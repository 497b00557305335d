// The consumers: two warpgroups, 64 query groups x 256 key groups each, over one stream of steps.
//
// A step's four products m64n256k16 are issued back to back, and the slot of the step before is released when they are
// alone under way. At the end of an output tile the warpgroup waits for all of them and applies the rule (rules.h); it
// shares no barrier with the other warpgroup, which meanwhile has the tensor cores for what lies in the ring.
#pragma once

#include "../../common/mma.h"
#include "config.h"
#include "rules.h"

namespace bsfa::cuda::select::strided {

template <class Config>
class Consumer {
  using Element = typename Config::Element;
  using Rule = std::conditional_t<Config::kFlat, FlatRule, AntidiagonalRule>;

 public:
  __device__ Consumer(SharedStorage& shared, const KernelParams& p)
      : shared_(shared),
        p_(p),
        thread_(threadIdx.x - kWarpgroup),
        warp_(__shfl_sync(kAllLanes, thread_ / 32, 0)),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    using namespace cute;
    typename Config::Mma mma;
    const auto query = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(shared_.query[0])),
                                   typename Config::template Rows<kQueryGroups>{});
    const auto key = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(shared_.key[0])),
                                 typename Config::template Rows<kKeyGroups>{});
    const auto slice = mma.get_thread_slice(thread_);
    const auto query_part = slice.partition_fragment_A(query);
    const auto key_part = slice.partition_fragment_B(key);

    const auto multiply = [&](auto& s, bool accumulate) __attribute__((always_inline)) {
      shared_.full[slot_.slot].wait(slot_.parity);
      issue(mma, query_part(_, _, _, slot_.slot), key_part(_, _, _, slot_.slot), s, accumulate);
    };

    const int32_t steps = p_.halves << p_.stride_shift;
    for (;;) {
      const Unit unit = next_unit();
      if (unit.head < 0) return;
      Rule rule(p_, unit);
      for (int32_t tile = 0; tile < unit.segment.key_tiles; ++tile) {
        // New registers for each tile: the old ones need not live through the rule.
        auto s = partition_fragment_C(mma, Shape<Int<kQueryGroups>, Int<kKeyGroups>>{});
        static_assert(size(decltype(s){}) == 4 * kColumnTiles);
        multiply(s, false);
        int before = slot_.slot;
        slot_.advance();
#pragma unroll 1
        for (int32_t step = 1; step < steps; ++step) {
          multiply(s, true);
          warpgroup_wait<1>();
          release(before);
          before = slot_.slot;
          slot_.advance();
        }
        warpgroup_wait<0>();
        warpgroup_fence_operand(s);
        release(before);
        rule.take(s, p_, unit, tile);
      }
      rule.finish(p_, unit);
      __syncwarp();
      if (lane_ == 0) shared_.work_empty[work_.slot].arrive();
      work_.advance();
    }
  }

 private:
  __device__ Unit next_unit() const {
    shared_.work_full[work_.slot].wait(work_.parity);
    const Work& work = shared_.work[work_.slot];
    return {work.segment, __shfl_sync(kAllLanes, work.head, 0), warp_ / 4, warp_ % 4, lane_};
  }

  __device__ void release(int slot) const {
    if (lane_ == 0) shared_.empty[slot].arrive();
  }

  SharedStorage& shared_;
  const KernelParams& p_;
  const int thread_;
  const int warp_;
  const int lane_;
  RingPosition<kStages> slot_;
  RingPosition<kWorkSlots> work_;
};

}  // namespace bsfa::cuda::select::strided
