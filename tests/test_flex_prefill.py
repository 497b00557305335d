"""FlexPrefill against a statement of its rule in float64: the probe, the pattern masks, and whole masks.

Where rounding decides (a distance next to tau, a sum next to gamma, two blocks of nearly the same mass) blocks are
exempt; they must be rare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsfa
import oracle
from bsfa.policies import FlexPrefill
from bsfa.policies.flex_prefill import js_distance, probe_mean, reach
from cases import BATCHED, BF16, F16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, int32, poison, square, table

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 150), (70, 0), (100, 37), (0, 0))
CHUNKS = ((50, 187), (50, 120), (50, 50), (50, 20))
Array = np.ndarray

# --- the rule, for one sequence ---------------------------------------------------------------------------------------


def probe(q: Array, k: Array, rows: int, causal: bool, scale: float, softcap: float) -> tuple[Array, Array]:
    """(vertical, slash), [Hq, keys]: means over the last ``rows`` queries."""
    count = min(rows, len(q))
    hq, keys = q.shape[1], len(k)
    vertical, slash = np.zeros((hq, keys)), np.zeros((hq, keys))
    for row in range(len(q) - count, len(q)):
        position = keys - len(q) + row
        seen = max(min(position + 1, keys), 0) if causal else keys
        if seen == 0:
            continue
        x = oracle.logits(q[row : row + 1], k[:seen], scale, softcap)[:, 0]
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        vertical[:, :seen] += p / count
        if causal:
            slash[:, :seen] += p[:, ::-1] / count  # key `position`, the last one seen, is 0 tokens away
    return vertical, slash


def in_blocks(tokens: Array, block: int) -> Array:
    starts = range(0, tokens.shape[-1], block)
    return np.stack([tokens[..., i : i + block].sum(-1) for i in starts], axis=-1)


def divergence(p: Array, q: Array) -> float:
    """Square root of the Jensen-Shannon divergence, nats."""
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        for x in (a, b):
            total += 0.5 * x * math.log(2 * x / (a + b)) if x > 0 else 0.0
    return math.sqrt(max(total, 0.0))


@dataclass
class Some:
    """Members of a set, and which of the decisions rounding cannot change."""

    kept: Array
    sure: Array


def best_blocks(tokens: Array, gamma: float, block: int, least: int, most: int | None, needed: bool) -> Some:
    """Of one head: the blocks of most mass, as many as gamma of the tokens' mass needs (``needed``), or the least."""
    mass = in_blocks(tokens, block)
    mass = np.where(mass < 1e-35, 0.0, mass)
    n = len(mass)

    def how_many(share: float) -> int:
        total, count = 0.0, 1
        for x in sorted(tokens.tolist(), reverse=True):
            total += x
            count += total <= share * tokens.sum()
        count = count // block + 1 if needed else 0
        count = n if needed and gamma >= 1 else max(count, -(-least // block))
        return min(count, n if most is None else min(-(-most // block), n))

    k = how_many(gamma)
    k_low, k_high = how_many(gamma - 1e-5), how_many(gamma + 1e-5)
    mass[0] = math.inf
    order = sorted(range(n), key=lambda j: (-mass[j], j))
    kept = np.isin(np.arange(n), order[:k])
    sure = np.zeros(n, dtype=bool)
    for j in range(n):
        others = np.arange(n) != j
        lower_tie = (mass == mass[j]) & (mass[j] == 0) & (np.arange(n) < j)
        higher_tie = (mass == mass[j]) & (mass[j] == 0) & (np.arange(n) > j)
        maybe_before = (others & (mass >= mass[j] * (1 - 2e-4)) & ~higher_tie).sum()
        surely_before = (others & ((mass > mass[j] * (1 + 2e-4)) | lower_tie)).sum()
        sure[j] = maybe_before < k_low or surely_before >= k_high
    return Some(kept, sure)


def reached(group: int, tile: oracle.Tile, block_m: int, block_n: int, blocks: int, seqlen_k: int) -> Array:
    """bool [blocks]: what some full tile that ends where this one ends could reach at the group's distances."""
    own = (min((tile.index + 1) * block_m, seqlen_k) - 1) // block_n
    furthest = 0
    for t in range(2 * block_n // math.gcd(block_m, block_n)):
        last = (t + 1) * block_m - 1
        furthest = max(furthest, last // block_n - (t * block_m - (block_n - 1)) // block_n)
    j = np.arange(blocks)
    return (j <= own - group) & (j >= own - group - furthest)


@dataclass
class Want:
    masks: Some  #: [tiles, Hq, blocks]
    query_aware: Array  #: bool [Hq]


def want_masks(inputs: Inputs, b: int, summary: torch.Tensor, policy: FlexPrefill) -> Want:
    case = inputs.case
    seqlen_q, seqlen_k = case.lengths[b]
    q, k, _ = inputs.arrays(b)
    n, tiles = oracle.num_blocks(seqlen_k, case.block_n), inputs.tiles(b)
    kept = np.zeros((len(tiles), case.hq, n), dtype=bool)
    sure = np.ones_like(kept)
    aware = np.zeros(case.hq, dtype=bool)
    if n == 0 or seqlen_q == 0:
        return Want(Some(kept, sure), aware)
    means = summary[b, :n].double().numpy()
    vertical, slash = probe(q, k, case.block_m, case.causal, case.softmax_scale, case.softcap)
    mean_q = q[-case.block_m :].mean(axis=0, keepdims=True)
    x = oracle.logits(mean_q, means, case.softmax_scale, case.softcap)[:, 0]
    estimated = np.exp(x - x.max(axis=1, keepdims=True))
    estimated /= estimated.sum(axis=1, keepdims=True)
    gammas = np.broadcast_to(np.asarray(policy.gamma, dtype=np.float32).astype(np.float64), (case.hq,))
    patterns = []
    head_sure = np.ones(case.hq, dtype=bool)
    for h in range(case.hq):
        if vertical[h].sum() > 0:
            distance = divergence(in_blocks(vertical[h], case.block_n) / vertical[h].sum(), estimated[h])
            aware[h] = distance < policy.tau
            head_sure[h] = policy.tau == 0 or abs(distance - policy.tau) > 1e-4
        budget = (float(gammas[h]), case.block_n, policy.min_budget, policy.max_budget, not aware[h])
        patterns.append((best_blocks(vertical[h], *budget), best_blocks(slash[h], *budget)))
    for t, tile in enumerate(tiles):
        v = tile.visible
        if v == 0:
            continue
        scores = oracle.cumulative_mass(q, means, tile, scale=case.softmax_scale, softcap=case.softcap, epsilon=3e-6)
        always = oracle.always_kept(
            tile,
            seqlen_q,
            seqlen_k,
            block_m=case.block_m,
            block_n=case.block_n,
            causal=case.causal,
            sink=policy.sink_blocks,
            window=policy.window_blocks,
        )
        base, base_sure = oracle.kept_and_sure(scores, always, threshold=gammas, at_least=False)
        for h in range(case.hq):
            down, along = patterns[h]
            yes = always | (down.kept & down.sure)[:v]
            maybe = always | (down.kept | ~down.sure)[:v]
            this = always | down.kept[:v]
            for group in range(n) if case.causal else ():
                line = reached(group, tile, case.block_m, case.block_n, v, seqlen_k)
                this = this | (line if along.kept[group] else False)
                yes = yes | (line if along.kept[group] and along.sure[group] else False)
                maybe = maybe | (line if along.kept[group] or not along.sure[group] else False)
            if aware[h]:
                this = this | base[h]
                yes = yes | (base[h] & base_sure[h])
                maybe = maybe | base[h] | ~base_sure[h]
            kept[t, h, :v] = this
            sure[t, h, :v] = (yes | ~maybe) & head_sure[h]
    return Want(Some(kept, sure), aware)


def check_masks(inputs: Inputs, policy: FlexPrefill, exempt: float = 0.01) -> tuple[bsfa.BlockMask, list[Array]]:
    """The mask against the oracle; returns it, and which heads of each sequence are query-aware."""
    case = inputs.case
    summary = bsfa.pool_blocks(inputs.k, block_n=case.block_n, **inputs.layout_k)
    mask = inputs.run(policy, return_info=True)[1].mask
    rows = mask.to_rows()
    assert rows.shape == (inputs.geometry.num_rows, case.hq, inputs.geometry.num_blocks)
    assert torch.equal(mask.counts, rows.sum(-1, dtype=torch.int32))
    aware, open_, total = [], 0, 0
    for b in range(len(inputs)):
        want = want_masks(inputs, b, summary, policy)
        got = inputs.rows_of_sequence(rows, b)
        n = want.masks.kept.shape[2]
        assert not got[:, :, n:].any(), f"sequence {b}: blocks past its end are kept"
        wrong = (got[:, :, :n] != want.masks.kept) & want.masks.sure
        assert not wrong.any(), f"sequence {b}: (tile, head, block) {np.argwhere(wrong)[:5].tolist()}"
        aware.append(want.query_aware)
        open_ += int((~want.masks.sure).sum())
        total += want.masks.sure.size
    assert not inputs.unused_rows(rows).any()
    assert open_ <= max(exempt * total, 2), f"{open_} of {total} blocks are decided by rounding"
    return mask, aware


# --- probe_attention --------------------------------------------------------------------------------------------------

PROBES = [
    *table(Case(), lengths=square(1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300), causal=[True, False]),
    *table(
        Case(hq=4, hkv=2),
        lengths=[(x,) for x in ((1, 65), (63, 129), (100, 137), (100, 37), (70, 0), (0, 70), (0, 0))],
        causal=[True, False],
    ),
    *table(
        Case(hq=4, hkv=2, lengths=RAGGED),
        layout=[PACKED, PAGED_PACKED],
        strides=["plain", "interleaved", "gaps"],
        causal=[True, False],
    ),
    *table(Case(lengths=CHUNKS, layout=PAGED), page_size=[1, 3, 16, 17, 64, 256], dtype=[F32, BF16]),
    *table(Case(lengths=((90, 200),)), dim=[1, 8, 40, 128, 256], dtype=[F32, BF16, F16]),
    *table(Case(lengths=((90, 200),)), hq=[1, 3, 17], softcap=[0.0, 4.0], scale=[None, 1.0]),
    *table(Case(lengths=((141, 300),), hq=4, hkv=2), block_m=[1, 7, 16, 100, 128, 600, 4096]),
    *table(Case(lengths=((20, 5000), (30, 2049)), layout=PACKED, hq=3, hkv=1, dim=8), causal=[True, False]),
    Case(lengths=((700, 4500),), block_m=1000, dim=8),
]


def run_probe(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    case = inputs.case
    shape = (len(inputs), case.hq, inputs.max_k)
    poison(shape, shape)
    lengths = (inputs.cu_q, inputs.cu_k, inputs.block_table, inputs.seqlens_k, inputs.max_q, inputs.max_k)
    return torch.ops.bsfa.probe_attention(  # type: ignore[no-any-return]
        inputs.q, inputs.k, *lengths, case.block_m, case.causal, case.softmax_scale, case.softcap
    )


def check_probe(case: Case) -> None:
    inputs = case.make()
    results = run_probe(inputs)
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        q, k, _ = inputs.arrays(b)
        wants = probe(q, k, case.block_m, case.causal, case.softmax_scale, case.softcap)
        for name, result, want in zip(("vertical", "slash"), results, wants, strict=True):
            assert result.dtype == torch.float32 and result.shape == (len(inputs), case.hq, inputs.max_k)
            got = result[b].double().numpy()
            assert np.isfinite(got).all(), f"{name} of sequence {b}: stale memory"
            assert (got[:, seqlen_k:] == 0).all(), f"{name} of sequence {b}: not zero past the end"
            np.testing.assert_allclose(got[:, :seqlen_k], want, rtol=2e-5, atol=1e-7, err_msg=f"{name}, {b}")
        if 0 < seqlen_q <= seqlen_k:
            np.testing.assert_allclose(results[0][b].sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("case", PROBES, ids=str)
def test_probe(case: Case) -> None:
    check_probe(case)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4),
    layout=st.sampled_from([PACKED, PAGED_PACKED]),
    page_size=st.integers(1, 40),
    hq=st.integers(1, 5),
    dim=st.integers(1, 40),
    block_m=st.integers(1, 130),
    causal=st.booleans(),
    dtype=st.sampled_from([F32, BF16, F16]),
)
def test_any_probe(lengths: list[tuple[int, int]], **fields: object) -> None:
    check_probe(Case(lengths=tuple(lengths), **fields))  # type: ignore[arg-type]


def test_probe_has_the_same_bits_with_other_threads() -> None:
    inputs = Case(lengths=((140, 5000), (37, 150), (0, 3)), hq=4, hkv=2, layout=PACKED).make()
    threads = torch.get_num_threads()
    try:
        first = run_probe(inputs)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run_probe(inputs), first, strict=True))
    finally:
        torch.set_num_threads(threads)


# --- pattern_mask -----------------------------------------------------------------------------------------------------

MASKS = [
    *table(Case(hq=3), lengths=square(1, 64, 65, 300, 2100), block_n=[16, 64], causal=[True, False]),
    *table(Case(hq=3, lengths=RAGGED, block_m=32), layout=[PACKED, PAGED_PACKED], block_n=[1, 16, 48, 128]),
    *table(Case(hq=2, lengths=CHUNKS, layout=PAGED, block_n=16), block_m=[8, 16, 40], causal=[True, False]),
    Case(hq=2, lengths=((200, 700), (200, 700)), block_m=48, block_n=4),
]


@pytest.mark.parametrize("case", MASKS, ids=str)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (2, 3)])
def test_pattern_mask(case: Case, sink: int, window: int) -> None:
    inputs = case.make()
    g, rng = inputs.geometry, np.random.default_rng(3)
    n, batch = g.num_blocks, len(inputs)
    base = torch.from_numpy(rng.random((g.num_rows, case.hq, n)) < 0.1)
    vertical, slash = (torch.from_numpy(rng.random((batch, case.hq, n)) < 0.07) for _ in range(2))
    aware = torch.from_numpy(rng.random((batch, case.hq)) < 0.5)
    words = [bsfa.block_mask.pack_bits(x) for x in (base, vertical, slash)]
    poison(words[0].shape, words[0].shape[:2], dtype=torch.float32)
    lengths = (inputs.cu_q, inputs.cu_k, inputs.seqlens_k, inputs.max_q, inputs.max_k)
    got_words, counts = torch.ops.bsfa.pattern_mask(
        words[0], aware.int(), words[1], words[2], *lengths, case.block_m, case.block_n, case.causal, sink, window
    )
    rows = bsfa.BlockMask(got_words, counts, g).to_rows()
    assert torch.equal(counts, rows.sum(-1, dtype=torch.int32))
    assert torch.equal(bsfa.block_mask.pack_bits(rows), got_words), "bits beyond the last block"
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        got = inputs.rows_of_sequence(rows, b)
        for t, tile in enumerate(inputs.tiles(b)):
            want = np.zeros((case.hq, n), dtype=bool)
            sizes = {"block_m": case.block_m, "block_n": case.block_n, "causal": case.causal}
            always = oracle.always_kept(tile, seqlen_q, seqlen_k, **sizes, sink=sink, window=window)
            for h in range(case.hq):
                for j in range(tile.visible):
                    own = tile.visible - 1
                    want[h, j] = (
                        always[j]
                        or bool(vertical[b, h, j])
                        or (case.causal and bool(slash[b, h, own - j]))
                        or bool(aware[b, h] and base[inputs.first_row(b) + t, h, j])
                    )
            assert np.array_equal(got[t], want), f"sequence {b}, tile {t}"
    assert not inputs.unused_rows(rows).any()


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_js_distance() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.4, 0.1, 0.5], [0.5, 0.0, 0.5]], dtype=torch.float64)
    got = js_distance(p, q)
    want = [divergence(a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert math.isclose(float(got[0]), math.sqrt(math.log(2))) and float(got[1]) == 0.0


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 128), (1, 1), (4, 1), (64, 128), (128, 32), (48, 32), (7, 5)])
def test_reach_is_what_tiles_touch(block_m: int, block_n: int) -> None:
    most = 0
    for t in range(50, 50 + block_n):
        positions = range(t * block_m, (t + 1) * block_m)
        for group in (0, 3):
            distances = range(group * block_n, (group + 1) * block_n)
            blocks = {(p - d) // block_n for p in positions for d in (distances[0], distances[-1])}
            own = positions[-1] // block_n
            most = max(most, own - group - min(blocks))
            assert max(blocks) == own - group
    assert reach(block_m, block_n) == most


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED_PACKED])
def test_probe_mean(layout: str) -> None:
    lengths = ((50, 187), (50, 187)) if layout == BATCHED else RAGGED
    inputs = Case(lengths=lengths, layout=layout, hq=3, block_m=32).make()
    seen: list[Any] = []

    class Spy(FlexPrefill):
        def select(self, selection: Any) -> Any:
            seen.append(probe_mean(selection.q, selection.layout, 32))
            return super().select(selection)

    inputs.run(Spy(block_m=32, block_n=32))
    for b in range(len(inputs)):
        rows = inputs.queries[b][-32:].double()
        want = rows.mean(0) if len(rows) else torch.zeros(3, inputs.case.dim, dtype=torch.float64)
        np.testing.assert_allclose(seen[0][b], want, atol=1e-6)


