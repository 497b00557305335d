"""The attention operators, on inputs that have been checked: :mod:`bsfa.stages` and :mod:`bsfa.attention` call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bsfa.ops  # noqa: F401  fake kernels
from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.layout import Layout
from bsfa.policies import ExactSkip
from bsfa.token_mask import TokenMask

#: Operators of dense calls, found once: each look-up by name costs a call as much as a check of it.
ATTENTION = torch.ops.bsfa.attention.default
DENSE_ATTENTION = torch.ops.bsfa.dense_attention.default


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    layout: Layout,
    softmax_scale: float,
    softcap: float,
    window_left: int | None,
    out: Tensor | None = None,
    means: tuple[Tensor, Tensor] | None = None,
    tokens: TokenMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the attention operator on inputs that have been checked; ``out``: where to write, None for a new tensor.

    means: of k and v, for the correction of what the mask drops; only with a mask. tokens: keys of single queries, in
    addition to the mask; neither with means nor with window_left.
    """
    if window_left is not None:
        if not isinstance(window_left, int) or isinstance(window_left, bool):
            raise TypeError(f"window_left must be an int (tokens) or None, got {type(window_left).__name__}")
        if window_left < 0 or not layout.causal:
            raise ValueError("window_left must be 0 or more and needs causal=True")
    arguments = (
        q,
        k,
        v,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.block_table,
        layout.seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        None if mask is None else mask.words,
        None if mask is None else mask.counts,
        None if means is None else means[0],
        None if means is None else means[1],
        128 if mask is None else mask.block_m,
        128 if mask is None else mask.block_n,
        layout.causal,
        softmax_scale,
        softcap,
        -1 if window_left is None else window_left,
        None if tokens is None else tokens.words,
    )
    if _copies(out):
        result, lse = ATTENTION(*arguments)
        return _copied(result, out), lse
    lse = torch.ops.bsfa.attention_out(out, *arguments)
    return _written(out), lse


def attend_skipping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    layout: Layout,
    softmax_scale: float,
    softcap: float,
    skip: ExactSkip,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attend` that skips, on inputs that have been checked: also the counts int64 [Hq, 2] of what was."""
    cuts = skip_cuts(q, layout, skip)
    bounded = None
    if skip.bounds and goes_by_bounds(q.device):
        mask, bounded = mask_ahead(torch.ops.bsfa.bound_mask, q, k, mask, layout, softmax_scale, softcap, skip, cuts)
    if skip.passes == 2:
        mask, skips = mask_ahead(torch.ops.bsfa.skip_mask, q, k, mask, layout, softmax_scale, softcap, skip, cuts)
        result, lse = attend(q, k, v, mask, layout, softmax_scale, softcap, None, out)
    else:
        result, lse, skips = _attend_in_one_pass(q, k, v, mask, layout, softmax_scale, softcap, skip, cuts, out)
    if bounded is not None:
        skips = skips + bounded.narrow(1, 1, 1)  # what bounds left out was met, and is skipped
    return result, lse, skips


def goes_by_bounds(device: torch.device) -> bool:
    """Whether bounds of logits save anything there: elsewhere ``ExactSkip.bounds`` changes nothing."""
    return device.type != "cpu"


def _attend_in_one_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    layout: Layout,
    softmax_scale: float,
    softcap: float,
    skip: ExactSkip,
    cuts: Tensor,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attend_skipping` over ``mask``, by exact logits alone."""
    arguments = (
        q,
        k,
        v,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.block_table,
        layout.seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        None if mask is None else mask.words,
        None if mask is None else mask.counts,
        skip.block_m,
        skip.block_n,
        layout.causal,
        softmax_scale,
        softcap,
        cuts,
        skip.form,
        skip.sink_blocks,
        skip.window_blocks,
        skip.counted,
    )
    if _copies(out):
        result, lse, skips = torch.ops.bsfa.skip_attention(*arguments)
        return _copied(result, out), lse, skips
    lse, skips = torch.ops.bsfa.skip_attention_out(out, *arguments)
    return _written(out), lse, skips


def skip_cuts(q: Tensor, layout: Layout, skip: ExactSkip) -> Tensor:
    """The cuts of a policy for the tiles of a call."""
    # Positions end with the keys, without causality with the queries. A column more than tiles: there is always one.
    positions = layout.max_seqlen_k if layout.causal else layout.max_seqlen_q
    return skip.cuts(q.shape[-2], positions // skip.block_m + 1, q.device)


def mask_ahead(
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    mask: BlockMask | None,
    layout: Layout,
    softmax_scale: float,
    softcap: float,
    skip: ExactSkip,
    cuts: Tensor,
) -> tuple[BlockMask, Tensor]:
    """What an operator that decides ahead of attention leaves of ``mask``, and the counts int64 [Hq, 2] of what it met
    and left out.

    ``skip_mask``: the first of two passes of ``skip``; attention without skipping is the second. ``bound_mask``: what
    ``skip`` may keep, by bounds of logits; its passes do over that what they would do over ``mask``. On CUDA alone.
    """
    words, counts, skips = operator(
        q,
        k,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.block_table,
        layout.seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        layout.num_mask_rows(skip.block_m),
        None if mask is None else mask.words,
        skip.block_m,
        skip.block_n,
        layout.causal,
        softmax_scale,
        softcap,
        cuts,
        skip.form,
        skip.sink_blocks,
        skip.window_blocks,
    )
    geometry = MaskGeometry.of(layout, skip.block_m, skip.block_n, q.device) if mask is None else mask.geometry
    return BlockMask(words, counts, geometry), skips


def _copies(out: Tensor | None) -> bool:
    """Whether an operator makes its own output. A compiled graph copies it: inductor loses the offset of a view that an
    operator writes into when the offset is a symbol (https://github.com/pytorch/pytorch/issues/198068).
    """
    return out is None or torch.compiler.is_compiling()


def _copied(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _written(out: Tensor | None) -> Tensor:
    assert out is not None
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # a backward pass that saved it would use what is no longer there
    return out
