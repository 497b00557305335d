"""Attention on CUDA against float64 on the CPU: layouts, lengths, masks, options; and how the operator behaves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import Dense, Fixed, Policy, StaticPattern
from cases import (
    BATCHED,
    BF16,
    F16,
    F32,
    NAN,
    PACKED,
    PAGED,
    PAGED_PACKED,
    ROUNDING,
    Case,
    Inputs,
    check_attention,
    int32,
    poison,
    square,
    table,
)

#: "cpu" runs all but the tests of CUDA itself on the CPU kernel, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")

#: The kernel's exponentials, logarithms and sums are float32, in another order than torch's.
LSE_CONSTANT = 1e-5

BASE = Case(hq=4, hkv=2, dim=64, dtype=BF16, block_m=128, block_n=128)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (128, 128), (70, 0), (37, 300), (129, 257), (100, 30), (0, 0))
CHUNKS = ((150, 387), (150, 256), (150, 150), (150, 20))  # one query length, so that queries can be batched
TWINS = ((141, 300), (141, 300))


def masks_of(inputs: Inputs) -> list[np.ndarray] | None:
    return None if inputs.case.mask == "none" else [inputs.draw_mask(b) for b in range(len(inputs))]


def attend(inputs: Inputs, masks: list[np.ndarray] | None, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    """Attention on a device, over memory for the results that holds NaN."""
    there = inputs.to(device)
    mask = None if masks is None else there.block_mask(masks)
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=inputs.case.dtype, device=device)
    poison(inputs.q.shape[:-1], device=device)
    return there.attend(mask)


def check(case: Case) -> None:
    inputs = case.make()
    masks = masks_of(inputs)
    check_attention(inputs, *attend(inputs, masks), masks, LSE_CONSTANT)


def raw(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, **changes: Any) -> Any:
    """The operator on batched tensors, without Python's checks: (out, lse), or lse if ``out`` is given."""
    arguments: dict[str, Any] = {
        **{"cu_seqlens_q": None, "cu_seqlens_k": None, "block_table": None, "seqlens_k": None},
        **{"max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1], "mask_words": None, "mask_counts": None},
        **{"k_means": None, "v_means": None, "block_m": 128, "block_n": 128},
        **{"causal": True, "softmax_scale": q.shape[-1] ** -0.5, "softcap": 0.0, "window_left": -1},
    }
    values = {**arguments, **changes}.values()
    if out is None:
        return torch.ops.bsfa.attention(q, k, v, *values)
    return torch.ops.bsfa.attention_out(out, q, k, v, *values)


# --- the grid ---------------------------------------------------------------------------------------------------------

BOTH = {"dim": [64, 128], "dtype": [BF16, F16]}
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)
PREFIXES = ((1, 64), (1, 128), (1, 300), (5, 133), (63, 129), (100, 137), (127, 300), (128, 256), (129, 257), (33, 390))
NOTHING_SEEN = ((100, 37), (130, 1), (257, 128), (300, 129), (129, 128), (70, 0), (0, 70), (0, 0))

