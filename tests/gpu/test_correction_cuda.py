"""Mean correction on CUDA against float64 on the CPU, in the manner of test_attention_cuda.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
from bsfa._library import KERNELS
from bsfa.policies import RelativeMax, StaticPattern
from cases import (
    BATCHED,
    BF16,
    F16,
    NAN,
    PACKED,
    PAGED,
    PAGED_PACKED,
    ROUNDING,
    Case,
    Inputs,
    check_attention,
    poison,
    table,
)

#: "cpu" runs all but the tests of CUDA itself on the CPU kernel, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")

#: The kernel's exponentials, logarithms and sums are float32, in another order than torch's.
LSE_CONSTANT = 1e-5

BASE = Case(lengths=((300, 700),), hq=4, hkv=2, dim=64, dtype=BF16, block_m=128, block_n=128, mask="mixed")
RAGGED = (
    (65, 65),
    (0, 0),
    (1, 130),
    (0, 40),
    (128, 128),
    (70, 0),
    (37, 300),
    (129, 257),
    (100, 30),
    (141, 900),
    (0, 0),
)
CHUNKS = ((150, 387), (150, 256), (150, 150), (150, 20))
PAIRS = (
    *((1, n) for n in (1, 127, 128, 129, 255, 256, 700)),
    *((n, n) for n in (127, 128, 129, 256, 257, 600)),
    *((127, 256), (128, 256), (129, 256), (100, 612), (20, 520), (200, 650), (100, 37), (130, 1), (0, 70), (70, 0)),
)

CASES = [
    *table(BASE, mask=["mixed", "empty", "all", "diagonal"], mask_heads=["q", "kv", "one"], causal=[True, False]),
    *table(BASE, dim=[64, 128], dtype=[BF16, F16], mask=["mixed", "empty", "sparse"], causal=[True, False]),
    *table(
        replace(BASE, hq=2, hkv=1), lengths=[(pair,) for pair in PAIRS], causal=[True, False], mask=["mixed", "empty"]
    ),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False], dim=[64, 128]),
    *table(
        replace(BASE, lengths=CHUNKS, layout=PAGED),
        page_size=[1, 16, 24, 64, 96, 256],
        causal=[True, False],
        dim=[64, 128],
    ),
    *table(BASE, softcap=[0.0, 0.5, 20.0], scale=[None, 0.0, -0.3, 1.5, 1e-36], dim=[64, 128]),
    *table(replace(BASE, causal=False, dim=128), softcap=[0.0, 5.0], scale=[None, -0.3]),
    *table(replace(BASE, lengths=((141, 270),)), hq=[1, 7], hkv=[1]),
    # More (tile, head) pairs than a GPU has multiprocessors; most tiles keep little.
    *table(replace(BASE, lengths=((1300, 1300),) * 2, hq=8), mask=["sparse", "empty", "mixed"], dim=[64, 128]),
]


def attend(
    inputs: Inputs, masks: list[np.ndarray], device: str = DEVICE, means: tuple[Tensor, Tensor] | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((out, lse), means) on a device, over memory for the results that holds NaN."""
    there = inputs.to(device)
    mask = there.block_mask(masks)
    means = there.means() if means is None else (means[0].to(device), means[1].to(device))
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=inputs.case.dtype, device=device)
    poison(inputs.q.shape[:-1], device=device)
    return there.attend(mask, means), means


def drawn(inputs: Inputs) -> list[np.ndarray]:
    return [inputs.draw_mask(b) for b in range(len(inputs))]


def check(inputs: Inputs, masks: list[np.ndarray]) -> None:
    (out, lse), means = attend(inputs, masks)
    check_attention(inputs, out, lse, masks, LSE_CONSTANT, means)
    again, _ = attend(inputs, masks)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case) -> None:
    inputs = case.make()
    check(inputs, drawn(inputs))


# --- more blocks than one step of means holds -------------------------------------------------------------------------


def keep_all(mask: np.ndarray) -> None:
    mask[:] = True


def nothing(mask: np.ndarray) -> None:
    mask[:] = False


def chunk_1_kept(mask: np.ndarray) -> None:
    mask[..., 128:256] = True


def only_first_block_dropped(mask: np.ndarray) -> None:
    mask[:] = True
    mask[..., 0] = False


