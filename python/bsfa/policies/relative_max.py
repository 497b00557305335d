"""RelativeMax: FlashPrefill's threshold relative to the best block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsfa.policies.base import ScoredPolicy, Scoring, Threshold, check_flag


@dataclass(frozen=True, eq=False, kw_only=True)
class RelativeMax(ScoredPolicy):
    """Keep a block iff its energy is at least ``alpha`` times the largest energy of the query tile (FlashPrefill).

    Follows FlashPrefill v1 (arXiv 2603.06199), per query head. With kbar_J the mean key of block J and M the largest
    visible logit of the tile, the energy is ``E_J = sum_r exp(softmax_scale * q_r . kbar_J - M)`` over the tile's rows
    r that see the whole block, and the score is ``E_J / max_J E_J``. ``alpha``: 0 .. 1, a number or one per query head;
    0 keeps every visible block. Published values: 0.18 (Llama-3.1-8B), 0.08 (Qwen2.5), 0.12 (Qwen3-30B-A3B). Blocks
    are units of sink, window and min_blocks; ``last_tiles`` counts query tiles at the end of the prompt.

    ``shared``: one mask per KV head, as in FlashPrefill V2 (arXiv 2608.19758): r runs over the rows of all query heads
    that read the KV head, with one M and one largest energy, so a head of small logits has little say; ``alpha`` is a
    number or one per KV head. Published: alpha 0.1, 2 sink blocks, a window of 4.

    Differs from the originals: softmax_scale and softcap are honoured; rows beyond the end add nothing; query tiles
    are aligned to absolute positions, so chunks give the mask of the whole prompt; a window of at least one block.
    From V2 also: a tile is ``block_m`` tokens of every head, there 128 (token, head) pairs (so its last_n counts other
    tiles); a row counts for the blocks that it sees whole, as in v1, there from their first token on.
    """

    alpha: Threshold = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_tiles: int = 2
    shared: bool = False
    name: ClassVar[str] = "relative-max"
    threshold_name: ClassVar[str] = "alpha"
    keeps_at_least: ClassVar[bool] = True
    added_parameters: ClassVar[frozenset[str]] = frozenset({"shared"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("RelativeMax", "shared", self.shared)

    @property
    def scoring(self) -> Scoring:
        """See :class:`bsfa.policies.base.Scoring`."""
        return Scoring("relative_max", sharing="group" if self.shared else "none")
