"""block_mass and tile_max on CUDA against float64 on the CPU: layouts, lengths, tiles of 64 and 128, and bits."""

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
import oracle
from cases import (
    BATCHED,
    BF16,
    F16,
    F32,
    NAN,
    PACKED,
    PAGED,
    PAGED_PACKED,
    Case,
    Inputs,
    check_rows,
    poison,
    square,
    table,
)

#: "cpu" runs all but the tests of CUDA itself on the CPU kernels, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")

#: Error of a logit, relative to the largest one (or to 1); of a mass by as much.
CONSTANT = 1e-5

FORMS = ("absolute", "relative")
QUANTITIES = ("mass", *FORMS)
BASE = Case(hq=4, hkv=2, dim=64, dtype=BF16, block_m=128, block_n=128)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (128, 128), (70, 0), (37, 300), (129, 257), (100, 30), (0, 0))
CHUNKS = ((150, 387), (150, 256), (150, 150), (150, 20), (150, 0))
TWINS = ((141, 300), (141, 300))


# --- the statement ----------------------------------------------------------------------------------------------------


def lse_of(inputs: Inputs) -> Tensor:
    """The LSE of dense attention from the oracle, in float32, lying as attention returns it."""
    parts = []
    for b in range(len(inputs)):
        q, k, v = inputs.arrays(b)
        lse = oracle.attention(q, k, v, **inputs.oracle_maths)[1]
        parts.append(torch.from_numpy(lse.astype(np.float32)))
    return torch.stack(parts) if inputs.cu_q is None else torch.cat(parts, dim=1)


def visits(visible: int) -> list[int]:
    """Visible blocks in the order in which they are met."""
    return [visible - 1, *([0] if visible > 1 else []), *range(visible - 2, 0, -1)] if visible else []


def want_maxima(inputs: Inputs, b: int, form: str) -> np.ndarray:
    """[tiles, Hq, blocks] of one sequence."""
    case = inputs.case
    q, k, _ = inputs.arrays(b)
    maths = inputs.oracle_maths
    seen = oracle.visible_tokens(len(q), len(k), case.causal)
    s = oracle.logits(q, k, maths["scale"], maths["softcap"])
    found = inputs.tiles(b)
    maxima = np.full((len(found), case.hq, oracle.num_blocks(len(k), case.block_n)), -np.inf)
    for t, tile in enumerate(found):
        running = np.full((case.hq, len(tile.rows)), -np.inf)
        for j in visits(tile.visible):
            keys = slice(j * case.block_n, (j + 1) * case.block_n)
            here = np.where(seen[tile.rows, keys], s[:, tile.rows, keys], -np.inf)
            value = top = here.max(axis=-1)  # NaN if one is
            if form == "relative":
                value = np.where(np.isneginf(running) & ~np.isnan(top), np.inf, top - running)
            maxima[t, :, j] = np.where(seen[tile.rows, keys].any(axis=-1), value, -np.inf).max(axis=-1)
            running = np.fmax(running, np.fmax.reduce(here, axis=-1))
    return maxima


def measure(inputs: Inputs, quantity: str, device: str = DEVICE, lse: Tensor | None = None) -> Tensor:
    """The quantity of a case on a device, over memory for the result that holds NaN; on the CPU."""
    there = inputs.to(device)
    shape = (inputs.geometry.num_rows, inputs.case.hq, inputs.geometry.num_blocks)
    options = {"block_m": inputs.case.block_m, "block_n": inputs.case.block_n, **there.maths, **there.layout}
    if quantity == "mass":
        given = (lse_of(inputs) if lse is None else lse).to(device)
        poison(shape, device=device)
        return bsfa.block_mass(there.q, there.k, given, **options).cpu()
    poison(shape, device=device)
    return bsfa.tile_max(there.q, there.k, form=quantity, **options).cpu()


def check_mass(inputs: Inputs, mass: Tensor, lse: Tensor) -> None:
    constant = CONSTANT * max(1.0, float(lse.nan_to_num(neginf=0.0).abs().max()) if lse.numel() else 0.0)
    case = inputs.case
    assert mass.dtype == torch.float32

    def want(b: int) -> np.ndarray:
        q, k, _ = inputs.arrays(b)
        return oracle.block_mass(q, k, block_m=case.block_m, block_n=case.block_n, **inputs.oracle_maths)

    check_rows(inputs, mass, want, 0.0, "mass", constant)
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        if seqlen_k and (seqlen_q <= seqlen_k or not case.causal):  # every row sees something
            np.testing.assert_allclose(inputs.rows_of_sequence(mass, b).sum(-1), 1.0, atol=4 * constant)


