"""Mean correction against the oracle: what a mask drops enters the softmax through the means of its blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bsfa
from bsfa.policies import CumulativeMass, Dense, Fixed, RelativeMax, StaticPattern
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
    table,
)

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 150), (70, 0), (100, 30), (0, 0))
CHUNKS = ((50, 187), (50, 120), (50, 50), (50, 20))
BASE = Case(lengths=((141, 300),), hq=4, hkv=2, mask="mixed")

MASKS = table(
    BASE, mask=["mixed", "empty", "all", "diagonal", "sparse"], mask_heads=["q", "kv", "one"], causal=[True, False]
)
LENGTHS = [
    *table(
        BASE,
        lengths=[
            (pair,)
            for pair in (
                *((1, n) for n in (1, 63, 64, 65, 128, 129, 300)),
                *((n, n) for n in (1, 64, 65, 128, 200, 256)),
                *((63, 128), (64, 128), (65, 129), (50, 300), (20, 276), (100, 37), (130, 1), (0, 70), (70, 0), (0, 0)),
            )
        ],
        causal=[True, False],
    ),
]
LAYOUTS = [
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False], dtype=[F32, BF16, F16]),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), page_size=[1, 7, 64, 100], causal=[True, False]),
    *table(replace(BASE, lengths=((77, 177), (77, 177))), strides=["interleaved", "head-major", "gaps"]),
]
OPTIONS = [
    *table(BASE, softcap=[0.0, 0.5, 20.0], scale=[None, 0.0, -0.3, 1.5], causal=[True, False]),
    *table(BASE, block_m=[1, 16, 100, 600], block_n=[1, 7, 16, 64, 128]),
    *table(replace(BASE, lengths=((700, 1300),), hq=2, block_n=16), block_m=[64, 4096], causal=[True, False]),  # passes
    *table(replace(BASE, lengths=((90, 200),)), dim=[1, 7, 64, 128, 256], dtype=[F32, BF16, F16]),
    *table(replace(BASE, lengths=((90, 200),), dim=40), dim_v=[1, 24, 33]),
    *table(replace(BASE, lengths=((90, 200),)), hq=[1, 3, 6], hkv=[1]),
    # More blocks than one chunk of means holds, and than one word of the mask.
    *table(replace(BASE, lengths=((20, 3000),), block_n=16, block_m=16), mask=["mixed", "empty", "sparse"]),
]


def corrected(inputs: Inputs) -> tuple[list[np.ndarray], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(masks, means, (out, lse)) of a case, over memory for the results that holds NaN."""
    masks = [inputs.draw_mask(b) for b in range(len(inputs))]
    means, mask = inputs.means(), inputs.block_mask(masks)
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=inputs.case.dtype)
    poison(inputs.q.shape[:-1])
    return masks, means, inputs.attend(mask, means)


def check(case: Case) -> None:
    inputs = case.make()
    masks, means, (out, lse) = corrected(inputs)
    check_attention(inputs, out, lse, masks, means=means)


@pytest.mark.parametrize("case", MASKS, ids=str)
def test_masks(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: Case) -> None:
    check(case)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    layout = draw(st.sampled_from([BATCHED, PACKED, PAGED, PAGED_PACKED]))
    length = st.integers(0, 150)
    if layout in (PACKED, PAGED_PACKED):
        lengths = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
    else:
        seqlen_q, seqlen_k, batch = draw(length), draw(length), draw(st.integers(1, 3))
        lengths = [(seqlen_q, seqlen_k if layout == BATCHED else draw(length)) for _ in range(batch)]
    hkv = draw(st.integers(1, 3))
    return Case(
        lengths=tuple(lengths),
        layout=layout,
        page_size=draw(st.integers(1, 40)),
        hq=hkv * draw(st.integers(1, 4)),
        hkv=hkv,
        dim=draw(st.integers(1, 40)),
        dim_v=draw(st.one_of(st.none(), st.integers(1, 40))),
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        block_m=draw(st.integers(1, 130)),
        block_n=draw(st.integers(1, 80)),
        mask=draw(st.sampled_from(["mixed", "random", "sparse", "empty"])),
        mask_heads=draw(st.sampled_from(["q", "kv", "one"])),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=100)
