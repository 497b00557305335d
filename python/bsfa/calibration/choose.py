"""From curves to a threshold table: conformal risk control on half of the prompts, a check on the rest."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bsfa.calibration.collect import CalibrationCurves
from bsfa.calibration.risk import check_target, least_prompts, loosest, loosest_mean, risk_bound
from bsfa.prompts import length_bucket, length_name
from bsfa.thresholds import CALIBRATED, ThresholdTable


class CalibrationWarning(UserWarning):
    """A calibration that is sound but not what was hoped for: heads left dense, or a length that falls short."""


def split_prompts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the calibration half (the larger one) and of the held-out half, int64, by a seeded permutation."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    half = (count + 1) // 2
    return order[:half].sort().values, order[half:].sort().values


def _by_length(tokens: tuple[int, ...], prompts: Tensor) -> dict[int, Tensor]:
    """Length bucket -> places in ``prompts`` of the prompts of that length, int64."""
    places: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts.tolist()):
        places.setdefault(length_bucket(tokens[prompt]), []).append(place)
    return {length: torch.tensor(p) for length, p in places.items()}


def _at(curves: Tensor, index: Tensor) -> Tensor:
    """curves [P, L, H, G] at index [L, H] -> [P, L, H]."""
    return curves.gather(-1, index.expand(curves.shape[0], -1, -1)[..., None])[..., 0]


def choose(curves: CalibrationCurves, target_recall: float, *, seed: int = 0) -> ThresholdTable:
    """The loosest threshold per layer and head that keeps ``target_recall`` of the attention mass in expectation.

    The mass is that of the worst ``curves.tail`` of a prompt's query tiles, so the mean over all tiles is kept too. One
    half of the prompts (by ``seed``) chooses with conformal risk control (:mod:`bsfa.calibration.risk`), and so that
    the mean over the chosen-from prompts of every length keeps the target as well (long prompts lose more than short
    ones); the other half gives the recall and density in the table. Heads for which no threshold keeps the promise are
    dense; if that is for want of prompts, a :class:`CalibrationWarning` says how many are needed; another warns if
    held-out prompts of some length keep less than the target. Heads that share a threshold get the strictest of what
    each needs. Deterministic. One :func:`collect` serves any number of
    targets.
    """
    check_target(target_recall)
    held_in, held_out = split_prompts(len(curves.tokens), seed)
    n = len(held_in)
    needed = least_prompts(target_recall)
    calibrated = torch.tensor([kind == CALIBRATED for kind in curves.layers])
    risks = curves.tail_lost[held_in]
    index = loosest(risks, target_recall)
    for members in _by_length(curves.tokens, held_in).values():
        index = torch.minimum(index, loosest_mean(risks[members], target_recall))
    if curves.group > 1:  # the strictest of the heads that share a threshold
        shared = index.unflatten(-1, (-1, curves.group)).amin(dim=-1)
        index = shared.repeat_interleave(curves.group, dim=-1)
    if n < needed:
        warnings.warn(
            f"all heads stay dense: {n} calibration prompts can promise a recall of at most {1 - 1 / (n + 1):.3f}, "
            f"{target_recall} needs at least {needed} (that is {2 * needed - 1} prompts, half of them for the check)",
            CalibrationWarning,
            stacklevel=2,
        )
    index = torch.where(calibrated[:, None], index.clamp(min=0), 0)
    keep_all = curves.policy.keep_all_threshold()
    thresholds = torch.where(index == 0, keep_all, curves.grid[index])
    recall = 1.0 - _at(curves.lost_mass[held_out], index).double()
    density = _at(curves.density[held_out], index).double()
    tail_recall = 1.0 - _at(curves.tail_lost[held_out], index).double()
    promised = risk_bound(_at(risks, index).double().mean(0), n)
    by_length = _by_length(curves.tokens, held_out)
    lengths = sorted(by_length)
    length_recall = torch.stack([recall[by_length[length]].mean(0) for length in lengths])
    for length, kept in zip(lengths, length_recall[:, calibrated], strict=True):
        if kept.numel() and float(kept.mean()) < target_recall:
            warnings.warn(
                f"held-out prompts of {length_name(length)} tokens keep {float(kept.mean()):.3f} of the attention "
                f"mass, less than {target_recall}: calibrate with more prompts of that length",
                CalibrationWarning,
                stacklevel=2,
            )

    def settle(x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0).to(torch.float32).contiguous()

    return ThresholdTable(
        policy=curves.policy.with_threshold(keep_all),
        thresholds=thresholds.to(torch.float32).contiguous(),
        layers=curves.layers,
        recall=settle(recall.mean(0)),
        recall_spread=settle(recall.std(0, correction=0)),
        tail_recall=settle(tail_recall.mean(0)),
        recall_worst=settle(recall.min(0).values),
        density=settle(density.mean(0)),
        lengths=tuple(lengths),
        length_prompts=tuple(len(by_length[length]) for length in lengths),
        length_recall=settle(length_recall),
        length_density=settle(torch.stack([density[by_length[length]].mean(0) for length in lengths])),
        model=curves.model,
        attention=curves.attention,
        calibration={
            "target_recall": float(target_recall),
            "method": "conformal risk control",
            "promise": "per layer and head, on dense inputs: the attention mass that the worst query tiles of a prompt "
            "lose is at most 1 - target_recall in expectation",
            "tail": curves.tail,
            "largest_bound": float(promised[calibrated].max()) if bool(calibrated.any()) else 0.0,
            "least_prompts": needed,
            "calibration_prompts": n,
            "held_out_prompts": len(held_out),
            "tokens": list(curves.tokens),
            "prompts_sha256": curves.prompts_sha256,
            "seed": seed,
            "grid_points": curves.grid.shape[0],
        },
    )
