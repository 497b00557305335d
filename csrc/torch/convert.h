// From torch tensors (stable ABI) to bsfa's parameter structs, with the checks that memory safety needs. Friendly
// messages come earlier, from Python; these guard the raw operators.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "bsfa/geometry.h"
#include "bsfa/params.h"

namespace bsfa::torch_ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline DType to_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

inline int32_t to_int32(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, " = ", value, " is out of range");
  return static_cast<int32_t>(value);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      STD_TORCH_CHECK(false, "no operator makes tensors of this dtype");
  }
  return 0;
}

// Contiguous, on the device of `like`. Not by torch::stable::new_empty, which finds aten::new_empty by its name each
// time and packs its arguments: several times the work.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  constexpr size_t kMostDims = 4;
  STD_TORCH_CHECK(sizes.size() <= kMostDims, "at most 4 dimensions");
  int64_t strides[kMostDims], step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  int32_t device_type = 0;
  STD_TORCH_CHECK(aoti_torch_get_device_type(like.get(), &device_type) == 0, "torch gave no device type");
  AtenTensorHandle made = nullptr;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype_code(type),
                                           device_type, like.get_device_index(), &made) == 0,
                  "torch could not allocate a tensor");
  return Tensor(made);
}

// An int32 vector or matrix of indices; null when absent.
inline const int32_t* index_ptr(const OptionalTensor& t, int64_t dim, int64_t size0, const Tensor& like,
                                const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int, name, " must be int32");
  STD_TORCH_CHECK(t->dim() == dim, name, " must have ", dim, " dimensions");
  STD_TORCH_CHECK(size0 < 0 || t->size(0) == size0, name, " must have size ", size0, " in dimension 0");
  STD_TORCH_CHECK(same_device(*t, like), name, " must be on the same device as the data");
  STD_TORCH_CHECK(t->size(dim - 1) <= 1 || t->stride(dim - 1) == 1, name, " must be contiguous in its last dimension");
  return static_cast<const int32_t*>(t->data_ptr());
}

// [B or pages, tokens, heads, dim], or packed [tokens, heads, dim].
inline TensorView view_of(const Tensor& t, const char* name) {
  const int64_t d = t.dim();
  STD_TORCH_CHECK(d == 3 || d == 4, name, " must have 3 (packed) or 4 dimensions");
  STD_TORCH_CHECK(t.size(d - 1) <= 1 || t.stride(d - 1) == 1, name, " must have unit stride in its last dimension");
  TensorView v;
  v.data = t.data_ptr();
  v.batch_stride = d == 4 ? t.stride(0) : 0;
  v.token_stride = t.stride(d - 3);
  v.head_stride = t.stride(d - 2);
  v.batch_size = d == 4 ? t.size(0) : 1;
  v.tokens = t.size(d - 3);
  return v;
}

inline int64_t batch_of_kv(const Tensor& k, const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table) {
  if (block_table.has_value()) return block_table->size(0);
  if (cu_seqlens_k.has_value()) return cu_seqlens_k->size(0) - 1;
  return k.size(0);
}

inline KvLayout kv_layout(const Tensor& k, const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                          const OptionalTensor& seqlens_k, int64_t max_seqlen_k) {
  const int64_t batch = batch_of_kv(k, cu_seqlens_k, block_table);
  KvLayout kv;
  kv.max_seqlen = to_int32(max_seqlen_k, "max_seqlen_k");
  if (block_table.has_value()) {
    STD_TORCH_CHECK(k.dim() == 4 && seqlens_k.has_value() && !cu_seqlens_k.has_value(),
                    "a block_table needs k [pages, page_size, heads, dim] and seqlens_k, and no cu_seqlens_k");
    kv.block_table = index_ptr(block_table, 2, batch, k, "block_table");
    kv.block_table_stride = block_table->stride(0);
    kv.seqlens = index_ptr(seqlens_k, 1, batch, k, "seqlens_k");
    kv.page_size = to_int32(k.size(1), "page_size");
    STD_TORCH_CHECK(kv.page_size > 0, "page_size must be positive");
    STD_TORCH_CHECK(max_seqlen_k <= block_table->size(1) * k.size(1), "block_table has too few pages for max_seqlen_k");
  } else if (cu_seqlens_k.has_value()) {
    STD_TORCH_CHECK(k.dim() == 3 && !seqlens_k.has_value(), "cu_seqlens_k needs packed k [total, heads, dim]");
    kv.cu_seqlens = index_ptr(cu_seqlens_k, 1, -1, k, "cu_seqlens_k");
  } else {
    STD_TORCH_CHECK(k.dim() == 4 && !seqlens_k.has_value(), "batched k must be [batch, seqlen, heads, dim]");
    STD_TORCH_CHECK(max_seqlen_k == k.size(1), "max_seqlen_k must be k.size(1) for batched k");
  }
  return kv;
}

