// What both kinds of consumers (compute.h, skip_compute.h) multiply: queries, keys and values in shared memory as a warpgroup
// sees them, and probabilities in registers.
#pragma once

#include "config.h"
#include "softmax.h"
#include "store.h"

namespace bsfa::cuda::attn::sm90 {

// Fragments of all query slots, key slots and value slots; the slot is their last mode.
template <class Config>
__device__ __forceinline__ auto operand_parts(SharedStorage<Config>& shared, int thread) {
  using namespace cute;
  using Element = typename Config::Element;
  const auto tile_of = [](char* p, auto layout) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(p)), layout);
  };
  const auto staged = [](auto layout, auto stages) {
    return tile_to_shape(layout, make_shape(size<0>(layout), size<1>(layout), stages));
  };
  const auto query = tile_of(shared.query[0], staged(typename Config::RowsLayout{}, Int<Config::kQuerySlots>{}));
  const auto key = tile_of(shared.key[0], staged(typename Config::RowsLayout{}, Int<Config::kKeySlots>{}));
  const auto value = tile_of(shared.value[0], staged(typename Config::ColumnsLayout{}, Int<Config::kValueSlots>{}));
  const auto score_slice = typename Config::ScoreMma{}.get_thread_slice(thread);
  const auto output_slice = typename Config::OutputMma{}.get_thread_slice(thread);
  return make_tuple(score_slice.partition_fragment_A(query), score_slice.partition_fragment_B(key),
                    output_slice.partition_fragment_B(value));
}

// The scores' registers, in their order, are the left operand of the second product. (A second set, filled while the
// tensor cores still read the first, makes the assembler serialise all products: C7513.)
template <class Element>
__device__ __forceinline__ auto make_probabilities() {
  using namespace cute;
  auto probabilities = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kBlockKeys / 16>>>{});
  static_assert(size(decltype(probabilities){}) == kScores);
  return probabilities;
}

template <class Scores, class Probabilities>
__device__ __forceinline__ void convert(const Scores& s, Probabilities& probabilities) {
  auto pairs = cute::recast<uint32_t>(probabilities);
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    pairs(i) = pack<typename Probabilities::value_type>(s(2 * i), s(2 * i + 1));
  }
}

}  // namespace bsfa::cuda::attn::sm90
