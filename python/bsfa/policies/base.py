"""What a policy is, and what all policies that compare a score with a threshold share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.layout import Layout, check_block_sizes
from bsfa.limits import check_limits, check_tma

Threshold = float | Sequence[float] | Tensor
# What float32, which the kernels compare, rounds to 0 and to 1: numbers up to the one, and from the other on.
ZERO_IN_FLOAT32, ONE_IN_FLOAT32 = 2.0**-150, 1.0 - 2.0**-25
Q = TypeVar("Q", bound="Policy")
P = TypeVar("P", bound="ThresholdPolicy")


@dataclass(frozen=True, eq=False)
class Selection:
    """What a policy may look at: the queries, where the tokens lie, and the pooled keys (if it asks for them)."""

    q: Tensor
    layout: Layout
    softmax_scale: float
    softcap: float
    prompt_lens: Tensor | None
    summary: Tensor | None
    k: Tensor | None = None  #: the keys themselves, laid out as the layout says


class Scoring(NamedTuple):
    """Which scoring rule of csrc/include/bsfa/params.h a policy follows, with its parameters; names as in schemas.h."""

    rule: str
    pooling: str = "mean"
    stride: int = 16
    sharing: str = "none"


class Extras(NamedTuple):
    """What else SelectParams (params.h) keeps."""

    min_ratio: float = 0.0
    probability: float = 1.0
    rescue_stride: int = 0
    rescue_probability: float = 0.0
    rescue_seed: int = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Policy:
    """Base of all policies. ``block_m`` x ``block_n``: query tile and KV block in tokens."""

    block_m: int = 128
    block_n: int = 128

    #: Name in threshold files and on the command line.
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_block_sizes(self.block_m, self.block_n)

    @property
    def needs_summary(self) -> bool:
        """Whether :meth:`select` needs pooled keys (:func:`bsfa.pool_blocks` with :attr:`summary_pooling`)."""
        return False

    @property
    def needs_keys(self) -> bool:
        """Whether :meth:`select` needs the keys themselves."""
        return False

    @property
    def summary_pooling(self) -> str:
        """How the keys of a block are pooled, where :attr:`needs_summary`."""
        return "mean"

    def select(self, selection: Selection) -> BlockMask | None:
        """The blocks to keep, or None for dense attention."""
        raise NotImplementedError

    def to(self: Q, device: torch.device) -> Q:
        """The same policy with per-head values that are tensors on ``device``, so that calls do not copy them again."""
        return self


def check_count(owner: str, name: str, value: int, least: int = 0) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{owner}.{name} must be at least {least}, got {value}")


def check_share(owner: str, name: str, value: float) -> None:
    """Raise unless ``value`` is a number in 0 .. 1."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:  # false for NaN
        raise ValueError(f"{owner}.{name} must be 0 .. 1, got {value}")


def check_flag(owner: str, name: str, value: bool) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be a bool, got {type(value).__name__}")


