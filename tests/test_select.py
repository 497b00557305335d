"""Scores and selection against the rules of the papers, stated in float64.

The oracle reads the same pooled keys as the kernel. A block whose score is so near its threshold that float32 rounding
of the logits decides is exempt; such blocks must be rare. With exactly representable scores nothing is exempt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsfa
import oracle
from bsfa.policies import CumulativeMass, RelativeMax, ScoredPolicy
from cases import BF16, F16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, int32, poison, square, table

EPSILON = 3e-6  # error of a float32 logit, relative to the largest of its head
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 150), (0, 0))
CHUNKS = ((50, 187), (50, 120), (50, 50))
BARE: dict[str, Any] = {"sink_blocks": 0, "window_blocks": 1, "last_tiles": 0}  # the rule and the diagonal


@dataclass(frozen=True)
class Rule:
    """A policy class and its parameters; the block sizes come from the case."""

    kind: type[ScoredPolicy] = RelativeMax
    threshold: float | tuple[float, ...] = 0.5
    options: tuple[tuple[str, int], ...] = tuple(BARE.items())

    def __str__(self) -> str:
        options = ",".join(f"{k.removesuffix('_blocks')}={v}" for k, v in self.options if v != BARE.get(k))
        return f"{self.kind.name}={self.threshold}" + (f",{options}" if options else "")

    def policy(self, case: Case) -> ScoredPolicy:
        threshold = self.threshold if isinstance(self.threshold, float) else list(self.threshold)
        sizes = {"block_m": case.block_m, "block_n": case.block_n}
        return self.kind(**{self.kind.threshold_name: threshold}, **sizes, **dict(self.options))


def rule(kind: type[ScoredPolicy], threshold: float | tuple[float, ...], **options: int) -> Rule:
    return Rule(kind, threshold, tuple((BARE | options).items()))


def oracle_scores(
    inputs: Inputs, b: int, means: np.ndarray, tile: oracle.Tile, kind: type[ScoredPolicy], epsilon: float
):
    case = inputs.case
    q = inputs.arrays(b)[0]
    maths = {"scale": case.softmax_scale, "softcap": case.softcap, "epsilon": epsilon}
    if kind is CumulativeMass:
        return oracle.cumulative_mass(q, means, tile, **maths)
    return oracle.relative_max(q, means, tile, case.lengths[b][1], block_n=case.block_n, causal=case.causal, **maths)


def check(
    case: Case,
    rule: Rule,
    *,
    inputs: Inputs | None = None,
    prompt_lens: list[int] | None = None,
    epsilon: float = EPSILON,
) -> bsfa.BlockMask:
    inputs = case.make() if inputs is None else inputs
    policy = rule.policy(case)
    summary = bsfa.pool_blocks(inputs.k, block_n=case.block_n, **inputs.layout_k)
    g = inputs.geometry
    poison((g.num_rows, case.hq, g.num_blocks))
    mask, scores = bsfa.select_blocks(
        inputs.q,
        summary,
        policy,
        prompt_lens=None if prompt_lens is None else int32(prompt_lens),
        return_scores=True,
        **inputs.maths,
        **inputs.layout_select,
    )
    assert mask is not None and (mask.block_m, mask.block_n) == (case.block_m, case.block_n)
    rows = mask.to_rows()
    assert rows.shape == (g.num_rows, case.hq, g.num_blocks) == scores.shape
    assert torch.equal(mask.counts, rows.sum(-1, dtype=torch.int32))
    threshold = np.broadcast_to(np.float32(rule.threshold), (case.hq,))
    options = dict(rule.options)
    exempt = total = 0
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        means = summary[b].double().numpy()
        got_rows, got_scores = inputs.rows_of_sequence(rows, b), inputs.rows_of_sequence(scores, b)
        end = (prompt_lens[b] if prompt_lens is not None else seqlen_k) if case.causal else seqlen_q
        for t, tile in enumerate(inputs.tiles(b)):
            n = tile.visible
            where = f"sequence {b}, tile {t}"
            assert (got_scores[t, :, n:] == -1).all(), f"{where}: scores of blocks that are not visible"
            assert not got_rows[t, :, n:].any(), f"{where}: blocks that are not visible are kept"
            if n == 0:
                continue
            want = oracle_scores(inputs, b, means, tile, rule.kind, epsilon)
            got = got_scores[t, :, :n].astype(np.float64)
            assert (got >= want.low - 1e-6).all() and (got <= want.high + 1e-6).all(), f"{where}: scores"
            always = oracle.always_kept(
                tile,
                seqlen_q,
                seqlen_k,
                block_m=case.block_m,
                block_n=case.block_n,
                causal=case.causal,
                sink=options["sink_blocks"],
                window=options["window_blocks"],
            )
            if tile.index >= -(-end // case.block_m) - options["last_tiles"] and options["last_tiles"]:
                always[:] = True
            kept, sure = oracle.kept_and_sure(
                want,
                always,
                threshold=threshold,
                at_least=rule.kind.keeps_at_least,
                min_blocks=options.get("min_blocks", 0),
            )
            wrong = (got_rows[t, :, :n] != kept) & sure
            assert not wrong.any(), f"{where}: (head, block) {np.argwhere(wrong).tolist()}, scores {want.value[wrong]}"
            exempt += int((~sure).sum())
            total += sure.size
    assert not inputs.unused_rows(rows).any() and (inputs.unused_rows(scores) == -1).all(), "rows of no tile"
    assert exempt <= max(2, 0.005 * total), f"{exempt} of {total} blocks are near their threshold"
    return mask


RULES = [
    *(rule(RelativeMax, alpha) for alpha in (0.0, 0.05, 0.5, 0.9, 1.0)),
    *(rule(CumulativeMass, mass) for mass in (0.0, 0.3, 0.9, 0.99, 1.0)),
    *(
        rule(kind, 0.6, **options)
        for kind in (RelativeMax, CumulativeMass)
        for options in (
            {"sink_blocks": 2},
            {"window_blocks": 3},
            {"last_tiles": 1},
            {"last_tiles": 2, "window_blocks": 2, "sink_blocks": 1},
            {"last_tiles": 100},
            {"min_blocks": 1},
            {"min_blocks": 3},
            {"min_blocks": 1000, "sink_blocks": 1000, "window_blocks": 1000},
        )
    ),
    rule(RelativeMax, (0.0, 0.3, 0.8, 1.0)),
    rule(CumulativeMass, (1.0, 0.9, 0.2, 0.0)),
]
BOTH = [rule(RelativeMax, 0.6, min_blocks=2), rule(CumulativeMass, 0.7, sink_blocks=1, last_tiles=1)]

WIDE = Case(lengths=((300, 700),), hq=4, hkv=2, block_m=32, block_n=32, scale=0.5)
GEOMETRIES = [
    *table(Case(scale=0.5), lengths=square(1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)),
    *table(
        Case(hq=4, hkv=2, block_m=32, block_n=16),
        lengths=[(x,) for x in ((1, 65), (63, 129), (33, 257), (100, 37), (70, 0), (0, 70), (0, 0))],
        causal=[True, False],
    ),
    *table(Case(lengths=((141, 600),), hq=2, scale=0.5), block_m=[16, 32, 64, 128], block_n=[16, 32, 64, 128]),
    *table(Case(lengths=((141, 300),)), block_m=[1, 7, 600, 4096], block_n=[1, 100, 4096]),
    *table(
        Case(hq=4, hkv=2, lengths=RAGGED, block_m=16, block_n=16),
        layout=[PACKED, PAGED_PACKED],
        strides=["plain", "interleaved", "head-major", "gaps"],
        causal=[True, False],
    ),
    *table(
        Case(lengths=CHUNKS, layout=PAGED, block_m=16, block_n=16), page_size=[1, 3, 16, 64], dtype=[F32, BF16, F16]
    ),
    *table(Case(lengths=((90, 300),), block_m=32, block_n=16), dim=[1, 8, 40, 80, 128, 256], dtype=[F32, BF16]),
    *table(Case(lengths=((90, 300),), block_m=32, block_n=16), hq=[*range(1, 9), 17, 40]),
    *table(Case(lengths=((90, 300),), block_m=32, block_n=16), softcap=[0.5, 3.0], scale=[None, 1.0, -0.5]),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", [WIDE, replace(WIDE, dtype=BF16), replace(WIDE, causal=False)], ids=str)
def test_rules(case: Case, rule: Rule) -> None:
    check(case, rule)


@pytest.mark.parametrize("rule", BOTH, ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_geometries(case: Case, rule: Rule) -> None:
    check(case, rule)


@pytest.mark.parametrize(
    "rule", [rule(RelativeMax, 0.9, last_tiles=2), rule(CumulativeMass, 0.3, last_tiles=3)], ids=str
)
@pytest.mark.parametrize("prompt", [187, 190, 250, 400])
def test_last_tiles_are_those_of_the_prompt(rule: Rule, prompt: int) -> None:
    case = Case(lengths=CHUNKS, layout=PAGED, block_m=32, block_n=32)
    check(case, rule, prompt_lens=[prompt, max(120, prompt - 60), 50])


@settings(max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 300)), min_size=1, max_size=3),
    kind=st.sampled_from([RelativeMax, CumulativeMass]),
    threshold=st.floats(0.0, 1.0, width=32),
    options=st.fixed_dictionaries(
        {
            "sink_blocks": st.integers(0, 3),
            "window_blocks": st.integers(1, 4),
            "last_tiles": st.integers(0, 2),
            "min_blocks": st.integers(0, 5),
        }
    ),
    layout=st.sampled_from([PACKED, PAGED_PACKED]),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    dim=st.integers(1, 40),
    block_m=st.integers(1, 130),
    block_n=st.integers(1, 60),
    causal=st.booleans(),
    dtype=st.sampled_from([F32, BF16, F16]),
    seed=st.integers(0, 10**6),
)
def test_anything(
    lengths: list[tuple[int, int]],
    kind: type[ScoredPolicy],
    threshold: float,
    options: dict[str, int],
    heads: tuple[int, int],
    **fields: Any,
) -> None:
    case = Case(lengths=tuple(lengths), hq=heads[0] * heads[1], hkv=heads[1], **fields)
    check(case, rule(kind, threshold, **options))


# --- exact cases: nothing is exempt -----------------------------------------------------------------------------------


def blocks_with_logits(levels: list[float], case: Case) -> Inputs:
    """One prompt whose block j has the logit ``levels[j]`` against every query: k = (level, 0, ..), q = (1, 0, ..)."""
    inputs = case.make()
    inputs.queries[0].zero_()[..., 0] = 1.0
    inputs.keys[0].zero_()[..., 0] = torch.tensor(levels).repeat_interleave(case.block_n)[: case.lengths[0][1], None]
    inputs.lay_out()
    return inputs


EXACT = Case(lengths=((16, 128),), dim=4, block_m=16, block_n=16, scale=1.0)  # one tile, eight blocks, positions 112..
LOG2 = float(np.log(2.0))


def kept(mask: bsfa.BlockMask) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in mask.to_rows()[0].numpy()]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_relative_max_keeps_every_block_of_constant_keys(alpha: float) -> None:
    """All whole blocks tie at score 1; the diagonal, which one row of 16 sees whole, scores 1 / 16."""
    inputs = blocks_with_logits([1.5] * 8, EXACT)
    check(EXACT, rule(RelativeMax, alpha), inputs=inputs, epsilon=0.0)
    policy = rule(RelativeMax, alpha).policy(EXACT)
    summary = bsfa.pool_blocks(inputs.k, block_n=16)
    mask, scores = bsfa.select_blocks(inputs.q, summary, policy, seqlen_k=128, softmax_scale=1.0, return_scores=True)
    assert kept(mask) == [list(range(8))] * 2
    assert scores[0, 0].tolist() == [1.0] * 7 + [1 / 16]


@pytest.mark.parametrize(
    ("mass", "count"), [(0.0, 1), (0.125, 1), (0.126, 2), (0.5, 4), (0.51, 5), (0.875, 7), (1.0, 8)]
)
def test_cumulative_mass_takes_lower_blocks_first_when_all_tie(mass: float, count: int) -> None:
    inputs = blocks_with_logits([0.75] * 8, EXACT)
    mask = check(EXACT, rule(CumulativeMass, mass), inputs=inputs, epsilon=0.0)
    assert kept(mask) == [sorted({*range(count), 7})] * 2


@pytest.mark.parametrize("kind", [RelativeMax, CumulativeMass])
@pytest.mark.parametrize("least", [0, 1, 2, 3, 5, 8])
def test_min_blocks_takes_lower_blocks_first_when_scores_tie(kind: type[ScoredPolicy], least: int) -> None:
    inputs = blocks_with_logits([0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 2.0, -3.0], EXACT)
    threshold = 1.0 if kind is RelativeMax else 0.0
    mask = check(EXACT, rule(kind, threshold, min_blocks=least), inputs=inputs, epsilon=0.0)
    order = [1, 3, 4, 6, 0, 2, 5, 7]
    first = order[:4] if kind is RelativeMax else order[:1]
    assert kept(mask) == [sorted({*first, *order[:least], 7})] * 2


@pytest.mark.parametrize(
    ("kind", "gap"),
    [*((CumulativeMass, gap) for gap in (1.0, 20.0, 60.0, 200.0)), *((RelativeMax, gap) for gap in (1.0, 20.0))],
)
def test_min_blocks_takes_the_best_however_peaked_the_scores(kind: type[ScoredPolicy], gap: float) -> None:
    """Ranks are those of the logits, also where float32 cannot tell the masses before them apart.

    (Energies of RelativeMax more than 87 nats below the largest are 0 in float32 and tie.)
    """
    inputs = blocks_with_logits([-gap, 0.0, -3 * gap, -2 * gap, gap, -4 * gap, 2 * gap, -5 * gap], EXACT)
    threshold = 1.0 if kind is RelativeMax else 0.0
    for least, best in ((2, [4, 6]), (3, [1, 4, 6]), (4, [0, 1, 4, 6]), (5, [0, 1, 3, 4, 6])):
        policy = rule(kind, threshold, min_blocks=least).policy(EXACT)
        summary = bsfa.pool_blocks(inputs.k, block_n=16)
        mask = bsfa.select_blocks(inputs.q, summary, policy, seqlen_k=128, softmax_scale=1.0)
        assert kept(mask) == [[*best, 7]] * 2


@pytest.mark.parametrize("kind", [RelativeMax, CumulativeMass])
@pytest.mark.parametrize("gap", [1.0, 50.0, 200.0, 1e4])
@pytest.mark.parametrize("causal", [True, False])
def test_the_keep_all_threshold_keeps_all_however_peaked_the_scores(
    kind: type[ScoredPolicy], gap: float, causal: bool
) -> None:
    inputs = blocks_with_logits([0.0, -gap, gap, 0.5 * gap, -0.5 * gap, 0.0, 1.0, -gap], EXACT)
    threshold = 0.0 if kind is RelativeMax else 1.0
    policy = rule(kind, threshold).policy(EXACT)
    assert policy.keep_all_threshold() == threshold
    summary = bsfa.pool_blocks(inputs.k, block_n=16)
    mask = bsfa.select_blocks(inputs.q, summary, policy, seqlen_k=128, softmax_scale=1.0, causal=causal)
    assert kept(mask) == [list(range(8))] * 2
    assert float(mask.density()) == 1.0


def test_keep_all_threshold_of_one_head_only() -> None:
    inputs = blocks_with_logits([0.0, 0.0, 200.0, 0.0, 0.0, 0.0, 0.0, 0.0], EXACT)
    summary = bsfa.pool_blocks(inputs.k, block_n=16)
    for policy in (
        RelativeMax(alpha=[0.0, 1.0], block_m=16, block_n=16, **BARE),
        CumulativeMass(mass=torch.tensor([1.0, 0.5]), block_m=16, block_n=16, **BARE),
    ):
        mask = bsfa.select_blocks(inputs.q, summary, policy, seqlen_k=128, softmax_scale=1.0)
        assert kept(mask) == [list(range(8)), [2, 7]]


def test_threshold_is_met_by_equality() -> None:
    """Zero queries: all logits 0. Non-causal, all energies equal the rows: score exactly 1, met by alpha = 1."""
    case = replace(EXACT, causal=False)
    inputs = case.make()
    inputs.queries[0].zero_()
    inputs.lay_out()
    assert kept(check(case, rule(RelativeMax, 1.0), inputs=inputs, epsilon=0.0)) == [list(range(8))] * 2


def test_relative_max_counts_rows_that_see_the_whole_block() -> None:
    """Equal keys, tile of 64 rows over blocks of 16: the tile's own blocks are seen whole by 49, 33, 17 and 1 rows."""
    case = Case(lengths=((64, 128),), dim=4, block_m=64, block_n=16, scale=1.0)
    inputs = blocks_with_logits([0.0] * 8, case)
    summary = bsfa.pool_blocks(inputs.k, block_n=16)
    policy = rule(RelativeMax, 0.5).policy(case)
    mask, scores = bsfa.select_blocks(inputs.q, summary, policy, seqlen_k=128, softmax_scale=1.0, return_scores=True)
    assert scores[0, 0].tolist() == [1, 1, 1, 1, 49 / 64, 33 / 64, 17 / 64, 1 / 64]
    # 6 falls short of one half and is not in a window of one block: that is block 4, and up to the tile's last.
    assert kept(mask) == [list(range(8))] * 2
    last = case.make()  # the last block of a sequence is whole at the sequence's end
    last.queries, last.keys = [inputs.queries[0][:41]], [inputs.keys[0][:105]]
    last.lay_out()
    short = replace(case, lengths=((41, 105),))
    last.case = short
    last.lay_out()
    _, scores = bsfa.select_blocks(
        last.q, bsfa.pool_blocks(last.k, block_n=16), policy, seqlen_k=105, softmax_scale=1.0, return_scores=True
    )
    want = [1, 1, 1, 1, 26 / 41, 10 / 41, 1 / 41]
    np.testing.assert_allclose(scores[0, 0].numpy(), want, rtol=1e-6)


