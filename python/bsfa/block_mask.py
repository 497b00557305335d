"""BlockMask: the contract between selection and attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bsfa.errors import UnsupportedError
from bsfa.layout import Layout, check_block_sizes


@dataclass(frozen=True, eq=False)
class MaskGeometry:
    """Which rows and blocks a mask has; see csrc/include/bsfa/geometry.h.

    Row ``cu_tiles[b] + t`` is query tile t of sequence b. Tiles are aligned to absolute positions: tile t covers
    positions ``(first_tile[b] + t) * block_m`` and following. All tensors are int32 on the mask's device, so that
    nothing here synchronises. Lengths that are one number become a tensor only when they are asked for: attention does
    not, and a kernel that fills them would stand between selection and attention.
    """

    batch: int
    device: torch.device
    given_q: Tensor | None  #: [B] query tokens in this call; None: max_seqlen_q of every sequence
    given_k: Tensor | None  #: [B] KV tokens; None: max_seqlen_k of every sequence
    max_seqlen_q: int
    max_seqlen_k: int
    num_rows: int  #: allocated rows; may exceed the rows in use
    causal: bool
    block_m: int
    block_n: int

    @staticmethod
    def of(layout: Layout, block_m: int, block_n: int, device: torch.device) -> MaskGeometry:
        """Geometry of a call's layout."""
        check_block_sizes(block_m, block_n)
        return MaskGeometry(
            layout.batch,
            device,
            None if layout.cu_seqlens_q is None else layout.lengths_q(device),
            None if layout.cu_seqlens_k is None and layout.seqlens_k is None else layout.lengths_k(device),
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            layout.num_mask_rows(block_m),
            layout.causal,
            block_m,
            block_n,
        )

    @property
    def seqlens_q(self) -> Tensor:
        """Query tokens of each sequence in this call, [B]."""
        return self._lengths(self.given_q, self.max_seqlen_q)

    @property
    def seqlens_k(self) -> Tensor:
        """KV tokens of each sequence, [B]."""
        return self._lengths(self.given_k, self.max_seqlen_k)

    def _lengths(self, given: Tensor | None, each: int) -> Tensor:
        if given is not None:
            return given
        return torch.full((self.batch,), each, dtype=torch.int32, device=self.device)

    @property
    def uniform(self) -> bool:
        """Whether every sequence has max_seqlen_q queries and max_seqlen_k keys."""
        return self.given_q is None and self.given_k is None

    @property
    def num_blocks(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.max_seqlen_k // self.block_n)

    @property
    def max_tiles(self) -> int:
        """Query tiles of one sequence: exact if uniform, else an upper bound."""
        if self.uniform and self.batch:
            return self.num_rows // self.batch
        return 0 if self.max_seqlen_q == 0 else (self.max_seqlen_q + self.block_m - 2) // self.block_m + 1

    def offsets(self) -> Tensor:
        """Position of each sequence's first query row, [B]."""
        return self.seqlens_k - self.seqlens_q if self.causal else torch.zeros_like(self.seqlens_k)

    def first_tiles(self) -> Tensor:
        """Absolute index of each sequence's first query tile, [B]."""
        return torch.div(self.offsets(), self.block_m, rounding_mode="floor")

    def num_tiles(self) -> Tensor:
        """Query tiles of each sequence, [B]."""
        last = torch.div(self.offsets() + self.seqlens_q - 1, self.block_m, rounding_mode="floor")
        return torch.where(self.seqlens_q > 0, last - self.first_tiles() + 1, 0).to(torch.int32)

    def cu_tiles(self) -> Tensor:
        """First row of each sequence, and the number of rows in use: [B + 1]."""
        return torch.nn.functional.pad(self.num_tiles().cumsum(0), (1, 0)).to(torch.int32)

    def row_sequences(self) -> Tensor:
        """Sequence of each row, [num_rows]; B for rows that are not in use."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.device)
        ends = self.num_tiles().cumsum(0)
        return (rows.unsqueeze(-1) >= ends).sum(-1).to(torch.int32)  # not searchsorted: inductor (2.11) fails on it

    def _per_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """(used, clamped sequence, absolute tile) of each row."""
        sequence = self.row_sequences()
        used = sequence < self.batch
        sequence = sequence.clamp(max=max(self.batch - 1, 0)).long()
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.device)
        return used, sequence, self.first_tiles()[sequence] + rows - self.cu_tiles()[sequence]

    def positions(self) -> tuple[Tensor, Tensor]:
        """First and last position of each row's nominal tile, cut to the sequence: int32 [num_rows] each."""
        _, sequence, tile = self._per_row()
        end = self.seqlens_k[sequence] if self.causal else self.seqlens_q[sequence]
        first = (tile * self.block_m).clamp(min=0)
        return first, torch.minimum((tile + 1) * self.block_m, end) - 1

    def visible_blocks(self) -> Tensor:
        """KV blocks that some row of the tile may attend to, int32 [num_rows]; 0 for rows that are not in use."""
        if self.num_rows == 0 or self.batch == 0:
            return torch.zeros(self.num_rows, dtype=torch.int32, device=self.device)
        used, sequence, tile = self._per_row()
        blocks = torch.div(self.seqlens_k + self.block_n - 1, self.block_n, rounding_mode="floor")[sequence]
        if self.causal:
            end = torch.minimum((tile + 1) * self.block_m, self.seqlens_k[sequence])
            last = torch.div(end - 1, self.block_n, rounding_mode="floor") + 1
            blocks = torch.where(end > 0, last, 0)
        return torch.where(used, blocks, 0).to(torch.int32)

    def same_as(self, other: MaskGeometry) -> bool:
        """Whether two masks talk about the same rows and blocks (host-side facts only)."""
        keys = ("max_seqlen_q", "max_seqlen_k", "num_rows", "causal", "block_m", "block_n")
        return all(getattr(self, k) == getattr(other, k) for k in keys)

    def same_lengths(self, other: MaskGeometry) -> bool:
        """Whether every sequence has the same lengths in both. Reads device values."""
        return torch.equal(self.seqlens_q, other.seqlens_q) and torch.equal(self.seqlens_k, other.seqlens_k)


# An operator of its own, so that torch.compile does not look into it: inductor (2.11) fails on it with dynamic shapes.
@torch.library.custom_op("bsfa::pack_bits", mutates_args=())
def pack_bits(kept: Tensor) -> Tensor:
    """bool [..., N] -> int32 words [..., ceil(N / 32)]; bit j % 32 of word j // 32 is block j."""
    n = kept.shape[-1]
    words = (n + 31) // 32
    bits = torch.nn.functional.pad(kept, (0, words * 32 - n)).unflatten(-1, (words, 32)).to(torch.int64)
    packed = (bits << torch.arange(32, device=kept.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


@pack_bits.register_fake
def _pack_bits(kept: Tensor) -> Tensor:
    return kept.new_empty((*kept.shape[:-1], (kept.shape[-1] + 31) // 32), dtype=torch.int32)


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """int32 words [..., W] -> bool [..., n]."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(-2)[..., :n].bool()


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int32 word, int32, by arithmetic on pairs, nibbles and bytes; no host sync."""
    x = words & 0x7FFFFFFF  # the sign bit apart: nothing below overflows or shifts it in
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    x = (x + (x >> 16)) & 0x3F
    return x + (words < 0).to(torch.int32)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which KV blocks each query tile attends to: a bitmask on the device.

    ``words``: int32 ``[num_rows, num_heads, ceil(num_blocks / 32)]``, contiguous; bit ``j % 32`` of word ``j // 32``
    is KV block j. Rows are (sequence, query tile) pairs in order, see :class:`MaskGeometry`; rows beyond those in use
    are zero. ``num_heads`` is the number of query heads, of KV heads (shared by the group), or 1 (shared by all).
    ``counts``: int32 ``[num_rows, num_heads]``, set bits per row. One row of one head is contiguous, because the
    attention kernel reads a row at a time.
    """

    words: Tensor
    counts: Tensor
    geometry: MaskGeometry

    @property
    def block_m(self) -> int:
        """Query tile, tokens."""
        return self.geometry.block_m

    @property
    def block_n(self) -> int:
        """KV block, tokens."""
        return self.geometry.block_n

    @property
    def num_heads(self) -> int:
        """Mask heads: query heads, KV heads, or 1."""
        return self.words.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the bitmask."""
        return self.words.device

    # ---- construction -----------------------------------------------------------------------------------------------

    @staticmethod
    def from_rows(kept: Tensor, geometry: MaskGeometry) -> BlockMask:
        """From bool ``[num_rows, heads, num_blocks]`` in row order; invisible blocks are cleared."""
        if kept.dtype != torch.bool:
            raise TypeError(f"a block mask must be bool, got {kept.dtype}")
        if kept.dim() != 3 or kept.shape[0] != geometry.num_rows or kept.shape[2] != geometry.num_blocks:
            want = f"[{geometry.num_rows}, heads, {geometry.num_blocks}]"
            raise ValueError(f"expected a mask of shape {want}, got {tuple(kept.shape)}")
        blocks = torch.arange(geometry.num_blocks, device=kept.device)
        kept = kept & (blocks < geometry.visible_blocks().unsqueeze(-1)).unsqueeze(1)
        return BlockMask(pack_bits(kept), kept.sum(-1, dtype=torch.int32), geometry)

    @staticmethod
    def from_bool(
        kept: Tensor,
        *,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        block_m: int = 128,
        block_n: int = 128,
        causal: bool = True,
    ) -> BlockMask:
        """From bool ``[B, heads, tiles, blocks]``, every sequence having ``seqlen_q`` queries and ``seqlen_k`` keys.

        The lengths default to ``tiles * block_m`` and ``blocks * block_n``. Blocks that causality hides are cleared.
        Raises ``ValueError`` if the number of tiles or blocks does not fit the lengths.
        """
        if kept.dim() != 4:
            raise ValueError(f"expected [B, heads, tiles, blocks], got shape {tuple(kept.shape)}")
        batch, _, tiles, blocks = kept.shape
        sq = tiles * block_m if seqlen_q is None else seqlen_q
        sk = blocks * block_n if seqlen_k is None else seqlen_k
        geometry = MaskGeometry.of(Layout(batch, sq, sk, causal, batch * sq), block_m, block_n, kept.device)
        if geometry.num_rows != batch * tiles or geometry.num_blocks != blocks:
            raise ValueError(
                f"seqlen_q = {sq} and seqlen_k = {sk} need {geometry.num_rows // max(batch, 1)} tiles and "
                f"{geometry.num_blocks} blocks, the mask has {tiles} and {blocks}"
            )
        return BlockMask.from_rows(kept.transpose(1, 2).flatten(0, 1), geometry)

    @staticmethod
    def from_csr(indptr: Tensor, indices: Tensor, num_heads: int, geometry: MaskGeometry) -> BlockMask:
        """From CSR lists over (row, head) segments, row-major: ``indptr [num_rows * heads + 1]``, ``indices`` blocks.

        Raises ``ValueError`` for lists that do not fit or name a block outside the sequence.
        """
        segments = geometry.num_rows * num_heads
        if indptr.dim() != 1 or indptr.shape[0] != segments + 1:
            raise ValueError(f"indptr must have {segments + 1} entries, got shape {tuple(indptr.shape)}")
        n = geometry.num_blocks
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= n):
            raise ValueError(f"indices must be 0 .. {n - 1}")
        lengths = (indptr[1:] - indptr[:-1]).long()
        if int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel() or (segments and int(lengths.min()) < 0):
            raise ValueError("indptr must start with 0, never decrease and end with the number of indices")
        segment = torch.repeat_interleave(torch.arange(segments, device=indices.device), lengths)
        kept = torch.zeros((segments, n), dtype=torch.bool, device=indices.device)
        kept[segment, indices.long()] = True
        return BlockMask.from_rows(kept.view(geometry.num_rows, num_heads, n), geometry)

    @staticmethod
    def from_flex(
        mask: torch.nn.attention.flex_attention.BlockMask,
        *,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        causal: bool = True,
    ) -> BlockMask:
        """From a ``torch.nn.attention.flex_attention.BlockMask`` [B, heads, tiles, blocks].

        Only its block structure is taken: partial blocks count as kept, and the token-level ``mask_mod`` is replaced
        by ``causal``. Lengths default to those of the flex mask.
        """
        block_m, block_n = mask.BLOCK_SIZE
        lengths = mask.seq_lengths
        return BlockMask.from_bool(
            mask.to_dense().bool(),
            seqlen_q=int(lengths[0]) if seqlen_q is None else seqlen_q,
            seqlen_k=int(lengths[1]) if seqlen_k is None else seqlen_k,
            block_m=int(block_m),
            block_n=int(block_n),
            causal=causal,
        )

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device; itself if it is there already."""
        words = self.words.to(device)
        if words is self.words:
            return self
        q, k = (None if t is None else t.to(device) for t in (self.geometry.given_q, self.geometry.given_k))
        g = replace(self.geometry, device=words.device, given_q=q, given_k=k)
        return BlockMask(words, self.counts.to(device), g)

    # ---- conversion -------------------------------------------------------------------------------------------------

    def to_rows(self) -> Tensor:
        """bool ``[num_rows, heads, num_blocks]``."""
        return unpack_bits(self.words, self.geometry.num_blocks)

    def to_bool(self) -> Tensor:
        """bool ``[B, heads, tiles, blocks]``; tiles and blocks that a shorter sequence lacks are False."""
        g = self.geometry
        rows = self.to_rows()
        tiles = torch.arange(g.max_tiles, device=self.device)
        index = g.cu_tiles()[:-1, None].long() + tiles
        used = tiles < g.num_tiles()[:, None]
        picked = rows[index.clamp(max=max(g.num_rows - 1, 0))]
        return (picked & used[:, :, None, None]).transpose(1, 2)

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """(indptr int32 [num_rows * heads + 1], indices int32) over (row, head) segments. Synchronises with the GPU."""
        kept = self.to_rows().flatten(0, 1)
        indptr = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
        return indptr, kept.nonzero()[:, 1].to(torch.int32)

    def to_flex(self) -> torch.nn.attention.flex_attention.BlockMask:
        """A ``torch.nn.attention.flex_attention.BlockMask`` with the same blocks and, if causal, causal masking.

        Needs sequences of one length and queries that start at a tile edge (else :class:`UnsupportedError`): flex
        tiles start at the first query.
        """
        from torch.nn.attention import flex_attention as flex

        g = self.geometry
        one_length = (g.seqlens_q == g.max_seqlen_q).all() & (g.seqlens_k == g.max_seqlen_k).all()
        if g.batch == 0 or not bool(one_length):
            raise UnsupportedError("flex_attention masks need sequences of one length; convert one sequence at a time")
        offset = g.max_seqlen_k - g.max_seqlen_q if g.causal else 0
        if offset % g.block_m:
            raise UnsupportedError(f"flex_attention tiles start at the first query, here at position {offset}")
        kept = self.to_bool()
        if g.causal:
            # A block is full (needs no token mask) if its last token is visible to the tile's first row.
            first = (torch.arange(kept.shape[2], device=self.device) * g.block_m + offset)[:, None]
            last = (torch.arange(kept.shape[3], device=self.device) + 1) * g.block_n - 1
            full = last.clamp(max=g.max_seqlen_k - 1) <= first
        else:
            full = torch.ones(kept.shape[2:], dtype=torch.bool, device=self.device)

        def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
            order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
            return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)

        # flex_attention without torch.compile ignores the blocks and asks mask_mod alone.
        def kept_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            block = kept[b, h if kept.shape[1] > 1 else 0, q // g.block_m, kv // g.block_n]
            return block & (q + offset >= kv) if g.causal else block

        partial_count, partial_index = ordered(kept & ~full)
        full_count, full_index = ordered(kept & full)
        return flex.BlockMask.from_kv_blocks(
            partial_count,
            partial_index,
            full_count,
            full_index,
            BLOCK_SIZE=(g.block_m, g.block_n),
            mask_mod=kept_mask,
            seq_lengths=(g.max_seqlen_q, g.max_seqlen_k),
        )

    # ---- algebra ----------------------------------------------------------------------------------------------------

    def _combined(self, other: BlockMask, union: bool) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if not self.geometry.same_as(other.geometry):
            raise ValueError(f"masks of different geometry cannot be combined: {self!r} and {other!r}")
        heads = max(self.num_heads, other.num_heads)
        if heads % self.num_heads or heads % other.num_heads:
            raise ValueError(f"masks with {self.num_heads} and {other.num_heads} heads cannot be combined")
        a, b = (w.unsqueeze(2).expand(-1, -1, heads // w.shape[1], -1).flatten(1, 2) for w in (self.words, other.words))
        words = a | b if union else a & b
        return BlockMask(words, popcount(words).sum(-1, dtype=torch.int32), self.geometry)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Union: blocks kept by either mask."""
        return self._combined(other, union=True)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Intersection: blocks kept by both masks. May leave a row without blocks: its output is 0, its LSE -inf."""
        return self._combined(other, union=False)

    # ---- statistics -------------------------------------------------------------------------------------------------

    def density(self, per_head: bool = False) -> Tensor:
        """Kept blocks / visible blocks (1.0 = dense), float32 scalar or ``[heads]``; stays on the device."""
        visible = self.geometry.visible_blocks().sum().clamp(min=1)
        kept = self.counts.sum(0) / visible
        return kept if per_head else kept.mean()

    def __repr__(self) -> str:
        g = self.geometry
        text = (
            f"BlockMask(sequences={g.batch}, heads={self.num_heads}, max_seqlen_q={g.max_seqlen_q}, "
            f"max_seqlen_k={g.max_seqlen_k}, blocks={g.block_m}x{g.block_n}, causal={g.causal}"
        )
        if self.device.type != "cpu":  # no device sync for a repr
            return f"{text}, device={self.device})"
        return f"{text}, density={float(self.density()):.4f})"
