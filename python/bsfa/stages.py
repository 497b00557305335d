"""The three stages on their own: pool, select, attend. :mod:`bsfa.attention` chains them.

All take the same description of where the tokens lie:

* batched: ``q [B, Sq, Hq, D]``, ``k``/``v`` ``[B, Sk, Hkv, D]``;
* packed: ``q [total_q, Hq, D]`` with ``cu_seqlens_q``, ``k``/``v`` ``[total_k, Hkv, D]`` with ``cu_seqlens_k``, both
  int32 [B + 1], and ``max_seqlen_q``, ``max_seqlen_k``;
* paged: ``k``/``v`` ``[num_pages, page_size, Hkv, D]`` with ``block_table`` int32 [B, max_pages] and ``seqlens_k``
  int32 [B]; queries batched or packed. Any page size, any page, token and head strides.

Only the last dimension must be contiguous. Dtypes: float32, bfloat16, float16. Index tensors on the CPU are checked
by value; on a GPU they are not read back, so wrong values there are the caller's to avoid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bsfa.attending import attend, attend_skipping
from bsfa.block_mask import BlockMask
from bsfa.layout import (
    Layout,
    batched_layout,
    check_block_sizes,
    check_data,
    check_heads,
    check_index,
    check_length,
    check_out,
    check_values,
    key_layout,
    paged_layout,
    varlen_layout,
)
from bsfa.limits import check_bounds, check_limits, check_tma
from bsfa.policies import Composed, ExactSkip, Policy, ScoredPolicy, Selection
from bsfa.policies.fixed import check_geometry
from bsfa.pooling import check_pooling, pool
from bsfa.token_mask import TokenMask


def resolve_scale(softmax_scale: float | None, head_dim: int, softcap: float) -> float:
    """The softmax scale to use (default ``1 / sqrt(head_dim)``), after checking it and the softcap."""
    for name, value in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if value is None and name == "softmax_scale":
            continue
        if not isinstance(value, int | float | torch.SymFloat) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace for dynamic floats
            raise ValueError(f"{name} must be finite, got {value}")
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (off) or positive, got {softcap}")
    return 1.0 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)


def resolve_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
) -> Layout:
    """Check the tensors and say how their tokens lie. See the module docstring for the three forms."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    check_data("q", q, (3, 4))
    check_data("k", k, (3, 4), q)
    if v is not None:
        check_data("v", v, (3, 4), q)
    check_heads(q, k, v)
    if block_table is not None:
        if seqlens_k is None or cu_seqlens_k is not None:
            raise ValueError("paged keys need block_table and seqlens_k (and no cu_seqlens_k)")
        if k.dim() != 4:
            raise ValueError(f"paged k must be [num_pages, page_size, Hkv, D], got shape {tuple(k.shape)}")
        return paged_layout(q, k, block_table, seqlens_k, cu_seqlens_q, max_seqlen_q, max_seqlen_k, causal)
    if seqlens_k is not None:
        raise ValueError("seqlens_k belongs to paged keys: give a block_table too, or slice k")
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if cu_seqlens_q is None or cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
            raise ValueError("packed inputs need cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k")
        if q.dim() != 3 or k.dim() != 3:
            raise ValueError(f"packed q and k must have 3 dimensions, got {tuple(q.shape)} and {tuple(k.shape)}")
        return varlen_layout(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"batched q and k must have 4 dimensions, got {tuple(q.shape)} and {tuple(k.shape)}")
    for name, given, length in (("max_seqlen_q", max_seqlen_q, q.shape[1]), ("max_seqlen_k", max_seqlen_k, k.shape[1])):
        if given is not None and given != length:
            raise ValueError(f"{name} = {given} contradicts batched tensors of {length} tokens")
    return batched_layout(q, k, causal)


def check_policy(policy: Policy | None) -> None:
    """Raise ``TypeError`` unless ``policy`` is a policy or None."""
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy must be a bsfa.policies.Policy or None, got {type(policy).__name__}")


