"""Every CUDA kernel over a few small, awkward shapes, for compute-sanitizer. Checks nothing itself."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import torch

import bsfa
from bsfa.layout import Layout
from bsfa.stages import resolve_layout

DEVICE = "cuda"
SCALE = 0.125


def has(op: str) -> bool:
    """Whether this build has the operator on this device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"bsfa::{op}", DEVICE.upper()))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_pages(lengths: list[int], page_size: int) -> tuple[torch.Tensor, int]:
    """A block table of as many pages as the tokens need, and their number; it ends with the last page in use."""
    pages = [(n + page_size - 1) // page_size for n in lengths]
    order = torch.randperm(sum(pages)).tolist()
    table = [[order.pop() for _ in range(n)] + [-1] * (max(pages) - n) for n in pages]
    return torch.tensor(table, dtype=torch.int32).to(DEVICE), sum(pages)


def pool_blocks() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (33, 40, 128):
            for seqlen in (1, 127, 129, 300):
                k = torch.randn(2, seqlen, 3, dim).to(DEVICE, dtype)
                bsfa.pool_blocks(k)
            k = torch.randn(430, 3, dim).to(DEVICE, dtype)
            bsfa.pool_blocks(k, cu_seqlens_k=int32([0, 0, 129, 130, 430]), max_seqlen_k=300, block_n=64)
            for page_size in (1, 3, 16, 256):
                lengths = [129, 0, 1, 300]
                table, pages = random_pages(lengths, page_size)
                pool = torch.randn(pages, page_size, 3, dim).to(DEVICE, dtype)
                bsfa.pool_blocks(pool, block_table=table, seqlens_k=int32(lengths), max_seqlen_k=300, block_n=100)


def random_mask(q: torch.Tensor, heads: int, **lengths: Any) -> bsfa.BlockMask:
    """Half of the blocks, some rows without any."""
    like = bsfa.select_blocks(q, None, bsfa.policies.StaticPattern(), **lengths)
    assert isinstance(like, bsfa.BlockMask)
    geometry = like.geometry
    kept = torch.rand(geometry.num_rows, heads, geometry.num_blocks) < 0.5
    kept[::3, 0] = False
    return bsfa.BlockMask.from_rows(kept.to(DEVICE), geometry)


def attention() -> None:
    heads_q, heads_kv = 4, 2
    attend = bsfa.block_sparse_attention
    for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 128)):

        def data(*shape: int, dtype: torch.dtype = dtype, dim: int = dim) -> torch.Tensor:
            return torch.randn(*shape, dim).to(DEVICE, dtype)

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


def means_of_dropped_blocks() -> None:
    """Attention with k_means and v_means: batched, packed, paged; one, two and five mask words; a softcap."""
    attend = bsfa.block_sparse_attention
    heads_q, heads_kv = 4, 2
    for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 128)):

        def data(*shape: int, dtype: torch.dtype = dtype, dim: int = dim) -> torch.Tensor:
            return torch.randn(*shape, dim).to(DEVICE, dtype)

        for seqlen_q, seqlen_k, softcap in ((300, 300, 0.0), (64, 900, 0.0), (130, 4300, 20.0)):
            q, k, v = data(2, seqlen_q, heads_q), data(2, seqlen_k, heads_kv), data(2, seqlen_k, heads_kv)
            for causal in (True, False):
                for heads in (heads_q, heads_kv, 1):
                    mask = random_mask(q, heads, seqlen_k=seqlen_k, causal=causal)
                    means = {"k_means": bsfa.pool_blocks(k), "v_means": bsfa.pool_blocks(v)}
                    attend(q, k, v, mask, causal=causal, softcap=softcap, **means)
        for causal in (True, False):  # two steps of means, the second a short one
            q, k, v = data(1, 200, heads_q), data(1, 17_000, heads_kv), data(1, 17_000, heads_kv)
            means = {"k_means": bsfa.pool_blocks(k), "v_means": bsfa.pool_blocks(v)}
            attend(q, k, v, random_mask(q, heads_kv, seqlen_k=17_000, causal=causal), causal=causal, **means)
        cu_q, cu_k = int32([0, 0, 129, 130, 330, 330, 340]), int32([0, 7, 136, 137, 400, 400, 400])
        keys: dict[str, Any] = {"cu_seqlens_k": cu_k, "max_seqlen_k": 263}
        packed: dict[str, Any] = {"cu_seqlens_q": cu_q, "max_seqlen_q": 200, **keys}
        q, k, v = data(340, heads_q), data(400, heads_kv), data(400, heads_kv)
        means = {"k_means": bsfa.pool_blocks(k, **keys), "v_means": bsfa.pool_blocks(v, **keys)}
        attend(q, k, v, random_mask(q, heads_q, **packed), **packed, **means)
        for page_size in (3, 16, 256):
            lengths = [129, 0, 1, 900]
            table, pages = random_pages(lengths, page_size)
            cache: dict[str, Any] = {"seqlens_k": int32(lengths), "max_seqlen_k": 900}
            q, k, v = data(4, 100, heads_q), data(pages, page_size, heads_kv), data(pages, page_size, heads_kv)
            mask = random_mask(q, heads_kv, **cache)
            cache["block_table"] = table
            means = {"k_means": bsfa.pool_blocks(k, **cache), "v_means": bsfa.pool_blocks(v, **cache)}
            attend(q, k, v, mask, **cache, **means)