def check_maxima(inputs: Inputs, maxima: Tensor, form: str) -> None:
    assert maxima.dtype == torch.float32
    special = (np.isposinf, np.isnan)
    wanted = [want_maxima(inputs, b, form) for b in range(len(inputs))]
    for b, expected in enumerate(wanted):
        got = inputs.rows_of_sequence(maxima, b)[:, :, : expected.shape[2]]
        for which in special:
            assert np.array_equal(which(got), which(expected)), f"sequence {b}: {which.__name__}"

    def without(x: np.ndarray) -> np.ndarray:
        return np.where(np.isposinf(x) | np.isnan(x), 0.0, x)

    plain = torch.from_numpy(without(maxima.numpy()))
    check_rows(inputs, plain, lambda b: without(wanted[b]), -np.inf, form, 2 * CONSTANT)


def check(case: Case, quantities: tuple[str, ...] = QUANTITIES) -> None:
    for block_m in (64, 128):
        inputs = replace(case, block_m=block_m).make()
        for quantity in quantities:
            if quantity == "mass":
                lse = lse_of(inputs)
                check_mass(inputs, measure(inputs, quantity, lse=lse), lse)
            else:
                check_maxima(inputs, measure(inputs, quantity), quantity)


# --- the grid ---------------------------------------------------------------------------------------------------------

BOTH = {"dim": [64, 128], "dtype": [BF16, F16]}
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300)
PREFIXES = (
    *((1, 64), (1, 65), (1, 128), (1, 300), (5, 133), (63, 129), (64, 192), (65, 192), (100, 137), (127, 300)),
    *((128, 256), (128, 192), (129, 257), (33, 390), (200, 264), (150, 342)),
)
NOTHING_SEEN = ((100, 37), (130, 1), (257, 128), (300, 129), (129, 128), (200, 64), (70, 0), (0, 70), (0, 0))