def pool_blocks(
    k: Tensor,
    *,
    block_n: int = 128,
    pooling: str = "mean",
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
) -> Tensor:
    """What stands for every KV block: the BlockSummary that selection scores against.

    Returns ``[B, ceil(max_seqlen_k / block_n), Hkv, D]`` in k's dtype. ``block_n``: tokens. ``pooling``: "mean"
    (float32 accumulation; the last block of a sequence is divided by its true number of tokens), "maxabs" (per
    dimension the value of largest magnitude, with its sign; ties: the earlier token) or "center" (token count // 2 of
    the block); what a policy needs is its ``summary_pooling``. Blocks past the end are zeros.
    Raises ``ValueError``/``TypeError`` for bad input, :class:`bsfa.UnsupportedError` where there is no kernel.
    """
    check_block_sizes(1, block_n)
    check_data("k", k, (3, 4))
    check_pooling(pooling)
    return pool(k, key_layout(k, cu_seqlens_k, max_seqlen_k, block_table, seqlens_k), block_n, pooling)


def make_selection(
    q: Tensor,
    k: Tensor | None,
    summary: Tensor | None,
    layout: Layout,
    softmax_scale: float,
    softcap: float,
    prompt_lens: Tensor | None,
) -> Selection:
    """What a policy may look at, after checking ``prompt_lens``."""
    if prompt_lens is not None:
        check_index("prompt_lens", prompt_lens, 1, q, layout.batch)
    return Selection(q, layout, softmax_scale, softcap, prompt_lens, summary, k)


def check_keys(
    q: Tensor,
    k: Tensor,
    batch: int,
    max_seqlen_k: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
) -> None:
    """Raise unless ``k`` is what attention would take beside ``q``: ``batch`` sequences of up to ``max_seqlen_k``."""
    check_data("k", k, (3, 4), q)
    check_heads(q, k, None)
    if cu_seqlens_q is not None and cu_seqlens_k is None and block_table is None:
        raise ValueError("packed q needs packed k (cu_seqlens_k) or paged k (block_table)")
    keys = key_layout(k, cu_seqlens_k, max_seqlen_k, block_table, seqlens_k)
    if keys.batch != batch:
        raise ValueError(f"q has batch {batch} but k has batch {keys.batch}")