@given(random_cases())
def test_anything(case: Case) -> None:
    check(case)


# --- what must agree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_exact_where_all_keys_of_a_block_are_alike(causal: bool, softcap: float) -> None:
    """Then every token of a dropped block has the mean key's logit, and its values add up to the mean."""
    inputs = replace(BASE, lengths=((141, 307),), block_m=32, block_n=32, causal=causal, softcap=softcap).make()
    for j in range(0, 307, 32):
        inputs.keys[0][j : j + 32] = inputs.keys[0][j].clone()
    inputs.lay_out()
    masks = [inputs.draw_mask(0)]
    for t, tile in enumerate(inputs.tiles(0)):
        if causal:  # what not all rows see whole is not corrected: keep it
            masks[0][t, :, (int(tile.rows[0]) + 307 - 141 + 1) // 32 : tile.visible] = True
    got = inputs.attend(inputs.block_mask(masks), inputs.means())
    for a, b in zip(got, inputs.attend(None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_smooth_inputs_come_closer_to_dense(layout: str) -> None:
    inputs = replace(BASE, lengths=((400, 900),), layout=layout, dtype=F32).make()
    ramp = torch.linspace(0, 6, 900)[:, None, None]
    phases = torch.rand(32, generator=torch.Generator().manual_seed(1)) * 6
    inputs.keys[0] = torch.sin(ramp + phases).expand(900, 2, 32) + 0.2 * inputs.keys[0]
    inputs.values[0] = torch.cos(ramp + phases).expand(900, 2, 32) + 0.2 * inputs.values[0]
    inputs.lay_out()
    policy = StaticPattern(sink_blocks=1, window_blocks=2, block_m=64, block_n=64)
    dense = inputs.run(None)
    errors = [(inputs.run(policy, mean_correction=on) - dense).abs().mean() for on in (False, True)]
    assert errors[1] < 0.3 * errors[0]


def test_same_bits_again_and_with_other_threads() -> None:
    for case in (BASE, replace(BASE, lengths=RAGGED, layout=PAGED_PACKED, dtype=BF16)):
        inputs = case.make()
        threads = torch.get_num_threads()
        first = corrected(inputs)[2]
        try:
            for count in (threads, 1, 3):
                torch.set_num_threads(count)
                assert all(torch.equal(a, b) for a, b in zip(first, corrected(inputs)[2], strict=True))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [PACKED, PAGED, PAGED_PACKED])
def test_layouts_have_the_same_bits(layout: str) -> None:
    case = replace(BASE, lengths=((141, 300), (141, 300)), dtype=BF16)
    plain, other = case.make(), replace(case, layout=layout, page_size=13, strides="gaps").make()
    want, got = corrected(plain)[2], corrected(other)[2]
    for b in range(2):
        assert torch.equal(other.of_sequence(got[0], b), want[0][b])
        assert torch.equal(other.lse_of_sequence(got[1], b), want[1][b])


def test_nothing_dropped_is_nothing_changed() -> None:
    inputs = replace(BASE, mask="all").make()
    mask = inputs.block_mask([inputs.draw_mask(0)])
    assert all(torch.equal(a, b) for a, b in zip(inputs.attend(mask, inputs.means()), inputs.attend(mask), strict=True))


def test_only_the_means_that_are_added_are_read() -> None:
    """Kept blocks and blocks that not every row sees: their means may hold anything."""
    inputs = replace(BASE, mask_heads="one").make()
    masks, (k_means, v_means), want = corrected(inputs)
    mask = inputs.block_mask(masks)
    for b in range(k_means.shape[1]):
        added = any(
            not masks[0][t, 0, b] and (b + 1) * 64 <= int(tile.rows[0]) + 300 - 141 + 1
            for t, tile in enumerate(inputs.tiles(0))
        )
        if not added:
            k_means[:, b] = v_means[:, b] = NAN
    assert k_means.isnan().any() and not k_means.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(inputs.attend(mask, (k_means, v_means)), want, strict=True))


# --- the functions with a policy --------------------------------------------------------------------------------------

POLICIES = [
    StaticPattern(sink_blocks=1, window_blocks=1, block_m=64, block_n=64),
    RelativeMax(alpha=1.0, sink_blocks=0, window_blocks=1, last_tiles=0, block_m=64, block_n=64),
    CumulativeMass(mass=0.3, block_m=64, block_n=64),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_policies(policy: bsfa.policies.Policy, layout: str) -> None:
    inputs = replace(BASE, lengths=((90, 500), (90, 500)), layout=layout, dtype=BF16).make()
    out, lse, info = inputs.run(policy, mean_correction=True, return_lse=True, return_info=True)
    assert info.mean_corrected and float(info.density()) < 1.0
    want, want_lse = inputs.attend(info.mask, inputs.means())
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    plain, plain_info = inputs.run(policy, return_info=True)
    assert not plain_info.mean_corrected and not torch.equal(plain, out)


def test_mask_of_other_blocks_than_the_policy_says() -> None:
    inputs = replace(BASE, block_n=32).make()
    masks, _, (want, _) = corrected(inputs)
    assert torch.equal(inputs.run(Fixed(mask=inputs.block_mask(masks)), mean_correction=True), want)


@pytest.mark.parametrize("policy", [None, Dense()])
def test_dense_calls_have_nothing_to_correct(policy: bsfa.policies.Policy | None) -> None:
    inputs = BASE.make()
    out, info = inputs.run(policy, mean_correction=True, return_info=True)
    assert not info.mean_corrected
    assert torch.equal(out, inputs.run(None))
    assert torch.equal(inputs.attend(None, inputs.means())[0], out)


def test_out_and_compile() -> None:
    inputs = BASE.make()
    want = inputs.run(POLICIES[1], mean_correction=True)
    out = torch.full_like(want, NAN)
    assert inputs.run(POLICIES[1], mean_correction=True, out=out) is out and torch.equal(out, want)
    torch.compiler.reset()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return bsfa.attention(q, k, v, policy=POLICIES[1], mean_correction=True)

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(inputs.q, inputs.k, inputs.v), want)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_mean_correction_is_checked() -> None:
    inputs = BASE.make()
    for policy in (None, POLICIES[0]):
        with pytest.raises(ValueError, match="window_left"):
            inputs.run(policy, mean_correction=True, window_left=10)
        with pytest.raises(TypeError, match="mean_correction"):
            inputs.run(policy, mean_correction=1)


def test_means_are_checked() -> None:
    inputs = BASE.make()
    k, v = inputs.means()
    mask = inputs.block_mask([inputs.draw_mask(0)])
    wrong: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "both", k, None),
        (ValueError, "both", None, v),
        (TypeError, "k_means", k.half(), v),
        (TypeError, "v_means", k, v.tolist()),
        (ValueError, "k_means", k[:, :-1], v),
        (ValueError, "v_means", k, v[..., :-1].contiguous()),
        (ValueError, "v_means", k, v[0]),
        (ValueError, "k_means", k.transpose(1, 2).contiguous().transpose(1, 2), v),
        (ValueError, "k_means", bsfa.pool_blocks(inputs.k, block_n=32), v),
        (ValueError, "k_means", k.to("meta"), v),
    ]
    for error, message, k_means, v_means in wrong:
        with pytest.raises(error, match=message):
            bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, mask, k_means=k_means, v_means=v_means)
    with pytest.raises(ValueError, match="window_left"):
        bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, mask, k_means=k, v_means=v, window_left=3)


def test_the_operator_refuses_means_without_a_mask_or_with_a_window() -> None:
    q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
    means = bsfa.pool_blocks(k, block_n=64), bsfa.pool_blocks(v, block_n=64)
    words = torch.zeros(2, 2, 1, dtype=torch.int32)
    where = (None, None, None, None, 100, 100)
    maths = (64, 64, True, 0.25, 0.0)
    attention = torch.ops.bsfa.attention
    assert attention(q, k, v, *where, words, None, *means, *maths, -1)[0].isfinite().all()
    for arguments in (
        (*where, None, None, *means, *maths, -1),
        (*where, words, None, *means, *maths, 5),
        (*where, words, None, means[0], None, *maths, -1),
        (*where, words, None, means[0][:, :1], means[1], *maths, -1),
    ):
        with pytest.raises(RuntimeError):
            attention(q, k, v, *arguments)
    torch.library.opcheck(attention.default, (q, k, v, *where, words, None, *means, *maths, -1))
