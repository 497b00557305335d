"""What bsfa computes, in plain numpy float64: one sequence at a time, no tiles of work, no code shared with bsfa.

Arrays are [tokens, heads, dim]; Hq query heads read Hkv KV heads in groups. Definitions:

* Query row i sits at position ``seqlen_k - seqlen_q + i`` if causal, else at i. A causal row sees the keys at or before
  its position, of which ``window_left`` leaves the last ``window_left + 1``.
* KV block j holds tokens ``j * block_n`` and following. The query tiles of a call are the sets of its rows with one
  value of ``position // block_m``, in order. A block is visible to a tile if one of the tile's rows sees one of its
  tokens (window_left aside).
* A mask is bool [tiles, heads, blocks], heads = Hq, Hkv or 1: rows of the tile see no token of a block not kept.
* Mean correction (FlashPrefill V2): a block of n tokens that the mask does not keep for a tile, and all of whose tokens
  every row of the tile sees, is one more key for these rows: the block's mean key, its logit plus ln(n), and as value
  the block's mean value. Causal rows take a last block of fewer than block_n tokens for one that is not complete yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def positions(seqlen_q: int, seqlen_k: int, causal: bool) -> Array:
    """Position of each query row."""
    return np.arange(seqlen_q) + (seqlen_k - seqlen_q if causal else 0)


def num_blocks(seqlen_k: int, block_n: int) -> int:
    return len(range(0, seqlen_k, block_n))


@dataclass(frozen=True)
class Tile:
    index: int  #: absolute: the tile nominally covers positions index * block_m and following
    rows: Array  #: row numbers in this call
    visible: int  #: blocks 0 .. visible - 1 are visible


def tiles(seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, causal: bool) -> list[Tile]:
    """The query tiles of a call, in order."""
    owner = np.floor_divide(positions(seqlen_q, seqlen_k, causal), block_m)
    found = []
    for index in np.unique(owner):
        rows = np.flatnonzero(owner == index)
        reach = positions(seqlen_q, seqlen_k, causal)[rows].max() if causal else seqlen_k - 1
        found.append(Tile(int(index), rows, sum(j * block_n <= reach for j in range(num_blocks(seqlen_k, block_n)))))
    return found


def visible_tokens(seqlen_q: int, seqlen_k: int, causal: bool, window_left: int | None = None) -> Array:
    """bool [seqlen_q, seqlen_k]: which row sees which key."""
    p = positions(seqlen_q, seqlen_k, causal)[:, None]
    key = np.arange(seqlen_k)[None, :]
    seen = np.ones((seqlen_q, seqlen_k), dtype=bool)
    if causal:
        seen &= key <= p
    if window_left is not None:
        seen &= key >= p - window_left
    return seen


def kept_tokens(mask: Array, seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, causal: bool) -> Array:
    """bool [mask heads, seqlen_q, seqlen_k]: the mask, token by token."""
    kept = np.zeros((mask.shape[1], seqlen_q, seqlen_k), dtype=bool)
    for tile, row in zip(tiles(seqlen_q, seqlen_k, block_m, block_n, causal), mask, strict=True):
        kept[:, tile.rows, :] = np.repeat(row, block_n, axis=-1)[:, None, :seqlen_k]
    return kept


def added_means(mask: Array, seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, causal: bool) -> Array:
    """bool [mask heads, seqlen_q, blocks]: the blocks that the mean correction adds."""
    added = np.zeros((mask.shape[1], seqlen_q, num_blocks(seqlen_k, block_n)), dtype=bool)
    seen = visible_tokens(seqlen_q, seqlen_k, causal)
    for tile, row in zip(tiles(seqlen_q, seqlen_k, block_m, block_n, causal), mask, strict=True):
        for j in range(added.shape[2]):
            whole = seen[tile.rows, j * block_n : (j + 1) * block_n]
            if whole.all() and (not causal or whole.shape[1] == block_n):
                added[:, tile.rows, j] = ~row[:, j, None]
    return added


def block_lengths(seqlen_k: int, block_n: int) -> Array:
    """Tokens of each block."""
    return np.array([min(block_n, seqlen_k - first) for first in range(0, seqlen_k, block_n)], dtype=np.float64)


def logits(q: Array, k: Array, scale: float, softcap: float = 0.0) -> Array:
    """[Hq, rows, keys]."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    s = scale * np.einsum("ihd,jhd->hij", q, k, optimize=True)
    return softcap * np.tanh(s / softcap) if softcap else s


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool = True,
    softcap: float = 0.0,
    window_left: int | None = None,
    mask: Array | None = None,
    block_m: int = 128,
    block_n: int = 128,
    means: tuple[Array, Array] | None = None,
    tokens: Array | None = None,
) -> tuple[Array, Array]:
    """(out [Sq, Hq, Dv], lse [Hq, Sq]). Rows that see nothing: 0 and -inf.

    ``means``: of keys and values, [blocks, Hkv, D]; correct with them for what the mask drops.
    ``tokens``: bool [Sq, Sk], the keys that each row may see, whatever else hides some of them.
    """
    seqlen_q, hq = q.shape[:2]
    seqlen_k, hkv = k.shape[:2]
    seen = visible_tokens(seqlen_q, seqlen_k, causal, window_left)[None]
    if mask is not None:
        kept = kept_tokens(mask, seqlen_q, seqlen_k, block_m, block_n, causal)
        seen = seen & np.repeat(kept, hq // kept.shape[0], axis=0)
    if tokens is not None:
        seen = seen & tokens[None]
    s = np.where(seen, logits(q, k, scale, softcap), -np.inf)
    if means is not None:
        assert mask is not None and window_left is None
        added = added_means(mask, seqlen_q, seqlen_k, block_m, block_n, causal)
        extra = logits(q, means[0], scale, softcap) + np.log(block_lengths(seqlen_k, block_n))
        s = np.concatenate([s, np.where(np.repeat(added, hq // added.shape[0], axis=0), extra, -np.inf)], axis=-1)
        v = np.concatenate([v, means[1]])
    top = s.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(s - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + np.where(total > 0, top, -np.inf)
    probabilities = weights / np.where(total > 0, total, 1.0)
    out = np.einsum("hij,jhd->ihd", probabilities, np.repeat(v, hq // hkv, axis=1), optimize=True)
    return out, lse[..., 0]


def block_means(k: Array, block_n: int) -> Array:
    """[blocks, Hkv, D]: each block over its own number of tokens."""
    blocks = [k[i : i + block_n].mean(axis=0) for i in range(0, len(k), block_n)]
    return np.stack(blocks) if blocks else np.zeros((0, *k.shape[1:]))


def block_mass(
    q: Array, k: Array, *, scale: float, block_m: int, block_n: int, causal: bool = True, softcap: float = 0.0
) -> Array:
    """[tiles, Hq, blocks]: share of the softmax that falls into each block, averaged over the tile's rows."""
    seqlen_q, seqlen_k = len(q), len(k)
    seen = visible_tokens(seqlen_q, seqlen_k, causal)
    s = np.where(seen, logits(q, k, scale, softcap), -np.inf)
    top = s.max(axis=-1, initial=-np.inf, keepdims=True)
    p = np.exp(s - np.where(np.isneginf(top), 0.0, top))
    total = p.sum(axis=-1, keepdims=True)
    p = p / np.where(total > 0, total, 1.0)
    found = tiles(seqlen_q, seqlen_k, block_m, block_n, causal)
    mass = np.zeros((len(found), q.shape[1], num_blocks(seqlen_k, block_n)))
    for t, tile in enumerate(found):
        for j in range(mass.shape[2]):
            mass[t, :, j] = p[:, tile.rows, j * block_n : (j + 1) * block_n].sum(axis=-1).mean(axis=-1)
    return mass


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores of one tile, [Hq, visible blocks], with the interval that rounding of the logits may move them in."""

    value: Array
    low: Array
    high: Array
    best: Array | None = None  #: CumulativeMass: bool, the block that is always kept
    maybe_best: Array | None = None  #: the blocks that rounding may make the best


def relative_max(
    q: Array,
    means: Array,
    tile: Tile,
    seqlen_k: int,
    *,
    scale: float,
    block_n: int,
    causal: bool = True,
    softcap: float = 0.0,
    epsilon: float = 0.0,
) -> Scores:
    """FlashPrefill: energy over the rows that see the whole block, relative to the tile's largest.

    ``epsilon``: error of a logit, relative to the largest one of the head.
    """
    x = logits(q[tile.rows], means[: tile.visible], scale, softcap)
    last_token = np.minimum((np.arange(tile.visible) + 1) * block_n, seqlen_k) - 1
    if causal:
        p = positions(len(q), seqlen_k, causal)[tile.rows]
        x = np.where(p[:, None] >= last_token[None, :], x, -np.inf)
    top = x.max(axis=(1, 2), initial=-np.inf, keepdims=True)
    energy = np.exp(x - np.where(np.isneginf(top), 0.0, top)).sum(axis=1)
    largest = energy.max(axis=1, initial=0.0, keepdims=True)
    score = energy / np.where(largest > 0, largest, 1.0)
    finite = np.where(np.isneginf(x), 0.0, np.abs(x)).max(axis=(1, 2), initial=0.0)[:, None]
    error = 2 * epsilon * (1.0 + finite)
    low, high = score * (1.0 - error), np.minimum(score * (1.0 + error), 1.0)
    alone = (high >= low.max(axis=1, initial=0.0, keepdims=True)).sum(axis=1, keepdims=True) == 1
    return Scores(score, np.where(alone & (score == 1.0), 1.0, low), high)


def cumulative_mass(
    q: Array,
    means: Array,
    tile: Tile,
    *,
    scale: float,
    softcap: float = 0.0,
    epsilon: float = 0.0,
) -> Scores:
    """BFLA, mean pooling: probability mass of the blocks that rank before (descending; ties: the lower block first)."""
    s = logits(q[tile.rows].mean(axis=0, keepdims=True), means[: tile.visible], scale, softcap)[:, 0]
    p = np.exp(s - s.max(axis=1, initial=-np.inf, keepdims=True))
    p = p / np.maximum(p.sum(axis=1, keepdims=True), 1e-300)
    error = epsilon * (1.0 + np.abs(s).max(axis=1, initial=0.0))[:, None, None]
    this, other = s[:, :, None], s[:, None, :]
    lower = np.tri(s.shape[1], k=-1, dtype=bool)[None]  # other < this, as block numbers
    tie = (other == this) & lower
    not_itself = ~np.eye(s.shape[1], dtype=bool)[None]

    def mass(before: Array) -> Array:
        return np.where(before & not_itself, p[:, None, :], 0.0).sum(axis=-1)

    slack = 4 * error[..., 0]
    value = mass((other > this) | tie)
    ahead_low = mass((other > this + 2 * error) | (tie if epsilon == 0.0 else False))
    ahead_high = mass((other > this - 2 * error) | tie)
    best = np.zeros(s.shape, dtype=bool)
    if s.shape[1]:
        best[np.arange(s.shape[0]), s.argmax(axis=1)] = True
    maybe_best = ~((other > this + 2 * error) | (tie if epsilon == 0.0 else False)).any(axis=-1)
    return Scores(value, np.maximum(ahead_low - slack, 0.0), ahead_high + slack, best, maybe_best)


# --- selection -------------------------------------------------------------------------------------------------------


def always_kept(
    tile: Tile, seqlen_q: int, seqlen_k: int, *, block_m: int, block_n: int, causal: bool, sink: int, window: int
) -> Array:
    """bool [visible blocks]: sinks, and the window up to the tile's own blocks (to both sides if not causal)."""
    blocks = np.arange(tile.visible)
    end = seqlen_k if causal else seqlen_q
    first_block = max(tile.index * block_m, 0) // block_n
    last_block = (min((tile.index + 1) * block_m, end) - 1) // block_n
    if not causal:  # tiles beyond the keys have the last block for their own
        first_block, last_block = min(first_block, tile.visible - 1), min(last_block, tile.visible - 1) + window - 1
    return (blocks < sink) | ((blocks > first_block - window) & (blocks <= last_block))


def kept_and_sure(
    scores: Scores,
    always: Array,
    *,
    threshold: Array,
    at_least: bool,
    min_blocks: int = 0,
) -> tuple[Array, Array]:
    """(kept, sure), bool [Hq, visible blocks]: what the rule keeps, and where rounding cannot change that.

    at_least (RelativeMax): kept iff 0 < score >= threshold, or threshold <= 0. Otherwise (CumulativeMass): iff score <
    threshold, or threshold >= 1, or best. The best ``min_blocks`` by score are kept as well.
    """
    t = np.asarray(threshold, dtype=np.float64)[:, None]
    if at_least:
        kept = ((scores.value > 0) & (scores.value >= t)) | (t <= 0)
        surely = ((scores.low > 0) & (scores.low >= t)) | (t <= 0)
        surely_not = ((scores.high < t) | (scores.high == 0)) & (t > 0)
        order, low, high = scores.value, scores.low, scores.high
    else:
        assert scores.best is not None and scores.maybe_best is not None
        kept = (scores.value < t) | (t >= 1) | scores.best
        alone = scores.maybe_best.sum(axis=1, keepdims=True) == 1
        surely = (scores.high < t) | (t >= 1) | (scores.maybe_best & alone)
        surely_not = (scores.low >= t) & (t < 1) & ~scores.maybe_best
        order, low, high = -scores.value, -scores.high, -scores.low
    n = order.shape[1]
    earlier = np.tri(n, k=-1, dtype=bool)[None]  # [this, other]: other < this

    def ahead(other: Array, this: Array) -> Array:
        return ((other[:, None, :] > this[:, :, None]) | ((other[:, None, :] == this[:, :, None]) & earlier)).sum(-1)

    others = 1 - np.eye(n, dtype=int)[None]
    certain = ((low[:, None, :] > high[:, :, None]) | ((low[:, None, :] == high[:, :, None]) & earlier)) * others
    possible = ((high[:, None, :] > low[:, :, None]) | ((high[:, None, :] == low[:, :, None]) & earlier)) * others
    kept |= ahead(order, order) < min_blocks
    surely |= possible.sum(-1) < min_blocks
    surely_not &= certain.sum(-1) >= min_blocks
    kept = kept | always
    return kept, surely | surely_not | always
