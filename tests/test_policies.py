"""Policies end to end: what they keep, what attention makes of it, and when a call is dense instead."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import bsfa
import oracle
from bsfa.policies import (
    SCORED,
    Antidiagonal,
    CumulativeMass,
    Dense,
    Fixed,
    Policy,
    RelativeMax,
    ScoredPolicy,
    StaticPattern,
)
from cases import BATCHED, BF16, F16, PACKED, PAGED, PAGED_PACKED, Case, check_attention, table

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 150), (0, 0))
CHUNKS = ((50, 187), (50, 120), (50, 50))

LAYOUTS = [
    *table(Case(hq=4, hkv=2, block_m=32, block_n=16), lengths=[((150, 300),) * 2], dtype=[torch.float32, BF16, F16]),
    *table(Case(hq=4, hkv=2, block_m=32, block_n=16, lengths=RAGGED), layout=[PACKED, PAGED_PACKED]),
    Case(hq=4, hkv=2, block_m=16, block_n=32, lengths=CHUNKS, layout=PAGED, page_size=7, strides="interleaved"),
    Case(hq=4, hkv=2, block_m=32, block_n=16, lengths=((150, 300),), causal=False),
    Case(hq=4, hkv=2, block_m=32, block_n=16, lengths=((150, 300),), softcap=3.0, scale=0.4),
    Case(hq=4, hkv=2, block_m=32, block_n=16, lengths=((100, 37),)),
    Case(hq=4, hkv=1, block_m=128, block_n=128, lengths=((300, 300),), dim=192, dim_v=128),
]


def policies(block_m: int, block_n: int) -> list[Policy]:
    sizes = {"block_m": block_m, "block_n": block_n}
    return [
        StaticPattern(sink_blocks=1, window_blocks=2, **sizes),
        RelativeMax(alpha=0.7, **sizes),
        RelativeMax(alpha=[0.5, 0.0, 1.0, 0.9], last_tiles=0, window_blocks=1, **sizes),
        CumulativeMass(mass=0.6, **sizes),
        CumulativeMass(mass=torch.tensor([0.2, 0.5, 0.9, 1.0]), sink_blocks=0, window_blocks=1, **sizes),
        RelativeMax(alpha=0.8, shared=True, **sizes),
        CumulativeMass(mass=0.4, pooling="center", shared=True, keep_ratio=0.2, **sizes),
        Antidiagonal(mass=[0.4, 0.6, 0.8, 0.5], stride=8, **sizes),
    ]


# --- attention with a policy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_attention_is_exact_over_the_blocks_that_the_policy_keeps(case: Case, which: int) -> None:
    inputs = case.make()
    policy = policies(case.block_m, case.block_n)[which]
    out, lse, info = inputs.run(policy, return_lse=True, return_info=True)
    assert info.policy is policy and info.dense_reason is None
    rows = info.mask.to_rows()
    masks = []
    for b, (_, seqlen_k) in enumerate(case.lengths):
        masks.append(inputs.rows_of_sequence(rows, b)[:, :, : oracle.num_blocks(seqlen_k, case.block_n)])
    check_attention(inputs, out, lse, masks)
    assert torch.equal(info.density(), info.mask.density())
    assert torch.equal(inputs.run(policy), out)
    again = inputs.run(policy, return_lse=True)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)

    # The same by the three stages.
    summary = None
    if policy.needs_summary:
        pooling = policy.summary_pooling
        summary = bsfa.pool_blocks(inputs.k, block_n=case.block_n, pooling=pooling, **inputs.layout_k)
    keys = {"k": inputs.k, "block_table": inputs.block_table} if policy.needs_keys else {}
    mask = bsfa.select_blocks(inputs.q, summary, policy, **keys, **inputs.maths, **inputs.layout_select)
    assert torch.equal(mask.words, info.mask.words) and torch.equal(mask.counts, info.mask.counts)
    assert torch.equal(inputs.attend(mask)[0], out)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
@pytest.mark.parametrize("policy", [None, Dense()], ids=["none", "dense"])
def test_no_policy_and_dense_are_exact(case: Case, policy: Policy | None) -> None:
    inputs = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse, info = inputs.run(policy, return_lse=True, return_info=True)
    check_attention(inputs, out, lse)
    assert info.mask is None and info.dense_reason is None and float(info.density()) == 1.0
    assert torch.equal(out, inputs.attend(None)[0])


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_layouts_give_the_same_mask(layout: str) -> None:
    case = Case(lengths=((150, 300), (150, 300)), hq=4, hkv=2, block_m=32, block_n=16, dtype=BF16)
    for policy in policies(32, 16):
        want = case.make().run(policy, return_info=True)[1].mask
        other = replace(case, layout=layout, strides="gaps", page_size=13).make()
        got = other.run(policy, return_info=True)[1].mask
        used = want.words.shape[0]
        assert torch.equal(got.words[:used], want.words) and not got.words[used:].any()


def test_paged_capacity_as_default_max_seqlen() -> None:
    """Without max_seqlen_k the mask is as wide as the block table; the output is the same."""
    inputs = Case(lengths=CHUNKS, layout=PAGED, hq=4, hkv=2, block_m=32, block_n=16).make()
    for policy in policies(32, 16):
        want = inputs.run(policy)
        got = bsfa.attention_paged(inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seqlens_k, policy=policy)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# --- StaticPattern ----------------------------------------------------------------------------------------------------

PATTERNS = [
    *table(Case(hq=1, dim=1), lengths=[((n, n),) for n in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 400)]),
    *table(
        Case(hq=1, dim=1),
        lengths=[((1, 65),), ((63, 129),), ((100, 37),), ((70, 0),), ((0, 70),), ((50, 400),)],
        causal=[True, False],
    ),
    *table(
        Case(hq=1, dim=1, lengths=((141, 300),)), block_m=[1, 16, 32, 64, 128, 600], block_n=[1, 16, 32, 64, 128, 600]
    ),
    *table(Case(hq=1, dim=1, lengths=((141, 300),), causal=False), block_m=[16, 64], block_n=[16, 64]),
    *table(
        Case(hq=1, dim=1, lengths=RAGGED, block_m=16, block_n=16), layout=[PACKED, PAGED_PACKED], causal=[True, False]
    ),
]


@pytest.mark.parametrize(("sink", "window"), [(0, 1), (2, 4), (1, 1), (0, 3), (1000, 1), (0, 1000)])
@pytest.mark.parametrize("case", PATTERNS, ids=str)
def test_static_pattern(case: Case, sink: int, window: int) -> None:
    inputs = case.make()
    policy = StaticPattern(sink_blocks=sink, window_blocks=window, block_m=case.block_m, block_n=case.block_n)
    mask = bsfa.select_blocks(inputs.q, None, policy, causal=case.causal, **inputs.layout_select)
    assert mask.num_heads == 1
    rows = mask.to_rows()
    for b, lengths in enumerate(case.lengths):
        got = inputs.rows_of_sequence(rows, b)
        for t, tile in enumerate(inputs.tiles(b)):
            sizes = {"block_m": case.block_m, "block_n": case.block_n, "causal": case.causal}
            want = oracle.always_kept(tile, *lengths, **sizes, sink=sink, window=window)
            assert got[t, 0, : tile.visible].tolist() == want.tolist()
            assert not got[t, :, tile.visible :].any()
    assert not inputs.unused_rows(rows).any()


# --- Fixed ------------------------------------------------------------------------------------------------------------


def test_fixed_is_its_mask() -> None:
    case = Case(lengths=((150, 300),), hq=4, hkv=2, block_m=32, block_n=16, mask="random")
    inputs = case.make()
    masks = [inputs.draw_mask(0)]
    policy = Fixed(mask=inputs.block_mask(masks))
    assert (policy.block_m, policy.block_n) == (32, 16)
    out, lse, info = inputs.run(policy, return_lse=True, return_info=True)
    assert info.mask is policy.mask
    check_attention(inputs, out, lse, masks)
    with pytest.raises(ValueError, match="does not fit"):
        replace(case, lengths=((151, 300),)).make().run(policy)
    with pytest.raises(ValueError, match="does not fit"):
        replace(case, causal=False).make().run(policy)


@pytest.mark.parametrize("hq", [3, 5, 6])
def test_a_fixed_mask_of_other_heads_is_refused(hq: int) -> None:
    case = Case(lengths=((150, 300),), hq=4, hkv=1, mask="random")
    inputs = case.make()
    policy = Fixed(mask=inputs.block_mask([inputs.draw_mask(0)]))
    with pytest.raises(ValueError, match="heads"):
        replace(case, hq=hq).make().run(policy)


# --- thresholds -------------------------------------------------------------------------------------------------------


# Also numbers that float32, which the kernels compare, rounds to 0 and to 1, and their neighbours that it does not.
@pytest.mark.parametrize("x", [0.5, 0.0, 1.0, 2.0**-150, 2.0**-149, 1.0 - 2.0**-25, 1.0 - 2.0**-24])
@pytest.mark.parametrize("kind", SCORED.values())
def test_scalar_sequence_and_tensor_thresholds_agree(kind: type[ScoredPolicy], x: float) -> None:
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, block_m=32, block_n=16).make()
    masks = []
    heads = kind(**{kind.threshold_name: x}).thresholds_for(4, torch.device("cpu"))
    one = kind(**{kind.threshold_name: x}).one_threshold()
    assert one is not None and torch.equal(heads, torch.full((4,), one))
    for value in (x, [x] * 4, (x,) * 4, torch.full((4,), x), torch.full((4,), x, dtype=torch.float64)):
        policy = kind(**{kind.threshold_name: value}, block_m=32, block_n=16)
        masks.append(inputs.run(policy, return_info=True)[1].mask.words)
    assert all(torch.equal(masks[0], other) for other in masks[1:])


@pytest.mark.parametrize("kind", SCORED.values())
def test_looser_thresholds_keep_more(kind: type[ScoredPolicy]) -> None:
    inputs = Case(lengths=((300, 600),), hq=4, hkv=2, block_m=32, block_n=16, scale=0.4).make()
    values = [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.99, 1.0]
    last = None
    for value in values if not kind.keeps_at_least else reversed(values):
        policy = kind(block_m=32, block_n=16, sink_blocks=0, window_blocks=1, last_tiles=0).with_threshold(value)
        assert policy.threshold == value and type(policy) is kind and policy.window_blocks == 1
        mask = inputs.run(policy, return_info=True)[1].mask
        if last is not None:
            assert torch.equal(mask.words & last.words, last.words)
            assert (mask.counts >= last.counts).all()
        last = mask
    assert last is not None and float(last.density()) == 1.0 and value == policy.keep_all_threshold()


def test_policies_are_frozen_and_have_the_published_defaults() -> None:
    assert dataclasses.asdict(RelativeMax()) == {
        "block_m": 128,
        "block_n": 128,
        "alpha": 0.1,
        "sink_blocks": 2,
        "window_blocks": 4,
        "last_tiles": 2,
        "min_blocks": 0,
        "shared": False,
    }
    bfla = CumulativeMass()
    assert (bfla.pooling, bfla.original_scale, bfla.probability, bfla.keep_ratio, bfla.shared) == (
        "mean",
        False,
        None,
        0.0,
        False,
    )
    assert (bfla.rescue_stride, bfla.rescue_probability, bfla.rescue_seed) == (0, 0.0, 1)
    x = Antidiagonal()
    assert (x.stride, x.mass, x.sink_blocks, x.window_blocks, x.last_tiles) == (16, 0.9, 1, 1, 0)
    assert (x.needs_summary, x.needs_keys) == (False, True)
    assert (bfla.needs_summary, bfla.needs_keys, bfla.summary_pooling) == (True, False, "mean")
    flat = CumulativeMass(pooling="flat64")
    assert (flat.needs_summary, flat.needs_keys, flat.scale_factor) == (False, True, 1.0)
    assert CumulativeMass(pooling="flat64", original_scale=True).scale_factor == 64.0
    assert CumulativeMass(pooling="center").summary_pooling == "center"
    assert (CumulativeMass().mass, CumulativeMass().sink_blocks, CumulativeMass().window_blocks) == (0.95, 1, 2)
    assert (StaticPattern().sink_blocks, StaticPattern().window_blocks) == (2, 4)
    assert {name: kind.name for name, kind in SCORED.items()} == {name: name for name in SCORED}
    with pytest.raises(dataclasses.FrozenInstanceError):
        RelativeMax().alpha = 0.5  # type: ignore[misc]


# --- dense for a named reason -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*policies(128, 128)[:2], CumulativeMass()], ids=lambda p: p.name)
def test_a_decode_step_is_dense_and_says_so(policy: Policy) -> None:
    inputs = Case(lengths=((1, 300), (1, 300)), hq=4, hkv=2).make()
    with pytest.warns(bsfa.DenseFallbackWarning, match="decode"):
        out, lse, info = inputs.run(policy, return_lse=True, return_info=True)
    check_attention(inputs, out, lse)
    assert info.mask is None and "decode" in info.dense_reason and float(info.density()) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per reason
        inputs.run(policy)


def test_a_token_window_is_dense_and_says_so() -> None:
    inputs = Case(lengths=((100, 300),), hq=4, hkv=2, window_left=40).make()
    with pytest.warns(bsfa.DenseFallbackWarning, match="window_left"):
        out, lse, info = inputs.run(RelativeMax(), return_lse=True, return_info=True)
    check_attention(inputs, out, lse)
    assert info.mask is None and "window_left" in info.dense_reason


@pytest.mark.parametrize("policy", [None, Dense()], ids=["none", "dense"])
@pytest.mark.parametrize("case", [Case(lengths=((1, 300),)), Case(lengths=((100, 300),), window_left=40)], ids=str)
def test_nobody_is_warned_who_asked_for_dense(case: Case, policy: Policy | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = case.make().run(policy, return_info=True)
    assert info.dense_reason is None


def test_a_mixed_batch_with_decode_rows_is_sparse() -> None:
    """One decode row among prefill rows does not make the call dense."""
    inputs = Case(lengths=((1, 300), (200, 300)), hq=4, hkv=2, layout=PACKED, block_m=32, block_n=16).make()
    _, info = inputs.run(RelativeMax(alpha=0.9, block_m=32, block_n=16), return_info=True)
    assert info.mask is not None and float(info.density()) < 1.0


@pytest.mark.parametrize("causal", [True, False])
def test_every_row_that_can_see_keeps_something(causal: bool) -> None:
    """The strictest thresholds leave the diagonal, so no query that has keys ends with nothing."""
    case = Case(hq=4, hkv=2, block_m=32, block_n=16, causal=causal)
    for lengths in (((150, 300),), ((100, 37),), ((1, 1),), ((40, 300),)):
        inputs = replace(case, lengths=lengths).make()
        sizes = {"block_m": 32, "block_n": 16}
        bare = {"sink_blocks": 0, "window_blocks": 1, **sizes}
        for policy in (
            RelativeMax(alpha=1.0, last_tiles=0, **bare),
            CumulativeMass(mass=0.0, **bare),
            RelativeMax(alpha=1.0, last_tiles=0, shared=True, **bare),
            Antidiagonal(mass=0.0, **bare),
            StaticPattern(**bare),
        ):
            _, lse, info = inputs.run(policy, return_lse=True, return_info=True)
            sees = oracle.visible_tokens(*lengths[0], causal).any(axis=1)
            assert np.array_equal(torch.isfinite(lse[0]).numpy(), np.broadcast_to(sees, (4, len(sees))))
            assert (info.mask.counts[info.mask.geometry.visible_blocks() > 0] > 0).all()
