"""What a policy is, and what all policies that compare a score with a threshold share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.layout import Layout, check_block_sizes
from bsfa.limits import check_limits, check_tma

Threshold = float | Sequence[float] | Tensor


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
    #: Whether :meth:`select` needs pooled keys.
    needs_summary: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_block_sizes(self.block_m, self.block_n)

    def select(self, selection: Selection) -> BlockMask | None:
        """The blocks to keep, or None for dense attention."""
        raise NotImplementedError


def check_count(owner: str, name: str, value: int, least: int = 0) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{owner}.{name} must be at least {least}, got {value}")


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredPolicy(Policy):
    """A policy that scores (query tile, KV block) pairs per query head and compares with a threshold per head.

    sink_blocks: first KV blocks of the sequence, always kept.
    window_blocks: KV blocks up to and including the tile's own, always kept; at least 1 (the diagonal).
    last_tiles: query tiles at the end of the prompt that keep every block.
    min_blocks: at least this many best-scored blocks are kept.
    """

    sink_blocks: int = 0
    window_blocks: int = 1
    last_tiles: int = 0
    min_blocks: int = 0

    #: Field that holds the threshold.
    threshold_name: ClassVar[str] = ""
    #: True: a block is kept iff score >= threshold. False: iff score < threshold.
    keeps_at_least: ClassVar[bool] = True
    #: Raised whenever scores change meaning; stored in threshold files.
    version: ClassVar[int] = 1
    needs_summary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_count(owner, "sink_blocks", self.sink_blocks)
        check_count(owner, "window_blocks", self.window_blocks, 1)
        check_count(owner, "last_tiles", self.last_tiles)
        check_count(owner, "min_blocks", self.min_blocks)
        value = self.threshold
        if isinstance(value, Tensor):
            if value.dim() != 1 or not value.is_floating_point():
                raise ValueError(f"{owner}.{self.threshold_name} must be a float tensor of shape [query heads]")
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

    def with_threshold(self, threshold: Threshold) -> ScoredPolicy:
        """The same policy with another threshold."""
        return replace(self, **{self.threshold_name: threshold})  # type: ignore[arg-type]

    @property
    def scoring(self) -> Scoring:
        """The scoring rule and its parameters."""
        raise NotImplementedError

    @property
    def extras(self) -> Extras:
        """What is kept beyond threshold, sink, window, last tiles and min_blocks."""
        return Extras()

    def keep_all_threshold(self) -> float:
        """The threshold at which every visible block is kept (a dense head)."""
        return 0.0 if self.keeps_at_least else 1.0

    def thresholds_for(self, num_heads: int, device: torch.device) -> Tensor:
        """float32 [num_heads] as the kernels want it: keep-all becomes -1 (at least) or +inf (below)."""
        value = self.threshold
        if isinstance(value, int | float):
            t = torch.full((num_heads,), float(value), dtype=torch.float32, device=device)
        else:
            t = torch.as_tensor(value, dtype=torch.float32, device=device)
        if t.shape != (num_heads,):
            raise ValueError(
                f"{type(self).__name__}.{self.threshold_name} has {t.shape[0]} values but q has {num_heads} heads"
            )
        if self.keeps_at_least:
            return torch.where(t <= 0.0, -1.0, t).contiguous()
        return torch.where(t >= 1.0, math.inf, t).contiguous()

    def _score_arguments(self, s: Selection, op: str) -> tuple[object, ...]:
        blocks, rule = (self.block_m, self.block_n), self.scoring.rule
        stride = self.scoring.stride if rule == "antidiagonal" else None
        check_limits(op, s.q.device, s.q.dtype, s.q.shape[-1], blocks, rule, stride)
        if self.needs_summary and s.summary is None:
            raise ValueError(f"{type(self).__name__} needs pooled keys: pass the result of bsfa.pool_blocks")
        if not self.needs_summary and s.k is None:
            raise ValueError(f"{type(self).__name__} needs the keys themselves: pass k")
        if s.q.device.type != "cpu" and rule != "pooled":  # whose kernels take any strides
            read = {"summary": s.summary} if self.needs_summary else {"k": s.k}
            check_tma(op, q=s.q, **{name: t for name, t in read.items() if t is not None})
        layout, scoring = s.layout, self.scoring
        return (
            s.q,
            s.summary if self.needs_summary else None,
            None if self.needs_summary else s.k,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            None if self.needs_summary else layout.block_table,
            layout.seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            layout.num_mask_rows(self.block_m),
            self.block_m,
            self.block_n,
            layout.causal,
            s.softmax_scale,
            s.softcap,
            scoring.rule,
            scoring.pooling,
            scoring.stride,
            scoring.sharing,
            self.sink_blocks,
            self.window_blocks,
        )

    def score(self, selection: Selection) -> Tensor:
        """Scores float32 [rows, query heads, blocks]; -1 where a block is not visible. For calibration and plots."""
        scores: Tensor = torch.ops.bsfa.score_blocks(*self._score_arguments(selection, "score_blocks"))
        return scores

    def select(self, selection: Selection) -> BlockMask:
        """Score, compare with the thresholds, add what is always kept."""
        q = selection.q
        words, counts = torch.ops.bsfa.select_blocks(
            *self._score_arguments(selection, "select_blocks"),
            self.thresholds_for(q.shape[-2], q.device),
            self.last_tiles,
            self.min_blocks,
            *self.extras,
            selection.prompt_lens,
        )
        return BlockMask(words, counts, MaskGeometry.of(selection.layout, self.block_m, self.block_n, q.device))
