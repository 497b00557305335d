"""TokenMask from indices and from bools, against sets of keys made in plain numpy; the operator; the errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bsfa import TokenMask
from cases import PACKED, PAGED_PACKED, Case, int32
from token_cases import (
    CHUNKS,
    KINDS,
    LAYOUTS,
    LENGTHS,
    RAGGED,
    block_sets,
    check_blocks,
    check_mask,
    draw_indices,
    kind_of,
    rows_of,
    token_mask,
    visible_sets,
)

TWINS = Case(lengths=((141, 300), (141, 300)), hq=1, hkv=1, dim=8)


@pytest.mark.parametrize("case", LENGTHS + LAYOUTS, ids=str)
def test_built_from_indices(case: Case) -> None:
    inputs = case.make()
    indices = draw_indices(inputs, 37, kind_of(case))
    check_mask(inputs, token_mask(inputs, indices), visible_sets(inputs, indices))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [0, 1, 4, 63, 400])
def test_kinds_of_sets(kind: str, topk: int) -> None:
    inputs = Case(lengths=RAGGED, layout=PACKED, dim=8).make()
    indices = draw_indices(inputs, topk, kind)
    check_mask(inputs, token_mask(inputs, indices), visible_sets(inputs, indices))


def test_strided_indices() -> None:
    inputs = TWINS.make()
    indices = draw_indices(inputs, 20, "random")
    wide = torch.full((2, 141 * 2, 23), 10**9, dtype=torch.int32)
    wide[:, ::2, 2:22] = rows_of(inputs, indices)
    got = TokenMask.from_indices(wide[:, ::2, 2:22], seqlen_k=300)
    assert torch.equal(got.words, token_mask(inputs, indices).words)


def test_twice_the_same() -> None:
    inputs = Case(lengths=RAGGED, layout=PAGED_PACKED, dim=8).make()
    indices = draw_indices(inputs, 50, "random")
    a, b = token_mask(inputs, indices), token_mask(inputs, indices)
    assert all(torch.equal(x, y) for x, y in zip((a.words, a.counts), (b.words, b.counts), strict=True))


def test_many_keys() -> None:
    """A row of many block words, as long contexts have."""
    inputs = Case(lengths=((3, 70_000),), hq=1, hkv=1, dim=1).make()
    indices = draw_indices(inputs, 2048, "random")
    check_mask(inputs, token_mask(inputs, indices), visible_sets(inputs, indices))


# --- conversions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_from_bool_is_the_inverse(case: Case) -> None:
    inputs = case.make()
    indices = draw_indices(inputs, 37, "random")
    mask = token_mask(inputs, indices)
    lengths = {k: v for k, v in inputs.layout_select.items() if k != "seqlen_k"}
    kept = mask.to_bool()
    again = TokenMask.from_bool(kept, causal=case.causal, **lengths)
    check_mask(inputs, again, visible_sets(inputs, indices))
    assert torch.equal(again.words, mask.words) and torch.equal(again.blocks.words, mask.blocks.words)
    full = TokenMask.from_bool(torch.ones_like(kept), causal=case.causal, **lengths)  # more than a row may see
    every_index = [np.tile(np.arange(max(k, 1), dtype=np.int32), (q, 1)) for q, k in case.lengths]
    check_mask(inputs, full, visible_sets(inputs, every_index))
    assert float(full.density()) == 1.0


@pytest.mark.parametrize("sizes", [(64, 64), (128, 16), (37, 53), (256, 128)], ids=str)
@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
def test_block_masks_of_other_sizes(sizes: tuple[int, int], layout: str) -> None:
    inputs = Case(lengths=RAGGED, layout=layout, dim=8).make()
    indices = draw_indices(inputs, 5, "holes")
    mask = token_mask(inputs, indices)
    sets = visible_sets(inputs, indices)
    got = mask.block_mask(*sizes)
    assert (got.block_m, got.block_n) == sizes
    check_blocks(inputs, got, [block_sets(inputs, b, named, *sizes) for b, named in enumerate(sets)])
    assert mask.block_mask() is mask.blocks


def test_density() -> None:
    mask = TokenMask.from_indices(torch.zeros(1, 10, 3, dtype=torch.int32), seqlen_k=10)
    assert float(mask.density()) == pytest.approx(10 / 55)


def test_to_the_same_device() -> None:
    mask = TokenMask.from_indices(torch.zeros(1, 10, 3, dtype=torch.int32), seqlen_k=10)
    assert mask.to("cpu") is mask
    assert "TokenMask(rows=[1, 10]" in repr(mask)


# --- what is no key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-2, -(2**31), 300, 301, 2**31 - 1])
def test_invalid_indices_raise_when_checked(value: int) -> None:
    inputs = TWINS.make()
    indices = draw_indices(inputs, 20, "random")
    indices[1][77, 13] = value
    for check in (None, True):
        with pytest.raises(ValueError, match=rf"topk_indices\[1, 77, 13\] = {value} .* row 218 .* which has 300 keys"):
            token_mask(inputs, indices, check)


@pytest.mark.parametrize("value", [-2, -(2**31), 300, 2**31 - 1])
def test_invalid_indices_are_counted_when_not_checked(value: int) -> None:
    inputs = TWINS.make()
    indices = draw_indices(inputs, 20, "random")
    sets = visible_sets(inputs, indices)
    for b, i, j in ((0, 140, 3), (1, 5, 19), (1, 140, 0)):
        indices[b][i, j] = value
    mask = token_mask(inputs, indices, False)
    assert mask.invalid.item() == 3 and mask.status[1] == 140 * 20 + 3
    with pytest.raises(ValueError, match=f"3 of the indices .* element {140 * 20 + 3} "):
        mask.check()
    for b, rows in enumerate(visible_sets(inputs, indices)):  # they select nothing
        assert np.array_equal(mask.to_bool()[b].numpy(), rows)
    assert any((a != b).any() for a, b in zip(sets, visible_sets(inputs, indices), strict=True))


def test_bounds_are_those_of_the_sequence() -> None:
    """A key that only a longer sequence has is invalid, and named by its place in the packed rows."""
    inputs = Case(lengths=((10, 10), (0, 40), (5, 300)), layout=PACKED, dim=8).make()
    indices = draw_indices(inputs, 6, "none")
    indices[0][4, 2] = 10
    with pytest.raises(ValueError, match=r"topk_indices\[4, 2\] = 10 .* sequence 0, which has 10 keys"):
        token_mask(inputs, indices)
    indices[0][4, 2] = 9
    indices[2][3, 0] = 300
    with pytest.raises(ValueError, match=r"topk_indices\[13, 0\] = 300 .* sequence 2, which has 300 keys"):
        token_mask(inputs, indices)


def test_invalid_without_keys() -> None:
    mask = TokenMask.from_indices(torch.tensor([[[0, -1]]], dtype=torch.int32), seqlen_k=0, check=False)
    assert mask.invalid.item() == 1 and mask.words.shape == (1, 1, 0) and mask.counts.tolist() == [[0]]


# --- errors -----------------------------------------------------------------------------------------------------------

INDICES = torch.zeros(2, 5, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("indices", "options", "error", "message"),
    [
        (INDICES.long(), {"seqlen_k": 9}, TypeError, "topk_indices must be int32"),
        ([[0]], {"seqlen_k": 9}, TypeError, "must be a torch.Tensor"),
        (INDICES[0], {"seqlen_k": 9}, ValueError, r"\[B, seqlen_q, \*\]"),
        (INDICES, {}, ValueError, "exactly one of seqlen_k, cu_seqlens_k and seqlens_k"),
        (INDICES, {"seqlen_k": 9, "seqlens_k": int32([9, 9])}, ValueError, "exactly one"),
        (INDICES, {"seqlens_k": int32([9, 9])}, ValueError, "need max_seqlen_k"),
        (INDICES, {"seqlens_k": int32([9, 10]), "max_seqlen_k": 9}, ValueError, "seqlens_k must be 0 .. max_seqlen_k"),
        (INDICES, {"seqlens_k": int32([9]), "max_seqlen_k": 9}, ValueError, "seqlens_k must have shape 2"),
        (INDICES, {"seqlen_k": -1}, ValueError, "seqlen_k must not be negative"),
        (INDICES, {"seqlen_k": 9, "causal": 1}, TypeError, "causal must be a bool"),
        (INDICES, {"seqlen_k": 9, "check": 1}, TypeError, "check must be a bool"),
        (INDICES, {"seqlen_k": 9, "max_seqlen_q": 4}, ValueError, "contradicts topk_indices"),
        (INDICES, {"seqlen_k": 9, "cu_seqlens_q": int32([0, 5]), "max_seqlen_q": 5}, ValueError, "total_q"),
        (INDICES[0], {"seqlen_k": 9, "cu_seqlens_q": int32([0, 5])}, ValueError, "max_seqlen_q"),
        (INDICES[0], {"seqlen_k": 9, "cu_seqlens_q": int32([0, 4]), "max_seqlen_q": 5}, ValueError, "5 tokens"),
        (INDICES.transpose(1, 2), {"seqlen_k": 9}, ValueError, "unit stride"),
    ],
)
def test_errors(indices: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenMask.from_indices(indices, **options)


def test_errors_of_from_bool() -> None:
    kept = torch.ones(2, 5, 9, dtype=torch.bool)
    with pytest.raises(TypeError, match="must be a bool tensor"):
        TokenMask.from_bool(kept.int())
    with pytest.raises(ValueError, match="kept has 9 keys, but max_seqlen_k = 8"):
        TokenMask.from_bool(kept, max_seqlen_k=8)
    with pytest.raises(ValueError, match="block_m must be 1"):
        TokenMask.from_bool(kept).block_mask(0, 1)


# --- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["batched", PACKED, "paged"])
def test_opcheck(layout: str) -> None:
    inputs = Case(lengths=CHUNKS[:1] * 2 if layout == "batched" else CHUNKS, layout=layout, dim=8).make()
    rows = rows_of(inputs, draw_indices(inputs, 9, "random"))
    num_rows = inputs.geometry.num_rows if layout != "batched" else 8
    arguments = (inputs.cu_q, inputs.cu_k, inputs.seqlens_k, inputs.max_q, inputs.max_k, num_rows + 8, 64, 32, True)
    torch.library.opcheck(torch.ops.bsfa.token_mask.default, (rows, *arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: INDICES.long()}, "int32"),
        ({0: INDICES[0]}, "int32 "),
        ({4: 6}, "max_seqlen_q"),
        ({3: int32([1, 9])}, "10 is not in|KV length"),
        ({6: 0}, "this problem needs"),
        ({7: 0}, "block_m"),
    ],
)
def test_the_operator_guards_its_memory(changes: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [INDICES, None, None, None, 5, 8, 2, 128, 128, True]
    torch.ops.bsfa.token_mask(*arguments)
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bsfa.token_mask(*arguments)


def test_compiles() -> None:
    inputs = TWINS.make()
    rows = rows_of(inputs, draw_indices(inputs, 20, "random"))

    def build(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = TokenMask.from_indices(rows, seqlen_k=300)
        return mask.words, mask.counts, mask.blocks.words, mask.invalid, mask.density()

    for a, b in zip(torch.compile(build, fullgraph=True, backend="aot_eager")(rows), build(rows), strict=True):
        assert torch.equal(a, b)
