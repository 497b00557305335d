"""Dense, windowed and block-sparse attention against the oracle; and bits, odd values, memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from cases import (
    BATCHED,
    BF16,
    F16,
    F32,
    NAN,
    PACKED,
    PAGED,
    PAGED_PACKED,
    Case,
    Inputs,
    check_attention,
    poison,
    square,
    table,
)

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 150), (0, 0))  # packed only
CHUNKS = ((50, 187), (50, 120), (50, 50))  # one query length, so that queries can be batched

EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80, 81, 95, 96, 97, 111, 112, 113, 127, 128, 129)
PREFIXES = ((1, 64), (1, 65), (5, 64), (63, 129), (64, 128), (100, 137), (127, 300), (128, 256), (33, 257))
NOTHING_SEEN = ((100, 37), (130, 1), (70, 0), (0, 70), (0, 0), (65, 64), (300, 129))

LENGTHS = [
    *table(Case(), lengths=square(*EDGES, 191, 192, 193, 255, 256, 257, 300)),
    *table(Case(), lengths=[(pair,) for pair in PREFIXES + NOTHING_SEEN], causal=[True, False]),
]
LAYOUTS = [
    *table(Case(hq=4, hkv=2), lengths=[RAGGED], layout=[PACKED, PAGED_PACKED], causal=[True, False]),
    *table(Case(hq=4, hkv=2, lengths=((77, 77), (77, 77))), strides=["plain", "interleaved", "head-major", "gaps"]),
    *table(
        Case(hq=4, hkv=2, lengths=RAGGED),
        strides=["interleaved", "head-major", "gaps"],
        layout=[PACKED, PAGED_PACKED],
        dtype=[F32, BF16],
    ),
]
PAGES = [
    *table(Case(lengths=CHUNKS, layout=PAGED), page_size=[*range(1, 21), 32, 63, 64, 65, 128, 256]),
    *table(Case(lengths=RAGGED, layout=PAGED_PACKED, strides="interleaved"), page_size=[1, 7, 16, 64, 100, 256]),
    *table(Case(lengths=CHUNKS, layout=PAGED, dtype=BF16, mask="random"), page_size=[1, 5, 16, 64, 128]),
]
HEADS = [
    *table(Case(lengths=((70, 83),)), hq=range(1, 9)),
    *(Case(lengths=((70, 83),), hq=g * hkv, hkv=hkv, mask="random") for g in range(1, 9) for hkv in (2, 3)),
    Case(lengths=((70, 83),), hq=17, hkv=1, mask="random"),
    Case(lengths=((70, 83),), hq=40, hkv=8, dim=16),
]
DIMS = table(
    Case(lengths=((67, 131),), hq=4, hkv=2), dim=[1, 2, 3, 7, 8, 40, 64, 80, 96, 128, 255, 256], dtype=[F32, BF16, F16]
)
DIMS_V = [
    *(
        Case(lengths=((67, 131),), dim=192, dim_v=128, dtype=dtype, layout=lo)
        for dtype in (F32, BF16)
        for lo in (BATCHED, PAGED)
    ),
    *(Case(lengths=((67, 131),), dim=dim, dim_v=dim_v) for dim, dim_v in ((1, 256), (256, 1), (64, 5), (8, 40))),
    Case(lengths=RAGGED, layout=PAGED_PACKED, dim=192, dim_v=128, page_size=7),
]
OPTIONS = [
    *table(
        Case(lengths=((90, 200),), hq=4, hkv=2), softcap=[0.5, 5.0, 50.0], scale=[None, 1.5], mask=["none", "random"]
    ),
    *table(Case(lengths=((90, 200),)), scale=[0.0, 1.0, -0.3, 4.0]),
    *table(Case(lengths=((90, 200), (90, 70))[:1]), window_left=[0, 1, 15, 63, 64, 65, 130, 10**6, 2**31 - 1]),
    *table(Case(lengths=RAGGED, layout=PACKED), window_left=[0, 20, 64], mask=["none", "random"], softcap=[0.0, 8.0]),
    *table(Case(lengths=((90, 200),), dtype=BF16), softcap=[0.0, 5.0], window_left=[None, 33], mask=["none", "random"]),
]
MASKS = [
    *table(
        Case(lengths=((150, 300),), hq=4, hkv=2),
        mask=["random", "sparse", "all", "diagonal"],
        mask_heads=["q", "kv", "one"],
        causal=[True, False],
    ),
    *table(
        Case(lengths=((141, 300),), hq=4, hkv=2, mask="random"),
        block_m=[16, 32, 64, 128],
        block_n=[16, 32, 64, 128],
    ),
    *table(Case(lengths=((141, 300),), mask="random"), block_m=[1, 5, 100, 4096], block_n=[1, 7, 100, 4096]),
    *table(Case(lengths=((20, 1200),), mask="sparse", block_m=16), block_n=[16, 17]),  # several words a row
    *table(
        Case(lengths=RAGGED, hq=4, hkv=2, block_m=32, block_n=16),
        layout=[PACKED, PAGED_PACKED],
        mask=["random", "sparse", "all", "diagonal"],
        mask_heads=["q", "kv", "one"],
    ),
    *table(Case(lengths=CHUNKS, hq=4, hkv=2, layout=PAGED), mask=["sparse", "all"], dtype=[F32, BF16, F16]),
    *table(Case(mask="random"), lengths=[(pair,) for pair in PREFIXES + NOTHING_SEEN], causal=[True, False]),
]


def check(case: Case) -> None:
    inputs = case.make()
    masks = None if case.mask == "none" else [inputs.draw_mask(b) for b in range(len(inputs))]
    mask = None if masks is None else inputs.block_mask(masks)
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=case.dtype)
    poison(inputs.q.shape[:-1])
    out, lse = inputs.attend(mask)
    check_attention(inputs, out, lse, masks)


@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", PAGES, ids=str)
def test_pages(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", DIMS + DIMS_V, ids=str)
def test_head_dims(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", MASKS, ids=str)
def test_masks(case: Case) -> None:
    check(case)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    layout = draw(st.sampled_from([BATCHED, PACKED, PAGED, PAGED_PACKED]))
    length = st.integers(0, 150)
    if layout in (PACKED, PAGED_PACKED):
        lengths = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
    else:
        seqlen_q, batch = draw(length), draw(st.integers(1, 3))
        seqlens_k = [draw(length)] * batch if layout == BATCHED else [draw(length) for _ in range(batch)]
        lengths = [(seqlen_q, n) for n in seqlens_k]
    hkv = draw(st.integers(1, 3))
    causal = draw(st.booleans())
    return Case(
        lengths=tuple(lengths),
        layout=layout,
        page_size=draw(st.integers(1, 40)),
        strides=draw(st.sampled_from(["plain", "interleaved", "head-major", "gaps"])),
        hq=hkv * draw(st.integers(1, 8)),
        hkv=hkv,
        dim=draw(st.integers(1, 70)),
        dim_v=draw(st.one_of(st.none(), st.integers(1, 70))),
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        causal=causal,
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        window_left=draw(st.one_of(st.none(), st.integers(0, 100))) if causal else None,
        block_m=draw(st.integers(1, 130)),
        block_n=draw(st.integers(1, 130)),
        mask=draw(st.sampled_from(["none", "random", "sparse"])),
        mask_heads=draw(st.sampled_from(["q", "kv", "one"])),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=150)
@given(random_cases())
def test_anything(case: Case) -> None:
    check(case)


# --- what must agree --------------------------------------------------------------------------------------------------

SAMPLE = [
    Case(lengths=((141, 300),), hq=4, hkv=2),
    Case(lengths=((141, 300),), hq=4, hkv=2, mask="random", dtype=BF16),
    Case(lengths=RAGGED, hq=4, hkv=2, layout=PACKED, mask="random", mask_heads="one", block_m=32, block_n=16),
    Case(lengths=CHUNKS, hq=6, hkv=2, layout=PAGED, mask="sparse", page_size=7, dtype=F16),
    Case(lengths=((141, 300),), window_left=40, softcap=4.0),
]


def run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    case = inputs.case
    masks = [inputs.draw_mask(b) for b in range(len(inputs))]
    return inputs.attend(None if case.mask == "none" else inputs.block_mask(masks))


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_same_bits_again_and_with_other_threads(case: Case) -> None:
    inputs = case.make()
    threads = torch.get_num_threads()
    first = run(inputs)
    try:
        for count in (threads, 1, 2, 3, 2):
            torch.set_num_threads(count)
            poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=case.dtype)
            for a, b in zip(first, run(inputs), strict=True):
                assert torch.equal(a, b), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("strides", ["plain", "interleaved", "head-major", "gaps"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_have_the_same_bits(layout: str, strides: str, dtype: torch.dtype) -> None:
    case = Case(lengths=((141, 300), (141, 300)), hq=4, hkv=2, dtype=dtype, mask="random")
    plain, other = case.make(), replace(case, layout=layout, strides=strides, page_size=13).make()
    masks = [plain.draw_mask(b) for b in range(2)]
    want, want_lse = plain.attend(plain.block_mask(masks))
    out, lse = other.attend(other.block_mask(masks))
    for b in range(2):
        assert torch.equal(other.of_sequence(out, b), want[b])
        assert torch.equal(other.lse_of_sequence(lse, b), want_lse[b])


@pytest.mark.parametrize("case", [c for c in MASKS if c.mask == "all"], ids=str)
def test_keeping_all_blocks_is_dense(case: Case) -> None:
    inputs = case.make()
    kept = inputs.block_mask([inputs.draw_mask(b) for b in range(len(inputs))])
    assert float(kept.density()) == 1.0
    for a, b in zip(inputs.attend(kept), inputs.attend(None), strict=True):
        tolerance = 1e-5 if case.dtype == F32 else 1e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_low_precision_is_one_rounding_away_from_float32(dtype: torch.dtype) -> None:
    low = Case(lengths=((141, 300),), hq=4, hkv=2, dtype=dtype).make()
    high = Case(lengths=((141, 300),), hq=4, hkv=2).make()
    high.queries, high.keys, high.values = ([t.float() for t in x] for x in (low.queries, low.keys, low.values))
    high.lay_out()
    want, got = high.attend(None)[0], low.attend(None)[0].float()
    ulp = 2.0 ** (-8 if dtype == BF16 else -11)
    assert ((got - want).abs() <= 1.01 * ulp * want.abs() + 1e-6).all()


def test_rows_with_every_block_masked_are_zero() -> None:
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2).make()
    first, second = (np.zeros_like(inputs.draw_mask(0)) for _ in range(2))
    first[:, :, 0::2] = True
    second[:, :, 1::2] = True
    mask = inputs.block_mask([first]) & inputs.block_mask([second])
    assert int(mask.counts.sum()) == 0
    poison(tuple(inputs.q.shape))
    out, lse = inputs.attend(mask)
    assert (out == 0).all() and torch.isneginf(lse).all()


# --- values that are not finite, or extreme ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("which", ["queries", "keys", "values"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_non_finite_inputs_reach_exactly_the_rows_that_see_them(
    dtype: torch.dtype, mask: str, which: str, value: float
) -> None:
    case = Case(lengths=((100, 200),), hq=4, hkv=2, dtype=dtype, mask=mask)
    inputs = case.make()
    masks = [inputs.draw_mask(0)]
    clean, clean_lse = inputs.attend(None if mask == "none" else inputs.block_mask(masks))
    token = 70 if which == "queries" else 150  # hidden from the rows before 50, some of them in its own tile
    getattr(inputs, which)[0][token, 0, 3] = value
    inputs.lay_out()
    out, lse = inputs.attend(None if mask == "none" else inputs.block_mask(masks))
    touched = torch.zeros(4, 100, dtype=torch.bool)
    if which == "queries":
        touched[0, 70] = True
        if mask != "none":  # a row without blocks stays empty, whatever its query holds
            touched[0, 70] = bool(inputs.draw_mask(0)[1, 0].any())
    else:
        seen = oracle.visible_tokens(100, 200, True)[None]
        if mask != "none":
            seen = seen & oracle.kept_tokens(masks[0], 100, 200, 64, 64, True)
        touched[:2] = torch.from_numpy(np.broadcast_to(seen, (4, 100, 200))[:2, :, token].copy())
    rows = touched[None]
    out = out.transpose(1, 2).float()  # [B, Hq, Sq, D]
    clean = clean.transpose(1, 2).float()
    # Not bitwise: tiles with such values take a path of their own, which some compilers round differently.
    torch.testing.assert_close(out[~rows], clean[~rows], rtol={F32: 1e-5, BF16: 2**-7, F16: 2**-10}[dtype], atol=1e-6)
    torch.testing.assert_close(lse[~rows], clean_lse[~rows], rtol=1e-6, atol=1e-6)
    if which == "values":
        assert (out[rows][:, 3].isnan() if np.isnan(value) else out[rows][:, 3] == value).all()
        others = [d for d in range(32) if d != 3]
        torch.testing.assert_close(out[rows][:, others], clean[rows][:, others], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(lse[rows], clean_lse[rows])
    elif np.isnan(value):
        assert out[rows].isnan().all() and lse[rows].isnan().all()


def test_logits_of_minus_infinity_weigh_nothing() -> None:
    inputs = Case(lengths=((70, 70),), hq=1).make()
    inputs.queries[0].abs_()
    inputs.keys[0][40] = float("-inf")
    inputs.lay_out()
    out, lse = inputs.attend(None)
    for keys, values in ((inputs.keys, inputs.values),):
        keys[0][40], values[0][40] = 0.0, 0.0
    q, k, v = (x.astype(np.float64) for x in inputs.arrays(0))
    s = oracle.logits(q, k, inputs.case.softmax_scale)
    seen = oracle.visible_tokens(70, 70, True)
    seen[:, 40] = False
    s = np.where(seen, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out[0].numpy(), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[0].numpy(), np.log(np.exp(s).sum(-1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 30.0, 1e4])
@pytest.mark.parametrize("mask", ["none", "random"])
def test_logits_of_any_magnitude(magnitude: float, mask: str) -> None:
    """Large logits: the softmax is a maximum. Sums must neither overflow nor vanish."""
    case = Case(lengths=((100, 200),), hq=4, hkv=2, mask=mask)
    inputs = case.make()
    inputs.queries = [(q * magnitude) for q in inputs.queries]
    inputs.lay_out()
    masks = None if mask == "none" else [inputs.draw_mask(0)]
    out, lse = inputs.attend(None if masks is None else inputs.block_mask(masks))
    check_attention(inputs, out, lse, masks)


def test_growing_and_shrinking_maxima() -> None:
    """The running maximum rises in every block for one head, and never again after the first key for the other."""
    inputs = Case(lengths=((300, 300),), hq=2, hkv=2, block_n=16, mask="all").make()
    ramp = torch.linspace(-40, 40, 300)[:, None]
    inputs.queries[0][:] = 1.0
    inputs.keys[0][:, 0] = ramp / 32
    inputs.keys[0][:, 1] = -ramp / 32
    inputs.queries[0] *= 32**0.5
    inputs.lay_out()
    masks = [inputs.draw_mask(0)]
    check_attention(inputs, *inputs.attend(inputs.block_mask(masks)), masks)
    check_attention(inputs, *inputs.attend(None))


# --- size -------------------------------------------------------------------------------------------------------------

LONG_PROMPT = """
import resource, time, torch, bsfa
g = torch.Generator().manual_seed(0)
blocks = 4 * torch.randn(1, 256, 1, 1, 32, generator=g)
q, k, v = (torch.randn(1, 256, 128, h, 32, generator=g) for h in (2, 1, 1))
q, k, v = ((x + m * blocks).flatten(1, 2).to(torch.bfloat16) for x, m in ((q, 1), (k, 1), (v, 0)))
bsfa.attention(q[:, :256], k[:, :256], v[:, :256], policy=bsfa.policies.{policy})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
out, info = bsfa.attention(q, k, v, policy=bsfa.policies.{policy}, return_info=True)
seconds = time.perf_counter() - start
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
inputs = sum(t.numel() * t.element_size() for t in (q, k, v))
print(grown / inputs, seconds, float(info.density()), bool(out.isfinite().all()))
"""


@pytest.mark.parametrize("policy", ["StaticPattern()", "RelativeMax(alpha=0.1)", "CumulativeMass(mass=0.9)"])
def test_memory_and_time_of_a_long_prompt(policy: str) -> None:
    """32K tokens, 2 heads: a float32 matrix of all logits would be 8 GiB, 1000 times the inputs."""
    code = LONG_PROMPT.replace("{policy}", policy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, seconds, density, finite = done.stdout.split()
    assert finite == "True"
    assert float(density) < 0.2
    assert float(grown) < 6, f"peak memory grew by {grown} times the inputs"
    assert float(seconds) < 60
