"""The finite-sample corrections that turn measured losses into a promise, per (layer, head).

*In expectation*: conformal risk control, Angelopoulos et al. (arXiv 2208.02814). Of n exchangeable losses L_i(g) in
0 .. 1 that never decrease in g, the largest g with ``(n * mean_i L_i(g) + 1) / (n + 1) <= budget`` has
E[L(g)] <= budget on a new prompt. The expectation is over the calibration prompts and the new one together: about half
of the calibrations may come out with a risk above the budget.

*With confidence c*: risk-controlling prediction sets, Bates et al. (arXiv 2101.02703), by the bound of Hoeffding and
Bentkus. If the n losses are independent with mean R(g), the probability that a mean as low as the measured one comes of
R(g) > budget is at most :func:`p_value`. Thresholds are tested from the strict end, and the last before the first whose
p-value exceeds 1 - c is chosen (fixed-sequence testing: each test at the full level). Then R(g) <= budget with
probability at least c over the draw of the calibration prompts.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


class CalibrationWarning(UserWarning):
    """A calibration that is sound but not what was hoped for: heads left dense, or a length that falls short."""


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


def check_confidence(confidence: float) -> float:
    """``confidence``; raises ``ValueError`` unless it is inside 0 .. 1."""
    if not isinstance(confidence, int | float) or isinstance(confidence, bool):
        raise TypeError(f"confidence must be a number, got {type(confidence).__name__}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return float(confidence)


def _log_binomial_cdf(n: int, p: Tensor) -> Tensor:
    """log P(Bin(n, p) <= k) for k = 0 .. n, float64 [..., n + 1]; p strictly inside 0 .. 1."""
    k = torch.arange(n + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    p = p.double()[..., None]
    return (log_choose + k * p.log() + (n - k) * torch.log1p(-p)).logcumsumexp(-1).clamp(max=0.0)


def p_value(mean_loss: Tensor, n: int, budget: float | Tensor) -> Tensor:
    """Hoeffding-Bentkus p-value of "the risk exceeds ``budget``", float64, shape of ``mean_loss`` (any).

    The smaller of ``exp(-n h(min(mean, budget), budget))`` with ``h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 -
    b))`` (Hoeffding) and ``e P(Bin(n, budget) <= ceil(n mean))`` (Bentkus): section 3.1 of arXiv 2101.02703. mean_loss:
    of n independent losses in 0 .. 1. budget: a number or one per mean, inside 0 .. 1.
    """
    mean = mean_loss.double().clamp(0.0, 1.0)
    b = torch.as_tensor(budget, dtype=torch.float64)
    a = torch.minimum(mean, b)
    divergence = torch.xlogy(a, a / b) + torch.xlogy(1 - a, (1 - a) / (1 - b))
    count = (n * mean).ceil().clamp(max=n).to(torch.int64)
    cdf = _log_binomial_cdf(n, b)
    bentkus = 1.0 + (cdf[count] if b.dim() == 0 else cdf.gather(-1, count[..., None])[..., 0])
    return torch.minimum(-n * divergence.clamp(min=0.0), bentkus).clamp(max=0.0).exp()


def confident_bound(mean_loss: Tensor, n: int, confidence: float) -> Tensor:
    """The risk that n prompts with that mean loss exclude with ``confidence``, float64: p-value 1 - c, by bisection."""
    low, high = mean_loss.double().clamp(0.0, 1.0), torch.ones_like(mean_loss, dtype=torch.float64)
    for _ in range(48):
        middle = (low + high) / 2
        inside = middle.clamp(1e-12, 1 - 1e-12)
        excluded = p_value(mean_loss, n, inside) <= 1 - confidence
        low, high = torch.where(excluded, low, middle), torch.where(excluded, middle, high)
    return high


def least_prompts_confident(target_recall: float, confidence: float) -> int:
    """Independent calibration prompts without which even a loss of 0 is no evidence: (target)^n > 1 - confidence."""
    target, error = 1 - float(check_target(target_recall)), 1 - check_confidence(confidence)
    n = max(math.ceil(math.log(error) / math.log(target)), 1)
    zero, budget = torch.zeros(()), float(check_target(target_recall))
    while n > 1 and float(p_value(zero, n - 1, budget)) <= error:
        n -= 1
    while float(p_value(zero, n, budget)) > error:
        n += 1
    return n


def loosest_confident(losses: Tensor, target_recall: float, confidence: float) -> Tensor:
    """Like :func:`loosest`, so that the risk exceeds the budget in at most 1 - confidence of the calibrations."""
    error = 1 - check_confidence(confidence)
    p = p_value(_monotone_mean(losses), losses.shape[0], float(check_target(target_recall)))
    return _accepted(p <= error)


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
    return _accepted(risk <= float(check_target(target_recall)))


def _accepted(met: Tensor) -> Tensor:
    """Index of the last threshold before the first that is not met, int64; -1 if that is the first."""
    return met.to(torch.int64).cumprod(-1).sum(-1) - 1
