"""Operators skip_attention and tile_max against the rule as the oracle states it, decision by decision."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bsfa
import oracle_skip
from cases import (
    BATCHED,
    BF16,
    F16,
    F32,
    NAN,
    PACKED,
    PAGED,
    PAGED_PACKED,
    ROUNDING,
    Case,
    Inputs,
    assert_within,
    int32,
    poison,
    square,
    table,
)

INF = float("inf")
FORMS = ("absolute", "relative")
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 250), (0, 0))
CHUNKS = ((50, 187), (50, 120), (50, 50))
PAIRS = ((1, 64), (1, 65), (63, 129), (64, 128), (100, 237), (128, 256), (33, 257))
NOTHING_SEEN = ((100, 37), (130, 1), (70, 0), (0, 70), (0, 0), (300, 129))

CASES = [
    *table(Case(), lengths=square(1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300)),
    *table(Case(block_m=128, block_n=128), lengths=square(127, 128, 129, 385, 512)),
    *table(Case(hq=4, hkv=2), lengths=[(x,) for x in PAIRS + NOTHING_SEEN], causal=[True, False]),
    *table(
        Case(hq=4, hkv=2, lengths=RAGGED, block_n=32),
        layout=[PACKED, PAGED_PACKED],
        strides=["plain", "interleaved", "gaps"],
        causal=[True, False],
    ),
    *table(Case(lengths=CHUNKS, layout=PAGED, block_n=32), page_size=[1, 7, 16, 64, 256], dtype=[F32, BF16]),
    *table(Case(lengths=((90, 300),), block_n=32), dim=[1, 40, 64, 80, 128], dtype=[F32, BF16, F16]),
    *table(Case(lengths=((70, 200),), block_n=32), hq=[1, 3, 8, 17], softcap=[0.0, 4.0], scale=[None, 1.0, -0.3, 0.0]),
    *table(
        Case(lengths=((141, 300),), hq=4, hkv=2, mask="random"),
        mask_heads=["q", "kv", "one"],
        block_m=[32, 64, 128, 256],
        block_n=[16, 64, 128],
    ),
    *table(Case(lengths=((141, 300),), hq=4, hkv=2), block_m=[1, 37, 600, 4096], block_n=[53, 4096]),
    *table(Case(lengths=((80, 110),), hq=4, hkv=2), block_m=[1, 70], block_n=[1, 5]),
    *table(
        Case(lengths=((600, 700),), dim=130, dim_v=127), block_m=[600], block_n=[64, 300]
    ),  # passes; chunks of a block
    *table(Case(lengths=((20, 1200),), block_m=16, mask="sparse"), block_n=[16, 17]),  # several words a row
    *table(Case(lengths=RAGGED, hq=4, hkv=2, block_n=16, layout=PACKED), mask=["sparse", "mixed", "empty", "diagonal"]),
]


@cache
def planted(case: Case) -> Inputs:
    """The case's inputs, keys scaled by pieces of 16 tokens: maxima of blocks differ by more than chance gives."""
    inputs = case.make()
    rng = np.random.default_rng((case.seed, 77))
    for b, keys in enumerate(inputs.keys):
        factor = torch.from_numpy(rng.choice((0.05, 0.3, 1.0, 2.0), -(-len(keys) // 16))).float().repeat_interleave(16)
        inputs.keys[b] = (keys.float() * factor[: len(keys), None, None]).to(case.dtype)
    inputs.lay_out()
    return inputs


def lengths_of(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.cu_q, inputs.cu_k, inputs.block_table, inputs.seqlens_k, inputs.max_q, inputs.max_k


def masks_of(inputs: Inputs) -> list[np.ndarray] | None:
    return None if inputs.case.mask == "none" else [inputs.draw_mask(b) for b in range(len(inputs))]


def skip(
    inputs: Inputs,
    thresholds: Tensor,
    form: str,
    *,
    counted: bool = False,
    sink: int = 1,
    window: int = 1,
    masks: list[np.ndarray] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, skips) of the operator."""
    case = inputs.case
    mask = None if masks is None else inputs.block_mask(masks)
    words, counts = (None, None) if mask is None else (mask.words, mask.counts)
    maths = (case.block_m, case.block_n, case.causal, case.softmax_scale, case.softcap)
    arguments = (inputs.q, inputs.k, inputs.v, *lengths_of(inputs), words, counts, *maths)
    arguments = (*arguments, thresholds, form, sink, window, counted)
    if out is None:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.bsfa.skip_attention(*arguments)
        return result
    lse, skips = torch.ops.bsfa.skip_attention_out(out, *arguments)
    return out, lse, skips


def tile_max(inputs: Inputs, form: str) -> Tensor:
    case = inputs.case
    maths = (case.block_m, case.block_n, case.causal, case.softmax_scale, case.softcap)
    result: Tensor = torch.ops.bsfa.tile_max(
        inputs.q, inputs.k, *lengths_of(inputs), inputs.geometry.num_rows, *maths, form
    )
    return result


def wanted(
    inputs: Inputs, thresholds: Tensor, form: str, masks: list[np.ndarray] | None, **options: Any
) -> list[oracle_skip.Skipped]:
    """What the oracle says of each sequence; ``out`` beside the average of ``|v|``."""
    case = inputs.case
    found = []
    for b in range(len(inputs)):
        q, k, v = inputs.arrays(b)
        found.append(
            oracle_skip.attention(
                q,
                k,
                np.concatenate([v, np.abs(v)], axis=-1),
                thresholds=thresholds.double().numpy(),
                form=form,
                mask=None if masks is None else masks[b],
                block_m=case.block_m,
                block_n=case.block_n,
                **inputs.oracle_maths,
                **options,
            )
        )
    return found


#: A float32 product of up to 256 factors is this far off at most, relative to the largest logit of the head.
NEAR = 1e-5


def draw_thresholds(
    inputs: Inputs, form: str, masks: list[np.ndarray] | None, columns: int = 3, **options: Any
) -> tuple[Tensor, list[oracle_skip.Skipped]]:
    """Thresholds [Hq, columns] that skip about half, none of them near anything that it is compared with; and what the
    oracle makes of them.
    """
    rng = np.random.default_rng(inputs.case.seed)
    thresholds = torch.full((inputs.case.hq, columns), -INF)
    free = wanted(inputs, thresholds, form, masks, **options)
    places = [[[] for _ in range(columns)] for _ in range(inputs.case.hq)]
    for found in free:
        for d in found.decisions:
            if np.isfinite(d.value):
                places[d.head][d.column].append(d.value)
    for _ in range(30):
        for h, row in enumerate(places):
            for c, values in enumerate(row):
                if not values:
                    continue
                ends = np.sort([*values, min(values) - 1.0, max(values) + 1.0])
                wide = np.flatnonzero(np.diff(ends) > 3 * NEAR * (1 + np.abs(ends).max()))
                i = rng.choice(wide)
                thresholds[h, c] = float(ends[i] + ends[i + 1]) / 2
        found = wanted(inputs, thresholds, form, masks, **options)
        if min(f.margin for f in found) > NEAR:
            return thresholds, found
    raise AssertionError("no thresholds away from all ties")


def low_precision(inputs: Inputs, b: int, found: oracle_skip.Skipped) -> tuple[np.ndarray, np.ndarray]:
    """The same decisions with torch operations in the dtype of the inputs: (out, lse in float32 maths)."""
    case = inputs.case
    q, k, v = inputs.queries[b], inputs.keys[b], inputs.values[b]
    group = case.hq // case.hkv
    hidden = ~torch.from_numpy(found.entered)

    def logits(dtype: torch.dtype) -> Tensor:
        s = torch.matmul(q.to(dtype).transpose(0, 1), k.repeat_interleave(group, 1).to(dtype).permute(1, 2, 0))
        s = s * case.softmax_scale
        s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
        return s.masked_fill(hidden, -INF)

    p = torch.softmax(logits(case.dtype), dim=-1).masked_fill(~torch.from_numpy(found.valued), 0.0)
    out = torch.matmul(p, v.repeat_interleave(group, 1).transpose(0, 1)).transpose(0, 1)
    return out.double().numpy(), torch.logsumexp(logits(F32), dim=-1).double().numpy()


def check_against(inputs: Inputs, got: tuple[Tensor, Tensor, Tensor], found: list[oracle_skip.Skipped]) -> None:
    """Hold out and lse within the error rule of cases.py, and the counts to the number."""
    case = inputs.case
    out, lse, skips = got
    assert out.dtype == case.dtype and lse.dtype == F32 and skips.dtype == torch.int64
    assert tuple(out.shape) == (*inputs.q.shape[:-1], inputs.v.shape[-1])
    for b, want in enumerate(found):
        want_out, magnitude = np.split(want.out, 2, axis=-1)
        low_out, low_lse = low_precision(inputs, b, want)
        got_lse = inputs.lse_of_sequence(lse, b).double().numpy()
        assert_within(got_lse, want.lse, low_lse, 2e-6, f"lse of sequence {b}")
        got_out = inputs.of_sequence(out, b).double().numpy()
        assert_within(got_out, want_out, low_out, 2e-6 if case.dtype == F32 else 1e-3, f"out of sequence {b}")
        assert (got_out[np.isneginf(want.lse).T] == 0).all()
        if case.dtype != F32:
            unit = ROUNDING[case.dtype]
            excess = np.abs(got_out - want_out) - unit * np.abs(want_out) - (unit + 1e-4) * magnitude
            assert excess.max(initial=0.0) <= 1e-6
    assert np.array_equal(skips.numpy(), sum(want.counts for want in found))


def check(case: Case, form: str, counted: bool, **options: Any) -> list[oracle_skip.Skipped]:
    inputs = planted(case)
    masks = masks_of(inputs)
    thresholds, found = draw_thresholds(inputs, form, masks, counted=counted, **options)
    names = {"sink_blocks": "sink", "window_blocks": "window"}
    kwargs = {names[name]: value for name, value in options.items() if name in names}
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=case.dtype)
    poison(inputs.q.shape[:-1])
    poison((case.hq, 2), dtype=torch.float64)
    check_against(inputs, skip(inputs, thresholds, form, counted=counted, masks=masks, **kwargs), found)
    return found


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_skip_attention(case: Case, form: str, counted: bool) -> None:
    check(case, form, counted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (0, 3), (2, 2), (100, 1), (1, 100)])
def test_sinks_and_window(sink: int, window: int, form: str, causal: bool) -> None:
    for block_m, block_n in ((64, 64), (128, 32), (32, 64)):
        case = Case(lengths=((141, 500),), causal=causal, block_m=block_m, block_n=block_n)
        found = check(case, form, False, sink_blocks=sink, window_blocks=window)
        if 100 in (sink, window):
            assert not any(f.decisions for f in found)
        else:
            assert sum(f.counts[:, 1].sum() for f in found) > 0


def test_these_cases_skip() -> None:
    """The tables above would prove little if hardly anything were skipped, or everything."""
    for form in FORMS:
        counts = np.zeros(2)
        for case in CASES[::5]:
            inputs = planted(case)
            found = draw_thresholds(inputs, form, masks_of(inputs))[1]
            counts += [sum(len(f.decisions) for f in found), sum(f.counts[:, 1].sum() for f in found)]
        assert 0.2 < counts[1] / counts[0] < 0.8


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    layout = draw(st.sampled_from([BATCHED, PACKED, PAGED, PAGED_PACKED]))
    length = st.integers(0, 200)
    if layout in (PACKED, PAGED_PACKED):
        lengths = draw(st.lists(st.tuples(length, length), min_size=1, max_size=3))
    else:
        seqlen_q, batch = draw(length), draw(st.integers(1, 2))
        seqlens_k = [draw(length)] * batch if layout == BATCHED else [draw(length) for _ in range(batch)]
        lengths = [(seqlen_q, n) for n in seqlens_k]
    hkv = draw(st.integers(1, 2))
    return Case(
        lengths=tuple(lengths),
        layout=layout,
        page_size=draw(st.integers(1, 40)),
        strides=draw(st.sampled_from(["plain", "interleaved", "head-major", "gaps"])),
        hq=hkv * draw(st.integers(1, 4)),
        hkv=hkv,
        dim=draw(st.integers(1, 70)),
        dim_v=draw(st.one_of(st.none(), st.integers(1, 70))),
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        block_m=draw(st.integers(1, 200)),
        block_n=draw(st.integers(1, 130)),
        mask=draw(st.sampled_from(["none", "random", "sparse"])),
        mask_heads=draw(st.sampled_from(["q", "kv", "one"])),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=100)
@given(
    random_cases(),
    st.sampled_from(FORMS),
    st.booleans(),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(1, 5),
)
def test_anything(case: Case, form: str, counted: bool, sink: int, window: int, columns: int) -> None:
    check(case, form, counted, sink_blocks=sink, window_blocks=window, columns=columns)


# --- what must agree --------------------------------------------------------------------------------------------------

SAMPLE = [
    Case(lengths=((141, 500),), hq=4, hkv=2, block_m=128),
    Case(lengths=((141, 500),), hq=4, hkv=2, block_m=128, block_n=128, mask="random", dtype=BF16),
    Case(lengths=RAGGED, hq=4, hkv=2, layout=PACKED, mask="random", mask_heads="one", block_m=32, block_n=16),
    Case(lengths=CHUNKS, hq=6, hkv=2, layout=PAGED, page_size=7, dtype=F16, softcap=3.0, block_n=32),
]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_same_bits_again_and_with_other_threads(case: Case, form: str, counted: bool) -> None:
    inputs = planted(case)
    masks = masks_of(inputs)
    thresholds, _ = draw_thresholds(inputs, form, masks)
    first = (*skip(inputs, thresholds, form, counted=counted, masks=masks), tile_max(inputs, form))
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 2, 3, 2):
            torch.set_num_threads(count)
            poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=case.dtype)
            again = (*skip(inputs, thresholds, form, counted=counted, masks=masks), tile_max(inputs, form))
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_given_output_has_the_same_bits(case: Case, form: str) -> None:
    inputs = planted(case)
    masks = masks_of(inputs)
    thresholds, _ = draw_thresholds(inputs, form, masks)
    first = skip(inputs, thresholds, form, masks=masks)
    place = torch.full((*inputs.q.shape[:-1], inputs.v.shape[-1] + 3), NAN, dtype=case.dtype)
    poison((case.hq, 2), dtype=torch.float64)
    again = skip(inputs, thresholds, form, masks=masks, out=place[..., 1:-2])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert place[..., 0].isnan().all() and place[..., -2:].isnan().all()


@pytest.mark.parametrize("layout", [PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("form", FORMS)
def test_layouts_have_the_same_bits(layout: str, form: str) -> None:
    case = Case(lengths=((141, 300), (141, 300)), hq=4, hkv=2, mask="random", block_n=32)
    plain = planted(case)
    other = planted(replace(case, layout=layout, strides="gaps", page_size=13))
    masks = masks_of(plain)
    thresholds, _ = draw_thresholds(plain, form, masks)
    want, want_lse, want_skips = skip(plain, thresholds, form, masks=masks)
    out, lse, skips = skip(other, thresholds, form, masks=masks)
    assert torch.equal(skips, want_skips)
    for b in range(2):
        assert torch.equal(other.of_sequence(out, b), want[b])
        assert torch.equal(other.lse_of_sequence(lse, b), want_lse[b])


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("block_m", "block_n", "cuts"),
    [(64, 64, [64, 192]), (128, 64, [128, 384]), (128, 128, [256]), (64, 16, [320, 384])],
)
def test_chunks_at_edges_of_tiles_are_the_prompt(
    block_m: int, block_n: int, cuts: list[int], form: str, counted: bool
) -> None:
    """The same decisions, and the same bits: thresholds go by absolute position, groups lie at absolute positions."""
    whole = planted(Case(lengths=((420, 420),), hq=4, hkv=2, block_m=block_m, block_n=block_n))
    thresholds, found = draw_thresholds(whole, form, None, columns=5, counted=counted)
    want, want_lse, want_skips = skip(whole, thresholds, form, counted=counted)
    assert want_skips[:, 1].sum() > 0
    outs, lses, skips = [], [], torch.zeros_like(want_skips)
    for begin, end in pairwise([0, *cuts, 420]):
        chunk = replace(whole.case, layout=PAGED, page_size=13, lengths=((end - begin, end),)).make()
        chunk.queries = [whole.queries[0][begin:end]]
        chunk.keys, chunk.values = [whole.keys[0][:end]], [whole.values[0][:end]]
        chunk.lay_out()
        out, lse, more = skip(chunk, thresholds, form, counted=counted)
        outs.append(out)
        lses.append(lse)
        skips += more
    assert torch.equal(skips, want_skips)
    assert torch.equal(torch.cat(outs, dim=1), want) and torch.equal(torch.cat(lses, dim=2), want_lse)
    check_against(whole, (want, want_lse, want_skips), found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nothing", [-INF, NAN, -3e38])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_without_skips_it_is_attention(case: Case, nothing: float, form: str) -> None:
    inputs = planted(case)
    masks = masks_of(inputs)
    thresholds = torch.full((case.hq, 2), nothing)
    for counted in (False, True):
        out, lse, skips = skip(inputs, thresholds, form, counted=counted, sink=0, masks=masks)
        want, want_lse = inputs.attend(None if masks is None else inputs.block_mask(masks))
        tolerance = {F32: 2e-6, BF16: 2**-7, F16: 2**-10}[case.dtype]
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=2e-6)
        assert (skips[:, 0] > 0).all() and (skips[:, 1] == 0).all()


@pytest.mark.parametrize("everything", [INF, 3e38])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (128, 64), (128, 128), (64, 16), (32, 128)])
def test_a_huge_threshold_leaves_sinks_and_window(block_m: int, block_n: int, form: str, everything: float) -> None:
    inputs = planted(Case(lengths=((141, 500),), hq=4, hkv=2, block_m=block_m, block_n=block_n))
    pattern = bsfa.policies.StaticPattern(sink_blocks=1, window_blocks=2, block_m=block_m, block_n=block_n)
    thresholds = torch.full((4, 1), everything)
    out, lse, skips = skip(inputs, thresholds, form, window=2)
    want, want_lse = inputs.run(pattern, return_lse=True)
    torch.testing.assert_close(out, want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=2e-6)
    # Counted: the denominator is that of all keys, the product that of sinks and window.
    out, all_lse, same_skips = skip(inputs, thresholds, form, window=2, counted=True)
    torch.testing.assert_close(all_lse, inputs.attend(None)[1], rtol=1e-6, atol=2e-6)
    share = (want_lse - all_lse).exp().transpose(1, 2)[..., None]
    torch.testing.assert_close(out, want * share, rtol=1e-5, atol=2e-6)
    assert torch.equal(skips, same_skips) and (skips[:, 1] > 0).all() and (skips[:, 0] > skips[:, 1]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=((141, 500),), hq=4, hkv=2, block_n=32),
        Case(lengths=RAGGED, hq=4, hkv=2, layout=PACKED, block_n=16),
    ],
    ids=str,
)
def test_decisions_are_those_of_tile_max(case: Case, form: str) -> None:
    """Bit by bit, also at equality, where the block stays: groups are the tiles of a call with tiles of 64."""
    inputs = planted(case)
    values = tile_max(inputs, form)
    free = torch.isfinite(values)
    pattern = bsfa.policies.StaticPattern(sink_blocks=1, window_blocks=1, block_m=64, block_n=case.block_n)
    free &= ~bsfa.select_blocks(inputs.q, None, pattern, **inputs.layout_select).to_rows()
    for h in range(case.hq):
        cuts = values[:, h][free[:, h]]
        cuts = cuts[cuts <= 0] if form == "relative" else cuts  # above 0 what is skipped could raise running maxima
        assert len(cuts) > 3
        for x in cuts[::3]:
            for cut in (x, torch.nextafter(x, torch.tensor(INF))):
                skips = skip(inputs, cut.expand(case.hq, 1).contiguous(), form)[2]
                assert int(skips[h, 1]) == int((values[:, h][free[:, h]] < cut).sum())


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("form", FORMS)
def test_skipped_values_do_not_reach_the_output(form: str, value: float, counted: bool) -> None:
    inputs = planted(Case(lengths=((300, 500),), hq=4, hkv=2, block_m=128, block_n=32))
    thresholds, found = draw_thresholds(inputs, form, None, counted=counted)
    clean, clean_lse, clean_skips = skip(inputs, thresholds, form, counted=counted)
    uses = found[0].valued[:2].sum(axis=(0, 1))  # rows of the first KV head's group, per key that all of them see
    key = int(np.abs(uses[32:160] - 300).argmin()) + 32
    spoilt = replace(inputs.case).make()
    spoilt.queries, spoilt.keys = inputs.queries, inputs.keys
    spoilt.values = [inputs.values[0].clone()]
    spoilt.values[0][key, 0] = value
    spoilt.lay_out()
    out, lse, skips = skip(spoilt, thresholds, form, counted=counted)
    assert torch.equal(lse, clean_lse) and torch.equal(skips, clean_skips)
    touched = torch.from_numpy(found[0].valued[:, :, key]).clone()
    touched[2:] = False
    rows = touched.T[None]  # [1, Sq, Hq]
    assert 0 < int(touched.sum()) < 600  # some use it, some skip it
    assert torch.equal(out[~rows], clean[~rows])
    assert not out[rows].isfinite().any()


@pytest.mark.parametrize("form", FORMS)
def test_a_block_with_a_nan_logit_is_not_skipped(form: str) -> None:
    inputs = planted(Case(lengths=((200, 500),), hq=4, hkv=2, block_m=128, block_n=32))
    thresholds, found = draw_thresholds(inputs, form, None)
    spoilt = replace(inputs.case).make()
    spoilt.queries, spoilt.values = inputs.queries, inputs.values
    spoilt.keys = [inputs.keys[0].clone()]
    spoilt.keys[0][100, 0, 3] = NAN
    spoilt.lay_out()
    out, lse, skips = skip(spoilt, thresholds, form)
    with np.errstate(invalid="ignore"):
        want = wanted(spoilt, thresholds, form, None)[0]
    assert np.array_equal(skips.numpy(), want.counts)
    assert (want.counts[:2, 1] < found[0].counts[:2, 1]).any() and (want.counts[2:] == found[0].counts[2:]).all()
    assert lse[:, :2].isnan().all() and out[:, :, :2].isnan().all()
    assert out[:, :, 2:].isfinite().all() and lse[:, 2:].isfinite().all()
    for f in FORMS:
        values = tile_max(spoilt, f)
        assert values[:, :2, 3].isnan().all() and not values[:, 2:].isnan().any()


def test_large_logits_of_skipped_blocks_are_counted() -> None:
    """A skipped block can lie far above all that is kept: the denominator moves, sums neither overflow nor vanish."""
    inputs = Case(lengths=((64, 256),), hq=1).make()
    inputs.queries[0].abs_()
    inputs.keys[0][64:128] = inputs.keys[0][64:128].abs() * 100
    inputs.lay_out()
    thresholds = torch.tensor([[1e4]])
    found = wanted(inputs, thresholds, "absolute", None, counted=True)
    assert found[0].counts.tolist() == [[4, 2]] and found[0].margin > NEAR
    check_against(inputs, skip(inputs, thresholds, "absolute", counted=True), found)


# --- tile_max ---------------------------------------------------------------------------------------------------------

TILES = [
    *table(Case(), lengths=square(1, 63, 64, 65, 127, 128, 129, 300)),
    *table(Case(hq=4, hkv=2), lengths=[(x,) for x in PAIRS + NOTHING_SEEN], causal=[True, False]),
    *table(Case(hq=4, hkv=2, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], strides=["plain", "interleaved", "gaps"]),
    *table(Case(lengths=CHUNKS, layout=PAGED), page_size=[1, 7, 16, 256], dtype=[F32, BF16, F16]),
    *table(Case(lengths=((90, 200),)), dim=[1, 40, 80, 128, 256], dtype=[F32, BF16]),
    *table(Case(lengths=((90, 200),)), hq=[1, 3, 8, 17], softcap=[0.0, 4.0], scale=[None, 1.0, -0.3]),
    *table(Case(lengths=((141, 300),), hq=4, hkv=2), block_m=[1, 16, 128, 600], block_n=[16, 100, 128, 4096]),
    *table(Case(lengths=((80, 110),), hq=4, hkv=2), block_m=[1, 70], block_n=[1, 5]),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", TILES, ids=str)
def test_tile_max(case: Case, form: str) -> None:
    inputs = planted(case)
    poison((inputs.geometry.num_rows, case.hq, inputs.geometry.num_blocks))
    maxima = tile_max(inputs, form)
    assert maxima.shape == (inputs.geometry.num_rows, case.hq, inputs.geometry.num_blocks) and maxima.dtype == F32
    for b in range(len(inputs)):
        q, k, _ = inputs.arrays(b)
        sizes = {"block_m": case.block_m, "block_n": case.block_n}
        want = oracle_skip.tile_max(q, k, form=form, **sizes, **inputs.oracle_maths)
        got = inputs.rows_of_sequence(maxima, b).astype(np.float64)
        blocks = want.shape[2]
        assert np.isneginf(got[:, :, blocks:]).all()
        met_first = np.isposinf(want)
        assert np.array_equal(np.isposinf(got[:, :, :blocks]), met_first)
        assert met_first.any() == (form == "relative" and any(t.visible for t in inputs.tiles(b)))
        pair = (np.where(met_first, 0.0, x) for x in (got[:, :, :blocks], want))
        assert_within(*pair, None, 3e-6, f"sequence {b}")
    assert torch.isneginf(inputs.unused_rows(maxima)).all()


# --- raw operators ----------------------------------------------------------------------------------------------------


def raw(**changes: Any) -> tuple[Any, ...]:
    inputs = Case(lengths=((50, 187), (50, 120)), layout=PAGED, hq=4, hkv=2).make()
    arguments: dict[str, Any] = {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "block_table": inputs.block_table,
        "seqlens_k": inputs.seqlens_k,
        "max_seqlen_q": 50,
        "max_seqlen_k": 187,
        "mask_words": None,
        "mask_counts": None,
        "block_m": 64,
        "block_n": 64,
        "causal": True,
        "softmax_scale": 0.25,
        "softcap": 0.0,
        "thresholds": torch.zeros(4, 2),
        "form": "absolute",
        "sink_blocks": 1,
        "window_blocks": 1,
        "counted": False,
    }
    assert set(changes) <= set(arguments)
    return tuple((arguments | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholds": torch.zeros(3, 2)},
        {"thresholds": torch.zeros(4, 0)},
        {"thresholds": torch.zeros(4)},
        {"thresholds": torch.zeros(4, 2, dtype=torch.float64)},
        {"thresholds": torch.zeros(2, 4).T},
        {"form": "none"},
        {"form": ""},
        {"sink_blocks": -1},
        {"window_blocks": 0},
        {"block_m": 0},
        {"block_n": 5000},
        {"mask_words": torch.zeros((1, 4, 1), dtype=torch.int32)},
        {"seqlens_k": int32([187, 188])},
        {"block_table": torch.full((2, 14), 99, dtype=torch.int32)},
    ],
    ids=str,
)
def test_raw_operators_raise_rather_than_crash(changes: dict[str, Any]) -> None:
    torch.ops.bsfa.skip_attention(*raw())
    arguments = raw(**changes)
    with pytest.raises(RuntimeError):
        torch.ops.bsfa.skip_attention(*arguments)
    with pytest.raises(RuntimeError):
        torch.ops.bsfa.skip_attention_out(torch.empty_like(arguments[0]), *arguments)


@pytest.mark.parametrize("out", [torch.empty(2, 50, 4, 31), torch.empty(2, 50, 4, 32, dtype=BF16)], ids=["D", "dtype"])
def test_raw_outputs_are_checked(out: Tensor) -> None:
    with pytest.raises(RuntimeError, match="out must have"):
        torch.ops.bsfa.skip_attention_out(out, *raw())


@pytest.mark.parametrize(("rows", "form"), [(1, "absolute"), (-1, "absolute"), (10, "max")])
def test_raw_tile_max_raises_rather_than_crash(rows: int, form: str) -> None:
    arguments = raw()
    with pytest.raises(RuntimeError):
        torch.ops.bsfa.tile_max(*arguments[:2], *arguments[3:9], rows, *arguments[11:16], form)
    torch.ops.bsfa.tile_max(*arguments[:2], *arguments[3:9], 10, *arguments[11:16], "relative")