# --- whole masks ------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"min_budget": 32, "block_m": 16, "block_n": 16}
BASE = Case(hq=4, hkv=2, block_m=16, block_n=16)


def policy_for(case: Case, **options: Any) -> FlexPrefill:
    return FlexPrefill(**({"min_budget": 32} | options), block_m=case.block_m, block_n=case.block_n)


MASK_CASES = [
    *table(BASE, lengths=square(1, 15, 16, 17, 200, 333), dtype=[F32, BF16]),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False]),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), page_size=[1, 16, 50]),
    *table(replace(BASE, lengths=((150, 300),)), block_m=[16, 32, 48], block_n=[16, 32]),
    replace(BASE, lengths=((150, 300), (150, 300)), softcap=3.0, scale=0.6),
]


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", MASK_CASES, ids=str)
def test_masks_of_random_inputs(case: Case, tau: float) -> None:
    inputs = case.make()
    _, aware = check_masks(inputs, policy_for(case, gamma=0.8, tau=tau), exempt=0.03)
    if tau in (0.0, 1.0):
        for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
            if seqlen_q and seqlen_k:
                assert aware[b].all() == (tau == 1.0) and aware[b].any() == (tau == 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.0},
        {"gamma": 0.999},
        {"gamma": 0.0},
        {"gamma": [0.2, 0.5, 0.9, 1.0]},
        {"gamma": torch.tensor([1.0, 0.9, 0.4, 0.0])},
        {"min_budget": 0},
        {"min_budget": 100},
        {"min_budget": 10**6},
        {"gamma": 1.0, "min_budget": 0, "max_budget": 64},
        {"gamma": 0.9, "min_budget": 64, "max_budget": 70},
        {"sink_blocks": 0, "window_blocks": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_budgets_and_gamma(options: dict[str, Any], tau: float) -> None:
    inputs = replace(BASE, lengths=((150, 300), (40, 40), (0, 9)), layout=PACKED).make()
    check_masks(inputs, policy_for(inputs.case, **{"gamma": 0.7, "tau": tau} | options), exempt=0.03)


def test_gamma_one_is_dense() -> None:
    for tau in (0.0, 1.0):
        inputs = replace(BASE, lengths=((150, 300),)).make()
        assert float(inputs.run(policy_for(inputs.case, gamma=1.0, tau=tau), return_info=True)[1].density()) == 1.0


def rotary(length: int, dim: int, shift: int) -> torch.Tensor:
    """[length, dim]: inner products depend on the difference of position + shift, and peak where it is 0."""
    angles = (torch.arange(length) + shift)[:, None] * torch.linspace(0.05, 2.6, dim // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def structured(kind: str, length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [length, dim] with one structure, over noise."""
    g = torch.Generator().manual_seed(5)
    q, k = (0.1 * torch.randn(length, dim, generator=g) for _ in range(2))
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=g), dim=0)
    if kind == "sink":
        q += 6.0 * direction
        k[:3] += 12.0 * direction
    elif kind == "verticals":
        q += 6.0 * direction
        k[[37, 150, 151, 290]] += 10.0 * direction
    elif kind == "slashes":
        q += 2.5 * rotary(length, dim, 0)
        k += 2.5 * (rotary(length, dim, 70) + rotary(length, dim, 133))
    elif kind == "block-diagonal":
        owner = torch.randn(length // 48 + 1, dim, generator=g)[torch.arange(length) // 48]
        q += owner
        k += 2.0 * owner
    elif kind == "needle":
        q[-20:] += 8.0 * direction
        k[201] += 20.0 * direction
    else:  # "smooth": what the means say is what the tokens do
        owner = torch.randn(length // 16 + 1, dim, generator=g)[torch.arange(length) // 16]
        q += 6.0 * direction
        k += 3.0 * owner
    return q, k


KINDS = ["sink", "verticals", "slashes", "block-diagonal", "needle", "smooth"]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_structured_inputs(kind: str, dtype: torch.dtype) -> None:
    case = replace(BASE, lengths=((400, 400),), dtype=dtype)
    inputs = case.make()
    q, k = structured(kind, 400, case.dim)
    inputs.queries[0] = q[:, None].repeat(1, 4, 1).to(dtype)
    inputs.keys[0] = k[:, None].repeat(1, 2, 1).to(dtype)
    inputs.lay_out()
    # Gamma counts tokens, so few sharp lines scattered over blocks need a budget to be kept.
    mask, aware = check_masks(inputs, policy_for(case, gamma=0.9, tau=0.1, min_budget=80), exempt=0.05)
    rows = mask.to_rows()[:, 0].numpy()
    assert float(mask.density()) < 0.75
    own = np.arange(25)
    # Whether block means tell where the attention goes.
    assert aware[0].all() == aware[0].any() == (kind in ("smooth", "block-diagonal"))
    if kind == "verticals":
        for token in (37, 150, 290):
            assert rows[token // 16 :, token // 16].all()
    elif kind == "needle":
        assert rows[201 // 16 :, 201 // 16].all()
    elif kind == "slashes":
        for distance in (70, 133):
            for diagonal in (distance // 16, distance // 16 + 1):
                assert rows[own[diagonal:], own[diagonal:] - diagonal].all()


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_layouts_give_the_same_mask(layout: str) -> None:
    case = replace(BASE, lengths=((150, 300), (150, 300)), dtype=BF16)
    policy = policy_for(case, gamma=0.7, tau=0.2)
    want = case.make().run(policy, return_info=True)[1].mask
    other = replace(case, layout=layout, strides="gaps", page_size=13).make()
    got = other.run(policy, return_info=True)[1].mask
    used = want.words.shape[0]
    assert torch.equal(got.words[:used], want.words) and not got.words[used:].any()


def test_the_last_chunk_has_the_patterns_of_the_whole_prompt() -> None:
    case = replace(BASE, lengths=((320, 320),))
    whole = case.make()
    policy = policy_for(case, gamma=0.6, tau=0.15)
    want = whole.run(policy, return_info=True)[1].mask.to_rows()
    chunk = bsfa.attention(whole.q[:, 160:], whole.k, whole.v, policy=policy, return_info=True)
    assert isinstance(chunk, tuple)
    assert torch.equal(chunk[1].mask.to_rows(), want[10:])  # type: ignore[union-attr]


def test_same_bits_again() -> None:
    inputs = replace(BASE, lengths=RAGGED, layout=PAGED_PACKED).make()
    policy = policy_for(inputs.case, gamma=0.8, tau=0.25)
    first = inputs.run(policy, return_info=True)[1].mask
    again = inputs.run(policy, return_info=True)[1].mask
    assert torch.equal(first.words, again.words) and torch.equal(first.counts, again.counts)


def test_nothing_at_all() -> None:
    policy = FlexPrefill()
    for batch, sq, sk in ((0, 5, 5), (2, 0, 7), (2, 7, 0), (2, 0, 0)):
        q, k = torch.zeros(batch, sq, 2, 8), torch.zeros(batch, sk, 1, 8)
        out, info = bsfa.attention(q, k, k, policy=policy, return_info=True)  # type: ignore[misc]
        assert out.shape == q.shape and not info.mask.words.any()


def test_nan_in_the_inputs_reaches_the_output() -> None:
    inputs = replace(BASE, lengths=((64, 64),)).make()
    inputs.k[0, 3] = math.nan
    out = inputs.run(policy_for(inputs.case))
    assert out[0, 3:].isnan().any()


# --- errors, torch.compile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gamma": 1.5}, ValueError, "FlexPrefill.gamma must be 0"),
        ({"gamma": math.nan}, ValueError, "FlexPrefill.gamma"),
        ({"gamma": "0.9"}, TypeError, "FlexPrefill.gamma"),
        ({"gamma": torch.tensor([1, 0])}, ValueError, "FlexPrefill.gamma"),
        ({"tau": -0.1}, ValueError, "FlexPrefill.tau"),
        ({"tau": math.inf}, ValueError, "FlexPrefill.tau"),
        ({"tau": torch.tensor(0.1)}, TypeError, "FlexPrefill.tau"),
        ({"min_budget": -1}, ValueError, "FlexPrefill.min_budget"),
        ({"min_budget": 1.5}, TypeError, "FlexPrefill.min_budget"),
        ({"max_budget": 0}, ValueError, "FlexPrefill.max_budget"),
        ({"max_budget": 512}, ValueError, "less than min_budget"),
        ({"sink_blocks": -1}, ValueError, "FlexPrefill.sink_blocks"),
        ({"window_blocks": 0}, ValueError, "FlexPrefill.window_blocks"),
        ({"block_m": 0}, ValueError, "block_m"),
    ],
    ids=str,
)
def test_bad_parameters(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        FlexPrefill(**options)


def test_bad_calls() -> None:
    q, k = torch.zeros(1, 40, 4, 8), torch.zeros(1, 40, 2, 8)
    with pytest.raises(ValueError, match=r"FlexPrefill.gamma has 3 values but q has 4 heads"):
        bsfa.attention(q, k, k, policy=FlexPrefill(gamma=[0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="FlexPrefill needs the keys"):
        bsfa.select_blocks(q, bsfa.pool_blocks(k), FlexPrefill(), seqlen_k=40)


def test_raw_operators_refuse_what_they_cannot_do() -> None:
    q, k = torch.zeros(1, 40, 4, 8), torch.zeros(1, 40, 2, 8)

    def raw(q: torch.Tensor, k: torch.Tensor, *lengths: Any) -> None:
        torch.ops.bsfa.probe_attention(q, k, *(lengths or (None, None, None, None, 40, 40)), 128, True, 1.0, 0.0)

    raw(q, k)
    with pytest.raises(RuntimeError, match="differ in dtype"):
        raw(q, k.half())
    with pytest.raises(RuntimeError, match="differ in head_dim"):
        raw(q, k[..., :4])
    with pytest.raises(RuntimeError, match="is not a page"):
        raw(q, k, None, None, int32([[1]]), int32([40]), 40, 40)
    with pytest.raises(RuntimeError, match="must start with 0"):
        raw(q[0], k[0], int32([1, 40]), int32([0, 40]), None, None, 40, 40)
    words, aware = torch.zeros(1, 4, 1, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)

    def mask(base: torch.Tensor, aware: torch.Tensor, bits: torch.Tensor, length: int = 40) -> None:
        torch.ops.bsfa.pattern_mask(base, aware, bits, bits, None, None, None, length, length, 128, 128, True, 0, 1)

    mask(words, aware, words)
    with pytest.raises(RuntimeError, match="vertical must be"):
        mask(words, aware, words[:, :3])
    with pytest.raises(RuntimeError, match="query_aware must be"):
        mask(words, aware.bool(), words)
    with pytest.raises(RuntimeError, match="this problem needs 2"):
        mask(words, aware, words, 200)


SAMPLES = [
    replace(BASE, lengths=((40, 70), (40, 70)), block_m=32),
    replace(BASE, lengths=((40, 70), (0, 9)), layout=PACKED, block_m=32),
    replace(BASE, lengths=((40, 70), (40, 50)), layout=PAGED, block_m=32),
]


def finite(inputs: Inputs) -> Inputs:
    for name in ("q", "k", "v"):
        getattr(inputs, name).nan_to_num_()
    return inputs


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck(case: Case) -> None:
    inputs = finite(case.make())
    lengths = (inputs.cu_q, inputs.cu_k, inputs.block_table, inputs.seqlens_k, inputs.max_q, inputs.max_k)
    arguments = (inputs.q, inputs.k, *lengths, 32, True, 0.25, 2.0)
    torch.library.opcheck(torch.ops.bsfa.probe_attention.default, arguments)
    words = torch.ones(8, 4, 1, dtype=torch.int32)
    bits = torch.full((2, 4, 1), 2, dtype=torch.int32)
    lengths = (inputs.cu_q, inputs.cu_k, inputs.seqlens_k, inputs.max_q, inputs.max_k)
    arguments = (words, bits[..., 0].contiguous(), bits, bits, *lengths, 32, 16, True, 1, 1)
    torch.library.opcheck(torch.ops.bsfa.pattern_mask.default, arguments)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_compiles_into_one_graph(case: Case) -> None:
    inputs = case.make()
    policy = policy_for(case, gamma=0.6, tau=0.2)
    want = inputs.run(policy)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: inputs.run(policy), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), want)
