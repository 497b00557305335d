"""Where the tokens of each sequence lie, which mask rows exist, and the checks of both.

Coordinates follow csrc/include/bsfa/geometry.h: KV blocks count from the start of the sequence, and query tiles are
aligned to absolute positions (causal: query row i sits at ``seqlen_k - seqlen_q + i``), so that a prompt has the same
tiles however it is cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_BLOCK = 4096


@dataclass(frozen=True)
class Layout:
    """The token layout of one call: batched, packed (varlen) or paged. Built by the checks below; not user facing."""

    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    total_q: int
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    seqlens_k: Tensor | None = None

    def lengths_q(self, device: torch.device) -> Tensor:
        """Query tokens per sequence, int32 [B]."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]
        return torch.full((self.batch,), self.max_seqlen_q, dtype=torch.int32, device=device)

    def lengths_k(self, device: torch.device) -> Tensor:
        """KV tokens per sequence, int32 [B]."""
        if self.cu_seqlens_k is not None:
            return self.cu_seqlens_k[1:] - self.cu_seqlens_k[:-1]
        if self.seqlens_k is not None:
            return self.seqlens_k
        return torch.full((self.batch,), self.max_seqlen_k, dtype=torch.int32, device=device)

    def num_mask_rows(self, block_m: int) -> int:
        """Mask rows to allocate: exact for batched layouts, else an upper bound that needs no device value."""
        if self.cu_seqlens_q is not None:
            return self.total_q // block_m + 2 * self.batch
        if self.max_seqlen_q == 0:
            return 0
        if self.seqlens_k is None and self.cu_seqlens_k is None:
            offset = self.max_seqlen_k - self.max_seqlen_q if self.causal else 0
            return self.batch * ((offset + self.max_seqlen_q - 1) // block_m - offset // block_m + 1)
        return self.batch * ((self.max_seqlen_q + block_m - 2) // block_m + 1)


def check_block_sizes(block_m: int, block_n: int) -> None:
    """Raise ``ValueError``/``TypeError`` unless both sizes are integers in 1 .. 4096 tokens."""
    for name, value in (("block_m", block_m), ("block_n", block_n)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int (tokens), got {type(value).__name__}")
        if not 1 <= value <= MAX_BLOCK:
            raise ValueError(f"{name} must be 1 .. {MAX_BLOCK} tokens, got {value}")


def check_data(name: str, t: Tensor, dims: tuple[int, ...], like: Tensor | None = None) -> None:
    """Check type, rank, dtype, device, strides and autograd state of a q, k, v or lse-like tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if t.dim() not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions, got shape {tuple(t.shape)}")
    if like is not None:
        if t.dtype != like.dtype:
            raise TypeError(f"{name} is {t.dtype} but q is {like.dtype}: all inputs must have one dtype")
        if t.device != like.device:
            raise ValueError(f"{name} is on {t.device} but q is on {like.device}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {t.stride()}")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad: bsfa is forward only. Call it under torch.no_grad() or detach {name}")


def _extent(t: Tensor) -> tuple[int, int]:
    """The first element of its storage that ``t`` touches, and the last."""
    first = int(t.storage_offset())
    return first, first + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the stretches of memory from the first to the last element of each overlap."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (a_first, a_last), (b_first, b_last) = _extent(a), _extent(b)
    return a_first <= b_last and b_first <= a_last


def check_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the tensor that the result of attention is to be written into."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor or None, got {type(out).__name__}")
    if out.dtype != q.dtype:
        raise TypeError(f"out is {out.dtype} but q is {q.dtype}")
    if out.device != q.device:
        raise ValueError(f"out is on {out.device} but q is on {q.device}")
    shape = (*q.shape[:-1], v.shape[-1])
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {tuple(shape)} (q's, with v's head_dim), got {tuple(out.shape)}")
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out must have unit stride in its last dimension, got strides {out.stride()}")
    if out.requires_grad:
        raise ValueError("out requires grad: bsfa is forward only and writes into it. Give a tensor without, or detach")
    steps = [(out.stride(i), n) for i, n in enumerate(out.shape) if n > 1]
    if any(stride == 0 for stride, _ in steps):
        raise ValueError(f"out overlaps itself in memory: shape {tuple(out.shape)} with strides {out.stride()}")
    if torch.compiler.is_compiling():
        return  # strides may be symbols there, and the result is complete before it is copied to out
    reach = 0  # of the smaller steps together: a step within it may lead to an element twice
    for stride, size in sorted(steps):
        if stride <= reach and out.numel() > 0:
            raise ValueError(f"out overlaps itself in memory: shape {tuple(out.shape)} with strides {out.stride()}")
        reach += stride * (size - 1)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if _overlap(out, t):
            raise ValueError(f"out may overlap {name} in memory, which is read while out is written: give it its own")


def check_index(name: str, t: Tensor, dim: int, data: Tensor, size: int | None = None) -> None:
    """Check an int32 index tensor (cu_seqlens, seqlens, block_table)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {t.dtype}")
    if t.dim() != dim or (size is not None and t.shape[0] != size):
        want = "x".join([str(size) if size is not None else "*"] + ["*"] * (dim - 1))
        raise ValueError(f"{name} must have shape {want}, got {tuple(t.shape)}")
    if t.device != data.device:
        raise ValueError(f"{name} is on {t.device} but the data is on {data.device}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")


def check_length(name: str, value: int) -> None:
    """Raise unless ``value`` is a number of tokens."""
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def check_values(layout: Layout, total_k: int | None, num_pages: int | None, page_size: int | None) -> None:
    """Check the values of cu_seqlens, seqlens_k and block_table where they can be read without a device sync."""
    if torch.compiler.is_compiling():
        return
    for name, cu, longest, total in (
        ("cu_seqlens_q", layout.cu_seqlens_q, layout.max_seqlen_q, layout.total_q),
        ("cu_seqlens_k", layout.cu_seqlens_k, layout.max_seqlen_k, total_k),
    ):
        if cu is None or cu.device.type != "cpu":
            continue
        values = cu.tolist()
        lengths = [b - a for a, b in pairwise(values)]
        if values[0] != 0 or any(n < 0 for n in lengths):
            raise ValueError(f"{name} must start with 0 and never decrease, got {values}")
        if total is not None and values[-1] != total:
            raise ValueError(f"{name} ends at {values[-1]}, but {total} tokens were given")
        if max(lengths, default=0) > longest:
            raise ValueError(f"{name} has a sequence of {max(lengths)} tokens, longer than max_seqlen = {longest}")
    if layout.seqlens_k is None or layout.seqlens_k.device.type != "cpu":
        return
    seqlens = layout.seqlens_k.tolist()
    if any(n < 0 or n > layout.max_seqlen_k for n in seqlens):
        raise ValueError(f"seqlens_k must be 0 .. max_seqlen_k = {layout.max_seqlen_k}, got {seqlens}")
    if layout.block_table is not None and num_pages is not None and page_size is not None:
        for b, n in enumerate(seqlens):
            pages = layout.block_table[b, : (n + page_size - 1) // page_size]
            if pages.numel() and (int(pages.min()) < 0 or int(pages.max()) >= num_pages):
                raise ValueError(f"block_table row {b} names a page outside 0 .. {num_pages - 1} within its {n} tokens")


def paged_length(page_size: int, block_table: Tensor, max_seqlen_k: int | None) -> int:
    """The longest sequence to expect of a paged cache (default: what ``block_table`` can hold), checked."""
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}")
    capacity = block_table.shape[1] * page_size
    if max_seqlen_k is None:
        return capacity
    check_length("max_seqlen_k", max_seqlen_k)
    if max_seqlen_k > capacity:
        raise ValueError(f"max_seqlen_k = {max_seqlen_k} exceeds what block_table can hold ({capacity} tokens)")
    return max_seqlen_k


def key_layout(
    k: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    block_table: Tensor | None,
    seqlens_k: Tensor | None,
) -> Layout:
    """Layout of keys alone: batched, packed or paged, without queries."""
    if block_table is not None:
        if seqlens_k is None or cu_seqlens_k is not None or k.dim() != 4:
            raise ValueError("paged keys are [num_pages, page_size, Hkv, D] with block_table and seqlens_k")
        check_index("block_table", block_table, 2, k)
        batch = block_table.shape[0]
        check_index("seqlens_k", seqlens_k, 1, k, batch)
        longest = paged_length(k.shape[1], block_table, max_seqlen_k)
        layout = Layout(batch, 0, longest, False, 0, block_table=block_table, seqlens_k=seqlens_k)
        check_values(layout, None, k.shape[0], k.shape[1])
        return layout
    if cu_seqlens_k is not None:
        if max_seqlen_k is None or k.dim() != 3 or seqlens_k is not None:
            raise ValueError("packed keys are [total_k, Hkv, D] with cu_seqlens_k and max_seqlen_k, and no seqlens_k")
        check_index("cu_seqlens_k", cu_seqlens_k, 1, k)
        if cu_seqlens_k.shape[0] < 1:
            raise ValueError("cu_seqlens_k must have at least one entry")
        check_length("max_seqlen_k", max_seqlen_k)
        layout = Layout(cu_seqlens_k.shape[0] - 1, 0, max_seqlen_k, False, 0, cu_seqlens_k=cu_seqlens_k)
        check_values(layout, k.shape[0], None, None)
        return layout
    if k.dim() != 4 or seqlens_k is not None:
        raise ValueError("batched keys are [B, Sk, Hkv, D] and take no seqlens_k")
    if max_seqlen_k is not None and max_seqlen_k != k.shape[1]:
        raise ValueError(f"max_seqlen_k = {max_seqlen_k} contradicts k of shape {tuple(k.shape)}")
    return Layout(k.shape[0], 0, k.shape[1], False, 0)


def batched_layout(q: Tensor, k: Tensor, causal: bool) -> Layout:
    """Layout of [B, Sq, Hq, D] against [B, Sk, Hkv, D]."""
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]} but k has batch {k.shape[0]}")
    return Layout(q.shape[0], q.shape[1], k.shape[1], causal, q.shape[0] * q.shape[1])


def varlen_layout(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
) -> Layout:
    """Layout of packed [total_q, Hq, D] against packed [total_k, Hkv, D]."""
    check_index("cu_seqlens_q", cu_seqlens_q, 1, q)
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q must have at least one entry")
    check_index("cu_seqlens_k", cu_seqlens_k, 1, q, cu_seqlens_q.shape[0])
    check_length("max_seqlen_q", max_seqlen_q)
    check_length("max_seqlen_k", max_seqlen_k)
    layout = Layout(
        cu_seqlens_q.shape[0] - 1,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        q.shape[0],
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    check_values(layout, k.shape[0], None, None)
    return layout


def paged_layout(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
) -> Layout:
    """Layout of batched or packed queries against [num_pages, page_size, Hkv, D] pages."""
    check_index("block_table", block_table, 2, q)
    batch = block_table.shape[0]
    check_index("seqlens_k", seqlens_k, 1, q, batch)
    max_seqlen_k = paged_length(k_cache.shape[1], block_table, max_seqlen_k)
    if cu_seqlens_q is not None:
        if q.dim() != 3:
            raise ValueError(f"with cu_seqlens_q, q must be packed [total_q, Hq, D], got shape {tuple(q.shape)}")
        check_index("cu_seqlens_q", cu_seqlens_q, 1, q, batch + 1)
        if max_seqlen_q is None:
            raise ValueError("packed q needs max_seqlen_q")
        check_length("max_seqlen_q", max_seqlen_q)
        total_q = q.shape[0]
    else:
        if q.dim() != 4 or q.shape[0] != batch:
            raise ValueError(f"without cu_seqlens_q, q must be [B = {batch}, Sq, Hq, D], got shape {tuple(q.shape)}")
        if max_seqlen_q is not None and max_seqlen_q != q.shape[1]:
            raise ValueError(f"max_seqlen_q = {max_seqlen_q} contradicts q of shape {tuple(q.shape)}")
        max_seqlen_q = q.shape[1]
        total_q = batch * max_seqlen_q
    layout = Layout(
        batch,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        total_q,
        cu_seqlens_q=cu_seqlens_q,
        block_table=block_table,
        seqlens_k=seqlens_k,
    )
    check_values(layout, None, k_cache.shape[0], k_cache.shape[1])
    return layout


def check_heads(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Check head counts and head dims of q against k (and v against k)."""
    hq, hkv = q.shape[-2], k.shape[-2]
    if hkv == 0 or hq == 0 or hq % hkv != 0:
        raise ValueError(f"query heads ({hq}) must be a multiple of KV heads ({hkv})")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head_dim {q.shape[-1]} but k has {k.shape[-1]}")
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 .. {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if v is not None:
        if v.shape[:-1] != k.shape[:-1]:
            raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}: all but head_dim must agree")
        if not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim of v must be 1 .. {MAX_HEAD_DIM}, got {v.shape[-1]}")
