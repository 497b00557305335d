"""The pooling modes that pick a token, on CUDA: the bits of the CPU kernels, which the oracle has checked."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import bsfa
from cases import BATCHED, BF16, F16, NAN, PACKED, PAGED, PAGED_PACKED, Case, poison, table

LENGTHS = ((0, 0), (0, 1), (0, 129), (0, 384), (0, 517))
CASES = [
    *table(Case(lengths=((0, 300), (0, 300)), hkv=2, dim=64), dtype=[BF16, F16], block_n=[1, 64, 100, 128, 4096]),
    *table(Case(lengths=((0, 300),), dtype=BF16), dim=[1, 33, 80, 128, 256], hkv=[1, 3]),
    *table(
        Case(lengths=LENGTHS, hkv=2, dim=64, dtype=BF16, block_n=128),
        layout=[PACKED, PAGED_PACKED],
        strides=["plain", "interleaved", "head-major", "gaps"],
    ),
    *table(Case(lengths=((0, 300), (0, 90)), dtype=F16, layout=PAGED, hkv=2), page_size=[1, 7, 64]),
]


@pytest.mark.parametrize("pooling", ["maxabs", "center"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_the_cpu(case: Case, pooling: str) -> None:
    inputs = case.make()
    moved = inputs.to("cuda")
    want = bsfa.pool_blocks(inputs.k, block_n=case.block_n, pooling=pooling, **inputs.layout_k)
    poison(tuple(want.shape), dtype=case.dtype, device="cuda")
    got = bsfa.pool_blocks(moved.k, block_n=case.block_n, pooling=pooling, **moved.layout_k)
    assert torch.equal(got.cpu(), want) and not got.isnan().any()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_is_the_largest_of_its_block(value: float) -> None:
    k = Case(lengths=((0, 300),), hkv=2, dim=64, dtype=BF16, layout=BATCHED).make().k
    k[0, 130, 1, 5] = value
    want = bsfa.pool_blocks(k, block_n=64, pooling="maxabs")
    got = bsfa.pool_blocks(k.cuda(), block_n=64, pooling="maxabs").cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert not got[0, 2, 1, 5].isfinite()
