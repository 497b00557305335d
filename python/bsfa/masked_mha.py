"""masked_mha: attention over the keys that an indexer chose for each query; merge_attention: of two parts, one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsfa.attending import attend
from bsfa.attention import Result
from bsfa.errors import UnsupportedError
from bsfa.info import AttentionInfo
from bsfa.layout import Layout, check_length, check_out
from bsfa.policies import TokenTopK
from bsfa.stages import check_attention_kernel, check_tokens, resolve_layout, resolve_scale
from bsfa.token_mask import TokenMask

#: Longest sequence, in keys, that :func:`masked_mha` masks unless it is told otherwise.
MAX_MASKED_SEQLEN = 16384

BEYOND = ("error", "masked")


def masked_mha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_indices: Tensor | TokenMask,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    max_dense_seqlen: int | None = None,
    max_masked_seqlen: int = MAX_MASKED_SEQLEN,
    beyond: str = "error",
    check: bool | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    return_info: bool = False,
) -> Result:
    """Multi-head attention in which each query sees only the keys that were chosen for it, the same for all heads.

    For the prefill of models with a token-level indexer (DeepSeek sparse attention), un-absorbed: ``q [B, Sq, Hq, D]``,
    ``k [B, Sk, Hkv, D]``, ``v [B, Sk, Hkv, Dv]``, for MLA D = 192 (128 + 64 rope) and Dv = 128; or packed with
    ``cu_seqlens_*`` and ``max_seqlen_*``; or paged with ``block_table`` and ``seqlens_k``, as
    :func:`bsfa.block_sparse_attention` takes them. Follows vLLM's top-k masked MHA (#47327, #48770).

    topk_indices: int32 ``[B, Sq, topk]`` (or ``[B * Sq, topk]``), packed ``[total_q, topk]``: positions in the query's
    sequence, -1 padded, unsorted, duplicates allowed; or a :class:`bsfa.TokenMask` made of them.
    check: see :meth:`bsfa.TokenMask.from_indices`. Invalid indices raise on the CPU by default; on a GPU ``check=True``
    raises and waits for the device, else ``info.token_mask.check()`` does, where the call was masked.

    The length of the longest sequence decides (``max_seqlen_k``, a number on the host: give the true maximum to paged
    calls), not how many keys are chosen:

    * up to ``max_dense_seqlen`` (default: topk, the columns of ``topk_indices``; 0 for a TokenMask and where ``causal``
      is off): dense causal attention. The best topk of at most topk visible keys are all of them, so the indices have
      nothing to say, and are not read, except to check them. Give 0 for sets that are not the top of all visible keys.
    * up to ``max_masked_seqlen``: masked, at the speed of dense attention over the 128 x 128 blocks that hold a key.
    * beyond, gathering the chosen keys (absorbed MLA over the latent cache, which bsfa does not have) costs less:
      ``beyond="error"`` raises :class:`bsfa.UnsupportedError`, ``beyond="masked"`` masks all the same.

    Where it pays to stop masking depends on the heads per GPU: see docs/masked_mha.md, and what the measurements
    ``mmha.cross.*`` of benchmarks/README.md say.

    Returns ``out`` (q's shape with v's head_dim); with ``return_lse`` also lse, with ``return_info`` also an
    :class:`bsfa.AttentionInfo`, as :func:`bsfa.attention`. A query without keys gives out = 0, lse = -inf.
    Raises ``ValueError``/``TypeError`` for bad input and :class:`bsfa.UnsupportedError` where there is no kernel.
    """
    layout = resolve_layout(
        q, k, v, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqlens_k
    )
    scale = resolve_scale(softmax_scale, q.shape[-1], softcap)
    if beyond not in BEYOND:
        raise ValueError(f"beyond must be one of {', '.join(BEYOND)}, got {beyond!r}")
    check_length("max_masked_seqlen", max_masked_seqlen)
    if max_dense_seqlen is not None:
        check_length("max_dense_seqlen", max_dense_seqlen)
    if out is not None:
        check_out(out, q, k, v)
    indices = _laid_out(topk_indices, layout)
    if max_dense_seqlen is None:
        max_dense_seqlen = indices.shape[-1] if isinstance(indices, Tensor) and causal else 0
    longest = layout.max_seqlen_k
    dense = longest <= max_dense_seqlen
    if not dense and longest > max_masked_seqlen and beyond == "error":
        raise UnsupportedError(
            f"masked_mha: a sequence of {longest} keys is longer than max_masked_seqlen = {max_masked_seqlen}, "
            "beyond which gathering the chosen keys (absorbed MLA) is expected to cost less. Use such a kernel, or "
            'pass beyond="masked" or a larger max_masked_seqlen to mask all the same.'
        )
    policy = TokenTopK(indices=indices, check=check)  # by name: torch.compile of torch 2.11 wants it so
    tokens: TokenMask | None = None
    if not dense or isinstance(indices, TokenMask) or _reads(indices, check):
        tokens = policy.token_mask(layout)
        check_tokens(tokens, layout, q, False, None, None)
    elif indices.device != q.device:
        raise ValueError(f"topk_indices are on {indices.device} but q is on {q.device}")
    reason = None
    if dense:
        reason, tokens = f"{longest} keys are at most max_dense_seqlen = {max_dense_seqlen}: all are chosen", None
    check_attention_kernel(q, k, v, None if tokens is None else (128, 128))
    mask = None if tokens is None else tokens.blocks_for(layout)
    result, lse = attend(q, k, v, mask, layout, scale, softcap, None, out, None, tokens)
    if not return_lse and not return_info:
        return result
    extra: tuple[Any, ...] = (lse,) if return_lse else ()
    if return_info:
        extra = (*extra, AttentionInfo(policy, mask, reason, q.device, q.shape[-2], token_mask=tokens))
    return (result, *extra)


def _laid_out(topk_indices: Tensor | TokenMask, layout: Layout) -> Tensor | TokenMask:
    """The indices with a dimension for the batch where q has one."""
    if isinstance(topk_indices, TokenMask):
        return topk_indices
    if not isinstance(topk_indices, Tensor):
        raise TypeError(f"topk_indices must be a tensor or a TokenMask, got {type(topk_indices).__name__}")
    if topk_indices.dtype != torch.int32:
        raise TypeError(f"topk_indices must be int32, got {topk_indices.dtype}")
    if layout.cu_seqlens_q is None and topk_indices.dim() == 2 and topk_indices.shape[0] == layout.total_q:
        return topk_indices.unflatten(0, (layout.batch, layout.max_seqlen_q))
    rows = (layout.total_q,) if layout.cu_seqlens_q is not None else (layout.batch, layout.max_seqlen_q)
    if tuple(topk_indices.shape[:-1]) != rows:
        raise ValueError(f"topk_indices must be [{', '.join(map(str, rows))}, topk], got {tuple(topk_indices.shape)}")
    return topk_indices


def _reads(indices: Tensor, check: bool | None) -> bool:
    """Whether indices that the result does not depend on are checked."""
    if check is None:
        return indices.device.type == "cpu" and not torch.compiler.is_compiling()
    return check


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of two parts, from the attention over each: ``(out, lse)``.

    out_a, out_b: ``[B, Sq, Hq, Dv]`` or ``[total_q, Hq, Dv]``, one shape and dtype; lse_a, lse_b: float32
    ``[B, Hq, Sq]`` or ``[Hq, total_q]``, natural log, as attention returns them. No key may be in both parts. For
    context that comes in chunks: attend to each with its own keys, and merge one after the other.

    ``lse = ln(e^lse_a + e^lse_b)``, ``out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse)``, in float32; out in the
    dtype of the parts. A part that a query saw nothing of (-inf) adds nothing, whatever its output holds; where both
    are, out = 0 and lse = -inf. Torch operations: any device, torch.compile, autograd.
    Raises ``ValueError``/``TypeError`` for parts that do not fit each other.
    """
    for name, t in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.device != out_a.device:
            raise ValueError(f"{name} is on {t.device} but out_a is on {out_a.device}")
    if out_a.dtype != out_b.dtype or not out_a.is_floating_point():
        raise TypeError(f"out_a and out_b must have one floating-point dtype, got {out_a.dtype} and {out_b.dtype}")
    if lse_a.dtype != torch.float32 or lse_b.dtype != torch.float32:
        raise TypeError(f"lse_a and lse_b must be float32, got {lse_a.dtype} and {lse_b.dtype}")
    if out_a.dim() not in (3, 4) or out_a.shape != out_b.shape:
        raise ValueError(
            f"out_a and out_b must be [B, Sq, Hq, Dv] or [total_q, Hq, Dv], of one shape, got {tuple(out_a.shape)} and "
            f"{tuple(out_b.shape)}"
        )
    want = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    for name, t in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tuple(t.shape) != want:
            raise ValueError(f"{name} must have shape {want} beside out_a, got {tuple(t.shape)}")
    top = torch.maximum(lse_a, lse_b)
    base = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b
    lse = base + torch.log(total)
    share = torch.where(total > 0, 1.0 / total, 0.0)

    def part(out: Tensor, weight: Tensor) -> Tensor:
        w = (weight * share).transpose(-1, -2).unsqueeze(-1)
        return torch.where(w == 0, 0.0, out.float() * w)

    return (part(out_a, weight_a) + part(out_b, weight_b)).to(out_a.dtype), lse
