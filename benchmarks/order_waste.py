"""What orders of tiles leave to SMs that are done before the others, by simulation on the CPU.

CTAs take (tile, head) pairs from an order, some of them ahead of the one that they work on. What is taken ahead binds a
CTA that may be behind. The times are those of head_dim 128: docs/kernels/attention_sm90.md, "What is taken when".

    python benchmarks/order_waste.py
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import typer

from order_traffic import CTAS, Dealer, share_beside_forced

HEADS, GROUP = 32, 4
STEP_CLOCKS, TILE_CLOCKS = 2115, 1700  # of a block; of a tile beyond its blocks
TILES_AHEAD = (4, 2, 1, 0)
SUB_BITS = 2  # kSubBits of known_order.h


def natural(tiles: int, densities: Sequence[float]) -> list[int]:
    """Kept blocks of all pairs in natural order: groups of heads, tiles from the last to the first, the group's heads.

    A random share of the visible blocks, with diagonal and sink.
    """
    rng = np.random.default_rng(0)
    shares = [share_beside_forced(tiles, density) for density in densities]
    return [
        min(tile + 1, 2) + int(rng.binomial(max(tile - 1, 0), shares[first + head]))
        for first in range(0, HEADS, GROUP)
        for tile in range(tiles - 1, -1, -1)
        for head in range(GROUP)
    ]


def bucket(count: int) -> int:
    """0 for a tile of one block, more for longer ones: four buckets an octave."""
    cost = max(count, 1) << SUB_BITS
    octave = math.floor(math.log2(cost))
    return ((octave - SUB_BITS) << SUB_BITS) | (cost >> (octave - SUB_BITS)) & ((1 << SUB_BITS) - 1)


def ordered(counts: Sequence[int], long_share: int, sorted_end: int) -> list[int]:
    """Counts as the kernel orders them (schedule.cu): long ones by length, natural order, its end by length."""
    longest = sum(counts) / (CTAS * long_share)
    natural_end = max(len(counts) - sorted_end, 0)
    first = sorted((c for c in counts if c > longest), key=bucket, reverse=True)
    rest = [c for c in counts[:natural_end] if c <= longest]
    end = sorted((c for c in counts[natural_end:] if c <= longest), key=bucket, reverse=True)
    return [*first, *rest, *end]


def waste(order: Sequence[int], ahead: int) -> float:
    """Time of the slowest CTA over the mean of all, less 1."""
    dealer = Dealer(order)
    dealer.deal(ahead)
    clock = [(0, cta) for cta in range(CTAS)]
    ends = [0] * CTAS
    while clock:
        time, cta = heapq.heappop(clock)
        dealer.take(cta)
        if not dealer.taken[cta]:
            ends[cta] = time
            continue
        count = dealer.taken[cta].pop(0)
        heapq.heappush(clock, (time + count * STEP_CLOCKS + TILE_CLOCKS, cta))
    return max(ends) / (sum(ends) / CTAS) - 1


def main() -> None:
    """Print the waste for dense attention and some masks, by order and by the tiles taken ahead."""
    print("share of the time left idle, by tiles taken ahead: " + ", ".join(map(str, TILES_AHEAD)))
    sparse = [0.1] * HEADS
    one = [0.03] * (HEADS - 1) + [1.0]
    for name, tokens, densities in (
        *((f"dense, {kilo}K", kilo << 10, [1.0] * HEADS) for kilo in (4, 8, 16, 32, 64)),
        ("10 %, 16K", 1 << 14, sparse),
        ("10 %, 64K", 1 << 16, sparse),
        ("one dense head, 64K", 1 << 16, one),
    ):
        counts = natural(tokens // 128, densities)
        for long_share, sorted_end in ((16, 0), (64, 0), (16, 8 * CTAS), (16, 16 * CTAS), (8, 8 * CTAS)):
            order = ordered(counts, long_share, sorted_end)
            shares = "".join(f"{waste(order, ahead):8.2%}" for ahead in TILES_AHEAD)
            print(f"{name:20s} long from 1/{long_share:2d}, last {sorted_end // CTAS:2d} a CTA sorted: {shares}")


if __name__ == "__main__":
    typer.run(main)
