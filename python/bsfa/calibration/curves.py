"""From scores and true mass of one attention call to curves over a grid of thresholds, in one pass.

Every (tile, block) pair has a critical index: the loosest grid threshold at which the policy still keeps it. Mass and
number of pairs per critical index, summed from the loose end, are the curves. No loop over the grid, and no memory but
the [tiles, heads, blocks] of the scores themselves and [tiles, heads, thresholds].

The tiles of ExactSkip are the groups of 64 query rows that it decides on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.errors import UnsupportedError
from bsfa.layout import Layout
from bsfa.measuring import block_mass, tile_max
from bsfa.policies import ExactSkip, ScoredPolicy, Selection, StaticPattern, ThresholdPolicy
from bsfa.policies.exact_skip import SKIP_ROWS
from bsfa.stages import select_for

CHUNK = 1 << 22  # (tile, head, block) triples per histogram
FINEST = 24  # strictest threshold of the grid besides keep-all: 2^-24 from the keep-all end
POINTS_PER_OCTAVE = 4
# Masses are summed as integers of this unit (in tokens): exact in float64, so the order of a GPU's additions is free.
UNIT = 2.0**-30


@dataclass(frozen=True, eq=False)
class BlockCurves:
    """What one attention call would lose and keep at every threshold of a grid: float32 [Hq, G] each.

    lost: softmax probability in dropped blocks, mean over the query tokens.
    tail_lost: the same over the worst share of the query tiles (worst at that threshold, per head).
    density: kept / visible blocks; of ExactSkip, computed / visible (group of rows, block) pairs.
    The first two never decrease along the grid, the last never increases.
    """

    lost: Tensor
    tail_lost: Tensor
    density: Tensor


def threshold_grid(policy: ThresholdPolicy) -> Tensor:
    """Thresholds float32 [G] from strict (index 0: keep-all) to loose, in the policy's units.

    ``keeps_at_least`` policies: 2^-24 .. 1, four an octave. The others: mass with 1 - mass on the same points.
    """
    exponents = torch.arange(FINEST * POINTS_PER_OCTAVE + 1, dtype=torch.float64) / POINTS_PER_OCTAVE - FINEST
    points = torch.exp2(exponents)
    points = points if policy.keeps_at_least else 1.0 - points
    points = torch.unique_consecutive(points.to(torch.float32))
    keep_all = torch.tensor([policy.keep_all_threshold()], dtype=torch.float32)
    return torch.cat((keep_all, points[points != keep_all]))


def critical_index(policy: ScoredPolicy, grid: Tensor, scores: Tensor) -> Tensor:
    """Largest grid index at which each score passes, int64, shape of ``scores``; NaN always passes."""
    if policy.keeps_at_least:
        return torch.bucketize(scores.nan_to_num(nan=torch.inf), grid[1:], right=True)
    return torch.bucketize(-scores.nan_to_num(nan=-1.0), -grid[1:], right=False)


def row_queries(geometry: MaskGeometry) -> Tensor:
    """Query tokens of each row of a call with one sequence that starts the prompt, int64 [num_rows]."""
    first, last = geometry.positions()
    return (last - first + 1).clamp(min=0).to(torch.int64)


def call_layout(q: Tensor, k: Tensor, causal: bool) -> Layout:
    """Layout of a whole prompt's attention; raises ``ValueError`` unless it is one prompt without a prefix."""
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(f"one whole prompt at a time: q has shape {tuple(q.shape)}, k {tuple(k.shape)}")
    return Layout(1, q.shape[1], k.shape[1], causal, q.shape[1])


def call_geometry(q: Tensor, k: Tensor, causal: bool, policy_m: int, policy_n: int) -> MaskGeometry:
    """Its geometry."""
    return MaskGeometry.of(call_layout(q, k, causal), policy_m, policy_n, q.device)


