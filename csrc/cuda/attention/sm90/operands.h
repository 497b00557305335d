// What both kinds of consumers (compute.h, skip_compute.h) multiply: queries, keys and values in shared memory as a
// warpgroup sees them, and probabilities in registers.
#pragma once

#include "config.h"
#include "softmax.h"
#include "store.h"

namespace bsfa::cuda::attn::sm90 {

// Fragments of all query slots, and of the parts of all key slots and value slots; which one is their last mode. In a
// pool any slot may hold either. `thread`: any one of the warpgroup.
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
  using QueryLayout = typename Config::template RowsLayout<kTileRows, false>;
  using KeyLayout = typename Config::template RowsLayout<Config::kScoreKeys, Config::kPages>;
  constexpr int kParts = kBlockKeys / Config::kScoreKeys;  // of a slot; where there are several, they lie in a row
  static_assert(kParts == 1 || (Config::Keys::kPieces == 1 && Config::Values::kPieces == 1));
  const auto value =
      tile_of(shared.value[0], staged(typename Config::ColumnsLayout{}, Int<kParts * Config::kValueSlots>{}));
  const auto score_slice = typename Config::ScoreMma{}.get_thread_slice(thread);
  const auto output_slice = typename Config::OutputMma{}.get_thread_slice(thread);
  const auto fragments = [&](char* queries, auto query_slots) {
    constexpr int kKeyTiles = SharedStorage<Config>::kKeyTiles;
    const auto query = tile_of(queries, staged(QueryLayout{}, query_slots));
    const auto key = tile_of(shared.key[0], staged(KeyLayout{}, Int<kParts * kKeyTiles>{}));
    return make_tuple(score_slice.partition_fragment_A(query), score_slice.partition_fragment_B(key),
                      output_slice.partition_fragment_B(value));
  };
  if constexpr (Config::kPool) {
    return fragments(shared.key[0], Int<kPoolSlots>{});
  } else {
    return fragments(shared.query[0], Int<Config::kQuerySlots>{});
  }
}

// The scores' registers, in their order, are the left operand of the second product. (A second set, filled while the
// tensor cores still read the first, makes the assembler serialise all products: C7513.)
template <class Config>
__device__ __forceinline__ auto make_probabilities() {
  using namespace cute;
  using Fragment = Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kScoreKeys / 16>>>;
  return make_tensor<typename Config::Element>(Fragment{});
}

// As many, packed in pairs.
template <class Config>
using PackedScores = decltype(cute::make_tensor<uint32_t>(cute::Int<Config::kScoreKeys / 4>{}));

template <class Scores, class Probabilities>
__device__ __forceinline__ void convert(const Scores& s, Probabilities& probabilities) {
  auto pairs = cute::recast<uint32_t>(probabilities);
  pack_all<typename Probabilities::value_type>(s, pairs);
}

}  // namespace bsfa::cuda::attn::sm90
