"""Attention with skipping in plain numpy float64: one sequence, one head and one group of rows after the other.

Conventions of oracle.py, with which alone it shares code (positions, tiles, visibility, sinks and window). The rule:

* Groups are the sets of a tile's rows with one value of ``(position - first position of the tile) // 64``.
* A group goes through the blocks that its head's mask keeps and of which one of its rows sees a token: first the last
  block that the mask keeps for the tile, then block 0, then the others from the last to the first. It has met each.
* Skipped is a block, neither sink nor window, whose largest visible logit is below the threshold ("absolute"), or, in
  "relative", for which in every row that sees it the largest is less than the row's running maximum (of the blocks met
  and not skipped) plus the threshold; a row without one skips nothing. NaN compares as false.
* What is skipped is out of the softmax; if ``counted``, only out of the product with V.

In two passes (:func:`two_passes`) groups decide so over all blocks, but their running maxima are over all blocks met;
and a tile keeps for all of its groups what one of them keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oracle import Array, Tile, always_kept, logits, num_blocks, positions, tiles, visible_tokens

ROWS = 64


@dataclass(frozen=True)
class Decision:
    """One that the threshold takes: the block is neither sink nor window."""

    head: int
    column: int  #: of the threshold
    value: float  #: what is compared
    #: |value - threshold| over 1 + the head's largest logit: how far rounding is from turning it. +inf if either is not
    #: finite.
    margin: float


@dataclass
class Skipped:
    """What :func:`attention` returns."""

    out: Array  #: [Sq, Hq, Dv]; rows that see nothing: 0
    lse: Array  #: [Hq, Sq]; rows that see nothing: -inf
    counts: Array  #: int [Hq, 2]: met, skipped
    entered: Array  #: bool [Hq, Sq, Sk]: keys in the denominator
    valued: Array  #: bool [Hq, Sq, Sk]: keys in the product with V
    decisions: list[Decision]
    weights: Array  #: [Hq, Sq, Sk], what V is multiplied by

    @property
    def margin(self) -> float:
        """The least of all decisions."""
        return min((d.margin for d in self.decisions), default=np.inf)


def visits(kept: Array) -> list[int]:
    """The kept ones of a tile's visible blocks in the order of visits. ``kept``: bool [visible]."""
    blocks = [int(j) for j in np.flatnonzero(kept)]
    if not blocks:
        return []
    last = blocks.pop()
    sink = [j for j in blocks if j == 0]
    return [last, *sink, *sorted((j for j in blocks if j > 0), reverse=True)]


def groups(tile: Tile, place: Array, block_m: int) -> list[Array]:
    """Row numbers of each group of a tile. ``place``: positions of all rows."""
    number = (place[tile.rows] - tile.index * block_m) // ROWS
    return [tile.rows[number == g] for g in np.unique(number)]


def row_maxima(s: Array, seen: Array) -> Array:
    """Largest visible logit of each row, NaN if one is; -inf where nothing is visible."""
    return np.where(seen, s, -np.inf).max(axis=-1, initial=-np.inf)


