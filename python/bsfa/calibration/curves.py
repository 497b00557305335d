"""From scores and true mass of one attention call to curves over a grid of thresholds, in one pass.

Every (tile, block) pair has a critical index: the loosest grid threshold at which the policy still keeps it. Mass and
number of pairs per critical index, summed from the loose end, are the curves. No loop over the grid, and no memory but
the [tiles, heads, blocks] of the scores themselves and [tiles, heads, thresholds].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa.block_mask import BlockMask, MaskGeometry
from bsfa.errors import UnsupportedError
from bsfa.layout import Layout
from bsfa.policies import ScoredPolicy
from bsfa.stages import block_mass, select_for

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
    density: kept / visible blocks.
    The first two never decrease along the grid, the last never increases.
    """

    lost: Tensor
    tail_lost: Tensor
    density: Tensor


def threshold_grid(policy: ScoredPolicy) -> Tensor:
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


def call_geometry(q: Tensor, k: Tensor, causal: bool, policy_m: int, policy_n: int) -> MaskGeometry:
    """Geometry of a whole prompt's attention; raises ``ValueError`` unless it is one prompt without a prefix."""
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(f"one whole prompt at a time: q has shape {tuple(q.shape)}, k {tuple(k.shape)}")
    return MaskGeometry.of(Layout(1, q.shape[1], k.shape[1], causal, q.shape[1]), policy_m, policy_n, q.device)


def check_sharing(policy: ScoredPolicy) -> None:
    """Raise :class:`bsfa.UnsupportedError` for a union of masks: what a head keeps hangs on other heads' thresholds."""
    if policy.scoring.sharing == "union":
        raise UnsupportedError(
            f"{type(policy).__name__} with shared=True cannot be calibrated: in a union of masks a head's recall "
            "depends on the thresholds of the others. Calibrate with shared=False; the union keeps at least as much"
        )


def block_curves(
    policy: ScoredPolicy,
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
    check_sharing(policy)
    geometry = call_geometry(q, k, causal, policy.block_m, policy.block_n)
    heads, points, blocks = q.shape[2], grid.shape[0], geometry.num_blocks
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
    visible = geometry.visible_blocks()
    queries = row_queries(geometry)
    group = heads // scores.shape[1]  # query heads that share a score
    scores = scores.repeat_interleave(group, dim=1) if group > 1 else scores
    forced = mask.to_rows().repeat_interleave(group, dim=1)
    columns = torch.arange(blocks, device=q.device)
    lost = torch.zeros(geometry.num_rows, heads, points, dtype=torch.float64, device=q.device)
    count = torch.zeros(heads, points, dtype=torch.int64, device=q.device)
    step = max(1, CHUNK // max(heads * blocks, 1))
    for row in range(0, geometry.num_rows, step):
        part = slice(row, row + step)
        rows = queries[part].shape[0]
        bins = rows * heads * points + 1  # the last one takes what is not visible
        index = critical_index(policy, grid, scores[part])
        index.masked_fill_(forced[part], points - 1)
        index += torch.arange(0, bins - 1, points, device=q.device).view(rows, heads, 1)
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
        (dropped.sum(0) * (UNIT / q.shape[1])).clamp(0.0, 1.0).to(torch.float32),
        per_query.topk(worst, dim=0).values.mean(0).clamp(0.0, 1.0).to(torch.float32),
        (1.0 - hidden).to(torch.float32),
    )


def _exclusive_sum(x: Tensor) -> Tensor:
    return x.cumsum(-1) - x
