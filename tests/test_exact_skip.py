"""ExactSkip through the public functions, against the oracle that decides group by group."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
import oracle
import oracle_skip
import tiny_model
from bsfa import evaluation
from bsfa.integrations import transformers as hf
from bsfa.policies import (
    CumulativeMass,
    ExactSkip,
    Fixed,
    FlexPrefill,
    PerLayer,
    Policy,
    RelativeMax,
    StaticPattern,
    Union,
)
from bsfa.policies.composed import on_device
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, Inputs, check_rows, table
from skip_cases import check_skipping, columns, make, masks_of, policy_for, run_oracle

SIZES = {"block_m": 128, "block_n": 32}
BASE = Case(lengths=((150, 300), (150, 300)), hq=4, hkv=2, dim=16, **SIZES)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (70, 0), (37, 250), (129, 257), (100, 30))
FORMS = ("absolute", "relative")
LAYOUTS = [
    *table(BASE, layout=[BATCHED, PACKED, PAGED, PAGED_PACKED]),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], dtype=[F32, BF16]),
]
CASES = [
    *LAYOUTS,
    *table(BASE, causal=[False], dtype=[F32, F16]),
    *table(replace(BASE, lengths=((200, 330),)), block_m=[32, 64, 96, 192], block_n=[64]),
    *table(replace(BASE, lengths=((150, 300),)), softcap=[0.0, 2.0], scale=[-0.3, 1.0]),
    replace(BASE, dim_v=40, strides="gaps"),
]


def skipping(inputs: Inputs, policy: ExactSkip, **options: Any) -> tuple[Tensor, Tensor, bsfa.AttentionInfo]:
    return inputs.run(policy, return_lse=True, return_info=True, **options)


def masks_from(inputs: Inputs, mask: bsfa.BlockMask) -> list[np.ndarray]:
    """Per sequence, as the oracle takes them."""
    rows, n = mask.to_rows(), inputs.case.block_n
    return [inputs.rows_of_sequence(rows, b)[:, :, : -(-keys // n)] for b, (_, keys) in enumerate(inputs.case.lengths)]


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_skips_as_the_rule_says(case: Case, form: str, counted: bool) -> None:
    inputs = make(case)
    policy = policy_for(inputs, None, form, counted=counted)
    out, lse, info = skipping(inputs, policy)
    counts = check_skipping(inputs, out, lse, info.skips, policy)
    assert counts[:, 1].sum() > 0 and info.mask is None and info.dense_reason is None and info.policy is policy
    share = torch.from_numpy(counts[:, 1] / counts[:, 0]).float()
    torch.testing.assert_close(info.skipped(), share)
    torch.testing.assert_close(info.density(per_head=True), 1 - share)
    torch.testing.assert_close(info.density(), (1 - share).mean())

    again = skipping(inputs, policy)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse) and torch.equal(again[2].skips, info.skips)
    arguments = {"skip": policy, "return_skips": True, **inputs.maths, **inputs.layout}
    staged = bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, None, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(staged, (out, lse, info.skips), strict=True))
    del arguments["return_skips"]
    assert len(bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, None, **arguments)) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_heads", ["q", "kv", "one"])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_on_a_mask(layout: str, mask_heads: str, form: str) -> None:
    inputs = make(replace(BASE, layout=layout, mask="random", mask_heads=mask_heads))
    masks = masks_of(inputs)
    assert masks is not None
    policy = policy_for(inputs, masks, form)
    mask = inputs.block_mask(masks)
    arguments = {"skip": policy, "return_skips": True, **inputs.maths, **inputs.layout}
    out, lse, skips = bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, mask, **arguments)
    assert check_skipping(inputs, out, lse, skips, policy, masks)[:, 1].sum() > 0
    within = replace(policy, within=Fixed(mask=mask))
    got, got_lse, info = skipping(inputs, within)
    assert torch.equal(got, out) and torch.equal(got_lse, lse) and torch.equal(info.skips, skips) and info.mask is mask
    kept = mask.density(per_head=True).repeat_interleave(4 // mask.num_heads)
    torch.testing.assert_close(info.density(per_head=True), kept * (1 - skips[:, 1] / skips[:, 0]))
    torch.testing.assert_close(info.density(), info.density(per_head=True).mean())


INNER: list[Callable[[Inputs], Policy]] = [
    lambda i: StaticPattern(sink_blocks=1, window_blocks=4, **SIZES),
    lambda i: RelativeMax(alpha=0.5, **SIZES),
    lambda i: RelativeMax(alpha=0.5, shared=True, **SIZES),
    lambda i: Union(
        CumulativeMass(mass=0.6, **SIZES), CumulativeMass(mass=0.6, pooling="maxabs", **SIZES), StaticPattern(**SIZES)
    ),
    lambda i: FlexPrefill(gamma=0.6, min_budget=0, **SIZES),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_within_a_policy(layout: str, inner: Callable[[Inputs], Policy], form: str) -> None:
    inputs = make(replace(BASE, layout=layout, page_size=16))
    chosen = inner(inputs)
    want = inputs.run(chosen, return_info=True)[1].mask
    masks = masks_from(inputs, want)
    policy = policy_for(inputs, masks, form, within=chosen)
    assert (policy.needs_summary, policy.needs_keys) == (chosen.needs_summary, chosen.needs_keys)
    out, lse, info = skipping(inputs, policy)
    assert torch.equal(info.mask.words, want.words)
    check_skipping(inputs, out, lse, info.skips, policy, masks)
    if layout == PAGED and chosen.needs_summary and not chosen.needs_keys:
        pages = (inputs.k.shape[0], inputs.case.page_size, 2, 16)
        cache = bsfa.BlockSummary.allocate(*pages, block_n=32, dtype=F32, pooling=policy.summary_pooling)
        cache.update(inputs.k, inputs.block_table, inputs.seqlens_k, max_seqlen_q=300)
        got = inputs.run(policy, summary=cache)
        assert torch.equal(got, out)


def test_dense_within_is_none() -> None:
    inputs = make(BASE)
    policy = policy_for(inputs, None, "absolute")
    want = skipping(inputs, policy)
    got = skipping(inputs, replace(policy, within=bsfa.policies.Dense(**SIZES)))
    assert torch.equal(got[0], want[0]) and torch.equal(got[2].skips, want[2].skips) and got[2].mask is None
    assert bsfa.select_blocks(inputs.q, None, policy, seqlen_k=300) is None


@pytest.mark.parametrize("form", FORMS)
def test_thresholds_follow_the_position(form: str) -> None:
    """Knots in the middle of tiles; every tile has a cut of its own."""
    inputs = make(replace(BASE, lengths=((400, 640),)))
    reference = torch.tensor([[-4.0, 1.0, 0.5], [-3.0, 1.0, 0.0], [-torch.inf, 2.0, 0.3], [-5.0, 1.0, 0.6]])
    reference = reference if form == "absolute" else reference - 1.5
    policy = ExactSkip(form=form, ratio=[1.0, 0.9, 0.8, 1.0], reference=reference, positions=(100, 300, 500), **SIZES)
    cuts = policy.cuts(4, 7, torch.device("cpu")).numpy()
    assert cuts.shape == (4, 7)
    for h in (0, 1, 3):
        want = np.interp(np.arange(7) * 128, [100, 300, 500], reference[h].double()) + np.log([1.0, 0.9, 0.8, 1.0][h])
        np.testing.assert_allclose(cuts[h], want, rtol=1e-5)
    assert np.isneginf(cuts[2, :3]).all() and np.isfinite(cuts[2, 3:]).all()
    assert torch.equal(policy.cuts(4, 3, torch.device("cpu")), torch.from_numpy(cuts[:, :3]))
    out, lse, info = skipping(inputs, policy)
    assert check_skipping(inputs, out, lse, info.skips, policy, margin=1e-6)[:, 1].sum() > 0


@pytest.mark.parametrize("inner", [None, StaticPattern(sink_blocks=2, window_blocks=5, **SIZES)])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_are_the_whole(form: str, inner: Policy | None) -> None:
    inputs = make(replace(BASE, lengths=((640, 640),)))
    reference = torch.tensor([[-2.0, 1.0], [-2.0, 0.5], [-1.0, 1.5], [-1.0, 0.6]]) - (
        0.0 if form == "absolute" else 2.0
    )
    policy = ExactSkip(form=form, ratio=1.0, reference=reference, positions=(128, 512), within=inner, **SIZES)
    want, want_lse, whole = skipping(inputs, policy)
    assert int(whole.skips[:, 1].sum()) > 0
    met = torch.zeros(4, 2, dtype=torch.int64)
    for begin, end in ((0, 128), (128, 192), (192, 512), (512, 640)):
        out, lse, info = bsfa.attention(
            inputs.q[:, begin:end],
            inputs.k[:, :end],
            inputs.v[:, :end],
            policy=policy,
            return_lse=True,
            return_info=True,
        )
        torch.testing.assert_close(out, want[:, begin:end], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, want_lse[:, :, begin:end], rtol=1e-5, atol=1e-6)
        met += info.skips
    if inner is None:  # a chunk that ends within a tile has another window
        assert torch.equal(met, whole.skips)
    assert int(met[:, 1].sum()) > 0


@pytest.mark.parametrize("layout", [BATCHED, PAGED])
def test_thresholds_that_skip_nothing_are_dense(layout: str) -> None:
    inputs = make(replace(BASE, layout=layout))
    dense, dense_lse = inputs.run(None, return_lse=True)
    for policy in (
        ExactSkip(**SIZES),
        ExactSkip(form="absolute", **SIZES),
        ExactSkip.absolute(-np.inf, **SIZES),
        ExactSkip(ratio=torch.zeros(4), **SIZES),
        ExactSkip(ratio=1.0, sink_blocks=1000, **SIZES),
    ):
        out, lse, info = skipping(inputs, policy)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, dense_lse, rtol=1e-5, atol=1e-6)
        assert not info.skips[:, 1].any() and (info.skips[:, 0] > 0).all() and float(info.density()) == 1.0


def test_counted_keeps_the_lse() -> None:
    inputs = make(BASE)
    policy = policy_for(inputs, None, "absolute")
    _, dense_lse = inputs.run(None, return_lse=True)
    dropped, counted = skipping(inputs, policy), skipping(inputs, replace(policy, counted=True))
    torch.testing.assert_close(counted[1], dense_lse, rtol=1e-5, atol=1e-6)
    assert (dropped[1] < dense_lse - 1e-4).any() and torch.equal(dropped[2].skips, counted[2].skips)


def test_sinks_and_window_stay() -> None:
    """However low: nothing else is used with a threshold that is above every logit."""
    inputs = make(replace(BASE, lengths=((300, 300),), hq=2, hkv=2))
    policy = ExactSkip.absolute(1e4, sink_blocks=2, window_blocks=2, **SIZES)
    out, lse, info = skipping(inputs, policy)
    pattern = StaticPattern(sink_blocks=2, window_blocks=2, **SIZES)
    want, want_lse = inputs.run(pattern, return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-6)
    assert 0 < float(info.density()) < 1


def test_nan_is_not_skipped() -> None:
    inputs = make(replace(BASE, lengths=((128, 512),), hkv=4))
    inputs.k[0, 100, 1] = NAN  # block 3 of head 1
    policy = ExactSkip.absolute(1e4, **SIZES)
    out, _, info = skipping(inputs, policy)
    assert out[:, :, 1].isnan().all() and out[:, :, [0, 2, 3]].isfinite().all()
    assert (info.skips[0] - info.skips[1]).tolist() == [0, 2]


def test_one_threshold_per_query_head() -> None:
    inputs = make(BASE)
    policy = ExactSkip.absolute(torch.tensor([-np.inf, 1e4, -np.inf, 1e4]), **SIZES)
    skips = skipping(inputs, policy)[2].skips
    assert skips[::2, 1].tolist() == [0, 0] and (skips[1::2, 1] > 0).all()
    one = ExactSkip(form="absolute", ratio=[1.0] * 4, reference=torch.full((1, 1), 0.1), positions=(0,), **SIZES)
    four = ExactSkip.absolute(torch.full((4,), 0.1), **SIZES)
    assert torch.equal(inputs.run(one), inputs.run(four))


@pytest.mark.parametrize("lengths", [((0, 70),), ((70, 0),), ((0, 0),)])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_nothing_to_do(layout: str, lengths: tuple[tuple[int, int], ...]) -> None:
    inputs = replace(BASE, lengths=lengths, layout=layout).make()
    out, lse, info = skipping(inputs, ExactSkip.absolute(0.0, **SIZES))
    assert (out == 0).all() and torch.isneginf(lse).all() and not info.skips.any() and float(info.density()) == 1.0


def test_capacity_of_the_block_table_as_length() -> None:
    inputs = make(replace(BASE, layout=PAGED))
    policy = policy_for(inputs, None, "absolute")
    want, got = skipping(inputs, policy), skipping(inputs, policy, max_seqlen_k=None)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2].skips, want[2].skips)


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_out(layout: str) -> None:
    inputs = make(replace(BASE, layout=layout))
    policy = policy_for(inputs, None, "relative")
    want, want_lse, info = skipping(inputs, policy)
    buffer = torch.full((*want.shape[:-1], 2 * want.shape[-1]), -7.0)
    out = buffer[..., want.shape[-1] :]
    got, lse, got_info = skipping(inputs, policy, out=out)
    assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(got_info.skips, info.skips)
    out.fill_(-7.0)
    assert (buffer == -7.0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_tile_max(case: Case, form: str) -> None:
    for block_m in (64, case.block_m):
        inputs = make(replace(case, block_m=block_m))
        maxima = bsfa.tile_max(
            inputs.q, inputs.k, form=form, block_m=block_m, block_n=case.block_n, **inputs.maths, **inputs.layout
        )

        def want(b: int, inputs: Inputs = inputs, block_m: int = block_m) -> np.ndarray:
            q, k, _ = inputs.arrays(b)
            blocks = {"block_m": block_m, "block_n": case.block_n}
            found = oracle_skip.tile_max(q, k, form=form, **inputs.oracle_maths, **blocks)
            return np.where(np.isposinf(found), 1e3, found)

        got = torch.where(maxima == torch.inf, 1e3, maxima)
        check_rows(inputs, got, want, -np.inf, "tile_max", 1e-5)


# --- dense for a reason, and what is refused --------------------------------------------------------------------------


def test_decode_steps_and_windows_are_dense() -> None:
    policy = ExactSkip.absolute(1e4, **SIZES)
    for case, reason in (
        (replace(BASE, lengths=((1, 300), (1, 129)), layout=PAGED), "decode"),
        (replace(BASE, window_left=40), "window_left"),
    ):
        inputs = make(case)
        with pytest.warns(bsfa.DenseFallbackWarning, match=reason):
            out, info = inputs.run(policy, return_info=True)
        assert torch.equal(out, inputs.run(None)) and reason in info.dense_reason
        assert info.skips is None and float(info.density()) == 1.0 and info.density(per_head=True).tolist() == [1.0] * 4


def sparse(**options: Any) -> Any:
    inputs = BASE.make()
    return bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, options.pop("mask", None), **options)


def run(policy: Policy, **options: Any) -> Any:
    return BASE.make().run(policy, **options)


def a_mask(**sizes: int) -> bsfa.BlockMask:
    inputs = BASE.make()
    return bsfa.select_blocks(inputs.q, None, StaticPattern(**sizes), seqlen_k=300)  # type: ignore[return-value]


def some_means() -> Tensor:
    return torch.zeros(2, 10, 2, 16)


SKIP = ExactSkip(ratio=0.1, **SIZES)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "ratio above 1": (lambda: ExactSkip(ratio=1.5), ValueError, r"ExactSkip.ratio must be 0 .. 1, got 1.5"),
    "ratio NaN": (lambda: ExactSkip(ratio=NAN), ValueError, "ExactSkip.ratio must be 0 .. 1"),
    "ratio of a word": (lambda: ExactSkip(ratio="low"), TypeError, "ExactSkip.ratio must be a number"),
    "ratio of rank 2": (lambda: ExactSkip(ratio=torch.ones(2, 2)), ValueError, r"float tensor of shape \[heads\]"),
    "form": (lambda: ExactSkip(form="log"), ValueError, "ExactSkip.form must be one of absolute, relative, got 'log'"),
    "counted": (lambda: ExactSkip(counted=1), TypeError, "ExactSkip.counted must be a bool"),
    "sinks": (lambda: ExactSkip(sink_blocks=-1), ValueError, "ExactSkip.sink_blocks must be at least 0"),
    "window": (lambda: ExactSkip(window_blocks=0), ValueError, "ExactSkip.window_blocks must be at least 1"),
    "within": (lambda: ExactSkip(within="all"), TypeError, "ExactSkip.within must be a policy or None"),
    "within itself": (lambda: ExactSkip(within=ExactSkip()), ValueError, "cannot be another ExactSkip"),
    "within of other blocks": (
        lambda: ExactSkip(within=StaticPattern(block_m=64)),
        ValueError,
        "ExactSkip has blocks of 128 x 128, but within has 64 x 128",
    ),
    "a union": (lambda: Union(ExactSkip()), ValueError, r"give it the Union as ExactSkip\(within=...\)"),
    "reference": (
        lambda: ExactSkip(reference=[[1.0]], positions=(0,)),
        TypeError,
        "reference must be a float32 tensor",
    ),
    "reference in float64": (
        lambda: ExactSkip(reference=torch.ones(1, 1).double(), positions=(0,)),
        TypeError,
        "reference must be a float32 tensor",
    ),
    "reference of rank 1": (lambda: ExactSkip(reference=torch.ones(2), positions=(0, 1)), ValueError, "heads, knots"),
    "knots": (lambda: ExactSkip(reference=torch.ones(2, 3), positions=(0, 1)), ValueError, "each of the 2 positions"),
    "no positions": (lambda: ExactSkip(reference=torch.ones(2, 0)), ValueError, "each of the 0 positions"),
    "positions alone": (lambda: ExactSkip(positions=(0,)), ValueError, "positions belong to a reference"),
    "falling positions": (
        lambda: ExactSkip(reference=torch.ones(1, 2), positions=(5, 5)),
        ValueError,
        "positions must rise",
    ),
    "negative positions": (lambda: ExactSkip(positions=(-1,)), TypeError, "positions must be a tuple"),
    "list of positions": (lambda: ExactSkip(positions=[0]), TypeError, "positions must be a tuple"),
    "reference NaN": (lambda: ExactSkip.absolute(NAN), ValueError, "reference must be finite"),
    "reference inf": (lambda: ExactSkip.absolute(np.inf), ValueError, "reference must be finite"),
    "heads of ratio": (
        lambda: run(ExactSkip(ratio=[0.1, 0.2], **SIZES)),
        ValueError,
        "ExactSkip.ratio has 2 values but q has 4 heads",
    ),
    "heads of reference": (
        lambda: run(ExactSkip.absolute(torch.zeros(3), **SIZES)),
        ValueError,
        "ExactSkip.reference has 3 heads but q has 4",
    ),
    "mean correction": (lambda: run(SKIP, mean_correction=True), ValueError, "cannot be combined with ExactSkip"),
    "means": (lambda: sparse(skip=SKIP, k_means=some_means()), ValueError, "cannot be combined with ExactSkip"),
    "a window": (lambda: sparse(skip=SKIP, window_left=3), ValueError, "skip cannot be combined with window_left"),
    "skip of a number": (
        lambda: sparse(skip=0.1),
        TypeError,
        "skip must be a bsfa.policies.ExactSkip or None, got float",
    ),
    "skip of another": (lambda: sparse(skip=StaticPattern()), TypeError, "got StaticPattern"),
    "within and a mask": (
        lambda: sparse(skip=replace(SKIP, within=StaticPattern(**SIZES))),
        ValueError,
        "skip.within has no say beside a mask",
    ),
    "a mask of other blocks": (
        lambda: sparse(skip=SKIP, mask=a_mask(block_m=128, block_n=64)),
        ValueError,
        "skip has blocks of 128 x 32, but the mask has 128 x 64",
    ),
    "skips of nothing": (lambda: sparse(return_skips=True), ValueError, "return_skips needs skip"),
    "scores": (
        lambda: bsfa.select_blocks(BASE.make().q, None, SKIP, seqlen_k=300, return_scores=True),
        ValueError,
        "policy ExactSkip has no scores",
    ),
    "form of tile_max": (
        lambda: bsfa.tile_max(BASE.make().q, BASE.make().k, form="both"),
        ValueError,
        "form must be one of absolute, relative, got 'both'",
    ),
    "blocks of tile_max": (lambda: bsfa.tile_max(BASE.make().q, BASE.make().k, block_m=0), ValueError, "block_m"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_say_what_is_wrong(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


# --- moving, models, evaluation ---------------------------------------------------------------------------------------


def test_tensors_move_with_the_policy() -> None:
    meta, cpu = torch.device("meta"), torch.device("cpu")
    inner = RelativeMax(alpha=torch.full((4,), 0.5))
    policy = replace(ExactSkip.absolute(torch.zeros(4), within=inner), ratio=torch.ones(4))
    assert on_device(policy, cpu) is policy
    moved = on_device(policy, meta)
    assert isinstance(moved, ExactSkip) and isinstance(moved.within, RelativeMax)
    tensors = (moved.ratio, moved.reference, moved.within.alpha)
    assert all(isinstance(t, Tensor) and t.device == meta for t in tensors)
    assert replace(moved, ratio=1.0, within=None).positions == (0,)
    mixed = ExactSkip(within=Union(inner, FlexPrefill(gamma=torch.full((4,), 0.9))))
    there = PerLayer([mixed, None]).layer(0, "meta")
    assert isinstance(there, ExactSkip) and isinstance(there.within, Union)
    assert {p.gamma.device for p in there.within.policies if isinstance(p, FlexPrefill)} == {meta}  # type: ignore[union-attr]
    assert on_device(mixed, cpu) is mixed


def test_a_model_skips_by_layer() -> None:
    model = tiny_model.make_model()
    ids = torch.randint(0, 320, (1, 400), generator=torch.Generator().manual_seed(1))
    sizes = {"block_m": 64, "block_n": 32}
    with torch.no_grad():
        hf.set_policy(model, None)
        dense = model(ids).logits
        hf.set_policy(model, ExactSkip(ratio=0.0, **sizes), min_seqlen=0, record=True)
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
        assert [float(d) for d in hf.density(model).values()] == [1.0, 1.0]

        policy = ExactSkip(ratio=0.5, **sizes)
        hf.set_policy(model, PerLayer([None, policy]), min_seqlen=0, record=True)
        seen: list[hf.AttentionCall] = []
        with hf.observe(model, seen.append):
            got = model(ids).logits
        found = hf.density(model)
        assert float(found[0]) == 1.0 and 0.0 < float(found[1]) < 1.0 and not torch.equal(got, dense)
        assert seen[0].info.skips is None and torch.equal(found[1], seen[1].info.density())
        call = seen[1]
        out, info = bsfa.attention(
            call.q, call.k, call.v, policy=policy, softmax_scale=call.softmax_scale, return_info=True
        )
        assert torch.equal(out, call.out) and torch.equal(info.skips, call.info.skips)
        past = model(ids, use_cache=True).past_key_values
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model(ids[:, :1], past_key_values=past).logits.isfinite().all()  # decode: dense by design
    for bad in (policy, [None, policy]):
        with pytest.raises(ValueError, match="cannot be combined with ExactSkip"):
            hf.set_policy(model, bad, mean_correction=True)


EVALUATED = [
    ExactSkip(ratio=0.4, block_m=32, block_n=32),
    ExactSkip(ratio=[0.2, 0.4, 0.6, 0.8], block_m=96, block_n=32, counted=True),
    ExactSkip(
        form="absolute",
        ratio=1.0,
        reference=torch.tensor([[6.0, 20.0], [5.0, 15.0], [10.0, 30.0], [0.0, 10.0]]),
        positions=(64, 200),
        block_m=128,
        block_n=32,
    ),
    ExactSkip.absolute(1.5, within=StaticPattern(sink_blocks=1, window_blocks=4, block_n=32), block_n=32),
]


@pytest.mark.parametrize("policy", EVALUATED, ids=lambda p: evaluation.describe(p))
def test_evaluation_accounts_for_what_is_skipped(policy: ExactSkip) -> None:
    """Density of the sparse run and recall on the dense one, against the oracle on the dense run's queries and keys."""
    model, tokenizer = tiny_model.make_model(), tiny_model.make_tokenizer()
    prompts = tiny_model.make_prompts(2, words=150)
    report = evaluation.evaluate(model, tokenizer, prompts, {"skip": policy}).runs["skip"]
    density, recall = torch.zeros(2, 4), torch.zeros(2, 4)

    def look(call: hf.AttentionCall) -> None:
        n = call.q.shape[1]
        case = Case(lengths=((n, n),), hq=4, hkv=2, dim=16, scale=call.softmax_scale)
        inputs = Inputs(replace(case, block_m=policy.block_m, block_n=policy.block_n))
        inputs.queries, inputs.keys, inputs.values = [call.q[0]], [call.k[0]], [call.v[0]]
        inputs.lay_out()
        mask, kept = None, torch.ones(4)
        if policy.within is not None:
            chosen = bsfa.select_blocks(call.q, None, policy.within, seqlen_k=n)
            mask, kept = masks_from(inputs, chosen)[0], chosen.density(per_head=True).expand(4)  # type: ignore
        cuts = policy.cuts(4, columns(inputs), torch.device("cpu")).double().numpy()
        want = run_oracle(inputs, 0, policy, cuts, mask)
        s = oracle.logits(*inputs.arrays(0)[:2], call.softmax_scale, 0.0)
        p = np.where(oracle.visible_tokens(n, n, True), np.exp(s - s.max(-1, keepdims=True)), 0.0)
        recall[call.layer] += torch.from_numpy(((p * want.valued).sum(-1) / p.sum(-1)).mean(-1)) / 2
        density[call.layer] += kept * torch.from_numpy(1 - want.counts[:, 1] / want.counts[:, 0]) / 2

    with torch.no_grad(), hf.observe(model, look):
        hf.set_policy(model, None)
        for prompt in prompts:
            model(evaluation.tokenize(prompt, tokenizer).ids[None])
    torch.testing.assert_close(torch.tensor(report.layer_recall), recall, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.tensor(report.layer_density[0]), density[0], rtol=1e-5, atol=1e-6)
    assert report.recall < 1.0 and report.density < 1.0
    assert report.policy == evaluation.describe(policy)


def test_descriptions() -> None:
    assert evaluation.describe(EVALUATED[0]) == "exact-skip relative"
    assert evaluation.describe(EVALUATED[3]) == "exact-skip absolute within static"
    assert evaluation.describe(PerLayer([None, EVALUATED[0]])) == "per layer: dense, exact-skip relative"
