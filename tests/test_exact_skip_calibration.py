"""Calibrating ExactSkip: curves against attention itself and the oracle, references, choice, and imported files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import bsfa
import oracle_skip
from bsfa.calibration import block_curves, threshold_grid
from bsfa.policies import ExactSkip, RelativeMax

SCALE = 0.3


def make_qkv(length: int = 700) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.randn(1, length, 4, 16) * 1.5, torch.randn(1, length, 2, 16) * 1.5
    k *= (torch.rand(-(-length // 32)) * 1.5 + 0.02).repeat_interleave(32)[:length, None, None]  # low and high blocks
    k[:, 128:384] *= 0.02
    return q, k, torch.randn(1, length, 2, 16)


def reference(form: str, heads: int = 4) -> dict[str, Any]:
    nats = -torch.rand(heads, 3) * 2.0 if form == "relative" else torch.rand(heads, 3) * 3.0 + 4.0
    return {"form": form, "reference": nats, "positions": (60, 200, 500)}


CURVES: dict[str, tuple[dict[str, Any], bool]] = {
    "relative": ({"form": "relative"}, True),
    "relative, reference": (reference("relative"), True),
    "relative, not causal": ({"form": "relative", "window_blocks": 2}, False),
    "absolute": (reference("absolute"), True),
    "absolute, small blocks": ({**reference("absolute"), "block_n": 32, "sink_blocks": 0, "window_blocks": 2}, True),
    "absolute, large tiles": ({**reference("absolute"), "block_m": 192, "block_n": 64, "sink_blocks": 2}, True),
    "absolute, one reference": ({**reference("absolute", 1), "block_m": 64, "block_n": 64}, True),
    "relative, large blocks": ({**reference("relative"), "block_m": 64, "sink_blocks": 0}, True),
}


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("name", CURVES)
def test_curves_are_what_attention_skips(name: str, softcap: float) -> None:
    fields, causal = CURVES[name]
    policy = ExactSkip(**fields)
    q, k, v = make_qkv()
    maths: dict[str, Any] = {"softmax_scale": SCALE, "softcap": softcap, "causal": causal}
    _, lse = bsfa.attention(q, k, v, return_lse=True, **maths)
    grid = threshold_grid(policy)
    curves = block_curves(policy, grid, q, k, lse, tail=0.3, **maths)
    lost, tail, density = curves.lost, curves.tail_lost, curves.density
    assert lost.shape == tail.shape == density.shape == (4, len(grid))
    assert bool((tail.diff(dim=-1) >= 0).all()) and bool((tail >= lost - 1e-6).all())
    assert bool((lost.diff(dim=-1) >= 0).all()) and bool((density.diff(dim=-1) <= 0).all())
    assert float(lost[:, 0].max()) == 0.0 and float(density[:, 0].min()) == 1.0
    assert float(density.min()) < 0.9
    dense = oracle_skip.attention(
        *(x[0].double().numpy() for x in (q, k, v)),
        scale=SCALE,
        softcap=softcap,
        causal=causal,
        thresholds=torch.full((4, 1), -torch.inf).numpy(),
        form=policy.form,
    )
    for g in [0, 1, *range(40, len(grid), 9), len(grid) - 1]:
        chosen = policy.with_threshold(float(grid[g]))
        _, info = bsfa.attention(q, k, v, policy=chosen, return_info=True, **maths)
        kept = torch.ones(4, dtype=torch.float64)
        if info.skips is not None:
            kept -= info.skips[:, 1].double() / info.skips[:, 0].double()
        torch.testing.assert_close(density[:, g].double(), kept, rtol=0, atol=1e-7)
        if g % 3:
            continue
        ran = oracle_skip.attention(
            *(x[0].double().numpy() for x in (q, k, v)),
            scale=SCALE,
            softcap=softcap,
            causal=causal,
            thresholds=chosen.cuts(4, -(-700 // policy.block_m), q.device).numpy(),
            form=policy.form,
            block_m=policy.block_m,
            block_n=policy.block_n,
            sink_blocks=policy.sink_blocks,
            window_blocks=policy.window_blocks,
        )
        rows = torch.from_numpy((dense.weights * ~ran.entered).sum(-1))
        groups = torch.stack([part.mean(1) for part in rows.split(64, dim=1)])
        worst = groups.sort(0, descending=True).values[: math.ceil(0.3 * len(groups))].mean(0)
        torch.testing.assert_close(lost[:, g].double(), rows.mean(1), rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(tail[:, g].double(), worst, rtol=1e-4, atol=2e-6)


def test_curves_do_not_depend_on_the_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv(500)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy = ExactSkip(**reference("absolute"))
    whole = block_curves(policy, threshold_grid(policy), q, k, lse)
    monkeypatch.setattr("bsfa.calibration.curves.CHUNK", 1)
    rows = block_curves(policy, threshold_grid(policy), q, k, lse)
    for name in ("lost", "tail_lost", "density"):
        assert torch.equal(getattr(whole, name), getattr(rows, name))


def test_a_logit_that_is_no_number_is_never_skipped() -> None:
    q, k, v = make_qkv(500)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy = ExactSkip.absolute(50.0)
    grid = threshold_grid(policy)
    assert float(block_curves(policy, grid, q, k, lse).density[0, -1]) < 0.9
    q[0, 400:, :] = torch.nan
    with_nan = block_curves(policy, grid, q, k, lse.nan_to_num()).density[:, -1]
    _, info = bsfa.attention(q, k, v, policy=policy.with_threshold(1.0), return_info=True)  # type: ignore[misc]
    assert info.skips is not None
    torch.testing.assert_close(with_nan, 1 - info.skips[:, 1] / info.skips[:, 0], rtol=0, atol=1e-6)


REFUSED = {
    "within": (ExactSkip(within=RelativeMax()), "within another policy"),
    "half groups": (ExactSkip(block_m=96), "multiple of 64"),
    "order of visits": (ExactSkip(block_m=128, block_n=64), "order of visits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_curves_cannot_say(case: str) -> None:
    q, k, v = make_qkv(200)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy, message = REFUSED[case]
    with pytest.raises(bsfa.UnsupportedError, match=message):
        block_curves(policy, threshold_grid(policy), q, k, lse)
    above = ExactSkip(reference=torch.ones(4, 1), positions=(0,))
    with pytest.raises(ValueError, match="running maximum"):
        block_curves(above, threshold_grid(above), q, k, lse)
