"""The published selection rules in plain numpy float64, one tile at a time; no code shared with bsfa.

Every rule gives, per score head, which blocks are kept as real numbers would have it (``kept``), and what rounding
leaves open: ``must`` (kept however the rounding falls) and ``may`` (kept if it falls well). must <= kept <= may.

``epsilon``: error of a logit, relative to 1 + the largest one of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import oracle

Array = np.ndarray
TINY = 1e-30  # weights below are lost in float32, and the order among them with it
ROUNDING = 2e-7  # of a score or share that is made and compared in float32


@dataclass(frozen=True)
class Verdict:
    """bool [heads, visible blocks]; low and high: the interval of the score."""

    kept: Array
    must: Array
    may: Array
    low: Array
    high: Array

    def union(self, groups: int) -> Verdict:
        """One verdict per group of heads: kept if one of the group's heads keeps it."""

        def merge(x: Array) -> Array:
            return x.reshape(groups, -1, x.shape[-1]).any(axis=1)

        return Verdict(merge(self.kept), merge(self.must), merge(self.may), self.low, self.high)

    def with_always(self, always: Array) -> Verdict:
        """The same, with blocks that are kept in any case."""
        return Verdict(self.kept | always, self.must | always, self.may | always, self.low, self.high)


def pool(tokens: Array, mode: str) -> Array:
    """[n, ...] -> [...]: BFLA's modes."""
    if mode == "mean":
        return tokens.mean(axis=0)
    if mode == "center":
        return tokens[len(tokens) // 2]
    first = np.abs(tokens).argmax(axis=0)  # the earliest of the largest
    return np.take_along_axis(tokens, first[None], axis=0)[0]


def pool_blocks(k: Array, block_n: int, mode: str) -> Array:
    """[blocks, Hkv, D]."""
    return np.stack([pool(k[i : i + block_n], mode) for i in range(0, len(k), block_n)])


def cap(x: Array, softcap: float) -> Array:
    return softcap * np.tanh(x / softcap) if softcap else x


def best_count(min_blocks: int, min_ratio: float, visible: int) -> int:
    return min(max(min_blocks, int(np.floor(np.float32(min_ratio) * np.float32(visible)))), visible)


# --- FlashPrefill -----------------------------------------------------------------------------------------------------


def relative_max(
    q: Array,
    means: Array,
    tile: oracle.Tile,
    seqlen_k: int,
    *,
    block_n: int,
    causal: bool,
    scale: float,
    softcap: float,
    epsilon: float,
    grouped: bool,
    alpha: Array,
    top: int,
) -> Verdict:
    """Energies over the rows that see the whole block; ``grouped``: over those of all heads that read one KV head."""
    x = oracle.logits(q[tile.rows], means[: tile.visible], scale, softcap)  # [Hq, rows, blocks]
    if causal:
        ends = np.minimum((np.arange(tile.visible) + 1) * block_n, seqlen_k) - 1
        position = oracle.positions(len(q), seqlen_k, True)[tile.rows]
        x = np.where(position[:, None] >= ends, x, -np.inf)
    if grouped:
        x = x.reshape(means.shape[1], -1, tile.visible)
    largest = x.max(axis=(1, 2), keepdims=True)
    energy = np.exp(x - np.where(np.isneginf(largest), 0.0, largest)).sum(axis=1)
    most = energy.max(axis=1, keepdims=True)
    score = energy / np.where(most > 0, most, 1.0)
    size = 1.0 + np.where(np.isneginf(x), 0.0, np.abs(x)).max(axis=(1, 2))[:, None]
    error = 4 * epsilon * size + ROUNDING
    low, high = score * (1.0 - error), np.minimum(score * (1.0 + error), 1.0)
    low = np.where(score < TINY, 0.0, low)
    alone = (high >= low.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True) == 1
    low = np.where(alone & (score == 1.0), 1.0, low)
    a = alpha[:, None]
    earlier = np.tri(tile.visible, k=-1, dtype=bool)[None]  # [this, other]

    def rank(this: Array, other: Array) -> Array:
        ahead = (other[:, None, :] > this[:, :, None]) | ((other[:, None, :] == this[:, :, None]) & earlier)
        return (ahead & ~np.eye(tile.visible, dtype=bool)).sum(axis=-1)

    return Verdict(
        (a <= 0) | ((score > 0) & (score >= a)) | (rank(score, score) < top),
        (a <= 0) | ((low > 0) & (low >= a)) | (rank(low, high) < top),
        (a <= 0) | ((high > 0) & (high >= a)) | (rank(high, low) < top),
        low - ROUNDING,
        high + ROUNDING,
    )


# --- mass -------------------------------------------------------------------------------------------------------------


def by_mass(logs: Array, error: Array, first: Array, *, mass: Array, top: int, probability: float) -> Verdict:
    """Blocks in descending order of weight until ``mass`` of the weight is reached; ties: the lower block first.

    logs: logarithms of the weights [heads, blocks], each within ``error`` [heads, 1]. first: bool [blocks], ranked
    ahead of the others, in order of their index.
    """
    blocks = logs.shape[1]
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    p = weights / weights.sum(axis=1, keepdims=True)
    this, other = logs[:, :, None], logs[:, None, :]
    earlier = np.tri(blocks, k=-1, dtype=bool)
    both = first[:, None] & first[None, :]
    fixed = both | (first[:, None] != first[None, :])  # the order of these pairs is known
    ahead_fixed = (both & earlier) | (~first[:, None] & first[None, :])
    itself = np.eye(blocks, dtype=bool)
    gap = 2 * error[:, :, None]

    def ahead(compared: Array) -> Array:
        return np.where(fixed, ahead_fixed, compared) & ~itself

    nominal = ahead((other > this) | ((other == this) & earlier))
    surely, possibly = ahead(other > this + gap), ahead(other >= this - gap)

    def before(who: Array) -> Array:
        return np.where(who, p[:, None, :], 0.0).sum(axis=-1)

    slack = 4 * error + ROUNDING
    low, value, high = before(surely) - slack, before(nominal), before(possibly) + slack
    least = max(top, 1)
    m = mass[:, None]
    everything = m >= 1
    share = slack if probability < 1 else 0.0
    return Verdict(
        everything | (value < m) | (nominal.sum(-1) < least) | (p > probability),
        everything | (high < m) | (possibly.sum(-1) < least) | (p - share > probability),
        everything | (low < m) | (surely.sum(-1) < least) | (p + share > probability),
        low,
        high,
    )


def error_of(x: Array, epsilon: float) -> Array:
    """[heads, 1] of logits [heads, ...] (-inf: none)."""
    size = np.where(np.isneginf(x), 0.0, np.abs(x)).reshape(len(x), -1).max(axis=1, initial=0.0)
    return epsilon * (1.0 + size)[:, None]


def pooled_logits(q: Array, summary: Array, tile: oracle.Tile, *, mode: str, scale: float, softcap: float) -> Array:
    """BFLA: [Hq, blocks] from the pooled queries of the tile and pooled keys."""
    return oracle.logits(pool(q[tile.rows], mode)[None], summary[: tile.visible], scale, softcap)[:, 0]


def groups_at(tokens: Array, offset: int, size: int, first: int, last: int) -> tuple[Array, Array]:
    """Tokens [n, heads, D] at positions offset + i as groups first .. last - 1 of ``size`` positions.

    Returns ([groups, size, heads, D] with zeros where there is no token, numbers of the groups that have one).
    """
    found = np.zeros((last - first, size, *tokens.shape[1:]))
    present = np.zeros(last - first, dtype=bool)
    for i, token in enumerate(tokens):
        group, place = divmod(offset + i, size)
        if first <= group < last:
            found[group - first, place] = token
            present[group - first] = True
    return found[present], np.flatnonzero(present) + first


def flat64_logits(
    q: Array,
    k: Array,
    tile: oracle.Tile,
    offset: int,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    softcap: float,
) -> Array:
    """BFLA's flat64, divided by 64: [Hq, blocks]. Pairs of groups of 64 tokens, token t with token t."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    per_tile, per_block = block_m // 64, block_n // 64
    queries, _ = groups_at(q, offset, 64, tile.index * per_tile, (tile.index + 1) * per_tile)
    keys, numbers = groups_at(k, 0, 64, 0, tile.visible * per_block)
    pairs = np.einsum("gthd,rthd->hgr", queries, keys, optimize=True).max(axis=1)
    best = [pairs[:, numbers // per_block == j].max(axis=1) for j in range(tile.visible)]
    return cap(scale / 64 * np.stack(best, axis=1), softcap)


def antidiagonal_weights(
    q: Array,
    k: Array,
    tile: oracle.Tile,
    offset: int,
    *,
    stride: int,
    block_m: int,
    block_n: int,
    causal: bool,
    scale: float,
    softcap: float,
    epsilon: float,
) -> tuple[Array, Array]:
    """XAttention: (weights [Hq, blocks], relative error [Hq, 1])."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    per_tile, per_block = block_m // stride, block_n // stride
    queries, rows = groups_at(q, offset, stride, tile.index * per_tile, (tile.index + 1) * per_tile)
    keys, columns = groups_at(k, 0, stride, 0, tile.visible * per_block)
    x = cap(scale / stride * np.einsum("rshd,cshd->hrc", queries[:, ::-1], keys, optimize=True), softcap)
    if causal:
        x = np.where(columns <= rows[:, None], x, -np.inf)
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    weights = [p[:, :, columns // per_block == j].sum(axis=(1, 2)) for j in range(tile.visible)]
    return np.stack(weights, axis=1), 2 * error_of(x, epsilon) + ROUNDING


# --- what is kept besides ---------------------------------------------------------------------------------------------


def rescued(tile: int, blocks: int, heads: int, *, stride: int, probability: float, seed: int) -> Array:
    """bool [heads, blocks]: BFLA's speculative rescue; heads of the mask."""
    kept = np.zeros((heads, blocks), dtype=bool)
    parts = int(float(np.float32(probability)) * 1e6)
    for h in range(heads):
        for j in range(blocks):
            by_stride = stride > 0 and (131 * tile + 17 * j + seed) % stride == 0
            mixed = (tile + 1) * 1103515245 + (j + 1) * 12345 + (h + 1) * 2654435761 + seed
            kept[h, j] = by_stride or (mixed & 0x7FFFFFFF) % 1000000 < parts
    return kept
