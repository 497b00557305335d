"""ExactSkip's bounds on CUDA: the same bits and counts as without them, and what they leave out is skipped for certain.

That attention without bounds is right is the matter of test_exact_skip_cuda.py; here it is what results are held
against. What the mask of the bounds leaves out is held against the oracle in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bsfa
from bounds_cases import (
    DEVICE,
    anywhere,
    bits,
    bound_masks,
    check,
    check_same,
    lone_pairs,
    planted,
    planted_policy,
    same,
    with_bounds,
)
from bsfa.policies import ExactSkip, Fixed, RelativeMax, StaticPattern
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, Inputs, table
from skip_cases import make, masks_of, policy_for
from skip_grid import (
    BASE,
    CHUNKS,
    FURTHER,
    HEADS,
    LAYOUTS,
    LENGTHS,
    LONG,
    MASKS,
    OPTIONS,
    PAGES,
    RAGGED,
    TWINS,
    WITH_FORMS,
    WITH_PASSES,
    Result,
    no_synchronisation,
    random_case,
    replays,
    skip,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if not {"skip_attention", "skip_mask", "bound_mask"} <= bsfa._library.KERNELS["cuda"]:
    pytest.skip("this build has no bounds for skipping", allow_module_level=True)

INF = math.inf


def check_case(case: Case, form: str, **options: Any) -> tuple[Tensor, Tensor]:
    inputs = make(case)
    masks = masks_of(inputs)
    return check(inputs, policy_for(inputs, masks, form, **options), masks)


# --- the grid ---------------------------------------------------------------------------------------------------------


@WITH_FORMS
@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(case: Case, form: str) -> None:
    check_case(case, form)


@WITH_FORMS
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case, form: str) -> None:
    check_case(case, form)


@WITH_FORMS
@pytest.mark.parametrize("case", PAGES, ids=str)
def test_pages(case: Case, form: str) -> None:
    check_case(case, form)


@WITH_FORMS
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads(case: Case, form: str) -> None:
    check_case(case, form)


@WITH_FORMS
@pytest.mark.parametrize("case", MASKS, ids=str)
def test_masks(case: Case, form: str) -> None:
    """Also masks without a tile's diagonal: the order of visits begins with the last block that they keep."""
    check_case(case, form)


@WITH_FORMS
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: Case, form: str) -> None:
    check_case(case, form)


@WITH_FORMS
@pytest.mark.parametrize("case", [*LONG, *FURTHER], ids=str)
def test_long_sequences_and_many_heads(case: Case, form: str) -> None:
    check_case(case, form)


