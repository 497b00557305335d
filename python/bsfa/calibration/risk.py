"""Conformal risk control: the finite-sample correction that turns measured losses into a promise.

Follows Angelopoulos et al., Conformal Risk Control (arXiv 2208.02814). Of n exchangeable losses L_i(g) in 0 .. 1 that
never decrease in g, the largest g with ``(n * mean_i L_i(g) + 1) / (n + 1) <= budget`` has E[L(g)] <= budget on a new
prompt. The expectation is over the calibration prompts and the new one together, per (layer, head).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def check_target(target_recall: float) -> Fraction:
    """The loss budget ``1 - target_recall``, exact; raises ``ValueError`` unless the target is inside 0 .. 1."""
    if not isinstance(target_recall, int | float) or isinstance(target_recall, bool):
        raise TypeError(f"target recall must be a number, got {type(target_recall).__name__}")
    if not 0.0 < target_recall < 1.0:
        raise ValueError(f"target recall must lie between 0 and 1, got {target_recall}")
    return 1 - Fraction(repr(float(target_recall)))


def risk_bound(mean_loss: Tensor, n: int) -> Tensor:
    """``(n * mean_loss + 1) / (n + 1)``: what n prompts with that mean loss can promise. Any shape, float64."""
    return (n * mean_loss.double() + 1.0) / (n + 1)


def least_prompts(target_recall: float) -> int:
    """Calibration prompts without which even a loss of 0 does not meet the target: 1 / (n + 1) > 1 - target."""
    return math.ceil(1 / check_target(target_recall)) - 1


def loosest(losses: Tensor, target_recall: float) -> Tensor:
    """Index of the loosest threshold that keeps the promise, int64 [...]; -1 where none does.

    losses: [n, ..., G], 0 .. 1, thresholds from strict to loose in the last dimension. They are made monotone (a looser
    threshold never counts as losing less) before the walk from the strict end.
    """
    return _walk(risk_bound(_monotone_mean(losses), losses.shape[0]), target_recall)


def loosest_mean(losses: Tensor, target_recall: float) -> Tensor:
    """Like :func:`loosest` for the mean of these prompts themselves: no correction, so no promise about others."""
    return _walk(_monotone_mean(losses), target_recall)


def _monotone_mean(losses: Tensor) -> Tensor:
    if losses.dim() < 2 or losses.shape[0] == 0:
        raise ValueError(f"losses must be [prompts, ..., thresholds] with at least one prompt, got {losses.shape}")
    return losses.double().clamp(0.0, 1.0).mean(0).cummax(-1).values


def _walk(risk: Tensor, target_recall: float) -> Tensor:
    met = risk <= float(check_target(target_recall))
    return met.to(torch.int64).cumprod(-1).sum(-1) - 1
