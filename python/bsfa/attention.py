"""Attention with a policy: pool, select, attend in one call, over batched, packed or paged keys and values."""

from __future__ import annotations

from torch import Tensor

from bsfa.attending import attend, attend_skipping
from bsfa.block_mask import BlockMask
from bsfa.errors import warn_dense
from bsfa.info import AttentionInfo
from bsfa.layout import Layout, check_out
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
    kept: BlockSummary | None = None,
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
        check_skip_kernels(q, k, v, skip)
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
    layout = resolve_layout(q, k, v, causal, None, None, None, None, None, None)
    options = (softmax_scale, softcap, window_left, prompt_lens, mean_correction, out, return_lse, return_info)
    return _run(q, k, v, layout, policy, *options)


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
    layout = resolve_layout(q, k, v, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None)
    options = (softmax_scale, softcap, window_left, prompt_lens, mean_correction, out, return_lse, return_info)
    return _run(q, k, v, layout, policy, *options)


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
    layout = resolve_layout(
        q, k_cache, v_cache, causal, cu_seqlens_q, None, max_seqlen_q, max_seqlen_k, block_table, seqlens_k
    )
    options = (softmax_scale, softcap, window_left, prompt_lens, mean_correction, out, return_lse, return_info)
    return _run(q, k_cache, v_cache, layout, policy, *options, kept=summary)
