"""What the Python API does with CUDA tensors: what has a kernel runs (see the other files), the rest is refused."""

from __future__ import annotations

import functools

import pytest
import torch

import bsfa
from bsfa.policies import (
    Antidiagonal,
    CumulativeMass,
    FlexPrefill,
    Policy,
    RelativeMax,
    StaticPattern,
    Union,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def qkv(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 300, 4, 64, generator=generator).bfloat16().to(device)
    k, v = (torch.randn(2, 300, 2, 64, generator=generator).bfloat16().to(device) for _ in range(2))
    return q, k, v


def test_static_pattern_is_the_same_on_both_devices() -> None:
    policy = bsfa.policies.StaticPattern(block_m=64, block_n=32, sink_blocks=1, window_blocks=2)
    masks = [bsfa.select_blocks(qkv(device)[0], None, policy, seqlen_k=450) for device in ("cpu", "cuda")]
    assert all(isinstance(m, bsfa.BlockMask) for m in masks)
    cpu, cuda = masks
    assert cuda.device.type == "cuda"
    assert torch.equal(cpu.words, cuda.words.cpu()) and torch.equal(cpu.counts, cuda.counts.cpu())
    assert float(cpu.density()) == pytest.approx(float(cuda.density()))
    assert torch.equal((cpu | cpu).to_bool(), (cuda | cuda).to_bool().cpu())
    assert "cuda" in repr(cuda)


def test_fixed_mask_of_another_device_is_refused() -> None:
    q, _, _ = qkv("cuda")
    mask = bsfa.BlockMask.from_bool(torch.ones(2, 1, 3, 3, dtype=torch.bool), seqlen_q=300, seqlen_k=300)
    with pytest.raises(ValueError, match="the mask is on cpu"):
        bsfa.select_blocks(q, None, bsfa.policies.Fixed(mask=mask), seqlen_k=300)


POLICIES = [
    RelativeMax(alpha=1.0, sink_blocks=1, window_blocks=1, last_tiles=1),
    RelativeMax(alpha=1.0, shared=True, sink_blocks=1, window_blocks=1, last_tiles=1),
    CumulativeMass(mass=0.5),
    CumulativeMass(mass=0.5, pooling="flat64", shared=True),
    Antidiagonal(mass=0.5),
    FlexPrefill(gamma=0.5, min_budget=128),
    StaticPattern(sink_blocks=1, window_blocks=2),
    Union(RelativeMax(alpha=1.0, last_tiles=0), Antidiagonal(mass=0.3)),
]


@pytest.mark.parametrize("mean_correction", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_pool_select_attend_without_a_sync_and_in_a_graph(policy: Policy, mean_correction: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 1500, 4, 64, generator=generator).bfloat16().cuda()
    k, v = (torch.randn(2, 1500, 2, 64, generator=generator).bfloat16().cuda() for _ in range(2))
    run = functools.partial(bsfa.attention, q, k, v, policy=policy, mean_correction=mean_correction)
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want, info = run(return_info=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert info.mask is not None and 0.0 < float(info.mask.density()) < 1.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in (1, 2):  # the same inputs, and others
        generator = torch.Generator().manual_seed(seed)
        q.copy_(torch.randn(2, 1500, 4, 64, generator=generator).bfloat16())
        for t in (k, v):
            t.copy_(torch.randn(2, 1500, 2, 64, generator=generator).bfloat16())
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want if seed == 1 else run())


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a library that was built before an operation had a kernel."""
    q, k, v = qkv("cuda")
    _, lse = bsfa.attention(q, k, v, return_lse=True)
    assert bsfa.block_mass(q, k, lse).isfinite().all()
    monkeypatch.setitem(bsfa._library.KERNELS, "cuda", bsfa._library.KERNELS["cuda"] - {"block_mass"})
    with pytest.raises(bsfa.UnsupportedError, match=r"'block_mass'.*cuda"):
        bsfa.block_mass(q, k, lse)


def test_doctor_names_the_gpu() -> None:
    report = bsfa.doctor()
    assert report["machine"]["gpus"][0]["name"]
    for operation in ("pool_blocks", "attention", "block_mass", "tile_max"):
        assert report["operations"][operation]["cuda"] == "ok"
        assert any(row["op"] == operation and row["device"] == "cuda" for row in report["kernels"])
