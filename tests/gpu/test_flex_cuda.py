"""FlexPrefill on CUDA: the probe against float64, the pattern masks and the policy against the CPU's; how they behave.

The probe's CUDA and CPU kernels sum in other orders, so a block whose mass or a head whose distance is next to a
decision may come out otherwise: such (tile, head) rows must be rare. Pattern masks are integers, and equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
import oracle
from bsfa.policies import FlexPrefill
from cases import BF16, F16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, int32, poison, square, table

#: "cpu" runs all but the tests of CUDA itself on the CPU kernels, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")

BASE = Case(hq=4, hkv=2, dim=64, dtype=BF16, block_m=128, block_n=128)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (128, 128), (70, 0), (37, 300), (129, 1157), (100, 30), (3, 2050))
CHUNKS = ((150, 387), (150, 256), (150, 1150), (150, 20))
TWINS = ((141, 300), (141, 300))


@contextmanager
def no_sync() -> Iterator[None]:
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- probe_attention --------------------------------------------------------------------------------------------------

PROBES = [
    *table(BASE, lengths=square(1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300), causal=[True, False]),
    *table(BASE, lengths=square(1023, 1024, 1025, 1151, 1152, 1153, 2047, 2048, 2049, 5000), dim=[64, 128]),
    *table(
        BASE,
        lengths=[(x,) for x in ((1, 65), (63, 129), (100, 1137), (100, 37), (128, 127), (128, 1), (70, 0), (1, 2048))],
        causal=[True, False],
    ),
    *table(
        replace(BASE, lengths=RAGGED),
        layout=[PACKED, PAGED_PACKED],
        strides=["plain", "interleaved", "wide-gaps"],
        causal=[True, False],
    ),
    *table(
        replace(BASE, lengths=CHUNKS, layout=PAGED), page_size=[1, 16, 128, 48, 256], dim=[64, 128], dtype=[BF16, F16]
    ),
    *table(replace(BASE, lengths=TWINS), strides=["interleaved", "head-major", "wide-gaps"], dim=[64, 128]),
    *table(replace(BASE, lengths=((200, 1300),)), dtype=[BF16, F16], softcap=[0.0, 4.0], scale=[None, 0.5, -0.3]),
    *table(replace(BASE, lengths=((200, 1300),)), hq=[1, 2, 8], hkv=[1], causal=[True, False]),
    *table(replace(BASE, lengths=((200, 1300),)), block_m=[1, 16, 100]),
]


def run_probe(inputs: Inputs, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    case = inputs.case
    there = inputs.to(device)
    shape = (len(inputs), case.hq, inputs.max_k)
    poison(shape, shape, device=device)
    lengths = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k)
    with no_sync():
        return torch.ops.bsfa.probe_attention(  # type: ignore[no-any-return]
            there.q, there.k, *lengths, case.block_m, case.causal, case.softmax_scale, case.softcap
        )


def want_probe(inputs: Inputs, b: int) -> tuple[np.ndarray, np.ndarray]:
    """(vertical, slash) of one sequence in float64, [Hq, keys]."""
    case = inputs.case
    q, k, _ = inputs.arrays(b)
    count, keys = min(case.block_m, len(q)), len(k)
    vertical, slash = np.zeros((case.hq, keys)), np.zeros((case.hq, keys))
    if count == 0 or keys == 0:
        return vertical, slash
    x = oracle.logits(q[-count:], k, case.softmax_scale, case.softcap)
    positions = oracle.positions(len(q), keys, case.causal)[-count:]
    for r in range(count):
        seen = max(positions[r] + 1, 0) if case.causal else keys
        if seen == 0:
            continue
        p = np.exp(x[:, r, :seen] - x[:, r, :seen].max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True) * count
        vertical[:, :seen] += p
        if case.causal:
            slash[:, :seen] += p[:, ::-1]
    return vertical, slash


@pytest.mark.parametrize("case", PROBES, ids=str)
def test_probe(case: Case) -> None:
    inputs = case.make()
    results = [t.cpu() for t in run_probe(inputs)]
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        for name, result, want in zip(("vertical", "slash"), results, want_probe(inputs, b), strict=True):
            assert result.dtype == torch.float32 and result.shape == (len(inputs), case.hq, inputs.max_k)
            got = result[b].double().numpy()
            assert np.isfinite(got).all(), f"{name} of sequence {b}: stale memory"
            assert (got[:, seqlen_k:] == 0).all(), f"{name} of sequence {b}: not zero past the end"
            np.testing.assert_allclose(got[:, :seqlen_k], want, rtol=1e-4, atol=1e-7, err_msg=f"{name}, {b}")
        if 0 < seqlen_q <= seqlen_k:
            np.testing.assert_allclose(results[0][b].sum(-1), 1.0, atol=1e-4)


def test_probe_is_repeatable_and_the_same_in_other_layouts() -> None:
    case = replace(BASE, lengths=CHUNKS, dim=128, layout=PAGED)
    inputs = case.make()
    first = run_probe(inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run_probe(inputs), first, strict=True))
    packed = replace(case, layout=PACKED).make()
    packed.queries, packed.keys = inputs.queries, inputs.keys
    packed.lay_out()
    assert all(torch.equal(a, b) for a, b in zip(run_probe(packed), first, strict=True))


@cuda_only
def test_probe_far_pages() -> None:
    """Offsets beyond 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    pool = torch.empty(2**31 + 2**27, dtype=BF16, device="cuda").view(-1, 16, 2, 64)
    pages = [pool.shape[0] - 1, 2, pool.shape[0] - 9, 0, pool.shape[0] - 5]
    for page in pages:
        pool[page] = torch.randn(16, 2, 64).to(BF16)
    q = torch.randn(1, 20, 4, 64).to(BF16).cuda()
    k = torch.cat([pool[page] for page in pages])[None, :77].contiguous()
    table_ = int32([*pages, -1])[None].cuda()
    got = torch.ops.bsfa.probe_attention(q, pool, None, None, table_, int32([77]).cuda(), 20, 77, 128, True, 0.1, 0.0)
    want = torch.ops.bsfa.probe_attention(q, k, None, None, None, None, 20, 77, 128, True, 0.1, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@cuda_only
def test_probe_refuses_what_it_cannot_do() -> None:
    def probe(q: Tensor, k: Tensor, block_m: int = 128) -> None:
        torch.ops.bsfa.probe_attention(q, k, None, None, None, None, 64, 64, block_m, True, 1.0, 0.0)

    q = torch.zeros(1, 64, 2, 64, dtype=BF16, device="cuda")
    probe(q, q)
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        probe(q.float(), q.float())
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        probe(q, q, 256)
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        probe(q[..., :32].contiguous(), q[..., :32].contiguous())
    wide = torch.zeros(1, 64, 2, 65, dtype=BF16, device="cuda")[..., :64]
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        probe(q, wide)


# --- pattern_mask -----------------------------------------------------------------------------------------------------

MASKS = [
    *table(BASE, lengths=square(1, 64, 300, 5000, 9000), block_n=[16, 128], causal=[True, False]),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], block_n=[1, 48, 128], causal=[True, False]),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), block_m=[8, 128], block_n=[16, 128]),
    replace(BASE, lengths=((5, 70),) * 70, layout=PACKED, hq=17, hkv=1, block_n=16),
    # more sequences than a CTA has threads
    replace(BASE, lengths=((5, 70), (0, 3), (130, 140)) * 200, layout=PACKED, hq=2, hkv=1, block_n=16),
]


