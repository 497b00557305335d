"""BlockMask: conversions, geometry, algebra and statistics, by counting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

import bsfa
import oracle
from bsfa.block_mask import pack_bits, popcount, unpack_bits
from cases import BATCHED, F32, PACKED, PAGED, PAGED_PACKED, Case, check_attention, table

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (64, 64), (37, 150), (0, 0))
NOTHING = ((0, 0), (0, 40), (0, 0))

CASES = [
    *table(
        Case(hq=4, hkv=2, mask="random"),
        lengths=[((150, 300),), ((150, 300), (150, 300)), ((1, 1),)],
        causal=[True, False],
    ),
    *table(
        Case(hq=4, hkv=2, mask="random"),
        lengths=[((100, 37),), ((70, 0),), ((0, 70),), ((0, 0),)],
        causal=[True, False],
    ),
    *table(
        Case(lengths=RAGGED, hq=4, hkv=2, mask="random", block_m=32, block_n=16),
        layout=[PACKED, PAGED_PACKED],
        mask_heads=["q", "kv", "one"],
        causal=[True, False],
    ),
    *table(Case(lengths=NOTHING, mask="all"), layout=[PACKED, PAGED_PACKED]),
    *table(
        Case(lengths=((50, 187), (50, 120), (50, 50)), layout=PAGED, mask="sparse"),
        block_m=[1, 16, 64],
        block_n=[3, 16, 64],
    ),
    *table(Case(lengths=((20, 1200),), mask="sparse", block_m=16), block_n=[1, 16, 18, 37]),
]


def kept_of(case: Case) -> tuple[bsfa.BlockMask, list[np.ndarray]]:
    inputs = case.make()
    masks = [inputs.draw_mask(b) for b in range(len(inputs))]
    return inputs.block_mask(masks), masks


def assert_same(a: bsfa.BlockMask, b: bsfa.BlockMask) -> None:
    assert torch.equal(a.words, b.words) and torch.equal(a.counts, b.counts)
    assert a.geometry.same_as(b.geometry)


# --- geometry ---------------------------------------------------------------------------------------------------------


def check_geometry(case: Case) -> None:
    inputs = case.make()
    g = inputs.geometry
    found = [inputs.tiles(b) for b in range(len(inputs))]
    used = sum(map(len, found))
    assert used <= g.num_rows <= used + 2 * len(inputs) + sum(n for n, _ in case.lengths) // case.block_m
    if case.layout == BATCHED:
        assert g.num_rows == used
    assert g.num_blocks == oracle.num_blocks(inputs.max_k, case.block_n)
    assert g.max_tiles >= max(map(len, found))
    assert g.num_tiles().tolist() == [len(tiles) for tiles in found]
    assert g.cu_tiles().tolist() == [inputs.first_row(b) for b in range(len(inputs) + 1)]
    assert [f for f, n in zip(g.first_tiles().tolist(), g.num_tiles().tolist(), strict=True) if n] == [
        tiles[0].index for tiles in found if tiles
    ]
    visible = [tile.visible for tiles in found for tile in tiles]
    assert g.visible_blocks().tolist() == visible + [0] * (g.num_rows - used)
    owner = [b for b, tiles in enumerate(found) for _ in tiles]
    assert g.row_sequences().tolist() == owner + [len(inputs)] * (g.num_rows - used)
    first, last = (t[:used].tolist() for t in g.positions())
    assert first == [max(tile.index * case.block_m, 0) for tiles in found for tile in tiles]
    ends = [(k if case.causal else q) for (q, k), tiles in zip(case.lengths, found, strict=True) for _ in tiles]
    indices = [tile.index for tiles in found for tile in tiles]
    assert last == [min((i + 1) * case.block_m, end) - 1 for i, end in zip(indices, ends, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_geometry(case: Case) -> None:
    check_geometry(case)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=5),
    layout=st.sampled_from([PACKED, PAGED_PACKED]),
    block_m=st.integers(1, 130),
    block_n=st.integers(1, 130),
    causal=st.booleans(),
)
def test_any_geometry(lengths: list[tuple[int, int]], **fields: object) -> None:
    check_geometry(Case(lengths=tuple(lengths), dim=1, hq=1, **fields))  # type: ignore[arg-type]


# --- conversions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 1, 31, 32, 33, 64, 100])
def test_bits(blocks: int) -> None:
    kept = torch.rand(3, 2, blocks) < 0.5
    words = pack_bits(kept)
    assert words.dtype == torch.int32 and words.shape == (3, 2, -(-blocks // 32))
    assert torch.equal(unpack_bits(words, blocks), kept)
    for j in range(blocks):
        assert torch.equal((words[..., j // 32] >> (j % 32)) & 1, kept[..., j].int())


def test_popcount() -> None:
    """Of every sign and of every single bit, against Python's own count."""
    values = [0, -1, 2**31 - 1, -(2**31), -2, *(1 << i for i in range(31)), *(~(1 << i) for i in range(31))]
    words = torch.cat([torch.tensor(values), torch.randint(-(2**31), 2**31, (4096,))]).to(torch.int32)
    want = [bin(v & 0xFFFFFFFF).count("1") for v in words.tolist()]
    got = popcount(words)
    assert got.dtype == torch.int32 and got.tolist() == want
    compiled = torch.compile(popcount, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(words.view(23, -1)[:, :-1]), got.view(23, -1)[:, :-1])