# Rule, pooling, stride, sharing; see csrc/include/bsfa/params.h.
RULES = (
    ("relative_max", "mean", 16, "none"),
    ("relative_max", "mean", 16, "group"),
    ("pooled", "mean", 16, "none"),
    ("pooled", "maxabs", 16, "none"),
    ("pooled", "center", 16, "union"),
    ("flat64", "mean", 16, "none"),
    ("flat64", "mean", 16, "union"),
    ("antidiagonal", "mean", 16, "none"),
    ("antidiagonal", "mean", 8, "union"),
)
HEADS_Q, HEADS_KV = 4, 2

# racecheck knows no waits for mbarriers by parity: it gets the rules whose kernels have none, and fewer shapes, since
# it is slow.
RACES = "--races" in sys.argv[1:]


def selections() -> list[tuple[torch.Tensor, torch.Tensor, Layout]]:
    """(q, k, how they lie): one key, edges of tiles and blocks, chunks, two mask words, packed, paged."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "block_table", "seqlens_k")
    cases: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []
    kinds = ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 128))
    for dtype, dim in kinds[1:2] if RACES else kinds:

        def data(*shape: int, dtype: torch.dtype = dtype, dim: int = dim) -> torch.Tensor:
            return torch.randn(*shape, dim).to(DEVICE, dtype)

        sizes = ((1, 1), (128, 128), (257, 257), (70, 400), (200, 4230))
        for seqlen_q, seqlen_k in sizes[2:4] if RACES else sizes:
            cases.append((data(2, seqlen_q, HEADS_Q), data(2, seqlen_k, HEADS_KV), {"causal": True}))
        cases.append((data(1, 200, HEADS_Q), data(1, 390, HEADS_KV), {"causal": False}))
        cu_q, cu_k = int32([0, 0, 129, 130, 330, 330, 340]), int32([0, 7, 136, 137, 400, 400, 400])
        packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 200, "max_seqlen_k": 263}
        cases.append((data(340, HEADS_Q), data(400, HEADS_KV), {"causal": True, **packed}))
        for page_size in (16,) if RACES else (1, 16, 256):
            lengths = [129, 0, 1, 300]
            table, pages = random_pages(lengths, page_size)
            cache = {"block_table": table, "seqlens_k": int32(lengths), "max_seqlen_k": 300}
            cases.append((data(4, 100, HEADS_Q), data(pages, page_size, HEADS_KV), {"causal": True, **cache}))
    return [(q, k, resolve_layout(q, k, None, how["causal"], *map(how.get, names))) for q, k, how in cases]


def select_blocks() -> None:
    """Every rule, pooling and sharing, with all that keeps blocks beside the score; masks, and scores."""
    for q, k, layout in selections():
        lengths = (layout.cu_seqlens_k, layout.block_table, layout.seqlens_k, layout.max_seqlen_k)
        rows = layout.num_mask_rows(128)
        for rule, pooling, stride, sharing in RULES:
            if RACES and rule != "pooled":
                continue
            pooled = rule in ("relative_max", "pooled")
            shared = (
                q,
                torch.ops.bsfa.pool_blocks(k, *lengths, 128, pooling) if pooled else None,
                None if pooled else k,
                layout.cu_seqlens_q,
                layout.cu_seqlens_k,
                None if pooled else layout.block_table,
                layout.seqlens_k,
                layout.max_seqlen_q,
                layout.max_seqlen_k,
                rows,
                128,
                128,
                layout.causal,
                SCALE,
                0.0 if sharing == "none" else 20.0,
                rule,
                pooling,
                stride,
                sharing,
                1,
                2,
            )
            thresholds = torch.full((HEADS_KV if sharing == "group" else HEADS_Q,), 0.9, device=DEVICE)
            probability = 1.0 if rule == "relative_max" else 0.3
            prompt_lens = int32([500] * layout.batch) if sharing == "union" else None
            kept = (thresholds, 1, 2, 0.1, probability, 7, 0.05, 3, prompt_lens)
            torch.ops.bsfa.select_blocks(*shared, *kept)
            if has("score_blocks"):
                torch.ops.bsfa.score_blocks(*shared)


def patterns() -> None:
    """The probe's vertical and slash mass, and masks from patterns of blocks."""
    for q, k, layout in selections():
        torch.ops.bsfa.probe_attention(
            q,
            k,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.block_table,
            layout.seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            128,
            layout.causal,
            SCALE,
            0.0,
        )
        if not has("pattern_mask"):
            continue
        words = (layout.max_seqlen_k + 128 * 32 - 1) // (128 * 32)

        def bits(*shape: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32).to(DEVICE)

        torch.ops.bsfa.pattern_mask(
            bits(layout.num_mask_rows(128), HEADS_Q, words),
            int32([[0, 1] * (HEADS_Q // 2)] * layout.batch),  # type: ignore[arg-type]
            bits(layout.batch, HEADS_Q, words),
            bits(layout.batch, HEADS_Q, words),
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            128,
            128,
            layout.causal,
            1,
            2,
        )


def exact_skip() -> None:
    """Attention that skips some, all it may, and nothing; in one pass, in two, with bounds; every layout."""
    heads_q, heads_kv = 4, 2
    ratios = torch.tensor([0.0, 0.5, 0.9, 1.0], device=DEVICE)
    policies = [bsfa.policies.ExactSkip(ratio=ratios, counted=counted) for counted in (False, True)]
    cuts = torch.tensor([-math.inf, 1.0, 2.0, 1e4])
    policies.append(bsfa.policies.ExactSkip.absolute(cuts).to(torch.device(DEVICE)))
    if has("skip_mask"):
        policies += [dataclasses.replace(p, passes=2) for p in policies if not p.counted]
    if has("bound_mask"):
        policies += [dataclasses.replace(p, bounds=True) for p in policies if not p.counted and p.passes == 1]
    for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 128)):

        def data(*shape: int, dtype: torch.dtype = dtype, dim: int = dim) -> torch.Tensor:
            return torch.randn(*shape, dim).to(DEVICE, dtype)

        for skip in policies:

            def attend(*tensors: Any, skip: Any = skip, **options: Any) -> None:
                bsfa.block_sparse_attention(*tensors, skip=skip, return_skips=True, **options)

            for causal in (True, False):
                for seqlen_q, seqlen_k in ((1, 1), (130, 130), (64, 400), (300, 200), (257, 650)):
                    q, k, v = data(2, seqlen_q, heads_q), data(2, seqlen_k, heads_kv), data(2, seqlen_k, heads_kv)
                    attend(q, k, v, None, causal=causal)
                cu_q, cu_k = int32([0, 0, 129, 130, 330, 330, 340]), int32([0, 7, 136, 137, 400, 400, 400])
                packed: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
                packed |= {"max_seqlen_q": 200, "max_seqlen_k": 263}
                q, k, v = data(340, heads_q), data(400, heads_kv), data(400, heads_kv)
                attend(q, k, v, random_mask(q, heads_q, causal=causal, **packed), causal=causal, **packed)
            q, k, v = data(1, 64, heads_q), data(1, 4200, heads_kv), data(1, 4200, heads_kv)  # a mask row of two words
            attend(q, k, v, random_mask(q, heads_kv, seqlen_k=4200), softcap=20.0)
            for page_size in (1, 16, 128):
                lengths = [129, 0, 1, 500]
                table, pages = random_pages(lengths, page_size)
                q, k, v = data(4, 100, heads_q), data(pages, page_size, heads_kv), data(pages, page_size, heads_kv)
                attend(q, k, v, None, block_table=table, seqlens_k=int32(lengths), max_seqlen_k=500)


def token_masks() -> None:
    """Sets of keys into masks: rows on 16 bytes and not, invalid indices, no keys, several passes; every layout."""
    for topk in (1, 36, 50):
        for seqlen_q, seqlen_k in ((1, 1), (130, 130), (64, 400), (300, 200), (3, 0), (9, 40_000)):
            rows = torch.randint(-2, seqlen_k + 2, (2, seqlen_q, topk), dtype=torch.int32).to(DEVICE)
            bsfa.TokenMask.from_indices(rows, seqlen_k=seqlen_k, causal=topk != 36, check=False)
            bsfa.TokenMask.from_indices(rows[..., 1:], seqlen_k=seqlen_k, check=False)
        cu_q, lengths = int32([0, 0, 129, 130, 330, 330, 340]), int32([7, 129, 1, 263, 0, 0])
        rows = torch.randint(-1, 263, (340, topk), dtype=torch.int32).to(DEVICE)
        packed: dict[str, Any] = {"cu_seqlens_q": cu_q, "max_seqlen_q": 200, "seqlens_k": lengths, "max_seqlen_k": 263}
        bsfa.TokenMask.from_indices(rows, check=False, **packed)


def masked_mha() -> None:
    """Attention over token masks at its head dims: batched, packed, paged; rows and tiles without a key; MLA dense."""
    heads = 2
    for dtype, dim, dim_v in ((torch.bfloat16, 192, 128), (torch.float16, 128, 128), (torch.bfloat16, 64, 64)):

        def qkv(
            q_shape: tuple[int, ...],
            k_shape: tuple[int, ...],
            dtype: torch.dtype = dtype,
            dim: int = dim,
            dim_v: int = dim_v,
        ) -> tuple[torch.Tensor, ...]:
            shapes = ((*q_shape, heads, dim), (*k_shape, heads, dim), (*k_shape, heads, dim_v))
            return tuple(torch.randn(*shape).to(DEVICE, dtype) for shape in shapes)

        def attend(*tensors: torch.Tensor, longest: int, **options: Any) -> None:
            rows = torch.randint(0, max(longest, 1), (*tensors[0].shape[:-2], 20), dtype=torch.int32)
            rows[..., ::3, :] = -1
            bsfa.masked_mha(*tensors, rows.to(DEVICE), max_dense_seqlen=0, check=False, **options)

        for causal in (True, False):
            for seqlen_q, seqlen_k in ((1, 1), (130, 130), (64, 400), (300, 200), (257, 650)):
                tensors = qkv((2, seqlen_q), (2, seqlen_k))
                attend(*tensors, longest=seqlen_k, causal=causal)
                if dim != dim_v:
                    bsfa.attention(*tensors, causal=causal)  # type: ignore[arg-type]
            cu_q, cu_k = int32([0, 0, 129, 130, 330, 330, 340]), int32([0, 7, 136, 137, 400, 400, 400])
            packed: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
            packed |= {"max_seqlen_q": 200, "max_seqlen_k": 263}
            attend(*qkv((340,), (400,)), longest=263, causal=causal, **packed)
        attend(*qkv((1, 64), (1, 4200)), longest=4200, softcap=20.0)  # two words of blocks
        for page_size in (1, 16, 128):
            lengths = [129, 0, 1, 500]
            table, pages = random_pages(lengths, page_size)
            cache: dict[str, Any] = {"block_table": table, "seqlens_k": int32(lengths), "max_seqlen_k": 500}
            attend(*qkv((4, 100), (pages, page_size)), longest=500, **cache)


def measurements() -> None:
    """The masses and maxima of calibration, in tiles of 64 and 128 rows."""
    for q, k, layout in selections():
        where = (
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.block_table,
            layout.seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
        )
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else torch.zeros(q.shape[1], q.shape[0])
        for block_m, softcap in ((64, 0.0), (128, 20.0)):
            options = (layout.num_mask_rows(block_m), block_m, 128, layout.causal, SCALE, softcap)
            if has("block_mass"):
                torch.ops.bsfa.block_mass(q, k, lse.to(DEVICE), *where, *options)
            if has("tile_max"):
                for form in ("absolute", "relative"):
                    torch.ops.bsfa.tile_max(q, k, *where, *options, form)


if __name__ == "__main__":
    torch.manual_seed(0)
    pool_blocks()
    if has("attention"):
        attention()
        if not RACES:
            means_of_dropped_blocks()
            if has("skip_attention"):
                exact_skip()
    if has("token_mask"):
        token_masks()
        if not RACES:
            masked_mha()
    if has("select_blocks"):
        select_blocks()
    if has("probe_attention"):
        patterns()
    if not RACES:  # their kernels wait for mbarriers
        measurements()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("done")
