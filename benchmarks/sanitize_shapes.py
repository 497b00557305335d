"""Every CUDA kernel over a few small, awkward shapes, for compute-sanitizer. Checks nothing itself."""

from __future__ import annotations

from typing import Any

import torch

import bsfa
from bsfa._library import KERNELS


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def random_pages(lengths: list[int], page_size: int) -> tuple[torch.Tensor, int]:
    """A block table of as many pages as the tokens need, and their number; it ends with the last page in use."""
    pages = [(n + page_size - 1) // page_size for n in lengths]
    order = torch.randperm(sum(pages)).tolist()
    table = [[order.pop() for _ in range(n)] + [-1] * (max(pages) - n) for n in pages]
    return torch.tensor(table, dtype=torch.int32).cuda(), sum(pages)


def pool_blocks() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (33, 40, 128):
            for seqlen in (1, 127, 129, 300):
                k = torch.randn(2, seqlen, 3, dim).to("cuda", dtype)
                bsfa.pool_blocks(k)
            k = torch.randn(430, 3, dim).to("cuda", dtype)
            bsfa.pool_blocks(k, cu_seqlens_k=int32([0, 0, 129, 130, 430]), max_seqlen_k=300, block_n=64)
            for page_size in (1, 3, 16, 256):
                lengths = [129, 0, 1, 300]
                table, pages = random_pages(lengths, page_size)
                pool = torch.randn(pages, page_size, 3, dim).to("cuda", dtype)
                bsfa.pool_blocks(pool, block_table=table, seqlens_k=int32(lengths), max_seqlen_k=300, block_n=100)


def random_mask(q: torch.Tensor, heads: int, **lengths: Any) -> bsfa.BlockMask:
    """Half of the blocks, some rows without any."""
    like = bsfa.select_blocks(q, None, bsfa.policies.StaticPattern(), **lengths)
    assert isinstance(like, bsfa.BlockMask)
    geometry = like.geometry
    kept = torch.rand(geometry.num_rows, heads, geometry.num_blocks) < 0.5
    kept[::3, 0] = False
    return bsfa.BlockMask.from_rows(kept.cuda(), geometry)


def attention() -> None:
    heads_q, heads_kv = 4, 2
    attend = bsfa.block_sparse_attention
    for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 128)):

        def data(*shape: int, dtype: torch.dtype = dtype, dim: int = dim) -> torch.Tensor:
            return torch.randn(*shape, dim).to("cuda", dtype)

        for causal in (True, False):
            for seqlen_q, seqlen_k in ((1, 1), (130, 130), (64, 400), (300, 200)):
                q, k, v = data(2, seqlen_q, heads_q), data(2, seqlen_k, heads_kv), data(2, seqlen_k, heads_kv)
                attend(q, k, v, None, causal=causal)
            # A tile that ends where another sequence goes on, sequences without queries, without keys, without both.
            cu_q, cu_k = int32([0, 0, 129, 130, 330, 330, 340]), int32([0, 7, 136, 137, 400, 400, 400])
            packed: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
            packed |= {"max_seqlen_q": 200, "max_seqlen_k": 263}
            q, k, v = data(340, heads_q), data(400, heads_kv), data(400, heads_kv)
            attend(q, k, v, None, causal=causal, **packed)
            attend(q, k, v, random_mask(q, heads_q, causal=causal, **packed), causal=causal, **packed)

        for heads in (heads_q, heads_kv, 1):
            q, k, v = data(2, 300, heads_q), data(2, 390, heads_kv), data(2, 390, heads_kv)
            attend(q, k, v, random_mask(q, heads, seqlen_k=390))
        q, k, v = data(1, 64, heads_q), data(1, 4200, heads_kv), data(1, 4200, heads_kv)  # a mask row of two words
        attend(q, k, v, random_mask(q, heads_q, seqlen_k=4200))
        q, k, v = data(1, 257, heads_q), data(1, 385, heads_kv), data(1, 385, heads_kv)
        attend(q, k, v, None, window_left=100)
        attend(q, k, v, None, softcap=20.0)

        for page_size in (1, 3, 16, 64, 128, 256):
            lengths = [129, 0, 1, 300]
            table, pages = random_pages(lengths, page_size)
            k, v = data(pages, page_size, heads_kv), data(pages, page_size, heads_kv)
            cache: dict[str, Any] = {"seqlens_k": int32(lengths), "max_seqlen_k": 300}
            cu_q = int32([0, 129, 130, 131, 231])  # the second has no keys
            queries: dict[str, Any] = {"cu_seqlens_q": cu_q, "max_seqlen_q": 129}
            q = data(231, heads_q)
            attend(q, k, v, None, block_table=table, **cache, **queries)
            q = data(4, 100, heads_q)
            attend(q, k, v, random_mask(q, heads_kv, **cache), block_table=table, **cache)


def probe_and_patterns() -> None:
    probe = torch.ops.bsfa.probe_attention
    for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 128)):
        for causal in (True, False):
            for seqlen_q, seqlen_k in ((1, 1), (130, 1300), (64, 1025), (300, 20)):
                q, k = (torch.randn(2, n, h, dim).to("cuda", dtype) for n, h in ((seqlen_q, 4), (seqlen_k, 2)))
                probe(q, k, None, None, None, None, seqlen_q, seqlen_k, 128, causal, 0.1, 3.0)
            lengths, queries = [129, 0, 1, 1100], int32([0, 129, 130, 130, 200])
            q = torch.randn(200, 4, dim).to("cuda", dtype)
            for page_size in (1, 16, 128):
                table, pages = random_pages(lengths, page_size)
                pool = torch.randn(pages, page_size, 2, dim).to("cuda", dtype)
                probe(q, pool, queries, None, table, int32(lengths), 129, 1100, 128, causal, 0.1, 0.0)
    for words in (1, 40):
        length = words * 32 * 16 - 3
        base, bits = (torch.full((n, 4, words), -1, dtype=torch.int32, device="cuda") for n in (words * 4 + 9, 3))
        sizes = (length, length, 128, 16, True, 1, 2)
        ends = int32([0, 5, 5, length])
        torch.ops.bsfa.pattern_mask(base, bits[..., 0].contiguous(), bits, bits, ends, ends, None, *sizes)


if __name__ == "__main__":
    torch.manual_seed(0)
    pool_blocks()
    probe_and_patterns()
    if "attention" in KERNELS["cuda"]:
        attention()
    torch.cuda.synchronize()
    print("done")
