"""Fake (meta) kernels of ``torch.ops.bsfa.*``: output shapes for torch.compile, export and opcheck.

The schemas stand in csrc/torch/schemas.h; shapes are described there.
"""

from __future__ import annotations

import torch
from torch import Tensor

import bsfa._library  # noqa: F401  registers the operators


def _blocks(max_seqlen_k: int, block_n: int) -> int:
    return (max_seqlen_k + block_n - 1) // block_n


@torch.library.register_fake("bsfa::pool_blocks")
def _pool_blocks(
    k: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
    max_seqlen_k: int,
    block_n: int,
) -> Tensor:
    if block_table is not None:
        batch = block_table.shape[0]
    elif cu_seqlens_k is not None:
        batch = cu_seqlens_k.shape[0] - 1
    else:
        batch = k.shape[0]
    return k.new_empty((batch, _blocks(max_seqlen_k, block_n), k.shape[-2], k.shape[-1]))


@torch.library.register_fake("bsfa::score_blocks")
def _score_blocks(
    q: Tensor,
    summary: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
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
) -> Tensor:
    return q.new_empty((num_rows, q.shape[-2], _blocks(max_seqlen_k, block_n)), dtype=torch.float32)


@torch.library.register_fake("bsfa::select_blocks")
def _select_blocks(
    q: Tensor,
    summary: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
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
    thresholds: Tensor,
    sink_blocks: int,
    window_blocks: int,
    last_tiles: int,
    min_blocks: int,
    prompt_lens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    words = (_blocks(max_seqlen_k, block_n) + 31) // 32
    heads = q.shape[-2]
    return (
        q.new_empty((num_rows, heads, words), dtype=torch.int32),
        q.new_empty((num_rows, heads), dtype=torch.int32),
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
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    window_left: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _new_lse(q)


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
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float,
    softcap: float,
    window_left: int,
) -> Tensor:
    return _new_lse(q)


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