@WITH_FORMS
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 3), (1, 2), (2, 1), (2, 2), (100, 1), (1, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_sinks_and_windows(causal: bool, sinks: int, window: int, form: str) -> None:
    options = {"sink_blocks": sinks, "window_blocks": window}
    _, bounded = check_case(replace(BASE, lengths=((300, 1000),), causal=causal), form, **options)
    assert not bounded[:, 1].any() or 100 not in (sinks, window)


@WITH_FORMS
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_a_threshold_for_every_position(layout: str, form: str) -> None:
    """Knots within tiles; sequences of a batch sit at different positions; a head that skips nothing."""
    lengths = ((300, 900), (300, 900)) if layout == BATCHED else ((300, 900), (300, 420))
    inputs = make(replace(BASE, lengths=lengths, layout=layout))
    reference = torch.tensor([[-1.7, -0.2, 0.9], [-1.0, 0.6, 0.8], [-INF, 0.5, 0.3], [-5.0, 0.1, 0.73]])
    reference = reference if form == "absolute" else reference - 1.5
    check(inputs, ExactSkip(form=form, ratio=1.0, reference=reference, positions=(100, 300, 700)))


@pytest.mark.parametrize("seed", range(150))
def test_random_cases(seed: int) -> None:
    case, form, options = random_case(seed, longest=900)
    check_case(case, form, **options)


# --- planted: how much bounds leave out -------------------------------------------------------------------------------

PLANTED = Case(lengths=((1100, 1100),), hq=4, hkv=2, dim=128, dtype=BF16, block_m=128, block_n=128)
PLANTED_CASES = [
    *table(PLANTED, dim=[64, 128], dtype=[BF16, F16], causal=[True, False]),
    replace(PLANTED, hq=8, hkv=1),
    replace(PLANTED, lengths=((700, 1100), (1, 900), (0, 0), (130, 130), (513, 1025)), layout=PACKED),
    *table(replace(PLANTED, lengths=((300, 1100), (300, 900)), layout=PAGED), page_size=[16, 24, 128]),
]


@WITH_FORMS
@pytest.mark.parametrize("percent", [0, 30, 70, 90, 99])
@pytest.mark.parametrize("case", PLANTED_CASES, ids=str)
def test_nearly_all_that_is_far_below_is_left_out(case: Case, percent: int, form: str) -> None:
    """Fails for bounds that keep all, or that are loose."""
    skips, bounded = check(planted(case, percent), planted_policy(form))
    left_out, skipped = int(bounded[:, 1].sum()), int(skips[:, 1].sum())
    assert left_out >= 0.95 * skipped and (skipped > 0 or percent == 0), (left_out, skipped)
    assert skipped <= (percent / 100 + 0.2) * int(skips[:, 0].sum())


@pytest.mark.parametrize("dim", [64, 128])
def test_one_row_and_one_key_keep_a_block(dim: int) -> None:
    """Wherever in the block they are: a quarter of it is looked at first, and does not show most of them."""
    inputs, want = lone_pairs(dim)
    policy = planted_policy("absolute")
    check_same(inputs, policy)
    assert (inputs.rows_of_sequence(bound_masks(inputs, policy)[0], 0) == want.numpy()).all()


@WITH_FORMS
@pytest.mark.parametrize("percent", [50, 90])
def test_a_tile_leaves_out_what_all_of_its_groups_skip(percent: int, form: str) -> None:
    inputs = planted(PLANTED, percent, alike=False)
    skips, bounded = check(inputs, planted_policy(form))
    together = skip(inputs, planted_policy(form, passes=2), None, DEVICE)[2].cpu()
    assert 0.95 * int(together[:, 1].sum()) <= int(bounded[:, 1].sum()) <= int(together[:, 1].sum())
    assert int(together[:, 1].sum()) < int(skips[:, 1].sum())


@WITH_FORMS
@pytest.mark.parametrize("mask", ["random", "sparse", "diagonal", "mixed"])
def test_planted_on_a_mask(mask: str, form: str) -> None:
    inputs = planted(replace(PLANTED, mask=mask), 90)
    masks = masks_of(inputs)
    skips, bounded = check(inputs, planted_policy(form), masks)
    if mask == "random":
        assert int(bounded[:, 1].sum()) >= 0.6 * int(skips[:, 1].sum()) > 0  # of a tile never the first one met


# --- no clear decisions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_random_thresholds(seed: int) -> None:
    case, form, options = random_case(seed + 1000, longest=700)
    inputs = make(case)
    masks = masks_of(inputs)
    check_same(inputs, anywhere(inputs, masks, form, seed, **options), masks)


@WITH_FORMS
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-3, 0.0, -0.0, 0.3, -0.088, -1.0, 1.7, 40.0, -1e4])
def test_softmax_scales(scale: float, seed: int, form: str) -> None:
    inputs = make(replace(BASE, lengths=((300, 900),), scale=scale, dim=(64, 128)[seed % 2], seed=seed))
    check_same(inputs, anywhere(inputs, None, form, seed))


@WITH_FORMS
@pytest.mark.parametrize("softcap", [0.5, 5.0, 30.0])
@pytest.mark.parametrize("scale", [None, -0.1, 3.0])
def test_softcaps(scale: float | None, softcap: float, form: str) -> None:
    for seed in range(3):
        inputs = make(replace(BASE, lengths=((300, 900),), scale=scale, softcap=softcap, seed=seed, dim=128))
        check_same(inputs, anywhere(inputs, None, form, seed))