def check_calibratable(policy: ThresholdPolicy, causal: bool = True) -> None:
    """Raise :class:`bsfa.UnsupportedError` where curves would not say what attention keeps: for a union of masks (what
    a head keeps hangs on other heads' thresholds), and for an ExactSkip within another policy or with odd block sizes.
    """
    if isinstance(policy, ExactSkip):
        _check_skip(policy, causal)
    elif isinstance(policy, ScoredPolicy) and policy.scoring.sharing == "union":
        raise UnsupportedError(
            f"{type(policy).__name__} with shared=True cannot be calibrated: in a union of masks a head's recall "
            "depends on the thresholds of the others. Calibrate with shared=False; the union keeps at least as much"
        )


def _check_skip(policy: ExactSkip, causal: bool) -> None:
    if policy.passes != 1:
        raise UnsupportedError(
            "ExactSkip in two passes cannot be calibrated: what a group of rows keeps there hangs on the others of its "
            "tile. Calibrate with passes=1; in two passes the same thresholds keep at least as much"
        )
    if policy.within is not None:
        raise UnsupportedError(
            "ExactSkip within another policy cannot be calibrated: what it sees depends on that policy. Calibrate "
            "without; within another policy it then skips the same blocks or fewer of them in the absolute form"
        )
    if policy.block_m % SKIP_ROWS or (policy.form == "relative" and causal and policy.block_n % policy.block_m):
        raise UnsupportedError(
            f"ExactSkip with blocks of {policy.block_m} x {policy.block_n} cannot be calibrated: block_m must be a "
            f"multiple of {SKIP_ROWS} rows, and for the relative form block_n one of block_m (attention's order of "
            "visits would not be that of a group of rows alone)"
        )
    if policy.form == "relative" and policy.reference is not None and bool((policy.reference > 0).any()):
        raise ValueError("a relative threshold above the running maximum would skip what moves it: reference above 0")


