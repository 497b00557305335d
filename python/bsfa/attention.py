"""Attention with a policy: pool, select, attend in one call, over batched, packed or paged keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from bsfa import prepared
from bsfa.attending import ATTENTION, DENSE_ATTENTION, attend, attend_skipping
from bsfa.block_mask import BlockMask
from bsfa.errors import warn_dense
from bsfa.info import AttentionInfo
from bsfa.layout import Layout, check_out, check_values
from bsfa.policies import Dense, ExactSkip, Policy, TokenTopK
from bsfa.pooling import pool
from bsfa.stages import (
    check_attention_kernel,
    check_correction,
    check_mask_heads,
    check_policy,
    check_skip,
    check_skip_kernels,
    check_tokens,
    make_selection,
    resolve_layout,
    resolve_scale,
)
from bsfa.summary import BlockSummary
from bsfa.token_mask import TokenMask

Result = Tensor | tuple[Tensor | AttentionInfo, ...]

# Plain dense calls that have passed the checks, by all that the checks look at except the values of index tensors:
# shapes, strides, dtypes, devices, where memory begins, and options. What is remembered of one: max_seqlen_q,
# max_seqlen_k, the default softmax_scale, and whether it is settled if it can be prepared. In short calls those checks
# take longer than the kernel.
_passed: dict[tuple[object, ...], tuple[int, int, float, bool]] = {}
_MOST_PASSED = 1024
_is_compiling = torch.compiler.is_compiling

# cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k; or none of them
Indices = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | tuple[()]
_NO_INDICES = (None, None, None, None)


def _signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    indices: Indices,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    softmax_scale: float | None,
    softcap: float,
) -> tuple[object, ...] | None:
    """The key in ``_passed`` of a dense call; None for what has to be looked at each time.

    Types are compared here since equal keys may be of unequal types (1, 1.0 and True), and since a subclass of Tensor
    may mean anything. Of offsets it counts whether all are multiples of 8 or 4 elements, 16 bytes
    (:func:`bsfa.limits.check_tma`).
    """
    if not (type(q) is type(k) is type(v) is Tensor) or q.requires_grad or k.requires_grad or v.requires_grad:
        return None
    if type(causal) is not bool or type(softcap) is not float:
        return None
    if softmax_scale is not None and type(softmax_scale) is not float:
        return None
    dtype, device = q.dtype, q.device
    if k.dtype is not dtype or v.dtype is not dtype or k.device != device or v.device != device:
        return None
    offsets = (q.storage_offset() | k.storage_offset() | v.storage_offset()) & 7  # type: ignore[operator]  # no symbols
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        dtype,
        device,
        offsets,
        causal,
        softmax_scale,
        softcap,
    )
    if not indices:
        return key
    if type(max_seqlen_q) is not int and max_seqlen_q is not None:
        return None
    if type(max_seqlen_k) is not int and max_seqlen_k is not None:
        return None
    parts: list[object] = [key, max_seqlen_q, max_seqlen_k]
    for index in indices:
        if index is None:
            parts.append(None)
        elif type(index) is Tensor and index.dtype is torch.int32 and index.device == device:
            parts += (index.shape, index.stride())
        else:
            return None
    return tuple(parts)


def _check_values(q: Tensor, k: Tensor, indices: Indices, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """:func:`bsfa.layout.check_values` of a packed or paged call whose signature is known."""
    if not indices or not q.is_cpu:
        return
    cu_q, cu_k, table, lengths = indices
    paged = table is not None
    total_q = q.shape[0] if cu_q is not None else q.shape[0] * q.shape[1]
    layout = Layout(0, max_seqlen_q, max_seqlen_k, True, total_q, cu_q, cu_k, table, lengths)
    check_values(layout, None if paged else k.shape[0], k.shape[0] if paged else None, k.shape[1] if paged else None)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    policy: Policy | None,
    softmax_scale: float | None,
    softcap: float,
    window_left: int | None,
    prompt_lens: Tensor | None,
    mean_correction: bool,
    out: Tensor | None,
    return_lse: bool,
    return_info: bool,
    kept: BlockSummary | None,
) -> Result:
    check_policy(policy)
    check_correction(mean_correction, window_left)
    check_skip(policy, mean_correction)
    scale = resolve_scale(softmax_scale, q.shape[-1], softcap)
    if out is not None:
        check_out(out, q, k, v)
    reason: str | None = None
    selects: Policy | None = None
    if policy is not None and not isinstance(policy, Dense):
        if isinstance(policy, TokenTopK):  # says what is attended to, not what may be left out
            selects = policy
        elif layout.max_seqlen_q == 1 and layout.max_seqlen_k > 1:
            reason = "a decode step (one query token per sequence) is dense by design"
        elif window_left is not None:
            reason = "a token-level sliding window (window_left) bounds the work already"
        else:
            selects = policy
    skip = selects if isinstance(selects, ExactSkip) else None
    tokens: TokenMask | None = None
    if isinstance(selects, TokenTopK):
        tokens = selects.token_mask(layout)
        check_tokens(tokens, layout, q, mean_correction, None, window_left)
    if skip is None:
        check_attention_kernel(q, k, v, None if selects is None else (selects.block_m, selects.block_n))
    else:
        check_skip_kernels(q, k, v, skip, layout.max_seqlen_k)
    if kept is not None:
        pools = selects if selects is not None and selects.needs_summary else None
        kept.check_use(k, v, None if pools is None else pools.block_n, None if pools is None else pools.summary_pooling)
    if reason is not None:
        warn_dense(reason)
    if kept is not None:  # in dense calls too: their tokens are keys of later ones
        kept.update_layout(k, v, layout)
    mask: BlockMask | None = None
    means: tuple[Tensor, Tensor] | None = None
    if tokens is not None:
        mask = tokens.blocks_for(layout)
    elif selects is not None:
        summary = None
        if selects.needs_summary:
            pooling = selects.summary_pooling
            summary = pool(k, layout, selects.block_n, pooling) if kept is None else kept.gather_layout(layout)
        mask = selects.select(make_selection(q, k, summary, layout, scale, softcap, prompt_lens))
        if mask is not None:
            check_mask_heads(mask, q, k)
        if mask is not None and mean_correction:
            # The policy has pooled k already, perhaps in the way that is wanted here; or the means are kept.
            k_means = v_means = None
            if summary is not None and selects.block_n == mask.block_n and selects.summary_pooling == "mean":
                k_means = summary
            if kept is not None and kept.block_n == mask.block_n:
                if k_means is None and kept.pooling == "mean":
                    k_means = kept.gather_layout(layout)
                if kept.values is not None:
                    v_means = kept.gather_values_layout(layout)
            k_means = pool(k, layout, mask.block_n) if k_means is None else k_means
            means = (k_means, pool(v, layout, mask.block_n) if v_means is None else v_means)
    skips: Tensor | None = None
    if skip is not None:
        out, lse, skips = attend_skipping(q, k, v, mask, layout, scale, softcap, skip, out)
    else:
        out, lse = attend(q, k, v, mask, layout, scale, softcap, window_left, out, means, tokens)
    if not return_lse and not return_info:
        return out
    extra: tuple[Tensor | AttentionInfo, ...] = (lse,) if return_lse else ()
    if return_info:
        extra = (*extra, AttentionInfo(policy, mask, reason, q.device, q.shape[-2], means is not None, skips, tokens))
    return (out, *extra)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    indices: Indices,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    policy: Policy | None,
    kept: BlockSummary | None,
    softmax_scale: float | None,
    softcap: float,
    window_left: int | None,
    prompt_lens: Tensor | None,
    mean_correction: bool,
    out: Tensor | None,
    return_lse: bool,
    return_info: bool,
) -> Result:
    """Check and run a call; of a plain dense one that passed before, only what may differ is checked."""
    key = None
    if (
        policy is None
        and kept is None
        and window_left is None
        and out is None
        and mean_correction is False
        and not return_info
        and not _is_compiling()
    ):
        key = _signature(q, k, v, causal, indices, max_seqlen_q, max_seqlen_k, softmax_scale, softcap)
    passed = None if key is None else _passed.get(key)
    if passed is not None:
        longest_q, longest_k, default_scale, settled = passed
        scale = default_scale if softmax_scale is None else softmax_scale
        if not settled and prepared.remember(q, k, v, causal, softmax_scale, softcap, scale):
            assert key is not None
            _passed[key] = (longest_q, longest_k, default_scale, True)
        if not indices and not return_lse:
            return DENSE_ATTENTION(q, k, v, causal, scale, softcap)
        if indices:
            _check_values(q, k, indices, longest_q, longest_k)
        else:
            indices = _NO_INDICES
        if not return_lse:
            return DENSE_ATTENTION(q, k, v, causal, scale, softcap, *indices, longest_q, longest_k)
        maths = (None, None, None, None, 128, 128, causal, scale, softcap, -1)
        return ATTENTION(q, k, v, *indices, longest_q, longest_k, *maths)
    cu_q, cu_k, table, lengths = indices or _NO_INDICES
    layout = resolve_layout(q, k, v, causal, cu_q, cu_k, max_seqlen_q, max_seqlen_k, table, lengths)
    options = (softmax_scale, softcap, window_left, prompt_lens, mean_correction, out, return_lse, return_info)
    answer = _run(q, k, v, layout, policy, *options, kept)
    if key is not None:
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
            prepared.forget()
        default_scale = resolve_scale(None, q.shape[-1], 0.0)
        scale = default_scale if softmax_scale is None else softmax_scale
        settled = bool(indices) or prepared.remember(q, k, v, causal, softmax_scale, softcap, scale)
        _passed[key] = (layout.max_seqlen_q, layout.max_seqlen_k, default_scale, settled)
    return answer


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    policy: Policy | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_left: int | None = None,
    prompt_lens: Tensor | None = None,
    mean_correction: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_info: bool = False,
) -> Result:
    """Attention of ``q [B, Sq, Hq, D]`` over ``k [B, Sk, Hkv, D]``, ``v [B, Sk, Hkv, Dv]``; block-sparse by ``policy``.

    Hq must be a multiple of Hkv (GQA, MQA). float32, bfloat16 or float16, one dtype; D, Dv up to 256; only the last
    dimension must be contiguous. Forward only.

    policy: a :mod:`bsfa.policies` object; None is dense and exact.
    causal: bottom-right aligned, so that queries may be the last Sq positions of the prompt (chunked prefill).
    softmax_scale: default ``1 / sqrt(D)``. softcap: logits become ``softcap * tanh(logit / softcap)``; 0 is off.
    window_left: a query sees at most that many tokens before its own; such calls are dense inside the window.
    prompt_lens: int32 [B], see :func:`bsfa.select_blocks`.
    mean_correction: what the policy's mask drops still counts, approximately: the zero-order term of FlashPrefill V2
    (arXiv 2608.19758). A dropped KV block j of n_j tokens that every row of the query tile would see whole enters the
    softmax as one more key, ``O = (sum_kept e^s_i v_i + sum_j n_j e^t_j vbar_j) / (sum_kept e^s_i + sum_j n_j e^t_j)``
    with ``t_j = cap(softmax_scale * q . kbar_j)``, kbar and vbar the block's mean key and value; the LSE includes it.
    For batched, packed and paged keys alike. ``ValueError`` with ``window_left`` or ``ExactSkip``. Where a call is
    dense there is nothing to correct, and nothing changes; :class:`bsfa.AttentionInfo` says whether it was applied.
    out: write the result into this tensor and return it: shape, dtype and device as returned, any strides (the last
    dimension contiguous), no memory shared with q, k, v or within itself. What lies between its rows stays as it is.
    A graph of torch.compile computes the result first and copies it.

    Returns ``out [B, Sq, Hq, Dv]``; with ``return_lse`` also ``lse`` float32 [B, Hq, Sq] (natural log, over the kept
    blocks); with ``return_info`` also an :class:`bsfa.AttentionInfo` (mask, density, what was skipped, reason if it ran
    dense). A query that sees no key gives out = 0, lse = -inf.

    Raises ``ValueError``/``TypeError`` for bad input and :class:`bsfa.UnsupportedError` for what this build cannot run:
    on CUDA, dtypes, head dims and block sizes outside of the kernel table (:func:`bsfa.doctor`), and q, k or v whose
    rows do not start at multiples of 16 bytes.
    """
    if (
        prepared.READY
        and policy is None
        and window_left is None
        and out is None
        and mean_correction is False
        and not return_lse
        and not return_info
        and not _is_compiling()
    ):
        result = prepared.run(q, k, v, causal, softmax_scale, softcap)
        if result is not None:
            return result
    options = (softmax_scale, softcap, window_left, prompt_lens, mean_correction, out, return_lse, return_info)
    return _call(q, k, v, causal, (), None, None, policy, None, *options)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    policy: Policy | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_left: int | None = None,
    prompt_lens: Tensor | None = None,
    mean_correction: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_info: bool = False,
) -> Result:
    """Like :func:`attention` for packed sequences: ``q [total_q, Hq, D]``, ``k``/``v`` ``[total_k, Hkv, D]``.

    ``cu_seqlens_*``: int32 [B + 1], starting with 0; ``max_seqlen_*``: longest sequence, tokens. Sequences may be
    empty. LSE is ``[Hq, total_q]``.
    """
    indices = (cu_seqlens_q, cu_seqlens_k, None, None)
    options = (softmax_scale, softcap, window_left, prompt_lens, mean_correction, out, return_lse, return_info)
    return _call(q, k, v, causal, indices, max_seqlen_q, max_seqlen_k, policy, None, *options)


def attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    policy: Policy | None = None,
    summary: BlockSummary | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_left: int | None = None,
    prompt_lens: Tensor | None = None,
    mean_correction: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_info: bool = False,
) -> Result:
    """Like :func:`attention` over a paged KV cache ``[num_pages, page_size, Hkv, D]``.

    block_table: int32 [B, max_pages], page of each page_size tokens; entries past a sequence's end are not read.
    seqlens_k: int32 [B], KV tokens including those of this chunk. Any page size; any page, token and head strides.
    q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q`` and ``max_seqlen_q``.
    max_seqlen_k: default, the capacity of ``block_table``; give the true maximum to keep masks small.
    summary: a :class:`bsfa.BlockSummary` of this cache, used in place of pooling all keys. The call updates it for its
    own tokens, the last ``seqlen_q`` of each sequence (whatever the policy, decode steps included), and selects by
    it: the result is bitwise that without. Its block_n and pooling must be those of the policy (``ValueError``).
    """
    if summary is not None and not isinstance(summary, BlockSummary):
        raise TypeError(f"summary must be a bsfa.BlockSummary or None, got {type(summary).__name__}")
    indices = (cu_seqlens_q, None, block_table, seqlens_k)
    options = (softmax_scale, softcap, window_left, prompt_lens, mean_correction, out, return_lse, return_info)
    return _call(q, k_cache, v_cache, causal, indices, max_seqlen_q, max_seqlen_k, policy, summary, *options)
