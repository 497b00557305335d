"""From curves to a threshold table: a promise from half of the prompts, a check on the rest."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsfa.calibration.collect import CalibrationCurves
from bsfa.calibration.risk import (
    CalibrationWarning,
    check_confidence,
    check_target,
    confident_bound,
    least_prompts,
    least_prompts_confident,
    loosest,
    loosest_confident,
    loosest_mean,
    risk_bound,
)
from bsfa.prompts import length_bucket, length_name
from bsfa.thresholds import CALIBRATED, ThresholdTable


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


@dataclass(frozen=True)
class Promise:
    """Which of :mod:`bsfa.calibration.risk`'s promises thresholds are chosen by: in expectation, or with a confidence.

    target_recall: the share of mass to keep; confidence: probability, over the draw of the calibration prompts, that a
    head's true risk is within the target. None: in expectation.
    """

    target_recall: float
    confidence: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target_recall)
        if self.confidence is not None:
            check_confidence(self.confidence)

    @property
    def method(self) -> str:
        """Its name in threshold files."""
        if self.confidence is None:
            return "conformal risk control"
        return "risk control with confidence (Hoeffding-Bentkus)"

    @property
    def least_prompts(self) -> int:
        """Calibration prompts below which all heads stay dense."""
        if self.confidence is None:
            return least_prompts(self.target_recall)
        return least_prompts_confident(self.target_recall, self.confidence)

    @property
    def in_words(self) -> str:
        """What is promised, for people."""
        what = "the attention mass that the worst query tiles of a prompt lose is at most 1 - target_recall"
        how = "in expectation"
        if self.confidence is not None:
            how = f"in the mean over prompts, in {self.confidence:g} of all draws of the calibration prompts"
        return f"per layer and head, on dense inputs: {what} {how}"

    def loosest(self, losses: Tensor) -> Tensor:
        """Index of the loosest threshold that keeps it, int64 [...], of losses [n, ..., G]; -1 where none does."""
        if self.confidence is None:
            return loosest(losses, self.target_recall)
        return loosest_confident(losses, self.target_recall, self.confidence)

    def bound(self, mean_loss: Tensor, n: int) -> Tensor:
        """The loss that n prompts with that mean loss can promise, float64."""
        if self.confidence is None:
            return risk_bound(mean_loss, n)
        return confident_bound(mean_loss, n, self.confidence)

    def too_few(self, n: int) -> str | None:
        """Why n calibration prompts cannot promise anything; None if they can."""
        needed = self.least_prompts
        if n >= needed:
            return None
        if self.confidence is None:
            can, at = f"a recall of at most {1 - 1 / (n + 1):.3f}", ""
        else:
            can = f"a recall of at most {(1 - self.confidence) ** (1 / n):.3f} with confidence {self.confidence:g}"
            at = f" at confidence {self.confidence:g}"
        return (
            f"all heads stay dense: {n} calibration prompts can promise {can}, {self.target_recall:g}{at} needs at "
            f"least {needed} (that is {2 * needed - 1} prompts, half of them for the check)"
        )


def _spread(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation and least of [prompts]."""
    return {"mean": float(values.mean()), "sd": float(values.std(correction=0)), "worst": float(values.min())}


def _held_out(recall: Tensor, tail_recall: Tensor, index: Tensor, target: float) -> dict[str, Any]:
    """What held-out prompts say of the promise, over the heads of calibrated layers: recall [prompts, layers, heads],
    index [layers, heads] into the grid.
    """
    if index.numel() == 0:
        return {}
    sparse = index > 0
    met = {"recall": recall.mean(0) >= target, "tail_recall": tail_recall.mean(0) >= target}
    return {
        "recall": _spread(recall.mean((1, 2))),
        "tail_recall": _spread(tail_recall.mean((1, 2))),
        "pairs": index.numel(),
        "sparse_pairs": int(sparse.sum()),
        "pairs_that_meet_target": {name: int(m.sum()) for name, m in met.items()},
        "sparse_pairs_that_meet_target": {name: int((m & sparse).sum()) for name, m in met.items()},
    }


def choose(
    curves: CalibrationCurves, target_recall: float, *, confidence: float | None = None, seed: int = 0
) -> ThresholdTable:
    """The loosest threshold per layer and head that keeps ``target_recall`` of the attention mass.

    The mass is that of the worst ``curves.tail`` of a prompt's query tiles, so the mean over all tiles is kept too.

    confidence: None keeps it in expectation, over calibration and new prompts together (conformal risk control); a
    number c inside 0 .. 1 keeps each head's mean over all prompts like these in a share c of the draws of calibration
    prompts (Hoeffding-Bentkus bound; :mod:`bsfa.calibration.risk`), which takes more prompts and blocks.

    One half of the prompts (by ``seed``) chooses, and so that the mean over the chosen-from prompts of every length
    keeps the target as well (long prompts lose more than short ones); the other half gives the recall and density in
    the table. Heads for which no threshold keeps the promise are dense; if that is for want of prompts, a
    :class:`CalibrationWarning` says how many are needed; another warns if held-out prompts of some length keep less
    than the target. Heads that share a threshold get the strictest of what each needs. Deterministic. One
    :func:`collect` serves any number of targets.
    """
    promise = Promise(target_recall, confidence)
    held_in, held_out = split_prompts(len(curves.tokens), seed)
    n = len(held_in)
    calibrated = torch.tensor([kind == CALIBRATED for kind in curves.layers])
    risks = curves.tail_lost[held_in]
    index = promise.loosest(risks)
    for members in _by_length(curves.tokens, held_in).values():
        index = torch.minimum(index, loosest_mean(risks[members], target_recall))
    if curves.group > 1:  # the strictest of the heads that share a threshold
        shared = index.unflatten(-1, (-1, curves.group)).amin(dim=-1)
        index = shared.repeat_interleave(curves.group, dim=-1)
    short = promise.too_few(n)
    if short is not None:
        warnings.warn(short, CalibrationWarning, stacklevel=2)
    index = torch.where(calibrated[:, None], index.clamp(min=0), 0)
    keep_all = curves.policy.keep_all_threshold()
    thresholds = torch.where(index == 0, keep_all, curves.grid[index])
    recall = 1.0 - _at(curves.lost_mass[held_out], index).double()
    density = _at(curves.density[held_out], index).double()
    tail_recall = 1.0 - _at(curves.tail_lost[held_out], index).double()
    promised = promise.bound(_at(risks, index).double().mean(0), n)
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
            "confidence": None if confidence is None else float(confidence),
            "method": promise.method,
            "promise": promise.in_words,
            "tail": curves.tail,
            "largest_bound": float(promised[calibrated].max()) if bool(calibrated.any()) else 0.0,
            "least_prompts": promise.least_prompts,
            "calibration_prompts": n,
            "held_out_prompts": len(held_out),
            "held_out": _held_out(recall[:, calibrated], tail_recall[:, calibrated], index[calibrated], target_recall),
            "tokens": list(curves.tokens),
            "prompts_sha256": curves.prompts_sha256,
            "seed": seed,
            "grid_points": curves.grid.shape[0],
        },
    )