def test_cumulative_mass_of_known_probabilities() -> None:
    """Logits ln 8, ln 4, ln 2, ln 1 (and far below): p = 8/15, 4/15, 2/15, 1/15; scores are the sums before."""
    levels = [2 * LOG2, -60.0, 0.0, 3 * LOG2, -60.0, LOG2, -60.0, -60.0]
    inputs = blocks_with_logits(levels, EXACT)
    summary = bsfa.pool_blocks(inputs.k, block_n=16)
    for mass, best in ((0.5, [3]), (0.54, [0, 3]), (0.79, [0, 3]), (0.81, [0, 3, 5]), (0.94, [0, 2, 3, 5])):
        policy = rule(CumulativeMass, mass).policy(EXACT)
        mask, scores = bsfa.select_blocks(
            inputs.q, summary, policy, seqlen_k=128, softmax_scale=1.0, return_scores=True
        )
        assert kept(mask) == [[*best, 7]] * 2
        np.testing.assert_allclose(scores[0, 0, [3, 0, 5, 2]].numpy(), np.array([0, 8, 12, 14]) / 15, atol=1e-6)


# --- bits, NaN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RelativeMax, CumulativeMass])
def test_same_bits_again_and_with_other_threads(kind: type[ScoredPolicy]) -> None:
    inputs = replace(WIDE, lengths=((300, 700), (300, 700))).make()
    policy = rule(kind, 0.5).policy(inputs.case)
    summary = bsfa.pool_blocks(inputs.k, block_n=32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            mask, scores = bsfa.select_blocks(inputs.q, summary, policy, seqlen_k=700, return_scores=True)
            found.append((mask.words, mask.counts, scores))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", [RelativeMax, CumulativeMass])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_harms_its_own_tile_and_head_only(kind: type[ScoredPolicy], where: str) -> None:
    """A NaN leaves other rows of the mask alone, and its own row keeps at least sinks and window."""
    case = Case(lengths=((128, 256),), hq=4, hkv=2, block_m=32, block_n=32)
    inputs = case.make()
    policy = rule(kind, 0.5, sink_blocks=1, window_blocks=2).policy(case)
    clean = bsfa.select_blocks(inputs.q, bsfa.pool_blocks(inputs.k, block_n=32), policy, seqlen_k=256).to_rows()
    if where == "query":
        inputs.q[0, 40, 1, 2] = float("nan")
        harmed = torch.zeros(4, 4, dtype=torch.bool)
        harmed[1, 1] = True
    else:
        inputs.k[0, 170, 0, 2] = float("nan")  # block 5, KV head 0: tiles from position 160 on
        harmed = torch.zeros(4, 4, dtype=torch.bool)
        harmed[1:, :2] = True
    rows = bsfa.select_blocks(inputs.q, bsfa.pool_blocks(inputs.k, block_n=32), policy, seqlen_k=256).to_rows()
    assert torch.equal(rows[~harmed], clean[~harmed])
    for t in range(4):
        assert rows[t, :, [0, t + 3, t + 4]].all()
        assert not rows[t, :, t + 5 :].any()
