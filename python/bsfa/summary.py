"""BlockSummary: pooled keys (and values) kept beside a paged KV cache, so that a chunk pools only its own blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bsfa.errors import UnsupportedError
from bsfa.layout import (
    DTYPES,
    MAX_HEAD_DIM,
    Layout,
    check_block_sizes,
    check_data,
    check_index,
    check_length,
    check_values,
    paged_length,
)
from bsfa.pooling import check_pooling, pool


@dataclass(frozen=True, eq=False, repr=False)
class BlockSummary:
    """What :func:`bsfa.pool_blocks` would say about a paged KV cache, kept up to date block by block.

    Without it every chunk of a prompt pools all keys before it anew. With it :meth:`update` pools the blocks that the
    chunk's new tokens lie in, and :meth:`gather` puts a call's summary together from the entries, bitwise what
    ``pool_blocks`` gives over the same cache.

    **Where an entry lies.** ``keys`` is ``[num_pages + 1, blocks_per_page, Hkv, D]`` in the cache's dtype. The entry of
    a block belongs to the page that holds the block's last token so far: one of ``page_size / block_n`` in it, or the
    only one if a block spans several pages. Keyed by page, entries follow prefix caching: a page that sequences share
    stands for itself and all that comes before it in the sequence, the block's first tokens included, so sequences that
    share pages find the same entries there, and sequences that part inside a block write theirs at pages of their own.
    A page that is given to another sequence needs no clearing: its entry is written before it is looked for. The last
    page stays zero; it stands for blocks past the end.

    **What the caller ensures.** :meth:`update` is called once the keys of each step are in the cache, decode steps
    included, and before :meth:`gather`, with every sequence to be gathered. Sequences share full pages only (as vLLM
    and SGLang do): on a page shared by sequences that end at different tokens of it there is one entry for both.

    Nothing here synchronises with the GPU, and shapes depend on host values only: both methods can be captured in CUDA
    graphs and compiled with ``fullgraph=True``. One BlockSummary belongs to one layer's cache.
    """

    page_size: int  #: tokens
    block_n: int  #: tokens
    pooling: str  #: of the keys: as in ``pool_blocks``; values are always means
    keys: Tensor  #: [num_pages + 1, blocks_per_page, Hkv, D]; see above
    values: Tensor | None  #: [num_pages + 1, blocks_per_page, Hkv, Dv], or None if values are not kept

    @staticmethod
    def allocate(
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_n: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        pooling: str = "mean",
        head_dim_v: int | None = None,
    ) -> BlockSummary:
        """Room for the summary of a cache of ``num_pages`` pages of ``page_size`` tokens. ``head_dim_v``: keep means of
        V too.

        Raises :class:`bsfa.UnsupportedError` unless ``page_size`` divides ``block_n`` or is a multiple of it.
        """
        check_block_sizes(1, block_n)
        for name, value, least in (
            ("num_pages", num_pages, 0),
            ("page_size", page_size, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("head_dim", head_dim, 1),
            ("head_dim_v", head_dim if head_dim_v is None else head_dim_v, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least or (name.startswith("head_dim") and value > MAX_HEAD_DIM):
                most = f" and at most {MAX_HEAD_DIM}" if name.startswith("head_dim") else ""
                raise ValueError(f"{name} must be at least {least}{most}, got {value}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        check_pooling(pooling)
        if block_n % page_size and page_size % block_n:
            raise UnsupportedError(
                f"a BlockSummary needs pages that divide a block or blocks that divide a page, got page_size = "
                f"{page_size} and block_n = {block_n}: choose another block_n, or pool anew in each call with "
                "bsfa.pool_blocks (attention_paged without summary=)"
            )

        def room(dim: int) -> Tensor:
            return torch.zeros(
                (num_pages + 1, max(page_size // block_n, 1), num_kv_heads, dim), dtype=dtype, device=device
            )

        return BlockSummary(
            page_size, block_n, pooling, room(head_dim), None if head_dim_v is None else room(head_dim_v)
        )

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self.keys.shape[0] - 1

    @property
    def blocks_per_page(self) -> int:
        """Entries of a page: 1 if a block is at least a page."""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries: that of the cache."""
        return self.keys.dtype

    def __repr__(self) -> str:
        return (
            f"BlockSummary(num_pages={self.num_pages}, page_size={self.page_size}, block_n={self.block_n}, "
            f"num_kv_heads={self.keys.shape[2]}, head_dim={self.keys.shape[3]}, pooling={self.pooling!r}, "
            f"head_dim_v={None if self.values is None else self.values.shape[3]}, {self.dtype}, {self.device})"
        )

    # ---- use --------------------------------------------------------------------------------------------------------

    def update(
        self,
        k_cache: Tensor,
        block_table: Tensor,
        seqlens_k: Tensor,
        *,
        seqlens_q: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int,
        v_cache: Tensor | None = None,
    ) -> None:
        """Pool the blocks that new tokens lie in. Their keys (and values) must be in the cache already.

        The last ``seqlens_q[b]`` of the ``seqlens_k[b]`` tokens of sequence b are new: int32 [B], or ``cu_seqlens_q``
        int32 [B + 1] as packed queries have it, or neither if all sequences have ``max_seqlen_q``, the most new tokens
        of a sequence. Pools at most ``ceil(max_seqlen_q / block_n) + 1`` blocks of a sequence (pages that hold several
        blocks: all blocks of the pages touched). An incomplete last block is pooled even without new tokens: a sequence
        that is a cached prefix may end inside a block.

        k_cache, block_table, seqlens_k: as in :func:`bsfa.attention_paged`. v_cache: required if values are kept.
        Takes the new tokens by position, not as a slot mapping: a slot says on which page a token lies but not where
        its block began, which may be on another page.
        """
        self._check_cache(k_cache, v_cache)
        layout = self._layout(k_cache, block_table, seqlens_k, None)
        check_length("max_seqlen_q", max_seqlen_q)
        if seqlens_q is not None and cu_seqlens_q is not None:
            raise ValueError("give seqlens_q or cu_seqlens_q, not both")
        if cu_seqlens_q is not None:
            check_index("cu_seqlens_q", cu_seqlens_q, 1, k_cache, layout.batch + 1)
            lengths_q = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
        elif seqlens_q is not None:
            check_index("seqlens_q", seqlens_q, 1, k_cache, layout.batch)
            lengths_q = seqlens_q
        else:
            lengths_q = torch.full_like(seqlens_k, max_seqlen_q)
        if lengths_q.device.type == "cpu" and not torch.compiler.is_compiling() and layout.batch:
            low, high = (int(x) for x in lengths_q.aminmax())
            if low < 0 or high > max_seqlen_q:
                raise ValueError(
                    f"new tokens must be 0 .. max_seqlen_q = {max_seqlen_q} per sequence, got {low} .. {high}"
                )
        self._update(k_cache, v_cache, block_table, seqlens_k, lengths_q, max_seqlen_q)

    def gather(self, block_table: Tensor, seqlens_k: Tensor, max_seqlen_k: int | None = None) -> Tensor:
        """Pooled keys of each sequence, ``[B, ceil(max_seqlen_k / block_n), Hkv, D]``, zeros past the end.

        Contiguous, and bitwise what :func:`bsfa.pool_blocks` gives over the cache, if each sequence was part of an
        :meth:`update` at these lengths. ``max_seqlen_k``: tokens; default, the capacity of ``block_table``.
        """
        return self._gather(self.keys, self._layout(self.keys, block_table, seqlens_k, max_seqlen_k))

    def gather_values(self, block_table: Tensor, seqlens_k: Tensor, max_seqlen_k: int | None = None) -> Tensor:
        """Means of the values, like :meth:`gather`. Raises ``ValueError`` if they are not kept."""
        if self.values is None:
            raise ValueError("this BlockSummary keeps no values: allocate it with head_dim_v")
        return self._gather(self.values, self._layout(self.values, block_table, seqlens_k, max_seqlen_k))

    def check_use(self, k_cache: Tensor, v_cache: Tensor, block_n: int | None, pooling: str | None) -> None:
        """Raise unless this is a summary of these caches, with a policy's block size and pooling (None: any)."""
        self._check_cache(k_cache, v_cache if self.values is not None else None)
        if block_n is not None and block_n != self.block_n:
            raise ValueError(f"the policy has block_n = {block_n} but the summary was made with {self.block_n}")
        if pooling is not None and pooling != self.pooling:
            raise ValueError(f"the policy pools by {pooling!r} but the summary by {self.pooling!r}")

    def update_layout(self, k_cache: Tensor, v_cache: Tensor, layout: Layout) -> None:
        """:meth:`update` for the queries of an attention call, after :meth:`check_use` and the checks of the call."""
        assert layout.block_table is not None and layout.seqlens_k is not None
        values = None if self.values is None else v_cache
        lengths = layout.lengths_q(self.device)
        self._update(k_cache, values, layout.block_table, layout.seqlens_k, lengths, layout.max_seqlen_q)

    def gather_layout(self, layout: Layout) -> Tensor:
        """:meth:`gather` for an attention call."""
        assert layout.block_table is not None and layout.seqlens_k is not None
        return self._gather(self.keys, layout)

    def gather_values_layout(self, layout: Layout) -> Tensor:
        """:meth:`gather_values` for an attention call."""
        assert self.values is not None
        return self._gather(self.values, layout)

    # ---- how --------------------------------------------------------------------------------------------------------

    def _check_cache(self, k_cache: Tensor, v_cache: Tensor | None) -> None:
        if (v_cache is None) != (self.values is None):
            has = (
                "keeps no values: allocate it with head_dim_v" if self.values is None else "keeps values: give v_cache"
            )
            raise ValueError(f"this BlockSummary {has}")
        for name, cache, entries in (("k_cache", k_cache, self.keys), ("v_cache", v_cache, self.values)):
            if cache is None or entries is None:
                continue
            check_data(name, cache, (4,))
            want = (self.num_pages, self.page_size, entries.shape[2], entries.shape[3])
            if tuple(cache.shape) != want:
                raise ValueError(f"the summary was allocated for {name} of shape {want}, got {tuple(cache.shape)}")
            if cache.dtype != self.dtype:
                raise TypeError(f"{name} is {cache.dtype} but the summary was allocated for {self.dtype}")
            if cache.device != self.device:
                raise ValueError(f"{name} is on {cache.device} but the summary is on {self.device}")

    def _layout(self, data: Tensor, block_table: Tensor, seqlens_k: Tensor, max_seqlen_k: int | None) -> Layout:
        check_index("block_table", block_table, 2, data)
        batch = block_table.shape[0]
        check_index("seqlens_k", seqlens_k, 1, data, batch)
        longest = paged_length(self.page_size, block_table, max_seqlen_k)
        layout = Layout(batch, 0, longest, False, 0, block_table=block_table, seqlens_k=seqlens_k)
        check_values(layout, None, self.num_pages, self.page_size)
        return layout

    @property
    def _unit(self) -> int:
        """Tokens of the larger of page and block: both begin where it begins."""
        return max(self.page_size, self.block_n)

    def _entries(self, table: Tensor, seqlens: Tensor, blocks: int) -> Tensor:
        """Row of each block's entry in ``keys.flatten(0, 1)``, int64 [B, blocks]; that of the zeros past the end.

        ``table`` int32 [B, pages >= 1] and ``seqlens`` [B] count from the start of a unit.
        """
        entries: Tensor = torch.ops.bsfa.summary_entries(
            table, seqlens, self.page_size, self.block_n, blocks, self.num_pages
        )
        return entries

    def _update(
        self,
        k_cache: Tensor,
        v_cache: Tensor | None,
        block_table: Tensor,
        seqlens_k: Tensor,
        lengths_q: Tensor,
        max_seqlen_q: int,
    ) -> None:
        batch, max_pages = block_table.shape
        if batch == 0 or max_pages == 0:
            return
        unit = self._unit
        # Units that hold a sequence's new tokens or, if it has none, its last and incomplete block: at most how many.
        units = min((max(max_seqlen_q, 1) + unit - 2) // unit + 1, (max_pages * self.page_size + unit - 1) // unit)
        table, seqlens = torch.ops.bsfa.summary_window(
            block_table, seqlens_k, lengths_q, self.page_size, self.block_n, units
        )
        entries = self._entries(table, seqlens, units * unit // self.block_n).flatten()
        layout = Layout(batch, 0, units * unit, False, 0, block_table=table, seqlens_k=seqlens)
        for cache, kept, pooling in ((k_cache, self.keys, self.pooling), (v_cache, self.values, "mean")):
            if cache is None or kept is None:
                continue
            pooled = pool(cache, layout, self.block_n, pooling)
            # Blocks past the end are pooled to zeros and go to the page of zeros. Sequences that share a page write the
            # same values to it, so that the order of writes does not matter.
            kept.flatten(0, 1).index_put_((entries,), pooled.flatten(0, 1))

    def _gather(self, kept: Tensor, layout: Layout) -> Tensor:
        assert layout.block_table is not None and layout.seqlens_k is not None
        blocks = (layout.max_seqlen_k + self.block_n - 1) // self.block_n
        if layout.block_table.shape[1] == 0:
            return kept.new_zeros((layout.batch, blocks, *kept.shape[2:]))
        entries = self._entries(layout.block_table, layout.seqlens_k, blocks)
        return kept.flatten(0, 1).index_select(0, entries.flatten()).view(layout.batch, blocks, *kept.shape[2:])