def always_kept(policy: ExactSkip, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Sink and window blocks of each query tile (of ``block_m`` rows) of a prompt, bool [tiles, blocks]."""
    pattern = StaticPattern(
        block_m=policy.block_m,
        block_n=policy.block_n,
        sink_blocks=policy.sink_blocks,
        window_blocks=policy.window_blocks,
    )
    return pattern.select(Selection(q, call_layout(q, k, causal), 1.0, 0.0, None, None)).to_rows()[:, 0]


def skip_curves(
    policies: Sequence[ExactSkip],
    grid: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    tail: float = 1.0,
) -> list[BlockCurves]:
    """:func:`block_curves` of ExactSkips that differ in their references alone, from one look at the logits."""
    policy = policies[0]
    for other in policies:
        check_calibratable(other, causal)
    geometry = call_geometry(q, k, causal, SKIP_ROWS, policy.block_n)
    heads, rows = q.shape[2], geometry.num_rows
    grid = grid.to(q.device)
    maths = {"causal": causal, "softmax_scale": softmax_scale, "softcap": softcap}
    blocks = {"block_m": SKIP_ROWS, "block_n": policy.block_n}
    maxima = tile_max(q, k, form=policy.form, **blocks, **maths)  # type: ignore[arg-type]
    maxima = torch.where(maxima.isnan(), torch.inf, maxima)
    mass = block_mass(q, k, lse, **blocks, **maths)  # type: ignore[arg-type]
    kept = always_kept(policy, q, k, causal)
    tile = torch.arange(rows, device=q.device) * SKIP_ROWS // policy.block_m
    forced = kept[tile, None].expand(-1, heads, -1)

    def critical(cuts: Tensor) -> Callable[[slice], Tensor]:
        def of(part: slice) -> Tensor:
            # As ExactSkip.cuts adds them up, so that ties fall as in attention. Every level is one threshold's cut.
            levels = grid[1:].log() + cuts[part, :, None]
            return torch.searchsorted(levels, maxima[part].contiguous(), right=True)

        return of

    found = []
    for one in policies:
        cuts = one.with_threshold(1.0).cuts(heads, kept.shape[0], q.device).expand(heads, kept.shape[0])
        found.append(_sum_up(geometry, critical(cuts.t()[tile]), forced, mass, grid.shape[0], q.shape[1], tail))
    return found


def block_curves(
    policy: ThresholdPolicy,
    grid: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    tail: float = 1.0,
) -> BlockCurves:
    """Lost mass and density of a prompt at every threshold of ``grid``.

    Where query heads share scores and a mask (``sharing="group"``), each has its own curves under that mask.

    q [1, S, Hq, D], k [1, S, Hkv, D], lse float32 [1, Hq, S] of dense attention. tail: share of the query tiles, 0 to 1
    (rounded up to whole tiles), whose mean loss is ``tail_lost``.
    """
    if isinstance(policy, ExactSkip):
        return skip_curves(
            [policy], grid, q, k, lse, causal=causal, softmax_scale=softmax_scale, softcap=softcap, tail=tail
        )[0]
    assert isinstance(policy, ScoredPolicy)
    check_calibratable(policy)
    geometry = call_geometry(q, k, causal, policy.block_m, policy.block_n)
    heads = q.shape[2]
    grid = grid.to(q.device)
    # What is kept at the loosest threshold is kept at all of them, by score or by rule.
    chosen = select_for(
        q,
        k,
        policy.with_threshold(float(grid[-1])),
        causal=causal,
        softmax_scale=softmax_scale,
        softcap=softcap,
        return_scores=True,
    )
    assert isinstance(chosen, tuple)
    mask, scores = chosen
    assert isinstance(mask, BlockMask)
    mass = block_mass(
        q,
        k,
        lse,
        block_m=policy.block_m,
        block_n=policy.block_n,
        causal=causal,
        softmax_scale=softmax_scale,
        softcap=softcap,
    )
    group = heads // scores.shape[1]  # query heads that share a score
    scores = scores.repeat_interleave(group, dim=1) if group > 1 else scores
    forced = mask.to_rows().repeat_interleave(group, dim=1)

    def critical(part: slice) -> Tensor:
        return critical_index(policy, grid, scores[part])

    return _sum_up(geometry, critical, forced, mass, grid.shape[0], q.shape[1], tail)


def _sum_up(
    geometry: MaskGeometry,
    critical: Callable[[slice], Tensor],
    forced: Tensor,
    mass: Tensor,
    points: int,
    tokens: int,
    tail: float,
) -> BlockCurves:
    """Curves of pairs [tiles, heads, blocks]: ``critical`` gives the critical indices of some tiles, ``forced`` says
    which are kept at every threshold, ``mass`` is their attention mass.
    """
    heads, blocks, device = mass.shape[1], geometry.num_blocks, mass.device
    visible = geometry.visible_blocks()
    queries = row_queries(geometry)
    columns = torch.arange(blocks, device=device)
    lost = torch.zeros(geometry.num_rows, heads, points, dtype=torch.float64, device=device)
    count = torch.zeros(heads, points, dtype=torch.int64, device=device)
    step = max(1, CHUNK // max(heads * blocks, 1))
    for row in range(0, geometry.num_rows, step):
        part = slice(row, row + step)
        rows = queries[part].shape[0]
        bins = rows * heads * points + 1  # the last one takes what is not visible
        index = critical(part)
        index.masked_fill_(forced[part], points - 1)
        index += torch.arange(0, bins - 1, points, device=device).view(rows, heads, 1)
        index.masked_fill_(columns >= visible[part, None, None], bins - 1)
        units = (mass[part].double() * (queries[part, None, None] / UNIT)).round_()
        sums = torch.bincount(index.flatten(), weights=units.flatten(), minlength=bins)
        lost[part] = sums[:-1].view(rows, heads, points)
        count += torch.bincount(index.flatten(), minlength=bins)[:-1].view(rows, heads, points).sum(0)
    # Dropped at g: everything whose critical index is below g.
    dropped = _exclusive_sum(lost)
    hidden = _exclusive_sum(count).double() / visible.sum().clamp(min=1)
    worst = max(1, math.ceil(tail * geometry.num_rows))
    per_query = dropped * (UNIT / queries[:, None, None].clamp(min=1))
    return BlockCurves(
        (dropped.sum(0) * (UNIT / tokens)).clamp(0.0, 1.0).to(torch.float32),
        per_query.topk(worst, dim=0).values.mean(0).clamp(0.0, 1.0).to(torch.float32),
        (1.0 - hidden).to(torch.float32),
    )


def _exclusive_sum(x: Tensor) -> Tensor:
    return x.cumsum(-1) - x
