"""Chunked prefill: a prompt has one mask and one output however it is cut at edges of tiles and blocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import bsfa
import oracle
from bsfa.policies import Antidiagonal, CumulativeMass, Policy, RelativeMax, StaticPattern
from cases import BF16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, check_attention, int32

PROMPT = 420  # ends inside a tile


def policies(block_m: int, block_n: int) -> list[Policy]:
    sizes = {"block_m": block_m, "block_n": block_n}
    return [
        StaticPattern(sink_blocks=1, window_blocks=2, **sizes),
        RelativeMax(alpha=0.6, **sizes),
        RelativeMax(alpha=0.95, sink_blocks=0, window_blocks=1, last_tiles=3, min_blocks=2, **sizes),
        CumulativeMass(mass=0.7, **sizes),
        CumulativeMass(mass=0.3, sink_blocks=0, window_blocks=1, last_tiles=1, min_blocks=3, **sizes),
        RelativeMax(alpha=0.7, shared=True, **sizes),
        CumulativeMass(mass=0.5, pooling="maxabs", shared=True, rescue_stride=7, rescue_probability=0.1, **sizes),
        Antidiagonal(mass=0.6, stride=8, last_tiles=1, **sizes),
    ]


def chunk_inputs(whole: Inputs, begin: int, end: int, layout: str) -> Inputs:
    """Queries [begin, end) of every prompt, against its first ``end`` keys, in another layout."""
    lengths = ((end - begin, end),) * len(whole)
    inputs = replace(whole.case, layout=layout, page_size=13, lengths=lengths).make()
    inputs.queries = [q[begin:end] for q in whole.queries]
    inputs.keys = [k[:end] for k in whole.keys]
    inputs.values = [v[:end] for v in whole.values]
    inputs.lay_out()
    return inputs


def run_chunks(whole: Inputs, cuts: list[int], policy: Policy, layout: str) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Outputs [B, Sq, Hq, Dv] and kept blocks [tiles, heads, blocks of the prompt] per sequence, put together."""
    outs: list[torch.Tensor] = []
    kept: list[list[np.ndarray]] = [[] for _ in whole.case.lengths]
    prompt_lens = int32([PROMPT] * len(whole))
    for begin, end in pairwise([0, *cuts, PROMPT]):
        inputs = chunk_inputs(whole, begin, end, layout)
        out, info = inputs.run(policy, prompt_lens=prompt_lens, return_info=True)
        outs.append(torch.stack([inputs.of_sequence(out, b) for b in range(len(inputs))]))
        rows = info.mask.to_rows()
        more = whole.geometry.num_blocks - inputs.geometry.num_blocks
        for b, found in enumerate(kept):
            found.append(np.pad(inputs.rows_of_sequence(rows, b), ((0, 0), (0, 0), (0, more))))
    return torch.cat(outs, dim=1), [np.concatenate(found) for found in kept]


