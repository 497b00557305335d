"""Attention over token masks on the CPU against float64: stage function, policy, masked_mha, merge_attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
from bsfa import TokenMask, UnsupportedError, masked_mha, merge_attention
from bsfa.masked_mha import MAX_MASKED_SEQLEN
from bsfa.policies import ExactSkip, Intersection, StaticPattern, TokenTopK, Union
from cases import BATCHED, BF16, F32, NAN, PACKED, PAGED, PAGED_PACKED, ROUNDING, Case, Inputs, check_attention, poison
from token_cases import (
    ATTENDED,
    CHUNKS,
    KINDS,
    RAGGED,
    attend,
    draw_indices,
    key_sets,
    kind_of,
    rows_of,
    token_mask,
    visible_sets,
)

MLA = Case(lengths=((150, 300),), hq=2, hkv=2, dim=192, dim_v=128)


def check(case: Case, kind: str, topk: int = 37, masks: list[np.ndarray] | None = None) -> None:
    inputs = case.make()
    indices = draw_indices(inputs, topk, kind)
    tokens = token_mask(inputs, indices)
    mask = None if masks is None else inputs.block_mask(masks)
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=case.dtype)
    out, lse = attend(inputs, tokens, mask)
    check_attention(inputs, out, lse, masks, tokens=key_sets(inputs, indices))


@pytest.mark.parametrize("case", ATTENDED, ids=str)
def test_attention(case: Case) -> None:
    check(case, kind_of(case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
def test_kinds_of_sets(kind: str, layout: str) -> None:
    check(replace(MLA, lengths=RAGGED, layout=layout), kind, 20)


@pytest.mark.parametrize("heads", ["q", "kv", "one"])
@pytest.mark.parametrize("blocks", [(128, 128), (64, 32)], ids=str)
@pytest.mark.parametrize("mask", ["random", "mixed", "empty"])
def test_with_a_block_mask(heads: str, blocks: tuple[int, int], mask: str) -> None:
    """Both apply: a key is seen if the row has it and its block is kept."""
    case = Case(
        lengths=((200, 390),), hq=4, hkv=2, dim=64, block_m=blocks[0], block_n=blocks[1], mask=mask, mask_heads=heads
    )
    check(case, "random", 60, [case.make().draw_mask(0)])


def test_all_keys_are_dense_attention_bit_by_bit() -> None:
    inputs = replace(MLA, lengths=((140, 140),)).make()
    tokens = token_mask(inputs, draw_indices(inputs, 140, "all"))
    for a, b in zip(attend(inputs, tokens), inputs.attend(None), strict=True):
        assert torch.equal(a, b)


def test_twice_the_same() -> None:
    inputs = replace(MLA, lengths=RAGGED, layout=PAGED_PACKED, dtype=BF16).make()
    tokens = token_mask(inputs, draw_indices(inputs, 20, "random"))
    for a, b in zip(attend(inputs, tokens), attend(inputs, tokens), strict=True):
        assert torch.equal(a, b)


def test_hidden_keys_may_hold_anything() -> None:
    inputs = MLA.make()
    indices = draw_indices(inputs, 20, "random")
    for rows in indices:
        rows[rows % 7 == 3] = -1
    tokens = token_mask(inputs, indices)
    want = attend(inputs, tokens)
    inputs.k[:, 3::7], inputs.v[:, 3::7] = NAN, math.inf
    for a, b in zip(attend(inputs, tokens), want, strict=True):  # its values are summed in another order
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_seen_nan_is_not_hidden() -> None:
    inputs = MLA.make()
    tokens = token_mask(inputs, draw_indices(inputs, 20, "random"))
    inputs.v[:, 5] = NAN
    out, _ = attend(inputs, tokens)
    assert torch.equal(out.isnan().any(-1).any(-1), tokens.to_bool()[..., 5])


def test_chunks_have_the_bits_of_the_whole() -> None:
    inputs = replace(MLA, lengths=((300, 300),)).make()
    indices = rows_of(inputs, draw_indices(inputs, 40, "random"))
    whole = masked_mha(inputs.q, inputs.k, inputs.v, indices)
    parts = []
    for a, b in ((0, 128), (128, 256), (256, 300)):
        chosen = torch.where(indices[:, a:b] < b, indices[:, a:b], -1)  # what comes later is no key of this call
        parts.append(masked_mha(inputs.q[:, a:b], inputs.k[:, :b], inputs.v[:, :b], chosen, max_dense_seqlen=0))
    assert torch.equal(torch.cat(parts, 1), whole)


# --- masked_mha -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("causal", [True, False])
def test_masked_mha(layout: str, causal: bool) -> None:
    lengths = {BATCHED: ((150, 300),) * 2, PAGED: CHUNKS}.get(layout, RAGGED)
    inputs = replace(MLA, lengths=lengths, layout=layout, causal=causal).make()
    indices = draw_indices(inputs, 37, "random")
    rows = rows_of(inputs, indices)
    where = {"causal": causal, **inputs.layout}
    out, lse, info = masked_mha(inputs.q, inputs.k, inputs.v, rows, return_lse=True, return_info=True, **where)
    check_attention(inputs, out, lse, tokens=key_sets(inputs, indices))
    assert info.token_mask is not None and info.mask is not None and info.dense_reason is None
    mask = token_mask(inputs, indices)
    assert torch.equal(info.token_mask.words, mask.words)
    for again in (
        masked_mha(inputs.q, inputs.k, inputs.v, mask, **where),
        masked_mha(inputs.q, inputs.k, inputs.v, rows, out=torch.full_like(out, NAN), **where),
        inputs.run(TokenTopK(rows)),
        inputs.run(TokenTopK(mask)),
    ):
        assert torch.equal(again, out)


def test_flat_indices_of_batched_queries() -> None:
    inputs = replace(MLA, lengths=((150, 300),) * 2).make()
    rows = rows_of(inputs, draw_indices(inputs, 37, "random"))
    a = masked_mha(inputs.q, inputs.k, inputs.v, rows.flatten(0, 1))
    assert torch.equal(a, masked_mha(inputs.q, inputs.k, inputs.v, rows))


def test_dense_up_to_topk() -> None:
    """As many indices as keys: all are chosen, whatever the padding says; one fewer, and the sets count."""
    inputs = replace(MLA, lengths=((100, 100),)).make()
    dense = inputs.attend(None)[0]
    for topk, masked in ((100, False), (101, False), (99, True)):
        rows = rows_of(inputs, draw_indices(inputs, topk, "none"))
        out, info = masked_mha(inputs.q, inputs.k, inputs.v, rows, return_info=True)
        assert torch.equal(out, torch.zeros_like(out) if masked else dense)
        assert (info.mask is None) == (not masked) == (info.token_mask is None)
        assert (info.dense_reason is None) == masked
    rows = rows_of(inputs, draw_indices(inputs, 100, "none"))
    for options in ({"max_dense_seqlen": 0}, {"max_dense_seqlen": 99}, {"causal": False}):
        assert masked_mha(inputs.q, inputs.k, inputs.v, rows, **options).abs().max() == 0
    mask = token_mask(inputs, draw_indices(inputs, 100, "none"))
    assert masked_mha(inputs.q, inputs.k, inputs.v, mask).abs().max() == 0
    few = rows_of(inputs, draw_indices(inputs, 5, "none"))
    assert torch.equal(masked_mha(inputs.q, inputs.k, inputs.v, few, max_dense_seqlen=100), dense)


def test_beyond() -> None:
    inputs = MLA.make()
    rows = rows_of(inputs, draw_indices(inputs, 20, "random"))
    want = masked_mha(inputs.q, inputs.k, inputs.v, rows, max_masked_seqlen=300)
    with pytest.raises(UnsupportedError, match=r"300 keys is longer than max_masked_seqlen = 299.*beyond=\"masked\""):
        masked_mha(inputs.q, inputs.k, inputs.v, rows, max_masked_seqlen=299)
    got = masked_mha(inputs.q, inputs.k, inputs.v, rows, max_masked_seqlen=299, beyond="masked")
    assert torch.equal(got, want)
    long = torch.zeros(1, MAX_MASKED_SEQLEN + 1, 1, 8)
    with pytest.raises(UnsupportedError, match=f"max_masked_seqlen = {MAX_MASKED_SEQLEN}"):
        masked_mha(long[:, :3], long, long, torch.zeros(1, 3, 5, dtype=torch.int32))


@pytest.mark.parametrize("topk", [20, 400])
def test_invalid_indices(topk: int) -> None:
    """Also where the call is dense, and does not need them."""
    inputs = MLA.make()
    indices = draw_indices(inputs, topk, "random")
    indices[0][7, 3] = 300
    rows = rows_of(inputs, indices)
    for options in ({}, {"check": True}):
        with pytest.raises(ValueError, match=r"topk_indices\[0, 7, 3\] = 300 is out of range"):
            masked_mha(inputs.q, inputs.k, inputs.v, rows, **options)
    options = {"check": False, "max_dense_seqlen": 0, "return_info": True}
    _, info = masked_mha(inputs.q, inputs.k, inputs.v, rows, **options)
    with pytest.raises(ValueError, match="1 of the indices"):
        info.token_mask.check()


def rows(**changes: Any) -> Callable[..., Any]:
    """A call of masked_mha with some arguments changed."""

    def call() -> Any:
        inputs = MLA.make()
        chosen = rows_of(inputs, draw_indices(inputs, 20, "random"))
        arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "topk_indices": chosen, **changes}
        return masked_mha(**arguments)

    return call


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topk_indices": torch.zeros(1, 150, 3)}, TypeError, "topk_indices must be int32"),
        ({"topk_indices": torch.zeros(1, 149, 3, dtype=torch.int32)}, ValueError, r"must be \[1, 150, topk\]"),
        ({"topk_indices": [1]}, TypeError, "a tensor or a TokenMask"),
        ({"topk_indices": TokenMask.from_bool(torch.ones(1, 150, 299, dtype=torch.bool))}, ValueError, "does not fit"),
        ({"topk_indices": TokenMask.from_bool(torch.ones(2, 150, 300, dtype=torch.bool))}, ValueError, "does not fit"),
        ({"causal": False, "topk_indices": TokenMask.from_bool(torch.ones(1, 150, 300).bool())}, ValueError, "not fit"),
        ({"beyond": "dense"}, ValueError, "beyond must be one of error, masked"),
        ({"max_masked_seqlen": -1}, ValueError, "max_masked_seqlen must not be negative"),
        ({"max_dense_seqlen": 1.5}, TypeError, "max_dense_seqlen must be an int"),
        ({"check": "yes"}, TypeError, "check must be a bool"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"out": torch.zeros(1, 150, 2, 192)}, ValueError, "out must have shape"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rows(**changes)()


# --- the policy -------------------------------------------------------------------------------------------------------


def policy_of(inputs: Inputs) -> TokenTopK:
    return TokenTopK(rows_of(inputs, draw_indices(inputs, 20, "random")))


def test_decode_steps_are_masked_too() -> None:
    inputs = replace(MLA, lengths=((1, 300),)).make()
    indices = draw_indices(inputs, 20, "random")
    out, lse, info = inputs.run(TokenTopK(rows_of(inputs, indices)), return_lse=True, return_info=True)
    check_attention(inputs, out, lse, tokens=key_sets(inputs, indices))
    assert info.dense_reason is None and float(info.density()) <= 1.0


def test_as_a_selection() -> None:
    inputs = replace(MLA, lengths=CHUNKS, layout=PAGED).make()
    indices = draw_indices(inputs, 3, "local")
    policy = TokenTopK(rows_of(inputs, indices))
    got = bsfa.select_blocks(inputs.q, None, policy, **inputs.layout_select)
    want = token_mask(inputs, indices).blocks
    assert torch.equal(got.words, want.words) and torch.equal(got.counts, want.counts)
    assert int(got.counts.sum()) < int(got.geometry.visible_blocks().sum())


def test_one_mask_serves_other_layouts_of_its_lengths() -> None:
    """Made for lengths known on the host, used with pages, and the other way round: rows differ, tiles do not."""
    case = replace(MLA, lengths=((141, 300),) * 2)
    batched, paged = case.make(), replace(case, layout=PAGED).make()
    indices = draw_indices(batched, 20, "random")
    out = attend(batched, token_mask(batched, indices))[0]
    assert torch.equal(attend(paged, token_mask(batched, indices))[0], out)
    assert torch.equal(attend(batched, token_mask(paged, indices))[0], out)


def test_refusals() -> None:
    inputs = MLA.make()
    policy = policy_of(inputs)
    tokens = token_mask(inputs, draw_indices(inputs, 20, "random"))
    with pytest.raises(ValueError, match="token mask cannot be combined with window_left"):
        inputs.run(policy, window_left=5)
    with pytest.raises(ValueError, match="token mask cannot be combined with mean correction"):
        inputs.run(policy, mean_correction=True)
    for composed in (Union, Intersection):
        with pytest.raises(ValueError, match="TokenTopK chooses keys of single queries"):
            composed(StaticPattern(), policy)
    with pytest.raises(ValueError, match="within cannot be a TokenTopK"):
        ExactSkip(within=policy)
    with pytest.raises(ValueError, match="cannot be combined with ExactSkip"):
        bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, None, tokens=tokens, skip=ExactSkip(ratio=0.1))
    with pytest.raises(TypeError, match="tokens must be a"):
        bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, None, tokens=tokens.words)
    with pytest.raises(TypeError, match="indices must be int32"):
        TokenTopK(torch.zeros(1, 2, 3))
    with pytest.raises(TypeError, match="a tensor or a TokenMask"):
        TokenTopK([1])
    with pytest.raises(ValueError, match="must be"):
        replace(MLA, lengths=((149, 300),)).make().run(policy)


# --- merge_attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [BATCHED, PACKED])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_context_in_chunks(layout: str, dtype: torch.dtype) -> None:
    """Context chunks without causality, then the new tokens, merged one by one: the whole, with every key once."""
    lengths = ((90, 300), (90, 300)) if layout == BATCHED else ((90, 300), (40, 260))
    inputs = replace(MLA, lengths=lengths, layout=layout, dtype=dtype).make()
    indices = draw_indices(inputs, 40, "holes")
    merged: tuple[Tensor, Tensor] | None = None
    for first, end in ((0, 128), (128, 200), (200, 300)):
        part = inputs.case.make()
        last = end == 300
        part.case = replace(inputs.case, causal=last, lengths=tuple((q, min(end, k) - first) for q, k in lengths))
        part.keys = [x[first:end] for x in inputs.keys]
        part.values = [x[first:end] for x in inputs.values]
        part.lay_out()
        chosen = []
        for x, (q, k) in zip(indices, lengths, strict=True):
            mine = (x >= first) & (x < end) & (x <= (k - q + np.arange(q))[:, None])
            chosen.append(np.where(mine, x - first, -1).astype(np.int32))
        rows = rows_of(part, chosen)
        found = masked_mha(
            part.q, part.k, part.v, rows, causal=last, max_dense_seqlen=0, return_lse=True, **part.layout
        )
        merged = found if merged is None else merge_attention(*merged, *found)
    assert merged is not None
    if dtype == F32:
        check_attention(inputs, *merged, tokens=key_sets(inputs, indices), lse_constant=4e-6)
    whole, lse = attend(inputs, token_mask(inputs, indices))  # parts are rounded before they are merged
    unit = ROUNDING.get(dtype, 1e-6)
    torch.testing.assert_close(merged[0], whole, rtol=4 * unit, atol=4 * unit)
    torch.testing.assert_close(merged[1], lse, rtol=1e-5, atol=1e-5)


def test_merge_of_parts_that_saw_nothing() -> None:
    out = torch.randn(2, 3, 4, 5).to(BF16)
    lse = torch.randn(2, 4, 3)
    nothing, garbage = torch.full_like(lse, -math.inf), torch.full_like(out, NAN)
    for a, b in (((out, lse), (garbage, nothing)), ((garbage, nothing), (out, lse))):
        merged, total = merge_attention(*a, *b)
        assert torch.equal(merged, out) and torch.equal(total, lse) and merged.dtype == BF16
    merged, total = merge_attention(garbage, nothing, garbage, nothing)
    assert torch.equal(merged, torch.zeros_like(out)) and torch.equal(total, nothing)


def test_merge_keeps_nan_and_large_values() -> None:
    out = torch.ones(3, 2, 4)
    lse = torch.full((2, 3), 1e4)
    merged, total = merge_attention(out, lse, 3 * out, lse)
    assert torch.allclose(merged, 2 * out) and torch.allclose(total, lse + math.log(2))
    merged, _ = merge_attention(out, lse, out, torch.full_like(lse, NAN))
    assert bool(merged.isnan().all())
    merged, _ = merge_attention(torch.full_like(out, NAN), lse, out, lse)
    assert bool(merged.isnan().all())


OUT, LSE = torch.zeros(3, 2, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((OUT, LSE, OUT.half(), LSE), TypeError, "one floating-point dtype"),
        ((OUT, LSE.double(), OUT, LSE), TypeError, "must be float32"),
        ((OUT, LSE, OUT[:2], LSE), ValueError, "of one shape"),
        ((OUT, LSE.T, OUT, LSE), ValueError, r"lse_a must have shape \(2, 3\)"),
        ((OUT, LSE, OUT, None), TypeError, "lse_b must be a torch.Tensor"),
        ((OUT[0], LSE, OUT[0], LSE), ValueError, "of one shape"),
    ],
)
def test_merge_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge_attention(*arguments)


# --- operator, compiled graphs ----------------------------------------------------------------------------------------


def words_of(inputs: Inputs) -> Tensor:
    return token_mask(inputs, draw_indices(inputs, 20, "random")).words


def raw(inputs: Inputs, words: Tensor, **changes: Any) -> tuple[Any, ...]:
    """Arguments of the operator."""
    values = {
        "lengths": (inputs.cu_q, inputs.cu_k, inputs.block_table, inputs.seqlens_k, inputs.max_q, inputs.max_k),
        "mask": (None, None, None, None, 128, 128),
        "causal": True,
        "scale": 0.1,
        "softcap": 0.0,
        "window_left": -1,
        **changes,
    }
    flat = (*values["lengths"], *values["mask"], *(values[x] for x in ("causal", "scale", "softcap", "window_left")))
    return (inputs.q, inputs.k, inputs.v, *flat, words)


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED_PACKED])
def test_opcheck(layout: str) -> None:
    inputs = replace(MLA, lengths=((70, 140), (70, 140)), layout=layout, page_size=70, dim=24, dim_v=16).make()
    arguments = raw(inputs, words_of(inputs))
    torch.library.opcheck(torch.ops.bsfa.attention.default, arguments)
    out = torch.zeros((*inputs.q.shape[:-1], 16))
    torch.library.opcheck(torch.ops.bsfa.attention_out.default, (out, *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.long(), "token_words must be int32"),
        (lambda w: w[0], "beside packed q"),
        (lambda w: w[:, :-1], "the rows of q"),
        (lambda w: w[..., :-4], "a multiple of 4"),
        (lambda w: w[..., :-1], "a multiple of 4"),
        (lambda w: torch.cat([w, w], -1)[..., 2 : 2 + w.shape[-1]], "multiples of 16 bytes"),
        (lambda w: torch.cat([w, w[..., :1]], -1)[..., : w.shape[-1]], "multiples of 16 bytes"),
        (lambda w: w.mT.contiguous().mT, "contiguous in its last dimension"),
    ],
)
def test_the_operator_guards_its_memory(change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = MLA.make()
    words = words_of(inputs)
    torch.ops.bsfa.attention(*raw(inputs, words))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bsfa.attention(*raw(inputs, change(words)))
    with pytest.raises(RuntimeError, match="neither means nor window_left"):
        torch.ops.bsfa.attention(*raw(inputs, words, window_left=3))


def test_words_may_be_strided() -> None:
    inputs = replace(MLA, lengths=((150, 300),) * 2).make()
    words = words_of(inputs)
    wide = torch.full((2, 300, words.shape[-1] + 8), -1, dtype=torch.int32)
    wide[:, ::2, 4:-4] = words
    want = torch.ops.bsfa.attention(*raw(inputs, words))
    for a, b in zip(torch.ops.bsfa.attention(*raw(inputs, wide[:, ::2, 4:-4])), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED_PACKED])
def test_compiles(layout: str) -> None:
    inputs = replace(MLA, lengths=((70, 140), (70, 140)), layout=layout, page_size=70, dim=24, dim_v=16).make()
    chosen = rows_of(inputs, draw_indices(inputs, 20, "random"))

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        out, lse, info = masked_mha(q, k, v, chosen, return_lse=True, return_info=True, **inputs.layout)
        return (*merge_attention(out, lse, out, lse - 1), info.density(), info.token_mask.invalid)

    arguments = (inputs.q, inputs.k, inputs.v, chosen)
    for a, b in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments), run(*arguments), strict=True):
        assert torch.equal(a, b)


def test_visible_sets_are_what_is_kept() -> None:
    """Blocks without a key of any row are not computed: hidden or not, they are not in the mask."""
    inputs = replace(MLA, lengths=((300, 900),)).make()
    indices = draw_indices(inputs, 20, "local")
    tokens = token_mask(inputs, indices)
    named = visible_sets(inputs, indices)[0]
    assert float(tokens.blocks.density()) < 0.7 and named.any()
    inputs.k[:, 200:400], inputs.v[:, 200:400] = NAN, NAN
    out, lse = attend(inputs, tokens)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