@pytest.mark.parametrize("case", MASKS, ids=str)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (2, 3)])
def test_pattern_mask_is_that_of_the_cpu(case: Case, sink: int, window: int) -> None:
    inputs = case.make()
    there = inputs.to(DEVICE)
    g, generator = inputs.geometry, torch.Generator().manual_seed(3)
    words = (g.num_blocks + 31) // 32

    def bits(*shape: int) -> Tensor:
        draws = [torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32) for _ in range(3)]
        return draws[0] & draws[1] & draws[2]

    batch = len(inputs)
    tensors = (
        bits(g.num_rows, case.hq, words),
        torch.randint(0, 2, (batch, case.hq), generator=generator, dtype=torch.int32),
        bits(batch, case.hq, words),
        bits(batch, case.hq, words),
    )
    sizes = (case.block_m, case.block_n, case.causal, sink, window)
    want = torch.ops.bsfa.pattern_mask(
        *tensors, inputs.cu_q, inputs.cu_k, inputs.seqlens_k, inputs.max_q, inputs.max_k, *sizes
    )
    on_device = [t.to(DEVICE) for t in tensors]
    poison(want[0].shape, want[1].shape, device=DEVICE)
    with no_sync():
        got = torch.ops.bsfa.pattern_mask(
            *on_device, there.cu_q, there.cu_k, there.seqlens_k, there.max_q, there.max_k, *sizes
        )
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


