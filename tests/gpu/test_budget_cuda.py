"""Errors of attention outputs on a GPU: those of the CPU but for rounding, and the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bsfa._library import KERNELS
from bsfa.calibration import collect, output_error, spend
from bsfa.policies import Antidiagonal, CumulativeMass, RelativeMax, ScoredPolicy
from tiny_model import make_model, make_prompts, make_tokenizer

if "block_mass" not in KERNELS["cuda"]:
    pytest.skip("needs block_mass on CUDA", allow_module_level=True)

SMALL: dict[str, int] = {"sink_blocks": 1, "window_blocks": 1}
POLICIES: dict[str, ScoredPolicy] = {
    "relative-max": RelativeMax(**SMALL, last_tiles=0),
    "cumulative-mass": CumulativeMass(**SMALL),
    "antidiagonal": Antidiagonal(**SMALL, stride=8),
}


def make(device: str) -> Any:
    """The weights are bfloat16 values in both."""
    model = make_model(hidden_size=256, head_dim=64).to(torch.bfloat16)
    return model.to(device) if device == "cuda" else model.float()


@pytest.mark.parametrize("cost", ["output", "loss"])
@pytest.mark.parametrize("name", POLICIES)
def test_errors_are_those_of_the_cpu_and_repeat(name: str, cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, prompts, policy = make_tokenizer(), make_prompts(4, words=900), POLICIES[name]
    here = collect(make("cpu"), tokenizer, prompts, policy, errors=cost)
    there = collect(make("cuda"), tokenizer, prompts, policy, errors=cost)
    again = collect(make("cuda"), tokenizer, prompts, policy, errors=cost)
    assert here.error is not None and there.error is not None and again.error is not None
    assert torch.equal(there.error, again.error) and bool(there.error.isfinite().all())
    # The loosest thresholds, where nothing hangs on how scores are rounded; the labels of "loss" may differ.
    ours, other = here.error[..., -1], there.error[..., -1]
    assert float(ours.min()) > 0
    ratio = other.mean(0) / ours.mean(0)
    low, high = (0.85, 1.15) if cost == "output" else (0.4, 2.5)
    assert low < float(ratio.min()) and float(ratio.max()) < high
    table = spend(there, target_density=0.6)
    assert 0.5 < table.calibration["estimated_density"] <= 0.6
    assert 0 < table.calibration["estimated_error"] < float(there.error[..., -1].mean(0).sum())
    monkeypatch.setattr(output_error, "CHUNK", 1 << 18)
    rows = collect(make("cuda"), tokenizer, prompts[:2], policy, errors=cost)
    assert rows.error is not None
    torch.testing.assert_close(rows.error, there.error[:2], rtol=1e-3, atol=1e-9)
