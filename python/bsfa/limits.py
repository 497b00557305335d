"""What the compiled GPU kernels can run: the kernel table, read once, and calls held against it.

The CPU kernels run whatever passes the argument checks. A call that no kernel of its GPU can run raises
:class:`bsfa.UnsupportedError` before any kernel starts. torch.compile traces the checks and leaves nothing of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsfa._library import kernel_table, require_kernel
from bsfa.errors import UnsupportedError

Range = tuple[int, int]  # first and last
HeadDims = tuple[int, int, int | None]  # first and last of q and k; that of v where it differs
Blocks = tuple[int, int]  # block_m, block_n

#: Kernels that read through TMA descriptors need addresses and strides of this many bytes.
TMA_BYTES = 16


@dataclass(frozen=True)
class Limits:
    """One row of the kernel table. None: anything goes."""

    arch: str
    capabilities: Range  #: first and last compute capability that runs ``arch``, as 10 * major + minor
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[HeadDims, ...] | None
    blocks: tuple[Blocks, ...] | None
    rules: tuple[str, ...] | None = None  #: score rules, of operations that have them
    strides: tuple[Range, ...] | None = None  #: of the rule antidiagonal
    sharings: tuple[str, ...] | None = None  #: how the heads of a KV head share, of operations with rules
    max_blocks: int | None = None  #: KV blocks of a mask row


def _capabilities(arch: str) -> Range:
    """sm_90a runs on 9.0 alone, sm_80 on 8.0 and later 8.x."""
    found = re.fullmatch(r"sm_(\d+)(\d)([a-z]?)", arch)
    if found is None:
        raise ValueError(f"unknown arch {arch!r} in the kernel table")
    major, minor = int(found[1]), int(found[2])
    return 10 * major + minor, 10 * major + (minor if found[3] else 9)


def _ranges(text: str) -> tuple[Range, ...] | None:
    """``any``, or numbers and ranges of them: ``64, 128``, ``1..256``."""
    if text == "any":
        return None
    ends = [part.split("..") for part in text.split(",")]
    return tuple((int(e[0]), int(e[-1])) for e in ends)


def _head_dims(text: str) -> tuple[HeadDims, ...] | None:
    """Like :func:`_ranges`, and ``192/128``: 192 of q and k with 128 of v."""
    if text == "any":
        return None
    parts = [part.strip().partition("/") for part in text.split(",")]
    return tuple((*_ranges(k)[0], int(v) if v else None) for k, _, v in parts)  # type: ignore[index]


def _blocks(text: str) -> tuple[Blocks, ...] | None:
    """``any``, or pairs: ``128x128, 128x64``."""
    if text == "any":
        return None
    pairs = [part.split("x") for part in text.split(",")]
    return tuple((int(m), int(n)) for m, n in pairs)


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names between commas; None stays."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def parse(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], tuple[Limits, ...]]:
    """The GPU rows of a kernel table (:func:`bsfa.doctor`), by operation and device type."""
    table: dict[tuple[str, str], tuple[Limits, ...]] = {}
    for row in rows:
        if row["device"] == "cpu":
            continue
        limits = Limits(
            row["arch"],
            _capabilities(row["arch"]),
            tuple(getattr(torch, name.strip()) for name in row["dtypes"].split(",")),
            _head_dims(row["head_dim"]),
            _blocks(row.get("blocks", "any")),
            _names(row.get("rule")),
            _ranges(row.get("stride", "any")),
            _names(row.get("sharing")),
            row.get("max_blocks"),
        )
        key = (row["op"], row["device"])
        table[key] = (*table.get(key, ()), limits)
    return table


LIMITS = parse(kernel_table())

_capability_of: dict[int, int] = {}


@torch.compiler.assume_constant_result
def device_capability(index: int) -> int:
    """10 * major + minor of a CUDA device, asked once. A number, since torch 2.11 fails to compile with the tuple."""
    if index not in _capability_of:
        major, minor = torch.cuda.get_device_capability(index)
        _capability_of[index] = 10 * major + minor
    return _capability_of[index]


def _in_ranges(value: int, ranges: Iterable[Range] | None) -> bool:
    return ranges is None or any(first <= value <= last for first, last in ranges)


def _numbers(ranges: Iterable[Range]) -> str:
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in ranges)


def _takes_dims(head_dim: int, head_dim_v: int, dims: Iterable[HeadDims] | None) -> bool:
    return dims is None or any(
        first <= head_dim <= last and head_dim_v == (head_dim if v is None else v) for first, last, v in dims
    )


def check_limits(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    blocks: Blocks | None = None,
    rule: str | None = None,
    stride: int | None = None,
    sharing: str | None = None,
    num_blocks: int | None = None,
    head_dim_v: int | None = None,
) -> None:
    """Raise :class:`UnsupportedError` unless a kernel of ``op`` can run this on ``device``.

    head_dim: of q and k; head_dim_v: of v, None where there is none, or the same.
    blocks: block_m and block_n of the mask; None where there is none. For a selection, rule: its score rule; stride:
    that of the rule's groups of tokens, None where it has no such groups; sharing: how the query heads of a KV head
    share scores or masks; num_blocks: KV blocks of the longest sequence.
    """
    require_kernel(op, device)
    rows = LIMITS.get((op, device.type))
    if rows is None:
        return
    cannot = f"bsfa operation '{op}' cannot run on {device}"
    if rule is not None:
        rows = tuple(r for r in rows if r.rules is None or rule in r.rules)
        if not rows:
            raise UnsupportedError(
                f"{cannot} by the score rule {rule}, which has no kernel there. Move the tensors to the CPU."
            )
    has = device_capability(device.index)
    fit = [r for r in rows if r.capabilities[0] <= has <= r.capabilities[1]]
    if not fit:
        raise UnsupportedError(
            f"{cannot}: its kernels are compiled for {', '.join(r.arch for r in rows)}, this device has compute "
            f"capability {has // 10}.{has % 10}. Move the tensors to the CPU."
        )
    rows, fit = tuple(fit), [r for r in fit if dtype in r.dtypes]
    if not fit:
        takes = ", ".join(str(t).removeprefix("torch.") for r in rows for t in r.dtypes)
        raise UnsupportedError(
            f"{cannot} in {str(dtype).removeprefix('torch.')}: its kernels take {takes}. Convert the tensors, or move "
            "them to the CPU."
        )
    dim_v = head_dim if head_dim_v is None else head_dim_v
    rows, fit = tuple(fit), [r for r in fit if _takes_dims(head_dim, dim_v, r.head_dims)]
    if not fit:
        dims = [x for r in rows for x in r.head_dims or ()]
        takes = ", ".join(_numbers([x[:2]]) + (f" (v: {x[2]})" if x[2] else "") for x in dims)
        given = f"head_dim {head_dim}" + ("" if dim_v == head_dim else f" of q and k and {dim_v} of v")
        raise UnsupportedError(
            f"{cannot} with {given}: its kernels take {takes}. Pad the head_dim with zeros (and keep the "
            "softmax_scale of the true one), or move the tensors to the CPU."
        )
    rows, fit = tuple(fit), [r for r in fit if stride is None or _in_ranges(stride, r.strides)]
    if not fit:
        takes = _numbers(x for r in rows for x in r.strides or ())
        raise UnsupportedError(
            f"{cannot} with a stride of {stride}: its kernels take {takes}. Give the policy such a stride, or move the "
            "tensors to the CPU."
        )
    rows, fit = tuple(fit), [r for r in fit if sharing is None or r.sharings is None or sharing in r.sharings]
    if not fit:
        takes = ", ".join(name for r in rows for name in r.sharings or ())
        raise UnsupportedError(
            f"{cannot} by the score rule {rule} with the head sharing '{sharing}': its kernels take {takes}. Choose "
            "one of these, or move the tensors to the CPU."
        )
    rows, fit = tuple(fit), [r for r in fit if blocks is None or r.blocks is None or blocks in r.blocks]
    if blocks is not None and not fit:
        takes = ", ".join(f"{m} x {n}" for r in rows for m, n in r.blocks or ())
        raise UnsupportedError(
            f"{cannot} with a mask of {blocks[0]} x {blocks[1]} tokens (block_m x block_n): its kernels take {takes}. "
            "Give the policy or the mask these block sizes, or move the tensors to the CPU."
        )
    if num_blocks is not None and not any(r.max_blocks is None or num_blocks <= r.max_blocks for r in fit):
        most = max(r.max_blocks or 0 for r in fit)
        of_rule, remedy = ("", "Move") if rule is None else ("for this score rule ", "Choose another policy, or move")
        raise UnsupportedError(
            f"{cannot} with {num_blocks} KV blocks in a sequence: its kernels {of_rule}take at most {most}. {remedy} "
            "the tensors to the CPU."
        )


def check_bounds(device: torch.device, dtype: torch.dtype, head_dim: int, blocks: Blocks, max_seqlen_k: int) -> None:
    """Raise :class:`UnsupportedError` unless ``ExactSkip(bounds=True)`` has its kernel on ``device``, or has no need of
    one there: on the CPU.
    """
    if device.type == "cpu":
        return
    try:
        check_limits("bound_mask", device, dtype, head_dim, blocks, num_blocks=-(-max_seqlen_k // blocks[1]))
    except UnsupportedError as error:
        raise UnsupportedError(
            f"ExactSkip(bounds=True): {error} Or leave bounds off: it has no say in the result, only in the time."
        ) from None


def check_tma(op: str, **tensors: Tensor) -> None:
    """Raise :class:`UnsupportedError` unless TMA descriptors can describe the tensors: rows on 16 bytes, none expanded.

    Where the data begins is judged by the storage offset (torch allocates on far more than 16 bytes), which
    torch.compile cannot see: there it is left to the operator.
    """
    for name, t in tensors.items():
        step = TMA_BYTES // t.element_size()
        offset = 0 if torch.compiler.is_compiling() else t.storage_offset()
        if offset % step == 0 and t.shape[-1] % step == 0 and t.is_contiguous():
            continue  # the usual case, for short
        strides = [t.stride(i) for i in range(t.dim() - 1) if t.shape[i] > 1]
        if offset % step != 0 or any(s % step != 0 or s == 0 for s in strides):
            remedy = "clone" if offset % step else "contiguous"  # contiguous() does not move what is contiguous
            raise UnsupportedError(
                f"bsfa operation '{op}' cannot run on {t.device} with {name} of strides {t.stride()} and storage "
                f"offset {offset}: its kernels need multiples of {step} elements ({TMA_BYTES} bytes), and no stride of "
                f"0 (expand). Call {name}.{remedy}()."
            )
