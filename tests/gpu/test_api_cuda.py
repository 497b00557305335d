"""What the Python API does with CUDA tensors: what has a kernel runs (see the other files), the rest is refused."""

from __future__ import annotations

import pytest
import torch

import bsfa

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


@pytest.mark.parametrize(
    ("policy", "operation"),
    [
        (bsfa.policies.RelativeMax(), "select_blocks"),
        (bsfa.policies.CumulativeMass(), "select_blocks"),
    ],
)
def test_missing_kernels_are_named(policy: bsfa.policies.Policy | None, operation: str) -> None:
    if operation in bsfa._library.KERNELS["cuda"]:
        pytest.skip(f"{operation} has a CUDA kernel")
    q, k, v = qkv("cuda")
    with pytest.raises(bsfa.UnsupportedError, match=f"'{operation}'.*cuda"):
        bsfa.attention(q, k, v, policy=policy)


def test_doctor_names_the_gpu() -> None:
    report = bsfa.doctor()
    assert report["machine"]["gpus"][0]["name"]
    for operation in ("pool_blocks", "attention"):
        assert report["operations"][operation]["cuda"] == "ok"
        assert any(row["op"] == operation and row["device"] == "cuda" for row in report["kernels"])
