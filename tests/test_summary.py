"""BlockSummary: what is kept beside a paged cache is what pooling the whole cache would give, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bsfa
from bsfa.policies import CumulativeMass, Dense, Policy, RelativeMax, StaticPattern
from cases import BF16, F16, F32, NAN, PAGED, PAGED_PACKED, Case, int32
from serving import Cache

#: page_size, block_n: pages in a block, blocks in a page, and both at once
SIZES = [(1, 128), (16, 128), (32, 128), (128, 128), (256, 128), (4, 8), (8, 4), (1, 1), (7, 1), (5, 15), (15, 5)]

# --- summaries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [128], [128, 256], [1, 2, 130], [60, 70, 127, 129, 300]])
@pytest.mark.parametrize(("page_size", "block_n"), SIZES)
def test_chunks_give_the_summary_of_the_whole(page_size: int, block_n: int, cuts: list[int]) -> None:
    cache = Cache(page_size, num_pages=310 // page_size + 2, block_n=block_n, values=True)
    sequence = cache.add()
    for begin, end in pairwise([0, *cuts, 309]):
        cache.step({sequence: end - begin})
        cache.check()


@pytest.mark.parametrize("how", ["seqlens_q", "cu_seqlens_q"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("page_size", "block_n"), [(16, 64), (64, 64), (64, 16), (1, 32)])
def test_sequences_of_mixed_lengths(page_size: int, block_n: int, dtype: torch.dtype, how: str) -> None:
    """Prefill chunks, decode steps, sequences that are idle or empty, in one call."""
    cache = Cache(page_size, num_pages=600 // page_size + 8, block_n=block_n, dtype=dtype, values=True)
    for _ in range(4):
        cache.add()
    for step in ([100, 0, 64, 1], [100, 0, 0, 1], [1, 63, 64, 1], [0, 2, 1, 100], [0, 0, 0, 0], [27, 0, 1, 26]):
        cache.step(dict(enumerate(step)), how)
        cache.check()


@pytest.mark.parametrize(("page_size", "block_n"), SIZES)
def test_decode_steps(page_size: int, block_n: int) -> None:
    cache = Cache(page_size, num_pages=400 // page_size + 4, block_n=block_n)
    for length in (123, 30):
        cache.step({cache.add(): length})
    for _ in range(12):
        cache.step({0: 1, 1: 1}, "uniform")
        cache.check()


@pytest.mark.parametrize(("page_size", "block_n"), [(16, 64), (64, 64), (64, 16), (8, 128)])
def test_shared_pages(page_size: int, block_n: int) -> None:
    """Sequences that share a prefix and part inside a block, at its edge, or not at all; the first goes on."""
    cache = Cache(page_size, num_pages=80, block_n=block_n, values=True)
    first = cache.add()
    cache.step({first: 200})
    shared = [n - n % page_size for n in (page_size, 64, 100, 128, 160, 192)]
    others = [cache.add(first, n) for n in shared]
    cache.step(dict.fromkeys(others, 0))  # cached prefixes that end inside a block, before any token of their own
    cache.check()
    cache.step({s: 5 + 11 * i for i, s in enumerate(others)} | {first: 3})
    cache.check()
    cache.step({others[0]: 70})
    cache.check()
    again = cache.add(others[0], 2 * page_size)
    cache.step({again: 1})
    cache.check()


@pytest.mark.parametrize("pooling", ["maxabs", "center"])
@pytest.mark.parametrize(("page_size", "block_n"), [(16, 64), (64, 16), (5, 15)])
def test_other_poolings(page_size: int, block_n: int, pooling: str) -> None:
    """The centre of a block moves as the block grows."""
    cache = Cache(page_size, num_pages=400 // page_size + 4, block_n=block_n, pooling=pooling, values=True)
    cache.add(), cache.add()
    for step in ({0: 100, 1: 7}, {0: 1, 1: 60}, {0: 63, 1: 0}, {0: 30, 1: 1}):
        cache.step(step)
        cache.check()


def test_pages_are_reused() -> None:
    cache = Cache(16, num_pages=24, block_n=64)
    a, b = cache.add(), cache.add()
    cache.step({a: 150, b: 100})
    cache.release(a)
    c = cache.add()
    cache.step({c: 170})
    cache.check([b, c])
    cache.step({b: 30, c: 1})
    cache.check([b, c])


def test_a_sequence_may_be_cut_back() -> None:
    """Rejected draft tokens: the length goes down, and other tokens follow."""
    cache = Cache(16, num_pages=24, block_n=64)
    a = cache.add()
    cache.step({a: 150})
    for length in (140, 128, 127, 100, 3):
        cache.lengths[a] = length
        cache.step({a: 0})
        cache.check()
        cache.step({a: 20})
        cache.check()


def test_views_with_strides_and_stale_tails() -> None:
    """Keys and values interleaved as vLLM lays them out; page tails hold NaN throughout (Cache fills them so)."""
    both = torch.full((40, 2, 16, 2, 16), NAN)
    cache = Cache(16, num_pages=40, dim_v=16, block_n=32, values=True)
    cache.k, cache.v = both.unbind(1)
    a, b = cache.add(), cache.add()
    for step in ({a: 30, b: 100}, {a: 30, b: 7}, {a: 1, b: 1}):
        cache.step(step)
        cache.check()


@settings(max_examples=60)
@given(
    sizes=st.sampled_from([(16, 32), (32, 16), (4, 4), (1, 7), (6, 2), (3, 12)]),
    steps=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=8),
    how=st.sampled_from(["seqlens_q", "cu_seqlens_q"]),
    share=st.integers(0, 60),
)
def test_any_chunks(sizes: tuple[int, int], steps: list[list[int]], how: str, share: int) -> None:
    page_size, block_n = sizes
    cache = Cache(page_size, num_pages=1500 // page_size, block_n=block_n, hkv=1, dim=4, dim_v=3)
    cache.step({cache.add(): 60})
    share -= share % page_size
    cache.step({cache.add(0, share): 1, cache.add(): 0})
    for step in steps:
        cache.step(dict(enumerate(step)), how)
        cache.check()


def test_nothing_at_all() -> None:
    summary = bsfa.BlockSummary.allocate(4, 16, 2, 8, block_n=32, dtype=F32, head_dim_v=8)
    cache = torch.randn(4, 16, 2, 8)
    for table in (torch.zeros(0, 3, dtype=torch.int32), torch.zeros(2, 0, dtype=torch.int32)):
        seqlens = torch.zeros(table.shape[0], dtype=torch.int32)
        summary.update(cache, table, seqlens, max_seqlen_q=0, v_cache=cache)
        for gathered in (summary.gather(table, seqlens), summary.gather_values(table, seqlens)):
            assert gathered.shape == (table.shape[0], -(-table.shape[1] * 16 // 32), 2, 8)
    assert not summary.keys.any() and not summary.values.any()


def test_what_it_says() -> None:
    summary = bsfa.BlockSummary.allocate(10, 256, 2, 8, block_n=64, dtype=BF16, head_dim_v=4)
    assert (summary.num_pages, summary.blocks_per_page, summary.dtype) == (10, 4, BF16)
    assert summary.device == torch.device("cpu") and summary.values.shape == (11, 4, 2, 4)
    assert "num_pages=10" in repr(summary) and "head_dim_v=4" in repr(summary)
    assert bsfa.BlockSummary.allocate(10, 16, 2, 8).blocks_per_page == 1


# --- selection and attention ------------------------------------------------------------------------------------------

PROMPT = 420
SCORED: list[Policy] = [
    RelativeMax(alpha=0.6, block_m=64, block_n=32),
    RelativeMax(alpha=0.95, sink_blocks=0, window_blocks=1, last_tiles=3, min_blocks=2, block_m=64, block_n=32),
    CumulativeMass(mass=0.7, block_m=64, block_n=32),
]


def summary_for(inputs: Any, block_n: int, **options: Any) -> bsfa.BlockSummary:
    pages, page_size, hkv, dim = inputs.k.shape
    options = {"head_dim_v": inputs.v.shape[-1], **options}
    return bsfa.BlockSummary.allocate(pages, page_size, hkv, dim, block_n=block_n, dtype=inputs.k.dtype, **options)


@pytest.mark.parametrize("policy", SCORED, ids=range(3))
@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
def test_chunked_prefill_has_the_masks_of_one_shot(page_size: int, policy: Policy) -> None:
    case = Case(lengths=((PROMPT, PROMPT),) * 2, hq=4, hkv=2, block_m=64, block_n=32, scale=0.4, layout=PAGED)
    whole = replace(case, page_size=page_size).make()
    want, info = whole.run(policy, return_info=True)
    summary = summary_for(whole, 32)
    masks, outs = [], []
    for begin, end in pairwise([0, 64, 256, 320, PROMPT]):
        out, chunk = bsfa.attention_paged(
            whole.q[:, begin:end],
            whole.k,
            whole.v,
            whole.block_table,
            int32([end, end]),
            max_seqlen_k=end,
            policy=policy,
            summary=summary,
            prompt_lens=int32([PROMPT, PROMPT]),
            softmax_scale=0.4,
            return_info=True,
        )
        kept = chunk.mask.to_bool()[:, :, : -(-(end - begin) // 64)]  # without the spare tile of a paged call
        masks.append(torch.nn.functional.pad(kept, (0, -(-PROMPT // 32) - kept.shape[3])))
        outs.append(out)
    assert torch.equal(torch.cat(masks, dim=2), info.mask.to_bool()[:, :, : -(-PROMPT // 64)])
    torch.testing.assert_close(torch.cat(outs, dim=1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [PAGED, PAGED_PACKED])
@pytest.mark.parametrize("policy", [None, Dense(), StaticPattern(block_m=64, block_n=64), *SCORED])
def test_a_call_is_bitwise_that_without(policy: Policy | None, layout: str) -> None:
    """One call over a cached prefix that earlier calls have summarised, whatever their policy."""
    lengths = ((64, 300), (64, 190)) if layout == PAGED else ((64, 300), (0, 0), (1, 130), (7, 190))
    inputs = Case(lengths=lengths, hq=4, hkv=2, page_size=16, block_m=64, block_n=32, layout=layout).make()
    summary = summary_for(inputs, 32)
    before = int32([k - q for q, k in lengths])
    summary.update(inputs.k, inputs.block_table, before, seqlens_q=before, max_seqlen_q=300, v_cache=inputs.v)
    want, want_lse, want_info = inputs.run(policy, return_lse=True, return_info=True)
    got, lse, info = inputs.run(policy, return_lse=True, return_info=True, summary=summary)
    assert torch.equal(got, want) and torch.equal(lse, want_lse)
    if want_info.mask is not None:
        assert torch.equal(info.mask.words, want_info.mask.words)
    where = {"block_table": inputs.block_table, "seqlens_k": inputs.seqlens_k, "max_seqlen_k": inputs.max_k}
    assert torch.equal(summary.gather(**where), bsfa.pool_blocks(inputs.k, block_n=32, **where))
    assert torch.equal(summary.gather_values(**where), bsfa.pool_blocks(inputs.v, block_n=32, **where))


@pytest.mark.filterwarnings("ignore::bsfa.DenseFallbackWarning")
def test_decode_steps_update_too() -> None:
    inputs = Case(lengths=((1, 129), (1, 64)), hq=4, hkv=2, page_size=16, layout=PAGED).make()
    summary = summary_for(inputs, 64)
    before = inputs.seqlens_k - 1
    summary.update(inputs.k, inputs.block_table, before, seqlens_q=before, max_seqlen_q=128, v_cache=inputs.v)
    inputs.run(RelativeMax(block_m=64, block_n=64), summary=summary)
    where = {"block_table": inputs.block_table, "seqlens_k": inputs.seqlens_k, "max_seqlen_k": 129}
    assert torch.equal(summary.gather(**where), bsfa.pool_blocks(inputs.k, block_n=64, **where))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_update_and_gather_compile(backend: str, dynamic: bool | None) -> None:
    torch.compiler.reset()
    cache = Cache(16, num_pages=60, block_n=64)
    other = Cache(16, num_pages=60, block_n=64)

    def step(summary: bsfa.BlockSummary, k: Tensor, table: Tensor, seqlens: Tensor, cu: Tensor, longest: int) -> Tensor:
        summary.update(k, table, seqlens, cu_seqlens_q=cu, max_seqlen_q=longest)
        return summary.gather(table, seqlens)

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    sequences = [cache.add(), cache.add()]
    for counts in ([100, 3], [20, 100], [1, 1], [64, 29]):
        for s, n in zip(sequences, counts, strict=True):
            cache.append(s, n)
        table, seqlens = cache.table(sequences), cache.seqlens(sequences)
        cu = int32([0, counts[0], sum(counts)])
        got = compiled(other.summary, cache.k, table, seqlens, cu, max(counts))
        assert torch.equal(got, step(cache.summary, cache.k, table, seqlens, cu, max(counts)))
        assert torch.equal(other.summary.keys.nan_to_num(), cache.summary.keys.nan_to_num())
    cache.check()


def test_attention_with_a_summary_compiles() -> None:
    torch.compiler.reset()
    inputs = Case(lengths=((70, 130), (70, 90)), hq=4, hkv=2, dim=16, layout=PAGED).make()
    policy = RelativeMax(alpha=0.8, block_m=32, block_n=16)
    summary = summary_for(inputs, 16)

    def run(q: Tensor, k: Tensor, v: Tensor, summary: bsfa.BlockSummary, seqlens: Tensor) -> Any:
        return bsfa.attention_paged(q, k, v, inputs.block_table, seqlens, policy=policy, summary=summary)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seqlens in (int32([70, 84]), int32([130, 90])):
        got = compiled(inputs.q, inputs.k, inputs.v, summary, seqlens)
        assert torch.equal(
            got, bsfa.attention_paged(inputs.q, inputs.k, inputs.v, inputs.block_table, seqlens, policy=policy)
        )


# --- errors -----------------------------------------------------------------------------------------------------------


def allocate(**changes: Any) -> bsfa.BlockSummary:
    arguments = {"num_pages": 8, "page_size": 16, "num_kv_heads": 2, "head_dim": 8, "block_n": 32, "dtype": F32}
    return bsfa.BlockSummary.allocate(**(arguments | changes))


@pytest.mark.parametrize(("page_size", "block_n"), [(48, 128), (96, 64), (7, 128), (192, 128)])
def test_pages_that_do_not_fit_blocks(page_size: int, block_n: int) -> None:
    with pytest.raises(bsfa.UnsupportedError, match="pool_blocks"):
        allocate(page_size=page_size, block_n=block_n)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_pages": -1}, ValueError, "num_pages"),
        ({"num_pages": 2.0}, TypeError, "num_pages"),
        ({"page_size": 0}, ValueError, "page_size"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"head_dim": 257}, ValueError, "head_dim"),
        ({"head_dim_v": 0}, ValueError, "head_dim_v"),
        ({"block_n": 0}, ValueError, "block_n"),
        ({"dtype": torch.float64}, TypeError, "dtype"),
        ({"pooling": "median"}, ValueError, "pooling"),
    ],
)
def test_bad_allocations(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate(**changes)


TABLE, LENGTHS = int32([[0, 1, 2, 3]]), int32([40])
KEYS = torch.zeros(8, 16, 2, 8)
UPDATES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k_cache": KEYS[:7]}, ValueError, "allocated for k_cache"),
    ({"k_cache": KEYS[:, :8]}, ValueError, "allocated for k_cache"),
    ({"k_cache": KEYS.to(BF16)}, TypeError, "bfloat16"),
    ({"k_cache": KEYS.tolist()}, TypeError, "torch.Tensor"),
    ({"v_cache": KEYS}, ValueError, "keeps no values"),
    ({"seqlens_k": int32([65])}, ValueError, "seqlens_k"),
    ({"seqlens_k": int32([1, 1])}, ValueError, "seqlens_k"),
    ({"seqlens_k": LENGTHS.long()}, TypeError, "int32"),
    ({"block_table": int32([[0, 1, 8, 3]])}, ValueError, "block_table"),
    ({"block_table": TABLE[0]}, ValueError, "block_table"),
    ({"max_seqlen_q": 2.5}, TypeError, "max_seqlen_q"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
    ({"seqlens_q": int32([5])}, ValueError, "new tokens"),
    ({"seqlens_q": int32([-1])}, ValueError, "new tokens"),
    ({"cu_seqlens_q": int32([0, 5])}, ValueError, "new tokens"),
    ({"cu_seqlens_q": int32([0])}, ValueError, "cu_seqlens_q"),
    ({"seqlens_q": int32([1]), "cu_seqlens_q": int32([0, 1])}, ValueError, "not both"),
]


@pytest.mark.parametrize(("changes", "error", "message"), UPDATES, ids=range(len(UPDATES)))
def test_bad_updates(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"k_cache": KEYS, "block_table": TABLE, "seqlens_k": LENGTHS, "max_seqlen_q": 4}
    summary = allocate()
    summary.keys.fill_(7)
    with pytest.raises(error, match=message):
        summary.update(**(arguments | changes))
    assert (summary.keys == 7).all()
    summary.update(**arguments)
    assert not (summary.keys == 7).all()


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="head_dim_v"):
        allocate().gather_values(TABLE, LENGTHS)
    with pytest.raises(ValueError, match="give v_cache"):
        allocate(head_dim_v=8).update(KEYS, TABLE, LENGTHS, max_seqlen_q=1)
    with pytest.raises(ValueError, match="exceeds"):
        allocate().gather(TABLE, LENGTHS, 65)


@pytest.mark.parametrize(
    ("changes", "policy", "error", "message"),
    [
        ({"block_n": 64}, RelativeMax(block_n=32), ValueError, "block_n = 32.*64"),
        ({"pooling": "maxabs"}, RelativeMax(block_n=32), ValueError, "'mean'.*'maxabs'"),
        ({"num_pages": 3}, None, ValueError, "allocated for k_cache"),
        ({"dtype": BF16}, None, TypeError, "float32.*bfloat16"),
        ({"head_dim_v": 4}, None, ValueError, "allocated for v_cache"),
    ],
)
def test_summaries_that_do_not_fit_a_call(
    changes: dict[str, Any], policy: Policy | None, error: type[Exception], message: str
) -> None:
    q = torch.zeros(1, 5, 2, 8)
    with pytest.raises(error, match=message):
        bsfa.attention_paged(q, KEYS, KEYS, TABLE, LENGTHS, policy=policy, summary=allocate(**changes))
    with pytest.raises(TypeError, match="BlockSummary"):
        bsfa.attention_paged(q, KEYS, KEYS, TABLE, LENGTHS, policy=policy, summary=q)
