"""ExactSkip: what is decided inside attention, after the exact product of queries and keys."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask
from bsfa.errors import UnsupportedError
from bsfa.policies.base import Policy, Selection, Threshold, ThresholdPolicy, check_count, check_flag
from bsfa.policies.token_topk import TokenTopK

FORMS = ("absolute", "relative")

#: Query rows that are skipped together (kSkipRows in csrc/include/bsfa/params.h).
SKIP_ROWS = 64


def _knots(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions as float32 on ``device``; copied there once, so that later calls wait for nothing."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if torch.compiler.is_compiling():
        return torch.tensor(positions, dtype=torch.float32, device=device)
    return _knots_once(positions, device)


@functools.lru_cache(maxsize=256)
def _knots_once(positions: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(positions, dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False, kw_only=True)
class ExactSkip(ThresholdPolicy):
    """Compute ``q . k`` for every block, and skip the exponentials and V of those whose logits are all low.

    Two forms of one rule, per query head, for groups of 64 query rows (positions 64 i .. 64 i + 63) and KV blocks. With
    the logits ``s = cap(softmax_scale * q . k)`` of visible keys and ``cut = ln(ratio) + reference`` in nats:

    * ``"absolute"`` (BSFA, arXiv 2512.07011): a block is skipped iff ``max(s) < cut``.
    * ``"relative"`` (skip-softmax or BLASST, arXiv 2512.12087): iff ``max(s) < m + cut`` in every row, m being the
      row's largest logit in the blocks visited before. Order of visits: the tile's last kept block (its diagonal),
      block 0 (the sink), then the others from the last to the first.

    ratio: 0 .. 1, a number or one per query head; 0 skips nothing. For ``"relative"`` it is BLASST's lambda.
    reference: float32 [heads, knots] nats at the query positions ``positions`` (tokens, rising; absolute, so that
    chunks of a prompt decide as the whole does), linear in between, constant beyond; taken at the first position of the
    query tile. None: 0. :meth:`absolute` makes the policy of a threshold in nats.
    within: a policy that chooses blocks first; ExactSkip decides on what it kept. None: all blocks.
    counted: skipped blocks stay in the softmax's denominator and in the LSE, which are exact then; only their product
    with V is left out. Default: they are left out of both, as in the originals, and the rest is renormalised.

    passes: 1 decides within attention, as above. 2 goes over all ``q . k`` first and makes a mask, with which attention
    without skipping follows: faster where most is skipped, slower where little is. A block is then skipped by a whole
    query tile, where all of its groups would skip it: for the same threshold the kept pairs are those of one pass and
    more. Running maxima are over all blocks visited before, skipped or not, which makes no difference as long as cuts
    are at most 0. Not with ``counted`` (:class:`bsfa.UnsupportedError`).

    bounds: on CUDA, multiply queries and keys rounded to 8 bits first, at a fraction of the cost. With the norms of
    what rounding took away this bounds every logit from above, and a block that all groups of a query tile are certain
    to skip is left out; the passes then go over the others. Output, LSE and counts are bitwise those without bounds,
    only the time differs. It pays where more than about a fifth is skipped; not where queries and keys are so long that
    bounds say little of how far a logit is below its cut. Memory for a call: 1 byte per element of k, of batch x
    max_seqlen_k tokens where keys are batched or paged, of all tokens and 128 per sequence where they are packed. For
    bfloat16 or float16, head_dim 64 or 128, and blocks of 128 x 128. On the CPU it changes nothing. Not with
    ``counted`` (:class:`bsfa.UnsupportedError`).

    Sink and window blocks are never skipped, nor is a block with a NaN logit. Without ``bounds`` no product ``q . k``
    is saved: at most about twice as fast as dense.

    Differs from the originals: sinks are kept, thresholds go by absolute position, 64 x 128 tiles (BSFA: 128 x 64).
    """

    ratio: Threshold = 0.0
    form: str = "relative"
    reference: Tensor | None = None
    positions: tuple[int, ...] = ()
    within: Policy | None = None
    counted: bool = False
    sink_blocks: int = 1
    passes: int = 1
    bounds: bool = False
    name: ClassVar[str] = "exact-skip"
    threshold_name: ClassVar[str] = "ratio"
    keeps_at_least: ClassVar[bool] = True
    added_parameters: ClassVar[frozenset[str]] = frozenset({"passes", "bounds"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(f"ExactSkip.form must be one of {', '.join(FORMS)}, got {self.form!r}")
        check_flag("ExactSkip", "counted", self.counted)
        check_flag("ExactSkip", "bounds", self.bounds)
        check_count("ExactSkip", "passes", self.passes, 1)
        if self.passes > 2:
            raise ValueError(f"ExactSkip.passes must be 1 or 2, got {self.passes}")
        if self.passes == 2 and self.counted:
            raise UnsupportedError(
                "ExactSkip cannot count what it skips (counted) in two passes: the second one does not see it. Use "
                "passes=1"
            )
        if self.bounds and self.counted:
            raise UnsupportedError(
                "ExactSkip cannot count what it skips (counted) with bounds: what they leave out never reaches "
                "attention. Use bounds=False"
            )
        if self.within is not None:
            if not isinstance(self.within, Policy):
                raise TypeError(f"ExactSkip.within must be a policy or None, got {type(self.within).__name__}")
            if isinstance(self.within, ExactSkip):
                raise ValueError("ExactSkip.within cannot be another ExactSkip")
            if isinstance(self.within, TokenTopK):
                raise ValueError("ExactSkip.within cannot be a TokenTopK: skipping knows no keys of single queries")
            if (self.within.block_m, self.within.block_n) != (self.block_m, self.block_n):
                raise ValueError(
                    f"ExactSkip has blocks of {self.block_m} x {self.block_n}, but within has {self.within.block_m} x "
                    f"{self.within.block_n}"
                )
        if not isinstance(self.positions, tuple) or any(type(p) is not int or p < 0 for p in self.positions):
            raise TypeError("ExactSkip.positions must be a tuple of token positions (ints from 0)")
        if any(b <= a for a, b in itertools.pairwise(self.positions)):
            raise ValueError("ExactSkip.positions must rise")
        if self.reference is None:
            if self.positions:
                raise ValueError("ExactSkip.positions belong to a reference")
            return
        r = self.reference
        if not isinstance(r, Tensor) or r.dtype != torch.float32:
            raise TypeError("ExactSkip.reference must be a float32 tensor or None")
        if r.dim() != 2 or r.shape[1] != len(self.positions) or not self.positions:
            raise ValueError(
                f"ExactSkip.reference must be [heads, knots] with one knot for each of the {len(self.positions)} "
                f"positions, got shape {tuple(r.shape)}"
            )
        # -inf skips nothing at and near its knot.
        if r.device.type == "cpu" and not torch.compiler.is_compiling() and bool((r.isnan() | (r == torch.inf)).any()):
            raise ValueError("ExactSkip.reference must be finite, or -inf where nothing is to be skipped")

    @classmethod
    def absolute(cls, nats: float | Tensor, **options: object) -> ExactSkip:
        """The absolute form with a threshold in nats for all positions: a number, or a tensor [heads]."""
        reference = torch.as_tensor(nats, dtype=torch.float32).reshape(-1, 1)
        return cls(ratio=1.0, form="absolute", reference=reference, positions=(0,), **options)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> ExactSkip:
        """The same policy with its tensors on ``device``; calls there wait for no copy, the first one neither."""
        moved = super().to(device)
        _knots(self.positions, device)
        reference = None if moved.reference is None else moved.reference.to(device)
        within = None if moved.within is None else moved.within.to(device)
        if reference is moved.reference and within is moved.within:
            return moved
        return replace(moved, reference=reference, within=within)

    @property
    def needs_summary(self) -> bool:
        """Whether ``within`` looks at pooled keys."""
        return self.within is not None and self.within.needs_summary

    @property
    def needs_keys(self) -> bool:
        """Whether ``within`` looks at the keys."""
        return self.within is not None and self.within.needs_keys

    @property
    def summary_pooling(self) -> str:
        """How ``within`` wants keys pooled."""
        return "mean" if self.within is None else self.within.summary_pooling

    def select(self, selection: Selection) -> BlockMask | None:
        """The blocks on which attention decides: those of ``within``."""
        return None if self.within is None else self.within.select(selection)

    def cuts(self, num_heads: int, num_tiles: int, device: torch.device) -> Tensor:
        """``cut`` in nats of each head and query tile, float32 [num_heads, num_tiles], or [num_heads, 1] if all tiles
        have the same; -inf: nothing is skipped.
        """
        log_ratio = self._threshold_tensor(num_heads, device).log().unsqueeze(1)
        if self.reference is None:
            return log_ratio
        r = self.reference.to(device)
        if r.shape[0] not in (1, num_heads):
            raise ValueError(f"ExactSkip.reference has {r.shape[0]} heads but q has {num_heads}")
        first = torch.arange(num_tiles, dtype=torch.float32, device=device) * self.block_m
        knots = _knots(self.positions, device)
        last = len(self.positions) - 1
        # Not searchsorted, which inductor of torch 2.11 does not compile for a number of tiles that changes.
        i = ((first[:, None] >= knots).sum(-1) - 1).clamp(min=0)
        j = (i + 1).clamp(max=last)
        left, right = r[:, i], r[:, j]
        a = knots[i]
        share = ((first - a) / (knots[j] - a).clamp(min=1.0)).clamp(0.0, 1.0)
        inside = torch.lerp(left, right, share)
        inside = torch.where(inside.isnan(), -torch.inf, inside)  # between -inf and a number
        at = torch.where((first <= a) | (left == right), left, inside)
        return (log_ratio + at).contiguous()
