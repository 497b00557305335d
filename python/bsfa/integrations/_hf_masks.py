"""What an attention mask of transformers says, in a form that varlen attention can use.

transformers describes a mask as a function of indices ("causal", "sliding window", "packed sequences", ...) plus a 2-D
padding mask. :func:`bsfa_mask` reads that description and returns it as a :class:`KeyMask`, of size O(tokens): the
N x N mask is never made, and the unpadding is worked out once per forward pass instead of once per layer. A
description it does not know raises :class:`bsfa.UnsupportedError`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from bsfa.errors import UnsupportedError

Index = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Packing:
    """How a padded batch ``[B, S, heads, D]`` turns into packed sequences ``[total, heads, D]`` and back.

    cu_seqlens_q, cu_seqlens_k: int32 [N + 1]. max_seqlen_q, max_seqlen_k: longest sequence, tokens.
    index_q, index_k: (batch, token) of each packed query or key, int64 [total]; None: all of them in order.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    index_q: Index | None
    index_k: Index | None

    @staticmethod
    def pack(x: Tensor, index: Index | None) -> Tensor:
        """``[B, S, heads, D]`` to ``[total, heads, D]``."""
        return x.flatten(0, 1) if index is None else x[index]

    def unpack(self, out: Tensor, batch: int, q_length: int) -> Tensor:
        """``[total_q, heads, D]`` to ``[B, q_length, heads, D]``; zeros at padding."""
        if self.index_q is None:
            return out.unflatten(0, (batch, q_length))
        padded = out.new_zeros((batch, q_length, *out.shape[1:]))
        padded[self.index_q] = out
        return padded

    def to(self, device: torch.device) -> Packing:
        """The same on another device."""

        def move(index: Index | None) -> Index | None:
            return None if index is None else (index[0].to(device), index[1].to(device))

        return replace(
            self,
            cu_seqlens_q=self.cu_seqlens_q.to(device),
            cu_seqlens_k=self.cu_seqlens_k.to(device),
            index_q=move(self.index_q),
            index_k=move(self.index_k),
        )


@dataclass(frozen=True, eq=False)
class MaskFacts:
    """One call's mask in words: the queries are the last ``q_length`` of the first ``kv_length`` keys (if causal).

    window: tokens that a query sees including its own, or None. Keys beyond ``kv_length`` (the empty part of a static
    cache) are never seen. packing: None if no key and no query is masked otherwise.
    """

    causal: bool
    window: int | None
    q_length: int
    kv_length: int
    packing: Packing | None


