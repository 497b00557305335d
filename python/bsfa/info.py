"""What a call did: returned with ``return_info=True``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask
from bsfa.policies import Policy


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """What one attention call ran.

    policy: the policy asked for (None: dense).
    mask: the blocks attended to; None if the call was dense.
    dense_reason: why a call with a sparse policy ran dense, else None.
    device: where the call ran.
    mean_corrected: whether dropped blocks entered the softmax through their means (``mean_correction``).
    """

    policy: Policy | None
    mask: BlockMask | None
    dense_reason: str | None
    device: torch.device
    mean_corrected: bool = False

    def density(self) -> Tensor:
        """Kept / visible blocks as a float32 scalar on the device (1.0 for dense calls)."""
        return torch.ones((), device=self.device) if self.mask is None else self.mask.density()
