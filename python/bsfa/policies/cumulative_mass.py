"""CumulativeMass: BFLA's smallest set of blocks that holds a share of the pooled attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsfa.policies.base import ScoredPolicy, Scoring, Threshold


@dataclass(frozen=True, eq=False, kw_only=True)
class CumulativeMass(ScoredPolicy):
    """Keep the best blocks until their pooled probability mass reaches ``mass`` (BFLA's keep_mass, mean pooling).

    Follows BFLA: with qbar the mean query of the tile and kbar_J the mean key of block J, p = softmax over visible
    blocks of ``softmax_scale * qbar . kbar_J``; blocks are taken in descending order of p until their sum reaches
    ``mass``, the block that reaches it included, the best block always. Ties: lower block first. ``mass``: 0 .. 1, a
    number or one per query head; 1 keeps every visible block. Published values: 0.90 / 0.95 / 0.99.

    Differs from the original: per query head instead of the union over the group; the tail block's mean divides by its
    true count; float32 throughout; the diagonal is kept for every chunk offset; one sink block and a window of two
    blocks of ``block_n`` tokens stand for its local band.
    """

    mass: Threshold = 0.95
    sink_blocks: int = 1
    window_blocks: int = 2
    name: ClassVar[str] = "cumulative-mass"
    threshold_name: ClassVar[str] = "mass"
    keeps_at_least: ClassVar[bool] = False

    @property
    def scoring(self) -> Scoring:
        """See :class:`bsfa.policies.base.Scoring`."""
        return Scoring("pooled")
