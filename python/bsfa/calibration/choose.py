"""From curves to a threshold table: a promise from half of the prompts, a check on the rest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
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


def spent_prompts(half: int) -> int:
    """How many of the calibration half choose references and nothing else, where a policy has references."""
    return max(1, half // 4)


def split_spent(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`split_prompts`, with those that choose references taken out of the calibration half and put first."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    half = (count + 1) // 2
    spent = spent_prompts(half)
    return order[:spent].sort().values, order[spent:half].sort().values, order[half:].sort().values


def by_length(tokens: tuple[int, ...], prompts: Tensor) -> dict[int, Tensor]:
    """Length bucket -> places in ``prompts`` of the prompts of that length, int64."""
    places: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts.tolist()):
        places.setdefault(length_bucket(tokens[prompt]), []).append(place)
    return {length: torch.tensor(p) for length, p in places.items()}


def at_index(curves: Tensor, index: Tensor) -> Tensor:
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

    def too_few(self, n: int, spent: int = 0) -> str | None:
        """Why n calibration prompts cannot promise anything; None if they can. ``spent``: more, with other duties."""
        needed = self.least_prompts
        if n >= needed:
            return None
        if self.confidence is None:
            can, at = f"a recall of at most {1 - 1 / (n + 1):.3f}", ""
        else:
            can = f"a recall of at most {(1 - self.confidence) ** (1 / n):.3f} with confidence {self.confidence:g}"
            at = f" at confidence {self.confidence:g}"
        half = needed
        while spent and half - spent_prompts(half) < needed:
            half += 1
        also = ", and an eighth for the references" if spent else ""
        return (
            f"all heads stay dense: {n} calibration prompts can promise {can}, {self.target_recall:g}{at} needs at "
            f"least {needed} (that is {2 * half - 1} prompts, half of them for the check{also})"
        )


def spread_over_prompts(values: Tensor) -> dict[str, float]:
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
        "recall": spread_over_prompts(recall.mean((1, 2))),
        "tail_recall": spread_over_prompts(tail_recall.mean((1, 2))),
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
    spent = torch.tensor(curves.spent, dtype=torch.int64)
    if bool(torch.isin(held_out, spent).any()):
        raise ValueError(f"prompts that chose the references are among the held-out ones of seed {seed}: use theirs")
    held_in = held_in[~torch.isin(held_in, spent)]
    n = len(held_in)
    calibrated = torch.tensor([kind == CALIBRATED for kind in curves.layers])
    risks = curves.tail_lost[held_in]
    index = promise.loosest(risks)
    for members in by_length(curves.tokens, held_in).values():
        index = torch.minimum(index, loosest_mean(risks[members], target_recall))
    if curves.group > 1:  # the strictest of the heads that share a threshold
        shared = index.unflatten(-1, (-1, curves.group)).amin(dim=-1)
        index = shared.repeat_interleave(curves.group, dim=-1)
    short = promise.too_few(n, len(spent))
    if short is not None:
        warnings.warn(short, CalibrationWarning, stacklevel=2)
    index = torch.where(calibrated[:, None], index.clamp(min=0), 0)
    held = HeldOut(curves, index, held_out)
    promised = promise.bound(at_index(risks, index).double().mean(0), n)
    for length, kept in zip(held.lengths, held.length_recall[:, calibrated], strict=True):
        if kept.numel() and float(kept.mean()) < target_recall:
            warnings.warn(
                f"held-out prompts of {length_name(length)} tokens keep {float(kept.mean()):.3f} of the attention "
                f"mass, less than {target_recall}: calibrate with more prompts of that length",
                CalibrationWarning,
                stacklevel=2,
            )
    recall, tail_recall = held.recall[:, calibrated], held.tail_recall[:, calibrated]
    facts = {
        "target_recall": float(target_recall),
        "confidence": None if confidence is None else float(confidence),
        "method": promise.method,
        "promise": promise.in_words,
        "largest_bound": float(promised[calibrated].max()) if bool(calibrated.any()) else 0.0,
        "least_prompts": promise.least_prompts,
        "held_out": _held_out(recall, tail_recall, index[calibrated], target_recall),
    }
    return table_at(curves, index, held, facts, calibration_prompts=n, seed=seed)


def table_at(
    curves: CalibrationCurves,
    index: Tensor,
    held: HeldOut,
    facts: Mapping[str, Any],
    *,
    calibration_prompts: int,
    seed: int,
) -> ThresholdTable:
    """The table of the thresholds at ``index`` int64 [layers, heads] into the grid; ``facts``: how they were chosen."""
    keep_all = curves.policy.keep_all_threshold()
    return ThresholdTable(
        policy=curves.policy.with_threshold(keep_all),
        thresholds=torch.where(index == 0, keep_all, curves.grid[index]).to(torch.float32).contiguous(),
        layers=curves.layers,
        reference=curves.reference,
        positions=curves.positions,
        model=curves.model,
        attention=curves.attention,
        calibration={
            **facts,
            "tail": curves.tail,
            "calibration_prompts": calibration_prompts,
            "held_out_prompts": held.recall.shape[0],
            "tokens": list(curves.tokens),
            "prompts_sha256": curves.prompts_sha256,
            "seed": seed,
            "grid_points": curves.grid.shape[0],
            **curves.facts,
        },
        **held.fields(),
    )


class HeldOut:
    """What prompts that chose nothing say of thresholds: ``index`` int64 [layers, heads] into the grid of ``curves``.

    recall, tail_recall, density: float64 [prompts, layers, heads]; length_recall, length_density: their means by
    length, [lengths, layers, heads].
    """

    def __init__(self, curves: CalibrationCurves, index: Tensor, held_out: Tensor):
        self.recall = 1.0 - at_index(curves.lost_mass[held_out], index).double()
        self.tail_recall = 1.0 - at_index(curves.tail_lost[held_out], index).double()
        self.density = at_index(curves.density[held_out], index).double()
        places = by_length(curves.tokens, held_out)
        self.lengths = tuple(sorted(places))
        self.length_prompts = tuple(len(places[n]) for n in self.lengths)
        self.length_recall = torch.stack([self.recall[places[n]].mean(0) for n in self.lengths])
        self.length_density = torch.stack([self.density[places[n]].mean(0) for n in self.lengths])

    def fields(self) -> dict[str, Any]:
        """The fields of a :class:`bsfa.ThresholdTable` that say what is achieved."""
        values = {
            "recall": self.recall.mean(0),
            "recall_spread": self.recall.std(0, correction=0),
            "tail_recall": self.tail_recall.mean(0),
            "recall_worst": self.recall.min(0).values,
            "density": self.density.mean(0),
            "length_recall": self.length_recall,
            "length_density": self.length_density,
        }
        tensors = {name: x.clamp(0.0, 1.0).to(torch.float32).contiguous() for name, x in values.items()}
        return {**tensors, "lengths": self.lengths, "length_prompts": self.length_prompts}
