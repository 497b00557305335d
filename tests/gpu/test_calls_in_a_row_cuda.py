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


def overwriting_calls(page_size: int, dim: int, generator: torch.Generator) -> list[Call]:
    """Calls on the same memory, each of which first copies there what it is to read: tables, lengths, masks, cuts."""
    length, heads, num_states = 2048, 16, 6
    pages = -(-length // page_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(1, length), *(normal(3 * pages, page_size)[:, :, ::4] for _ in "kv")
    packed = [x.flatten(0, 1)[:length] for x in (k, v)]
    masks = [random_mask(length, heads, 0.1 + 0.05 * i, generator) for i in range(num_states)]

    def state_of(i: int) -> tuple[Tensor, ...]:
        shorter = length - 37 * i
        return (
            torch.randperm(3 * pages, generator=generator, device="cuda")[None, :pages].int(),
            torch.tensor([shorter], dtype=torch.int32, device="cuda"),
            torch.tensor([0, shorter // 3, length], dtype=torch.int32, device="cuda"),
            masks[i].words,
            masks[i].counts,
            torch.full((heads, 1), 3.5 + 0.2 * i, device="cuda"),
        )

    states = [state_of(i) for i in range(num_states)]
    memory = [torch.empty_like(x) for x in states[0]]
    table, seqlens, cu_seqlens, words, counts, cuts = memory
    mask = bsfa.BlockMask(words, counts, masks[0].geometry)
    skip = ExactSkip(ratio=1.0, form="absolute", reference=cuts, positions=(0,))

    def paged(policy: bsfa.policies.Policy | None) -> Tensor:
        return bsfa.attention_paged(q, k, v, table, seqlens, max_seqlen_k=length, policy=policy)

    def varlen(policy: bsfa.policies.Policy | None) -> Tensor:
        return bsfa.attention_varlen(q[0], *packed, cu_seqlens, cu_seqlens, length, length, policy=policy)

    reading: list[Call] = [
        lambda: paged(None),
        lambda: paged(RelativeMax(alpha=0.1)),
        lambda: paged(skip),
        lambda: bsfa.block_sparse_attention(q, *(x[None] for x in packed), mask)[0],
        lambda: varlen(None),
        lambda: varlen(skip),
    ]

    def overwriting(state: tuple[Tensor, ...], call: Call) -> Call:
        def both() -> Tensor:
            for target, source in zip(memory, state, strict=True):
                target.copy_(source)
            return call()

        return both

    return [overwriting(state, call) for state in states for call in reading]


def alone(calls: list[Call]) -> list[Tensor]:
    """What each call gives when nothing else runs; the second time, when all that it could find stale is the same."""
    outs = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        outs.append(call())
        torch.cuda.synchronize()
    return outs


def check_shuffled(calls: list[Call], rounds: int) -> None:
    want = alone(calls)
    shuffle = random.Random(0)
    for _ in range(rounds):
        order = [*range(len(calls)), *range(len(calls))]
        shuffle.shuffle(order)
        outs = [calls[i]() for i in order]
        torch.cuda.synchronize()
        wrong = [i for i, out in zip(order, outs, strict=True) if not torch.equal(out, want[i])]
        assert not wrong


def check_graph(calls: list[Call]) -> None:
    want = alone(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [calls[i % len(calls)]() for i in range(3 * len(calls))]
    for _ in range(3):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, want[i % len(calls)]) for i, out in enumerate(outs))


@pytest.mark.parametrize("dim", [64, 128])
def test_calls_in_a_row_have_the_bits_of_single_ones(dim: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    check_shuffled([call for length in (4096, 2048) for call in calls_of(length, 32, dim, generator)], 20)


def test_a_graph_of_calls_in_a_row() -> None:
    check_graph(calls_of(4096, 32, 128, torch.Generator("cuda").manual_seed(1)))


@pytest.mark.parametrize("page_size", [7, 16, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_overwritten_between_calls_is_read_anew(dim: int, page_size: int) -> None:
    check_shuffled(overwriting_calls(page_size, dim, torch.Generator("cuda").manual_seed(2)), 10)


def test_a_graph_that_overwrites_between_calls() -> None:
    check_graph(overwriting_calls(16, 128, torch.Generator("cuda").manual_seed(2)))