// Keys of which only the lengths count.
inline KvLayout kv_lengths(const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqlens_k, int64_t max_seqlen_k,
                           int64_t batch, const Tensor& like) {
  STD_TORCH_CHECK(!(cu_seqlens_k.has_value() && seqlens_k.has_value()), "give cu_seqlens_k or seqlens_k, not both");
  KvLayout kv;
  kv.max_seqlen = to_int32(max_seqlen_k, "max_seqlen_k");
  kv.cu_seqlens = index_ptr(cu_seqlens_k, 1, batch + 1, like, "cu_seqlens_k");
  kv.seqlens = index_ptr(seqlens_k, 1, batch, like, "seqlens_k");
  return kv;
}

inline void check_keys(const Tensor& k, const Tensor& q) {
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && same_device(k, q), "q and k differ in dtype or device");
  STD_TORCH_CHECK(k.size(k.dim() - 1) == q.size(q.dim() - 1), "q and k differ in head_dim");
}

inline void set_block_sizes(Problem& p, int64_t block_m, int64_t block_n) {
  STD_TORCH_CHECK(block_m >= 1 && block_m <= 4096 && block_n >= 1 && block_n <= 4096,
                  "block_m and block_n must be 1 .. 4096");
  p.block_m = static_cast<int32_t>(block_m);
  p.block_n = static_cast<int32_t>(block_n);
}

// The side of the queries, and what all operations share. `num_kv_heads` and `batch` come from k or from the summary.
inline Problem make_problem(const Tensor& q, const OptionalTensor& cu_seqlens_q, int64_t batch, int64_t num_kv_heads,
                            int64_t max_seqlen_q, int64_t block_m, int64_t block_n, bool causal, double softmax_scale,
                            double softcap) {
  Problem p;
  p.dtype = to_dtype(q, "q");
  p.batch = to_int32(batch, "batch");
  p.num_q_heads = to_int32(q.size(q.dim() - 2), "query heads");
  p.num_kv_heads = to_int32(num_kv_heads, "KV heads");
  p.head_dim = to_int32(q.size(q.dim() - 1), "head_dim");
  p.head_dim_v = p.head_dim;
  STD_TORCH_CHECK(p.num_kv_heads > 0 && p.num_q_heads > 0 && p.num_q_heads % p.num_kv_heads == 0,
                  "query heads must be a multiple of KV heads");
  STD_TORCH_CHECK(p.head_dim >= 1 && p.head_dim <= 256, "head_dim must be 1 .. 256");
  p.query.max_seqlen = to_int32(max_seqlen_q, "max_seqlen_q");
  if (cu_seqlens_q.has_value()) {
    STD_TORCH_CHECK(q.dim() == 3, "cu_seqlens_q needs packed q [total, heads, dim]");
    p.query.cu_seqlens = index_ptr(cu_seqlens_q, 1, batch + 1, q, "cu_seqlens_q");
  } else {
    STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == batch && q.size(1) == max_seqlen_q,
                    "batched q must be [batch, max_seqlen_q, heads, dim]");
  }
  set_block_sizes(p, block_m, block_n);
  p.causal = causal;
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  return p;
}

// An LSE that lies like q: [B, Hq, Sq], or [Hq, T].
inline Tensor new_lse(const Tensor& q) {
  return q.dim() == 4 ? new_tensor(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float)
                      : new_tensor(q, {q.size(1), q.size(0)}, ScalarType::Float);
}

inline void set_lse_strides(const Tensor& q, int64_t* batch_stride, int64_t* head_stride) {
  const bool batched = q.dim() == 4;
  const int64_t tokens = batched ? q.size(1) : q.size(0);
  *head_stride = tokens;
  *batch_stride = batched ? q.size(2) * tokens : 0;
}

// A contiguous [batch, blocks, KV heads, dim] tensor of what stands for the blocks, in the dtype and on the device
// of q.
inline void check_summary(const Tensor& summary, const Tensor& q, const Problem& problem, int64_t dim,
                          const char* name) {
  STD_TORCH_CHECK(summary.dim() == 4 && summary.is_contiguous() && summary.scalar_type() == q.scalar_type() &&
                      same_device(summary, q),
                  name, " must be contiguous [batch, blocks, KV heads, dim] in q's dtype, on its device");
  const int64_t blocks = ceil_div(problem.kv.max_seqlen, problem.block_n);
  STD_TORCH_CHECK(summary.size(0) == problem.batch && summary.size(1) == blocks &&
                      summary.size(2) == problem.num_kv_heads && summary.size(3) == dim,
                  name, " must be [", problem.batch, ", ", blocks, ", ", problem.num_kv_heads, ", ", dim, "]");
}

