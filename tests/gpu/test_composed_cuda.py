"""Composed policies and the algebra of masks on CUDA: what the CPU gives, without a host sync, and in CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bsfa
from bsfa.block_mask import popcount
from bsfa.policies import Fixed, Intersection, Policy, StaticPattern, Union
from cases import BF16, PACKED, Case

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CASE = Case(
    lengths=((300, 700), (0, 0), (100, 130), (65, 1500)),
    layout=PACKED,
    hq=4,
    hkv=2,
    dim=64,
    dtype=BF16,
    block_m=128,
    block_n=128,
    mask="random",
)


def policies(fixed: bsfa.BlockMask) -> list[Policy]:
    near, mine = StaticPattern(sink_blocks=1, window_blocks=2), Fixed(mask=fixed)
    return [Union(near, mine), Intersection(near, mine), Intersection(mine, Union(near, mine)), Union(near, None)]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("mask_heads", ["q", "kv", "one"])
def test_masks_are_those_of_the_cpu(mask_heads: str, which: int) -> None:
    case = replace(CASE, mask_heads=mask_heads)
    here = case.make()
    there = here.to("cuda")
    fixed = here.block_mask([here.draw_mask(b) for b in range(len(here))])
    want = bsfa.select_blocks(here.q, None, policies(fixed)[which], **here.layout_select)
    moved = fixed.to("cuda")
    assert moved.device.type == "cuda" and torch.equal(moved.to("cpu").words, fixed.words)
    policy = policies(moved)[which]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = bsfa.select_blocks(there.q, None, policy, **there.layout_select)
        there.run(policy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if want is None:
        assert got is None
        return
    assert isinstance(got, bsfa.BlockMask) and isinstance(want, bsfa.BlockMask)
    assert torch.equal(got.words.cpu(), want.words) and torch.equal(got.counts.cpu(), want.counts)


def test_cuda_graph() -> None:
    here = CASE.make()
    there = here.to("cuda")
    fixed = here.block_mask([here.draw_mask(b) for b in range(len(here))]).to("cuda")
    policy = policies(fixed)[1]
    want = there.run(policy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = there.run(policy)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_popcount() -> None:
    words = torch.randint(-(2**31), 2**31, (10000,)).to(torch.int32)
    assert torch.equal(popcount(words.cuda()).cpu(), popcount(words))
