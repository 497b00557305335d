"""ExactSkip in two passes, against the oracle and against one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bsfa
from bsfa import evaluation
from bsfa.calibration.curves import check_calibratable
from bsfa.policies import CumulativeMass, ExactSkip, Fixed, Policy, RelativeMax, StaticPattern
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, Inputs, check_attention, table
from skip_cases import check_two_passes, columns, first_masks, first_pass, make, masks_of, policy_for, run_oracle

SIZES = {"block_m": 128, "block_n": 32}
BASE = Case(lengths=((150, 300), (150, 300)), hq=4, hkv=2, dim=16, **SIZES)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (70, 0), (37, 250), (129, 257), (100, 30))
FORMS = ("absolute", "relative")
CASES = [
    *table(BASE, layout=[BATCHED, PACKED, PAGED, PAGED_PACKED]),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], dtype=[F32, BF16]),
    *table(BASE, causal=[False], dtype=[F32, F16]),
    *table(replace(BASE, lengths=((200, 330),)), block_m=[32, 64, 96, 192], block_n=[64]),
    *table(replace(BASE, lengths=((150, 300),)), softcap=[0.0, 2.0], scale=[-0.3, 1.0]),
    replace(BASE, dim_v=40, strides="gaps"),
    *table(replace(BASE, lengths=((700, 1100),), hq=2, hkv=1), block_m=[128, 640]),  # several words, several turns
]
WITH_FORMS = pytest.mark.parametrize("form", FORMS)

Masks = list[np.ndarray] | None


def check(inputs: Inputs, policy: ExactSkip, masks: Masks = None) -> np.ndarray:
    """Mask, counts, output and LSE against the oracle; the counts [Hq, 2]."""
    counts = check_two_passes(inputs, inputs, policy, masks)
    if masks is not None:
        fixed = replace(policy, within=Fixed(mask=inputs.block_mask(masks)))
        info = inputs.run(fixed, return_info=True)[1]
        assert np.array_equal(info.skips.numpy(), counts) and info.mask is fixed.within.mask  # type: ignore[union-attr]
    return counts


def with_groups_that_differ(case: Case) -> Inputs:
    """Queries of every other group of 64 positions are quiet."""
    inputs = make(case)
    for (seqlen_q, seqlen_k), queries in zip(case.lengths, inputs.queries, strict=True):
        quiet = (torch.arange(seqlen_q) + seqlen_k - seqlen_q) // 64 % 2 == 1
        queries[quiet] *= 0.4
    inputs.lay_out()
    return inputs


def once(policy: ExactSkip) -> ExactSkip:
    return replace(policy, passes=1)


@WITH_FORMS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_pass_is_the_rule(case: Case, form: str) -> None:
    inputs = make(case)
    policy = policy_for(inputs, None, form, passes=2)
    counts = check(inputs, policy)
    out, lse, info = inputs.run(policy, return_lse=True, return_info=True)
    assert info.mask is None and info.policy is policy and info.dense_reason is None
    share = torch.from_numpy(counts[:, 1] / counts[:, 0]).float()
    torch.testing.assert_close(info.density(per_head=True), 1 - share)

    again = inputs.run(policy, return_lse=True, return_info=True)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse) and torch.equal(again[2].skips, info.skips)
    arguments: dict[str, Any] = {"skip": policy, "return_skips": True, **inputs.maths, **inputs.layout}
    staged = bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, None, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(staged, (out, lse, info.skips), strict=True))
    into = torch.full_like(out, NAN)
    assert inputs.run(policy, out=into) is into and torch.equal(into, out)


@WITH_FORMS
@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("lengths", [((600, 600),), ((150, 300),)])
def test_a_tile_keeps_what_one_of_its_groups_keeps(lengths: Any, mask: str, form: str) -> None:
    """Cuts of at most 0 in the relative form: exactly the union of what groups keep in one pass, on a mask too."""
    inputs = with_groups_that_differ(replace(BASE, lengths=lengths, mask=mask))
    masks = masks_of(inputs)
    policy = policy_for(inputs, masks, form, passes=2)
    kept = inputs.rows_of_sequence(first_masks(inputs, policy, masks)[0].to_rows(), 0)
    cuts = policy.cuts(4, columns(inputs), torch.device("cpu")).double().numpy()
    one = run_oracle(inputs, 0, once(policy), cuts, None if masks is None else masks[0])
    differ = 0
    for t, tile in enumerate(inputs.tiles(0)):
        for j in range(tile.visible):
            used = one.valued[:, tile.rows, j * 32 : (j + 1) * 32].any(-1)  # [heads, rows]
            assert np.array_equal(kept[t, :, j], used.any(-1))
            if (j + 1) * 32 <= tile.index * 128:  # every row sees all of it
                differ += int((used.any(-1) & ~used.all(-1)).sum())
    assert differ > 0  # groups of a tile that do not decide alike


@WITH_FORMS
def test_never_less_than_one_pass(form: str) -> None:
    inputs = with_groups_that_differ(BASE)
    policy = policy_for(inputs, None, form, passes=2)
    two, one = (inputs.run(p, return_info=True)[1].skips for p in (policy, once(policy)))
    assert torch.equal(two[:, 0], one[:, 0]) and (two[:, 1] <= one[:, 1]).all() and not torch.equal(two, one)


def test_relative_cuts_above_the_running_maximum() -> None:
    """Running maxima are over all blocks met, which in one pass they are not."""
    inputs = make(replace(BASE, lengths=((200, 500),)))
    reference = torch.tensor([[0.4], [0.9], [0.2], [1.3]])
    policy = ExactSkip(ratio=1.0, reference=reference, positions=(0,), passes=2, **SIZES)
    assert check(inputs, policy)[:, 1].sum() > 0
    one = inputs.run(once(policy), return_info=True)[1].skips
    assert not torch.equal(one, inputs.run(policy, return_info=True)[1].skips)


@WITH_FORMS
@pytest.mark.parametrize("mask_heads", ["q", "kv", "one"])
@pytest.mark.parametrize("mask", ["random", "sparse", "mixed", "empty"])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_on_a_mask(layout: str, mask: str, mask_heads: str, form: str) -> None:
    inputs = make(replace(BASE, layout=layout, mask=mask, mask_heads=mask_heads))
    masks = masks_of(inputs)
    skipped = check(inputs, policy_for(inputs, masks, form, passes=2), masks)[:, 1].sum()
    assert skipped > 0 if mask in ("random", "mixed") else mask == "sparse" or skipped == 0


INNER: list[Callable[[], Policy]] = [
    lambda: StaticPattern(sink_blocks=1, window_blocks=4, **SIZES),
    lambda: RelativeMax(alpha=0.5, **SIZES),
    lambda: RelativeMax(alpha=0.5, shared=True, **SIZES),
    lambda: CumulativeMass(mass=0.6, **SIZES),
]


@WITH_FORMS
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_within_a_policy(layout: str, inner: Callable[[], Policy], form: str) -> None:
    inputs = make(replace(BASE, layout=layout))
    mask = inputs.run(inner(), return_info=True)[1].mask
    rows = mask.to_rows()
    masks = [inputs.rows_of_sequence(rows, b)[:, :, : -(-n // 32)] for b, (_, n) in enumerate(inputs.case.lengths)]
    policy = policy_for(inputs, masks, form, within=inner(), passes=2)
    _, counts, margin = first_pass(inputs, policy, masks)
    out, lse, info = inputs.run(policy, return_lse=True, return_info=True)
    assert margin > 1e-5 and np.array_equal(info.skips.numpy(), counts) and torch.equal(info.mask.words, mask.words)
    check_attention(inputs, out, lse, first_pass(inputs, policy, masks)[0])


@WITH_FORMS
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (2, 2), (100, 1), (1, 100)])
def test_sinks_and_windows(sinks: int, window: int, form: str) -> None:
    inputs = make(replace(BASE, lengths=((150, 500),)))
    policy = policy_for(inputs, None, form, sink_blocks=sinks, window_blocks=window, passes=2)
    assert (check(inputs, policy)[:, 1].sum() == 0) == (100 in (sinks, window))


@WITH_FORMS
def test_thresholds_follow_the_position(form: str) -> None:
    inputs = make(replace(BASE, lengths=((400, 640),)))
    reference = torch.tensor([[-4.0, 1.0, 0.5], [-3.0, 1.0, 0.0], [-torch.inf, 2.0, 0.3], [-5.0, 1.0, 0.6]])
    reference = reference if form == "absolute" else reference - 2.5
    ratio = [1.0, 0.9, 0.8, 1.0]
    policy = ExactSkip(form=form, ratio=ratio, reference=reference, positions=(100, 300, 500), passes=2, **SIZES)
    assert check(inputs, policy)[:, 1].sum() > 0


@WITH_FORMS
def test_chunks_are_the_whole(form: str) -> None:
    inputs = make(replace(BASE, lengths=((640, 640),)))
    policy = policy_for(inputs, None, form, passes=2)
    want, want_lse, whole = inputs.run(policy, return_lse=True, return_info=True)
    met = torch.zeros(4, 2, dtype=torch.int64)
    for begin, end in ((0, 128), (128, 512), (512, 640)):
        chunk = (inputs.q[:, begin:end], inputs.k[:, :end], inputs.v[:, :end])
        out, lse, info = bsfa.attention(*chunk, policy=policy, return_lse=True, return_info=True)
        torch.testing.assert_close(out, want[:, begin:end], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, want_lse[:, :, begin:end], rtol=1e-5, atol=1e-6)
        met += info.skips
    assert torch.equal(met, whole.skips) and int(met[:, 1].sum()) > 0


def test_nan_is_not_skipped() -> None:
    inputs = make(replace(BASE, lengths=((128, 512),), hkv=4))
    inputs.k[0, 100, 1] = NAN  # block 3 of head 1
    out, info = inputs.run(ExactSkip.absolute(1e4, passes=2, **SIZES), return_info=True)
    assert out[:, :, 1].isnan().all() and out[:, :, [0, 2, 3]].isfinite().all()
    assert (info.skips[0] - info.skips[1]).tolist() == [0, 2]


@pytest.mark.parametrize("cut", [-np.inf, NAN])
def test_thresholds_that_skip_nothing_are_dense(cut: float) -> None:
    inputs = make(BASE)
    policy = ExactSkip.absolute(-np.inf, passes=2, **SIZES)
    if np.isnan(cut):
        assert policy.reference is not None
        policy.reference.fill_(cut)  # past the checks, as a tensor on a GPU may be
    out, info = inputs.run(policy, return_info=True)
    torch.testing.assert_close(out, inputs.run(None), rtol=1e-5, atol=1e-6)
    assert not info.skips[:, 1].any() and (info.skips[:, 0] > 0).all()


@pytest.mark.parametrize("lengths", [((0, 70),), ((70, 0),), ((0, 0),)])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_nothing_to_do(layout: str, lengths: tuple[tuple[int, int], ...]) -> None:
    inputs = replace(BASE, lengths=lengths, layout=layout).make()
    out, lse, info = inputs.run(ExactSkip.absolute(0.0, passes=2, **SIZES), return_lse=True, return_info=True)
    assert (out == 0).all() and torch.isneginf(lse).all() and not info.skips.any()


@pytest.mark.parametrize("block_m", [96, 128])
def test_evaluation_judges_whole_tiles(block_m: int) -> None:
    inputs = with_groups_that_differ(replace(BASE, lengths=((500, 500),), block_m=block_m))
    policy = policy_for(inputs, None, "absolute", passes=2)
    scale = {"causal": True, "softmax_scale": None, "softcap": 0.0}
    unit, kept = evaluation.unskipped(inputs.q, inputs.k, policy, **scale)
    words = first_pass(inputs, policy)[0][0]
    for i, of_unit in enumerate(kept.numpy()):
        tile = inputs.tiles(0)[i * unit // block_m]
        assert np.array_equal(of_unit[:, : tile.visible], words[i * unit // block_m, :, : tile.visible])
    assert evaluation.describe(policy) == "exact-skip absolute in two passes"


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"ExactSkip.passes must be 1 or 2, got 3"):
        ExactSkip(passes=3)
    with pytest.raises(ValueError, match=r"ExactSkip.passes must be at least 1"):
        ExactSkip(passes=0)
    with pytest.raises(TypeError, match=r"ExactSkip.passes must be an int"):
        ExactSkip(passes=True)
    with pytest.raises(bsfa.UnsupportedError, match=r"cannot count what it skips .* passes=1"):
        ExactSkip(passes=2, counted=True)
    with pytest.raises(bsfa.UnsupportedError, match=r"in two passes cannot be calibrated.*passes=1"):
        check_calibratable(ExactSkip(passes=2))
    assert ExactSkip.absolute(1.0, passes=2).to(torch.device("meta")).passes == 2


@pytest.mark.parametrize("rows", [0, 2])
def test_the_operator_raises_rather_than_crash(rows: int) -> None:
    inputs = make(replace(BASE, lengths=((300, 300),)))
    cuts = torch.zeros(4, 1)
    tail = (128, 32, True, 0.25, 0.0, cuts, "absolute", 1, 1)
    head = (inputs.q, inputs.k, None, None, None, None, 300, 300)
    with pytest.raises((RuntimeError, ValueError), match="rows"):
        torch.ops.bsfa.skip_mask(*head, rows, None, *tail)
    short = torch.zeros(2, 4, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="mask_words has 2 rows"):
        torch.ops.bsfa.skip_mask(*head, 3, short, *tail)
    words, counts, skips = torch.ops.bsfa.skip_mask(*head, 3, None, *tail)
    assert words.shape == (3, 4, 1) and counts.shape == (3, 4) and skips.shape == (4, 2)