class KeyMask(Tensor):
    """bool ``[B, 1, 1, kv_length]``, True at visible keys, with the :class:`MaskFacts` of the call attached.

    It has four dimensions so that transformers passes it on untouched. Only ``to`` keeps the facts; the result of any
    other operation is a plain tensor, which the attention function refuses rather than guesses about. Nothing can be
    appended to it: that needs a full mask.
    """

    facts: MaskFacts

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.cat, torch.concat, torch.concatenate):
            raise UnsupportedError(
                "this model appends to the attention mask, which needs a full mask; bsfa makes none. Use "
                "attn_implementation='sdpa'"
            )
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @staticmethod
    def make(valid: Tensor, facts: MaskFacts) -> KeyMask:
        """From bool [B, kv_length] or [B, 1, 1, kv_length]."""
        mask: KeyMask = torch.Tensor._make_subclass(KeyMask, valid if valid.dim() == 4 else valid[:, None, None, :])
        mask.facts = facts
        return mask

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``torch.Tensor.to``; the facts move along."""
        moved: Tensor = super().to(*args, **kwargs)
        if moved is self:
            return self
        packing = self.facts.packing
        return KeyMask.make(moved, replace(self.facts, packing=None if packing is None else packing.to(moved.device)))


@dataclass(frozen=True, eq=False)
class _Pattern:
    """An index pattern of transformers.masking_utils, taken apart. All parts hold at once."""

    causal: bool = False
    window: int | None = None
    reach: int | None = None  #: distance limit to both sides
    chunk: int | None = None
    segments: Tensor | None = None  #: [B, S], equal within a packed sequence
    remapped: bool = False  #: indices count from the start of the packed sequence

    def join(self, other: _Pattern) -> _Pattern:
        mine, theirs = (
            {name: value for name, value in vars(p).items() if value is not None and value is not False}
            for p in (self, other)
        )
        if any(mine[name] is not theirs[name] for name in mine.keys() & theirs.keys()):
            raise UnsupportedError("an attention mask that joins two patterns of one kind cannot be run by bsfa")
        return replace(self, **theirs)


def _take_apart(fn: Callable[..., Any]) -> _Pattern:
    """Recognise the index functions that transformers itself builds, by name and by what they close over."""
    name = getattr(fn, "__qualname__", type(fn).__name__)
    if getattr(fn, "__module__", None) == masking_utils.__name__:
        if fn is masking_utils.causal_mask_function:
            return _Pattern(causal=True)
        if fn is masking_utils.bidirectional_mask_function:
            return _Pattern()
        bound = inspect.getclosurevars(fn).nonlocals
        maker = name.split(".")[0]
        if maker == "and_masks":
            pattern = _Pattern()
            for part in bound["mask_functions"]:
                pattern = pattern.join(_take_apart(part))
            return pattern
        if maker == "sliding_window_overlay":
            return _Pattern(window=int(bound["sliding_window"]))
        if maker == "sliding_window_bidirectional_overlay":
            return _Pattern(reach=int(bound["sliding_window"]))
        if maker == "chunked_overlay":
            return _Pattern(chunk=int(bound["chunk_size"]))
        if maker == "packed_sequence_mask_function":
            return _Pattern(segments=bound["packed_sequence_mask"])
        if maker == "remap_positions_for_packed_sequence":
            return replace(_take_apart(bound["mask_function"]), remapped=True)
    raise UnsupportedError(
        f"bsfa cannot run an attention mask with the pattern '{name}': it knows causal, sliding-window, bidirectional, "
        "padded and packed masks. Use attn_implementation='sdpa' for this input"
    )


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _unpadding(valid: Tensor, q_length: int, causal: bool, window: int | None) -> Packing | None:
    """Packing of the visible keys ``valid [B, kv_length]``, or None if all are visible. Synchronises with the GPU.

    Causal: queries are the last columns of ``valid``, and those at padding are left out. Otherwise every query counts.
    """
    batch, kv_length = valid.shape
    q_valid = valid[:, kv_length - q_length :] if causal else valid.new_ones((batch, q_length))
    lengths_q, lengths_k = q_valid.sum(1), valid.sum(1)
    runs = valid[:, :1].sum(1) + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
    host_q, host_k, host_runs = torch.stack([lengths_q, lengths_k, runs]).tolist()
    if all(n == kv_length for n in host_k):
        return None
    if window is not None and max(host_runs) > 1:
        raise UnsupportedError(
            "bsfa cannot run a sliding window over a padding mask with holes (visible tokens on both sides of masked "
            "ones): pad on one side only, or use attn_implementation='sdpa'"
        )
    index_q = q_valid.nonzero(as_tuple=True)
    index_k = valid.nonzero(as_tuple=True)
    return Packing(
        _cumulative(lengths_q),
        _cumulative(lengths_k),
        int(max(host_q, default=0)),
        int(max(host_k, default=0)),
        (index_q[0], index_q[1]),
        (index_k[0], index_k[1]),
    )


def _packed_sequences(segments: Tensor, batch: int) -> Packing:
    """Packing of sequences that lie one after the other in each row of ``segments [B, S]``."""
    segments = segments.expand(batch, -1)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = starts.flatten().nonzero().squeeze(1)
    cu = torch.nn.functional.pad(first, (0, 1), value=segments.numel()).to(torch.int32)
    longest = int((cu[1:] - cu[:-1]).max())
    return Packing(cu, cu, longest, longest, None, None)


def padding_facts(valid: Tensor, q_length: int, causal: bool, window: int | None) -> MaskFacts:
    """Facts of a 2-D padding mask ``[B, kv_length]`` (non-zero: visible) for the last ``q_length`` tokens."""
    valid = valid.bool()
    if causal and valid.shape[1] < q_length:
        raise ValueError(f"attention_mask covers {valid.shape[1]} tokens, fewer than the {q_length} queries")
    return MaskFacts(causal, window, q_length, valid.shape[1], _unpadding(valid, q_length, causal, window))


def bsfa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls once per forward pass and kind of layer.

    Returns a :class:`KeyMask`, also where all is plainly causal: not every decoder layer of transformers says so itself
    (``is_causal``), and without a mask such a layer would see the future. For a single query (decode) the exact bool
    mask ``[B, 1, 1, kv_length]`` or None, as "sdpa" does. Raises :class:`bsfa.UnsupportedError` for patterns that bsfa
    cannot run, ``ValueError`` for a padding mask that does not cover the tokens.
    """
    if q_length == 1:
        sdpa_mask: Callable[..., Tensor | None] = masking_utils.sdpa_mask
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            config=config,
            device=device,
            **kwargs,
        )

    pattern = _take_apart(mask_function)
    # A caller that forbids the shortcut goes on to compute with the mask; a KeyMask would mislead it.
    may_skip = allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip
    if not may_skip and pattern.segments is None:
        raise UnsupportedError(
            "this model changes the attention mask after it was made (allow_is_causal_skip=False), which needs a full "
            "mask; bsfa makes none. Use attn_implementation='sdpa'"
        )
    if pattern.remapped and pattern.segments is None:
        raise UnsupportedError("bsfa cannot run an attention mask with remapped positions but no packed sequences")

    visible = int(q_offset) + q_length - kv_offset if pattern.causal else kv_length
    if not 0 < visible <= kv_length or (pattern.causal and visible < q_length):
        raise UnsupportedError(
            f"bsfa cannot place {q_length} queries at {int(q_offset)} over {kv_length} keys from {kv_offset} on"
        )
    if pattern.chunk is not None and kv_offset + visible > pattern.chunk:
        raise UnsupportedError(
            f"bsfa has no chunked attention (attention_chunk_size = {pattern.chunk} < {kv_offset + visible} tokens): "
            "use attn_implementation='sdpa'"
        )
    if pattern.reach is not None and pattern.reach < max(q_length, visible) - 1:
        raise UnsupportedError(
            f"bsfa has no bidirectional sliding window (reach {pattern.reach} < {max(q_length, visible)} tokens): "
            "use attn_implementation='sdpa'"
        )
    if pattern.window is not None and not pattern.causal:
        raise UnsupportedError("bsfa has no sliding window without causality: use attn_implementation='sdpa'")

    valid: Tensor | None = None
    packing: Packing | None = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise UnsupportedError(f"bsfa cannot run an attention mask of shape {tuple(attention_mask.shape)}")
        if pattern.segments is not None:
            raise UnsupportedError("bsfa cannot run packed sequences together with a padding mask")
        valid = attention_mask[:, kv_offset : kv_offset + visible].to(device=device, dtype=torch.bool)
        if valid.shape[1] < visible:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {kv_offset + visible}: it must "
                "cover the cached tokens too"
            )
        packing = _unpadding(valid, q_length, pattern.causal, pattern.window)
    elif pattern.segments is not None:
        if pattern.segments.shape[-1] != visible or visible != q_length:
            raise UnsupportedError("bsfa cannot run packed sequences together with cached tokens")
        packing = _packed_sequences(pattern.segments.to(device), batch_size)

    if valid is None:
        valid = torch.ones((batch_size, visible), dtype=torch.bool, device=device)
    return KeyMask.make(valid, MaskFacts(pattern.causal, pattern.window, q_length, visible, packing))
