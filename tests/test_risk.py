"""Risk control: the exact formulas, the prompts they need, and the promise in simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from bsfa.calibration import (
    Promise,
    confident_bound,
    least_prompts,
    least_prompts_confident,
    loosest,
    loosest_confident,
    p_value,
    risk_bound,
)


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


# ---- with confidence ------------------------------------------------------------------------------------------------


def p_by_hand(mean: Fraction, n: int, budget: Fraction) -> float:
    """min(Hoeffding, Bentkus, 1), the binomial sum exact."""
    a, b = float(min(mean, budget)), float(budget)
    h = (a * math.log(a / b) if a else 0.0) + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)
    tail = sum(math.comb(n, j) * budget**j * (1 - budget) ** (n - j) for j in range(math.ceil(n * mean) + 1))
    return min(math.exp(-n * h), math.e * float(tail), 1.0)


@pytest.mark.parametrize("n", [1, 9, 45, 200])
@pytest.mark.parametrize("target", ["0.5", "0.9", "0.99"])
def test_p_values_are_the_formula(n: int, target: str) -> None:
    budget = 1 - Fraction(target)
    means = [Fraction(k, 1024) for k in (0, 1, 3, 10, 51, 103, 400, 512, 1000, 1024)]
    got = p_value(torch.tensor([float(m) for m in means]).view(2, 5), n, float(budget))
    want = torch.tensor([p_by_hand(m, n, budget) for m in means]).view(2, 5)
    torch.testing.assert_close(got, want.double(), rtol=1e-6, atol=1e-12)
    each = p_value(got.new_tensor([float(m) for m in means]), n, got.new_full((10,), float(budget)))
    torch.testing.assert_close(each, got.flatten(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("target", "confidence", "needed"), [(0.9, 0.9, 22), (0.95, 0.9, 45), (0.95, 0.95, 59)])
def test_prompts_needed_for_confidence(target: float, confidence: float, needed: int) -> None:
    """The least n with target^n <= 1 - confidence."""
    assert target**needed <= 1 - confidence < target ** (needed - 1)
    assert least_prompts_confident(target, confidence) == needed == Promise(target, confidence).least_prompts
    assert int(loosest_confident(torch.zeros(needed, 1, 4), target, confidence)) == 3
    assert int(loosest_confident(torch.zeros(needed - 1, 1, 4), target, confidence)) == -1


@pytest.mark.parametrize("n", [24, 60, 200])
def test_confident_choice_is_the_walk(n: int) -> None:
    """From the strict end to the last threshold before the first that is not shown to be safe."""
    rng = torch.Generator().manual_seed(n)
    steps = torch.randint(0, 8, (n, 3, 30), generator=rng)
    steps[:, 0] = 0
    losses = steps.cumsum(-1).double() / 2048
    got = loosest_confident(losses, 0.9, 0.9)
    for head in range(3):
        means = [Fraction(int(x), 2048 * n) for x in (losses[:, head] * 2048).sum(0).tolist()]
        passed = [p_by_hand(m, n, Fraction(1, 10)) <= 0.1 for m in means]
        assert int(got[head]) == (passed.index(False) if False in passed else len(passed)) - 1
    dip = torch.tensor([[[0.0, 0.4, 0.0, 0.0]]]).expand(99, 1, 4)
    assert int(loosest_confident(dip, 0.9, 0.9)) == 0


def test_confidence_asks_for_more() -> None:
    losses = torch.rand(80, 50, 40, generator=torch.Generator().manual_seed(2)).cumsum(-1) / 100
    in_expectation = loosest(losses, 0.9)
    indices = [loosest_confident(losses, 0.9, c) for c in (0.5, 0.9, 0.99)]
    assert all(bool((a >= b).all()) for a, b in zip([in_expectation, *indices], indices, strict=False))
    assert not torch.equal(indices[0], indices[2])


def test_the_confident_bound_is_where_the_p_value_is() -> None:
    """The loss that is just excluded; above it everything is, and a loss of everything excludes nothing."""
    means = torch.tensor([0.0, 0.01, 0.05, 0.3])
    bound = confident_bound(means, 60, 0.9)
    assert bool((bound > means).all()) and bool((bound.diff() > 0).all())
    torch.testing.assert_close(p_value(means, 60, bound), torch.full((4,), 0.1).double(), rtol=1e-6, atol=0)
    assert float(p_value(means[2:3], 60, float(bound[2]) * 1.01)) < 0.1
    assert float(bound[0]) == pytest.approx(1 - 0.1 ** (1 / 60))
    assert float(confident_bound(torch.ones(()), 60, 0.9)) == 1.0


@pytest.mark.parametrize("bad", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_bad_confidences(bad: float) -> None:
    for call in (lambda: loosest_confident(torch.zeros(5, 1, 2), 0.9, bad), lambda: Promise(0.9, bad)):
        with pytest.raises(ValueError, match="confidence"):
            call()
    with pytest.raises(TypeError, match="confidence"):
        Promise(0.9, "high")  # type: ignore[arg-type]
