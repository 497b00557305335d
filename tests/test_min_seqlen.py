"""The length from which on integrations apply a policy: its default against what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bsfa.integrations.min_seqlen import DEFAULT_MIN_SEQLEN, check_min_seqlen

REPORT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "h200.json"


def test_default_is_not_below_the_measured_crossover() -> None:
    measurements = json.loads(REPORT.read_text())["measurements"] if REPORT.is_file() else []
    found = [m for m in measurements if m["id"] == "crossover.relmax.tokens"]
    if not found:
        pytest.skip("no crossover measured yet")
    assert found[0]["unit"] == "tokens" and found[0]["value"] <= DEFAULT_MIN_SEQLEN


@pytest.mark.parametrize("value", [0, 1, DEFAULT_MIN_SEQLEN])
def test_lengths(value: int) -> None:
    assert check_min_seqlen(value) == value


@pytest.mark.parametrize("value, error", [(-1, ValueError), (True, TypeError), (4096.0, TypeError), ("4k", TypeError)])
def test_what_is_no_length(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="min_seqlen"):
        check_min_seqlen(value)