CASES = [
    *table(BASE, lengths=square(*EDGES), causal=[True, False], **BOTH),
    *table(BASE, lengths=[(pair,) for pair in PREFIXES + NOTHING_SEEN], causal=[True, False], dim=[64, 128]),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False], **BOTH),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), causal=[True, False], **BOTH),
    *table(
        replace(BASE, lengths=RAGGED),
        strides=["interleaved", "head-major", "wide-gaps"],
        layout=[PACKED, PAGED_PACKED],
        dim=[64, 128],
    ),
    *table(replace(BASE, lengths=TWINS), strides=["interleaved", "head-major", "wide-gaps"], **BOTH),
]
PAGES = [
    *table(
        replace(BASE, lengths=CHUNKS, layout=PAGED),
        page_size=[1, 2, 3, 7, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512],
        dim=[64, 128],
    ),
    *table(
        replace(BASE, lengths=RAGGED, layout=PAGED_PACKED, strides="interleaved", dtype=F16),
        page_size=[1, 3, 16, 24, 64, 96, 128, 256],
        causal=[True, False],
    ),
]
GROUPS = ((1, 1), (4, 4), (4, 1), (8, 2), (8, 1), (6, 2), (12, 4), (32, 8), (7, 7))
HEADS = [replace(BASE, lengths=((141, 270),), hq=hq, hkv=hkv, dim=dim) for hq, hkv in GROUPS for dim in (64, 128)]
OPTIONS = [
    *table(replace(BASE, lengths=((150, 300),)), softcap=[0.5, 5.0, 50.0], scale=[None, 1.5, -0.2], dtype=[BF16, F16]),
    *table(replace(BASE, lengths=((150, 300),)), scale=[0.0, 1.0, -0.3, 4.0, 1e-35], **BOTH),
    *table(replace(BASE, lengths=RAGGED, layout=PACKED), scale=[0.0, -0.3], softcap=[0.0, 5.0]),
]
LONG = [
    replace(
        BASE, lengths=((300, 5000),), hq=2, hkv=1
    ),  # more than one batch of results, and not a whole number of them
    *table(replace(BASE, hq=1, hkv=1), lengths=[((n, n),) for n in (4096, 4097, 4224)]),
    replace(BASE, lengths=((4200, 4200),), hq=1, hkv=1, dim=128, dtype=F16),
    replace(BASE, lengths=((300, 4300), (0, 0), (70, 4097), (128, 1)), layout=PAGED_PACKED, page_size=64),
    *table(replace(BASE, lengths=((1300, 1300),) * 2, hq=8, hkv=2), dim=[64, 128]),  # more pairs than multiprocessors
    replace(BASE, lengths=((140, 131_500),), hq=1, hkv=1, layout=PAGED, page_size=256, dim=128),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lengths_and_layouts(case: Case) -> None:
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


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
def test_many_sequences(layout: str) -> None:
    rng = random.Random(3)
    lengths = [
        (rng.choice((0, 0, 1, rng.randint(0, 150))), rng.choice((0, 1, rng.randint(0, 200)))) for _ in range(300)
    ]
    check(replace(BASE, lengths=tuple(lengths), layout=layout, hq=2, hkv=1))


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
    hkv = rng.choice((1, 1, 2, 3))
    return Case(
        lengths=tuple(lengths),
        layout=layout,
        page_size=rng.choice((rng.choice((1, 8, 16, 64, 128, 256)), rng.randint(1, 200))),
        strides=rng.choice(("plain", "interleaved", "head-major", "wide-gaps")),
        hq=hkv * rng.choice((1, 2, 3, 4)),
        hkv=hkv,
        dim=rng.choice((64, 128)),
        dtype=rng.choice((BF16, F16)),
        causal=rng.random() < 0.7,
        softcap=rng.choice((0.0, 0.0, 0.0, 10.0)),
        scale=rng.choice((None, None, None, 0.5, -0.1)),
        block_m=rng.choice((64, 128)),
        block_n=128,
        seed=seed,
    )


@pytest.mark.parametrize("case", [random_case(seed) for seed in range(150)], ids=str)
def test_random_cases(case: Case) -> None:
    """Against the oracle; the same bits again; and against the CPU kernels."""
    inputs = case.make()
    lse = lse_of(inputs)
    for quantity in QUANTITIES:
        got = measure(inputs, quantity, lse=lse)
        if quantity == "mass":
            check_mass(inputs, got, lse)
        else:
            check_maxima(inputs, got, quantity)
        assert torch.equal(measure(inputs, quantity, lse=lse), got)
        if quantity == "mass" or "cpu" in kernels_of_tile_max():
            other = measure(inputs, quantity, "cpu", lse)
            torch.testing.assert_close(got, other, rtol=4 * CONSTANT, atol=4 * CONSTANT)


def kernels_of_tile_max() -> set[str]:
    return {device for device, ops in bsfa._library.KERNELS.items() if "tile_max" in ops}


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_layouts_have_the_same_bits(quantity: str, block_m: int, dim: int) -> None:
    case = replace(BASE, lengths=TWINS, dim=dim, block_m=block_m)
    plain = case.make()
    want = measure(plain, quantity)
    for layout in (PACKED, PAGED, PAGED_PACKED):
        for strides in ("plain", "interleaved", "wide-gaps"):
            other = replace(case, layout=layout, strides=strides, page_size=24).make()
            got = measure(other, quantity)
            for b in range(len(plain)):
                assert np.array_equal(other.rows_of_sequence(got, b), plain.rows_of_sequence(want, b))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(("block_m", "cut"), [(64, 64), (64, 192), (64, 256), (128, 128), (128, 256)])
def test_chunks_have_the_bits_of_the_whole(quantity: str, block_m: int, cut: int) -> None:
    """A prompt may be cut at any tile: also in the middle of 128 rows."""
    whole = replace(BASE, lengths=((400, 400),), block_m=block_m).make()
    lse = lse_of(whole)
    want = measure(whole, quantity, lse=lse)
    for rows, keys, first in ((slice(0, cut), cut, 0), (slice(cut, 400), 400, cut // block_m)):
        part = replace(whole.case, lengths=((len(range(400)[rows]), keys),)).make()
        part.queries, part.keys = [whole.queries[0][rows]], [whole.keys[0][:keys]]
        part.lay_out()
        got = measure(part, quantity, lse=lse[:, :, rows].contiguous())
        assert torch.equal(got, want[first : first + len(got), :, : got.shape[2]])


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED_PACKED])
@pytest.mark.parametrize("causal", [True, False])
def test_a_tile_is_made_of_its_halves(layout: str, causal: bool) -> None:
    """Maxima exactly; masses as means over their rows."""
    lengths = TWINS if layout == BATCHED else RAGGED
    small = replace(BASE, lengths=lengths, layout=layout, causal=causal, block_m=64).make()
    large = replace(small.case, block_m=128).make()
    lse = lse_of(small)
    for quantity in QUANTITIES:
        halves, tiles = (measure(x, quantity, lse=lse) for x in (small, large))
        for b in range(len(small)):
            of_halves, of_tiles = small.rows_of_sequence(halves, b), large.rows_of_sequence(tiles, b)
            for t, tile in enumerate(large.tiles(b)):
                mine = [(i, len(h.rows)) for i, h in enumerate(small.tiles(b)) if h.index // 2 == tile.index]
                assert sum(n for _, n in mine) == len(tile.rows)
                if quantity == "mass":
                    mean = sum(of_halves[i] * n for i, n in mine) / len(tile.rows)
                    np.testing.assert_allclose(of_tiles[t], mean, atol=1e-6)
                else:
                    assert np.array_equal(of_tiles[t], np.max([of_halves[i] for i, _ in mine], axis=0))


def test_the_same_bits_every_time() -> None:
    inputs = replace(BASE, lengths=((1100, 1500), (900, 1300)), layout=PACKED, hq=8, hkv=2, dim=128).make()
    lse = lse_of(inputs)
    for quantity in QUANTITIES:
        first = measure(inputs, quantity, lse=lse)
        for _ in range(5):
            assert torch.equal(measure(inputs, quantity, lse=lse), first)


# --- what must not be read, and what is not a number ------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_neighbouring_sequences_do_not_leak(layout: str, value: float, block_m: int, dim: int) -> None:
    lengths = ((65, 65), (3, 1), (1, 130), (64, 200), (128, 128), (37, 300), (129, 257), (100, 30))
    inputs = replace(BASE, lengths=lengths, layout=layout, dim=dim, block_m=block_m).make()
    lse = lse_of(inputs)
    clean = {quantity: measure(inputs, quantity, lse=lse) for quantity in QUANTITIES}
    kept = [[t.clone() for t in tensors] for tensors in (inputs.queries, inputs.keys)]
    for spoiled in (0, 1):
        spoiled_lse = lse.clone()
        for b in range(len(lengths)):
            bad = b % 2 == spoiled
            for tensors, copies in zip((inputs.queries, inputs.keys), kept, strict=True):
                tensors[b].fill_(value) if bad else tensors[b].copy_(copies[b])
            if bad:
                inputs.lse_of_sequence(spoiled_lse, b).fill_(value)
        inputs.lay_out()
        for quantity, want in clean.items():
            got = measure(inputs, quantity, lse=spoiled_lse)
            for b in range(len(lengths)):
                if b % 2 != spoiled:
                    assert np.array_equal(inputs.rows_of_sequence(got, b), inputs.rows_of_sequence(want, b))
            assert torch.equal(inputs.unused_rows(got), inputs.unused_rows(want))


def test_batches_and_heads_do_not_leak() -> None:
    inputs = replace(BASE, lengths=((141, 300),) * 3, block_m=64).make()
    lse = lse_of(inputs)
    clean = {quantity: measure(inputs, quantity, lse=lse) for quantity in QUANTITIES}
    for t in (inputs.q, inputs.k):
        t[1] = NAN
        t[:, :, : t.shape[2] // 2] = NAN
    for quantity, want in clean.items():
        got = measure(inputs, quantity, lse=lse)
        for b in (0, 2):
            mine, wanted = (inputs.rows_of_sequence(x, b) for x in (got, want))
            assert np.array_equal(mine[:, 2:], wanted[:, 2:])


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("key", [0, 70, 127, 128, 200, 299])
def test_a_logit_that_is_not_a_number(block_m: int, key: int) -> None:
    """It shows in its block, for the tiles that see it, and nowhere else."""
    inputs = replace(BASE, lengths=((300, 300),), block_m=block_m).make()
    clean = measure(inputs, "mass", lse=lse_of(inputs))
    lse = lse_of(inputs)
    inputs.keys[0][key, 0] = NAN  # of KV head 0
    inputs.lay_out()
    for form in FORMS:
        got = measure(inputs, form)
        assert got.isnan().any() and not got[:, 2:].isnan().any()
        check_maxima(inputs, got, form)
    mass = measure(inputs, "mass", lse=lse)
    last = torch.tensor([tile.rows.max() for tile in inputs.tiles(0)])
    spoiled = torch.zeros_like(mass, dtype=torch.bool)
    spoiled[last >= key, :2, key // 128] = True
    assert torch.equal(mass.isnan(), spoiled) and torch.equal(mass[~spoiled], clean[~spoiled])


def test_rows_without_a_sum_add_nothing() -> None:
    """Rows whose LSE is -inf count as rows of the tile, with a mass of 0, whatever their logits are."""
    inputs = replace(BASE, lengths=((300, 300),), dim=128).make()
    lse = lse_of(inputs)
    some = torch.arange(300) % 3 == 0
    lse[:, :, some] = -float("inf")
    got = measure(inputs, "mass", lse=lse)
    for t, tile in enumerate(inputs.tiles(0)):
        share = float((~some[tile.rows]).float().mean())
        np.testing.assert_allclose(got[t].sum(-1), share, atol=1e-4)
    inputs.queries[0][some] = NAN
    inputs.lay_out()
    assert torch.equal(measure(inputs, "mass", lse=lse), got)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 30.0])
def test_logits_of_any_magnitude(magnitude: float) -> None:
    inputs = replace(BASE, lengths=((150, 300),)).make()
    inputs.queries = [q * magnitude for q in inputs.queries]
    inputs.lay_out()
    lse = lse_of(inputs)
    check_mass(inputs, measure(inputs, "mass", lse=lse), lse)
    for form in FORMS:
        check_maxima(inputs, measure(inputs, form), form)


def test_mass_with_the_lse_of_attention() -> None:
    """As calibration calls it."""
    inputs = replace(BASE, lengths=RAGGED, layout=PACKED, dim=128).make()
    there = inputs.to(DEVICE)
    _, lse = there.attend(None)
    for block_m in (64, 128):
        case = replace(inputs.case, block_m=block_m).make()
        check_mass(case, measure(case, "mass", lse=lse.cpu()), lse.cpu())


# --- how the operators behave -----------------------------------------------------------------------------------------


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def call(there: Inputs, quantity: str, lse: Tensor) -> Tensor:
    options = {"block_m": there.case.block_m, "block_n": 128, **there.maths, **there.layout}
    if quantity == "mass":
        return bsfa.block_mass(there.q, there.k, lse, **options)
    return bsfa.tile_max(there.q, there.k, form=quantity, **options)


@cuda_only
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("block_m", [64, 128])
def test_cuda_graph_without_synchronisation(quantity: str, block_m: int) -> None:
    """One graph serves other lengths, pages and values."""
    case = replace(BASE, lengths=((65, 300), (0, 0), (100, 130)), layout=PAGED_PACKED, block_m=block_m)
    first, second = case.make(), replace(case, lengths=((100, 200), (65, 240), (0, 0)), seed=1).make()
    static = first.to(DEVICE)
    static.max_q = 128
    lse = lse_of(first).to(DEVICE)
    with no_synchronisation():
        call(static, quantity, lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(static, quantity, lse)
    for inputs in (second, first):
        for name in ("q", "k", "cu_q", "seqlens_k"):
            getattr(static, name).copy_(getattr(inputs, name))
        static.block_table.fill_(-7)
        static.block_table[:, : inputs.block_table.shape[1]] = inputs.block_table.to(DEVICE)
        lse.copy_(lse_of(inputs))
        result.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        want = measure(inputs, quantity)
        got = result.cpu()
        for b in range(len(inputs)):
            blocks = -(-inputs.case.lengths[b][1] // 128)
            mine, wanted = (inputs.rows_of_sequence(x, b)[:, :, :blocks] for x in (got, want))
            assert np.array_equal(mine, wanted)
        assert not got.isnan().any()


@cuda_only
def test_two_streams_at_once() -> None:
    """Nothing is shared between calls in flight."""
    made = [replace(BASE, lengths=((700, 900),), block_m=64, seed=seed).make() for seed in range(2)]
    there = [inputs.to(DEVICE) for inputs in made]
    lse = [lse_of(inputs).to(DEVICE) for inputs in made]
    want = [[call(t, q, s) for q in QUANTITIES] for t, s in zip(there, lse, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in there]
    got: list[list[list[Tensor]]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append([call(there[i], q, lse[i]) for q in QUANTITIES])
    torch.cuda.synchronize()
    for results, wanted in zip(got, want, strict=True):
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@cuda_only
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_opcheck(layout: str) -> None:
    inputs = replace(BASE, lengths=RAGGED if layout == PACKED else TWINS, layout=layout, block_m=64).make()
    there = inputs.to(DEVICE)
    there.k.nan_to_num_()  # opcheck compares inputs with copies of themselves
    where = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k)
    options = (inputs.geometry.num_rows, 64, 128, True, 0.125, 0.0)
    lse = lse_of(inputs).to(DEVICE)
    torch.library.opcheck(torch.ops.bsfa.block_mass.default, (there.q, there.k, lse, *where, *options))
    for form in FORMS:
        torch.library.opcheck(torch.ops.bsfa.tile_max.default, (there.q, there.k, *where, *options, form))


# --- what is refused --------------------------------------------------------------------------------------------------


def both(
    change: Callable[[Tensor], Tensor] = lambda t: t, dim: int = 64, dtype: torch.dtype = BF16, **options: Any
) -> None:
    """Both operations on small inputs; keys changed by ``change``."""
    q, k = (torch.randn(2, 300, h, dim, device=DEVICE).to(dtype) for h in (4, 2))
    lse = torch.zeros(2, 4, 300, device=DEVICE)
    calls: list[Callable[[], Tensor]] = [
        lambda: bsfa.block_mass(q, change(k), lse, **options),
        lambda: bsfa.tile_max(q, change(k), **options),
    ]
    messages = set()
    for name, run in zip(("block_mass", "tile_max"), calls, strict=True):
        with pytest.raises(bsfa.UnsupportedError) as error:
            run()
        assert f"'{name}'" in str(error.value)
        messages.add(str(error.value).replace(name, ""))
    assert len(messages) == 1
    raise bsfa.UnsupportedError(messages.pop())


@cuda_only
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": F32}, "float32.*bfloat16, float16"),
        ({"dim": 96}, "head_dim 96: .*64, 128"),
        ({"block_m": 32}, r"32 x 128 .*64 x 128, 128 x 128"),
        ({"block_n": 64, "block_m": 128}, "128 x 64"),
        ({"change": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1]}, r"k\.contiguous\(\)"),
        ({"change": lambda t: t[:, :, :1].expand(-1, -1, 2, -1)}, r"k\.contiguous\(\)"),
    ],
    ids=range(6),
)
def test_unsupported_calls_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(bsfa.UnsupportedError, match=message):
        both(**options)


@cuda_only
@pytest.mark.parametrize(
    "changes",
    [
        {"num_rows": 5},
        {"num_rows": -1},
        {"block_m": 32},
        {"block_m": 256},
        {"block_n": 64},
        {"max_seqlen_q": 301},
        {"max_seqlen_k": 299},
        {"form": "both"},
        {"dtype": F32},
        {"dim": 96},
    ],
    ids=str,
)
def test_raw_operators_refuse_what_they_cannot_do(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        **{"cu_seqlens_q": None, "cu_seqlens_k": None, "block_table": None, "seqlens_k": None},
        **{"max_seqlen_q": 300, "max_seqlen_k": 300, "num_rows": 6, "block_m": 128, "block_n": 128},
        **{"causal": True, "softmax_scale": 0.125, "softcap": 0.0},
    }
    dim, dtype = changes.get("dim", 64), changes.get("dtype", BF16)
    q, k = (torch.randn(2, 300, h, dim, device=DEVICE).to(dtype) for h in (4, 2))
    lse = torch.zeros(2, 4, 300, device=DEVICE)
    arguments |= {name: value for name, value in changes.items() if name in arguments}
    if "form" not in changes:
        with pytest.raises(RuntimeError):
            torch.ops.bsfa.block_mass(q, k, lse, *arguments.values())
    with pytest.raises(RuntimeError):
        torch.ops.bsfa.tile_max(q, k, *arguments.values(), changes.get("form", "absolute"))
    torch.cuda.synchronize()
    q, k = (torch.randn(1, 64, 1, 64, device=DEVICE).to(BF16) for _ in range(2))
    assert bsfa.tile_max(q, k).isfinite().all()