LENGTHS = [
    *table(BASE, lengths=square(*EDGES), causal=[True, False], **BOTH),
    *table(BASE, lengths=[(pair,) for pair in PREFIXES + NOTHING_SEEN], causal=[True, False], dim=[64, 128]),
]
LAYOUTS = [
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False], **BOTH),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), causal=[True, False], **BOTH),
    *table(
        replace(BASE, lengths=RAGGED),
        strides=["interleaved", "head-major", "wide-gaps"],
        layout=[PACKED, PAGED_PACKED],
        dim=[64, 128],
        mask=["none", "random"],
    ),
    *table(replace(BASE, lengths=TWINS), strides=["interleaved", "head-major", "wide-gaps"], **BOTH),
]
PAGES = [
    *table(
        replace(BASE, lengths=CHUNKS, layout=PAGED),
        page_size=[1, 2, 3, 7, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512],
        dim=[64, 128],
        mask=["none", "random"],
    ),
    *table(
        replace(BASE, lengths=RAGGED, layout=PAGED_PACKED, strides="interleaved", dtype=F16),
        page_size=[1, 3, 16, 24, 64, 96, 128, 256],
        causal=[True, False],
    ),
    *table(
        replace(BASE, lengths=CHUNKS, layout=PAGED, dim=128),
        strides=["head-major", "interleaved", "wide-gaps"],
        page_size=[7, 16, 64, 192],
        mask=["none", "random"],
    ),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED, dim=128, hkv=1), page_size=[8, 128]),
]
GROUPS = ((1, 1), (4, 4), (4, 1), (8, 2), (8, 1), (6, 2), (12, 4), (32, 8), (7, 7))
HEADS = [
    replace(BASE, lengths=((141, 270),), hq=hq, hkv=hkv, mask=mask, mask_heads=heads, dim=dim)
    for hq, hkv in GROUPS
    for mask, heads in (("none", "q"), ("random", "q"), ("random", "kv"))
    for dim in (64, 128)
]
OPTIONS = [
    *table(
        replace(BASE, lengths=((150, 300),)),
        softcap=[0.5, 5.0, 50.0],
        scale=[None, 1.5],
        mask=["none", "random"],
        dtype=[BF16, F16],
    ),
    *table(replace(BASE, lengths=((150, 300),)), scale=[0.0, 1.0, -0.3, 4.0], **BOTH),
    *table(
        replace(BASE, lengths=RAGGED, layout=PACKED), scale=[0.0, -0.3], softcap=[0.0, 5.0], mask=["none", "random"]
    ),
    *table(
        replace(BASE, lengths=((400, 900),)),
        window_left=[0, 1, 100, 127, 128, 129, 300, 10**6, 2**31 - 1],
        dim=[64, 128],
        mask=["none", "random"],
    ),
    *table(
        replace(BASE, lengths=RAGGED),
        window_left=[0, 100, 128, 300],
        layout=[PACKED, PAGED_PACKED],
        softcap=[0.0, 8.0],
    ),
]
MASKS = [
    *table(
        replace(BASE, lengths=((300, 700),)),
        mask=["random", "sparse", "all", "diagonal"],
        mask_heads=["q", "kv", "one"],
        causal=[True, False],
        dim=[64, 128],
    ),
    *table(
        replace(BASE, lengths=RAGGED),
        layout=[PACKED, PAGED_PACKED],
        mask=["random", "sparse", "all", "diagonal"],
        mask_heads=["q", "kv", "one"],
    ),
    *table(replace(BASE, mask="random"), lengths=[(pair,) for pair in PREFIXES + NOTHING_SEEN], causal=[True, False]),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), mask=["sparse", "all"], causal=[True, False], **BOTH),
]
LONG = [
    *table(  # more than one word a row
        replace(BASE, lengths=((300, 5000),), hq=2, hkv=1),
        mask=["none", "random", "sparse", "diagonal"],
        causal=[True, False],
        dim=[64, 128],
    ),
    replace(BASE, lengths=((4500, 4500),), hq=1, hkv=1, mask="sparse", dim=128),
    replace(BASE, lengths=((4200, 4200),), hq=1, hkv=1, dtype=F16),
    replace(
        BASE, lengths=((300, 4300), (0, 0), (70, 4097), (128, 1)), layout=PAGED_PACKED, mask="sparse", page_size=64
    ),
    replace(BASE, lengths=((300, 5000),), hq=2, hkv=1, window_left=4200, mask="random"),
    *table(  # more (tile, head) pairs than a GPU has multiprocessors
        replace(BASE, lengths=((1300, 1300),) * 2, hq=8, hkv=2), mask=["none", "sparse"], dim=[64, 128]
    ),
    *table(  # rows of more than 1024 blocks
        replace(BASE, lengths=((40, 132_200),), hq=2, hkv=1), mask=["none", "sparse"], layout=[BATCHED, PAGED], dim=[64]
    ),
    replace(BASE, lengths=((140, 131_500),), hq=1, hkv=1, mask="sparse", layout=PAGED, page_size=256, dim=128),
]


