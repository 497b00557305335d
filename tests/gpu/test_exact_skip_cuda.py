"""Attention that skips by exact logits, on CUDA: against the oracle in float64, and against the CPU kernel.

``passes``: in one pass and in two; what is of two passes alone is in test_two_passes_cuda.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import ExactSkip, Fixed, RelativeMax, StaticPattern
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, ROUNDING, Case, Inputs
from skip_cases import check_skipping, first_masks, make, masks_of, policy_for
from skip_grid import (
    BASE,
    CHUNKS,
    FURTHER,
    HEADS,
    LAYOUTS,
    LENGTHS,
    LONG,
    LSE_CONSTANT,
    MASKS,
    OPTIONS,
    PAGES,
    RAGGED,
    TWINS,
    WITH_FORMS,
    WITH_PASSES,
    Result,
    check,
    no_synchronisation,
    random_case,
    replays,
    same,
)
from skip_grid import skip as skip_on

#: "cpu" runs all but the tests of CUDA itself on the CPU kernel, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda":
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device", allow_module_level=True)
    if not {"skip_attention", "skip_mask"} <= bsfa._library.KERNELS["cuda"]:
        pytest.skip("this build has no skipping attention on CUDA", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")


def skip(inputs: Inputs, policy: ExactSkip, masks: list[np.ndarray] | None, device: str = DEVICE) -> Result:
    return skip_on(inputs, policy, masks, device)


def check_case(case: Case, form: str, passes: int, counted: bool = False, **options: Any) -> np.ndarray:
    inputs = make(case)
    masks = masks_of(inputs)
    return check(inputs, policy_for(inputs, masks, form, passes=passes, counted=counted, **options), masks, DEVICE)


# --- the grid ---------------------------------------------------------------------------------------------------------


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(case: Case, form: str, passes: int) -> None:
    check_case(case, form, passes)


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case, form: str, passes: int) -> None:
    counts = check_case(case, form, passes, counted=case.dim == 64 and passes == 1)
    assert counts[:, 1].sum() > 0 or case.mask != "none"


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("case", PAGES, ids=str)
def test_pages(case: Case, form: str, passes: int) -> None:
    check_case(case, form, passes)


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads(case: Case, form: str, passes: int) -> None:
    check_case(case, form, passes)


@pytest.mark.parametrize(("passes", "counted"), [(1, False), (1, True), (2, False)])
@WITH_FORMS
@pytest.mark.parametrize("case", MASKS, ids=str)
def test_masks(case: Case, form: str, passes: int, counted: bool) -> None:
    check_case(case, form, passes, counted)


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: Case, form: str, passes: int) -> None:
    check_case(case, form, passes, counted=case.dtype == F16 and passes == 1)


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences(case: Case, form: str, passes: int) -> None:
    assert check_case(case, form, passes)[:, 1].sum() > 0


@WITH_FORMS
@pytest.mark.parametrize("case", FURTHER, ids=str)
def test_masks_between_two_passes(case: Case, form: str) -> None:
    check_case(case, form, passes=2)


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 3), (2, 1), (2, 2), (100, 1), (1, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_sinks_and_windows(causal: bool, sinks: int, window: int, form: str, passes: int) -> None:
    options = {"sink_blocks": sinks, "window_blocks": window}
    counts = check_case(replace(BASE, lengths=((300, 1000),), causal=causal), form, passes, **options)
    assert (counts[:, 1].sum() == 0) == (100 in (sinks, window))


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_a_threshold_for_every_position(layout: str, form: str, passes: int) -> None:
    """Knots within tiles; sequences of a batch sit at different positions."""
    lengths = ((300, 900), (300, 900)) if layout == BATCHED else ((300, 900), (300, 420))
    inputs = make(replace(BASE, lengths=lengths, layout=layout))
    reference = torch.tensor([[-1.7, -0.2, 0.9], [-1.0, 0.6, 0.8], [-torch.inf, 0.5, 0.3], [-5.0, 0.1, 0.73]])
    reference = reference if form == "absolute" else reference - 1.5
    policy = ExactSkip(form=form, ratio=1.0, reference=reference, positions=(100, 300, 700), passes=passes)
    assert check(inputs, policy, None, DEVICE, margin=2e-6)[:, 1].sum() > 0


# --- random cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_random_cases(seed: int) -> None:
    """Against the oracle; the same bits again; and against the CPU kernel, which decides alike."""
    case, form, options = random_case(seed, longest=500)
    inputs = make(case)
    masks = masks_of(inputs)
    policy = policy_for(inputs, masks, form, counted=seed % 10 < 3, **options)
    result = skip(inputs, policy, masks)
    check(inputs, policy, masks, DEVICE, result=result)
    assert same(skip(inputs, policy, masks), result)
    other, lse, skips = skip(inputs, policy, masks, "cpu")
    unit = ROUNDING[case.dtype]
    torch.testing.assert_close(result[0].cpu().float(), other.float(), rtol=2 * unit, atol=4 * unit)
    torch.testing.assert_close(result[1].cpu(), lse, rtol=2e-5, atol=2e-5)
    assert torch.equal(result[2].cpu(), skips)


# --- bits -------------------------------------------------------------------------------------------------------------


@WITH_FORMS
@pytest.mark.parametrize("layout", [PACKED, PAGED, PAGED_PACKED])
@pytest.mark.parametrize("strides", ["plain", "interleaved"])
def test_layouts_have_the_same_bits(layout: str, strides: str, form: str) -> None:
    case = replace(BASE, lengths=TWINS, dim=128, mask="random")
    plain, other = make(case), make(replace(case, layout=layout, strides=strides, page_size=24))
    masks = masks_of(plain)
    policy = policy_for(plain, masks, form)
    want, got = skip(plain, policy, masks), skip(other, policy, masks)
    for b in range(len(plain)):
        assert torch.equal(other.of_sequence(got[0], b), want[0][b])
        assert torch.equal(other.lse_of_sequence(got[1], b), want[1][b])
    assert torch.equal(got[2], want[2])


@WITH_PASSES
@WITH_FORMS
def test_chunks_are_the_whole(form: str, passes: int) -> None:
    """Chunks at edges of tiles give the bits and the counts of the whole prompt."""
    inputs = make(replace(BASE, lengths=((900, 900),), dim=128))
    policy = policy_for(inputs, None, form, passes=passes).to(torch.device(DEVICE))
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


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
@pytest.mark.parametrize("threshold", [-torch.inf, NAN, -1e30])
@WITH_FORMS
def test_skipping_nothing_is_dense(layout: str, threshold: float, form: str) -> None:
    """The operator itself: a NaN has no say, no more than what is below everything."""
    inputs = make(replace(BASE, lengths=TWINS, layout=layout, dim=128)).to(DEVICE)
    out, lse, skips = raw(inputs, torch.full((4, 1), threshold, device=DEVICE), form)
    dense, dense_lse = inputs.attend(None)
    unit = ROUNDING[BF16]
    torch.testing.assert_close(out.float(), dense.float(), rtol=2 * unit, atol=2 * unit)
    torch.testing.assert_close(lse, dense_lse, rtol=1e-5, atol=1e-5)
    assert (skips[:, 0] > 0).all() and not skips[:, 1].any()


def raw(inputs: Inputs, thresholds: Tensor, form: str = "absolute", **changes: Any) -> Result:
    """The operator, without Python's checks."""
    arguments: dict[str, Any] = {
        **{"cu_seqlens_q": inputs.cu_q, "cu_seqlens_k": inputs.cu_k, "block_table": inputs.block_table},
        **{"seqlens_k": inputs.seqlens_k, "max_seqlen_q": inputs.max_q, "max_seqlen_k": inputs.max_k},
        **{"mask_words": None, "mask_counts": None, "block_m": 128, "block_n": 128},
        **{"causal": inputs.case.causal, "softmax_scale": inputs.case.softmax_scale, "softcap": 0.0},
        **{"thresholds": thresholds, "form": form, "sink_blocks": 1, "window_blocks": 1, "counted": False},
    }
    out, lse, skips = torch.ops.bsfa.skip_attention(inputs.q, inputs.k, inputs.v, *{**arguments, **changes}.values())
    return out, lse, skips