// The mask words of each query row, of the layout that AttentionParams asks for.
inline void set_token_words(AttentionParams& p, const Tensor& q, const OptionalTensor& token_words) {
  if (!token_words.has_value()) return;
  const Tensor& w = *token_words;
  const int64_t rank = q.dim() - 1, columns = w.dim() > 0 ? w.size(w.dim() - 1) : 0;
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Int && same_device(w, q), "token_words must be int32 on q's device");
  STD_TORCH_CHECK(w.dim() == rank, "token_words must be [B, seqlen_q, words], or [total_q, words] beside packed q");
  for (int64_t i = 0; i < rank - 1; ++i) STD_TORCH_CHECK(w.size(i) == q.size(i), "token_words must have the rows of q");
  STD_TORCH_CHECK(columns % 4 == 0 && columns >= ceil_div(p.problem.kv.max_seqlen, 32), "token_words has ", columns,
                  " words a row; it needs those of max_seqlen_k, and a multiple of 4");
  STD_TORCH_CHECK(p.k_means == nullptr && p.window_left < 0, "token_words go with neither means nor window_left");
  if (w.numel() == 0) return;  // no rows, or no keys: nothing to hide
  STD_TORCH_CHECK(w.stride(rank - 1) == 1, "token_words must be contiguous in its last dimension");
  p.token_row_stride = w.size(rank - 2) > 1 ? w.stride(rank - 2) : columns;
  p.token_batch_stride = rank == 3 && w.size(0) > 1 ? w.stride(0) : 0;
  STD_TORCH_CHECK(p.token_row_stride % 4 == 0 && p.token_batch_stride % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(w.data_ptr()) % 16 == 0,
                  "the rows of token_words must start at multiples of 16 bytes");
  p.token_words = static_cast<const int32_t*>(w.data_ptr());
}

// What operator attention computes, without its outputs (set_attention_outputs). Values of index tensors are not read.
inline AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                        const OptionalTensor& block_table, const OptionalTensor& seqlens_k,
                                        int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& mask_words,
                                        const OptionalTensor& mask_counts, const OptionalTensor& k_means,
                                        const OptionalTensor& v_means, int64_t block_m, int64_t block_n, bool causal,
                                        double softmax_scale, double softcap, int64_t window_left,
                                        const OptionalTensor& token_words = std::nullopt) {
  AttentionParams p;
  p.q = view_of(q, "q");
  p.k = view_of(k, "k");
  p.v = view_of(v, "v");
  p.problem = make_problem(q, cu_seqlens_q, batch_of_kv(k, cu_seqlens_k, block_table), k.size(k.dim() - 2),
                           max_seqlen_q, block_m, block_n, causal, softmax_scale, softcap);
  p.problem.kv = kv_layout(k, cu_seqlens_k, block_table, seqlens_k, max_seqlen_k);
  p.problem.head_dim_v = to_int32(v.size(v.dim() - 1), "head_dim of v");
  STD_TORCH_CHECK(p.problem.head_dim_v >= 1 && p.problem.head_dim_v <= 256, "head_dim of v must be 1 .. 256");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  STD_TORCH_CHECK(same_device(k, q) && same_device(v, q), "q, k and v must be on one device");
  STD_TORCH_CHECK(k.size(k.dim() - 1) == p.problem.head_dim, "q and k differ in head_dim");
  STD_TORCH_CHECK(v.dim() == k.dim(), "k and v differ in rank");
  for (int64_t i = 0; i < k.dim() - 1; ++i) STD_TORCH_CHECK(v.size(i) == k.size(i), "k and v differ in shape");
  STD_TORCH_CHECK(window_left >= -1, "window_left must be -1 (off) or more");
  STD_TORCH_CHECK(window_left < 0 || causal, "window_left needs causal attention");
  p.window_left = static_cast<int32_t>(std::min<int64_t>(window_left, std::numeric_limits<int32_t>::max()));
  if (mask_words.has_value()) {
    const Tensor& w = *mask_words;
    STD_TORCH_CHECK(w.scalar_type() == ScalarType::Int && w.dim() == 3 && w.is_contiguous() && same_device(w, q),
                    "mask_words must be contiguous int32 [rows, heads, words] on the device of q");
    p.num_rows = w.size(0);
    p.mask_heads = to_int32(w.size(1), "mask heads");
    p.num_words = to_int32(w.size(2), "mask words");
    STD_TORCH_CHECK(
        p.mask_heads == p.problem.num_q_heads || p.mask_heads == p.problem.num_kv_heads || p.mask_heads == 1,
        "the mask has ", p.mask_heads, " heads; it must have as many as q, as k, or 1");
    STD_TORCH_CHECK(p.num_words == ceil_div(ceil_div(p.problem.kv.max_seqlen, p.problem.block_n), 32), "the mask has ",
                    p.num_words, " words a row, not what max_seqlen_k and block_n need");
    STD_TORCH_CHECK(p.num_rows > 0 || q.numel() == 0, "the mask has no rows");  // its null pointer would mean dense
    p.words = static_cast<const int32_t*>(w.data_ptr());
  }
  if (mask_counts.has_value()) {
    const Tensor& c = *mask_counts;
    STD_TORCH_CHECK(mask_words.has_value() && c.scalar_type() == ScalarType::Int && c.dim() == 2 && c.is_contiguous() &&
                        same_device(c, q) && c.size(0) == p.num_rows && c.size(1) == p.mask_heads,
                    "mask_counts must be contiguous int32 [rows, heads] beside mask_words");
    p.counts = static_cast<const int32_t*>(c.data_ptr());
  }
  STD_TORCH_CHECK(k_means.has_value() == v_means.has_value(), "give both k_means and v_means, or neither");
  if (k_means.has_value()) {
    STD_TORCH_CHECK(mask_words.has_value() && window_left < 0, "means need mask_words and no window_left");
    check_summary(*k_means, q, p.problem, p.problem.head_dim, "k_means");
    check_summary(*v_means, q, p.problem, p.problem.head_dim_v, "v_means");
    p.k_means = k_means->data_ptr();
    p.v_means = v_means->data_ptr();
  }
  set_token_words(p, q, token_words);
  return p;
}

