"""Fake (meta) kernels of ``torch.ops.bsfa.*``: output shapes for torch.compile, export and opcheck.

The schemas stand in csrc/torch/schemas.h; shapes are described there.
"""

from __future__ import annotations

import torch
from torch import Tensor

import bsfa._library  # noqa: F401  registers the operators


def _blocks(max_seqlen_k: int, block_n: int) -> int:
    return (max_seqlen_k + block_n - 1) // block_n


def _batch(k: Tensor, cu_seqlens_k: Tensor | None, block_table: Tensor | None) -> int:
    if block_table is not None:
        return block_table.shape[0]
    return k.shape[0] if cu_seqlens_k is None else cu_seqlens_k.shape[0] - 1


@torch.library.register_fake("bsfa::pool_blocks")
def _pool_blocks(
    k: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_k: int,
    block_n: int,
    pooling: str,
) -> Tensor:
    batch = _batch(k, cu_seqlens_k, block_table)
    return k.new_empty((batch, _blocks(max_seqlen_k, block_n), k.shape[-2], k.shape[-1]))


@torch.library.register_fake("bsfa::summary_entries")
def _summary_entries(
    block_table: Tensor, seqlens_k: Tensor, page_size: int, block_n: int, blocks: int, num_pages: int
) -> Tensor:
    return seqlens_k.new_empty((seqlens_k.shape[0], blocks), dtype=torch.int64)


@torch.library.register_fake("bsfa::summary_window")
def _summary_window(
    block_table: Tensor, seqlens_k: Tensor, lengths_q: Tensor, page_size: int, block_n: int, units: int
) -> tuple[Tensor, Tensor]:
    pages = units * (max(page_size, block_n) // page_size)
    return seqlens_k.new_empty((seqlens_k.shape[0], pages)), seqlens_k.new_empty((seqlens_k.shape[0],))


def _mask_heads(q: Tensor, keys: Tensor | None, sharing: str) -> int:
    if sharing == "none":
        return q.shape[-2]
    assert keys is not None
    return keys.shape[-2]


@torch.library.register_fake("bsfa::score_blocks")
def _score_blocks(
    q: Tensor,
    summary: Tensor | None,
    k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_rows: int,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    rule: str,
    pooling: str,
    stride: int,
    sharing: str,
    sink_blocks: int,
    window_blocks: int,
) -> Tensor:
    heads = _mask_heads(q, summary, sharing) if sharing == "group" else q.shape[-2]
    return q.new_empty((num_rows, heads, _blocks(max_seqlen_k, block_n)), dtype=torch.float32)


@torch.library.register_fake("bsfa::select_blocks")
def _select_blocks(
    q: Tensor,
    summary: Tensor | None,
    k: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_rows: int,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    rule: str,
    pooling: str,
    stride: int,
    sharing: str,
    sink_blocks: int,
    window_blocks: int,
    thresholds: Tensor | None,
    last_tiles: int,
    min_blocks: int,
    min_ratio: float,
    probability: float,
    rescue_stride: int,
    rescue_probability: float,
    rescue_seed: int,
    prompt_lens: Tensor | None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    words = (_blocks(max_seqlen_k, block_n) + 31) // 32
    heads = _mask_heads(q, k if summary is None else summary, sharing)
    return (
        q.new_empty((num_rows, heads, words), dtype=torch.int32),
        q.new_empty((num_rows, heads), dtype=torch.int32),
    )


@torch.library.register_fake("bsfa::probe_attention")
def _probe_attention(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_m: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    shape = (_batch(k, cu_seqlens_k, block_table), q.shape[-2], max_seqlen_k)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("bsfa::pattern_mask")
def _pattern_mask(
    base: Tensor,
    query_aware: Tensor,
    vertical: Tensor,
    slash: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_m: int,
    block_n: int,
    causal: bool,
    sink_blocks: int,
    window_blocks: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base), base.new_empty(base.shape[:2])


@torch.library.register_fake("bsfa::token_mask")
def _token_mask(
    indices: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_rows: int,
    block_m: int,
    block_n: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = indices.shape[:-1]
    return (
        indices.new_empty((*rows, _blocks(max_seqlen_k, 128) * 4)),
        indices.new_empty(rows),
        indices.new_empty((num_rows, 1, (_blocks(max_seqlen_k, block_n) + 31) // 32)),
        indices.new_empty((num_rows, 1)),
        indices.new_empty((2,), dtype=torch.int64),
    )


def _new_lse(q: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("bsfa::attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask_words: Tensor | None,
    mask_counts: Tensor | None,
    k_means: Tensor | None,
    v_means: Tensor | None,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    window_left: int,
    token_words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _new_lse(q)


@torch.library.register_fake("bsfa::dense_attention")
def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.register_fake("bsfa::attention_out")
def _attention_out(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask_words: Tensor | None,
    mask_counts: Tensor | None,
    k_means: Tensor | None,
    v_means: Tensor | None,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    window_left: int,
    token_words: Tensor | None = None,
) -> Tensor:
    return _new_lse(q)


@torch.library.register_fake("bsfa::skip_attention")
def _skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask_words: Tensor | None,
    mask_counts: Tensor | None,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    thresholds: Tensor,
    form: str,
    sink_blocks: int,
    window_blocks: int,
    counted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    skips = q.new_empty((q.shape[-2], 2), dtype=torch.int64)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _new_lse(q), skips


@torch.library.register_fake("bsfa::skip_attention_out")
def _skip_attention_out(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask_words: Tensor | None,
    mask_counts: Tensor | None,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    thresholds: Tensor,
    form: str,
    sink_blocks: int,
    window_blocks: int,
    counted: bool,
) -> tuple[Tensor, Tensor]:
    return _new_lse(q), q.new_empty((q.shape[-2], 2), dtype=torch.int64)


@torch.library.register_fake("bsfa::bound_mask")
@torch.library.register_fake("bsfa::skip_mask")
def _skip_mask(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_rows: int,
    mask_words: Tensor | None,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    thresholds: Tensor,
    form: str,
    sink_blocks: int,
    window_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, words = q.shape[-2], (_blocks(max_seqlen_k, block_n) + 31) // 32
    return (
        q.new_empty((num_rows, heads, words), dtype=torch.int32),
        q.new_empty((num_rows, heads), dtype=torch.int32),
        q.new_empty((heads, 2), dtype=torch.int64),
    )


@torch.library.register_fake("bsfa::tile_max")
def _tile_max(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_rows: int,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    form: str,
) -> Tensor:
    return q.new_empty((num_rows, q.shape[-2], _blocks(max_seqlen_k, block_n)), dtype=torch.float32)


@torch.library.register_fake("bsfa::block_mass")
def _block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_rows: int,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
) -> Tensor:
    return q.new_empty((num_rows, q.shape[-2], _blocks(max_seqlen_k, block_n)), dtype=torch.float32)
