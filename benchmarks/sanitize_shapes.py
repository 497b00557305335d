"""Every CUDA kernel over a few small, awkward shapes, for compute-sanitizer. Checks nothing itself."""

from __future__ import annotations

import torch

import bsfa


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def pool_blocks() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (33, 40, 128):
            for seqlen in (1, 127, 129, 300):
                k = torch.randn(2, seqlen, 3, dim).to("cuda", dtype)
                bsfa.pool_blocks(k)
            k = torch.randn(430, 3, dim).to("cuda", dtype)
            bsfa.pool_blocks(k, cu_seqlens_k=int32([0, 0, 129, 130, 430]), max_seqlen_k=300, block_n=64)
            for page_size in (1, 3, 16, 256):
                # As many pages as tokens need, and a table that ends with the last page in use.
                lengths = [129, 0, 1, 300]
                pages = [(n + page_size - 1) // page_size for n in lengths]
                pool = torch.randn(sum(pages), page_size, 3, dim).to("cuda", dtype)
                order = torch.randperm(sum(pages)).tolist()
                table = [[order.pop() for _ in range(n)] + [-1] * (max(pages) - n) for n in pages]
                table = torch.tensor(table, dtype=torch.int32).cuda()
                bsfa.pool_blocks(pool, block_table=table, seqlens_k=int32(lengths), max_seqlen_k=300, block_n=100)


if __name__ == "__main__":
    pool_blocks()
    torch.cuda.synchronize()
    print("done")
