"""CumulativeMass: BFLA's smallest set of blocks that holds a share of the pooled attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsfa.policies.base import Extras, ScoredPolicy, Scoring, Threshold, check_count, check_flag, check_share
from bsfa.pooling import POOLINGS as POOLED

#: Kinds of pooled keys, and one that looks at the keys themselves.
POOLINGS = (*POOLED, "flat64")


@dataclass(frozen=True, eq=False, kw_only=True)
class CumulativeMass(ScoredPolicy):
    """Keep the best blocks until their probability reaches ``mass`` (BFLA's keep_mass).

    Follows BFLA's torch builder. A query tile and a KV block J have one logit s_J, p = softmax of s over the visible
    blocks, and blocks are taken in descending order of p until their sum reaches ``mass``: the block that reaches it
    included, the best block always. Ties: lower block first. ``mass``: 0 .. 1, a number or one per query head; 1 keeps
    every visible block. Published values: 0.90 / 0.95 / 0.99.

    pooling: what makes the logit.
        "mean", "maxabs" (per dimension the value of largest magnitude, with its sign; ties: the earlier token),
        "center" (token count // 2): ``s_J = softmax_scale * qbar . kbar_J`` of the pooled tokens of tile and block.
        "flat64": no pooling; ``s_J = softmax_scale / 64 * max over groups (g, r) of sum_{t < 64} q[64 g + t] .
        k[64 r + t]``, for groups of 64 tokens of tile and block; block sizes must be multiples of 64. What BFLA
        recommends. The default is "mean", which takes any block size and is what earlier threshold files mean.
    original_scale: flat64 without the division by 64, as BFLA has it: a far sharper softmax, so that its mass of 0.99
        keeps what a smaller one keeps here. Kept as an option because published values of mass refer to it.
    probability: also keep blocks with p above this (BFLA's threshold, default there 0.005); None is off.
    keep_ratio: keep at least the best ``floor(keep_ratio * visible blocks)``; ``min_blocks``: at least that many.
    rescue_stride: above 0, also keep blocks with (131 * tile + 17 * block + rescue_seed) % rescue_stride == 0.
    rescue_probability: also keep this share of the blocks, by a hash of tile, block, head and ``rescue_seed``.
    shared: one mask per KV head, the union of those of its query heads (the original's form); each still has its own
        ``mass``.

    Differs from the original: masks per query head unless ``shared``; the tail's divisor is its true token count, and
    keep_ratio and min_blocks count visible blocks only; flat64 is normalised; groups without any token are left out
    instead of counting as zeros; float32 throughout; tiles are aligned to absolute positions, also for the rescue, so
    chunks give the mask of the whole prompt; the diagonal is kept for every chunk offset; one sink block and a window
    of two blocks of ``block_n`` tokens stand for its local band.
    """

    mass: Threshold = 0.95
    pooling: str = "mean"
    original_scale: bool = False
    probability: float | None = None
    keep_ratio: float = 0.0
    sink_blocks: int = 1
    window_blocks: int = 2
    rescue_stride: int = 0
    rescue_probability: float = 0.0
    rescue_seed: int = 1
    shared: bool = False
    name: ClassVar[str] = "cumulative-mass"
    threshold_name: ClassVar[str] = "mass"
    keeps_at_least: ClassVar[bool] = False
    added_parameters: ClassVar[frozenset[str]] = frozenset(
        {
            "pooling",
            "original_scale",
            "probability",
            "keep_ratio",
            "rescue_stride",
            "rescue_probability",
            "rescue_seed",
            "shared",
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "CumulativeMass"
        if self.pooling not in POOLINGS:
            raise ValueError(f"{owner}.pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        check_flag(owner, "original_scale", self.original_scale)
        check_flag(owner, "shared", self.shared)
        if self.pooling == "flat64" and (self.block_m % 64 or self.block_n % 64):
            raise ValueError(
                f"{owner}.pooling 'flat64' needs block sizes divisible by 64, got {self.block_m} x {self.block_n}"
            )
        if self.original_scale and self.pooling != "flat64":
            raise ValueError(f"{owner}.original_scale belongs to pooling 'flat64', got {self.pooling!r}")
        if self.probability is not None:
            check_share(owner, "probability", self.probability)
        check_share(owner, "keep_ratio", self.keep_ratio)
        check_count(owner, "rescue_stride", self.rescue_stride)
        check_share(owner, "rescue_probability", self.rescue_probability)
        check_count(owner, "rescue_seed", self.rescue_seed)

    @property
    def scoring(self) -> Scoring:
        """See :class:`bsfa.policies.base.Scoring`."""
        sharing = "union" if self.shared else "none"
        if self.pooling == "flat64":
            return Scoring("flat64", sharing=sharing)
        return Scoring("pooled", self.pooling, sharing=sharing)

    @property
    def scale_factor(self) -> float:
        """64 undoes the division of flat64."""
        return 64.0 if self.original_scale else 1.0

    @property
    def extras(self) -> Extras:
        """See :class:`bsfa.policies.base.Extras`."""
        return Extras(
            float(self.keep_ratio),
            1.0 if self.probability is None else float(self.probability),
            self.rescue_stride,
            float(self.rescue_probability),
            self.rescue_seed,
        )