template <class Enum>
Enum to_enum(const std::string& name, const char* what, std::initializer_list<std::pair<const char*, Enum>> names) {
  for (const auto& [text, value] : names) {
    if (name == text) return value;
  }
  STD_TORCH_CHECK(false, "unknown ", what, " ", name);
  return Enum{};
}

// A contiguous tensor for what attention of `q` over `v` returns: q's shape with v's head_dim.
inline Tensor new_attention_out(const Tensor& q, const Tensor& v) {
  const int64_t dim = v.size(v.dim() - 1);
  return q.dim() == 4 ? new_tensor(q, {q.size(0), q.size(1), q.size(2), dim}, q.scalar_type())
                      : new_tensor(q, {q.size(0), q.size(1), dim}, q.scalar_type());
}

// What operator dense_attention computes, without its output.
inline AttentionParams dense_params(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                    double softmax_scale, double softcap, const OptionalTensor& cu_seqlens_q,
                                    const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                                    const OptionalTensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  STD_TORCH_CHECK(q.dim() >= 3 && k.dim() >= 3, "q and k must have 3 (packed) or 4 dimensions");
  const bool batched_keys = !cu_seqlens_k.has_value() && !block_table.has_value();
  return attention_params(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k,
                          cu_seqlens_q.has_value() ? max_seqlen_q : q.size(1), batched_keys ? k.size(1) : max_seqlen_k,
                          std::nullopt, std::nullopt, std::nullopt, std::nullopt, 128, 128, causal, softmax_scale,
                          softcap, -1);
}

// Points `p`, made by attention_params, at `out` (any strides, last one 1) and `lse` (new_lse, or none); checks `out`.
inline void set_attention_outputs(AttentionParams& p, const Tensor& q, const Tensor& out, const OptionalTensor& lse) {
  STD_TORCH_CHECK(out.scalar_type() == q.scalar_type(), "out must have the dtype of q");
  STD_TORCH_CHECK(same_device(out, q), "out must be on the device of q");
  STD_TORCH_CHECK(out.dim() == q.dim() && out.size(q.dim() - 1) == p.problem.head_dim_v,
                  "out must have the shape of q with v's head_dim");
  for (int64_t i = 0; i < q.dim() - 1; ++i) {
    STD_TORCH_CHECK(out.size(i) == q.size(i), "out must have the shape of q with v's head_dim");
    STD_TORCH_CHECK(out.size(i) <= 1 || out.stride(i) != 0, "out must not overlap itself (it is expanded)");
  }
  p.out = view_of(out, "out");
  p.lse = lse.has_value() ? static_cast<float*>(lse->data_ptr()) : nullptr;
  set_lse_strides(q, &p.lse_batch_stride, &p.lse_head_stride);
}

}  // namespace bsfa::torch_ops
