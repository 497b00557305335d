"""What dense calls of known lengths leave out: kernels, memory, checks. Their results stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bsfa

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

SMS = torch.cuda.get_device_properties(0).multi_processor_count


def qkv(batch: int, seqlen_q: int, seqlen_k: int, hq: int, hkv: int, dim: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def make(tokens: int, heads: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    return make(seqlen_q, hq), make(seqlen_k, hkv), make(seqlen_k, hkv)


def everything(q: Tensor, k: Tensor, causal: bool) -> bsfa.BlockMask:
    """A mask that keeps all blocks, so that the order is made on the device."""
    first = (k.shape[1] - q.shape[1]) // 128 if causal else 0
    last = (k.shape[1] - 1 if causal else q.shape[1] - 1) // 128
    kept = torch.ones(q.shape[0], 1, last - first + 1, -(-k.shape[1] // 128), dtype=torch.bool)
    options = {"seqlen_q": q.shape[1], "seqlen_k": k.shape[1], "causal": causal}
    return bsfa.BlockMask.from_bool(kept, **options).to("cuda")


# One tile to each head, or a few: fewer pairs than SMs, as many, twice as many, and one more of each.
COUNTS = [
    *((1, 100, 100, heads, 1) for heads in (1, SMS - 1, SMS, SMS + 1, 2 * SMS - 1, 2 * SMS, 2 * SMS + 1)),
    *((1, 100, 100, heads, 1) for heads in (4 * SMS - 1, 4 * SMS, 4 * SMS + 1)),  # with two CTAs to an SM
    *((3, 128, 128, heads, heads) for heads in (1, 2 * SMS // 3, 2 * SMS // 3 + 1)),
    *((1, 1024, 1024, heads, 8) for heads in (8, 32, 40)),
    *((2, 300, 1500, heads, 2) for heads in (2, 32, 36)),
    (1, 4096, 4096, 8, 8),
    (1, 4096, 4096, 32, 8),
    (3, 1000, 5000, 32, 8),
    (2, 700, 300, 32, 8),
    (1, 1500, 1, 16, 8),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_dense_is_keeping_all_blocks(counts: tuple[int, int, int, int, int], dim: int, causal: bool) -> None:
    q, k, v = qkv(*counts, dim=dim)
    mask = everything(q, k, causal)
    want, want_lse = bsfa.block_sparse_attention(q, k, v, mask, causal=causal)
    got, lse = bsfa.block_sparse_attention(q, k, v, None, causal=causal)
    assert torch.equal(got, want) and torch.equal(lse, want_lse)
    for _ in range(3):  # the first is checked, the others remember that
        out = torch.full_like(want, float("nan"))  # what the allocator hands out next, unless it is written
        del out
        assert torch.equal(bsfa.attention(q, k, v, causal=causal), want)
    again = bsfa.attention(q, k, v, causal=causal, return_lse=True)
    assert torch.equal(again[0], want) and torch.equal(again[1], want_lse)


def launches(call: Any) -> int:
    """Kernels that a call starts."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum("kernel" in e.name and "bsfa" in e.name for e in on_device)


def test_kernels_of_a_call() -> None:
    q, k, v = qkv(1, 1024, 1024, 32, 8)
    mask = everything(q, k, True)
    assert launches(lambda: bsfa.block_sparse_attention(q, k, v, mask)) == 3
    assert launches(lambda: bsfa.attention(q, k, v, window_left=300)) == 3
    assert launches(lambda: bsfa.attention(q, k, v)) == (1 if 2 * SMS >= 8 * 32 else 2)
    long = qkv(1, 4096, 4096, 32, 8)
    assert launches(lambda: bsfa.attention(*long)) == 2


def test_memory_of_a_call() -> None:
    """The result, and nothing beside it."""
    q, k, v = qkv(1, 512, 512, 32, 8)
    want = bsfa.attention(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    got = bsfa.attention(q, k, v)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
    assert torch.equal(got, want)


def test_graph_of_a_single_launch() -> None:
    q, k, v = qkv(1, 1024, 1024, 32, 8)
    bsfa.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bsfa.attention(q, k, v)
    for scale in (1.0, 0.5):
        q.mul_(scale)
        want = bsfa.attention(q, k, v)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)


def test_waits_for_what_it_reads() -> None:
    """A single launch begins when the kernels before it are done, and those after it see its result."""
    q, k, v = qkv(1, 1024, 1024, 32, 8)
    want = bsfa.attention(q * 2, k, v) + 1
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        _ = big @ big
        doubled = q * 2
        got = bsfa.attention(doubled, k, v) + 1
        doubled.zero_()
        assert torch.equal(got, want)


def test_remembered_checks_refuse_memory_that_tma_cannot_read() -> None:
    q, k, v = qkv(1, 300, 300, 4, 2)
    bsfa.attention(q, k, v)
    flat = torch.cat([q.new_zeros(1), q.flatten(), q.new_zeros(7)])
    shifted = flat[1:-7].view(q.shape)  # the shape and strides that have passed
    for _ in range(2):
        with pytest.raises(bsfa.UnsupportedError, match="storage offset 1"):
            bsfa.attention(shifted, k, v)
    eight = torch.cat([q.new_zeros(8), q.flatten()])[8:].view(q.shape)
    assert torch.equal(bsfa.attention(eight, k, v), bsfa.attention(q, k, v))


@pytest.mark.parametrize("packed", [False, True])
def test_packed_and_paged_calls_remember(packed: bool) -> None:
    q, k, v = qkv(1, 384, 384, 4, 2)
    want = bsfa.attention(q, k, v)
    cu = torch.tensor([0, 384], dtype=torch.int32, device="cuda")
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device="cuda")
    pages = [torch.empty(3, 128, *x.shape[2:], dtype=x.dtype, device="cuda") for x in (k, v)]
    for page, x in zip(pages, (k, v), strict=True):
        page[table[0].long()] = x.unflatten(1, (3, 128))[0]
    for _ in range(3):
        if packed:
            got = bsfa.attention_varlen(q[0], k[0], v[0], cu, cu, 384, 384)[None]
        else:
            got = bsfa.attention_paged(q, *pages, table, torch.full((1,), 384, dtype=torch.int32, device="cuda"))
        assert torch.equal(got, want)


def test_opcheck_dense_attention() -> None:
    q, k, v = qkv(2, 300, 300, 4, 2)
    torch.library.opcheck(torch.ops.bsfa.dense_attention.default, (q, k, v, True, 0.125, 0.0))
