"""Token masks on CUDA: built against numpy, attended with against float64; MLA head dims, dense and block-sparse."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
from bsfa import TokenMask, UnsupportedError, masked_mha, merge_attention
from bsfa.policies import StaticPattern, TokenTopK
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
    check_attention,
    poison,
    square,
    table,
)
from token_cases import (
    ATTENDED,
    CHUNKS,
    KINDS,
    LAYOUTS,
    LENGTHS,
    RAGGED,
    attend,
    block_sets,
    check_blocks,
    check_mask,
    draw_indices,
    key_sets,
    kind_of,
    rows_of,
    token_mask,
    visible_sets,
)

#: "cpu" runs all but the tests of CUDA itself on the CPU kernels, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda":
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device", allow_module_level=True)
    if "token_mask" not in bsfa._library.KERNELS["cuda"]:
        pytest.skip("this build has no token_mask on CUDA", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")

#: The kernel's exponentials, logarithms and sums are float32, in another order than torch's.
LSE_CONSTANT = 1e-5

MLA = Case(lengths=((150, 300),), hq=2, hkv=2, dim=192, dim_v=128, dtype=BF16, block_m=128, block_n=128)
TWINS = ((141, 300), (141, 300))
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)
PREFIXES = ((1, 64), (1, 300), (5, 133), (63, 129), (127, 300), (128, 256), (129, 257), (100, 37), (130, 1), (70, 0))


def poisoned(inputs: Inputs) -> None:
    """NaN where the results are likely to be put."""
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=inputs.case.dtype, device=DEVICE)
    poison(inputs.q.shape[:-1], device=DEVICE)


def run(inputs: Inputs, indices: list[np.ndarray], masks: list[np.ndarray] | None = None) -> tuple[Tensor, ...]:
    """(out, lse) on the device."""
    there = inputs.to(DEVICE)
    tokens = token_mask(there, indices)
    mask = None if masks is None else there.block_mask(masks)
    poisoned(inputs)
    return attend(there, tokens, mask)


def check(case: Case, kind: str | None = None, topk: int = 37, masks: list[np.ndarray] | None = None) -> None:
    inputs = case.make()
    indices = draw_indices(inputs, topk, kind or kind_of(case))
    out, lse = run(inputs, indices, masks)
    check_attention(inputs, out, lse, masks, LSE_CONSTANT, tokens=key_sets(inputs, indices))


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LENGTHS + LAYOUTS, ids=str)
def test_built_from_indices(case: Case) -> None:
    inputs = case.make()
    indices = draw_indices(inputs, 37, kind_of(case))
    poison((sum(q for q, _ in case.lengths), 12), device=DEVICE)
    check_mask(inputs, token_mask(inputs.to(DEVICE), indices), visible_sets(inputs, indices))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [0, 1, 4, 63, 64, 400, 2048])  # rows on 16 bytes and not
def test_built_of_any_kind(kind: str, topk: int) -> None:
    inputs = Case(lengths=RAGGED, layout=PACKED, dim=8, hq=1, hkv=1).make()
    indices = draw_indices(inputs, topk, kind)
    check_mask(inputs, token_mask(inputs.to(DEVICE), indices), visible_sets(inputs, indices))


@pytest.mark.parametrize("seqlen_k", [4096, 32_767, 32_769, 70_000, 140_000])
def test_built_of_many_keys(seqlen_k: int) -> None:
    """Rows of one word of blocks and more, of one pass and more."""
    inputs = Case(lengths=((130, seqlen_k),), hq=1, hkv=1, dim=8).make()
    indices = draw_indices(inputs, 2048, "random")
    check_mask(inputs, token_mask(inputs.to(DEVICE), indices), visible_sets(inputs, indices))


def test_built_of_many_sequences() -> None:
    rng = random.Random(3)
    lengths = [(rng.choice((0, 1, rng.randint(0, 150))), rng.choice((0, 1, rng.randint(0, 200)))) for _ in range(1500)]
    inputs = Case(lengths=tuple(lengths), layout=PAGED_PACKED, page_size=64, hq=1, hkv=1, dim=8).make()
    indices = draw_indices(inputs, 7, "random")
    check_mask(inputs, token_mask(inputs.to(DEVICE), indices), visible_sets(inputs, indices))


@pytest.mark.parametrize("first", [0, 1, 2, 4])
@pytest.mark.parametrize("width", [64, 66, 68])
def test_built_from_strided_indices(first: int, width: int) -> None:
    inputs = replace(MLA, lengths=TWINS).make()
    indices = draw_indices(inputs, 60, "random")
    wide = torch.full((2, 282, width), 10**9, dtype=torch.int32, device=DEVICE)
    wide[:, ::2, first : first + 60] = rows_of(inputs, indices).to(DEVICE)
    got = TokenMask.from_indices(wide[:, ::2, first : first + 60], seqlen_k=300)
    check_mask(inputs, got, visible_sets(inputs, indices))


@pytest.mark.parametrize("seqlen_k", [300, 70_000])
@pytest.mark.parametrize("value", [-2, -(2**31), "seqlen_k", 2**31 - 1])
def test_invalid_indices(seqlen_k: int, value: int | str) -> None:
    inputs = Case(lengths=((141, seqlen_k),) * 2, hq=1, hkv=1, dim=8).make()
    indices = draw_indices(inputs, 20, "random")
    for b, i, j in ((0, 140, 3), (1, 5, 19), (1, 140, 0)):
        indices[b][i, j] = seqlen_k if value == "seqlen_k" else value
    there = inputs.to(DEVICE)
    mask = token_mask(there, indices, False)
    assert mask.invalid.item() == 3 and int(mask.status[1]) == 140 * 20 + 3
    with pytest.raises(ValueError, match=f"3 of the indices .* element {140 * 20 + 3} "):
        mask.check()
    with pytest.raises(ValueError, match=r"topk_indices\[0, 140, 3\] = .* row 140 "):
        token_mask(there, indices, True)
    for b, named in enumerate(visible_sets(inputs, indices)):  # they select nothing
        assert np.array_equal(mask.to_bool()[b].cpu().numpy(), named)


def test_invalid_without_keys() -> None:
    rows = torch.tensor([[[0, -1]]], dtype=torch.int32, device=DEVICE)
    mask = TokenMask.from_indices(rows, seqlen_k=0, check=False)
    assert mask.invalid.item() == 1 and mask.counts.tolist() == [[0]]


@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
def test_conversions(layout: str) -> None:
    inputs = Case(lengths=RAGGED, layout=layout, dim=8).make()
    indices = draw_indices(inputs, 5, "holes")
    there = inputs.to(DEVICE)
    mask = token_mask(there, indices)
    again = TokenMask.from_bool(mask.to_bool(), **there.layout_select)
    assert torch.equal(again.words, mask.words) and torch.equal(again.blocks.words, mask.blocks.words)
    sets = visible_sets(inputs, indices)
    check_blocks(inputs, mask.block_mask(64, 32), [block_sets(inputs, b, x, 64, 32) for b, x in enumerate(sets)])
    check_mask(inputs, mask.to("cpu"), sets)


@cuda_only
def test_building_does_not_synchronise_and_is_captured() -> None:
    inputs = replace(MLA, lengths=RAGGED, layout=PACKED).make()
    indices = draw_indices(inputs, 40, "random")
    there = inputs.to(DEVICE)
    rows = rows_of(there, indices)
    torch.cuda.set_sync_debug_mode("error")
    try:
        TokenMask.from_indices(rows, **there.layout_select)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = TokenMask.from_indices(rows, **there.layout_select)
        out = bsfa.block_sparse_attention(there.q, there.k, there.v, None, tokens=mask, **there.layout)[0]
    other = draw_indices(inputs, 40, "local")
    rows.copy_(rows_of(there, other))
    for _ in range(2):
        graph.replay()
    check_mask(inputs, mask, visible_sets(inputs, other))
    assert torch.equal(out, attend(there, token_mask(there, other))[0])


# --- dense and block-sparse at the head dims of MLA -------------------------------------------------------------------

DENSE = [
    *table(MLA, lengths=square(*EDGES), causal=[True, False], dtype=[BF16, F16]),
    *table(MLA, lengths=[(pair,) for pair in PREFIXES], causal=[True, False]),
    *table(replace(MLA, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False], dtype=[BF16, F16]),
    *table(replace(MLA, lengths=CHUNKS, layout=PAGED), page_size=[1, 3, 16, 48, 64, 128, 256], mask=["none", "random"]),
    *table(replace(MLA, lengths=TWINS), strides=["head-major", "wide-gaps"], layout=[BATCHED, PACKED, PAGED]),
    *table(replace(MLA, lengths=((300, 700),)), mask=["random", "sparse", "all", "diagonal"], mask_heads=["q", "one"]),
    *table(replace(MLA, lengths=((150, 300),)), softcap=[0.0, 5.0], scale=[None, 1.0, -0.3], mask=["none", "random"]),
    *table(replace(MLA, lengths=((141, 270),), mask="random"), hq=[4, 16], hkv=[1, 2]),
    *table(replace(MLA, lengths=((300, 5000),), hq=1, hkv=1), mask=["none", "sparse"]),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_mla_without_token_masks(case: Case) -> None:
    inputs = case.make()
    masks = None if case.mask == "none" else [inputs.draw_mask(b) for b in range(len(inputs))]
    there = inputs.to(DEVICE)
    poisoned(inputs)
    out, lse = there.attend(None if masks is None else there.block_mask(masks))
    check_attention(inputs, out, lse, masks, LSE_CONSTANT)


# --- token masks ------------------------------------------------------------------------------------------------------

HALF = [replace(case, dtype=BF16 if case.dtype == F32 else case.dtype) for case in ATTENDED]
MASKED = [
    *dict.fromkeys(HALF),
    *table(MLA, lengths=square(*EDGES), dim=[192], dtype=[F16]),
    *table(replace(MLA, lengths=CHUNKS, layout=PAGED), page_size=[3, 64, 256], causal=[True, False]),
    *table(replace(MLA, lengths=TWINS), strides=["head-major", "wide-gaps"], layout=[BATCHED, PACKED, PAGED]),
    *table(replace(MLA, lengths=((200, 400),)), hq=[4, 16], hkv=[1, 2, 4]),
    *table(replace(MLA, lengths=((1300, 1300),) * 2, hq=8, hkv=8), dim=[192]),  # more than a GPU has multiprocessors
    replace(MLA, lengths=((140, 33_000),), hq=1, hkv=1),
]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_attention(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
@pytest.mark.parametrize("dims", [(192, 128), (128, 128), (64, 64)], ids=str)
def test_kinds_of_sets(kind: str, layout: str, dims: tuple[int, int]) -> None:
    check(replace(MLA, lengths=RAGGED, layout=layout, dim=dims[0], dim_v=dims[1]), kind, 20)


@pytest.mark.parametrize("heads", ["q", "kv", "one"])
@pytest.mark.parametrize("mask", ["random", "mixed", "empty", "all"])
@pytest.mark.parametrize("dims", [(192, 128), (128, 128), (64, 64)], ids=str)
def test_with_a_block_mask(heads: str, mask: str, dims: tuple[int, int]) -> None:
    case = replace(MLA, lengths=((200, 390),), hq=4, hkv=2, dim=dims[0], dim_v=dims[1], mask=mask, mask_heads=heads)
    check(case, "random", 60, [case.make().draw_mask(0)])


@pytest.mark.parametrize("dims", [(192, 128), (128, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_all_keys_are_dense_attention_bit_by_bit(dims: tuple[int, int], causal: bool) -> None:
    inputs = replace(MLA, lengths=((300, 300),), dim=dims[0], dim_v=dims[1], causal=causal).make()
    dense = inputs.to(DEVICE).attend(None)
    for a, b in zip(run(inputs, draw_indices(inputs, 300, "all")), dense, strict=True):
        assert torch.equal(a, b)


def test_chunks_have_the_bits_of_the_whole() -> None:
    inputs = replace(MLA, lengths=((300, 300),)).make().to(DEVICE)
    indices = rows_of(inputs, draw_indices(inputs, 40, "random"))
    whole = masked_mha(inputs.q, inputs.k, inputs.v, indices)
    parts = []
    for a, b in ((0, 128), (128, 256), (256, 300)):
        chosen = torch.where(indices[:, a:b] < b, indices[:, a:b], -1)
        parts.append(masked_mha(inputs.q[:, a:b], inputs.k[:, :b], inputs.v[:, :b], chosen, max_dense_seqlen=0))
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("layout", [PACKED, PAGED, PAGED_PACKED])
def test_layouts_have_the_same_bits(layout: str) -> None:
    plain = replace(MLA, lengths=TWINS).make()
    other = replace(MLA, lengths=TWINS, layout=layout, page_size=24).make()
    indices = draw_indices(plain, 40, "random")
    want, want_lse = run(plain, indices)
    out, lse = run(other, indices)
    for b in range(len(plain)):
        assert torch.equal(other.of_sequence(out, b), want[b])
        assert torch.equal(other.lse_of_sequence(lse, b), want_lse[b])


def random_case(seed: int) -> tuple[Case, str, int]:
    rng = random.Random(seed)

    def length() -> int:
        return rng.choice((rng.choice((0, *EDGES)), rng.randint(0, 600)))

    layout = rng.choice([BATCHED, PACKED, PAGED, PAGED_PACKED])
    lengths = [(length(), length()) for _ in range(rng.randint(1, 4))]
    if layout == BATCHED:
        lengths = [lengths[0]] * len(lengths)
    elif layout == PAGED:
        lengths = [(lengths[0][0], n) for _, n in lengths]
    hkv = rng.choice((1, 2, 3))
    dim, dim_v = rng.choice(((192, 128), (192, 128), (128, 128), (64, 64)))
    case = Case(
        lengths=tuple(lengths),
        layout=layout,
        page_size=rng.choice((1, 8, 16, 64, 128, 256, rng.randint(1, 200))),
        strides=rng.choice(("plain", "head-major", "wide-gaps")),
        hq=hkv * rng.choice((1, 2, 3)),
        hkv=hkv,
        dim=dim,
        dim_v=dim_v,
        dtype=rng.choice((BF16, F16)),
        causal=rng.random() < 0.8,
        softcap=rng.choice((0.0, 0.0, 10.0)),
        block_m=128,
        block_n=128,
        seed=seed,
    )
    return case, rng.choice(KINDS), rng.choice((1, 5, 64, 500))


@pytest.mark.parametrize("seed", range(80))
def test_random_cases(seed: int) -> None:
    """Against the oracle; the same bits again; and against the CPU kernel."""
    case, kind, topk = random_case(seed)
    inputs = case.make()
    indices = draw_indices(inputs, topk, kind)
    out, lse = run(inputs, indices)
    check_attention(inputs, out, lse, lse_constant=LSE_CONSTANT, tokens=key_sets(inputs, indices))
    again, lse_again = run(inputs, indices)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    other, lse_other = attend(inputs, token_mask(inputs, indices))
    unit = ROUNDING[case.dtype]
    torch.testing.assert_close(out.cpu().float(), other.float(), rtol=2 * unit, atol=4 * unit)
    torch.testing.assert_close(lse.cpu(), lse_other, rtol=2e-5, atol=2e-5)


# --- the functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_masked_mha_and_the_policy(layout: str) -> None:
    lengths = {BATCHED: TWINS, PAGED: CHUNKS}.get(layout, RAGGED)
    inputs = replace(MLA, lengths=lengths, layout=layout).make()
    indices = draw_indices(inputs, 37, "random")
    there = inputs.to(DEVICE)
    rows = rows_of(there, indices)
    out, lse, info = masked_mha(there.q, there.k, there.v, rows, return_lse=True, return_info=True, **there.layout)
    check_attention(inputs, out, lse, lse_constant=LSE_CONSTANT, tokens=key_sets(inputs, indices))
    assert info.token_mask.check() is info.token_mask
    given = torch.full_like(out, NAN)
    masked_mha(there.q, there.k, there.v, rows, out=given, **there.layout)
    assert torch.equal(given, out) and torch.equal(there.run(TokenTopK(rows)), out)


def test_routing() -> None:
    inputs = MLA.make().to(DEVICE)
    rows = rows_of(inputs, draw_indices(inputs, 300, "none"))
    assert torch.equal(masked_mha(inputs.q, inputs.k, inputs.v, rows), inputs.attend(None)[0])
    assert masked_mha(inputs.q, inputs.k, inputs.v, rows, max_dense_seqlen=0).abs().max() == 0
    with pytest.raises(UnsupportedError, match="max_masked_seqlen = 299"):
        masked_mha(inputs.q, inputs.k, inputs.v, rows[..., :9], max_masked_seqlen=299)
    bad = rows.clone()
    bad[0, 7, 3] = 300
    with pytest.raises(ValueError, match=r"topk_indices\[0, 7, 3\] = 300 is out of range"):
        masked_mha(inputs.q, inputs.k, inputs.v, bad, check=True)  # also where the call is dense


def test_context_in_chunks() -> None:
    inputs = replace(MLA, lengths=((90, 300),)).make()
    indices = draw_indices(inputs, 40, "holes")
    there = inputs.to(DEVICE)
    rows = rows_of(there, indices)
    rows = torch.where(rows <= torch.arange(210, 300, device=DEVICE).view(1, 90, 1), rows, -1)
    merged: Any = None
    for first, end in ((0, 128), (128, 200), (200, 300)):
        chosen = torch.where((rows >= first) & (rows < end), rows - first, -1)
        k, v = there.k[:, first:end], there.v[:, first:end]
        options = {"causal": end == 300, "max_dense_seqlen": 0, "return_lse": True}
        found = masked_mha(there.q, k, v, chosen, **options)
        merged = found if merged is None else merge_attention(*merged, *found)
    whole, lse = attend(there, token_mask(there, indices))  # parts are rounded before they are merged
    unit = ROUNDING[BF16]
    torch.testing.assert_close(merged[0], whole, rtol=4 * unit, atol=4 * unit)
    torch.testing.assert_close(merged[1], lse, rtol=2e-5, atol=2e-5)


def mha(dtype: torch.dtype = BF16, dim: int = 192, dim_v: int = 128, **options: Any) -> Callable[[], object]:
    def call() -> object:
        inputs = replace(MLA, dtype=dtype, dim=dim, dim_v=dim_v).make().to(DEVICE)
        rows = rows_of(inputs, draw_indices(inputs, 9, "random"))
        return masked_mha(inputs.q, inputs.k, inputs.v, rows, **options)

    return call


@cuda_only
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (mha(dtype=F32), "in float32"),
        (mha(dim=96, dim_v=96), "with head_dim 96"),
        (mha(dim=192, dim_v=192), r"head_dim 192: its kernels take 64, 128, 192 \(v: 128\)"),
        (mha(dim=128, dim_v=64), "head_dim 128 of q and k and 64 of v"),
    ],
)
def test_what_has_no_kernel(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        call()


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED_PACKED])
def test_opcheck(layout: str) -> None:
    inputs = replace(MLA, lengths=TWINS, layout=layout).make()
    indices = draw_indices(inputs, 20, "random")
    there = inputs.to(DEVICE)
    rows, words = rows_of(there, indices), token_mask(there, indices).words
    lengths = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k)
    num_rows = there.geometry.num_rows
    build = (rows, there.cu_q, there.cu_k, there.seqlens_k, there.max_q, there.max_k, num_rows, 128, 128, True)
    torch.library.opcheck(torch.ops.bsfa.token_mask.default, build)
    maths = (None, None, None, None, 128, 128, True, 0.1, 0.0, -1)
    torch.library.opcheck(torch.ops.bsfa.attention.default, (there.q, there.k, there.v, *lengths, *maths, words))


def test_compiles() -> None:
    inputs = replace(MLA, lengths=TWINS).make()
    rows = rows_of(inputs, draw_indices(inputs, 20, "random")).to(DEVICE)
    there = inputs.to(DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        result: Tensor = masked_mha(q, k, v, rows)
        return result

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(there.q, there.k, there.v, rows)
    assert torch.equal(got, call(there.q, there.k, there.v, rows))


def test_empty_blocks_are_not_read() -> None:
    inputs = replace(MLA, lengths=((300, 900),)).make()
    indices = draw_indices(inputs, 20, "local")
    there = inputs.to(DEVICE)
    tokens = token_mask(there, indices)
    assert float(tokens.blocks.density()) < 0.7
    there.k[:, 256:384], there.v[:, 256:384] = NAN, NAN
    out, lse = attend(there, tokens)
    check_attention(inputs, out, lse, lse_constant=LSE_CONSTANT, tokens=key_sets(inputs, indices))


@cuda_only
def test_block_sizes_of_the_gpu() -> None:
    with pytest.raises(RuntimeError, match="128 x 128"):
        rows = torch.zeros(1, 5, 3, dtype=torch.int32, device=DEVICE)
        torch.ops.bsfa.token_mask(rows, None, None, None, 5, 8, 9, 64, 128, True)
    inputs = MLA.make().to(DEVICE)
    with pytest.raises(UnsupportedError, match="64 x 128"):
        inputs.run(StaticPattern(block_m=64))
