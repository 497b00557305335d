"""RelativeMax: FlashPrefill's threshold relative to the best block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsfa.policies.base import ScoredPolicy, Scoring, Threshold


@dataclass(frozen=True, eq=False, kw_only=True)
class RelativeMax(ScoredPolicy):
    """Keep a block iff its energy is at least ``alpha`` times the largest energy of the query tile (FlashPrefill).

    Follows FlashPrefill v1 (arXiv 2603.06199), per query head. With kbar_J the mean key of block J and M the largest
    visible logit of the tile, the energy is ``E_J = sum_r exp(softmax_scale * q_r . kbar_J - M)`` over the tile's rows
    r that see the whole block, and the score is ``E_J / max_J E_J``. ``alpha``: 0 .. 1, a number or one per query head;
    0 keeps every visible block. Published values: 0.18 (Llama-3.1-8B), 0.08 (Qwen2.5), 0.12 (Qwen3-30B-A3B). Blocks
    are units of sink, window and min_blocks; ``last_tiles`` counts query tiles at the end of the prompt.

    Differs from the original: softmax_scale and softcap are honoured; rows beyond the end add nothing; query tiles
    are aligned to absolute positions, so chunks give the mask of the whole prompt; a window of at least one block.
    """

    alpha: Threshold = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_tiles: int = 2
    name: ClassVar[str] = "relative-max"
    threshold_name: ClassVar[str] = "alpha"
    keeps_at_least: ClassVar[bool] = True

    @property
    def scoring(self) -> Scoring:
        """See :class:`bsfa.policies.base.Scoring`."""
        return Scoring("relative_max")
