"""What a call did: returned with ``return_info=True``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask
from bsfa.policies import Policy
from bsfa.token_mask import TokenMask


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """What one attention call ran.

    policy: the policy asked for (None: dense).
    mask: the blocks attended to; None if the call was dense.
    dense_reason: why a call with a sparse policy ran dense, else None.
    device: where the call ran.
    num_heads: query heads.
    mean_corrected: whether dropped blocks entered the softmax through their means (``mean_correction``).
    skips: int64 [query heads, 2] of :class:`bsfa.policies.ExactSkip`, on the device: pairs (group of 64 query rows,
    kept block that one of them sees) that were met, and those of them that were skipped, in one pass or two. None:
    nothing was to be skipped.
    token_mask: the keys that each query saw, of :class:`bsfa.policies.TokenTopK`; ``mask`` is its blocks. None: whole
    blocks.
    """

    policy: Policy | None
    mask: BlockMask | None
    dense_reason: str | None
    device: torch.device
    num_heads: int
    mean_corrected: bool = False
    skips: Tensor | None = None
    token_mask: TokenMask | None = None

    def density(self, per_head: bool = False) -> Tensor:
        """Share of the visible blocks whose values were used: a float32 scalar on the device, or [query heads].

        That is the density of the mask (kept / visible blocks; 1.0 without), times the share of the kept pairs that
        were not skipped, ``1 - skips[:, 1] / skips[:, 0]``; for each head, and of these the mean.
        """
        if self.skips is None and not per_head:
            return torch.ones((), device=self.device) if self.mask is None else self.mask.density()
        if self.mask is None:
            kept = torch.ones(self.num_heads, device=self.device)
        else:
            kept = self.mask.density(per_head=True).repeat_interleave(self.num_heads // self.mask.num_heads)
        if self.skips is not None:
            kept = kept * (1.0 - self.skipped())
        return kept if per_head else kept.mean()

    def skipped(self) -> Tensor:
        """Share of the pairs met that were skipped, float32 [query heads] on the device; zeros without skipping."""
        if self.skips is None:
            return torch.zeros(self.num_heads, device=self.device)
        met, skipped = self.skips.unbind(1)
        return (skipped / met.clamp(min=1)).float()