# --- what must not matter ---------------------------------------------------------------------------------------------


@WITH_FORMS
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("dim", [64, 128])
def test_values_of_skipped_blocks_do_not_leak(dim: int, value: float, form: str) -> None:
    """A skipped block's V may be fetched, but never enters, not even times zero; a group that keeps it has its NaN."""
    inputs = make(replace(BASE, lengths=((256, 1024),), dim=dim))
    inputs.keys[0][:128] *= 8  # the sink gives every row of every head a large running maximum
    inputs.keys[0][128:768] = 0
    inputs.keys[0][384:512] = 4 * inputs.keys[0][:128]  # block 3 is loud again
    inputs.lay_out()
    ratio = float(np.exp(-0.25))
    policy = ExactSkip(ratio=ratio) if form == "relative" else ExactSkip.absolute(0.5)
    clean = skip(inputs, policy, None)
    check_skipping(inputs, *clean, policy, lse_constant=LSE_CONSTANT)
    assert int(clean[2][:, 1].min()) >= 4 * 4  # blocks 1, 2, 4, 5 by all four groups
    for block in (1, 2, 4, 5):
        inputs.values[0][128 * block : 128 * (block + 1)] = value
    inputs.lay_out()
    assert same(skip(inputs, policy, None), clean)
    inputs.values[0][384:512] = value
    inputs.lay_out()
    assert not skip(inputs, policy, None)[0].isfinite().any()