def select_blocks(
    q: Tensor,
    summary: Tensor | None,
    policy: Policy,
    *,
    k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqlens_k: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    return_scores: bool = False,
) -> BlockMask | tuple[BlockMask | None, Tensor] | None:
    """Which KV blocks each query tile attends to, by ``policy``; None means all (dense).

    q: ``[B, Sq, Hq, D]``, or packed ``[total_q, Hq, D]`` with ``cu_seqlens_q`` and ``max_seqlen_q``.
    summary: result of :func:`pool_blocks` with ``policy.block_n`` and ``policy.summary_pooling``, where
    ``policy.needs_summary``; else None.
    k: the keys themselves, where ``policy.needs_keys``: batched, packed with ``cu_seqlens_k``, or paged with
    ``block_table`` and ``seqlens_k``.
    KV lengths (tokens): ``seqlen_k`` for all sequences, or ``cu_seqlens_k``/``seqlens_k`` with ``max_seqlen_k``.
    prompt_lens: int32 [B], full prompt lengths, when this call is a chunk that does not end the prompt (they place
    ``last_tiles``); default: this call ends the prompt.
    return_scores: also return the scores of a scored policy, float32 [rows, Hq, blocks] (-1: not visible), or
    [rows, Hkv, blocks] where the query heads of a KV head share them. For a look at small sizes: they take rows x heads
    x blocks x 4 bytes, 134 MB at 128K tokens and 32 heads, and are computed a second time. ``ValueError`` for policies
    that have none, composed ones among them: ask their members.
    """
    check_policy(policy)
    if return_scores and not isinstance(policy, ScoredPolicy):
        hint = ": ask its members" if isinstance(policy, Composed) else ""
        raise ValueError(f"policy {type(policy).__name__} has no scores{hint}")
    check_data("q", q, (3, 4))
    scale = resolve_scale(softmax_scale, q.shape[-1], softcap)
    batch = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
    if cu_seqlens_q is not None:
        check_index("cu_seqlens_q", cu_seqlens_q, 1, q)
        if q.dim() != 3 or max_seqlen_q is None:
            raise ValueError("cu_seqlens_q needs packed q [total_q, Hq, D] and max_seqlen_q")
    elif q.dim() != 4:
        raise ValueError(f"without cu_seqlens_q, q must be [B, Sq, Hq, D], got shape {tuple(q.shape)}")
    if sum(x is not None for x in (seqlen_k, cu_seqlens_k, seqlens_k)) != 1:
        raise ValueError("give exactly one of seqlen_k, cu_seqlens_k and seqlens_k")
    if seqlen_k is None and max_seqlen_k is None:
        raise ValueError("cu_seqlens_k and seqlens_k need max_seqlen_k")
    if cu_seqlens_k is not None:
        check_index("cu_seqlens_k", cu_seqlens_k, 1, q, batch + 1)
    if seqlens_k is not None:
        check_index("seqlens_k", seqlens_k, 1, q, batch)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    longest = seqlen_k if seqlen_k is not None else max_seqlen_k
    assert longest is not None
    check_length("seqlen_k" if seqlen_k is not None else "max_seqlen_k", longest)
    if max_seqlen_q is not None:
        check_length("max_seqlen_q", max_seqlen_q)
    if seqlen_k is not None and cu_seqlens_q is not None:
        seqlens_k = torch.full((batch,), seqlen_k, dtype=torch.int32, device=q.device)
    if k is None:
        if block_table is not None:
            raise ValueError("block_table belongs to k")
    else:
        check_keys(q, k, batch, longest, cu_seqlens_q, cu_seqlens_k, block_table, seqlens_k)
    layout = Layout(
        batch,
        q.shape[1] if cu_seqlens_q is None else int(max_seqlen_q or 0),
        longest,
        causal,
        batch * q.shape[1] if cu_seqlens_q is None else q.shape[0],
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        seqlens_k=seqlens_k,
    )
    check_values(layout, None, None, None)
    if summary is not None:
        check_data("summary", summary, (4,), q)
        if summary.shape[2] == 0 or q.shape[-2] % summary.shape[2]:
            raise ValueError(f"query heads ({q.shape[-2]}) must be a multiple of the summary's ({summary.shape[2]})")
        want = (batch, -(-longest // policy.block_n), q.shape[-1])
        if (summary.shape[0], summary.shape[1], summary.shape[3]) != want or not summary.is_contiguous():
            raise ValueError(
                f"summary must be contiguous [B, blocks, Hkv, D] = [{want[0]}, {want[1]}, *, {want[2]}] for block_n = "
                f"{policy.block_n}, got shape {tuple(summary.shape)}"
            )
    selection = make_selection(q, k, summary, layout, scale, softcap, prompt_lens)
    mask = policy.select(selection)
    if not return_scores:
        return mask
    assert isinstance(policy, ScoredPolicy)
    return mask, policy.score(selection)


def select_for(
    q: Tensor, k: Tensor, policy: Policy, **options: Any
) -> BlockMask | tuple[BlockMask | None, Tensor] | None:
    """Pool and select for batched ``q`` and ``k``; ``options`` as in :func:`select_blocks`."""
    summary = None
    if policy.needs_summary:
        summary = pool_blocks(k, block_n=policy.block_n, pooling=policy.summary_pooling)
    return select_blocks(q, summary, policy, k=k, seqlen_k=k.shape[1], **options)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_left: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    k_means: Tensor | None = None,
    v_means: Tensor | None = None,
    skip: ExactSkip | None = None,
    return_skips: bool = False,
    tokens: TokenMask | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Exact softmax attention over the kept blocks (None: all of them).

    Returns ``out`` (q's shape with v's head_dim, q's dtype) and ``lse`` (float32, natural log; ``[B, Hq, Sq]`` or
    ``[Hq, total_q]``). A query that sees no key gives out = 0 and lse = -inf. ``window_left``: a query sees at most
    that many tokens before its own (needs ``causal``). ``out``: write into this tensor and return it, see
    :func:`bsfa.attention`.

    k_means, v_means: correct for the blocks that ``mask`` drops, by the zero-order term of FlashPrefill V2 (arXiv
    2608.19758). Both are what :func:`pool_blocks` returns for k and for v with ``mask.block_n``. A dropped block j of
    ``len_j`` tokens that every row of the query tile would see whole enters the softmax as one key, with logit
    ``cap(softmax_scale * q . k_means[j]) + ln(len_j)`` and value ``v_means[j]``, in numerator, denominator and lse
    (``cap``: the softcap). Works for batched, packed and paged keys; not with ``window_left``; without a mask there is
    nothing to correct, and they are ignored. On CUDA, where a value or mean is not finite, NaN may appear in tiles that
    neither keep nor see its block: means are multiplied by 0, not left out, within their 128 blocks.

    skip: leave out what this :class:`bsfa.policies.ExactSkip` finds too low among the kept blocks. Its block sizes must
    be the mask's, and it has no ``within`` (that is the mask's part); not with means or ``window_left``
    (``ValueError``). ``return_skips`` (needs ``skip``): also return ``skips`` int64 [Hq, 2], how many pairs (group of
    64 query rows, kept block that one of them sees) were met, and how many of them skipped.

    tokens: a :class:`bsfa.TokenMask` for this call; a query sees the keys that it has there and nothing else, of the
    blocks that ``mask`` keeps (None: of ``tokens.blocks``, all that hold any). Not with means, ``skip`` or
    ``window_left`` (``ValueError``).
    """
    layout = resolve_layout(
        q, k, v, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqlens_k
    )
    scale = resolve_scale(softmax_scale, q.shape[-1], softcap)
    if mask is not None:
        if not isinstance(mask, BlockMask):
            raise TypeError(f"mask must be a bsfa.BlockMask or None, got {type(mask).__name__}")
        check_geometry(mask, layout, q.device)
        check_mask_heads(mask, q, k)
    if out is not None:
        check_out(out, q, k, v)
    if tokens is not None:
        check_tokens(tokens, layout, q, k_means is not None or v_means is not None, skip, window_left)
        mask = tokens.blocks_for(layout) if mask is None else mask
    blocks = None if mask is None else (mask.block_m, mask.block_n)
    if skip is None:
        if return_skips:
            raise ValueError("return_skips needs skip")
        means = check_means(k_means, v_means, q, k, v, mask, layout, window_left)
        check_attention_kernel(q, k, v, blocks)
        return attend(q, k, v, mask, layout, scale, softcap, window_left, out, means, tokens)
    if not isinstance(skip, ExactSkip):
        raise TypeError(f"skip must be a bsfa.policies.ExactSkip or None, got {type(skip).__name__}")
    if skip.within is not None:
        raise ValueError("skip.within has no say beside a mask: select with it, and give the mask")
    if window_left is not None:
        raise ValueError("skip cannot be combined with window_left")
    check_skip(skip, k_means is not None or v_means is not None)
    if blocks is not None and blocks != (skip.block_m, skip.block_n):
        raise ValueError(
            f"skip has blocks of {skip.block_m} x {skip.block_n}, but the mask has {blocks[0]} x {blocks[1]}"
        )
    check_skip_kernels(q, k, v, skip, layout.max_seqlen_k)
    result = attend_skipping(q, k, v, mask, layout, scale, softcap, skip, out)
    return result if return_skips else result[:2]


def check_tokens(
    tokens: TokenMask, layout: Layout, q: Tensor, corrects: bool, skip: ExactSkip | None, window_left: int | None
) -> None:
    """Raise unless ``tokens`` is a token mask for this call, and nothing is asked for that does not go with one."""
    if not isinstance(tokens, TokenMask):
        raise TypeError(f"tokens must be a bsfa.TokenMask or None, got {type(tokens).__name__}")
    tokens.check_call(layout, q.device)
    for name, given in (
        ("mean correction", corrects),
        ("ExactSkip", skip is not None),
        ("window_left", window_left is not None),
    ):
        if given:
            raise ValueError(f"a token mask cannot be combined with {name}")


def check_skip(policy: Policy | None, mean_correction: bool) -> None:
    """Raise ``ValueError`` if ``policy`` skips by exact logits and dropped blocks are to be corrected for."""
    if mean_correction and isinstance(policy, ExactSkip):
        raise ValueError("mean correction cannot be combined with ExactSkip: what it skips has no means in the softmax")


def check_means(
    k_means: Tensor | None,
    v_means: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    layout: Layout,
    window_left: int | None,
) -> tuple[Tensor, Tensor] | None:
    """The means to correct with, checked; None without, and where there is no mask to correct."""
    if k_means is None and v_means is None:
        return None
    if k_means is None or v_means is None:
        raise ValueError("give both k_means and v_means, or neither")
    block_n = 128 if mask is None else mask.block_n
    for name, t, data in (("k_means", k_means, k), ("v_means", v_means, v)):
        check_data(name, t, (4,), q)
        want = (layout.batch, -(-layout.max_seqlen_k // block_n), k.shape[-2], data.shape[-1])
        if mask is not None and (tuple(t.shape) != want or not t.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous [B, blocks, Hkv, D] = {list(want)}, as pool_blocks returns it for "
                f"block_n = {block_n}, got shape {tuple(t.shape)}"
            )
    check_correction(True, window_left)
    if mask is None:
        return None
    if q.device.type != "cpu":
        check_tma("attention", k_means=k_means, v_means=v_means)
    return k_means, v_means


def check_correction(mean_correction: bool, window_left: int | None) -> None:
    """Raise unless ``mean_correction`` is a bool, and off if there is a window."""
    if not isinstance(mean_correction, bool):
        raise TypeError(f"mean_correction must be a bool, got {type(mean_correction).__name__}")
    if mean_correction and window_left is not None:
        raise ValueError("mean correction cannot be combined with window_left")


def check_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: tuple[int, int] | None,
    op: str = "attention",
) -> None:
    """Raise ``UnsupportedError`` unless the attention kernel of q's device can run this; blocks: those of the mask.

    op: "attention" or "skip_attention".
    """
    check_limits(op, q.device, q.dtype, q.shape[-1], blocks, head_dim_v=v.shape[-1])
    if q.device.type != "cpu":
        check_tma(op, q=q, k=k, v=v)


def check_skip_kernels(q: Tensor, k: Tensor, v: Tensor, skip: ExactSkip, max_seqlen_k: int) -> None:
    """Raise ``UnsupportedError`` unless kernels of q's device can run ``skip`` in its passes, with its bounds."""
    blocks = (skip.block_m, skip.block_n)
    if skip.passes == 1:
        check_attention_kernel(q, k, v, blocks, "skip_attention")
    else:
        check_limits("skip_mask", q.device, q.dtype, q.shape[-1], blocks)
        check_attention_kernel(q, k, v, blocks)
    if skip.bounds:
        check_bounds(q.device, q.dtype, q.shape[-1], blocks, max_seqlen_k)


def check_mask_heads(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    """Raise ``ValueError`` unless the mask is per query head, per KV head or shared."""
    if mask.num_heads not in (q.shape[-2], k.shape[-2], 1):
        raise ValueError(
            f"the mask has {mask.num_heads} heads; it needs {q.shape[-2]} (query), {k.shape[-2]} (KV) or 1"
        )