@dataclass(frozen=True, eq=False, kw_only=True)
class ThresholdPolicy(Policy):
    """A policy with a threshold of 0 .. 1 per head, which calibration can choose and a threshold file can hold.

    sink_blocks: first KV blocks of the sequence, always kept.
    window_blocks: KV blocks up to and including the tile's own, always kept; at least 1 (the diagonal).
    """

    sink_blocks: int = 0
    window_blocks: int = 1

    #: Field that holds the threshold.
    threshold_name: ClassVar[str] = ""
    #: True: a block is kept iff score >= threshold. False: iff score < threshold.
    keeps_at_least: ClassVar[bool] = True
    #: Raised whenever scores change meaning; stored in threshold files.
    version: ClassVar[int] = 1
    #: Fields that came after files had been written: a file without one means its default.
    added_parameters: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_count(owner, "sink_blocks", self.sink_blocks)
        check_count(owner, "window_blocks", self.window_blocks, 1)
        value = self.threshold
        if isinstance(value, Tensor):
            if value.dim() != 1 or not value.is_floating_point():
                raise ValueError(f"{owner}.{self.threshold_name} must be a float tensor of shape [heads]")
            # Values are read where that needs no device sync; comparisons with NaN are false.
            if value.device.type == "cpu" and not torch.compiler.is_compiling() and value.numel():
                low, high = (float(x) for x in value.aminmax())
                if not (low >= 0.0 and high <= 1.0):
                    raise ValueError(f"{owner}.{self.threshold_name} must be 0 .. 1, got {low} .. {high}")
            return
        for x in value if isinstance(value, Sequence) else (value,):
            if not isinstance(x, int | float) or isinstance(x, bool):
                raise TypeError(f"{owner}.{self.threshold_name} must be a number, a sequence of them or a tensor")
            if not math.isfinite(x) or not 0.0 <= x <= 1.0:
                raise ValueError(f"{owner}.{self.threshold_name} must be 0 .. 1, got {x}")

    @property
    def threshold(self) -> Threshold:
        """The threshold, whatever it is called."""
        value: Threshold = getattr(self, self.threshold_name)
        return value

    def with_threshold(self: P, threshold: Threshold) -> P:
        """The same policy with another threshold."""
        return replace(self, **{self.threshold_name: threshold})  # type: ignore[arg-type]

    def to(self: P, device: torch.device) -> P:
        """The same policy with its tensors on ``device``."""
        value = self.threshold
        return self.with_threshold(value.to(device)) if isinstance(value, Tensor) and value.device != device else self

    @property
    def shares_thresholds(self) -> bool:
        """Whether the query heads of a KV head share one threshold."""
        return False

    def keep_all_threshold(self) -> float:
        """The threshold at which every visible block is kept (a dense head)."""
        return 0.0 if self.keeps_at_least else 1.0

    def _threshold_tensor(self, num_heads: int, device: torch.device) -> Tensor:
        """The threshold as float32 [num_heads]."""
        value = self.threshold
        if isinstance(value, int | float):
            return torch.full((num_heads,), float(value), dtype=torch.float32, device=device)
        t = torch.as_tensor(value, dtype=torch.float32, device=device)
        if t.shape != (num_heads,):
            raise ValueError(
                f"{type(self).__name__}.{self.threshold_name} has {t.shape[0]} values but "
                f"{'k' if self.shares_thresholds else 'q'} has {num_heads} heads"
            )
        return t


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredPolicy(ThresholdPolicy):
    """A policy that scores (query tile, KV block) pairs per head and compares with a threshold per head.

    Scores and thresholds are per query head; where :attr:`scoring` says ``sharing="group"``, per KV head.

    sink_blocks, window_blocks: see :class:`ThresholdPolicy`.
    last_tiles: query tiles at the end of the prompt that keep every block.
    min_blocks: at least this many best-scored blocks are kept.
    """

    last_tiles: int = 0
    min_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_count(owner, "last_tiles", self.last_tiles)
        check_count(owner, "min_blocks", self.min_blocks)

    @property
    def shares_thresholds(self) -> bool:
        """Whether the query heads of a KV head share one threshold."""
        return self.scoring.sharing == "group"

    @property
    def scoring(self) -> Scoring:
        """The scoring rule and its parameters."""
        raise NotImplementedError

    @property
    def needs_summary(self) -> bool:
        """Whether the rule looks at pooled keys."""
        return self.scoring.rule in ("relative_max", "pooled")

    @property
    def needs_keys(self) -> bool:
        """Whether the rule looks at the keys themselves."""
        return not self.needs_summary

    @property
    def summary_pooling(self) -> str:
        """How keys and queries are pooled."""
        return self.scoring.pooling

    @property
    def scale_factor(self) -> float:
        """What the rule multiplies ``softmax_scale`` with."""
        return 1.0

    @property
    def extras(self) -> Extras:
        """What is kept beyond threshold, sink, window, last tiles and min_blocks."""
        return Extras()

    def one_threshold(self) -> float | None:
        """The threshold of all heads as the kernels want it (:meth:`thresholds_for`); None if heads may differ."""
        value = self.threshold
        if not isinstance(value, int | float):
            return None
        if self.keeps_at_least:
            return -1.0 if value <= ZERO_IN_FLOAT32 else float(value)
        return math.inf if value >= ONE_IN_FLOAT32 else float(value)

    def thresholds_for(self, num_heads: int, device: torch.device) -> Tensor:
        """float32 [num_heads] as the kernels want it: keep-all becomes -1 (at least) or +inf (below).

        ``num_heads``: query heads, or KV heads where the rule shares scores within a group.
        """
        t = self._threshold_tensor(num_heads, device)
        if self.keeps_at_least:
            return torch.where(t <= 0.0, -1.0, t).contiguous()
        return torch.where(t >= 1.0, math.inf, t).contiguous()

    def _score_arguments(self, s: Selection, op: str) -> tuple[object, ...]:
        layout, scoring = s.layout, self.scoring
        rule = scoring.rule
        check_limits(
            op,
            s.q.device,
            s.q.dtype,
            s.q.shape[-1],
            (self.block_m, self.block_n),
            rule,
            scoring.stride if rule == "antidiagonal" else None,
            scoring.sharing,
            -(-layout.max_seqlen_k // self.block_n),
        )
        if self.needs_summary and s.summary is None:
            raise ValueError(f"{type(self).__name__} needs pooled keys: pass the result of bsfa.pool_blocks")
        if self.needs_keys and s.k is None:
            raise ValueError(f"{type(self).__name__} needs the keys themselves: pass k")
        if s.q.device.type != "cpu" and rule != "pooled":  # whose kernels take any strides
            read = {"summary": s.summary} if self.needs_summary else {"k": s.k}
            check_tma(op, q=s.q, **{name: t for name, t in read.items() if t is not None})
        return (
            s.q,
            s.summary if self.needs_summary else None,
            s.k if self.needs_keys else None,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.block_table if self.needs_keys else None,
            layout.seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            layout.num_mask_rows(self.block_m),
            self.block_m,
            self.block_n,
            layout.causal,
            s.softmax_scale * self.scale_factor,
            s.softcap,
            scoring.rule,
            scoring.pooling,
            scoring.stride,
            scoring.sharing,
            self.sink_blocks,
            self.window_blocks,
        )

    def score(self, selection: Selection) -> Tensor:
        """Scores float32 [rows, heads, blocks]; -1 where a block is not visible. For calibration and plots."""
        scores: Tensor = torch.ops.bsfa.score_blocks(*self._score_arguments(selection, "score_blocks"))
        return scores

    def select(self, selection: Selection) -> BlockMask:
        """Score, compare with the thresholds, add what is always kept."""
        q, heads = selection.q, selection.q.shape[-2]
        arguments = self._score_arguments(selection, "select_blocks")
        if self.scoring.sharing == "group":
            assert selection.summary is not None
            heads = selection.summary.shape[-2]
        threshold = self.one_threshold()  # passed by value where it can be: a tensor costs a kernel that fills it
        words, counts = torch.ops.bsfa.select_blocks(
            *arguments,
            self.thresholds_for(heads, q.device) if threshold is None else None,
            self.last_tiles,
            self.min_blocks,
            *self.extras,
            selection.prompt_lens,
            0.0 if threshold is None else threshold,
        )
        return BlockMask(words, counts, MaskGeometry.of(selection.layout, self.block_m, self.block_n, q.device))
