// Attention on CUDA: from AttentionParams to the kernel that fits.
#include <algorithm>
#include <array>
#include <new>
#include <type_traits>

#include "../common/key_boxes.h"
#include "../common/schedule.h"
#include "bsfa/cuda.h"
#include "sm90/config.h"
#include "sm90/launch.h"

namespace bsfa::cuda {
namespace {

constexpr int kSortedPairs = 8;  // of a CTA, at the end of natural order
// Tiles of more than 1 / n of a CTA's share of all blocks are long (Tiling::long_share).
constexpr int kFewLong = 8, kManyLong = 64;

using attn::sm90::KernelParams;
using attn::sm90::kGroupRows;
using attn::sm90::kStoreRows;
using attn::sm90::Variant;

TensorExtent extent_of(const TensorView& view, int64_t dim, int64_t heads) {
  return {dim, view.tokens, heads, view.batch_size};
}

cudaError_t make_maps(const AttentionParams& params, Variant variant, KernelParams& k) {
  const Problem& p = params.problem;
  const TensorExtent q = extent_of(params.q, p.head_dim, p.num_q_heads);
  const TensorExtent out = extent_of(params.out, p.head_dim_v, p.num_q_heads);
  const int pieces = p.head_dim / kBoxColumns, value_pieces = p.head_dim_v / kBoxColumns;
  const bool whole = k.box_rows == kBlockKeys;
  cudaError_t error = make_tensor_map(&k.q, params.q, q, p.dtype, kTileRows, pieces);
  k.tokens = k.q;  // prefetched also where it is not used
  k.store_by_tma = tensor_map_fits(params.out, out);
  if (error == cudaSuccess) {
    error = k.store_by_tma ? make_tensor_map(&k.out, params.out, out, p.dtype, kStoreRows, 1) : cudaSuccess;
  }
  if (!k.store_by_tma) k.out = k.q;  // never used, but prefetched
  if (variant == Variant::kPages) {
    if (error == cudaSuccess) {
      error = make_page_map(&k.k, params.k, extent_of(params.k, p.head_dim, p.num_kv_heads), p.dtype, k.box_rows);
    }
    if (error == cudaSuccess) {
      error = make_page_map(&k.v, params.v, extent_of(params.v, p.head_dim_v, p.num_kv_heads), p.dtype, k.box_rows);
    }
    return error;
  }
  // Without keys nothing is fetched; the descriptors still have to be valid.
  const bool no_keys = params.k.tokens == 0 || params.k.batch_size == 0;
  const TensorView& key = no_keys ? params.q : params.k;
  const TensorView& value = no_keys ? params.q : params.v;
  const TensorExtent keys = no_keys ? q : extent_of(params.k, p.head_dim, p.num_kv_heads);
  const TensorExtent values = no_keys ? q : extent_of(params.v, p.head_dim_v, p.num_kv_heads);
  if (error == cudaSuccess) error = make_tensor_map(&k.k, key, keys, p.dtype, k.box_rows, whole ? pieces : 1);
  if (error == cudaSuccess) error = make_tensor_map(&k.v, value, values, p.dtype, k.box_rows, whole ? value_pieces : 1);
  if (error == cudaSuccess && params.token_words != nullptr) {
    // Rows lie as those of q do. Words past the last one of a row read as zeros: tokens that the mask does not name.
    error = make_word_map(&k.tokens, reinterpret_cast<const uint32_t*>(params.token_words),
                          ceil_div(p.kv.max_seqlen, 32), params.token_row_stride, params.token_batch_stride,
                          params.q.tokens, params.q.batch_size, kTileRows);
  }
  return error;
}

// The means lie like keys whose tokens are blocks.
cudaError_t make_mean_maps(const AttentionParams& params, Variant variant, KernelParams& k) {
  const Problem& p = params.problem;
  const int64_t blocks = ceil_div(p.kv.max_seqlen, kBlockKeys);
  k.has_means = params.words != nullptr && params.k_means != nullptr && params.v_means != nullptr && blocks > 0 &&
                p.batch > 0 && params.window_left < 0;
  k.k_means = k.v_means = k.q;  // never used, but prefetched
  if (!k.has_means) return cudaSuccess;
  const int32_t rows = variant == Variant::kPages ? kGroupRows : kBlockKeys;
  const auto make = [&](CUtensorMap* map, const void* means, int32_t dim) {
    const int64_t row = int64_t{p.num_kv_heads} * dim;
    const TensorView view{const_cast<void*>(means), blocks * row, row, dim, p.batch, blocks};
    return make_tensor_map(map, view, extent_of(view, dim, p.num_kv_heads), p.dtype, rows, dim / kBoxColumns);
  };
  const cudaError_t error = make(&k.k_means, params.k_means, p.head_dim);
  return error != cudaSuccess ? error : make(&k.v_means, params.v_means, p.head_dim_v);
}

void set_skip(const AttentionParams& params, KernelParams& k) {
  const SkipParams& skip = params.skip;
  k.skip.thresholds = skip.thresholds;
  k.skip.columns = skip.columns;
  k.skip.sink_blocks = skip.sink_blocks;
  k.skip.window_blocks = skip.window_blocks;
  k.skip.relative = skip.form == SkipForm::kRelative;
  k.skip.counted = skip.counted;
  k.skip.counts = reinterpret_cast<unsigned long long*>(skip.counts);
  k.skip.unit = kLog2e * k.scale.inverse_scale_log2;
}

struct HeadPieces {
  int32_t k, v;
};

// Of pages that come in boxes of whole groups of rows, with all columns; below 0 where they cannot. At head_dim 64
// boxes are that anyway.
HeadPieces head_pieces_of(const AttentionParams& params) {
  const Problem& p = params.problem;
  if (p.kv.block_table == nullptr || p.head_dim != 128 || p.head_dim_v != 128) return {-1, -1};
  return {page_map_head_pieces(params.k, extent_of(params.k, p.head_dim, p.num_kv_heads)),
          page_map_head_pieces(params.v, extent_of(params.v, p.head_dim_v, p.num_kv_heads))};
}

// But for pages, which have another kernel only.
Variant work_of(const AttentionParams& params) {
  if (params.skip.form != SkipForm::kNone) return Variant::kSkip;
  return params.token_words != nullptr ? Variant::kTokens : Variant::kPlain;
}

int ctas_of_sm(const AttentionParams& params) {
  return attn::sm90::ctas_per_sm(params.problem.head_dim, work_of(params));
}

Tiling tiling_of(const AttentionParams& params, int workers) {
  const Problem& p = params.problem;
  Tiling tiling{p, params.num_rows, p.num_q_heads, p.num_q_heads / p.num_kv_heads, params.window_left, params.words};
  tiling.counts = params.window_left < 0 ? params.counts : nullptr;
  tiling.mask_heads = params.mask_heads;
  tiling.num_words = params.num_words;
  tiling.taken_late = true;
  // A mask, in which the last tiles of natural order need not be short ones, has these sorted. That leaves as much as
  // possible in natural order, where the keys at work are few enough for L2: only tiles that are out of proportion go
  // first. Where it makes no difference, or CTAs share an SM and a tile takes longer, much shorter ones do, too.
  if (params.words != nullptr && !keeps_in_step(tiling)) tiling.sorted_end = kSortedPairs * workers;
  const bool in_order = tiling.sorted_end > 0 && ctas_of_sm(params) == 1;
  tiling.long_share = in_order ? kFewLong : kManyLong;
  return tiling;
}

using Launch = decltype(&attn::sm90::launch_bf16_d64);

// The kernel of a variant; null: there is none.
Launch launch_of(const Problem& p, Variant variant) {
  using namespace attn::sm90;
  const auto of_dtype = [&](Launch bf16, Launch fp16) { return p.dtype == DType::kBFloat16 ? bf16 : fp16; };
  const auto of_dim = [&](Launch d64, Launch d128, Launch d192) {
    return p.head_dim == 64 ? d64 : p.head_dim == 128 ? d128 : d192;
  };
  switch (variant) {
    case Variant::kPlain:
      return of_dtype(of_dim(launch_bf16_d64, launch_bf16_d128, launch_bf16_d192),
                      of_dim(launch_fp16_d64, launch_fp16_d128, launch_fp16_d192));
    case Variant::kSkip:
      return of_dtype(of_dim(launch_skip_bf16_d64, launch_skip_bf16_d128, nullptr),
                      of_dim(launch_skip_fp16_d64, launch_skip_fp16_d128, nullptr));
    case Variant::kTokens:
      return of_dtype(of_dim(launch_tokens_bf16_d64, launch_tokens_bf16_d128, launch_tokens_bf16_d192),
                      of_dim(launch_tokens_fp16_d64, launch_tokens_fp16_d128, launch_tokens_fp16_d192));
    case Variant::kPages:
      return of_dtype(launch_pages_bf16_d128, launch_pages_fp16_d128);
  }
  return nullptr;
}

// What an AttentionCall holds.
struct Call {
  KernelParams k{};         // but for the workspace, where one is wanted
  Tiling tiling;            // what is to be ordered
  KnownOrder order;         // of the tiling; without pairs: not known
  Launch launch = nullptr;  // null: nothing to do
  int64_t workspace_bytes = 0;
  int workers = 0;  // CTAs that run at a time
  int ctas = 0;
  int device = 0;
  bool moves = false;              // q, k, v and out are all that the kernel touches
  std::array<void*, 4> data = {};  // theirs
};
static_assert(std::is_trivially_copyable_v<Call> && sizeof(Call) <= sizeof(AttentionCall) &&
              alignof(Call) <= alignof(AttentionCall));

Call& call_of(AttentionCall& prepared) { return *std::launder(reinterpret_cast<Call*>(prepared.memory)); }
const Call& call_of(const AttentionCall& prepared) {
  return *std::launder(reinterpret_cast<const Call*>(prepared.memory));
}

}  // namespace

bool attention_supports(const Problem& p) {
  const bool dims =
      p.head_dim == p.head_dim_v ? p.head_dim == 64 || p.head_dim == 128 : p.head_dim == 192 && p.head_dim_v == 128;
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && dims && p.block_m == kTileRows &&
         p.block_n == kBlockKeys;
}

cudaError_t prepare_attention(const AttentionParams& params, AttentionCall* prepared) {
  Call& c = *new (prepared->memory) Call{};
  const Problem& p = params.problem;
  const int64_t pairs = params.num_rows * p.num_q_heads;
  if (pairs == 0) return cudaSuccess;
  if (!attention_supports(p) || params.num_rows > INT32_MAX || pairs > INT32_MAX) return cudaErrorInvalidValue;
  const bool skips = params.skip.form != SkipForm::kNone;
  const bool tokens = params.token_words != nullptr;
  if ((skips || tokens) && (params.window_left >= 0 || params.k_means != nullptr)) return cudaErrorInvalidValue;
  if (skips && (tokens || p.head_dim == 192)) return cudaErrorInvalidValue;

  cudaError_t error = cudaGetDevice(&c.device);
  if (error == cudaSuccess) error = num_sms(&c.workers);
  if (error != cudaSuccess) return error;
  c.workers *= ctas_of_sm(params);
  c.ctas = static_cast<int>(std::min<int64_t>(c.workers, pairs));
  c.tiling = tiling_of(params, c.workers);
  c.order = order_of(c.tiling, c.workers);
  KernelParams& k = c.k;
  // An order that is known without the device, of tiles so few that they can be dealt out beforehand.
  const bool dealt =
      params.words == nullptr && !tokens && !skips && c.order.total > 0 && c.order.total <= 2 * c.workers;
  if (dealt) {
    k.known = c.order;
  } else if (params.words != nullptr && p.kv.block_table == nullptr) {
    // Not over pages, whose table is read through L1, where it may be older than what the kernels before wrote.
    k.known = first_pairs(c.tiling, c.ctas);
    c.tiling.first = k.known.total;
  }
  c.workspace_bytes = dealt ? 0 : Workspace::bytes(params.num_rows, p.num_q_heads);
  k.num_rows = static_cast<int32_t>(params.num_rows);
  k.words = params.words;
  k.num_words = params.num_words;
  k.mask_heads = params.mask_heads;
  k.heads_per_mask_head = params.words != nullptr ? p.num_q_heads / params.mask_heads : 1;
  k.heads_per_kv_head = p.num_q_heads / p.num_kv_heads;
  k.causal = p.causal;
  k.window_left = params.window_left;
  set_key_boxes(p.kv, k);
  k.tails_are_zero = p.kv.block_table == nullptr && p.kv.cu_seqlens == nullptr;
  k.scale = logit_scale(p);
  k.out_data = params.out.data;
  k.out_batch_stride = params.out.batch_stride;
  k.out_token_stride = params.out.token_stride;
  k.out_head_stride = params.out.head_stride;
  if (skips) set_skip(params, k);
  k.lse = params.lse;
  k.lse_batch_stride = params.lse_batch_stride;
  k.lse_head_stride = params.lse_head_stride;

  Variant variant = work_of(params);
  const HeadPieces pieces = head_pieces_of(params);
  if (variant == Variant::kPlain && pieces.k >= 0 && pieces.v >= 0) {
    variant = Variant::kPages;
    k.k_head_pieces = pieces.k;
    k.v_head_pieces = pieces.v;
  }
  error = make_maps(params, variant, k);
  if (error == cudaSuccess) error = make_mean_maps(params, variant, k);
  if (error != cudaSuccess) return error;
  c.moves = dealt && k.store_by_tma && k.lse == nullptr && params.k.tokens > 0 && params.k.batch_size > 0;
  c.data = {params.q.data, params.k.data, params.v.data, params.out.data};
  c.launch = launch_of(p, variant);
  return c.launch != nullptr ? cudaSuccess : cudaErrorInvalidValue;
}

int64_t attention_workspace_bytes(const AttentionCall& prepared) { return call_of(prepared).workspace_bytes; }

cudaError_t run_attention(AttentionCall& prepared, void* workspace, cudaStream_t stream) {
  Call& c = call_of(prepared);
  if (c.launch == nullptr) return cudaSuccess;
  if (c.workspace_bytes > 0) {
    c.k.workspace = Workspace::in(workspace, c.tiling.num_rows, c.tiling.heads);
    const cudaError_t error = make_order(c.tiling, c.order, c.k.workspace, c.workers, stream);
    if (error != cudaSuccess) return error;
  }
  return c.launch(c.k, c.ctas, stream);
}

bool attention_moves(const AttentionCall& prepared) { return call_of(prepared).moves; }

cudaError_t move_attention(AttentionCall& prepared, void* q, void* k, void* v, void* out) {
  Call& c = call_of(prepared);
  int device = 0;
  cudaError_t error = c.moves ? cudaGetDevice(&device) : cudaErrorInvalidValue;
  if (error == cudaSuccess && device != c.device) error = cudaErrorInvalidDevice;
  const std::array<CUtensorMap*, 4> maps = {&c.k.q, &c.k.k, &c.k.v, &c.k.out};
  const std::array<void*, 4> data = {q, k, v, out};
  for (size_t i = 0; i < maps.size() && error == cudaSuccess; ++i) {
    if (data[i] != c.data[i]) error = move_tensor_map(maps[i], data[i]);
  }
  c.data = data;
  c.k.out_data = out;
  return error;
}

}  // namespace bsfa::cuda