def compared(form: str, top: Array, sees: Array, running: Array) -> float:
    """What the threshold is compared with. ``top``: row_maxima; ``sees``: rows that see the block."""
    if form == "absolute":
        return float(top.max(initial=-np.inf))
    with np.errstate(invalid="ignore"):
        gaps = np.where(np.isneginf(running) & ~np.isnan(top), np.inf, top - running)
    return float(gaps[sees].max(initial=-np.inf))


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    thresholds: Array,
    form: str,
    causal: bool = True,
    softcap: float = 0.0,
    mask: Array | None = None,
    block_m: int = 128,
    block_n: int = 128,
    sink_blocks: int = 1,
    window_blocks: int = 1,
    counted: bool = False,
) -> Skipped:
    """``thresholds``: [Hq, columns], column = the tile's index, within 0 .. columns - 1."""
    seqlen_q, hq = q.shape[:2]
    seqlen_k, hkv = k.shape[:2]
    place = positions(seqlen_q, seqlen_k, causal)
    seen = visible_tokens(seqlen_q, seqlen_k, causal)
    s = logits(q, k, scale, softcap)
    magnitude = 1.0 + np.abs(np.where(np.isfinite(s), s, 0.0)).max(axis=(1, 2), initial=0.0)
    entered = np.zeros(s.shape, dtype=bool)  # in the denominator
    valued = np.zeros(s.shape, dtype=bool)  # in the product with V
    counts = np.zeros((hq, 2), dtype=np.int64)
    decisions = []
    for t, tile in enumerate(tiles(seqlen_q, seqlen_k, block_m, block_n, causal)):
        always = always_kept(
            tile,
            seqlen_q,
            seqlen_k,
            block_m=block_m,
            block_n=block_n,
            causal=causal,
            sink=sink_blocks,
            window=window_blocks,
        )
        for h in range(hq):
            column = int(np.clip(tile.index, 0, thresholds.shape[1] - 1))
            threshold = float(thresholds[h, column])
            kept = np.ones(tile.visible, dtype=bool)
            if mask is not None:
                kept = mask[t, h // (hq // mask.shape[1]), : tile.visible]
            for rows in groups(tile, place, block_m):
                running = np.full(len(rows), -np.inf)
                for j in visits(kept):
                    here = np.ix_([h], rows, range(j * block_n, min((j + 1) * block_n, seqlen_k)))
                    sees = seen[here[1][0], here[2][0]]
                    if not sees.any():
                        continue
                    counts[h, 0] += 1
                    top = row_maxima(s[here][0], sees)
                    value = compared(form, top, sees.any(axis=-1), running)
                    if not always[j]:
                        finite = np.isfinite(value) and np.isfinite(threshold)
                        margin = abs(value - threshold) / magnitude[h] if finite else np.inf
                        decisions.append(Decision(h, column, value, margin))
                    entered[here] |= sees
                    if not always[j] and value < threshold:
                        counts[h, 1] += 1
                        entered[here] &= counted
                        continue
                    valued[here] |= sees
                    running = np.fmax(running, np.fmax.reduce(np.where(sees, s[here][0], -np.inf), axis=-1))
    s = np.where(entered, s, -np.inf)
    top = s.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(s - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + np.where(total > 0, top, -np.inf)
    weights = np.where(valued, weights, 0.0) / np.where(total > 0, total, 1.0)
    out = np.einsum("hij,jhd->ihd", weights, np.repeat(v, hq // hkv, axis=1), optimize=True)
    return Skipped(out, lse[..., 0], counts, entered, valued, decisions, weights)


def two_passes(
    q: Array,
    k: Array,
    *,
    scale: float,
    thresholds: Array,
    form: str,
    causal: bool = True,
    softcap: float = 0.0,
    mask: Array | None = None,
    block_m: int = 128,
    block_n: int = 128,
    sink_blocks: int = 1,
    window_blocks: int = 1,
) -> tuple[Array, Array, float]:
    """The mask of the first pass, bool [tiles, Hq, blocks]; its counts [Hq, 2]; the least margin of a tile's decisions:
    how far the values of its groups, the largest of them, are from the threshold.
    """
    seqlen_q, hq = q.shape[:2]
    seqlen_k = len(k)
    place = positions(seqlen_q, seqlen_k, causal)
    seen = visible_tokens(seqlen_q, seqlen_k, causal)
    s = logits(q, k, scale, softcap)
    magnitude = 1.0 + np.abs(np.where(np.isfinite(s), s, 0.0)).max(axis=(1, 2), initial=0.0)
    found = tiles(seqlen_q, seqlen_k, block_m, block_n, causal)
    words = np.zeros((len(found), hq, num_blocks(seqlen_k, block_n)), dtype=bool)
    counts = np.zeros((hq, 2), dtype=np.int64)
    margin = np.inf
    shape = {"block_m": block_m, "block_n": block_n, "causal": causal, "sink": sink_blocks, "window": window_blocks}
    for t, tile in enumerate(found):
        always = always_kept(tile, seqlen_q, seqlen_k, **shape)
        for h in range(hq):
            threshold = float(thresholds[h, int(np.clip(tile.index, 0, thresholds.shape[1] - 1))])
            kept = np.ones(tile.visible, dtype=bool)
            if mask is not None:
                kept = mask[t, h // (hq // mask.shape[1]), : tile.visible]
            values: dict[int, list[float]] = {j: [] for j in visits(kept)}
            for rows in groups(tile, place, block_m):
                running = np.full(len(rows), -np.inf)
                for j in values:
                    keys = slice(j * block_n, (j + 1) * block_n)
                    sees, here = seen[rows, keys], s[h, rows, keys]
                    if not sees.any():
                        continue
                    values[j].append(compared(form, row_maxima(here, sees), sees.any(axis=-1), running))
                    running = np.fmax(running, np.fmax.reduce(np.where(sees, here, -np.inf), axis=-1))
            for j, of_groups in values.items():
                counts[h, 0] += len(of_groups)
                if not always[j]:
                    top = max(of_groups)
                    if np.isfinite(top) and np.isfinite(threshold):
                        margin = min(margin, abs(top - threshold) / magnitude[h])
                    if all(value < threshold for value in of_groups):
                        counts[h, 1] += len(of_groups)
                        continue
                words[t, h, j] = True
    return words, counts, margin


def tile_max(
    q: Array,
    k: Array,
    *,
    form: str,
    scale: float,
    block_m: int,
    block_n: int,
    causal: bool = True,
    softcap: float = 0.0,
) -> Array:
    """[tiles, Hq, blocks]: what is compared, for the rows of whole tiles that meet every visible block and skip none;
    -inf for blocks that are not visible.
    """
    seqlen_q, seqlen_k = len(q), len(k)
    seen = visible_tokens(seqlen_q, seqlen_k, causal)
    s = logits(q, k, scale, softcap)
    found = tiles(seqlen_q, seqlen_k, block_m, block_n, causal)
    maxima = np.full((len(found), q.shape[1], num_blocks(seqlen_k, block_n)), -np.inf)
    for t, tile in enumerate(found):
        for h in range(q.shape[1]):
            running = np.full(len(tile.rows), -np.inf)
            for j in visits(np.ones(tile.visible, dtype=bool)):
                sees = seen[tile.rows, j * block_n : (j + 1) * block_n]
                here = s[h, tile.rows, j * block_n : (j + 1) * block_n]
                maxima[t, h, j] = compared(form, row_maxima(here, sees), sees.any(axis=-1), running)
                running = np.fmax(running, np.fmax.reduce(np.where(sees, here, -np.inf), axis=-1))
    return maxima
