"""Where to spend: thresholds that share out the blocks over layers and heads so that the measured error is least.

The error of a (layer, head) at a threshold is known from the calibration pass (:mod:`bsfa.calibration.output_error`),
and so is its density. Errors of heads are taken to add up. Then the best use of a budget takes, of every head's lower
convex hull of error over density, the segments that gain most per block: the order of the Lagrangian optima for falling
prices. What no whole segment fits into goes to single steps, the best first.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsfa.calibration.choose import HeldOut, at_index, by_length, split_prompts, spread_over_prompts, table_at
from bsfa.calibration.collect import CalibrationCurves
from bsfa.prompts import length_name
from bsfa.thresholds import CALIBRATED, ThresholdTable

PROMISE = (
    "none: the thresholds have the least estimated error for their density, on dense inputs, the errors of layers and "
    "heads taken to add up"
)
TINY = 1e-12  # densities and errors this close are equal


@dataclass(frozen=True)
class Step:
    """A segment of one head's hull: from grid index ``start`` to the stricter ``end``."""

    head: int
    start: int
    end: int
    density: float  # more of it
    gain: float  # less error


def hull(density: list[float], error: list[float], head: int = 0) -> list[Step]:
    """Segments of the lower convex hull of error over density, from the loosest threshold on: falling gain per density.

    density never increases along the grid, error never decreases.
    """
    points: list[int] = []
    for g in reversed(range(len(density))):  # density rises, error falls
        if points and density[g] - density[points[-1]] <= TINY:
            if error[g] < error[points[-1]]:
                points.pop()  # as dense and better
            else:
                continue
        elif points and error[g] >= error[points[-1]]:
            continue  # denser and no better
        while len(points) > 1:
            a, b = points[-2], points[-1]
            before = (error[a] - error[b]) * (density[g] - density[b])
            after = (error[b] - error[g]) * (density[b] - density[a])
            if before > after:
                break
            points.pop()
        points.append(g)
    return [Step(head, a, b, density[b] - density[a], error[a] - error[b]) for a, b in itertools.pairwise(points)]


def _steps(density: Tensor, error: Tensor) -> list[Step]:
    """Segments of all heads [N, G], the best first; ties go to the lower head and the looser segment."""
    found = [s for h, (d, e) in enumerate(zip(density.tolist(), error.tolist(), strict=True)) for s in hull(d, e, h)]
    return sorted(found, key=lambda s: -s.gain / s.density)  # stable, and a head's own segments fall anyway


def _loosest(density: Tensor, error: Tensor) -> Tensor:
    """Where the hulls begin, int64 [N]: the least density, there the least error."""
    last = density[:, -1:]
    return (density > last + TINY).sum(-1)


def monotone(error: Tensor) -> Tensor:
    """Errors [..., G] that never decrease along the grid."""
    return error.cummax(-1).values


def least_error(density: Tensor, error: Tensor, budget: float) -> Tensor:
    """Grid indices int64 [N] of the least summed error whose summed density is at most ``budget``.

    density, error: float64 [N, G], along the grid never increasing and never decreasing. The sum is that of the best
    Lagrangian choice within the budget, or less. Raises ``ValueError`` if the loosest thresholds exceed it.
    """
    index = _loosest(density, error)
    room = budget - float(density.gather(-1, index[:, None]).sum())
    if room < -TINY * len(index):
        raise ValueError("the budget is below the density of the loosest thresholds")
    for step in _steps(density, error):
        if step.density > room + TINY:
            break
        index[step.head] = step.end
        room -= step.density
    return _fill(density, error, index, budget)


