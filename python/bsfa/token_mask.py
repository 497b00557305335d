"""TokenMask: which keys each query sees, token by token, for all heads alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bsfa.ops  # noqa: F401  fake kernels
from bsfa.block_mask import BlockMask, MaskGeometry, pack_bits, unpack_bits
from bsfa.layout import Layout, check_block_sizes, check_index, check_length, check_values
from bsfa.limits import check_limits

BLOCK = 128


@dataclass(frozen=True, eq=False, repr=False)
class TokenMask:
    """Which keys each query sees, shared by all heads: a bitmask on the device.

    ``words``: int32 ``[B, seqlen_q, W]``, or ``[total_q, W]`` for packed queries, rows where q has them; bit ``j % 32``
    of word ``j // 32`` is the key at position j of the row's sequence (an absolute position, whatever the chunk).
    ``W = ceil(seqlen_k / 32)`` rounded up to a multiple of 4, so that every row starts on 16 bytes; bits past a row's
    keys are zero. Keys that causality hides are cleared.
    ``counts``: int32 ``[B, seqlen_q]`` or ``[total_q]``, keys of each row. 0: the row's output is 0, its LSE -inf.
    ``blocks``: the :class:`BlockMask` of the 128 x 128 blocks that hold a key of some row, for all heads; made in the
    same pass. What it drops, attention does not compute.
    ``status``: int64 [2], how many indices were invalid and where the first was; see :meth:`from_indices`.
    """

    words: Tensor
    counts: Tensor
    blocks: BlockMask
    status: Tensor

    @property
    def seqlen_k(self) -> int:
        """Keys of the longest sequence."""
        return self.blocks.geometry.max_seqlen_k

    @property
    def device(self) -> torch.device:
        """Device of the bitmask."""
        return self.words.device

    @property
    def invalid(self) -> Tensor:
        """How many indices were neither -1 nor a key of their sequence: an int64 scalar on the device."""
        return self.status[0]

    def check(self) -> TokenMask:
        """Raise ``ValueError`` if an index was invalid, saying how many and where the first is; else return the mask.

        Waits for the device.
        """
        count, place = self.status.tolist()
        if count == 0:
            return self
        raise ValueError(
            f"{count} of the indices of a TokenMask are neither -1 nor a key of their sequence, the first of them is "
            f"element {place} of topk_indices in row-major order"
        )

    # ---- construction -----------------------------------------------------------------------------------------------

    @staticmethod
    def from_indices(
        topk_indices: Tensor,
        *,
        seqlen_k: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqlens_k: Tensor | None = None,
        causal: bool = True,
        check: bool | None = None,
    ) -> TokenMask:
        """From the keys of each query: int32 ``[B, seqlen_q, topk]``, or ``[total_q, topk]`` with ``cu_seqlens_q``.

        An index is a position in the query's own sequence; -1 is padding. Order does not matter, nor do duplicates;
        rows may be all -1. A key that ``causal`` hides from the row is left out. Made on the device, without a host
        sync; on CUDA the rows are read fastest where they start at multiples of 16 bytes.
        KV lengths (tokens): ``seqlen_k`` for all sequences, or ``cu_seqlens_k``/``seqlens_k`` with ``max_seqlen_k``.
        Packed queries need ``max_seqlen_q``.

        check: an index that is neither -1 nor 0 .. seqlen_k - 1 of its sequence selects nothing, and is never let pass:
        with True it raises ``ValueError`` naming row and index, which waits for the device; with False it is counted
        in :attr:`invalid`, and :meth:`check` raises later, when the caller can afford to wait. Default: True on the
        CPU, where nothing waits, False on a GPU and while torch.compile traces.
        Raises ``ValueError``/``TypeError`` for bad input, :class:`bsfa.UnsupportedError` where there is no kernel.
        """
        layout = _layout(
            topk_indices,
            "topk_indices",
            (seqlen_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_k, causal),
        )
        return mask_of_indices(topk_indices, layout, check)

    @staticmethod
    def from_bool(
        kept: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqlens_k: Tensor | None = None,
        causal: bool = True,
    ) -> TokenMask:
        """From bool ``[B, seqlen_q, seqlen_k]``, or ``[total_q, max_seqlen_k]`` with ``cu_seqlens_q``; see
        :meth:`from_indices`. Keys past a sequence's end, and those that causality hides, are cleared.
        """
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            raise TypeError(f"a token mask must be a bool tensor, got {getattr(kept, 'dtype', type(kept).__name__)}")
        same = cu_seqlens_k is None and seqlens_k is None
        longest = kept.shape[-1] if kept.dim() and max_seqlen_k is None else max_seqlen_k
        lengths = (longest if same else None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, longest, seqlens_k, causal)
        layout = _layout(kept, "kept", lengths)
        if kept.shape[-1] != layout.max_seqlen_k:
            raise ValueError(f"kept has {kept.shape[-1]} keys, but max_seqlen_k = {layout.max_seqlen_k}")
        kept = kept.flatten(0, -2) & _visible(layout, kept.device)
        words = torch.nn.functional.pad(pack_bits(kept), (0, _words(layout.max_seqlen_k) - (kept.shape[-1] + 31) // 32))
        rows = (layout.total_q,) if layout.cu_seqlens_q is not None else (layout.batch, layout.max_seqlen_q)
        return TokenMask(
            words.view(*rows, words.shape[-1]),
            kept.sum(-1, dtype=torch.int32).view(rows),
            _blocks_of(kept, layout, BLOCK, BLOCK),
            torch.tensor([0, -1], dtype=torch.int64, device=kept.device),
        )

    def to(self, device: torch.device | str) -> TokenMask:
        """The same mask on another device; itself if it is there already."""
        words = self.words.to(device)
        if words is self.words:
            return self
        return TokenMask(words, self.counts.to(device), self.blocks.to(device), self.status.to(device))

    # ---- conversion -------------------------------------------------------------------------------------------------

    def to_bool(self) -> Tensor:
        """bool ``[B, seqlen_q, seqlen_k]``, or ``[total_q, seqlen_k]``: which row sees which key."""
        return unpack_bits(self.words, self.seqlen_k)

    def block_mask(self, block_m: int = BLOCK, block_n: int = BLOCK) -> BlockMask:
        """The blocks that hold a key of some row of their tile, one head for all. 128 x 128 is there already
        (``blocks``); other sizes are worked out from the tokens, one byte for each.
        """
        check_block_sizes(block_m, block_n)
        if (block_m, block_n) == (self.blocks.block_m, self.blocks.block_n):
            return self.blocks
        return _blocks_of(self.to_bool().flatten(0, -2), self._own_layout(), block_m, block_n)

    def density(self) -> Tensor:
        """Keys of all rows over the keys that they may see by their positions: a float32 scalar on the device."""
        visible = _visible_counts(self._own_layout(), self.device).sum()
        return self.counts.sum().float() / visible.clamp(min=1).float()

    def _own_layout(self) -> Layout:
        g = self.blocks.geometry
        packed = self.words.dim() == 2
        zero = g.seqlens_q.new_zeros(1)
        return Layout(
            g.seqlens_q.shape[0],
            g.max_seqlen_q,
            g.max_seqlen_k,
            g.causal,
            self.words.shape[0] if packed else self.words.shape[0] * self.words.shape[1],
            cu_seqlens_q=torch.cat([zero, g.seqlens_q.cumsum(0).to(torch.int32)]) if packed else None,
            seqlens_k=None if g.uniform else g.seqlens_k,
        )

    def check_call(self, layout: Layout, device: torch.device) -> None:
        """Raise ``ValueError`` unless the mask was made for a call of this layout. Waits for no GPU."""
        if self.device != device:
            raise ValueError(f"the token mask is on {self.device} but q is on {device}")
        g = self.blocks.geometry
        rows = (layout.total_q,) if layout.cu_seqlens_q is not None else (layout.batch, layout.max_seqlen_q)
        fits = (tuple(self.words.shape[:-1]), g.max_seqlen_q, g.max_seqlen_k, g.causal) == (
            rows,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            layout.causal,
        )
        if fits and device.type == "cpu" and not torch.compiler.is_compiling():
            fits = g.same_lengths(MaskGeometry.of(layout, g.block_m, g.block_n, device))
        if not fits:
            raise ValueError(
                f"the token mask does not fit this call: {self!r} against {list(rows)} queries, max_seqlen_q="
                f"{layout.max_seqlen_q}, max_seqlen_k={layout.max_seqlen_k}, causal={layout.causal}"
            )

    def blocks_for(self, layout: Layout) -> BlockMask:
        """:attr:`blocks` as a call of this layout wants it: a layout whose lengths lie on the device has more rows."""
        rows = layout.num_mask_rows(self.blocks.block_m)
        g = self.blocks.geometry
        if rows == g.num_rows:
            return self.blocks
        if rows < g.num_rows:  # rows in use come first, and are no more than the call needs
            words, counts = self.blocks.words[:rows], self.blocks.counts[:rows]
        else:
            words = torch.nn.functional.pad(self.blocks.words, (0, 0, 0, 0, 0, rows - g.num_rows))
            counts = torch.nn.functional.pad(self.blocks.counts, (0, 0, 0, rows - g.num_rows))
        given_q = given_k = None
        if layout.cu_seqlens_q is not None:
            given_q = layout.lengths_q(self.device) if g.given_q is None else g.given_q
        if layout.cu_seqlens_k is not None or layout.seqlens_k is not None:
            given_k = layout.lengths_k(self.device) if g.given_k is None else g.given_k
        return BlockMask(words, counts, replace(g, num_rows=rows, given_q=given_q, given_k=given_k))

    def __repr__(self) -> str:
        g = self.blocks.geometry
        return (
            f"TokenMask(rows={list(self.words.shape[:-1])}, max_seqlen_q={g.max_seqlen_q}, seqlen_k={self.seqlen_k}, "
            f"causal={g.causal}, device={self.device})"
        )


def mask_of_indices(topk_indices: Tensor, layout: Layout, check: bool | None) -> TokenMask:
    """:meth:`TokenMask.from_indices` for a call's layout; ``topk_indices`` are checked against it."""
    _check_indices("topk_indices", topk_indices, layout)
    if check is not None and not isinstance(check, bool):
        raise TypeError(f"check must be a bool or None, got {type(check).__name__}")
    check_limits(
        "token_mask", topk_indices.device, torch.int32, 0, (BLOCK, BLOCK), num_blocks=-(-layout.max_seqlen_k // BLOCK)
    )
    words, counts, block_words, block_counts, status = torch.ops.bsfa.token_mask(
        topk_indices,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        layout.num_mask_rows(BLOCK),
        BLOCK,
        BLOCK,
        layout.causal,
    )
    geometry = MaskGeometry.of(layout, BLOCK, BLOCK, topk_indices.device)
    mask = TokenMask(words, counts, BlockMask(block_words, block_counts, geometry), status)
    if check is None:
        check = topk_indices.device.type == "cpu" and not torch.compiler.is_compiling()
    if check:
        _raise_if_invalid(mask, topk_indices)
    return mask


def _raise_if_invalid(mask: TokenMask, topk_indices: Tensor) -> None:
    count, place = mask.status.tolist()
    if count == 0:
        return
    row, column = divmod(place, topk_indices.shape[-1])
    value = int(topk_indices.flatten(0, -2)[row, column])
    g = mask.blocks.geometry
    sequence = row // g.max_seqlen_q
    if topk_indices.dim() == 2:
        sequence = int((g.seqlens_q.cumsum(0) <= row).sum())
    where = f"[{row}, {column}]" if topk_indices.dim() == 2 else f"[{sequence}, {row % g.max_seqlen_q}, {column}]"
    raise ValueError(
        f"topk_indices{where} = {value} is out of range: row {row} belongs to sequence {sequence}, which has "
        f"{int(g.seqlens_k[sequence])} keys (-1 is padding); {count} such indices in all"
    )


def _words(seqlen_k: int) -> int:
    """Words of a row."""
    return (seqlen_k + 127) // 128 * 4


def _layout(
    rows: Tensor,
    name: str,
    lengths: tuple[int | None, Tensor | None, Tensor | None, int | None, int | None, Tensor | None, bool],
) -> Layout:
    """Where queries with these ``rows`` [B, Sq, *] or [T, *] and their keys lie, after checking the lengths."""
    seqlen_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_k, causal = lengths
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(rows).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if sum(x is not None for x in (seqlen_k, cu_seqlens_k, seqlens_k)) != 1:
        raise ValueError("give exactly one of seqlen_k, cu_seqlens_k and seqlens_k")
    longest = max_seqlen_k if seqlen_k is None else seqlen_k
    if longest is None:
        raise ValueError("cu_seqlens_k and seqlens_k need max_seqlen_k")
    check_length("max_seqlen_k" if seqlen_k is None else "seqlen_k", longest)
    if cu_seqlens_q is not None:
        if rows.dim() != 2 or max_seqlen_q is None:
            raise ValueError(f"cu_seqlens_q needs max_seqlen_q and {name} [total_q, *], got shape {tuple(rows.shape)}")
        check_index("cu_seqlens_q", cu_seqlens_q, 1, rows)
        if cu_seqlens_q.shape[0] < 1:
            raise ValueError("cu_seqlens_q must have at least one entry")
        check_length("max_seqlen_q", max_seqlen_q)
        batch, longest_q, total_q = cu_seqlens_q.shape[0] - 1, max_seqlen_q, rows.shape[0]
    else:
        if rows.dim() != 3:
            raise ValueError(f"without cu_seqlens_q, {name} must be [B, seqlen_q, *], got shape {tuple(rows.shape)}")
        if max_seqlen_q is not None and max_seqlen_q != rows.shape[1]:
            raise ValueError(f"max_seqlen_q = {max_seqlen_q} contradicts {name} of shape {tuple(rows.shape)}")
        batch, longest_q, total_q = rows.shape[0], rows.shape[1], rows.shape[0] * rows.shape[1]
    if cu_seqlens_k is not None:
        check_index("cu_seqlens_k", cu_seqlens_k, 1, rows, batch + 1)
    if seqlens_k is not None:
        check_index("seqlens_k", seqlens_k, 1, rows, batch)
    if seqlen_k is not None and cu_seqlens_q is not None:
        seqlens_k = torch.full((batch,), seqlen_k, dtype=torch.int32, device=rows.device)
    layout = Layout(
        batch,
        longest_q,
        longest,
        causal,
        total_q,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_k=seqlens_k,
    )
    check_values(layout, None, None, None)
    return layout


def _check_indices(name: str, indices: Tensor, layout: Layout) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {indices.dtype}")
    rows = (layout.total_q,) if layout.cu_seqlens_q is not None else (layout.batch, layout.max_seqlen_q)
    if tuple(indices.shape[:-1]) != rows:
        raise ValueError(f"{name} must be [{', '.join(map(str, rows))}, topk], got shape {tuple(indices.shape)}")
    if indices.shape[-1] > 1 and indices.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {indices.stride()}")


# --- tokens, without a host sync --------------------------------------------------------------------------------------


def _rows(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """(sequence, position) of each query, int64 [rows]."""
    lengths_q, lengths_k = layout.lengths_q(device).long(), layout.lengths_k(device).long()
    row = torch.arange(layout.total_q, device=device)
    if layout.cu_seqlens_q is None:
        sequence, local = row // max(layout.max_seqlen_q, 1), row % max(layout.max_seqlen_q, 1)
    else:
        starts = layout.cu_seqlens_q.long()
        sequence = (row.unsqueeze(-1) >= starts[1:]).sum(-1).clamp(max=max(layout.batch - 1, 0))
        local = row - starts[sequence]
    offset = lengths_k - lengths_q if layout.causal else torch.zeros_like(lengths_k)
    return sequence, local + offset[sequence] if layout.batch else local


def _visible_counts(layout: Layout, device: torch.device) -> Tensor:
    """How many keys, from the first on, each query may see by its position: int64 [rows]."""
    sequence, position = _rows(layout, device)
    if layout.batch == 0:
        return torch.zeros_like(position)
    lengths = layout.lengths_k(device).long()[sequence]
    return torch.minimum(lengths, position + 1).clamp(min=0) if layout.causal else lengths


def _visible(layout: Layout, device: torch.device) -> Tensor:
    """bool [rows, max_seqlen_k]."""
    keys = torch.arange(layout.max_seqlen_k, device=device)
    return keys < _visible_counts(layout, device).unsqueeze(-1)


def _blocks_of(kept: Tensor, layout: Layout, block_m: int, block_n: int) -> BlockMask:
    """The blocks that hold a True of bool ``kept`` [rows, max_seqlen_k]."""
    geometry = MaskGeometry.of(layout, block_m, block_n, kept.device)
    padded = torch.nn.functional.pad(kept, (0, geometry.num_blocks * block_n - kept.shape[-1]))
    filled = torch.zeros((geometry.num_rows, geometry.num_blocks), dtype=torch.int32, device=kept.device)
    if kept.numel():
        sequence, position = _rows(layout, kept.device)
        tile = torch.div(position, block_m, rounding_mode="floor") - geometry.first_tiles().long()[sequence]
        row = geometry.cu_tiles().long()[sequence] + tile
        per_row = padded.unflatten(-1, (geometry.num_blocks, block_n)).any(-1).to(torch.int32)
        filled.index_put_((row,), per_row, accumulate=True)  # a sum of integers: no order changes it
    return BlockMask.from_rows((filled > 0).unsqueeze(1), geometry)
