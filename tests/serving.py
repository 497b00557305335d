"""A paged KV cache as a server fills it: sequences grow by chunks, may share full pages, and leave NaN behind them."""

from __future__ import annotations

import torch
from torch import Tensor

import bsfa
from cases import F32, GARBAGE_PAGES, NAN


class Cache:
    """Pages, sequences of random tokens, and the summary beside them."""

    def __init__(
        self,
        page_size: int,
        *,
        num_pages: int = 64,
        hkv: int = 2,
        dim: int = 16,
        dim_v: int = 8,
        dtype: torch.dtype = F32,
        device: str = "cpu",
        block_n: int = 128,
        values: bool = False,
        pooling: str = "mean",
    ) -> None:
        self.page_size, self.device = page_size, device
        self.k = torch.full((num_pages, page_size, hkv, dim), NAN, dtype=dtype, device=device)
        self.v = torch.full((num_pages, page_size, hkv, dim_v), NAN, dtype=dtype, device=device)
        self.generator = torch.Generator().manual_seed(num_pages + page_size)
        self.free = torch.randperm(num_pages, generator=self.generator).tolist()
        self.pages: list[list[int]] = []
        self.lengths: list[int] = []
        self.summary = bsfa.BlockSummary.allocate(
            num_pages,
            page_size,
            hkv,
            dim,
            block_n=block_n,
            dtype=dtype,
            device=device,
            pooling=pooling,
            head_dim_v=dim_v if values else None,
        )
        self.summary.keys[:-1] = NAN  # no entry may be used that was not written
        if self.summary.values is not None:
            self.summary.values[:-1] = NAN

    def add(self, prefix_of: int | None = None, tokens: int = 0) -> int:
        """A new sequence; its first ``tokens`` (whole pages) are those of another."""
        assert tokens % self.page_size == 0
        self.pages.append([] if prefix_of is None else self.pages[prefix_of][: tokens // self.page_size])
        self.lengths.append(tokens)
        return len(self.lengths) - 1

    def append(self, sequence: int, count: int) -> None:
        """Write ``count`` random tokens behind those that the sequence has."""
        pages = self.pages[sequence]
        for t in range(self.lengths[sequence], self.lengths[sequence] + count):
            if t // self.page_size == len(pages):
                pages.append(self.free.pop())
                self.k[pages[-1]] = NAN  # what the page held before is gone
                self.v[pages[-1]] = NAN
            for cache in (self.k, self.v):
                row = torch.randn(cache.shape[2:], generator=self.generator).to(cache.dtype)
                cache[pages[-1], t % self.page_size] = row.to(self.device)
        self.lengths[sequence] += count

    def release(self, sequence: int) -> None:
        """Give back the pages that no other sequence has."""
        used = {p for i, pages in enumerate(self.pages) if i != sequence for p in pages}
        self.free = [p for p in self.pages[sequence] if p not in used][::-1] + self.free
        self.pages[sequence], self.lengths[sequence] = [], 0

    def table(self, sequences: list[int], extra: int = 1) -> Tensor:
        """block_table of some sequences, garbage past their ends."""
        width = max(len(self.pages[s]) for s in sequences) + extra
        rows = [(self.pages[s] + [*GARBAGE_PAGES] * width)[:width] for s in sequences]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def seqlens(self, sequences: list[int]) -> Tensor:
        return torch.tensor([self.lengths[s] for s in sequences], dtype=torch.int32, device=self.device)

    def step(self, new: dict[int, int], how: str = "seqlens_q") -> None:
        """Append tokens to some sequences and update the summary."""
        for s, count in new.items():
            self.append(s, count)
        sequences, counts = list(new), list(new.values())
        lengths = torch.tensor(counts, dtype=torch.int32, device=self.device)
        kwargs = {"seqlens_q": lengths}
        if how == "cu_seqlens_q":
            kwargs = {how: torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)}
        elif how == "uniform":
            assert len(set(counts)) == 1
            kwargs = {}
        self.summary.update(
            self.k,
            self.table(sequences),
            self.seqlens(sequences),
            max_seqlen_q=max(counts),
            v_cache=None if self.summary.values is None else self.v,
            **kwargs,
        )

    def check(self, sequences: list[int] | None = None) -> None:
        """The gathered summary is that of pool_blocks, bit for bit."""
        sequences = list(range(len(self.lengths))) if sequences is None else sequences
        table, seqlens = self.table(sequences), self.seqlens(sequences)
        longest = max(self.lengths[s] for s in sequences)
        block_n = self.summary.block_n
        for length in (longest, None):
            where = {"block_table": table, "seqlens_k": seqlens, "max_seqlen_k": length}
            want = torch.ops.bsfa.pool_blocks(
                self.k, None, table, seqlens, length or table.shape[1] * self.page_size, block_n, self.summary.pooling
            )
            got = self.summary.gather(**where)
            assert got.is_contiguous() and got.isfinite().all()
            assert torch.equal(got, want)
            if self.summary.values is not None:
                assert torch.equal(
                    self.summary.gather_values(**where), bsfa.pool_blocks(self.v, block_n=block_n, **where)
                )
        assert not self.summary.keys[-1].any()
