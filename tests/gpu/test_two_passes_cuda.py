"""ExactSkip in two passes on CUDA: the mask between them and the result, against the oracle and the CPU kernel."""

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
from bsfa.policies import ExactSkip, Fixed, RelativeMax, StaticPattern
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, Inputs, poison, square, table
from skip_cases import check_two_passes, first_masks, make, masks_of, policy_for

#: "cpu" runs all but the tests of CUDA itself on the CPU kernel, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda":
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device", allow_module_level=True)
    if "skip_mask" not in bsfa._library.KERNELS["cuda"]:
        pytest.skip("this build has no skip_mask on CUDA", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")

LSE_CONSTANT = 1e-5
#: Relative distance to the threshold that every decision of a case has, as in test_exact_skip_cuda.py.
MARGIN, MARGIN_SOFTCAP = 2e-5, 1e-3

FORMS = ("absolute", "relative")
BASE = Case(hq=4, hkv=2, dim=64, dtype=BF16, block_m=128, block_n=128)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (128, 128), (70, 0), (37, 300), (129, 257), (100, 30), (0, 0))
CHUNKS = ((150, 387), (150, 256), (150, 150), (150, 20))
TWINS = ((141, 400), (141, 400))

EDGES = (1, 64, 65, 127, 128, 129, 193, 256, 257, 448)
PREFIXES = ((1, 300), (63, 329), (64, 448), (127, 300), (128, 256), (129, 385), (33, 390))
NOTHING_SEEN = ((100, 37), (130, 1), (300, 129), (70, 0), (0, 70), (0, 0))
CASES = [
    *table(BASE, lengths=square(*EDGES), causal=[True, False]),
    *table(BASE, lengths=[(pair,) for pair in PREFIXES + NOTHING_SEEN], causal=[True, False], dim=[64, 128]),
    *table(
        replace(BASE, lengths=RAGGED),
        layout=[PACKED, PAGED_PACKED],
        causal=[True, False],
        dtype=[BF16, F16],
        mask=["none", "random"],
    ),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), page_size=[1, 7, 24, 64, 256], mask=["none", "random"]),
    *table(replace(BASE, lengths=TWINS), strides=["interleaved", "head-major", "wide-gaps"], dim=[64, 128]),
    *(
        replace(BASE, lengths=((141, 700),), hq=hq, hkv=hkv, mask=mask, mask_heads=heads)
        for hq, hkv in ((1, 1), (4, 1), (8, 2), (6, 2), (32, 8))
        for mask, heads in (("none", "q"), ("random", "q"), ("sparse", "kv"), ("mixed", "one"))
    ),
    *table(replace(BASE, lengths=((300, 700),)), mask=["all", "diagonal", "empty"], mask_heads=["q", "kv", "one"]),
    *table(replace(BASE, lengths=((150, 500),)), softcap=[1.0, 10.0], mask=["none", "random"]),
    *table(replace(BASE, lengths=((150, 500),)), scale=[0.0, 0.5, -0.1], mask=["none", "random"]),
    # More than a batch of results, several words, more pairs than multiprocessors.
    *table(replace(BASE, lengths=((130, 5000),), hq=2, hkv=1), mask=["none", "sparse", "mixed"], dim=[64, 128]),
    replace(BASE, lengths=((1500, 1500),), hq=2, hkv=1, dim=128),
    replace(BASE, lengths=((300, 4300), (0, 0), (70, 4097), (128, 1)), layout=PAGED_PACKED, hq=2, hkv=1, mask="sparse"),
    replace(BASE, lengths=((700, 700),) * 2, hq=32, hkv=8),
    # Mask rows of 33 words, and an order that is sorted by length in windows.
    *table(replace(BASE, lengths=((140, 131_500),), hq=1, hkv=1, layout=PAGED, page_size=256), mask=["none", "sparse"]),
]
WITH_FORMS = pytest.mark.parametrize("form", FORMS)


