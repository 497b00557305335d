"""StaticPattern: sinks and a sliding window of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.policies.base import Policy, Selection, check_count


@dataclass(frozen=True, eq=False, kw_only=True)
class StaticPattern(Policy):
    """The first ``sink_blocks`` KV blocks and the ``window_blocks`` up to the query tile's own ("A-shape").

    Follows StreamingLLM's pattern at block granularity; units are KV blocks, the window counts the tile's own block
    and is at least 1. Without causality the window reaches to both sides. One mask is shared by all heads.
    """

    sink_blocks: int = 2
    window_blocks: int = 4
    name: ClassVar[str] = "static"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("StaticPattern", "sink_blocks", self.sink_blocks)
        check_count("StaticPattern", "window_blocks", self.window_blocks, 1)

    def select(self, selection: Selection) -> BlockMask:
        """The pattern; torch operations only, so it runs on any device without a host sync."""
        g = MaskGeometry.of(selection.layout, self.block_m, self.block_n, selection.q.device)
        blocks = torch.arange(g.num_blocks, device=selection.q.device)
        if g.num_rows == 0 or g.seqlens_q.shape[0] == 0:
            nothing = torch.zeros((g.num_rows, 1, g.num_blocks), dtype=torch.bool, device=blocks.device)
            return BlockMask.from_rows(nothing, g)
        first, last = (torch.div(p, self.block_n, rounding_mode="floor").unsqueeze(-1) for p in g.positions())
        if not g.causal:  # tiles beyond the keys have the last block for their own
            limit = g.visible_blocks().unsqueeze(-1) - 1
            first, last = torch.minimum(first, limit), torch.minimum(last, limit)
        window = (blocks > first - self.window_blocks) & (blocks < last + self.window_blocks)
        return BlockMask.from_rows(((blocks < self.sink_blocks) | window).unsqueeze(1), g)
