"""Calls one right after the other: what prepares the next one is launched before attention has ended.

They share a workspace, which the allocator hands out again as soon as a call returns. Each result must have the bits
that the call gives alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import RelativeMax, StaticPattern

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

Call = Callable[[], Tensor]


def random_mask(length: int, heads: int, density: float, generator: torch.Generator) -> bsfa.BlockMask:
    tiles = -(-length // 128)
    kept = torch.rand(1, heads, tiles, tiles, generator=generator, device="cuda") < density
    kept = (kept | torch.eye(tiles, dtype=torch.bool, device="cuda")).tril()
    return bsfa.BlockMask.from_bool(kept, seqlen_q=length, seqlen_k=length)


def calls_of(length: int, heads: int, dim: int, generator: torch.Generator) -> list[Call]:
    """Calls on the same queries, keys and values that differ in how their tiles are ordered."""

    def normal(heads: int) -> Tensor:
        return torch.randn(1, length, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(heads), normal(heads // 4), normal(heads // 4)
    masks = [random_mask(length, heads, density, generator) for density in (0.05, 0.1, 0.1, 0.5)]
    pages = [x[0].unflatten(0, (-1, 16)) for x in (k, v)]
    block_table = torch.randperm(length // 16, generator=generator, device="cuda", dtype=torch.int32)[None]
    seqlens = torch.tensor([length], dtype=torch.int32, device="cuda")
    policies = [StaticPattern(sink_blocks=1, window_blocks=2), RelativeMax(alpha=0.1)]

    def sparse(mask: bsfa.BlockMask) -> Call:
        return lambda: bsfa.block_sparse_attention(q, k, v, mask)[0]

    def with_policy(policy: bsfa.policies.Policy) -> Call:
        return lambda: bsfa.attention(q, k, v, policy=policy)

    return [
        lambda: bsfa.attention(q, k, v),
        lambda: bsfa.attention_paged(q, *pages, block_table, seqlens, max_seqlen_k=length),
        *map(sparse, masks),
        *map(with_policy, policies),
    ]


@pytest.mark.parametrize("dim", [64, 128])
def test_calls_in_a_row_have_the_bits_of_single_ones(dim: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    calls = [call for length in (4096, 2048) for call in calls_of(length, 32, dim, generator)]
    alone = []
    for call in calls:
        alone.append(call())
        torch.cuda.synchronize()
    shuffle = random.Random(0)
    for _ in range(20):
        order = [*range(len(calls)), *range(len(calls))]
        shuffle.shuffle(order)
        outs = [calls[i]() for i in order]
        torch.cuda.synchronize()
        assert [torch.equal(out, alone[i]) for i, out in zip(order, outs, strict=True)] == [True] * len(order)


def test_a_graph_of_calls_in_a_row() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    calls = calls_of(4096, 32, 128, generator)
    alone = [call() for call in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [calls[i % len(calls)]() for i in range(3 * len(calls))]
    for _ in range(3):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, alone[i % len(calls)]) for i, out in enumerate(outs))
