"""BlockSummary on CUDA: bitwise what pool_blocks gives there, without a host sync, and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import StaticPattern
from cases import BF16, F16, GARBAGE_PAGES, NAN
from serving import Cache

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def make(page_size: int, block_n: int = 128, dtype: torch.dtype = BF16, tokens: int = 1200) -> Cache:
    pages = tokens // page_size + 6
    options = {"dim": 64, "dim_v": 64, "dtype": dtype, "device": "cuda", "block_n": block_n, "values": True}
    return Cache(page_size, num_pages=pages, **options)  # type: ignore[arg-type]


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("page_size", "block_n"), [(1, 128), (16, 128), (32, 128), (128, 128), (256, 128), (16, 8), (16, 64), (5, 15)]
)
def test_chunks_give_the_summary_of_the_whole(page_size: int, block_n: int, dtype: torch.dtype) -> None:
    cache = make(page_size, block_n, dtype)
    for _ in range(3):
        cache.add()
    for how, step in (("seqlens_q", [300, 0, 128]), ("cu_seqlens_q", [1, 63, 0]), ("uniform", [65, 65, 65])):
        cache.step(dict(enumerate(step)), how)
        cache.check()
    shared = 128 - 128 % page_size
    cache.step({cache.add(0, shared): 0, cache.add(0, shared): 30, 0: 1})
    cache.check()


def test_no_sync() -> None:
    cache = make(16)
    for _ in range(2):
        cache.add()
    cache.step({0: 300, 1: 77})
    table, seqlens = cache.table([0, 1]), cache.seqlens([0, 1])
    counts = torch.tensor([300, 77], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    with no_sync():
        cache.summary.update(cache.k, table, seqlens, seqlens_q=counts, max_seqlen_q=300, v_cache=cache.v)
        got = cache.summary.gather(table, seqlens, 300), cache.summary.gather_values(table, seqlens, 300)
    where = {"block_table": table, "seqlens_k": seqlens, "max_seqlen_k": 300}
    assert torch.equal(got[0], bsfa.pool_blocks(cache.k, **where))
    assert torch.equal(got[1], bsfa.pool_blocks(cache.v, **where))


@pytest.mark.parametrize(("page_size", "block_n"), [(16, 128), (128, 128), (256, 128)])
def test_cuda_graph(page_size: int, block_n: int) -> None:
    """One graph of update and gather serves steps of other lengths, pages and sequences."""
    cache = make(page_size, block_n)
    for _ in range(3):
        cache.add()
    width, most, longest = 512 // page_size + 2, 128, 512
    table = torch.zeros((3, width), dtype=torch.int32, device="cuda")
    seqlens, counts = (torch.zeros(3, dtype=torch.int32, device="cuda") for _ in range(2))
    summary = cache.summary

    def run() -> tuple[Tensor, Tensor]:
        summary.update(cache.k, table, seqlens, seqlens_q=counts, max_seqlen_q=most, v_cache=cache.v)
        return summary.gather(table, seqlens, longest), summary.gather_values(table, seqlens, longest)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for step in ([128, 1, 0], [128, 0, 100], [1, 1, 1], [30, 128, 28], [128, 128, 0]):
        for s, count in enumerate(step):
            cache.append(s, count)
        rows = [(pages + [*GARBAGE_PAGES] * width)[:width] for pages in cache.pages]
        table.copy_(torch.tensor(rows, dtype=torch.int32))
        seqlens.copy_(cache.seqlens([0, 1, 2]))
        counts.copy_(torch.tensor(step, dtype=torch.int32))
        for t in got:
            t.fill_(NAN)
        graph.replay()
        where = {"block_table": table, "seqlens_k": seqlens, "max_seqlen_k": longest}
        assert torch.equal(got[0], bsfa.pool_blocks(cache.k, block_n=block_n, **where))
        assert torch.equal(got[1], bsfa.pool_blocks(cache.v, block_n=block_n, **where))


def test_attention_updates_it() -> None:
    cache = make(16)
    cache.add()
    cache.step({0: 300})
    cache.append(0, 200)
    table, seqlens = cache.table([0]), cache.seqlens([0])
    q = torch.randn(1, 200, 4, 64, device="cuda", dtype=BF16)
    policy = StaticPattern(sink_blocks=1, window_blocks=1)
    arguments = (q, cache.k, cache.v, table, seqlens)
    want = bsfa.attention_paged(*arguments, max_seqlen_k=500, policy=policy)
    torch.cuda.synchronize()
    with no_sync():
        got = bsfa.attention_paged(*arguments, max_seqlen_k=500, policy=policy, summary=cache.summary)
    assert torch.equal(got, want)
    cache.check()


def test_compile_fullgraph() -> None:
    torch.compiler.reset()
    cache = make(16)
    cache.add()

    def step(summary: bsfa.BlockSummary, table: Tensor, seqlens: Tensor, longest: int) -> Tensor:
        summary.update(cache.k, table, seqlens, max_seqlen_q=longest, v_cache=cache.v)
        return summary.gather(table, seqlens)

    compiled = torch.compile(step, fullgraph=True)
    for count in (100, 60, 1):
        cache.append(0, count)
        table, seqlens = cache.table([0]), cache.seqlens([0])
        got = compiled(cache.summary, table, seqlens, count)
        assert torch.equal(got, bsfa.pool_blocks(cache.k, block_table=table, seqlens_k=seqlens))
    cache.check()