def check(inputs: Inputs, policy: ExactSkip, masks: list[np.ndarray] | None = None) -> np.ndarray:
    there = inputs.to(DEVICE)
    g = inputs.geometry
    poison((g.num_rows, inputs.case.hq, -(-g.num_blocks // 32)), (g.num_rows, inputs.case.hq), device=DEVICE)
    margin = MARGIN_SOFTCAP if inputs.case.softcap else MARGIN
    return check_two_passes(inputs, there, policy, masks, lse_constant=LSE_CONSTANT, margin=margin)


@WITH_FORMS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_pass_is_the_rule(case: Case, form: str) -> None:
    inputs = make(case)
    masks = masks_of(inputs)
    check(inputs, policy_for(inputs, masks, form, passes=2), masks)


@WITH_FORMS
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 3), (2, 1), (2, 2), (100, 1), (1, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_sinks_and_windows(causal: bool, sinks: int, window: int, form: str) -> None:
    inputs = make(replace(BASE, lengths=((300, 1000),), causal=causal))
    policy = policy_for(inputs, None, form, sink_blocks=sinks, window_blocks=window, passes=2)
    assert (check(inputs, policy)[:, 1].sum() == 0) == (100 in (sinks, window))


@WITH_FORMS
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_a_threshold_for_every_position(layout: str, form: str) -> None:
    lengths = ((300, 900), (300, 900)) if layout == BATCHED else ((300, 900), (300, 420))
    inputs = make(replace(BASE, lengths=lengths, layout=layout))
    reference = torch.tensor([[-1.7, -0.2, 0.9], [-1.0, 0.6, 0.8], [-torch.inf, 0.5, 0.3], [-5.0, 0.1, 0.73]])
    reference = reference if form == "absolute" else reference - 1.5
    policy = ExactSkip(form=form, ratio=1.0, reference=reference, positions=(100, 300, 700), passes=2)
    there = inputs.to(DEVICE)
    counts = check_two_passes(inputs, there, policy, lse_constant=LSE_CONSTANT, margin=2e-6)
    assert counts[:, 1].sum() > 0


def random_case(seed: int) -> tuple[Case, str, dict[str, Any]]:
    rng = random.Random(seed)

    def length() -> int:
        return rng.choice((rng.choice((0, *EDGES)), rng.randint(0, 900)))

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


@pytest.mark.parametrize("seed", range(150))
def test_random_cases(seed: int) -> None:
    """Against the oracle; the same bits again; the CPU kernel's mask; the counts of one pass."""
    case, form, options = random_case(seed)
    inputs = make(case)
    masks = masks_of(inputs)
    policy = policy_for(inputs, masks, form, passes=2, **options)
    check(inputs, policy, masks)
    there, moved = inputs.to(DEVICE), policy.to(torch.device(DEVICE))
    (one, skips), (again, _) = (first_masks(there, moved, masks) for _ in range(2))
    on_cpu, cpu_skips = first_masks(inputs, policy, masks)
    assert torch.equal(one.words, again.words) and torch.equal(one.words.cpu(), on_cpu.words)
    assert torch.equal(skips.cpu(), cpu_skips)
    within = None if masks is None else there.block_mask(masks)
    arguments = {"skip": replace(moved, passes=1), "return_skips": True, **there.maths, **there.layout}
    single = bsfa.block_sparse_attention(there.q, there.k, there.v, within, **arguments)[2]
    assert torch.equal(single[:, 0], skips[:, 0]) and bool((single[:, 1] >= skips[:, 1]).all())


@WITH_FORMS
def test_chunks_are_the_whole(form: str) -> None:
    inputs = make(replace(BASE, lengths=((900, 900),), dim=128))
    policy = policy_for(inputs, None, form, passes=2).to(torch.device(DEVICE))
    there = inputs.to(DEVICE)
    want, want_lse, whole = there.run(policy, return_lse=True, return_info=True)
    met = torch.zeros_like(whole.skips)
    for begin, end in ((0, 128), (128, 640), (640, 900)):
        chunk = (there.q[:, begin:end], there.k[:, :end], there.v[:, :end])
        out, lse, info = bsfa.attention(*chunk, policy=policy, return_lse=True, return_info=True)
        torch.testing.assert_close(out, want[:, begin:end], rtol=2**-7, atol=2**-8)
        torch.testing.assert_close(lse, want_lse[:, :, begin:end], rtol=1e-5, atol=1e-5)
        met += info.skips
    assert torch.equal(met, whole.skips) and int(met[:, 1].sum()) > 0


@WITH_FORMS
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_neighbouring_sequences_have_no_say(value: float, form: str) -> None:
    lengths = ((65, 400), (3, 300), (1, 330), (64, 400), (128, 428), (37, 300))
    inputs = make(replace(BASE, lengths=lengths, layout=PACKED))
    policy = policy_for(inputs, None, form, passes=2).to(torch.device(DEVICE))
    clean = first_masks(inputs.to(DEVICE), policy)[0].to_rows().cpu()
    kept = [[t.clone() for t in tensors] for tensors in (inputs.queries, inputs.keys)]
    for spoiled in (0, 1):
        for tensors, copies in zip((inputs.queries, inputs.keys), kept, strict=True):
            for b, tokens in enumerate(tensors):
                tokens.copy_(copies[b]) if b % 2 != spoiled else tokens.fill_(value)
        inputs.lay_out()
        rows = first_masks(inputs.to(DEVICE), policy)[0].to_rows().cpu()
        for b in range(len(lengths)):
            if b % 2 != spoiled:
                assert np.array_equal(inputs.rows_of_sequence(rows, b), inputs.rows_of_sequence(clean, b))


def test_a_nan_logit_keeps_its_block() -> None:
    inputs = make(replace(BASE, lengths=((128, 1024),), hkv=4, dim=128))
    inputs.keys[0][300, 1] = NAN  # block 2 of head 1
    inputs.lay_out()
    policy = ExactSkip.absolute(1e4, passes=2).to(torch.device(DEVICE))
    mask, skips = first_masks(inputs.to(DEVICE), policy)
    assert mask.to_rows()[0, 1].nonzero().flatten().tolist() == [0, 2, 7]
    assert (skips[0] - skips[1]).tolist() == [0, 2]


@pytest.mark.parametrize("threshold", [-torch.inf, NAN, -1e30])
@WITH_FORMS
def test_skipping_nothing_keeps_all(threshold: float, form: str) -> None:
    inputs = make(replace(BASE, lengths=TWINS, dim=128)).to(DEVICE)
    cuts = torch.full((4, 1), threshold, device=DEVICE)
    rows = inputs.geometry.num_rows
    sizes = (inputs.max_q, inputs.max_k, rows, None, 128, 128, True, 0.125, 0.0)
    words, counts, skips = torch.ops.bsfa.skip_mask(
        inputs.q, inputs.k, None, None, None, None, *sizes, cuts, form, 1, 1
    )
    visible = inputs.geometry.visible_blocks()
    assert torch.equal(counts, visible[:, None].expand(-1, 4)) and not skips[:, 1].any()
    assert torch.equal(words, ((1 << visible.long()) - 1).int()[:, None, None].expand_as(words))


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


@WITH_FORMS
@pytest.mark.parametrize("within", ["none", "static", "fixed", "relative-max"])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_end_to_end_without_synchronisation(layout: str, within: str, form: str) -> None:
    lengths = RAGGED if layout in (PACKED, PAGED_PACKED) else CHUNKS if layout == PAGED else TWINS
    inputs = make(replace(BASE, lengths=lengths, layout=layout, mask="random"))
    there = inputs.to(DEVICE)
    inner = {
        "none": None,
        "static": StaticPattern(sink_blocks=1, window_blocks=2),
        "fixed": Fixed(mask=there.block_mask(masks_of(inputs))),  # type: ignore[arg-type]
        "relative-max": RelativeMax(alpha=0.5, last_tiles=0),
    }[within]
    masks = None
    if inner is not None:
        rows = there.run(inner, return_info=True)[1].mask.to_rows().cpu()
        masks = [inputs.rows_of_sequence(rows, b)[:, :, : -(-n // 128)] for b, (_, n) in enumerate(lengths)]
    policy = policy_for(inputs, masks, form, within=inner, passes=2)
    want = check(inputs, replace(policy, within=None), masks)
    moved = policy.to(torch.device(DEVICE))
    there.run(moved)
    with no_synchronisation():
        _, info = there.run(moved, return_info=True)
        density = info.density()
    assert np.array_equal(info.skips.cpu().numpy(), want) and 0 < float(density) <= 1 and info.dense_reason is None


@cuda_only
@WITH_FORMS
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph(masked: bool, form: str) -> None:
    """One graph serves other lengths, pages, masks and values, and counts anew at each replay."""
    case = replace(
        BASE, lengths=((65, 500), (0, 0), (100, 330)), layout=PAGED_PACKED, mask="random" if masked else "none"
    )
    first, second = make(case), make(replace(case, lengths=((100, 400), (65, 440), (0, 0)), seed=1))
    policies = [policy_for(inputs, masks_of(inputs), form, passes=2) for inputs in (first, second)]
    wanted = [check(inputs, p, masks_of(inputs)) for inputs, p in zip((first, second), policies, strict=True)]
    static = first.to(DEVICE)
    static.max_q = 128
    masks = masks_of(first)
    mask = None if masks is None else static.block_mask(masks)
    policy = policies[0].to(torch.device(DEVICE))
    values = policy.reference if form == "absolute" else policy.ratio
    assert isinstance(values, Tensor)

    def run() -> tuple[Tensor, ...]:
        options = {"skip": policy, "return_skips": True, **static.maths, **static.layout}
        return bsfa.block_sparse_attention(static.q, static.k, static.v, mask, **options)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for i in (1, 0, 1):
        inputs = (first, second)[i]
        for name in ("q", "k", "v", "cu_q", "seqlens_k"):
            getattr(static, name).copy_(getattr(inputs, name))
        static.block_table.fill_(-7)
        static.block_table[:, : inputs.block_table.shape[1]] = inputs.block_table.to(DEVICE)
        masks = masks_of(inputs)
        if mask is not None:
            assert masks is not None
            mask.words.copy_(inputs.block_mask(masks).words)
        values.copy_(policies[i].reference if form == "absolute" else policies[i].ratio)  # type: ignore[arg-type]
        for t in result:
            t.fill_(-5)
        graph.replay()
        torch.cuda.synchronize()
        there = inputs.to(DEVICE)
        within = None if masks is None else there.block_mask(masks)
        options = {"skip": policies[i].to(there.q.device), "return_skips": True, **there.maths, **there.layout}
        eager = bsfa.block_sparse_attention(there.q, there.k, there.v, within, **options)
        assert np.array_equal(result[2].cpu().numpy(), wanted[i])
        assert torch.equal(result[0], eager[0]) and torch.equal(result[1], eager[1])


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_opcheck(layout: str) -> None:
    inputs = make(replace(BASE, lengths=RAGGED if layout == PACKED else TWINS, layout=layout, mask="random"))
    there = inputs.to(DEVICE)
    for name in ("q", "k"):  # opcheck compares inputs with copies of themselves
        getattr(there, name).nan_to_num_()
    words = there.block_mask(masks_of(inputs)).words  # type: ignore[arg-type]
    where = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k, len(words))
    cuts = torch.full((4, 3), 0.5, device=DEVICE)
    for within in (None, words):
        arguments = (there.q, there.k, *where, within, 128, 128, True, 0.125, 0.0, cuts, "relative", 1, 1)
        torch.library.opcheck(torch.ops.bsfa.skip_mask.default, arguments)


@cuda_only
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": F32}, "'skip_mask'.*float32.*bfloat16, float16"),
        ({"dim": 96}, "'skip_mask'.*head_dim 96"),
        ({"dim": 64, "dim_v": 128}, "head_dim 64 of q and k and 128 of v"),
        ({"block_n": 64}, "128 x 64 .*128 x 128"),
    ],
    ids=str,
)
def test_unsupported_calls_are_named(options: dict[str, Any], message: str) -> None:
    case = replace(BASE, lengths=TWINS, **options)
    with pytest.raises(bsfa.UnsupportedError, match=message):
        case.make().to(DEVICE).run(ExactSkip(ratio=0.1, block_n=case.block_n, passes=2))
