"""The pooling operator, for those who have checked where the keys lie."""

from __future__ import annotations

import torch
from torch import Tensor

import bsfa.ops  # noqa: F401  fake kernels
from bsfa.layout import Layout
from bsfa.limits import check_limits

#: What may stand for a block of keys (Pooling in csrc/include/bsfa/params.h).
POOLINGS = ("mean", "maxabs", "center")


def check_pooling(pooling: str) -> None:
    """Raise ``ValueError`` unless ``pooling`` is one of :data:`POOLINGS`."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def pool(k: Tensor, layout: Layout, block_n: int, pooling: str = "mean") -> Tensor:
    """Run the pooling operator on inputs that have been checked."""
    check_limits("pool_blocks", k.device, k.dtype, k.shape[-1])
    summary: Tensor = torch.ops.bsfa.pool_blocks(
        k, layout.cu_seqlens_k, layout.block_table, layout.seqlens_k, layout.max_seqlen_k, block_n, pooling
    )
    return summary
