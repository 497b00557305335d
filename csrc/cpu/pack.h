// Between tensors and float32 panels: rows of any dtype and layout in, dense panels out, and back.
//
//   pack_keys        tokens [begin, begin + count) of one sequence and KV head -> panel[count][stride] float32. Pages
//                    are looked up here and nowhere else; only tokens of the range are read, so what lies in the tail
//                    of a page, or in table entries past the sequence, is never touched.
//   make_subtiles    query rows of a tile -> groups of kRows, the lanes of the micro-kernel
//   pack_queries     rows of a subtile, times the logit scale -> panel[dim][kRows]; unused lanes are 0
#pragma once

#include "simd.h"

namespace bsfa::cpu::BSFA_ISA {
namespace {

BSFA_INLINE int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

BSFA_INLINE void read_row(DType dtype, const void* source, int32_t count, float* target) {
  int32_t i = 0;
  if (dtype == DType::kFloat32) {
    const float* row = static_cast<const float*>(source);
    for (; i + kLanes <= count; i += kLanes) store(target + i, load(row + i));
    for (; i < count; ++i) target[i] = row[i];
    return;
  }
  const uint16_t* row = static_cast<const uint16_t*>(source);
  if (dtype == DType::kBFloat16) {
    for (; i + kLanes <= count; i += kLanes) store(target + i, widen_bfloat16(load(row + i)));
  } else {
    for (; i + kLanes <= count; i += kLanes) store(target + i, widen_float16(load(row + i)));
  }
  if (i < count) {
    Half rest = {};
    for (int32_t lane = 0; i + lane < count; ++lane) rest[lane] = row[i + lane];
    const Float values = widen(dtype, rest);
    for (int32_t lane = 0; i + lane < count; ++lane) target[i + lane] = values[lane];
  }
}

BSFA_INLINE void write_row(DType dtype, const float* source, int32_t count, void* target) {
  int32_t i = 0;
  if (dtype == DType::kFloat32) {
    float* row = static_cast<float*>(target);
    for (; i < count; ++i) row[i] = source[i];
    return;
  }
  uint16_t* row = static_cast<uint16_t*>(target);
  for (; i + kLanes <= count; i += kLanes) store(row + i, narrow(dtype, load(source + i)));
  if (i < count) {
    Float rest = {};
    for (int32_t lane = 0; i + lane < count; ++lane) rest[lane] = source[i + lane];
    const Half values = narrow(dtype, rest);
    for (int32_t lane = 0; i + lane < count; ++lane) row[i + lane] = values[lane];
  }
}

BSFA_INLINE char* row_address(DType dtype, const TensorView& view, int64_t batch, int64_t token, int32_t head) {
  const int64_t offset = batch * view.batch_stride + token * view.token_stride + head * view.head_stride;
  return static_cast<char*>(view.data) + offset * element_size(dtype);
}

BSFA_INLINE char* query_address(const Problem& problem, const TensorView& view, int32_t sequence, int32_t row,
                                int32_t head) {
  const int32_t* starts = problem.query.cu_seqlens;
  return starts != nullptr ? row_address(problem.dtype, view, 0, int64_t{starts[sequence]} + row, head)
                           : row_address(problem.dtype, view, sequence, row, head);
}

BSFA_INLINE int64_t lse_index(const Problem& problem, int64_t batch_stride, int64_t head_stride, int32_t sequence,
                              int32_t row, int32_t head) {
  const int32_t* starts = problem.query.cu_seqlens;
  const int64_t first = starts != nullptr ? int64_t{starts[sequence]} : sequence * batch_stride;
  return first + head * head_stride + row;
}

// Calls visit(address, index) for the tokens [begin, begin + count) of a sequence.
template <typename Visit>
BSFA_INLINE void for_each_token(DType dtype, const KvLayout& kv, const TensorView& view, int32_t sequence, int32_t head,
                                int32_t begin, int32_t count, Visit visit) {
  const int64_t step = view.token_stride * element_size(dtype);
  if (kv.block_table == nullptr) {
    const char* address = kv.cu_seqlens != nullptr
                              ? row_address(dtype, view, 0, int64_t{kv.cu_seqlens[sequence]} + begin, head)
                              : row_address(dtype, view, sequence, begin, head);
    for (int32_t i = 0; i < count; ++i) visit(address + i * step, i);
    return;
  }
  const int32_t* table = kv.block_table + sequence * kv.block_table_stride;
  int32_t i = 0;
  while (i < count) {
    const int32_t page = (begin + i) / kv.page_size;
    const int32_t slot = (begin + i) - page * kv.page_size;
    const int32_t run = min(count - i, kv.page_size - slot);
    const char* address = row_address(dtype, view, table[page], slot, head);
    for (int32_t n = 0; n < run; ++n) visit(address + n * step, i + n);
    i += run;
  }
}

static __attribute__((noinline)) void pack_keys(DType dtype, const KvLayout& kv, const TensorView& view,
                                                int32_t sequence, int32_t head, int32_t begin, int32_t count,
                                                int32_t dim, int32_t stride, float* panel) {
  for_each_token(dtype, kv, view, sequence, head, begin, count, [=](const char* address, int32_t i) {
    float* row = panel + int64_t{i} * stride;
    read_row(dtype, address, dim, row);
    for (int32_t d = dim; d < stride; ++d) row[d] = 0.0f;
  });
}

// Hands out 64-byte aligned pieces of a worker's scratch, one after the other.
struct Arena {
  float* next;
  float* take(int64_t count) {
    float* result = next;
    next += (count + 15) / 16 * 16;
    return result;
  }
};

// Up to kRows query rows that are computed together. Lanes are (head, row) pairs, rows of one head next to each other.
struct Subtile {
  int32_t count = 0;       // used lanes
  int32_t vectors = 0;     // ceil(count / kLanes)
  int32_t mask_index = 0;  // which of the item's mask heads applies
  int32_t min_position = 0;
  int32_t max_position = 0;
  int32_t head[kRows];
  int32_t row[kRows];
  int32_t position[kRows];  // of unused lanes: that of the last used one
};

// Cuts rows [row_begin, row_end) of the item's heads into subtiles. If `shared`, all heads have one mask and a subtile
// may hold rows of several. Returns how many.
static __attribute__((noinline)) int32_t make_subtiles(const TileItem& item, int32_t row_begin, int32_t row_end,
                                                       bool shared, Subtile* subtiles) {
  const int32_t rows = row_end - row_begin;
  int32_t used = 0;
  Subtile* current = nullptr;
  for (int32_t h = 0; h < item.head_count; ++h) {
    if (!shared) current = nullptr;
    for (int32_t r = 0; r < rows; ++r) {
      if (current == nullptr || current->count == kRows) {
        current = subtiles + used++;
        current->count = 0;
        current->mask_index = shared ? 0 : h;
      }
      const int32_t lane = current->count++;
      current->head[lane] = item.head_begin + h;
      current->row[lane] = row_begin + r;
      current->position[lane] = item.geometry.offset() + row_begin + r;
    }
  }
  for (int32_t s = 0; s < used; ++s) {
    Subtile& subtile = subtiles[s];
    subtile.vectors = (subtile.count + kLanes - 1) / kLanes;
    subtile.min_position = subtile.max_position = subtile.position[0];
    for (int32_t i = 1; i < kRows; ++i) {
      if (i >= subtile.count) subtile.position[i] = subtile.position[subtile.count - 1];
      subtile.min_position = min(subtile.min_position, subtile.position[i]);
      subtile.max_position = max(subtile.max_position, subtile.position[i]);
    }
  }
  return used;
}

static __attribute__((noinline)) void pack_queries(const Problem& problem, const TensorView& q, int32_t sequence,
                                                   const Subtile& subtile, float factor, float* row_buffer,
                                                   float* panel) {
  for (int32_t i = 0; i < subtile.vectors * kLanes; ++i) {
    if (i < subtile.count) {
      read_row(problem.dtype, query_address(problem, q, sequence, subtile.row[i], subtile.head[i]), problem.head_dim,
               row_buffer);
      for (int32_t d = 0; d < problem.head_dim; ++d) panel[d * kRows + i] = row_buffer[d] * factor;
    } else {
      for (int32_t d = 0; d < problem.head_dim; ++d) panel[d * kRows + i] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