def _fill(density: Tensor, error: Tensor, index: Tensor, budget: float) -> Tensor:
    """Stricter thresholds for what the budget leaves, each the one with most gain per density that fits."""
    while True:
        now_d, now_e = density.gather(-1, index[:, None]), error.gather(-1, index[:, None])
        room = budget - float(now_d.sum())
        more, gain = density - now_d, now_e - error
        fits = (more > TINY) & (more <= room + TINY) & (gain > 0)
        if not bool(fits.any()):
            return index
        best = int(torch.where(fits, gain / more.clamp(min=TINY), -1.0).flatten().argmax())
        index[best // density.shape[1]] = best % density.shape[1]


def least_density(density: Tensor, error: Tensor, most: float) -> Tensor:
    """Grid indices int64 [N] of the least summed density whose summed error is at most ``most``; as
    :func:`least_error` otherwise. Index 0, without error, always meets it.
    """
    index = _loosest(density, error)
    for step in _steps(density, error):
        now = error.gather(-1, index[:, None])
        total = float(now.sum())
        if total <= most:
            break
        if total - step.gain <= most:  # one more is enough: the one that costs least, on a hull or not
            more = density - density.gather(-1, index[:, None])
            more = torch.where(total - now + error <= most, more, torch.inf)
            more[step.head, step.end] = min(float(more[step.head, step.end]), step.density)  # whatever rounding says
            best = int(more.flatten().argmin())
            index[best // density.shape[1]] = best % density.shape[1]
            break
        index[step.head] = step.end
    while True:  # looser thresholds for what the error leaves
        now_d, now_e = density.gather(-1, index[:, None]), error.gather(-1, index[:, None])
        room = most - float(now_e.sum())
        saved, added = now_d - density, error - now_e
        fits = (saved > TINY) & (added <= room)
        if not bool(fits.any()):
            return index
        best = int(torch.where(fits, saved / added.clamp(min=1e-300), -1.0).flatten().argmax())
        index[best // density.shape[1]] = best % density.shape[1]


# ---- from curves to a table -----------------------------------------------------------------------------------------


def _check(curves: CalibrationCurves, target_density: float | None, target_output_error: float | None) -> None:
    if (target_density is None) == (target_output_error is None):
        raise ValueError("give either target_density or target_output_error")
    check_density(target_density)
    check_output_error(target_output_error, curves.cost)
    if curves.error is None:
        raise ValueError("these curves have no errors: collect(..., errors='output') or errors='loss' measures them")


def check_density(target: float | None) -> None:
    """Raise unless it is a density to aim at, or None."""
    if target is not None and not 0.0 < target <= 1.0:
        raise ValueError(f"target density must be above 0 and at most 1, got {target}")


def check_output_error(target: float | None, cost: str | None) -> None:
    """Raise unless it is an output error to aim at and that is what was measured, or None."""
    if target is None:
        return
    if not (target > 0.0 and math.isfinite(target)):
        raise ValueError(f"target output error must be above 0, got {target}")
    if cost == "loss":
        raise ValueError("a target output error needs the errors of the output: measure with cost 'output', not 'loss'")


def _grouped(values: Tensor, group: int, mean: bool) -> Tensor:
    """[layers, heads, G] -> [layers * heads / group, G]: heads that share a threshold as one."""
    split = values.unflatten(1, (-1, group))
    return (split.mean(2) if mean else split.sum(2)).flatten(0, 1)


def spend(
    curves: CalibrationCurves,
    *,
    target_density: float | None = None,
    target_output_error: float | None = None,
    seed: int = 0,
) -> ThresholdTable:
    """Thresholds per layer and head that spend blocks where they lower the error most; exactly one target.

    curves: with errors (``collect(..., errors="output")`` or ``"loss"``).
    target_density: the mean density over calibrated layers and heads that the longest prompts (their length to a power
        of two) have at most, on dense inputs; shorter ones are denser. The sum over layers and heads of the mean error
        is least.
    target_output_error: the relative error of the layers' attention outputs that the sum allows at most, at the least
        density: sqrt(mean over calibrated layers of the sum over heads of the mean error), the errors of heads taken as
        orthogonal. Needs errors="output".

    Means of errors are over all calibration prompts, one half of the prompts (by ``seed``); the other half gives the
    table's recall, density and errors. Nothing is promised. Raises ``ValueError`` for a density below that of sinks,
    window, last tiles and ``min_blocks``. Deterministic; one :func:`collect` serves any number of targets.
    """
    _check(curves, target_density, target_output_error)
    assert curves.error is not None
    held_in, held_out = split_prompts(len(curves.tokens), seed)
    calibrated = torch.tensor([kind == CALIBRATED for kind in curves.layers])
    if not bool(calibrated.any()):
        raise ValueError("no layer is calibrated: there is nothing to spend")
    longest, members = max(by_length(curves.tokens, held_in).items())
    group = curves.group
    density = _grouped(curves.density[held_in[members]][:, calibrated].double().mean(0), group, mean=True)
    error = monotone(_grouped(curves.error[held_in][:, calibrated].double().mean(0), group, mean=False))
    layers, units = int(calibrated.sum()), density.shape[0]
    if target_density is not None:
        floor = float(density[:, -1].mean())
        if target_density < floor - TINY:
            raise ValueError(
                f"target density {target_density:g} is below {floor:.4f}, what sinks, window, last tiles and "
                f"min_blocks of {curves.policy.name} keep of prompts of {length_name(longest)} tokens"
            )
        chosen = least_error(density, error, target_density * units)
        goal = {"target_density": float(target_density), "goal": f"target density {target_density:g}"}
    else:
        assert target_output_error is not None
        chosen = least_density(density, error, target_output_error**2 * layers)
        goal = {
            "target_output_error": float(target_output_error),
            "goal": f"target output error {target_output_error:g}",
        }
    index = torch.zeros(calibrated.shape[0], curves.error.shape[2], dtype=torch.int64)
    index[calibrated] = chosen.view(layers, -1).repeat_interleave(group, dim=1)
    held = HeldOut(curves, index, held_out)
    estimate = at_index(curves.error[held_in], index).double()[:, calibrated]
    measured = at_index(curves.error[held_out], index).double()
    places = by_length(curves.tokens, held_out)
    facts = {
        **goal,
        "method": "Lagrangian allocation over layers and heads",
        "promise": PROMISE,
        "cost": curves.cost,
        "length": longest,
        "estimated_density": float(density.gather(-1, chosen[:, None]).mean()),
        "estimated_error": total_error(estimate, curves.cost),
        "held_out": {
            "recall": spread_over_prompts(held.recall[:, calibrated].mean((1, 2))),
            "tail_recall": spread_over_prompts(held.tail_recall[:, calibrated].mean((1, 2))),
            "pairs": index[calibrated].numel(),
            "sparse_pairs": int((index[calibrated] > 0).sum()),
            "error": total_error(measured[:, calibrated], curves.cost),
            "error_by_length": {str(n): total_error(measured[places[n]][:, calibrated], curves.cost) for n in places},
            "error_per_head": _rounded(measured.mean(0)),
        },
    }
    return table_at(curves, index, held, facts, calibration_prompts=len(held_in), seed=seed)


def total_error(error: Tensor, cost: str | None) -> float:
    """One number of errors [prompts, layers, heads]: of "output" the root of the mean over layers of the sum over
    heads; of "loss" the sum over layers and heads, in nats per token.
    """
    mean = error.mean(0)
    return float(mean.sum()) if cost == "loss" else math.sqrt(float(mean.sum(-1).mean()))


def _rounded(values: Tensor) -> list[list[Any]]:
    return [[float(f"{x:.4g}") for x in row] for row in values.tolist()]
