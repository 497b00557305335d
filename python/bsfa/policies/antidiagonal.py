"""Antidiagonal: XAttention's sums along the antidiagonals of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsfa.policies.base import ScoredPolicy, Scoring, Threshold, check_count

STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Antidiagonal(ScoredPolicy):
    """Keep the best blocks until they hold ``mass`` of the antidiagonal attention (XAttention, arXiv 2503.16428).

    Tokens form groups of ``stride`` at absolute positions. Query group r and key group c have the logit
    ``softmax_scale / stride * sum_{s < stride} q[r * stride + stride - 1 - s] . k[c * stride + s]`` (a sum along
    antidiagonals, which every vertical and every slash crosses), each query group a softmax over the key groups c
    (c <= r if causal), and a block's weight for a query tile is the sum of the probabilities that fall into it. Sink
    and window blocks come first, then blocks in descending order of weight (ties: lower block first), until the
    weights reach ``mass`` of their sum, the block that reaches it included. ``mass``: 0 .. 1, a number or one per
    query head; 1 keeps every visible block. Published: strides 8 and 16, mass 0.9 (0.8 .. 0.95 per head).

    stride: tokens, 4, 8, 16, 32 or 64, dividing both block sizes. Cost: 1 / stride of dense attention's QK product.
    min_blocks counts in that order, so sink and window blocks count too. No summary is needed, but the keys.
    On CUDA the scratch memory is larger than that of other policies: up to 75 MB for scores, and 512 bytes per KV block
    and SM; at 1M tokens on an H200 about 620 MB, where the others take less than 100 MB.

    Differs from the original: tiles are aligned to absolute positions, so chunks give the mask of the whole prompt;
    groups that the end of the prompt cuts are filled with zeros, groups without a token left out; softmax_scale and
    softcap (of the group's logit) are honoured; float32 throughout.
    """

    mass: Threshold = 0.9
    stride: int = 16
    sink_blocks: int = 1
    window_blocks: int = 1
    name: ClassVar[str] = "antidiagonal"
    threshold_name: ClassVar[str] = "mass"
    keeps_at_least: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Antidiagonal", "stride", self.stride)
        if self.stride not in STRIDES:
            raise ValueError(f"Antidiagonal.stride must be one of {', '.join(map(str, STRIDES))}, got {self.stride}")
        if self.block_m % self.stride or self.block_n % self.stride:
            raise ValueError(
                f"Antidiagonal.stride {self.stride} must divide the block sizes, got {self.block_m} x {self.block_n}"
            )

    @property
    def scoring(self) -> Scoring:
        """See :class:`bsfa.policies.base.Scoring`."""
        return Scoring("antidiagonal", stride=self.stride)
