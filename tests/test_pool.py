"""Block means against the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsfa
import oracle
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, assert_within, poison, square, table

LENGTHS = ((0, 0), (0, 1), (0, 127), (0, 128), (0, 129), (0, 0), (0, 384), (0, 517), (0, 0))

CASES = [
    *table(Case(), lengths=square(0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300), dtype=[F32, BF16, F16]),
    *table(
        Case(lengths=square(301)[0], hkv=3, hq=3), dim=[1, 3, 8, 40, 64, 80, 128, 192, 255, 256], dtype=[F32, BF16, F16]
    ),
    *table(Case(lengths=square(1300)[0]), block_n=[1, 3, 16, 64, 100, 127, 128, 256, 1024, 4096]),
    *table(Case(lengths=LENGTHS, hkv=2), layout=[PACKED, PAGED_PACKED], dtype=[F32, BF16, F16]),
    *table(
        Case(lengths=LENGTHS, hkv=2, layout=PAGED_PACKED),
        page_size=[*range(1, 21), 32, 64, 128, 256],
        dtype=[F32, BF16],
    ),
    *table(Case(lengths=LENGTHS, hkv=2), layout=[PACKED, PAGED_PACKED], strides=["interleaved", "head-major", "gaps"]),
    *table(
        Case(lengths=((0, 300), (0, 300)), hkv=2), strides=["interleaved", "head-major", "gaps"], dtype=[F32, BF16, F16]
    ),
]


def check(case: Case) -> None:
    case = replace(case, hq=case.hkv)
    inputs = case.make()
    blocks = oracle.num_blocks(inputs.max_k, case.block_n)
    shape = (len(inputs), blocks, case.hkv, case.dim)
    poison(shape, dtype=case.dtype)
    out = bsfa.pool_blocks(inputs.k, block_n=case.block_n, **inputs.layout_k)
    assert tuple(out.shape) == shape and out.dtype == case.dtype and out.is_contiguous()
    for b, keys in enumerate(inputs.keys):
        want = oracle.block_means(keys.double().numpy(), case.block_n)
        low = [block.mean(0).double().numpy() for block in keys.split(case.block_n)] if len(keys) else []
        got = out[b].double().numpy()
        yardstick = np.stack(low) if low else want
        assert_within(got[: len(want)], want, yardstick, 1e-6 if case.dtype == F32 else 1e-5, f"means of sequence {b}")
        assert (got[len(want) :] == 0).all(), "blocks past the end must be zeros"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_means(case: Case) -> None:
    check(case)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    layout=st.sampled_from([BATCHED, PACKED, PAGED, PAGED_PACKED]),
    page_size=st.integers(1, 70),
    block_n=st.integers(1, 200),
    hkv=st.integers(1, 3),
    dim=st.integers(1, 70),
    strides=st.sampled_from(["plain", "interleaved", "head-major", "gaps"]),
    dtype=st.sampled_from([F32, BF16, F16]),
)
def test_any_layout(lengths: list[int], layout: str, **fields: object) -> None:
    if layout == BATCHED:
        lengths = lengths[:1] * len(lengths)
    check(Case(lengths=tuple((0, n) for n in lengths), layout=layout, **fields))  # type: ignore[arg-type]


def test_default_max_seqlen_is_what_the_table_holds() -> None:
    inputs = Case(lengths=((0, 100), (0, 20)), layout=PAGED_PACKED).make()
    assert inputs.block_table is not None and inputs.seqlens_k is not None
    capacity = inputs.block_table.shape[1] * 16
    out = bsfa.pool_blocks(inputs.k, block_n=64, block_table=inputs.block_table, seqlens_k=inputs.seqlens_k)
    assert out.shape[1] == -(-capacity // 64)
    assert (out[:, 2:] == 0).all() and (out[1, 1:] == 0).all() and out.isfinite().all()


def test_same_bits_in_every_layout_and_with_other_threads() -> None:
    case = Case(lengths=((0, 300), (0, 300)), hkv=2, hq=2, dtype=BF16)
    want = bsfa.pool_blocks(case.make().k, block_n=64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for layout in (BATCHED, PACKED, PAGED):
                inputs = replace(case, layout=layout, page_size=7, strides="gaps").make()
                assert torch.equal(bsfa.pool_blocks(inputs.k, block_n=64, **inputs.layout_k), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_non_finite_keys_stay_in_their_block(value: float) -> None:
    inputs = Case(lengths=((0, 200),), hkv=2, hq=2).make()
    clean = bsfa.pool_blocks(inputs.k, block_n=64)
    inputs.k[0, 130, 1, 5] = value
    out = bsfa.pool_blocks(inputs.k, block_n=64)
    assert out[0, 2, 1, 5].isnan() if np.isnan(value) else out[0, 2, 1, 5] == value
    out[0, 2, 1, 5] = clean[0, 2, 1, 5]
    assert torch.equal(out, clean)


def test_large_float16_keys_do_not_overflow() -> None:
    k = torch.full((1, 300, 1, 8), 60000.0, dtype=F16)
    assert (bsfa.pool_blocks(k, block_n=128) == 60000.0).all()


def test_offsets_beyond_2_31_elements() -> None:
    """The second sequence starts 2**31 elements after the first: address space only, no memory is touched between."""
    storage = torch.UntypedStorage(2 * (2**31 + 2**16))  # bytes; untouched pages cost nothing
    k = torch.tensor([], dtype=BF16).set_(storage, 0, (2, 100, 2, 64), (2**31, 128, 64, 1))
    k.copy_(torch.randn(2, 100, 2, 64))
    want = bsfa.pool_blocks(k.contiguous(), block_n=64)
    assert torch.equal(bsfa.pool_blocks(k, block_n=64), want)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    paged = bsfa.pool_blocks(k, block_n=64, block_table=table, seqlens_k=torch.tensor([100, 100], dtype=torch.int32))
    assert torch.equal(paged, want.flip(0))
