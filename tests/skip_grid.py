"""Attention that skips by exact logits, on a device: the cases, in one pass and in two, and how results are held."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import ExactSkip
from cases import BATCHED, BF16, F16, PACKED, PAGED, PAGED_PACKED, Case, Inputs, poison, square, table
from skip_cases import check_skipping, check_two_passes, make, masks_of, policy_for

LSE_CONSTANT = 1e-5
#: Relative distance to the threshold that every decision of a case has: above what float32 in another order can turn,
#: and, with a softcap, what the GPU's approximation of tanh can.
MARGIN, MARGIN_SOFTCAP = 2e-5, 1e-3

FORMS = ("absolute", "relative")
BASE = Case(hq=4, hkv=2, dim=64, dtype=BF16, block_m=128, block_n=128)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (128, 128), (70, 0), (37, 300), (129, 257), (100, 30), (0, 0))
CHUNKS = ((150, 387), (150, 256), (150, 150), (150, 20))
TWINS = ((141, 400), (141, 400))

Result = tuple[Tensor, Tensor, Tensor]  #: out, lse, skips


def skip(inputs: Inputs, policy: ExactSkip, masks: list[np.ndarray] | None, device: str) -> Result:
    """Attention on a device, over memory for the results that holds NaN."""
    there = inputs.to(device)
    mask = None if masks is None else there.block_mask(masks)
    poison((*inputs.q.shape[:-1], inputs.v.shape[-1]), dtype=inputs.case.dtype, device=device)
    poison(inputs.q.shape[:-1], device=device)
    options = {"skip": policy.to(there.q.device), "return_skips": True, **there.maths, **there.layout}
    out, lse, skips = bsfa.block_sparse_attention(there.q, there.k, there.v, mask, **options)
    return out, lse, skips


def same(a: Result, b: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(
    inputs: Inputs,
    policy: ExactSkip,
    masks: list[np.ndarray] | None,
    device: str,
    margin: float | None = None,
    result: Result | None = None,
) -> np.ndarray:
    """Hold attention on a device, or a ``result`` of it, against the oracle; with two passes the mask between them too.

    Returns the counts [Hq, 2].
    """
    if margin is None:
        margin = MARGIN_SOFTCAP if inputs.case.softcap else MARGIN
    limits = {"lse_constant": LSE_CONSTANT, "margin": margin}
    if policy.passes == 1:
        return check_skipping(inputs, *(result or skip(inputs, policy, masks, device)), policy, masks, **limits)
    g = inputs.geometry
    poison((g.num_rows, inputs.case.hq, -(-g.num_blocks // 32)), (g.num_rows, inputs.case.hq), device=device)
    counts = check_two_passes(inputs, inputs.to(device), policy, masks, **limits)
    if result is not None:
        assert same(result, skip(inputs, policy, masks, device))
    return counts


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays(
    form: str, masked: bool, **options: Any
) -> Iterator[tuple[Inputs, ExactSkip, list[np.ndarray] | None, Result]]:
    """Attention on CUDA by one graph, replayed with other lengths, pages, masks, values and cuts: what went into each
    replay, and its result, over memory that held something else. ``options``: of the policy.
    """
    mask = "random" if masked else "none"
    case = replace(BASE, lengths=((65, 500), (0, 0), (100, 330)), layout=PAGED_PACKED, mask=mask)
    both = [make(case), make(replace(case, lengths=((100, 400), (65, 440), (0, 0)), seed=1))]
    masks = [masks_of(inputs) for inputs in both]
    policies = [policy_for(*pair, form, **options) for pair in zip(both, masks, strict=True)]
    static, policy = both[0].to("cuda"), policies[0].to(torch.device("cuda"))
    static.max_q = 128
    kept = None if masks[0] is None else static.block_mask(masks[0])

    def cuts(of: ExactSkip) -> Tensor:
        values = of.reference if form == "absolute" else of.ratio
        assert isinstance(values, Tensor)
        return values

    def run() -> Result:
        arguments = {"skip": policy, "return_skips": True, **static.maths, **static.layout}
        out, lse, skips = bsfa.block_sparse_attention(static.q, static.k, static.v, kept, **arguments)
        return out, lse, skips

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for i in (1, 0, 1):
        static.take(both[i])
        if kept is not None:
            kept.words.copy_(both[i].block_mask(masks[i]).words)
        cuts(policy).copy_(cuts(policies[i]))
        for t in result:
            t.fill_(-5)
        graph.replay()
        torch.cuda.synchronize()
        yield both[i], policies[i], masks[i], result


# --- the grid ---------------------------------------------------------------------------------------------------------

EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 192, 193, 255, 256, 257, 320, 321, 448)
PREFIXES = (
    (1, 300),
    (5, 133),
    (63, 329),
    (64, 448),
    (65, 449),
    (100, 337),
    (127, 300),
    (128, 256),
    (129, 385),
    (33, 390),
)
NOTHING_SEEN = ((100, 37), (130, 1), (300, 129), (70, 0), (0, 70), (0, 0))

LENGTHS = [
    *table(BASE, lengths=square(*EDGES), causal=[True, False], dim=[64, 128]),
    *table(BASE, lengths=[(pair,) for pair in PREFIXES + NOTHING_SEEN], causal=[True, False], dim=[64, 128]),
]
LAYOUTS = [
    *table(
        replace(BASE, lengths=RAGGED),
        layout=[PACKED, PAGED_PACKED],
        causal=[True, False],
        dim=[64, 128],
        dtype=[BF16, F16],
        mask=["none", "random"],
    ),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), causal=[True, False], dim=[64, 128], mask=["none", "random"]),
    *table(replace(BASE, lengths=TWINS), strides=["interleaved", "head-major", "wide-gaps"], dim=[64, 128]),
]
PAGES = table(
    replace(BASE, lengths=CHUNKS, layout=PAGED), page_size=[1, 7, 16, 24, 64, 128, 192, 256], mask=["none", "random"]
)
HEADS = [
    replace(BASE, lengths=((141, 400),), hq=hq, hkv=hkv, mask=mask, mask_heads=heads, dim=dim)
    for hq, hkv in ((1, 1), (4, 4), (4, 1), (8, 2), (6, 2), (7, 7), (32, 8))
    for mask, heads in (("none", "q"), ("random", "q"), ("random", "kv"), ("random", "one"))
    for dim in (64, 128)
]
MASKS = [
    *table(
        replace(BASE, lengths=((300, 700),)),
        mask=["random", "sparse", "all", "diagonal", "empty", "mixed"],
        mask_heads=["q", "kv", "one"],
        causal=[True, False],
    ),
    *table(replace(BASE, lengths=RAGGED, layout=PACKED), mask=["sparse", "all", "diagonal"], mask_heads=["q", "one"]),
]
OPTIONS = [
    *table(replace(BASE, lengths=((150, 500),)), softcap=[1.0, 10.0], mask=["none", "random"], dim=[64, 128]),
    *table(replace(BASE, lengths=((150, 500),)), scale=[0.0, 0.5, -0.1], mask=["none", "random"], dtype=[BF16, F16]),
]
LONG = [
    *table(replace(BASE, lengths=((130, 5000),), hq=2, hkv=1), mask=["none", "sparse"], dim=[64, 128]),
    replace(BASE, lengths=((1500, 1500),), hq=2, hkv=1, dim=128),
    replace(BASE, lengths=((300, 4300), (0, 0), (70, 4097), (128, 1)), layout=PAGED_PACKED, hq=2, hkv=1, mask="sparse"),
    replace(BASE, lengths=((700, 700),) * 2, hq=32, hkv=8),  # more (tile, head) pairs than multiprocessors
]

#: For the mask between two passes: more than a batch of results, several words, rows of 33 words, and an order that is
#: sorted by length in windows.
FURTHER = [
    *(
        replace(BASE, lengths=((141, 700),), hq=hq, hkv=hkv, mask=mask, mask_heads=heads)
        for hq, hkv in ((1, 1), (4, 1), (8, 2), (6, 2), (32, 8))
        for mask, heads in (("none", "q"), ("random", "q"), ("sparse", "kv"), ("mixed", "one"))
    ),
    *table(replace(BASE, lengths=((130, 5000),), hq=2, hkv=1), mask=["mixed"], dim=[64, 128]),
    *table(replace(BASE, lengths=((140, 131_500),), hq=1, hkv=1, layout=PAGED, page_size=256), mask=["none", "sparse"]),
]

WITH_FORMS = pytest.mark.parametrize("form", FORMS)
WITH_PASSES = pytest.mark.parametrize("passes", [1, 2])


def random_case(seed: int, longest: int) -> tuple[Case, str, dict[str, Any]]:
    """A case, a form, and parameters of a policy; lengths of up to ``longest`` tokens."""
    rng = random.Random(seed)

    def length() -> int:
        return rng.choice((rng.choice((0, *EDGES)), rng.randint(0, longest)))

    layout = rng.choice([BATCHED, PACKED, PAGED, PAGED_PACKED])
    count = rng.randint(1, 4)
    lengths = [(length(), length()) for _ in range(count)]
    if layout == BATCHED:
        lengths = [lengths[0]] * count
    elif layout == PAGED:
        lengths = [(lengths[0][0], n) for _, n in lengths]
    hkv = rng.choice((1, 1, 2, 3))
    case = Case(
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
        block_m=128,
        block_n=128,
        mask=rng.choice(("none", "random", "random", "sparse", "all", "diagonal", "mixed")),
        mask_heads=rng.choice(("q", "kv", "one")),
        seed=seed,
    )
    options = {"sink_blocks": rng.choice((0, 1, 1, 2)), "window_blocks": rng.choice((1, 1, 2))}
    return case, rng.choice(FORMS), options