@pytest.mark.parametrize("spoiled", [0, 1])
def test_one_group_of_a_tile_skips_and_the_other_does_not(spoiled: int) -> None:
    """Each of the 64-row groups decides for itself, and only the one that keeps a block sees its values."""
    inputs = make(replace(BASE, lengths=((128, 640),), hq=2, hkv=2))
    inputs.queries[0][:] = inputs.queries[0].abs() + 0.5
    inputs.keys[0][:] = 0.05
    inputs.keys[0][256:384] = 1.0  # block 2
    inputs.queries[0][64 * (1 - spoiled) : 64 * (2 - spoiled)] *= 0.01  # the quiet group
    inputs.values[0][256:384] = NAN
    inputs.lay_out()
    policy = ExactSkip.absolute(1.0)
    out, lse, skips = skip(inputs, policy, None)
    loud = slice(64 * spoiled, 64 * (spoiled + 1))
    quiet = slice(64 * (1 - spoiled), 64 * (2 - spoiled))
    assert out[0, loud].isnan().all() and out[0, quiet].isfinite().all() and lse.isfinite().all()
    assert (skips[:, 1] < skips[:, 0]).all() and (skips[:, 1] % 2 == 1).all()


def by_sequence(inputs: Inputs, policy: ExactSkip) -> list[list[Tensor]]:
    """What attention has for each sequence: out, lse, and of two passes the rows of the mask between them."""
    out, lse, _ = skip(inputs, policy, None)
    found = [[inputs.of_sequence(out, b), inputs.lse_of_sequence(lse, b)] for b in range(len(inputs))]
    if policy.passes == 2:
        rows = first_masks(inputs.to(DEVICE), policy.to(torch.device(DEVICE)))[0].to_rows().cpu()
        for b, tensors in enumerate(found):
            tensors.append(torch.from_numpy(inputs.rows_of_sequence(rows, b)))
    return found