@WITH_FORMS
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("of_q", "of_k"),
    [(1e4, 1.0), (1.0, 1e4), (1e4, 1e4), (1e4, 1e-6), (1e-6, 1e4), (1e-6, 1.0), (1.0, 1e-6), (1e-6, 1e-6)],
)
def test_magnitudes(of_q: float, of_k: float, dtype: torch.dtype, form: str) -> None:
    """Beyond what 8 bits can hold, and below it; some tokens, dims and heads are a hundred times smaller, or zero."""
    inputs = make(replace(BASE, lengths=((300, 900),), dtype=dtype, dim=128))
    least = 5e-2 if dtype == F16 else 1.0  # no infinities in float16
    for tokens, factor in ((inputs.queries[0], of_q), (inputs.keys[0], of_k)):
        tokens.copy_(tokens.float() * (factor * least if factor > 1 else factor))
        tokens[5::7] *= 0.01
        tokens[3::11] = 0
        tokens[:, 1] *= 0.01
        tokens[:, :, 2::3] *= 0.01
    inputs.lay_out()
    for seed in range(3):
        check_same(inputs, anywhere(inputs, None, form, seed))


@WITH_FORMS
@pytest.mark.parametrize("zero", ["q", "k", "both"])
def test_zeros(zero: str, form: str) -> None:
    """Every logit is 0: what is compared lies at 0 exactly, and 0 is not below 0."""
    inputs = make(replace(BASE, lengths=((300, 900),)))
    for name, tokens in (("q", inputs.queries[0]), ("k", inputs.keys[0])):
        if zero in (name, "both"):
            tokens.zero_()
    inputs.lay_out()
    reference = torch.tensor([[0.0], [1e-30], [-1e-30], [0.5]])
    policy = ExactSkip(ratio=1.0, form=form, reference=reference, positions=(0,))
    skips = check_same(inputs, policy)
    assert not skips[0, 1] and int(skips[3, 1]) > 0


@WITH_FORMS
def test_thresholds_of_any_kind(form: str) -> None:
    """Past the checks, as a tensor on a GPU may be."""
    inputs = make(replace(BASE, lengths=((300, 1500),), hq=8, dim=128))
    values = [-INF, NAN, INF, 1e30, -1e30, 3.0, 0.0, -3e38]
    reference = torch.tensor(values, device=DEVICE).reshape(8, 1)
    policy = ExactSkip(ratio=1.0, form=form, reference=reference, positions=(0,))
    skips = check_same(inputs, policy)
    assert not skips[[0, 1], 1].any() and int(skips[2, 1]) > 0
    _, bounded = bound_masks(inputs, policy)
    assert not bounded[[0, 1], 1].any()


def test_cuts_above_the_running_maximum() -> None:
    """What is skipped does not raise it in one pass; in two it does. Bounds leave nothing out then."""
    for seed in range(10):
        inputs = make(replace(BASE, lengths=((300, 1500),), dim=(64, 128)[seed % 2], seed=seed))
        reference = torch.tensor([[0.4], [0.9], [0.2], [2.5]])
        check_same(inputs, ExactSkip(ratio=1.0, reference=reference, positions=(0,)))
    inputs = planted(PLANTED, 90)
    policy = ExactSkip(ratio=1.0, reference=torch.full((1, 1), 1.0), positions=(0,))
    skips = check_same(inputs, policy)
    assert int(skips[:, 1].sum()) > 0 and not bound_masks(inputs, policy)[1][:, 1].any()


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@WITH_FORMS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dim", [64, 128])
def test_queries_that_are_no_numbers(dim: int, value: float, form: str) -> None:
    """A tile with one keeps every block of that head; all other rows of the mask stay as they were."""
    inputs = planted(replace(PLANTED, dim=dim), 90)
    policy = planted_policy(form)
    clean, counts = bound_masks(inputs, policy)
    inputs.queries[0][700, 1, 20] = value  # tile 5
    inputs.lay_out()
    check_same(inputs, policy)
    rows, bounded = bound_masks(inputs, policy)
    assert rows[5, 1, :6].all() and not clean[5, 1, :6].all()
    rows[5, 1] = clean[5, 1]
    assert torch.equal(rows, clean) and torch.equal(bounded[[0, 2, 3]], counts[[0, 2, 3]])
    assert bounded[1, 0] == counts[1, 0] and bounded[1, 1] < counts[1, 1]


