"""The simulation of orders (benchmarks/order_waste.py) orders as the kernel does, and deals out all there is."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
simulation = importlib.import_module("order_waste")
CTAS = simulation.CTAS


def test_dense_counts_in_natural_order() -> None:
    counts = simulation.natural(5, [1.0] * simulation.HEADS)
    group = [count for count in (5, 4, 3, 2, 1) for _ in range(simulation.GROUP)]
    assert counts == group * (simulation.HEADS // simulation.GROUP)


def test_buckets_are_quarters_of_octaves() -> None:
    bounds = [2.0**octave * (4 + quarter) / 4 for octave in range(20) for quarter in range(4)]
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 127, 128, 160, 191, 192, 1000, 65535, 65536):
        assert simulation.bucket(count) == sum(bound <= count for bound in bounds) - 1


@pytest.mark.parametrize("sorted_end", [0, 100, 10**6])
def test_orders(sorted_end: int) -> None:
    counts = simulation.natural(64, [0.1] * 16 + [0.5] * 16)
    order = simulation.ordered(counts, 16, sorted_end)
    assert sorted(order) == sorted(counts)
    longest = sum(counts) / (CTAS * 16)
    is_long = [count > longest for count in order]
    first = sum(is_long)
    assert is_long == [True] * first + [False] * (len(order) - first)
    assert 0 < first < len(order)
    end = sum(count <= longest for count in counts[max(len(counts) - sorted_end, 0) :])
    for run in (order[:first], order[len(order) - end :]):
        buckets = [simulation.bucket(count) for count in run]
        assert buckets == sorted(buckets, reverse=True)
    assert order[first : len(order) - end] == [c for c in counts[: max(len(counts) - sorted_end, 0)] if c <= longest]


@pytest.mark.parametrize("ahead", simulation.TILES_AHEAD)
def test_waste(ahead: int) -> None:
    assert simulation.waste([3] * (7 * CTAS), ahead) == 0
    one_more = simulation.waste([3] * (7 * CTAS + 1), ahead)
    assert math.isclose(one_more, 8 / (7 + 1 / CTAS) - 1, rel_tol=1e-6)


def test_what_is_taken_ahead_is_waited_for() -> None:
    """A long tile with short ones behind it: who took it has others do the rest only if it takes none ahead."""
    step, tile = simulation.STEP_CLOCKS, simulation.TILE_CLOCKS
    order = [100] + [1] * (CTAS - 1) + [1] * (20 * CTAS)
    late, early = simulation.waste(order, 0), simulation.waste(order, 4)
    slowest = (100 * step + tile) + 4 * (step + tile)
    mean = (sum(order) * step + len(order) * tile) / CTAS
    assert math.isclose(early, slowest / mean - 1, rel_tol=1e-6)
    assert math.isclose(late, (100 * step + tile) / mean - 1, rel_tol=1e-6)