def one_block_a_chunk_dropped(mask: np.ndarray) -> None:
    mask[:] = True
    mask[..., 127::128] = False


def as_drawn(mask: np.ndarray) -> None:
    pass


SHAPES = [keep_all, nothing, chunk_1_kept, only_first_block_dropped, one_block_a_chunk_dropped, as_drawn]


@pytest.mark.parametrize("change", SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
def test_several_steps_of_means(change: Callable[[np.ndarray], None], causal: bool, dim: int) -> None:
    case = replace(BASE, lengths=((140, 50_050),), hq=2, hkv=1, dim=dim, mask="sparse", causal=causal)
    inputs = case.make()
    masks = drawn(inputs)
    for t, tile in enumerate(inputs.tiles(0)):
        change(masks[0][t])
        masks[0][t, :, tile.visible :] = False
    check(inputs, masks)


@pytest.mark.parametrize("lengths", [((40, 132_200),), ((1, 131_073),), ((40, 131_110),), ((3, 131_202),)], ids=str)
@pytest.mark.parametrize("mask", ["sparse", "empty"])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_more_than_1024_blocks(lengths: tuple[tuple[int, int], ...], mask: str, causal: bool) -> None:
    inputs = replace(BASE, lengths=lengths, hq=2, hkv=1, mask=mask, layout=PAGED, page_size=256, causal=causal).make()
    check(inputs, drawn(inputs))


@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
def test_sequences_of_very_different_lengths(layout: str) -> None:
    lengths = ((70, 17_000), (0, 0), (1, 3), (200, 4097), (128, 128), (129, 20_000))
    inputs = replace(BASE, lengths=lengths, hq=2, hkv=1, layout=layout, page_size=64, dim=128).make()
    check(inputs, drawn(inputs))


# --- random cases -----------------------------------------------------------------------------------------------------


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    layout = rng.choice([BATCHED, PACKED, PAGED, PAGED_PACKED])
    count = rng.randint(1, 4)
    lengths = [(rng.randint(0, 400), rng.choice((rng.randint(0, 1000), rng.randint(0, 200)))) for _ in range(count)]
    if layout == BATCHED:
        lengths = [lengths[0]] * count
    elif layout == PAGED:
        lengths = [(lengths[0][0], n) for _, n in lengths]
    hkv = rng.choice((1, 1, 2, 3))
    return replace(
        BASE,
        lengths=tuple(lengths),
        layout=layout,
        page_size=rng.choice((16, 64, 128, rng.randint(1, 200))),
        strides=rng.choice(("plain", "interleaved", "head-major", "wide-gaps")),
        hq=hkv * rng.choice((1, 2, 3, 4)),
        hkv=hkv,
        dim=rng.choice((64, 128)),
        dtype=rng.choice((BF16, F16)),
        causal=rng.random() < 0.7,
        softcap=rng.choice((0.0, 0.0, 0.0, 10.0)),
        scale=rng.choice((None, None, None, 0.5, -0.1)),
        mask=rng.choice(("mixed", "mixed", "random", "sparse", "all", "diagonal", "empty")),
        mask_heads=rng.choice(("q", "kv", "one")),
        seed=seed,
    )


@pytest.mark.parametrize("case", [random_case(seed) for seed in range(100)], ids=str)
def test_random_cases(case: Case) -> None:
    """Against the oracle, and against the CPU kernel with the same means, which is one rounding away from float32."""
    inputs = case.make()
    masks = drawn(inputs)
    (out, lse), means = attend(inputs, masks)
    check_attention(inputs, out, lse, masks, LSE_CONSTANT, means)
    (other, lse_other), _ = attend(inputs, masks, "cpu", means)
    unit = ROUNDING[case.dtype]
    torch.testing.assert_close(out.cpu().float(), other.float(), rtol=2 * unit, atol=4 * unit)
    torch.testing.assert_close(lse.cpu(), lse_other, rtol=2e-5, atol=2e-5)


# --- what must agree, what must not be read ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [PACKED, PAGED, PAGED_PACKED])
def test_layouts_have_the_same_bits(layout: str) -> None:
    case = replace(BASE, lengths=((141, 900), (141, 900)), dim=128)
    plain, other = case.make(), replace(case, layout=layout, strides="wide-gaps", page_size=24).make()
    masks = drawn(plain)
    (want, want_lse), means = attend(plain, masks)
    (out, lse), _ = attend(other, masks, means=means)
    for b in range(len(plain)):
        assert torch.equal(other.of_sequence(out, b), want[b])
        assert torch.equal(other.lse_of_sequence(lse, b), want_lse[b])


def test_nothing_dropped_is_nothing_changed() -> None:
    inputs = replace(BASE, mask="all").make()
    masks = drawn(inputs)
    there = inputs.to(DEVICE)
    want = there.attend(there.block_mask(masks))
    assert all(torch.equal(a, b) for a, b in zip(attend(inputs, masks)[0], want, strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_mean_keys_of_other_blocks_are_not_used(dim: int) -> None:
    """Keys of blocks that are kept, or that not every row sees, may have any mean."""
    inputs = replace(BASE, mask_heads="one", dim=dim).make()
    masks = drawn(inputs)
    want, (k_means, v_means) = attend(inputs, masks)
    k_means = k_means.clone()
    for j in range(k_means.shape[1]):
        added = any(
            not masks[0][t, 0, j] and (j + 1) * 128 <= int(tile.rows[0]) + 700 - 300 + 1
            for t, tile in enumerate(inputs.tiles(0))
        )
        if not added:
            k_means[:, j] = NAN
    got, _ = attend(inputs, masks, means=(k_means, v_means))
    assert k_means.isnan().any() and not k_means.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sequences_do_not_leak() -> None:
    inputs = replace(BASE, lengths=((141, 900),) * 3).make()
    masks = drawn(inputs)
    want, _ = attend(inputs, masks)
    for tensors in (inputs.keys, inputs.values):
        tensors[1].fill_(NAN)
    inputs.lay_out()
    got, _ = attend(inputs, masks)
    for b in (0, 2):
        assert torch.equal(got[0][b], want[0][b]) and torch.equal(got[1][b], want[1][b])


# --- through the functions with a policy ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_policies(layout: str) -> None:
    inputs = replace(BASE, lengths=((300, 1200), (300, 1200)), layout=layout).make().to(DEVICE)
    for policy in (StaticPattern(sink_blocks=1, window_blocks=1), RelativeMax(alpha=1.0, sink_blocks=0, last_tiles=0)):
        if isinstance(policy, RelativeMax) and "select_blocks" not in KERNELS[DEVICE]:
            continue
        out, lse, info = inputs.run(policy, mean_correction=True, return_lse=True, return_info=True)
        assert info.mean_corrected and float(info.density()) < 1.0
        want, want_lse = inputs.attend(info.mask, inputs.means())
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_exact_where_all_keys_of_a_block_are_alike() -> None:
    inputs = replace(BASE, lengths=((300, 900),), mask="sparse").make()
    for j in range(0, 900, 128):
        inputs.keys[0][j : j + 128] = inputs.keys[0][j].clone()
    inputs.lay_out()
    masks = drawn(inputs)
    for t, tile in enumerate(inputs.tiles(0)):  # what not all rows see whole is not corrected: keep it
        masks[0][t, :, (int(tile.rows[0]) + 600 + 1) // 128 : tile.visible] = True
    got, _ = attend(inputs, masks)
    dense = inputs.to(DEVICE).attend(None)
    torch.testing.assert_close(got[0], dense[0], rtol=2**-6, atol=2**-7)
    torch.testing.assert_close(got[1], dense[1], rtol=1e-3, atol=2e-3)


def test_compile() -> None:
    torch.compiler.reset()
    inputs = BASE.make().to(DEVICE)
    policy = StaticPattern(sink_blocks=1, window_blocks=1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return bsfa.attention(q, k, v, policy=policy, mean_correction=True) * 2.0

    arguments = (inputs.q, inputs.k, inputs.v)
    assert torch.equal(torch.compile(run, fullgraph=True)(*arguments), run(*arguments))


@cuda_only
def test_means_that_tma_cannot_address_are_named() -> None:
    inputs = BASE.make().to(DEVICE)
    mask = inputs.block_mask(drawn(inputs))
    k, v = inputs.means()
    shifted = torch.cat([k.new_zeros(1), k.flatten()])[1:].view(k.shape)
    with pytest.raises(bsfa.UnsupportedError, match=r"k_means\.clone"):
        inputs.attend(mask, (shifted, v))
