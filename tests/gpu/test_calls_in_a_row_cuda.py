"""Calls one right after the other: what prepares the next one is launched before attention has ended.

They share a workspace, which the allocator hands out again as soon as a call returns. Each result must have the bits
that the call gives alone; also where what a call reads is overwritten in place for the next one, as servers do.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import ExactSkip, RelativeMax, StaticPattern

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


class Overwritten:
    """Calls on the same memory, which holds something else in each: what each call reads is copied there before it."""

    LENGTH, HEADS, STATES = 2048, 16, 6

    def __init__(self, page_size: int, dim: int) -> None:
        self.generator = torch.Generator("cuda").manual_seed(2)
        self.dim = dim
        pages = -(-self.LENGTH // page_size)
        self.q = self._normal(1, self.LENGTH)
        self.pages = [self._normal(3 * pages, page_size)[:, :, ::4] for _ in "kv"]
        lengths = [self.LENGTH - 37 * i for i in range(self.STATES)]
        masks = [random_mask(self.LENGTH, self.HEADS, 0.1 + 0.05 * i, self.generator) for i in range(self.STATES)]
        self.geometry = masks[0].geometry
        states: list[tuple[Tensor, ...]] = [
            (
                torch.randperm(3 * pages, generator=self.generator, device="cuda")[None, :pages].int(),
                torch.tensor([length], dtype=torch.int32, device="cuda"),
                torch.tensor([0, length // 3, self.LENGTH], dtype=torch.int32, device="cuda"),
                masks[i].words,
                masks[i].counts,
                torch.full((self.HEADS, 1), 3.5 + 0.2 * i, device="cuda"),
            )
            for i, length in enumerate(lengths)
        ]
        self.states = states
        self.now = tuple(torch.empty_like(x) for x in states[0])

    def _normal(self, *shape: int) -> Tensor:
        shape = (*shape, self.HEADS, self.dim)
        return torch.randn(shape, generator=self.generator, device="cuda", dtype=torch.bfloat16)

    def calls(self) -> list[Call]:
        q, (k, v) = self.q, self.pages
        table, seqlens, cu_seqlens, words, counts, reference = self.now
        mask = bsfa.BlockMask(words, counts, self.geometry)
        packed = [x.flatten(0, 1)[: self.LENGTH] for x in (k, v)]
        skip = ExactSkip(ratio=1.0, form="absolute", reference=reference, positions=(0,))
        sequences = (cu_seqlens, cu_seqlens, self.LENGTH, self.LENGTH)

        def paged(policy: bsfa.policies.Policy | None) -> Tensor:
            return bsfa.attention_paged(q, k, v, table, seqlens, max_seqlen_k=self.LENGTH, policy=policy)

        return [
            lambda: paged(None),
            lambda: paged(RelativeMax(alpha=0.1)),
            lambda: paged(skip),
            lambda: bsfa.block_sparse_attention(q, *(x[None] for x in packed), mask)[0],
            lambda: bsfa.attention_varlen(q[0], *packed, *sequences),
            lambda: bsfa.attention_varlen(q[0], *packed, *sequences, policy=skip),
        ]

    def write(self, state: int) -> None:
        for target, source in zip(self.now, self.states[state], strict=True):
            target.copy_(source)


@pytest.mark.parametrize("page_size", [7, 16, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_overwritten_between_calls_is_read_anew(dim: int, page_size: int) -> None:
    memory = Overwritten(page_size, dim)
    calls = memory.calls()
    every = [(state, i) for state in range(memory.STATES) for i in range(len(calls))]
    alone = {}
    for state, i in every:
        memory.write(state)
        torch.cuda.synchronize()
        alone[state, i] = calls[i]()
        torch.cuda.synchronize()
    assert all(not torch.equal(alone[0, i], alone[1, i]) for i in range(len(calls)))
    shuffle = random.Random(0)
    for _ in range(10):
        shuffle.shuffle(every)
        outs = []
        for state, i in every:
            memory.write(state)
            outs.append(calls[i]())
        torch.cuda.synchronize()
        wrong = [which for which, out in zip(every, outs, strict=True) if not torch.equal(out, alone[which])]
        assert not wrong


def test_a_graph_that_overwrites_between_calls() -> None:
    memory = Overwritten(16, 128)
    calls = memory.calls()
    every = [(state, i) for state in range(memory.STATES) for i in range(len(calls))]
    alone = []
    for state, i in every:
        memory.write(state)
        torch.cuda.synchronize()
        alone.append(calls[i]())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = []
        for state, i in every:
            memory.write(state)
            outs.append(calls[i]())
    for _ in range(5):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert [torch.equal(a, b) for a, b in zip(outs, alone, strict=True)] == [True] * len(every)