# --- the policy -------------------------------------------------------------------------------------------------------

POLICY_CASES = [
    *table(BASE, lengths=square(1, 128, 3000), dim=[64, 128], dtype=[BF16, F16]),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False]),
    *table(replace(BASE, lengths=((300, 4000), (300, 2100)), layout=PAGED), page_size=[1, 16, 128]),
    replace(BASE, lengths=((300, 4000),), softcap=5.0, scale=0.3),
]


def policy_for(case: Case, **options: Any) -> FlexPrefill:
    return FlexPrefill(**({"gamma": 0.6, "min_budget": 256} | options), block_m=case.block_m, block_n=case.block_n)


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", POLICY_CASES, ids=str)
def test_policy_keeps_what_it_keeps_on_the_cpu(case: Case, tau: float) -> None:
    inputs = case.make()
    there = inputs.to(DEVICE)
    policy = policy_for(case, tau=tau)
    want = inputs.run(policy, return_info=True)[1].mask
    first = there.run(policy, return_info=True)[1].mask  # what is made once per process may synchronise
    with no_sync():
        got = there.run(policy, return_info=True)[1].mask
    assert torch.equal(got.words, first.words) and torch.equal(got.counts, first.counts)
    assert torch.equal(got.counts.cpu(), got.to_rows().sum(-1, dtype=torch.int32).cpu())
    other = (got.words.cpu() != want.words).any(-1)
    assert int(other.sum()) <= 0.05 * other.numel(), f"{int(other.sum())} of {other.numel()} rows differ"


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_lines_are_found(dtype: torch.dtype) -> None:
    """A needle and a diagonal: kept in every row that sees them."""
    length, dim = 4096, 64
    g = torch.Generator().manual_seed(5)
    q, k = (0.1 * torch.randn(length, dim, generator=g) for _ in range(2))
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=g), dim=0)
    q[-128:] += 8.0 * direction
    k[1500] += 20.0 * direction

    def wave(shift: int) -> Tensor:
        angles = (torch.arange(length) + shift)[:, None] * torch.linspace(0.05, 2.6, dim // 2)
        return 2.5 * torch.cat([angles.cos(), angles.sin()], dim=-1)

    heads = torch.stack([q, wave(0)], dim=1)[None].to(dtype).to(DEVICE)
    keys = torch.stack([k, wave(700)], dim=1)[None].to(dtype).to(DEVICE)
    policy = FlexPrefill(min_budget=512)
    info = bsfa.attention(heads, keys, keys, policy=policy, return_info=True)[1]
    rows = info.mask.to_rows().cpu()  # type: ignore[union-attr]
    assert rows[1500 // 128 :, 0, 1500 // 128].all()
    own = torch.arange(32)
    for diagonal in (700 // 128, 700 // 128 + 1):
        assert rows[own[diagonal:], 1, own[diagonal:] - diagonal].all()
    assert float(info.density()) < 0.6  # type: ignore[union-attr]


@cuda_only
def test_cuda_graph() -> None:
    case = replace(BASE, lengths=((300, 4000), (300, 2100)), layout=PAGED)
    inputs = case.make().to("cuda")
    policy = policy_for(case, tau=0.1)
    want = inputs.run(policy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.run(policy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = inputs.run(policy)
    got.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@cuda_only
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": F32}, "takes? bfloat16"),
        ({"dim": 32}, "head_dim 32"),
        ({"block_m": 64}, "block_m x block_n"),
        ({"strides": "gaps"}, "strides"),
    ],
    ids=str,
)
def test_unsupported(changes: dict[str, Any], match: str) -> None:
    case = replace(BASE, lengths=((300, 300),), **changes)
    inputs = case.make().to("cuda")
    with pytest.raises(bsfa.UnsupportedError, match=match):
        inputs.run(policy_for(case))
