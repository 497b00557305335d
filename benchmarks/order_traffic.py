"""What orders of tiles cost in traffic from HBM, by simulation: sparse attention of one KV head beyond L2, on the CPU.

Every CTA walks the kept blocks of one tile after the other, last one first, a step a block; L2 holds the blocks that
were used last. What an order and the time at which a CTA takes its next tile do to the misses is what is asked.
docs/kernels/attention_sm90.md, "Level", has what a profiler measured on the H200.

    python benchmarks/order_traffic.py
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import typer

CTAS = 132
HEADS = 4  # of the KV head's group
BLOCK_BYTES = 2 * 128 * 128 * 2  # K and V, 16 bits
PACE_OF_CTA, PACE_OF_STEP = 0.01, 0.05  # standard deviations
TILE_STEPS = 0.5  # what a tile costs beyond its steps
LATE_STEPS = 4  # of a tile that are left when the next one is taken late (kLateSteps of the kernel)


class Dealer:
    """Hands out an order to CTAs; ``taken``: what each one has."""

    def __init__(self, order: Iterable[int]) -> None:
        self._queue = iter(order)
        self.taken: list[list[int]] = [[] for _ in range(CTAS)]

    def take(self, cta: int) -> None:
        pair = next(self._queue, None)
        if pair is not None:
            self.taken[cta].append(pair)

    def deal(self, times: int) -> None:
        """All CTAs take one, so many times."""
        for _ in range(times):
            for cta in range(CTAS):
                self.take(cta)


def share_beside_forced(tiles: int, density: float) -> float:
    """Of the visible blocks but diagonal and sink: what is kept if these are, and ``density`` of all."""
    visible, forced = tiles * (tiles + 1) / 2, 2 * tiles - 1
    return max(density * visible - forced, 0.0) / (visible - forced)


def kept_blocks(tiles: int, density: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Of (tile, head) pairs in natural order: a random share of the visible blocks, with diagonal and sink."""
    share = share_beside_forced(tiles, density)
    return [
        np.union1d(np.nonzero(rng.random(tile + 1) < share)[0], [0, tile])[::-1]
        for tile in range(tiles - 1, -1, -1)
        for _ in range(HEADS)
    ]


def by_length(pairs: Sequence[np.ndarray], window: int) -> list[int]:
    """Natural order, with every window of it sorted by length, longest first."""
    lengths = [len(blocks) for blocks in pairs]
    starts = range(0, len(pairs), window)
    return [i for at in starts for i in sorted(range(at, min(at + window, len(pairs))), key=lambda i: (-lengths[i], i))]


def misses(pairs: Sequence[np.ndarray], order: Sequence[int], ahead: int, capacity: int) -> float:
    """The share of the fetched blocks that L2 does not hold. ahead: tiles that a CTA takes ahead; 0: late."""
    rng = np.random.default_rng(1)
    pace = 1 + PACE_OF_CTA * rng.standard_normal(CTAS)
    dealer = Dealer(order)
    dealer.deal(1 + ahead)
    taken = dealer.taken
    at = [(tile.pop(0), 0) for tile in taken]
    clock = [(rng.random() / 2, cta) for cta in range(CTAS)]
    heapq.heapify(clock)
    held: OrderedDict[int, None] = OrderedDict()
    missed = fetched = 0
    while clock:
        time, cta = heapq.heappop(clock)
        pair, step = at[cta]
        blocks = pairs[pair]
        block = int(blocks[step])
        fetched += 1
        missed += block not in held
        held[block] = None
        held.move_to_end(block)
        if len(held) > capacity:
            held.popitem(last=False)
        step += 1
        time += pace[cta] * (1 + PACE_OF_STEP * rng.standard_normal())
        if step == (1 if ahead else max(len(blocks) - LATE_STEPS, 1)):
            dealer.take(cta)
        if step == len(blocks):
            if not taken[cta]:
                continue
            pair, step = taken[cta].pop(0), 0
            time += TILE_STEPS
        at[cta] = pair, step
        heapq.heappush(clock, (time, cta))
    return missed / fetched


def main(tokens: int = 1 << 18, density: float = 0.05, l2_mb: float = 25.0, kv_heads: int = 8) -> None:
    """Print the misses, and the bytes of all KV heads, for some orders."""
    pairs = kept_blocks(tokens // 128, density, np.random.default_rng(0))
    total = sum(map(len, pairs)) * BLOCK_BYTES * kv_heads / 1e9
    print(f"{tokens} tokens, density {density}, {total:.0f} GB fetched")
    for window in (1, 1024, 8 * CTAS, 4 * CTAS, 2 * CTAS):
        order = by_length(pairs, window)
        for ahead in (3, 1, 0):
            share = misses(pairs, order, ahead, int(l2_mb * 1e6) // BLOCK_BYTES)
            print(
                f"windows of {window:4d}, taken {f'{ahead} tiles ahead' if ahead else 'late':13s}: "
                f"{share:.3f} missed, {share * total:5.1f} GB"
            )


if __name__ == "__main__":
    typer.run(main)