def test_to_another_device() -> None:
    mask, _ = kept_of(CASES[0])
    assert mask.to("cpu") is mask and mask.to(torch.device("cpu")) is mask
    moved = mask.to("meta")
    tensors = (moved.words, moved.counts, moved.geometry.seqlens_q, moved.geometry.seqlens_k)
    assert all(t.device.type == "meta" for t in tensors) and moved.geometry.same_as(mask.geometry)
    assert moved.words.shape == mask.words.shape and moved.device.type == "meta"


def test_bit_31_is_the_sign() -> None:
    kept = torch.zeros(1, 1, 64, dtype=torch.bool)
    kept[..., [31, 63]] = True
    assert pack_bits(kept).tolist() == [[[-(2**31), -(2**31)]]]
    assert pack_bits(torch.ones(1, 1, 64, dtype=torch.bool)).tolist() == [[[-1, -1]]]
    assert torch.equal(unpack_bits(pack_bits(kept), 64), kept)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_bool_and_csr(case: Case) -> None:
    mask, masks = kept_of(case)
    inputs, g = case.make(), mask.geometry
    rows = mask.to_rows()
    for b, want in enumerate(masks):
        got = inputs.rows_of_sequence(rows, b)
        assert np.array_equal(got[:, :, : want.shape[2]], want) and not got[:, :, want.shape[2] :].any()
    assert not inputs.unused_rows(rows).any()
    assert mask.num_heads == inputs.mask_heads and (mask.block_m, mask.block_n) == (case.block_m, case.block_n)
    assert torch.equal(mask.counts, rows.sum(-1, dtype=torch.int32))

    dense = mask.to_bool()
    assert dense.shape == (len(inputs), inputs.mask_heads, g.max_tiles, g.num_blocks)
    for b, want in enumerate(masks):
        padded = np.zeros(dense.shape[1:], dtype=bool)
        padded[:, : len(want), : want.shape[2]] = want.transpose(1, 0, 2)
        assert np.array_equal(dense[b].numpy(), padded)

    indptr, indices = mask.to_csr()
    assert indptr.dtype == indices.dtype == torch.int32
    flat = rows.flatten(0, 1)
    assert indptr.shape == (len(flat) + 1,)
    for i, row in enumerate(flat):
        assert indices[indptr[i] : indptr[i + 1]].tolist() == row.nonzero()[:, 0].tolist()
    assert_same(bsfa.BlockMask.from_csr(indptr, indices, inputs.mask_heads, g), mask)
    assert_same(bsfa.BlockMask.from_rows(rows, g), mask)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(128, 128), (100, 300), (64, 65), (1, 1), (65, 200), (90, 40)])
def test_from_bool_clears_what_is_not_visible(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    tiles = oracle.tiles(seqlen_q, seqlen_k, 32, 16, causal)
    kept = torch.ones(2, 3, len(tiles), oracle.num_blocks(seqlen_k, 16), dtype=torch.bool)
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "block_m": 32, "block_n": 16, "causal": causal}
    mask = bsfa.BlockMask.from_bool(kept, **sizes)
    assert mask.to_bool().sum(-1).tolist() == [[[tile.visible for tile in tiles]] * 3] * 2
    assert_same(bsfa.BlockMask.from_bool(mask.to_bool(), **sizes), mask)