@WITH_FORMS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dim", [64, 128])
def test_keys_that_are_no_numbers(dim: int, value: float, form: str) -> None:
    """A block with one is kept by every tile and head of the KV head."""
    inputs = planted(replace(PLANTED, dim=dim), 90)
    policy = planted_policy(form)
    clean, _ = bound_masks(inputs, policy)
    inputs.keys[0][300, 1, 20] = value  # block 2, of query heads 2 and 3
    inputs.lay_out()
    check_same(inputs, policy)
    rows, bounded = bound_masks(inputs, policy)
    assert rows[2:, 2:, 2].all() and not clean[2:, 2:, 2].all()
    if form == "absolute":  # of the relative form a +inf raises the running maxima
        rows[:, 2:, 2] = clean[:, 2:, 2]
        assert torch.equal(rows, clean)
    assert torch.equal(rows[:, :2], clean[:, :2]) and int(bounded[:, 1].sum()) > 0


@WITH_FORMS
@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
@pytest.mark.parametrize("value", [NAN, INF])
def test_neighbouring_sequences_have_no_say(layout: str, value: float, form: str) -> None:
    """Rows of other sequences lie in the same tile of memory: whatever they hold, masks and results stay."""
    lengths = ((65, 400), (3, 300), (1, 330), (64, 400), (128, 428), (37, 300), (129, 457), (100, 430))
    inputs = make(replace(BASE, lengths=lengths, layout=layout))
    policy = policy_for(inputs, None, form)
    kept = [[t.clone() for t in tensors] for tensors in (inputs.queries, inputs.keys, inputs.values)]

    def by_sequence() -> list[list[Tensor]]:
        check_same(inputs, policy)
        out, lse, _ = skip(inputs, with_bounds(policy), None, DEVICE)
        rows = bound_masks(inputs, policy)[0]
        found = [[inputs.of_sequence(out, b), inputs.lse_of_sequence(lse, b)] for b in range(len(inputs))]
        return [[*x, torch.from_numpy(inputs.rows_of_sequence(rows, b))] for b, x in enumerate(found)]

    clean = by_sequence()
    for spoiled in (0, 1):
        for tensors, copies in zip((inputs.queries, inputs.keys, inputs.values), kept, strict=True):
            for b, tokens in enumerate(tensors):
                tokens.copy_(copies[b]) if b % 2 != spoiled else tokens.fill_(value)
        inputs.lay_out()
        for b, found in enumerate(by_sequence()):
            if b % 2 != spoiled:
                assert all(torch.equal(bits(x), bits(y)) for x, y in zip(found, clean[b], strict=True))


# --- the functions ----------------------------------------------------------------------------------------------------


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("within", ["none", "static", "fixed", "relative-max"])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_end_to_end_without_synchronisation(layout: str, within: str, form: str, passes: int) -> None:
    lengths = RAGGED if layout in (PACKED, PAGED_PACKED) else CHUNKS if layout == PAGED else TWINS
    inputs = make(replace(BASE, lengths=lengths, layout=layout, mask="random"))
    there = inputs.to(DEVICE)
    inner = {
        "none": None,
        "static": StaticPattern(sink_blocks=1, window_blocks=2),
        "fixed": Fixed(mask=there.block_mask(masks_of(inputs))),  # type: ignore[arg-type]
        "relative-max": RelativeMax(alpha=0.5, last_tiles=0),
    }[within]
    policy = policy_for(inputs, None, form, within=inner, passes=passes).to(torch.device(DEVICE))
    want, want_lse, want_info = there.run(policy, return_lse=True, return_info=True)
    out = torch.full((*there.q.shape[:-1], there.v.shape[-1]), NAN, dtype=BF16, device=DEVICE)
    there.run(with_bounds(policy))  # what a first call prepares is not at issue
    with no_synchronisation(DEVICE):
        got, lse, info = there.run(with_bounds(policy), return_lse=True, return_info=True, out=out)
        density = info.density()
    assert got is out and same((out, lse, info.skips), (want, want_lse, want_info.skips))
    assert info.dense_reason is None and torch.equal(density, want_info.density())
    assert (info.mask is None) == (inner is None)
    assert inner is None or torch.equal(info.mask.words, want_info.mask.words)  # type: ignore[union-attr]


