"""pool_blocks on CUDA against float64 on the CPU: layouts, lengths, strides, dtypes, and how the operator behaves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import bsfa

NAN = float("nan")
GARBAGE_PAGES = (2**31 - 1, -1, -(2**31), 10**9)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


def block_means(sequences: list[Tensor], block_n: int, max_blocks: int) -> Tensor:
    """The oracle: float64 on the CPU, one Python slice per block."""
    heads, dim = sequences[0].shape[1:]
    out = torch.zeros(len(sequences), max_blocks, heads, dim, dtype=torch.float64)
    for b, tokens in enumerate(sequences):
        for j in range(math.ceil(len(tokens) / block_n)):
            out[b, j] = tokens[j * block_n : (j + 1) * block_n].double().cpu().sum(0) / len(
                tokens[j * block_n : (j + 1) * block_n]
            )
    return out


def low_precision_means(sequences: list[Tensor], block_n: int, max_blocks: int) -> Tensor:
    """The same maths by torch in the inputs' dtype: the yardstick of the tolerance."""
    heads, dim = sequences[0].shape[1:]
    out = torch.zeros(len(sequences), max_blocks, heads, dim, dtype=sequences[0].dtype, device="cuda")
    for b, tokens in enumerate(sequences):
        for j, block in enumerate(tokens.split(block_n)):
            if len(block):
                out[b, j] = block.mean(0)
    return out


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the caching allocator gives to the next tensor of this size."""
    blocks = [torch.full(shape, NAN, dtype=dtype, device="cuda") for _ in range(2)]
    del blocks


def check(out: Tensor, sequences: list[Tensor], block_n: int, max_blocks: int) -> None:
    want = block_means(sequences, block_n, max_blocks)
    assert tuple(out.shape) == tuple(want.shape)
    assert out.dtype == sequences[0].dtype
    got = out.double().cpu()
    assert torch.isfinite(got).all(), "an element was not written, or stale memory was read"
    for b, tokens in enumerate(sequences):
        assert (got[b, math.ceil(len(tokens) / block_n) :] == 0).all(), "blocks past the end must be zeros"
    error = (got - want).abs().max().item() if want.numel() else 0.0
    yardstick = low_precision_means(sequences, block_n, max_blocks).double().cpu()
    allowed = 2 * (yardstick - want).abs().max().item() if want.numel() else 0.0
    assert error <= allowed + 1e-6, f"error {error:.3e}, allowed {allowed:.3e}"


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@dataclass
class Paged:
    """Sequences spread over shuffled pages of a pool that holds NaN wherever no token lies."""

    k: Tensor
    block_table: Tensor
    seqlens: Tensor
    sequences: list[Tensor]

    @staticmethod
    def make(lengths: list[int], page_size: int, heads: int, dim: int, dtype: torch.dtype, pool: Tensor | None = None):
        sequences = [rand(n, heads, dim, dtype=dtype) for n in lengths]
        pages = [math.ceil(n / page_size) for n in lengths]
        max_pages = max(*pages, 1) + 2
        if pool is None:
            pool = torch.empty(sum(pages) + 3, page_size, heads, dim, dtype=dtype, device="cuda")
        pool.fill_(NAN)
        order = torch.randperm(pool.shape[0])[: sum(pages)].tolist()
        table = torch.tensor(GARBAGE_PAGES).repeat(len(lengths), max_pages)[:, :max_pages].to(torch.int32)
        for b, tokens in enumerate(sequences):
            for i, part in enumerate(tokens.split(page_size) if len(tokens) else ()):
                page = order.pop()
                table[b, i] = page
                pool[page, : len(part)] = part
        return Paged(pool, table.cuda(), int32(lengths), sequences)

    def run(self, block_n: int, max_seqlen_k: int | None = None) -> Tensor:
        return bsfa.pool_blocks(
            self.k, block_n=block_n, block_table=self.block_table, seqlens_k=self.seqlens, max_seqlen_k=max_seqlen_k
        )


# --- layouts and lengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [0, 1, 2, 15, 16, 17, 63, 127, 128, 129, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batched_lengths(seqlen: int, dtype: torch.dtype) -> None:
    k = rand(2, seqlen, 3, 64, dtype=dtype)
    blocks = math.ceil(seqlen / 128)
    poisoned((2, blocks, 3, 64), dtype)
    check(bsfa.pool_blocks(k), list(k), 128, blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_head_dims(dim: int, heads: int, dtype: torch.dtype) -> None:
    k = rand(2, 301, heads, dim, dtype=dtype)
    poisoned((2, 3, heads, dim), dtype)
    check(bsfa.pool_blocks(k), list(k), 128, 3)


@pytest.mark.parametrize("block_n", [1, 3, 16, 64, 100, 127, 256, 1024, 4096])
def test_block_sizes(block_n: int) -> None:
    k = rand(1, 2050, 2, 64)
    blocks = math.ceil(2050 / block_n)
    poisoned((1, blocks, 2, 64), k.dtype)
    check(bsfa.pool_blocks(k, block_n=block_n), list(k), block_n, blocks)


@pytest.mark.parametrize("max_seqlen", [517, 1024])
def test_packed(max_seqlen: int) -> None:
    lengths = [0, 1, 127, 128, 129, 0, 0, 517, 5, 0]
    cu = int32([sum(lengths[:i]) for i in range(len(lengths) + 1)])
    k = rand(sum(lengths), 4, 128)
    blocks = math.ceil(max_seqlen / 128)
    poisoned((len(lengths), blocks, 4, 128), k.dtype)
    out = bsfa.pool_blocks(k, cu_seqlens_k=cu, max_seqlen_k=max_seqlen)
    check(out, list(k.split(lengths)), 128, blocks)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 128, 256])
@pytest.mark.parametrize("dim", [64, 128])
def test_paged(page_size: int, dim: int) -> None:
    lengths = [0, 1, 127, 128, 129, 0, 384, 517, 1000]
    case = Paged.make(lengths, page_size, 2, dim, torch.bfloat16)
    poisoned((len(lengths), 8, 2, dim), torch.bfloat16)
    check(case.run(128, max_seqlen_k=1000), case.sequences, 128, 8)


@pytest.mark.parametrize("block_n", [1, 64, 100, 1024])
def test_paged_block_sizes(block_n: int) -> None:
    case = Paged.make([700, 0, 1, 1500], 16, 2, 40, torch.float16)
    blocks = math.ceil(1500 / block_n)
    poisoned((4, blocks, 2, 40), torch.float16)
    check(case.run(block_n, max_seqlen_k=1500), case.sequences, block_n, blocks)


def test_paged_default_max_seqlen_is_what_the_table_holds() -> None:
    case = Paged.make([100, 20], 16, 2, 64, torch.bfloat16)
    capacity = case.block_table.shape[1] * 16
    check(case.run(64), case.sequences, 64, math.ceil(capacity / 64))


def test_random_lengths() -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        lengths = torch.randint(0, 700, (5,), generator=generator).tolist()
        page_size = int(torch.randint(1, 70, (1,), generator=generator))
        block_n = int(torch.randint(1, 300, (1,), generator=generator))
        case = Paged.make(lengths, page_size, 2, 72, torch.bfloat16)
        blocks = math.ceil(700 / block_n)
        poisoned((5, blocks, 2, 72), torch.bfloat16)
        check(
            bsfa.pool_blocks(
                case.k,
                block_n=block_n,
                block_table=torch.nn.functional.pad(case.block_table, (0, 700), value=-5),
                seqlens_k=case.seqlens,
                max_seqlen_k=700,
            ),
            case.sequences,
            block_n,
            blocks,
        )


# --- strides and alignment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 40])
def test_interleaved_kv_pages(dim: int) -> None:
    pool = torch.empty(80, 16, 2, 2 * dim, dtype=torch.bfloat16, device="cuda")
    case = Paged.make([129, 0, 300, 16], 16, 2, dim, torch.bfloat16, pool=pool[..., :dim])
    pool[..., dim:] = NAN  # the V half
    check(case.run(128, max_seqlen_k=300), case.sequences, 128, 3)


def test_heads_before_tokens() -> None:
    k = rand(2, 4, 300, 64).transpose(1, 2)  # [B, S, H, D] over [B, H, S, D] memory
    check(bsfa.pool_blocks(k), list(k), 128, 3)


def test_pages_with_heads_before_tokens() -> None:
    pool = torch.empty(80, 4, 16, 64, dtype=torch.float16, device="cuda").transpose(1, 2)
    case = Paged.make([129, 0, 300, 16], 16, 4, 64, torch.float16, pool=pool)
    check(case.run(128, max_seqlen_k=300), case.sequences, 128, 3)


@pytest.mark.parametrize("dim", [1, 7, 20, 33, 100, 255])
def test_head_dims_without_16_byte_rows(dim: int) -> None:
    k = rand(2, 301, 3, dim)
    poisoned((2, 3, 3, dim), k.dtype)
    check(bsfa.pool_blocks(k), list(k), 128, 3)
    case = Paged.make([0, 301, 128], 3, 3, dim, torch.float16)
    check(case.run(128, max_seqlen_k=301), case.sequences, 128, 3)


def test_unaligned_start_and_strides() -> None:
    flat = rand(2 * 300 * 2 * 64 + 1)
    k = flat[1:].view(2, 300, 2, 64)
    check(bsfa.pool_blocks(k), list(k), 128, 3)
    wide = rand(2, 300, 2, 65)[..., :64]
    check(bsfa.pool_blocks(wide), list(wide), 128, 3)
    token_gap = rand(2 * 300 * 131).as_strided((2, 300, 2, 64), (300 * 131, 131, 64, 1))
    check(bsfa.pool_blocks(token_gap), list(token_gap), 128, 3)


def test_offsets_beyond_2_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    buffer = torch.empty(2**31 + 2**27, dtype=torch.bfloat16, device="cuda")
    far_batch = buffer.as_strided((2, 200, 2, 64), (2**31, 128, 64, 1))
    far_batch.copy_(torch.randn(2, 200, 2, 64))
    check(bsfa.pool_blocks(far_batch), list(far_batch), 128, 2)
    far_token = buffer.as_strided((1, 130, 1, 64), (0, 2**24, 64, 1))
    far_token.copy_(torch.randn(1, 130, 1, 64))
    check(bsfa.pool_blocks(far_token), list(far_token), 128, 2)
    pool = buffer.view(-1, 16, 8, 128)
    pages = [pool.shape[0] - 1, 2, pool.shape[0] - 9, 0, pool.shape[0] - 5]
    for page in pages:
        pool[page] = rand(16, 8, 128)
    sequence = torch.cat([pool[page] for page in pages])[:77]
    out = bsfa.pool_blocks(
        pool, block_n=64, block_table=int32([*pages, -1])[None], seqlens_k=int32([77]), max_seqlen_k=77
    )
    check(out, [sequence], 64, 2)


# --- how the operator behaves -----------------------------------------------------------------------------------------


def test_same_bits_again_and_in_another_layout() -> None:
    case = Paged.make([1000, 517], 16, 4, 128, torch.bfloat16)
    first = case.run(128, max_seqlen_k=1000)
    for _ in range(5):
        assert torch.equal(case.run(128, max_seqlen_k=1000), first)
    packed = bsfa.pool_blocks(torch.cat(case.sequences), cu_seqlens_k=int32([0, 1000, 1517]), max_seqlen_k=1000)
    assert torch.equal(packed, first)


def test_cuda_graph() -> None:
    case = Paged.make([300, 0, 129], 16, 2, 64, torch.bfloat16)
    case.run(128, max_seqlen_k=300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(128, max_seqlen_k=300)
    fresh = Paged.make([17, 300, 0], 16, 2, 64, torch.bfloat16, pool=torch.empty_like(case.k))
    case.k.copy_(fresh.k)
    case.block_table.fill_(-7)
    case.block_table[:, : fresh.block_table.shape[1]] = fresh.block_table[:, : case.block_table.shape[1]]
    case.seqlens.copy_(fresh.seqlens)
    out.fill_(NAN)
    graph.replay()
    torch.cuda.synchronize()
    check(out, fresh.sequences, 128, 3)


def test_runs_on_the_current_stream() -> None:
    late = rand(1, 4096, 8, 128)
    k = torch.full_like(late, NAN)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        k.copy_(late)
        out = bsfa.pool_blocks(k)
    stream.synchronize()
    check(out, list(late), 128, 32)


def test_no_synchronisation() -> None:
    case = Paged.make([300, 0, 129], 16, 2, 64, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(128, max_seqlen_k=300)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_other_device_than_the_current_one() -> None:
    k = rand(2, 300, 2, 64).to("cuda:1")
    out = bsfa.pool_blocks(k)
    assert out.device == k.device
    assert torch.cuda.current_device() == 0
    check(out, list(k), 128, 3)


def raw(k: Tensor, table: Tensor | None, seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    return torch.ops.bsfa.pool_blocks(k, None, table, seqlens, max_seqlen, 128, "mean")


def test_compile_fullgraph() -> None:
    case = Paged.make([300, 0, 129], 16, 2, 64, torch.bfloat16)
    compiled = torch.compile(lambda k, table, seqlens: raw(k, table, seqlens, 300) * 2.0, fullgraph=True)
    got = compiled(case.k, case.block_table, case.seqlens)
    assert torch.equal(got, case.run(128, max_seqlen_k=300) * 2.0)


def test_opcheck() -> None:
    case = Paged.make([300, 0, 129], 16, 2, 64, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.bsfa.pool_blocks.default,
        (case.k.nan_to_num(), None, case.block_table, case.seqlens, 300, 128, "mean"),
    )
    k = rand(2, 300, 2, 64)
    torch.library.opcheck(torch.ops.bsfa.pool_blocks.default, (k, None, None, None, 300, 128, "mean"))
    torch.library.opcheck(
        torch.ops.bsfa.pool_blocks.default, (k.flatten(0, 1), int32([0, 300, 600]), None, None, 300, 128, "mean")
    )


def test_raw_operator_refuses_what_it_cannot_do() -> None:
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        raw(torch.randn(1, 128, 2, 64, device="cuda"), None, None, 128)
    with pytest.raises(RuntimeError, match="unit stride"):
        raw(rand(1, 128, 64, 2).transpose(-1, -2), None, None, 128)
    with pytest.raises(RuntimeError, match="same device"):
        raw(rand(4, 16, 2, 64), torch.zeros(1, 4, dtype=torch.int32), int32([64]), 64)
    with pytest.raises(RuntimeError, match="too few pages"):
        raw(rand(4, 16, 2, 64), int32([0, 1, 2, 3])[None], int32([64]), 65)