def test_from_bool_default_lengths_are_whole_tiles() -> None:
    kept = torch.rand(1, 2, 3, 5) < 0.5
    mask = bsfa.BlockMask.from_bool(kept, block_m=32, block_n=16, causal=False)
    assert (mask.geometry.max_seqlen_q, mask.geometry.max_seqlen_k) == (96, 80)
    assert torch.equal(mask.to_bool(), kept)


def flex_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: flex.BlockMask) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(256, 256), (130, 130), (100, 228), (64, 320)])
def test_flex_attention_computes_the_same(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    case = Case(lengths=((seqlen_q, seqlen_k),) * 2, hq=4, hkv=2, mask="random", causal=causal)
    inputs = case.make()
    masks = [inputs.draw_mask(b) | (inputs.draw_mask(b).sum(-1, keepdims=True) == 0) for b in range(2)]
    mask = inputs.block_mask(masks)  # no empty rows: flex's output of those is its own affair
    theirs = mask.to_flex()
    assert theirs.shape == (2, 4, seqlen_q, seqlen_k)
    assert torch.equal(theirs.to_dense().bool(), mask.to_bool())
    want = flex_attend(inputs.q, inputs.k, inputs.v, theirs)
    out, _ = inputs.attend(mask)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert_same(bsfa.BlockMask.from_flex(theirs, causal=causal), mask)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_from_flex_of_torch_made_masks() -> None:
    """A sliding window of whole blocks, made by torch from token predicates."""

    def window(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (q >= kv) & ((q // 64) - (kv // 64) < 2 + h)

    theirs = flex.create_block_mask(window, 1, 2, 300, 300, device="cpu", BLOCK_SIZE=64)
    mask = bsfa.BlockMask.from_flex(theirs)
    case = Case(lengths=((300, 300),))
    inputs = case.make()
    assert torch.equal(mask.to_bool(), theirs.to_dense().bool())
    out, _ = inputs.attend(mask)
    torch.testing.assert_close(out, flex_attend(inputs.q, inputs.k, inputs.v, theirs), rtol=1e-5, atol=1e-5)


def test_to_flex_says_what_it_cannot_do() -> None:
    with pytest.raises(bsfa.UnsupportedError, match="position 28"):
        kept_of(Case(lengths=((100, 128),), mask="all"))[0].to_flex()
    with pytest.raises(bsfa.UnsupportedError, match="one length"):
        kept_of(Case(lengths=((64, 64), (64, 128)), layout=PACKED, mask="all"))[0].to_flex()


# --- algebra and statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.mask != "all"], ids=str)
def test_union_and_intersection(case: Case) -> None:
    mask, other = (kept_of(replace(case, seed=seed))[0] for seed in (0, 1))
    rows, other_rows = mask.to_rows(), other.to_rows()
    for got, want in ((mask | other, rows | other_rows), (mask & other, rows & other_rows)):
        assert torch.equal(got.to_rows(), want)
        assert torch.equal(got.counts, want.sum(-1, dtype=torch.int32))
    assert_same(mask | mask, mask)
    assert_same(mask & (mask | other), mask)


def test_algebra_between_mask_heads() -> None:
    """KV head h covers query heads 2h and 2h + 1; a single head covers all."""
    case = Case(lengths=((150, 300),), hq=4, hkv=2, mask="random")
    per_head, per_kv, shared = (
        kept_of(replace(case, mask_heads=h, seed=i))[0] for i, h in enumerate(("q", "kv", "one"))
    )
    assert torch.equal((per_head | per_kv).to_rows(), per_head.to_rows() | per_kv.to_rows()[:, [0, 0, 1, 1]])
    assert torch.equal((shared & per_head).to_rows(), per_head.to_rows() & shared.to_rows()[:, [0, 0, 0, 0]])
    assert (per_kv & shared).num_heads == 2
    three = kept_of(replace(case, hq=3, hkv=1))[0]
    with pytest.raises(ValueError, match=r"4 and 3 heads"):
        per_head | three
    with pytest.raises(ValueError, match="different geometry"):
        per_head | kept_of(replace(case, lengths=((150, 301),)))[0]
    with pytest.raises(ValueError, match="different geometry"):
        per_head & kept_of(replace(case, block_n=32))[0]
    with pytest.raises(TypeError):
        per_head | torch.ones(1)  # type: ignore[operator]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_density_is_kept_over_visible(case: Case) -> None:
    mask, masks = kept_of(case)
    inputs = case.make()
    visible = sum(tile.visible for b in range(len(inputs)) for tile in inputs.tiles(b))
    kept = sum((m.sum(axis=(0, 2)) for m in masks), np.zeros(inputs.mask_heads))
    per_head = mask.density(per_head=True)
    assert per_head.shape == (inputs.mask_heads,) and mask.density().shape == ()
    assert mask.density().dtype == per_head.dtype == F32
    np.testing.assert_allclose(per_head.numpy(), kept / max(visible, 1), rtol=1e-6)
    np.testing.assert_allclose(float(mask.density()), (kept / max(visible, 1)).mean(), rtol=1e-6)


def test_repr() -> None:
    mask, _ = kept_of(Case(lengths=((150, 300),), hq=4, hkv=2, mask="all", block_n=32))
    text = repr(mask)
    for part in ("heads=4", "max_seqlen_q=150", "max_seqlen_k=300", "64x32", "causal=True", "density=1.0000"):
        assert part in text
    assert "device=meta" in repr(bsfa.BlockMask(mask.words.to("meta"), mask.counts.to("meta"), mask.geometry))


# --- what the kernel makes of words -----------------------------------------------------------------------------------


def test_bits_of_blocks_that_are_not_visible_mean_nothing() -> None:
    """Set bits beyond a tile's visible blocks, and in rows of no tile, change nothing."""
    case = Case(lengths=RAGGED, hq=4, hkv=2, layout=PACKED, mask="random", block_m=32, block_n=16)
    inputs = case.make()
    mask, _ = kept_of(case)
    visible = torch.arange(mask.words.shape[-1] * 32) < mask.geometry.visible_blocks()[:, None]
    words = mask.words | pack_bits(~visible)[:, None]
    dirty = bsfa.BlockMask(words.contiguous(), mask.counts, mask.geometry)
    assert not torch.equal(dirty.words, mask.words)
    for a, b in zip(inputs.attend(dirty), inputs.attend(mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept", [(j,) for j in (0, 30, 31, 32, 33, 63, 64, 95, 96, 127)] + [(31, 63), (0, 96)])
def test_every_bit_is_attended(kept: tuple[int, ...]) -> None:
    """Single blocks in the words of a long row, with whole words of zeros between."""
    case = Case(lengths=((16, 2048),), block_m=16, block_n=16)
    inputs = case.make()
    only = np.zeros((1, 2, 128), dtype=bool)
    only[:, :, list(kept)] = True
    out, lse = inputs.attend(inputs.block_mask([only]))
    check_attention(inputs, out, lse, [only])


def test_from_csr_refuses_lists_that_do_not_fit() -> None:
    mask, _ = kept_of(Case(lengths=((150, 300),), mask="random"))
    indptr, indices = mask.to_csr()
    for bad_indptr, bad_indices, message in (
        (indptr[:-1], indices, "indptr"),
        (indptr, indices[:-1], "indptr"),
        (indptr + 1, indices, "indptr"),
        (indptr.flip(0), indices, "indptr"),
        (indptr, indices + 5, "indices"),
        (indptr, indices - 1, "indices"),
    ):
        with pytest.raises(ValueError, match=message):
            bsfa.BlockMask.from_csr(bad_indptr, bad_indices, 2, mask.geometry)


def test_from_rows_and_from_bool_refuse_other_shapes_and_types() -> None:
    mask, _ = kept_of(Case(lengths=((150, 300),), mask="random"))
    rows = mask.to_rows()
    with pytest.raises(TypeError, match="bool"):
        bsfa.BlockMask.from_rows(rows.int(), mask.geometry)
    for bad in (rows[:-1], rows[..., :-1], rows[0]):
        with pytest.raises(ValueError, match="shape"):
            bsfa.BlockMask.from_rows(bad, mask.geometry)
    with pytest.raises(ValueError, match="tiles"):
        bsfa.BlockMask.from_bool(mask.to_bool(), seqlen_q=149, seqlen_k=500, block_m=64, block_n=64)
    with pytest.raises(ValueError, match="shape"):
        bsfa.BlockMask.from_bool(rows)
