"""Fixed: a mask that the caller made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.layout import Layout
from bsfa.policies.base import Policy, Selection


@dataclass(frozen=True, eq=False, kw_only=True)
class Fixed(Policy):
    """A given :class:`bsfa.BlockMask`, for prompts of its own geometry only (``ValueError`` otherwise)."""

    mask: BlockMask
    block_m: int = field(init=False, default=128)
    block_n: int = field(init=False, default=128)
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        if not isinstance(self.mask, BlockMask):
            raise TypeError(f"Fixed.mask must be a bsfa.BlockMask, got {type(self.mask).__name__}")
        object.__setattr__(self, "block_m", self.mask.block_m)
        object.__setattr__(self, "block_n", self.mask.block_n)

    def select(self, selection: Selection) -> BlockMask:
        """The mask, if it fits the call."""
        check_geometry(self.mask, selection.layout, selection.q.device)
        return self.mask


def check_geometry(mask: BlockMask, layout: Layout, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``mask`` was made for a call of this layout. Makes no tensor on a GPU."""
    if mask.device != device:
        raise ValueError(f"the mask is on {mask.device} but q is on {device}")
    g = mask.geometry
    rows = layout.num_mask_rows(mask.block_m)
    fits = (g.max_seqlen_q, g.max_seqlen_k, g.num_rows, g.causal) == (
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        rows,
        layout.causal,
    )
    if fits and device.type == "cpu" and not torch.compiler.is_compiling():
        fits = g.same_lengths(MaskGeometry.of(layout, mask.block_m, mask.block_n, device))
    if not fits:
        raise ValueError(
            f"the mask does not fit this call: {mask!r} against max_seqlen_q={layout.max_seqlen_q}, "
            f"max_seqlen_k={layout.max_seqlen_k}, rows={rows}, causal={layout.causal}"
        )
