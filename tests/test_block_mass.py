"""True attention mass per block against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsfa
import oracle
from cases import BF16, F16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, check_rows, poison, square, table

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 150), (0, 0))
CHUNKS = ((50, 187), (50, 120), (50, 50))

CASES = [
    *table(Case(), lengths=square(1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300)),
    *table(
        Case(hq=4, hkv=2),
        lengths=[(x,) for x in ((1, 65), (63, 129), (100, 137), (100, 37), (70, 0), (0, 70), (0, 0))],
        causal=[True, False],
    ),
    *table(
        Case(hq=4, hkv=2, lengths=RAGGED),
        layout=[PACKED, PAGED_PACKED],
        strides=["plain", "interleaved", "gaps"],
        causal=[True, False],
    ),
    *table(Case(lengths=CHUNKS, layout=PAGED), page_size=[1, 3, 16, 17, 64, 256], dtype=[F32, BF16]),
    *table(Case(lengths=((90, 200),)), dim=[1, 8, 40, 80, 128, 256], dtype=[F32, BF16, F16]),
    *table(Case(lengths=((90, 200),)), hq=[1, 3, 8, 17], softcap=[0.0, 4.0], scale=[None, 1.0]),
    *table(Case(lengths=((141, 300),), hq=4, hkv=2), block_m=[16, 32, 64, 128], block_n=[16, 32, 64, 128]),
    *table(Case(lengths=((141, 300),)), block_m=[1, 7, 600, 4096], block_n=[1, 100, 4096]),
]


def mass_of(inputs: Inputs) -> torch.Tensor:
    _, lse = inputs.attend(None)
    shape = (inputs.geometry.num_rows, inputs.case.hq, inputs.geometry.num_blocks)
    poison(shape)
    return bsfa.block_mass(
        inputs.q,
        inputs.k,
        lse,
        block_m=inputs.case.block_m,
        block_n=inputs.case.block_n,
        **inputs.maths,
        **inputs.layout,
    )


def check(case: Case) -> None:
    inputs = case.make()
    mass = mass_of(inputs)
    assert mass.dtype == torch.float32

    def want(b: int) -> np.ndarray:
        q, k, _ = inputs.arrays(b)
        return oracle.block_mass(q, k, block_m=case.block_m, block_n=case.block_n, **inputs.oracle_maths)

    check_rows(inputs, mass, want, 0.0, "mass", 5e-6)
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        if seqlen_q <= seqlen_k and seqlen_k:  # every row sees something
            np.testing.assert_allclose(inputs.rows_of_sequence(mass, b).sum(-1), 1.0, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mass(case: Case) -> None:
    check(case)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4),
    layout=st.sampled_from([PACKED, PAGED_PACKED]),
    page_size=st.integers(1, 40),
    hq=st.integers(1, 5),
    dim=st.integers(1, 40),
    block_m=st.integers(1, 130),
    block_n=st.integers(1, 130),
    causal=st.booleans(),
    dtype=st.sampled_from([F32, BF16, F16]),
)
def test_any_case(lengths: list[tuple[int, int]], **fields: object) -> None:
    check(Case(lengths=tuple(lengths), **fields))  # type: ignore[arg-type]


def test_same_bits_with_other_threads() -> None:
    inputs = Case(lengths=RAGGED, hq=4, hkv=2, layout=PACKED).make()
    threads = torch.get_num_threads()
    try:
        first = mass_of(inputs)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(mass_of(inputs), first)
    finally:
        torch.set_num_threads(threads)


def test_kept_mass_is_what_sparse_attention_loses() -> None:
    """exp(sparse LSE - dense LSE), averaged over a tile, is the tile's mass of kept blocks."""
    case = Case(lengths=((150, 300),), hq=4, hkv=2, mask="random")
    inputs = case.make()
    mask = inputs.block_mask([inputs.draw_mask(0)])
    recall = (mass_of(inputs) * mask.to_rows()).sum(-1).numpy()
    share = (inputs.attend(mask)[1] - inputs.attend(None)[1]).exp()[0].numpy()
    want = np.stack([share[:, tile.rows].mean(-1) for tile in inputs.tiles(0)])
    np.testing.assert_allclose(recall, want, atol=1e-5)