@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", PAGES, ids=str)
def test_pages(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", MASKS, ids=str)
def test_masks(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
def test_many_sequences(layout: str) -> None:
    rng = random.Random(3)
    lengths = [
        (rng.choice((0, 0, 1, rng.randint(0, 150))), rng.choice((0, 1, rng.randint(0, 200)))) for _ in range(300)
    ]
    check(replace(BASE, lengths=tuple(lengths), layout=layout, mask="random", hq=2, hkv=1))


# --- random cases -----------------------------------------------------------------------------------------------------


def random_case(seed: int) -> Case:
    rng = random.Random(seed)

    def length() -> int:
        return rng.choice((rng.choice((0, *EDGES)), rng.randint(0, 400)))

    layout = rng.choice([BATCHED, PACKED, PAGED, PAGED_PACKED])
    count = rng.randint(1, 4)
    lengths = [(length(), length()) for _ in range(count)]
    if layout == BATCHED:
        lengths = [lengths[0]] * count
    elif layout == PAGED:
        lengths = [(lengths[0][0], n) for _, n in lengths]
    hkv, causal = rng.choice((1, 1, 2, 3)), rng.random() < 0.7
    return Case(
        lengths=tuple(lengths),
        layout=layout,
        page_size=rng.choice((rng.choice((1, 8, 16, 64, 128, 256)), rng.randint(1, 200))),
        strides=rng.choice(("plain", "interleaved", "head-major", "wide-gaps")),
        hq=hkv * rng.choice((1, 2, 3, 4)),
        hkv=hkv,
        dim=rng.choice((64, 128)),
        dtype=rng.choice((BF16, F16)),
        causal=causal,
        softcap=rng.choice((0.0, 0.0, 0.0, 10.0)),
        scale=rng.choice((None, None, None, 0.5, -0.1)),
        window_left=rng.choice((None, None, None, rng.randint(0, 400))) if causal else None,
        block_m=128,
        block_n=128,
        mask=rng.choice(("none", "random", "random", "sparse", "all", "diagonal")),
        mask_heads=rng.choice(("q", "kv", "one")),
        seed=seed,
    )


@pytest.mark.parametrize("case", [random_case(seed) for seed in range(200)], ids=str)
def test_random_cases(case: Case) -> None:
    """Against the oracle; the same bits again; and against the CPU kernel, which is one rounding away from float32."""
    inputs = case.make()
    masks = masks_of(inputs)
    out, lse = attend(inputs, masks)
    check_attention(inputs, out, lse, masks, LSE_CONSTANT)
    again, lse_again = attend(inputs, masks)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    other, lse_other = attend(inputs, masks, "cpu")
    unit = ROUNDING[case.dtype]
    torch.testing.assert_close(out.cpu().float(), other.float(), rtol=2 * unit, atol=4 * unit)
    torch.testing.assert_close(lse.cpu(), lse_other, rtol=2e-5, atol=2e-5)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("strides", ["plain", "interleaved", "wide-gaps"])
@pytest.mark.parametrize("dim", [64, 128])
def test_layouts_have_the_same_bits(layout: str, strides: str, dim: int) -> None:
    case = replace(BASE, lengths=TWINS, dim=dim, mask="random")
    plain, other = case.make(), replace(case, layout=layout, strides=strides, page_size=24).make()
    masks = masks_of(plain)
    want, want_lse = attend(plain, masks)
    out, lse = attend(other, masks)
    for b in range(len(plain)):
        assert torch.equal(other.of_sequence(out, b), want[b])
        assert torch.equal(other.lse_of_sequence(lse, b), want_lse[b])


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_keeping_all_blocks_is_dense(layout: str) -> None:
    inputs = replace(BASE, lengths=((300, 700),), layout=layout, mask="all").make()
    kept, dense = attend(inputs, masks_of(inputs)), attend(inputs, None)
    assert torch.equal(kept[0], dense[0]) and torch.equal(kept[1], dense[1])


@pytest.mark.parametrize("layout", [PAGED, PAGED_PACKED])
def test_capacity_of_the_block_table_as_length(layout: str) -> None:
    """Without max_seqlen_k, masks and schedules are sized for what the block table can hold."""
    inputs = replace(BASE, lengths=CHUNKS, layout=layout).make().to(DEVICE)
    want = inputs.run(None)
    assert torch.equal(inputs.run(None, max_seqlen_k=None), want)
    mask = StaticPattern(sink_blocks=1, window_blocks=2)
    assert torch.equal(inputs.run(mask, max_seqlen_k=None), inputs.run(mask))


# --- what must not be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
@pytest.mark.parametrize("dim", [64, 128])
def test_neighbouring_sequences_do_not_leak(layout: str, value: float, dim: int) -> None:
    lengths = ((65, 65), (3, 1), (1, 130), (64, 200), (128, 128), (37, 300), (129, 257), (100, 30))
    inputs = replace(BASE, lengths=lengths, layout=layout, dim=dim).make()
    clean, clean_lse = attend(inputs, None)
    kept = [[t.clone() for t in tensors] for tensors in (inputs.queries, inputs.keys, inputs.values)]
    for spoiled in (0, 1):
        for tensors, copies in zip((inputs.queries, inputs.keys, inputs.values), kept, strict=True):
            for b, tokens in enumerate(tensors):
                tokens.copy_(copies[b]) if b % 2 != spoiled else tokens.fill_(value)
        inputs.lay_out()
        out, lse = attend(inputs, None)
        for b in range(len(lengths)):
            if b % 2 != spoiled:
                assert torch.equal(inputs.of_sequence(out, b), inputs.of_sequence(clean, b))
                assert torch.equal(inputs.lse_of_sequence(lse, b), inputs.lse_of_sequence(clean_lse, b))


def test_batches_and_heads_do_not_leak() -> None:
    inputs = replace(BASE, lengths=((141, 300),) * 3).make().to(DEVICE)
    clean, clean_lse = inputs.attend(None)
    for t in (inputs.q, inputs.k, inputs.v):
        t[1] = NAN
        t[:, :, : t.shape[2] // 2] = NAN
    out, lse = inputs.attend(None)
    for b in (0, 2):
        assert torch.equal(out[b, :, 2:], clean[b, :, 2:]) and torch.equal(lse[b, 2:], clean_lse[b, 2:])


def test_blocks_that_are_not_kept_are_not_read() -> None:
    """Masked blocks may hold anything: no value of theirs is multiplied by zero."""
    inputs = replace(BASE, lengths=((300, 1000),), mask="sparse", mask_heads="one").make()
    masks = masks_of(inputs)
    assert masks is not None
    clean = attend(inputs, masks)
    dropped = [j for j in range(masks[0].shape[2]) if not masks[0][:, :, j].any()]
    assert dropped
    for j in dropped:
        inputs.keys[0][j * 128 : (j + 1) * 128] = NAN
        inputs.values[0][j * 128 : (j + 1) * 128] = NAN
    inputs.lay_out()
    got = attend(inputs, masks)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED_PACKED])
@pytest.mark.parametrize("causal", [True, False])
def test_bits_of_nothing_are_ignored(layout: str, causal: bool) -> None:
    """Rows of no tile, and blocks that are not visible, may have any bits."""
    lengths = TWINS if layout == BATCHED else RAGGED
    inputs = replace(BASE, lengths=lengths, layout=layout, causal=causal, mask="all").make()
    masks = masks_of(inputs)
    assert masks is not None
    there = inputs.to(DEVICE)
    mask = there.block_mask(masks)
    want = there.attend(mask)
    mask.words.fill_(-1)
    out, lse = there.attend(mask)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    check_attention(inputs, out, lse, masks, LSE_CONSTANT)


@pytest.mark.parametrize("count", [-5, -1, 0, 2**30, 2**31 - 1])
@pytest.mark.parametrize(
    ("layout", "lengths"),
    [(BATCHED, TWINS), (PACKED, RAGGED), (PAGED_PACKED, RAGGED), (BATCHED, ((300, 66_000),))],
    ids=["batched", "packed", "paged", "long"],
)
def test_wrong_counts_change_nothing(layout: str, lengths: tuple[tuple[int, int], ...], count: int) -> None:
    """A mask's counts order the work. Whatever they say, every tile is worked on, and as its words say."""
    inputs = replace(BASE, lengths=lengths, layout=layout, mask="random").make()
    masks = masks_of(inputs)
    assert masks is not None
    there = inputs.to(DEVICE)
    mask = there.block_mask(masks)
    want = there.attend(mask)
    wrong = replace(mask, counts=torch.full_like(mask.counts, count))
    for t in want:
        poison(t.shape, dtype=t.dtype, device=DEVICE)
    out, lse = there.attend(wrong)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("count", [None, 0, 2**30])
@pytest.mark.parametrize("dim", [64, 128])
def test_many_tiles_beyond_l2(dim: int, count: int | None) -> None:
    """Several tiles to a CTA, which takes them late where keys are many: the bits of calls with a KV head each."""
    length, keys, hq, hkv = 3000, 66_000, 32, 8
    q = torch.randn(1, length, hq, dim, dtype=BF16, device=DEVICE)
    k, v = (torch.randn(1, keys, hkv, dim, dtype=BF16, device=DEVICE) for _ in range(2))
    tiles, blocks = -(-keys // 128) - (keys - length) // 128, -(-keys // 128)
    kept = torch.rand(1, hq, tiles, blocks, device=DEVICE) < torch.rand(1, hq, tiles, 1, device=DEVICE) ** 3
    sizes = {"seqlen_q": length, "seqlen_k": keys, "block_m": 128, "block_n": 128}

    def attend_heads(first: int, heads: int, poisoned: bool) -> Tensor:
        mask = bsfa.BlockMask.from_bool(kept[:, first : first + heads], **sizes)
        if poisoned and count is not None:
            mask = replace(mask, counts=torch.full_like(mask.counts, count))
        of_kv = slice(first // (hq // hkv), (first + heads) // (hq // hkv))
        heads_of_q = q[:, :, first : first + heads]
        return bsfa.block_sparse_attention(heads_of_q, k[:, :, of_kv], v[:, :, of_kv], mask, causal=True)[0]

    poison(q.shape, dtype=BF16, device=DEVICE)
    out = attend_heads(0, hq, poisoned=True)
    assert out.isfinite().all()
    for first in range(0, hq, hq // hkv):
        group = attend_heads(first, hq // hkv, poisoned=False)
        assert torch.equal(out[:, :, first : first + hq // hkv], group)


def test_rows_without_blocks() -> None:
    inputs = replace(BASE, lengths=((300, 700),)).make()
    out, lse = attend(inputs, [np.zeros_like(inputs.draw_mask(0))])
    assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 30.0])
@pytest.mark.parametrize("mask", ["none", "random"])
def test_logits_of_any_magnitude(magnitude: float, mask: str) -> None:
    inputs = replace(BASE, lengths=((150, 300),), mask=mask).make()
    inputs.queries = [q * magnitude for q in inputs.queries]
    inputs.lay_out()
    masks = masks_of(inputs)
    check_attention(inputs, *attend(inputs, masks), masks, LSE_CONSTANT)


@pytest.mark.parametrize("nats", [40.0, 500.0])
@pytest.mark.parametrize("layout", [BATCHED, PAGED])
@pytest.mark.parametrize("dim", [64, 128])
def test_growing_and_shrinking_maxima(dim: int, layout: str, nats: float) -> None:
    """From one end to the other the running maximum rises in every block for one head, and never for the other; by so
    much, with 500, that a block's exponentials relative to the maximum before are beyond float32.
    """
    inputs = replace(BASE, lengths=((1000, 1000),), hq=2, hkv=2, dim=dim, layout=layout).make()
    ramp = torch.linspace(-nats, nats, 1000)[:, None].to(BF16)
    inputs.queries[0][:] = 1.0
    inputs.keys[0][:, 0] = ramp / dim**0.5
    inputs.keys[0][:, 1] = -ramp / dim**0.5
    inputs.lay_out()
    check_attention(inputs, *attend(inputs, None), None, LSE_CONSTANT * max(nats / 40, 1))


# --- out= -------------------------------------------------------------------------------------------------------------


def out_view(inputs: Inputs, kind: str) -> tuple[Tensor, Tensor]:
    """A buffer of NaN, and a view into it of the result's shape."""
    *outer, tokens, heads, dim = (*inputs.q.shape[:-1], inputs.v.shape[-1])
    make: dict[str, Callable[[], tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]] = {
        "interleaved": lambda: ((tokens, heads, 2 * dim), lambda t: t[..., dim:]),
        "head-major": lambda: ((heads, tokens, dim), lambda t: t.transpose(-2, -3)),
        "wide-gaps": lambda: ((tokens + 2, heads + 1, dim + 24), lambda t: t[..., 1:-1, 1:, 16 : dim + 16]),
        "odd": lambda: ((tokens + 2, heads + 1, dim + 3), lambda t: t[..., 1:-1, 1:, 1 : dim + 1]),
    }
    shape, view = make[kind]()
    buffer = torch.full((*outer, *shape), NAN, dtype=inputs.q.dtype, device=inputs.q.device)
    return buffer, view(buffer)


@pytest.mark.parametrize("kind", ["interleaved", "head-major", "wide-gaps", "odd"])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("dim", [64, 128])
def test_out_of_any_strides(layout: str, kind: str, dim: int) -> None:
    lengths = RAGGED if layout in (PACKED, PAGED_PACKED) else TWINS
    inputs = replace(BASE, lengths=lengths, layout=layout, dim=dim, mask="random").make()
    masks = masks_of(inputs)
    assert masks is not None
    there = inputs.to(DEVICE)
    mask = there.block_mask(masks)
    want, want_lse = there.attend(mask)
    buffer, out = out_view(there, kind)
    got, lse = bsfa.block_sparse_attention(there.q, there.k, there.v, mask, out=out, **there.maths, **there.layout)
    assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)
    out.fill_(NAN)
    assert buffer.isnan().all(), "something outside of out was written"


def test_out_shared_by_two_calls() -> None:
    """Decode and prefill parts of one serving batch write into one buffer, side by side."""
    inputs = replace(BASE, lengths=((64, 64), (64, 64))).make().to(DEVICE)
    want = inputs.run(None)
    whole = torch.full_like(want, NAN)
    for b in range(2):
        part = slice(b, b + 1)
        bsfa.attention(inputs.q[part], inputs.k[part], inputs.v[part], out=whole[part])
    assert torch.equal(whole, want)


# --- policies ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_synchronisation() -> Iterator[None]:
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("name", ["none", "dense", "static", "fixed"])
def test_policies_end_to_end_without_synchronisation(layout: str, name: str) -> None:
    lengths = RAGGED if layout in (PACKED, PAGED_PACKED) else CHUNKS if layout == PAGED else TWINS
    inputs = replace(BASE, lengths=lengths, layout=layout, mask="random").make()
    there = inputs.to(DEVICE)
    random_mask = there.block_mask(masks_of(inputs))
    policy: Policy | None = {
        "none": None,
        "dense": Dense(),
        "static": StaticPattern(sink_blocks=1, window_blocks=1),
        "fixed": Fixed(mask=random_mask),
    }[name]
    out = torch.full((*there.q.shape[:-1], there.v.shape[-1]), NAN, dtype=BF16, device=DEVICE)
    with no_synchronisation():
        got, lse, info = there.run(policy, return_lse=True, return_info=True, out=out)
    assert got is out and info.dense_reason is None
    masks = None
    if info.mask is not None:
        rows = info.mask.to_rows().cpu()
        masks = []
        for b in range(len(inputs)):
            tiles = rows[inputs.first_row(b) : inputs.first_row(b) + len(inputs.tiles(b))]
            masks.append(tiles[:, :, : -(-inputs.case.lengths[b][1] // 128)].numpy())
    check_attention(inputs, out, lse, masks, LSE_CONSTANT)
    density = float(info.density())
    assert density == 1.0 if name in ("none", "dense") else 0 < density < 1


def test_policies_of_no_queries_and_no_keys() -> None:
    for lengths in (((0, 70),), ((70, 0),), ((0, 0),)):
        inputs = replace(BASE, lengths=lengths).make().to(DEVICE)
        out, lse = inputs.run(StaticPattern(), return_lse=True)
        assert out.shape == inputs.q.shape and (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.filterwarnings("ignore::bsfa.DenseFallbackWarning")
def test_decode_steps_and_windows_are_dense() -> None:
    inputs = replace(BASE, lengths=((1, 300), (1, 129)), layout=PAGED).make().to(DEVICE)
    out, info = inputs.run(StaticPattern(sink_blocks=1, window_blocks=1), return_info=True)
    assert "decode" in info.dense_reason and torch.equal(out, inputs.run(None))
    inputs = replace(BASE, lengths=((300, 300),), window_left=100).make().to(DEVICE)
    out, info = inputs.run(StaticPattern(block_m=64), return_info=True)
    assert "window" in info.dense_reason and torch.equal(out, inputs.run(None))


# --- how the operator behaves -----------------------------------------------------------------------------------------


@cuda_only
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph(masked: bool) -> None:
    """One graph serves other lengths, pages, masks and values."""
    case = replace(BASE, lengths=((65, 300), (0, 0), (100, 130)), layout=PAGED_PACKED, mask="random")
    first, second = case.make(), replace(case, lengths=((100, 200), (65, 240), (0, 0)), seed=1).make()
    static = first.to(DEVICE)
    static.max_q = 128
    mask = static.block_mask(masks_of(first)) if masked else None
    out = torch.full(tuple(static.q.shape), NAN, dtype=BF16, device=DEVICE)

    def run() -> Tensor:
        return bsfa.block_sparse_attention(
            static.q, static.k, static.v, mask, out=out, **static.maths, **static.layout
        )[1]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lse = run()
    for inputs in (second, first):
        static.take(inputs)
        masks = masks_of(inputs) if masked else None
        if mask is not None:
            mask.words.copy_(inputs.block_mask(masks).words)
        out.fill_(NAN)
        lse.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        check_attention(inputs, out, lse, masks, LSE_CONSTANT)


@cuda_only
def test_cuda_graph_of_a_policy() -> None:
    inputs = replace(BASE, lengths=((300, 700), (300, 700))).make()
    there = inputs.to(DEVICE)
    policy = StaticPattern(sink_blocks=1, window_blocks=1)
    want = there.run(policy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = there.run(policy)
    out.fill_(NAN)
    graph.replay()
    assert torch.equal(out, want)


@cuda_only
def test_runs_on_the_current_stream() -> None:
    inputs = replace(BASE, lengths=((500, 500),)).make()
    there = inputs.to(DEVICE)
    late = [t.clone() for t in (there.q, there.k, there.v)]
    for t in (there.q, there.k, there.v):
        t.fill_(NAN)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for t, values in zip((there.q, there.k, there.v), late, strict=True):
            t.copy_(values)
        out, lse = there.attend(None)
    stream.synchronize()
    check_attention(inputs, out, lse, None, LSE_CONSTANT)


@cuda_only
def test_two_streams_at_once() -> None:
    """Nothing is shared between calls in flight."""
    made = [replace(BASE, lengths=((700, 900),), mask="random", seed=seed).make() for seed in range(2)]
    there = [inputs.to(DEVICE) for inputs in made]
    masks = [t.block_mask(masks_of(inputs)) for t, inputs in zip(there, made, strict=True)]
    want = [t.attend(mask) for t, mask in zip(there, masks, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in there]
    got: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(there[i].attend(masks[i]))
    torch.cuda.synchronize()
    for results, (out, lse) in zip(got, want, strict=True):
        assert all(torch.equal(a, out) and torch.equal(b, lse) for a, b in results)


@cuda_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_other_device_than_the_current_one() -> None:
    inputs = replace(BASE, lengths=CHUNKS, layout=PAGED, mask="random").make()
    masks = masks_of(inputs)
    out, lse = attend(inputs, masks, "cuda:1")
    assert out.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    check_attention(inputs, out, lse, masks, LSE_CONSTANT)
    first = inputs.to("cuda:0")
    assert torch.equal(first.attend(first.block_mask(masks))[0].cpu(), out.cpu())


@cuda_only
def test_offsets_beyond_2_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    buffer = torch.full((2**31 + 2**27,), NAN, dtype=BF16, device=DEVICE)

    inputs = replace(BASE, lengths=((200, 300),), layout=PAGED, page_size=16, dim=128).make()
    pool = buffer.view(-1, 16, 2, 256)
    last = len(pool) - 1
    pages = [last - 3 * i if i % 3 else 2 * i for i in range(19)]
    for i, page in enumerate(pages):
        tokens = slice(i * 16, (i + 1) * 16)
        both = torch.cat([inputs.keys[0][tokens], inputs.values[0][tokens]], dim=-1)
        pool[page, : len(both)] = both.to(DEVICE)
    out, lse = bsfa.attention_paged(
        inputs.q.to(DEVICE),
        pool[..., :128],
        pool[..., 128:],
        int32([*pages, -1])[None].to(DEVICE),
        int32([300]).to(DEVICE),
        return_lse=True,
    )
    check_attention(inputs, out, lse, None, LSE_CONSTANT)

    def far(t: Tensor, offset: int) -> Tensor:
        """The second sequence lies 2^31 elements behind the first."""
        view = buffer.as_strided(t.shape, (2**31, *t.stride()[1:]), offset)
        return view.copy_(t)

    inputs = replace(BASE, lengths=TWINS, dim=128).make()
    q, k, v = (far(getattr(inputs, name), i << 20) for i, name in enumerate("qkv"))
    out = far(torch.full_like(inputs.q, NAN), 3 << 20)
    lse = raw(q, k, v, out=out)
    check_attention(inputs, out, lse, None, LSE_CONSTANT)

    inputs = replace(BASE, lengths=((250, 260),), hq=1, hkv=1).make()
    q, k, v, out = (
        buffer.as_strided((1, n, 1, 64), (0, 2**23, 0, 1), 64 * i) for i, n in enumerate((250, 260, 260, 250))
    )
    for view, name in ((q, "q"), (k, "k"), (v, "v")):
        view.copy_(getattr(inputs, name))
    got, lse = bsfa.attention(q, k, v, return_lse=True)
    check_attention(inputs, got, lse, None, LSE_CONSTANT)
    assert torch.equal(raw(q, k, v, out=out), lse) and torch.equal(out, got)


# --- torch.compile, opcheck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_fullgraph(dynamic: bool | None) -> None:
    torch.compiler.reset()
    policy = StaticPattern(sink_blocks=1, window_blocks=1)

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        written = bsfa.attention(q, k, v, policy=policy, out=out)
        dense, lse = bsfa.attention(q * 2, k, v, return_lse=True)
        return written + dense, lse

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for length in (300, 257, 400):
        inputs = replace(BASE, lengths=((length, length),) * 2).make().to(DEVICE)
        want_out, out = torch.empty_like(inputs.q), torch.empty_like(inputs.q)
        want, want_lse = run(inputs.q, inputs.k, inputs.v, want_out)
        got, lse = compiled(inputs.q, inputs.k, inputs.v, out)
        assert torch.equal(out, want_out)
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(lse, want_lse)


def test_compile_paged() -> None:
    torch.compiler.reset()
    inputs = replace(BASE, lengths=CHUNKS, layout=PAGED).make().to(DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, seqlens_k: Tensor) -> Tensor:
        return bsfa.attention_paged(q, k, v, block_table, seqlens_k, max_seqlen_k=387) * 2.0

    arguments = (inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seqlens_k)
    assert torch.equal(torch.compile(run, fullgraph=True)(*arguments), run(*arguments))


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_opcheck(layout: str) -> None:
    lengths = RAGGED if layout == PACKED else TWINS
    inputs = replace(BASE, lengths=lengths, layout=layout, mask="random").make()
    there = inputs.to(DEVICE)
    for name in ("q", "k", "v"):  # opcheck compares inputs with copies of themselves
        getattr(there, name).nan_to_num_()
    words = there.block_mask(masks_of(inputs)).words
    where = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k)
    arguments = (there.q, there.k, there.v, *where, words, None, None, None, 128, 128, True, 0.125, 0.0, -1)
    torch.library.opcheck(torch.ops.bsfa.attention.default, arguments)
    torch.library.opcheck(torch.ops.bsfa.attention_out.default, (torch.zeros_like(there.q), *arguments))


# --- what is refused --------------------------------------------------------------------------------------------------


def qkv(dim: int = 64, dtype: torch.dtype = BF16, length: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, length, h, dim, device=DEVICE).to(dtype) for h in (4, 2, 2))  # type: ignore[return-value]


def shifted(t: Tensor) -> Tensor:
    """The same values, 2 bytes off a multiple of 16."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def odd_rows(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, 1))[..., :-1]


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: bsfa.attention(*qkv(dtype=F32)), "float32.*bfloat16, float16"),
    *((lambda dim=dim: bsfa.attention(*qkv(dim)), f"head_dim {dim}: .*64, 128") for dim in (32, 80, 96, 256)),
    (lambda: bsfa.attention(*qkv()[:2], qkv(128)[2]), "head_dim 64 of q and k and 128 of v"),
    (lambda: bsfa.attention(*qkv(), policy=StaticPattern(block_m=64)), r"64 x 128 .*128 x 128"),
    (lambda: bsfa.attention(*qkv(), policy=StaticPattern(block_n=64)), r"128 x 64 .*128 x 128"),
    *(
        (lambda i=i, change=change: bsfa.attention(*(change(t) if i == j else t for j, t in enumerate(qkv()))), message)
        for i, name in enumerate("qkv")
        for change, message in (
            (shifted, rf"storage offset 1.*{name}\.clone\(\)"),
            (odd_rows, rf"strides .*{name}\.contiguous\(\)"),
        )
    ),
    (lambda: bsfa.attention(qkv()[0], *(t[:, :, :1].expand(-1, -1, 2, -1) for t in qkv()[1:])), r"k\.contiguous"),
    (lambda: bsfa.attention(qkv()[0], *(t[:1].expand(2, -1, -1, -1) for t in qkv()[1:])), r"k\.contiguous"),
]


@cuda_only
@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_unsupported_calls_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(bsfa.UnsupportedError, match=message):
        call()


@cuda_only
def test_masks_of_other_block_sizes_are_refused() -> None:
    q, k, v = qkv()
    mask = bsfa.select_blocks(q, None, StaticPattern(block_m=64, block_n=64), seqlen_k=300)
    with pytest.raises(bsfa.UnsupportedError, match="64 x 64"):
        bsfa.block_sparse_attention(q, k, v, mask)
    with pytest.raises(bsfa.UnsupportedError, match="64 x 64"):
        bsfa.attention(q, k, v, policy=Fixed(mask=mask))


@cuda_only
def test_what_the_messages_recommend_works() -> None:
    q, k, v = qkv()
    want = bsfa.attention(q, k, v)
    assert torch.equal(bsfa.attention(odd_rows(q).contiguous(), shifted(k).clone(), odd_rows(v).contiguous()), want)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=DEVICE)


def means() -> Tensor:
    return torch.zeros(2, 3, 2, 64, dtype=BF16, device=DEVICE)


RAW: list[Callable[[], Any]] = [
    lambda: raw(*qkv(dtype=F32)),
    lambda: raw(*qkv(dim=96)),
    lambda: raw(*qkv()[:2], qkv(128)[2]),
    lambda: raw(*qkv(), block_m=64),
    lambda: raw(*qkv(), block_n=256),
    lambda: raw(*qkv(), mask_words=zeros(5, 4, 1)),
    lambda: raw(*qkv(), mask_words=zeros(0, 4, 1)),
    lambda: raw(*qkv(), mask_words=zeros(6, 4, 2)),
    lambda: raw(*qkv(), mask_words=zeros(6, 3, 1)),
    lambda: raw(*qkv(), mask_words=zeros(6, 4, 1).cpu()),
    lambda: raw(*qkv(), max_seqlen_q=301),
    lambda: raw(*qkv(), max_seqlen_k=301),
    lambda: raw(*qkv(), window_left=-2),
    lambda: raw(*qkv(), k_means=means(), v_means=means()),
    lambda: raw(*qkv(), mask_words=zeros(6, 4, 1), k_means=means()),
    lambda: raw(*qkv(), mask_words=zeros(6, 4, 1), k_means=means(), v_means=means(), window_left=5),
    lambda: raw(*qkv(), mask_words=zeros(6, 4, 1), k_means=means(), v_means=means()[:, :2]),
    lambda: raw(*qkv(), mask_words=zeros(6, 4, 1), k_means=shifted(means()), v_means=means()),
    lambda: raw(*qkv()[:2], qkv()[2].cpu()),
    *(lambda i=i: raw(*(shifted(t) if i == j else t for j, t in enumerate(qkv()))) for i in range(3)),
    *(lambda i=i: raw(*(odd_rows(t) if i == j else t for j, t in enumerate(qkv()))) for i in range(3)),
    lambda: raw(qkv()[0], *(t[:, :, :1].expand(-1, -1, 2, -1) for t in qkv()[1:])),
]


@cuda_only
@pytest.mark.parametrize("call", RAW, ids=range(len(RAW)))
def test_raw_operator_refuses_what_it_cannot_do(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError):
        call()
    torch.cuda.synchronize()
    q, k, v = qkv()
    assert raw(q, k, v)[0].isfinite().all()
