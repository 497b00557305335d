"""What dense calls of known lengths leave out: kernels, memory, checks. Their results stay the same."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import bsfa
from bsfa import prepared

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
    assert launches(lambda: bsfa.block_sparse_attention(q, k, v, mask)) == 2  # their order, and attention
    assert launches(lambda: bsfa.attention(q, k, v, window_left=300)) == 2
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


def by_operator(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    return torch.ops.bsfa.dense_attention(q, k, v, causal, 1 / math.sqrt(q.shape[-1]), 0.0)


def is_prepared(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> bool:
    out = prepared.run(q, k, v, causal, None, 0.0)
    assert out is None or torch.equal(out, by_operator(q, k, v, causal))
    return out is not None


needs_prepared = pytest.mark.skipif(not prepared.READY, reason="this torch has no table of DLPack functions")


@needs_prepared
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_prepared_calls_read_and_write_where_they_are_told(dim: int, causal: bool) -> None:
    q, k, v = qkv(2, 300, 500, 8, 2, dim)
    prepared.forget()
    sys.modules["bsfa.attention"]._passed.clear()
    assert not is_prepared(q, k, v, causal)
    bsfa.attention(q, k, v, causal=causal)
    assert is_prepared(q, k, v, causal)
    for _ in range(5):
        held = [torch.empty(64 << 10, device="cuda")]  # so that the next tensors, and results, lie elsewhere
        q, k, v = (torch.randn_like(x) for x in (q, k, v))
        held.append(bsfa.attention(q, k, v, causal=causal))
        assert torch.equal(held[1], by_operator(q, k, v, causal))
        assert is_prepared(q, k, v, causal)


@needs_prepared
def test_prepared_calls_with_other_strides_at_the_same_address() -> None:
    """Memory that is freed and handed out again, or read in another way, brings its strides along."""
    q, k, v = qkv(1, 256, 256, 4, 4)
    packed = torch.randn(1, 256, 12, 128, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        parts = packed.split(4, dim=2)
        turned = [x.view(1, 4, 256, 128).transpose(1, 2) for x in (q, k, v)]
        mixed = [q, turned[1], v]
        for tensors in ((q, k, v), parts, turned, mixed, (q[:, :200], k, v), (q, k[:, :100], v[:, :100])):
            want = by_operator(*tensors)
            for _ in range(2):
                out = bsfa.attention(*tensors)
                assert torch.equal(out, want) and out.is_contiguous()
            assert is_prepared(*tensors)


@needs_prepared
def test_prepared_calls_in_another_stream_and_in_a_graph() -> None:
    q, k, v = qkv(1, 512, 512, 8, 2)
    bsfa.attention(q, k, v)
    assert is_prepared(q, k, v)
    want = by_operator(q * 2, k, v)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(20):
            torch.cuda._sleep(100_000)
            doubled = q * 2
            got = bsfa.attention(doubled, k, v)
            doubled.zero_()
            assert torch.equal(got, want)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prepared.run(q, k, v, True, None, 0.0)
    assert out is not None
    q.mul_(2)
    graph.replay()
    assert torch.equal(out, want)


@needs_prepared
def test_calls_are_prepared_once_nothing_else_is_going_on() -> None:
    q, k, v = qkv(1, 200, 201, 4, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        for _ in range(2):
            bsfa.attention(q, k, v)
    assert not is_prepared(q, k, v)
    bsfa.attention(q, k, v)
    assert is_prepared(q, k, v)


@needs_prepared
def test_long_calls_are_not_prepared() -> None:
    q, k, v = qkv(1, 8320, 8320, 32, 8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    want = bsfa.attention(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * want.nbytes  # finding that out takes no second result
    assert prepared.run(q, k, v, True, None, 0.0) is None


@needs_prepared
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_prepared_calls_of_another_device() -> None:
    q, k, v = (x.to("cuda:1") for x in qkv(1, 256, 256, 4, 2))
    with torch.cuda.device(1):
        want = bsfa.attention(q, k, v)
        assert is_prepared(q, k, v)
    assert torch.cuda.current_device() == 0
    assert prepared.run(q, k, v, True, None, 0.0) is None
    assert torch.equal(bsfa.attention(q, k, v), want)


def test_profiler_sees_the_operator() -> None:
    q, k, v = qkv(1, 256, 256, 4, 2)
    bsfa.attention(q, k, v)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bsfa.attention(q, k, v)
    assert "bsfa::dense_attention" in {event.name for event in profile.events()}


def test_opcheck_dense_attention() -> None:
    q, k, v = qkv(2, 300, 300, 4, 2)
    torch.library.opcheck(torch.ops.bsfa.dense_attention.default, (q, k, v, True, 0.125, 0.0))
