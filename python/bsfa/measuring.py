"""What attention would do, measured: mass and maxima per query tile and KV block, one pass over ``q . k`` each.

Calibration and evaluation are made of these. Both take tokens as :mod:`bsfa.stages` does: batched, packed or paged.
"""

from __future__ import annotations

import torch
from torch import Tensor

import bsfa.ops  # noqa: F401  fake kernels
from bsfa.layout import check_block_sizes
from bsfa.limits import check_limits, check_tma
from bsfa.policies.exact_skip import FORMS
from bsfa.stages import resolve_layout, resolve_scale


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_m: int = 128,
    block_n: int = 128,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
) -> Tensor:
    """True attention mass per query tile and KV block, from the LSE of dense attention.

    Returns float32 ``[rows, Hq, blocks]``: the mean over the tile's queries of the softmax probability that falls
    into the block, so a row sums to 1. Rows follow :class:`bsfa.MaskGeometry`. Linear memory in blocks. On CUDA tiles
    have 64 or 128 queries and blocks 128 tokens, in bfloat16 or float16 at head_dim 64 or 128.
    """
    check_block_sizes(block_m, block_n)
    layout = resolve_layout(
        q, k, None, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqlens_k
    )
    scale = resolve_scale(softmax_scale, q.shape[-1], softcap)
    want = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    if not isinstance(lse, Tensor) or lse.dtype != torch.float32:
        raise TypeError("lse must be a float32 tensor, as returned by bsfa.attention(..., return_lse=True)")
    if lse.device != q.device:
        raise ValueError(f"lse is on {lse.device} but q is on {q.device}")
    if tuple(lse.shape) != want or not lse.is_contiguous():
        raise ValueError(f"lse must be contiguous of shape {want}, got {tuple(lse.shape)}")
    check_measuring_kernel("block_mass", q, k, block_m, block_n)
    mass: Tensor = torch.ops.bsfa.block_mass(
        q,
        k,
        lse,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.block_table,
        layout.seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        layout.num_mask_rows(block_m),
        block_m,
        block_n,
        causal,
        scale,
        softcap,
    )
    return mass


def tile_max(
    q: Tensor,
    k: Tensor,
    *,
    form: str = "absolute",
    block_m: int = 64,
    block_n: int = 128,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
) -> Tensor:
    """What exact skipping compares with its threshold, per query tile and KV block, if nothing were skipped.

    q: ``[B, Sq, Hq, D]`` or packed ``[total_q, Hq, D]``; k, and how both lie: as :func:`block_mass` takes them.
    Returns float32 ``[rows, Hq, blocks]`` in natural units, of the logits ``softmax_scale * q . k``, softcapped where
    there is a ``softcap``, over the keys that each query sees:

    * "absolute" (BSFA): the largest logit of the tile's queries in the block;
    * "relative" (skip-softmax): the largest, over the tile's queries, of the query's largest logit in the block minus
      its largest in the blocks met before; +inf in the block met first. Blocks are met in this order: the tile's last
      visible one, block 0, the others from the last to the first.

    -inf where nothing is visible; NaN if a logit of the tile in the block is. ``block_m``: tokens of a tile; attention
    decides for tiles of 64. Rows follow :class:`bsfa.MaskGeometry`.
    Raises ``ValueError``/``TypeError`` for bad input, :class:`bsfa.UnsupportedError` where there is no kernel: on CUDA
    tiles have 64 or 128 queries and blocks 128 tokens, in bfloat16 or float16 at head_dim 64 or 128.
    """
    check_block_sizes(block_m, block_n)
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    layout = resolve_layout(
        q, k, None, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqlens_k
    )
    scale = resolve_scale(softmax_scale, q.shape[-1], softcap)
    check_measuring_kernel("tile_max", q, k, block_m, block_n)
    maxima: Tensor = torch.ops.bsfa.tile_max(
        q,
        k,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.block_table,
        layout.seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        layout.num_mask_rows(block_m),
        block_m,
        block_n,
        causal,
        scale,
        softcap,
        form,
    )
    return maxima


def check_measuring_kernel(op: str, q: Tensor, k: Tensor, block_m: int, block_n: int) -> None:
    """Raise ``UnsupportedError`` unless a kernel of block_mass or tile_max on q's device can run this."""
    check_limits(op, q.device, q.dtype, q.shape[-1], (block_m, block_n))
    if q.device.type != "cpu":
        check_tma(op, q=q, k=k)