@WITH_PASSES
@WITH_FORMS
def test_chunks_are_the_whole(form: str, passes: int) -> None:
    """Chunks at edges of tiles give the counts of the whole prompt, and each the bits without bounds."""
    inputs = planted(replace(PLANTED, lengths=((900, 900),)), 70)
    policy = planted_policy(form, passes=passes).to(torch.device(DEVICE))
    there = inputs.to(DEVICE)
    whole = there.run(with_bounds(policy), return_info=True)[1].skips
    met = torch.zeros_like(whole)
    for begin, end in ((0, 128), (128, 640), (640, 900)):
        chunk = (there.q[:, begin:end], there.k[:, :end], there.v[:, :end])
        results = []
        for p in (policy, with_bounds(policy)):
            out, lse, info = bsfa.attention(*chunk, policy=p, return_lse=True, return_info=True)
            results.append((out, lse, info.skips))
        assert same(*results)
        met += results[1][2]
    assert torch.equal(met, whole) and int(met[:, 1].sum()) > 0


def test_the_same_bits_again() -> None:
    for seed in range(20):
        case, form, options = random_case(seed + 500, longest=900)
        inputs = make(case)
        masks = masks_of(inputs)
        policy = with_bounds(policy_for(inputs, masks, form, passes=1 + seed % 2, **options))
        first, rows = skip(inputs, policy, masks, DEVICE), bound_masks(inputs, policy, masks)
        assert same(skip(inputs, policy, masks, DEVICE), first)
        assert all(torch.equal(a, b) for a, b in zip(bound_masks(inputs, policy, masks), rows, strict=True))


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph(masked: bool, form: str, passes: int) -> None:
    """One graph serves other lengths, pages, masks and values, and counts anew at each replay."""
    for inputs, policy, masks, result in replays(form, masked, passes=passes, bounds=True):
        assert same(result, skip(inputs, replace(policy, bounds=False), masks, DEVICE))


@WITH_PASSES
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_fullgraph(dynamic: bool | None, passes: int) -> None:
    torch.compiler.reset()
    policy = ExactSkip.absolute(1.0, bounds=True, passes=passes).to(torch.device(DEVICE))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Result:
        out, lse, info = bsfa.attention(q, k, v, policy=policy, return_lse=True, return_info=True)
        return out, lse, info.skips

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for length in (300, 257, 400):
        inputs = make(replace(BASE, lengths=((length, length),) * 2)).to(DEVICE)
        assert same(compiled(inputs.q, inputs.k, inputs.v), run(inputs.q, inputs.k, inputs.v))


# --- the operator -----------------------------------------------------------------------------------------------------


def arguments_of(there: Inputs, rows: int, within: Tensor | None = None, form: str = "relative") -> tuple[Any, ...]:
    where = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k, rows)
    cuts = torch.full((there.case.hq, 3), -0.5, device=DEVICE)
    return (there.q, there.k, *where, within, 128, 128, True, 0.125, 0.0, cuts, form, 1, 1)


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_opcheck(layout: str) -> None:
    inputs = make(replace(BASE, lengths=RAGGED if layout == PACKED else TWINS, layout=layout, mask="random"))
    there = inputs.to(DEVICE)
    for name in ("q", "k"):  # opcheck compares inputs with copies of themselves
        getattr(there, name).nan_to_num_()
    words = there.block_mask(masks_of(inputs)).words  # type: ignore[arg-type]
    for within in (None, words):
        torch.library.opcheck(torch.ops.bsfa.bound_mask.default, arguments_of(there, len(words), within))