@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("layout", [PACKED, PAGED_PACKED])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_neighbouring_sequences_have_no_say(layout: str, value: float, form: str, passes: int) -> None:
    """Rows of other sequences lie in the same tile of memory: whatever they hold, decisions stay."""
    lengths = ((65, 400), (3, 300), (1, 330), (64, 400), (128, 428), (37, 300), (129, 457), (100, 430))
    inputs = make(replace(BASE, lengths=lengths, layout=layout))
    policy = policy_for(inputs, None, form, passes=passes)
    clean = by_sequence(inputs, policy)
    kept = [[t.clone() for t in tensors] for tensors in (inputs.queries, inputs.keys, inputs.values)]
    for spoiled in (0, 1):
        for tensors, copies in zip((inputs.queries, inputs.keys, inputs.values), kept, strict=True):
            for b, tokens in enumerate(tensors):
                tokens.copy_(copies[b]) if b % 2 != spoiled else tokens.fill_(value)
        inputs.lay_out()
        for b, found in enumerate(by_sequence(inputs, policy)):
            if b % 2 != spoiled:
                assert all(torch.equal(x, y) for x, y in zip(found, clean[b], strict=True))


@WITH_FORMS
def test_a_nan_logit_keeps_its_block(form: str) -> None:
    inputs = make(replace(BASE, lengths=((128, 1024),), hkv=4, dim=128))
    inputs.keys[0][300, 1] = NAN  # block 2 of head 1
    inputs.lay_out()
    policy = ExactSkip.absolute(1e4) if form == "absolute" else ExactSkip(ratio=1.0)
    out, _, skips = skip(inputs, policy, None)
    assert out[:, :, 1].isnan().all() and out[:, :, [0, 2, 3]].isfinite().all()
    if form == "absolute":
        assert (skips[0] - skips[1]).tolist() == [0, 2]


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
    masks = None
    if inner is not None:
        rows = there.run(inner, return_info=True)[1].mask.to_rows().cpu()
        masks = [inputs.rows_of_sequence(rows, b)[:, :, : -(-n // 128)] for b, (_, n) in enumerate(lengths)]
    policy = policy_for(inputs, masks, form, within=inner, passes=passes)
    moved = policy.to(torch.device(DEVICE))
    out = torch.full((*there.q.shape[:-1], there.v.shape[-1]), NAN, dtype=BF16, device=DEVICE)
    if passes == 2:  # what its first call prepares is not at issue
        there.run(moved)
    with no_synchronisation(DEVICE):
        got, lse, info = there.run(moved, return_lse=True, return_info=True, out=out)
        density = info.density()
    assert got is out and info.dense_reason is None
    check(inputs, replace(policy, within=None), masks, DEVICE, result=(out, lse, info.skips))
    assert 0 < float(density) < 1 or masks is None


@pytest.mark.filterwarnings("ignore::bsfa.DenseFallbackWarning")
def test_decode_steps_are_dense() -> None:
    inputs = make(replace(BASE, lengths=((1, 300), (1, 129)), layout=PAGED)).to(DEVICE)
    out, info = inputs.run(ExactSkip(ratio=1.0), return_info=True)
    assert "decode" in info.dense_reason and info.skips is None and torch.equal(out, inputs.run(None))


@pytest.mark.parametrize("kind", ["interleaved", "odd"])
def test_out_of_any_strides(kind: str) -> None:
    inputs = make(replace(BASE, lengths=TWINS))
    policy = policy_for(inputs, None, "absolute").to(torch.device(DEVICE))
    there = inputs.to(DEVICE)
    want, want_lse, want_info = there.run(policy, return_lse=True, return_info=True)
    extra = 64 if kind == "interleaved" else 3
    buffer = torch.full((*want.shape[:-1], 64 + extra), NAN, dtype=BF16, device=DEVICE)
    out = buffer[..., extra:]
    got, lse, info = there.run(policy, return_lse=True, return_info=True, out=out)
    assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(info.skips, want_info.skips)
    out.fill_(NAN)
    assert buffer.isnan().all(), "something outside of out was written"


@cuda_only
@WITH_PASSES
@WITH_FORMS
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph(masked: bool, form: str, passes: int) -> None:
    """One graph serves other lengths, pages, masks and values, and counts anew at each replay."""
    for inputs, policy, masks, result in replays(form, masked, passes=passes):
        check(inputs, policy, masks, DEVICE, result=result)


@cuda_only
def test_two_streams_at_once() -> None:
    """Counters are a call's own."""
    made = [make(replace(BASE, lengths=((700, 900),), seed=seed)) for seed in range(2)]
    policies = [policy_for(inputs, None, "absolute").to(torch.device(DEVICE)) for inputs in made]
    there = [inputs.to(DEVICE) for inputs in made]
    want = [skip(inputs, p, None) for inputs, p in zip(made, policies, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in there]
    got: list[list[Result]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(
                    bsfa.block_sparse_attention(  # type: ignore[arg-type]
                        there[i].q, there[i].k, there[i].v, None, skip=policies[i], return_skips=True
                    )
                )
    torch.cuda.synchronize()
    assert all(same(result, want[i]) for i, results in enumerate(got) for result in results)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_fullgraph(dynamic: bool | None) -> None:
    torch.compiler.reset()
    policy = ExactSkip.absolute(1.0).to(torch.device(DEVICE))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, info = bsfa.attention(q, k, v, policy=policy, return_lse=True, return_info=True)
        return out, lse, info.skips

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for length in (300, 257, 400):
        inputs = make(replace(BASE, lengths=((length, length),) * 2)).to(DEVICE)
        want = run(inputs.q, inputs.k, inputs.v)
        assert same(compiled(inputs.q, inputs.k, inputs.v), want)


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_opcheck(layout: str) -> None:
    inputs = make(replace(BASE, lengths=RAGGED if layout == PACKED else TWINS, layout=layout, mask="random"))
    there = inputs.to(DEVICE)
    for name in ("q", "k", "v"):  # opcheck compares inputs with copies of themselves
        getattr(there, name).nan_to_num_()
    words = there.block_mask(masks_of(inputs)).words  # type: ignore[arg-type]
    where = (there.cu_q, there.cu_k, there.block_table, there.seqlens_k, there.max_q, there.max_k)
    cuts = torch.full((4, 3), 0.5, device=DEVICE)
    sizes = (128, 128, True, 0.125, 0.0)
    arguments = (there.q, there.k, there.v, *where, words, None, *sizes, cuts, "relative", 1, 1, False)
    torch.library.opcheck(torch.ops.bsfa.skip_attention.default, arguments)
    torch.library.opcheck(torch.ops.bsfa.skip_attention_out.default, (torch.zeros_like(there.q), *arguments))


# --- what is refused --------------------------------------------------------------------------------------------------


@cuda_only
@WITH_PASSES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": F32}, "'(skip_attention|skip_mask)'.*float32.*bfloat16, float16"),
        ({"dim": 96}, "'(skip_attention|skip_mask)'.*head_dim 96"),
        ({"dim": 64, "dim_v": 128}, "head_dim 64 of q and k and 128 of v"),
        ({"block_n": 64}, "128 x 64 .*128 x 128"),
    ],
    ids=str,
)
def test_unsupported_calls_are_named(options: dict[str, Any], message: str, passes: int) -> None:
    case = replace(BASE, lengths=TWINS, **options)
    with pytest.raises(bsfa.UnsupportedError, match=message):
        case.make().to(DEVICE).run(ExactSkip(ratio=0.1, block_n=case.block_n, passes=passes))


RAW: list[dict[str, Any]] = [
    {"thresholds": torch.zeros(3, 1)},
    {"thresholds": torch.zeros(4)},
    {"thresholds": torch.zeros(4, 0)},
    {"thresholds": torch.zeros(4, 1, dtype=torch.float64)},
    {"thresholds": torch.zeros(2, 4).T},
    {"form": "both"},
    {"window_blocks": 0},
    {"block_m": 0},
]


@pytest.mark.parametrize("change", RAW, ids=range(len(RAW)))
def test_the_operator_raises_rather_than_crash(change: dict[str, Any]) -> None:
    inputs = make(replace(BASE, lengths=TWINS)).to(DEVICE)
    change = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in change.items()}
    raw(inputs, torch.zeros(4, 1, device=DEVICE))
    with pytest.raises(RuntimeError):
        raw(inputs, **{"thresholds": torch.zeros(4, 1, device=DEVICE), **change})