@pytest.mark.parametrize("layout", ["batched", PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize(
    ("block_m", "block_n", "cuts"),
    [
        (64, 64, [64, 192]),
        (64, 64, [128, 384]),
        (64, 32, [64, 320]),
        (32, 64, [192, 256]),
        (32, 32, [*range(32, 420, 32)]),
    ],
)
def test_chunks_at_edges_of_tiles_and_blocks_have_the_mask_of_the_prompt(
    block_m: int, block_n: int, cuts: list[int], which: int, layout: str
) -> None:
    whole = Case(lengths=((PROMPT, PROMPT),) * 2, hq=4, hkv=2, block_m=block_m, block_n=block_n, scale=0.4).make()
    policy = policies(block_m, block_n)[which]
    want, info = whole.run(policy, return_info=True)
    rows = info.mask.to_rows()
    out, kept = run_chunks(whole, cuts, policy, layout)
    for b, found in enumerate(kept):
        assert np.array_equal(found, whole.rows_of_sequence(rows, b))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["batched", PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize(("block_m", "block_n", "cuts"), [(64, 64, [64, 320]), (64, 128, [256]), (128, 64, [128, 384])])
def test_flat64_chunks_have_the_mask_of_the_prompt(block_m: int, block_n: int, cuts: list[int], layout: str) -> None:
    whole = Case(lengths=((PROMPT, PROMPT),) * 2, hq=4, hkv=2, block_m=block_m, block_n=block_n).make()
    options = {"pooling": "flat64", "original_scale": True, "sink_blocks": 0, "window_blocks": 1, "last_tiles": 1}
    policy = CumulativeMass(mass=0.8, block_m=block_m, block_n=block_n, **options)
    mask = whole.run(policy, return_info=True)[1].mask
    rows = mask.to_rows()
    assert float(mask.density()) < 0.9
    for b, found in enumerate(run_chunks(whole, cuts, policy, layout)[1]):
        assert np.array_equal(found, whole.rows_of_sequence(rows, b))


@pytest.mark.parametrize("layout", ["batched", PACKED, PAGED])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cuts", [[1], [63, 65], [100, 250, 419], [7, 64, 130]])
def test_chunks_at_any_edge_are_correct_attention(cuts: list[int], dtype: torch.dtype, layout: str) -> None:
    """Each chunk is exact over the mask that it reports, and rows that share a tile share its blocks."""
    whole = Case(lengths=((PROMPT, PROMPT),) * 2, hq=4, hkv=2, block_n=32, dtype=dtype).make()
    for policy in policies(64, 32):
        for begin, end in pairwise([0, *cuts, PROMPT]):
            inputs = chunk_inputs(whole, begin, end, layout)
            if end - begin == 1 and end > 1:
                continue  # a decode step
            options: dict[str, Any] = {"prompt_lens": int32([PROMPT, PROMPT])}
            out, lse, info = inputs.run(policy, **options, return_lse=True, return_info=True)
            rows = info.mask.to_rows()
            masks = [inputs.rows_of_sequence(rows, b)[:, :, : oracle.num_blocks(end, 32)] for b in range(2)]
            check_attention(inputs, out, lse, masks)


@pytest.mark.parametrize("cuts", [[1], [63, 65], [100, 250, 419], [64, 128]])
def test_dense_chunks_are_the_dense_prompt(cuts: list[int]) -> None:
    whole = Case(lengths=((PROMPT, PROMPT),) * 2, hq=4, hkv=2).make()
    want = whole.run(None)
    for layout in ("batched", PAGED):
        outs = [chunk_inputs(whole, *pair, layout).run(None) for pair in pairwise([0, *cuts, PROMPT])]
        torch.testing.assert_close(torch.cat(outs, dim=1), want, rtol=1e-5, atol=1e-5)


def test_a_static_pattern_does_not_depend_on_the_cut() -> None:
    """Even at unaligned cuts every row sees the blocks that it sees in one piece."""
    whole = Case(lengths=((PROMPT, PROMPT),), hq=2).make()
    policy = StaticPattern(sink_blocks=1, window_blocks=2, block_m=64, block_n=64)
    want = whole.run(policy)
    outs = [chunk_inputs(whole, *pair, PAGED).run(policy) for pair in pairwise([0, 37, 100, 301, PROMPT])]
    torch.testing.assert_close(torch.cat(outs, dim=1), want, rtol=1e-5, atol=1e-5)


def test_pooled_keys_can_be_kept_between_chunks() -> None:
    """The summary of the whole prompt, cut to the chunk's blocks, selects what the chunk's own summary selects."""
    whole = Case(lengths=((PROMPT, PROMPT),), hq=4, hkv=2, scale=0.4).make()
    policy = RelativeMax(alpha=0.6, block_m=64, block_n=64)
    summary = bsfa.pool_blocks(whole.k, block_n=64)
    chunk = chunk_inputs(whole, 128, 256, "batched")
    own = bsfa.select_blocks(
        chunk.q, bsfa.pool_blocks(chunk.k, block_n=64), policy, seqlen_k=256, prompt_lens=int32([PROMPT])
    )
    kept = bsfa.select_blocks(chunk.q, summary[:, :4].contiguous(), policy, seqlen_k=256, prompt_lens=int32([PROMPT]))
    assert torch.equal(own.words, kept.words)