def test_the_operator_raises_rather_than_crash() -> None:
    inputs = make(replace(BASE, lengths=((300, 300),)))
    there = inputs.to(DEVICE)
    for rows in (0, 2):
        with pytest.raises((RuntimeError, ValueError), match="rows"):
            torch.ops.bsfa.bound_mask(*arguments_of(there, rows))
    short = torch.zeros(2, 4, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match="mask_words has 2 rows"):
        torch.ops.bsfa.bound_mask(*arguments_of(there, 3, short))
    wide = make(replace(BASE, lengths=((300, 300),), dim=96)).to(DEVICE)
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        torch.ops.bsfa.bound_mask(*arguments_of(wide, 3))
    words, counts, skips = torch.ops.bsfa.bound_mask(*arguments_of(there, 3))
    assert words.shape == (3, 4, 1) and counts.shape == (3, 4) and skips.shape == (4, 2)


@pytest.mark.parametrize("lengths", [((0, 70),), ((70, 0),), ((0, 0),)])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_nothing_to_do(layout: str, lengths: tuple[tuple[int, int], ...]) -> None:
    inputs = replace(BASE, lengths=lengths, layout=layout).make()
    rows, bounded = bound_masks(inputs, ExactSkip.absolute(1e4))
    assert not rows.any() and not bounded.any()
    check_same(inputs, ExactSkip.absolute(1e4))


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_memory(layout: str) -> None:
    """A byte for each element of k (packed: of 128 tokens more a sequence), 16 for each block and head; the mask."""
    hq, hkv, dim = 4, 2, 128
    lengths = ((2048, 8192), (2048, 8192 if layout == BATCHED else 6000))
    inputs = replace(BASE, lengths=lengths, hq=hq, hkv=hkv, dim=dim, layout=layout, page_size=64).make()
    there = inputs.to(DEVICE)
    rows = inputs.geometry.num_rows
    arguments = arguments_of(there, rows)
    torch.ops.bsfa.bound_mask(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # blocks of the allocator may be larger
    torch.ops.bsfa.bound_mask(*arguments)
    torch.cuda.synchronize()
    tokens = sum(n for _, n in inputs.case.lengths) + 2 * 128 if layout == PACKED else 2 * 8192
    mask = rows * hq * 4 * (-(-8192 // 128 // 32) + 1)
    allowed = tokens * hkv * dim + (tokens // 128 + 2) * hkv * 16 + mask
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before <= allowed + 16 * 1024  # small change


@WITH_PASSES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": F32}, "'(skip_attention|skip_mask)'.*float32.*bfloat16, float16"),
        ({"dim": 96}, "'(skip_attention|skip_mask)'.*head_dim 96"),
        ({"block_n": 64}, "128 x 64 .*128 x 128"),
    ],
    ids=str,
)
def test_unsupported_calls_are_named(options: dict[str, Any], message: str, passes: int) -> None:
    case = replace(BASE, lengths=TWINS, **options)
    with pytest.raises(bsfa.UnsupportedError, match=message):
        case.make().to(DEVICE).run(ExactSkip(ratio=0.1, block_n=case.block_n, passes=passes, bounds=True))


@pytest.mark.parametrize("form", ["absolute", "relative"])
@pytest.mark.parametrize("dim", [64, 128])
def test_calls_in_a_row(dim: int, form: str) -> None:
    """Many tiles to a CTA, calls without and with bounds one after the other, and the host waits for none of them.

    Values are fetched before it is known whether they are wanted: slots and shared memory must outlive that.
    """
    inputs = planted(replace(BASE, lengths=((8192, 8192),), hq=16, hkv=4, dim=dim, dtype=BF16), 50).to(DEVICE)
    policy = planted_policy(form).to(torch.device(DEVICE, 0))
    policies = [policy, with_bounds(policy)]
    outs = [bsfa.attention(inputs.q, inputs.k, inputs.v, policy=policies[i % 2], return_lse=True) for i in range(24)]
    torch.cuda.synchronize()
    for out, lse in outs[1:]:
        assert torch.equal(bits(out), bits(outs[0][0]))
        assert torch.equal(bits(lse), bits(outs[0][1]))
