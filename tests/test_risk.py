"""Conformal risk control: the exact formula, the prompts it needs, and the promise in simulation."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from bsfa.calibration import least_prompts, loosest, risk_bound


def by_hand(losses: list[list[Fraction]], budget: Fraction) -> int:
    """Walk from the strict end while (n * mean + 1) / (n + 1) stays within the budget."""
    n, best = len(losses), -1
    for g in range(len(losses[0])):
        if Fraction(sum(row[g] for row in losses) + 1, n + 1) > budget:
            return best
        best = g
    return best


@pytest.mark.parametrize("target", ["0.5", "0.8", "0.9", "0.95", "0.98"])
@pytest.mark.parametrize("n", [1, 4, 9, 19, 20, 64])
def test_choice_is_the_formula(target: str, n: int) -> None:
    rng = torch.Generator().manual_seed(n)
    steps = torch.randint(0, 8, (n, 3, 12), generator=rng)  # 1/1024ths: exact in both arithmetics
    steps[:, 0] = 0
    losses = steps.cumsum(-1).double() / 1024
    got = loosest(losses, float(target))
    for head in range(3):
        exact = [[Fraction(int(x * 1024), 1024) for x in row] for row in losses[:, head].tolist()]
        assert int(got[head]) == by_hand(exact, 1 - Fraction(target))


@pytest.mark.parametrize(("target", "needed"), [(0.5, 1), (0.9, 9), (0.95, 19), (0.98, 49), (0.99, 99)])
def test_prompts_needed(target: float, needed: int) -> None:
    assert least_prompts(target) == needed
    assert int(loosest(torch.zeros(needed, 1, 4), target)) == 3
    assert int(loosest(torch.zeros(needed - 1, 1, 4), target)) == -1 if needed > 1 else True


def test_losses_are_made_monotone_and_bounded() -> None:
    dip = torch.tensor([[[0.0, 0.4, 0.0, 0.0]]]).expand(99, 1, 4)
    assert int(loosest(dip, 0.9)) == 0  # what follows a breach does not count, however small
    assert float(risk_bound(torch.tensor(0.0), 9)) == pytest.approx(0.1)
    assert int(loosest(torch.full((99, 1, 2), -5.0), 0.9)) == 1


@pytest.mark.parametrize("bad", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_bad_targets(bad: float) -> None:
    with pytest.raises(ValueError, match="target recall"):
        loosest(torch.zeros(5, 1, 2), bad)


@pytest.mark.parametrize(("target", "n"), [(0.9, 15), (0.9, 60), (0.95, 24), (0.8, 6)])
def test_promise_holds_in_simulation(target: float, n: int) -> None:
    """Heavy-tailed synthetic losses: over many calibrations, the mean loss on fresh prompts is within the budget."""
    rng = torch.Generator().manual_seed(7)
    repetitions, points = 400, 60
    tightness = torch.logspace(-3, 0, points)

    def draw(count: int) -> torch.Tensor:
        """[count, repetitions, points]: most prompts lose little, a few lose nearly everything."""
        shape = torch.rand(count, repetitions, 1, generator=rng)
        weight = torch.where(torch.rand(count, repetitions, 1, generator=rng) < 0.08, 1.0, 0.25 * shape**3)
        return (weight * tightness).clamp(0, 1)

    index = loosest(draw(n), target)
    fresh = draw(200).gather(-1, index.clamp(min=0).expand(200, -1)[..., None])[..., 0]
    fresh = torch.where(index >= 0, fresh, 0.0)
    risk, error = float(fresh.mean()), float(fresh.mean(0).std()) / repetitions**0.5
    assert risk <= (1 - target) + 2 * error
    assert risk >= 0.5 * (1 - target - 1 / (n + 1))  # and not by keeping everything
