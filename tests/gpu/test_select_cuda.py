"""Block selection on CUDA against the CPU operators: every rule, layout and option; and how the operators behave.

Both read the same 16-bit inputs. A block may be kept by one and dropped by the other only where its score on the CPU is
within rounding of the threshold. Inputs whose logits are exact in float32, and full of ties, leave no such room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.limits import LIMITS
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, Inputs, int32, poison, square, table

#: "cpu" runs all but the tests of CUDA itself on the CPU kernel, to check this file.
DEVICE = "cuda"

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

cuda_only = pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA")

#: What rounding and approximate exponentials may change of a score.
TOLERANCE = 2e-4
#: Share of scores that may be off by more: two blocks whose logits are alike up to rounding may change places, and then
#: each has the other's score. In rows of more than 1000 nearly equal blocks ranks lie that close: 4 of 2066 were seen.
SWAPPED = 4e-3

BASE = Case(hq=4, hkv=2, dim=64, dtype=BF16, block_m=128, block_n=128)
RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (128, 128), (70, 0), (37, 300), (129, 257), (100, 30), (0, 0))
CHUNKS = ((150, 1387), (150, 256), (150, 150), (150, 20))
PREFIXES = ((1, 64), (1, 128), (5, 133), (127, 300), (128, 256), (129, 257), (33, 1390), (130, 1), (300, 129), (0, 70))


@dataclass(frozen=True)
class Rule:
    """The arguments of the operators that make the rule; names as in schemas.h."""

    rule: str = "pooled"
    pooling: str = "mean"
    stride: int = 16
    sharing: str = "none"
    sink_blocks: int = 0
    window_blocks: int = 1
    threshold: float = 0.6
    last_tiles: int = 0
    min_blocks: int = 0
    min_ratio: float = 0.0
    probability: float = 1.0
    rescue_stride: int = 0
    rescue_probability: float = 0.0
    rescue_seed: int = 1

    def __str__(self) -> str:
        differ = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return "-".join([self.rule, *differ])

    @property
    def reads_keys(self) -> bool:
        return self.rule in ("flat64", "antidiagonal")

    def thresholds(self, case: Case) -> Tensor:
        """One per head, around ``threshold``."""
        heads = case.hkv if self.sharing == "group" else case.hq
        steps = torch.linspace(0.8, 1.1, heads, dtype=torch.float64)
        return (self.threshold * steps).float() if math.isfinite(self.threshold) else torch.full((heads,), math.inf)


RELATIVE_MAX = Rule("relative_max", threshold=0.25)
POOLED = Rule()
FLAT64 = Rule("flat64")
ANTIDIAGONAL = Rule("antidiagonal", sink_blocks=1)
RULES = [
    RELATIVE_MAX,
    replace(RELATIVE_MAX, sharing="group"),
    *(replace(POOLED, pooling=pooling) for pooling in ("mean", "maxabs", "center")),
    FLAT64,
    ANTIDIAGONAL,
    replace(ANTIDIAGONAL, stride=8, window_blocks=2),
]
MASS = [POOLED, FLAT64, ANTIDIAGONAL]


def by_rule(rules: Iterable[Rule]) -> Any:
    return pytest.mark.parametrize("rule", rules, ids=str)


# --- the comparison ---------------------------------------------------------------------------------------------------


def summary_of(inputs: Inputs, rule: Rule) -> Tensor | None:
    """What stands for the KV blocks, made on the CPU."""
    if rule.reads_keys:
        return None
    return torch.ops.bsfa.pool_blocks(
        inputs.k, inputs.cu_k, inputs.block_table, inputs.seqlens_k, inputs.max_k, 128, rule.pooling
    )


@dataclass
class Call:
    """The tensors of one selection, and the two operators on them."""

    inputs: Inputs
    rule: Rule
    summary: Tensor | None
    thresholds: Tensor
    num_rows: int
    prompt_lens: Tensor | None = None

    @staticmethod
    def make(inputs: Inputs, rule: Rule, prompt_lens: list[int] | None = None, more_rows: int = 0) -> Call:
        rows = inputs.geometry.num_rows + more_rows
        lens = None if prompt_lens is None else int32(prompt_lens)
        return Call(inputs, rule, summary_of(inputs, rule), rule.thresholds(inputs.case), rows, lens)

    def to(self, device: str) -> Call:
        there = [None if t is None else t.to(device) for t in (self.summary, self.thresholds, self.prompt_lens)]
        assert there[1] is not None
        return Call(self.inputs.to(device), self.rule, there[0], there[1], self.num_rows, there[2])

    @property
    def arguments(self) -> tuple[Any, ...]:
        i, r, case = self.inputs, self.rule, self.inputs.case
        keys = r.reads_keys
        return (
            *(i.q, self.summary, i.k if keys else None, i.cu_q, i.cu_k, i.block_table if keys else None, i.seqlens_k),
            *(i.max_q, i.max_k, self.num_rows, 128, 128, case.causal, case.softmax_scale, case.softcap),
            *(r.rule, r.pooling, r.stride, r.sharing, r.sink_blocks, r.window_blocks),
        )

    def score(self) -> Tensor:
        result: Tensor = torch.ops.bsfa.score_blocks(*self.arguments)
        return result

    def select(self) -> tuple[Tensor, Tensor]:
        r = self.rule
        words, counts = torch.ops.bsfa.select_blocks(
            *self.arguments,
            *(self.thresholds, r.last_tiles, r.min_blocks, r.min_ratio, r.probability),
            *(r.rescue_stride, r.rescue_probability, r.rescue_seed, self.prompt_lens),
        )
        return words, counts

    def poison(self, device: str) -> None:
        """NaN where the results and the scratch memory are likely to lie."""
        blocks = -(-self.inputs.max_k // 128)
        for heads in (self.inputs.case.hq, self.inputs.case.hkv):
            poison((self.num_rows, heads, blocks), (self.num_rows, heads, -(-blocks // 32)), device=device)


def bits_of(words: Tensor, blocks: int) -> Tensor:
    """bool [rows, heads, blocks]."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    bits = bits.flatten(-2).bool()
    assert not bits[..., blocks:].any(), "bits past the last block"
    return bits[..., :blocks]


def check_bits(got: Tensor, want: Tensor, scores: Tensor, thresholds: Tensor, exact: bool) -> None:
    """The same blocks, but for scores near their threshold; those must be rare."""
    near = (scores - thresholds[None, :, None]).abs() <= TOLERANCE
    if near.shape[1] != got.shape[1]:  # a union: any head of the group
        near = near.unflatten(1, (got.shape[1], -1)).any(2)
    differ = got != want
    assert not (differ & ~near).any(), f"{int((differ & ~near).sum())} of {int(want.sum())} blocks differ"
    assert not exact or not differ.any(), f"{int(differ.sum())} blocks differ though all logits are exact"
    assert int(differ.sum()) <= 2 + 0.01 * differ.numel()


def check_scores(got: Tensor, want: Tensor, exact: bool) -> None:
    assert got.shape == want.shape
    unseen = want == -1
    assert torch.equal(got == -1, unseen), "scores of what is not visible"
    assert torch.equal(got.isnan(), want.isnan()), "NaN in other places"
    off = ((got - want).abs() > TOLERANCE) & ~unseen & ~want.isnan()
    assert int(off.sum()) <= (0 if exact else SWAPPED * off.numel()), f"{int(off.sum())} of {off.numel()} scores"


def check(
    case: Case,
    rule: Rule,
    *,
    inputs: Inputs | None = None,
    prompt_lens: list[int] | None = None,
    more_rows: int = 0,
    exact: bool = False,
) -> Tensor:
    """Hold words, counts and scores of DEVICE against the CPU's; the mask as bool [rows, heads, blocks]."""
    call = Call.make(case.make() if inputs is None else inputs, rule, prompt_lens, more_rows)
    there = call.to(DEVICE)
    there.poison(DEVICE)
    words, counts = (t.cpu() for t in there.select())
    there.poison(DEVICE)
    scores = there.score().cpu()
    blocks = -(-call.inputs.max_k // 128)
    want_scores, (want_words, want_counts) = call.score(), call.select()
    assert words.shape == want_words.shape and words.dtype == counts.dtype == torch.int32
    got = bits_of(words, blocks)
    assert torch.equal(counts, got.sum(-1, dtype=torch.int32)), "counts are not the set bits"
    assert counts.shape == want_counts.shape
    check_bits(got, bits_of(want_words, blocks), want_scores, call.thresholds, exact)
    check_scores(scores, want_scores, exact)
    return got


def exact_inputs(case: Case, seed: int = 5) -> Inputs:
    """Small integers, so that sums are exact in any order and ties abound; with :data:`EXACT_SCALE` logits are, too."""
    inputs = case.make()
    g = torch.Generator().manual_seed(seed)
    inputs.queries = [torch.randint(-1, 2, t.shape, generator=g).to(t.dtype) for t in inputs.queries]
    inputs.keys = [torch.randint(-1, 2, t.shape, generator=g).to(t.dtype) for t in inputs.keys]
    for keys in inputs.keys:
        keys[:, :, 8:] = 0  # few logits, many ties
    inputs.lay_out()
    return inputs


#: softmax_scale with softmax_scale * log2(e) = 1 in float32.
EXACT_SCALE = math.log(2.0)


# --- rules and lengths ------------------------------------------------------------------------------------------------

LENGTHS = [
    *table(BASE, lengths=square(1, 127, 128, 129, 300, 1500), causal=[True, False]),
    *table(BASE, lengths=[((300, n),) for n in (4095, 4096, 4097)], dtype=[BF16, F16]),  # around a word of 32 blocks
    *table(BASE, lengths=[(pair,) for pair in PREFIXES], causal=[True, False]),
    *table(BASE, lengths=square(700), dim=[64, 128], dtype=[BF16, F16]),
]


@by_rule(RULES)
@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_lengths(case: Case, rule: Rule) -> None:
    check(case, rule)


LAYOUTS = [
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], causal=[True, False]),
    *table(replace(BASE, lengths=CHUNKS, layout=PAGED), page_size=[16, 48, 128], dim=[64, 128]),
    *table(replace(BASE, lengths=((700, 900),) * 2), strides=["interleaved", "head-major", "wide-gaps"]),
    replace(BASE, lengths=((300, 700),) * 3, causal=False),
    replace(BASE, lengths=RAGGED, layout=PACKED, strides="wide-gaps", dtype=F16),
]


@by_rule(RULES)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case, rule: Rule) -> None:
    check(case, rule)


@by_rule(RULES)
@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (4, 4), (4, 1), (6, 2), (12, 4), (7, 7)])
def test_heads(hq: int, hkv: int, rule: Rule) -> None:
    check(replace(BASE, lengths=((300, 1300),), hq=hq, hkv=hkv), rule)


@by_rule(RULES)
@pytest.mark.parametrize("sequences", [150, 1100])
def test_many_sequences(sequences: int, rule: Rule) -> None:
    """So few that one CTA orders their tiles, and more than it can."""
    lengths = tuple((n * 37 % 290, n * 53 % 400) for n in range(sequences))
    check(replace(BASE, lengths=lengths, layout=PACKED, hq=2, hkv=1), rule, more_rows=3)


@by_rule(RULES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("softcap", "scale"), [(5.0, None), (0.0, -0.3), (20.0, 1.5), (0.0, 0.0)])
def test_logits(softcap: float, scale: float | None, causal: bool, rule: Rule) -> None:
    if scale == 0.0 and rule.rule == "antidiagonal":
        pytest.skip("equal weights, but for the rounding of sums: nothing says how they rank")
    check(replace(BASE, lengths=((400, 1200),), softcap=softcap, scale=scale, causal=causal), rule)


@by_rule([RELATIVE_MAX, replace(RELATIVE_MAX, sharing="group")])
@pytest.mark.parametrize("edges", [1.0, -1.0], ids=["rows-alike", "edges-apart"])
@pytest.mark.parametrize("log_energy", [-150.0, -90.0, 0.0, 126.0, 200.0])
def test_energies_around_float32s_range(log_energy: float, edges: float, rule: Rule) -> None:
    """Sums of powers of two that float32 holds, that it does not, and both in one row; rows of a tile alike, or its
    first and last ones as far on the other side of 0.
    """
    case = replace(BASE, lengths=((384, 2432),), scale=1.0)
    inputs = case.make()
    weight = 4.0
    centre = (log_energy - 8.5) / (weight * math.log2(math.e))  # 8.5: what 128 rows of normal logits sum to
    offsets = centre + torch.rand(19, generator=torch.Generator().manual_seed(7)) - 0.5
    for queries, keys in zip(inputs.queries, inputs.keys, strict=True):
        inner = (torch.arange(len(queries)) % 128 - 63.5).abs() < 56
        queries[..., 0] = torch.where(inner, weight, edges * weight)[:, None].to(queries.dtype)
        keys[..., 0] = offsets.repeat_interleave(128)[:, None].to(keys.dtype)
    inputs.lay_out()
    got = check(case, rule, inputs=inputs)
    assert got.any() and not got.all()


@pytest.mark.parametrize("pooling", ["mean", "maxabs", "center"])
@pytest.mark.parametrize("dim", [1, 7, 8, 33, 40, 96, 192, 256])
@pytest.mark.parametrize("strides", ["plain", "gaps", "wide-gaps"])
def test_pooled_head_dims(dim: int, strides: str, pooling: str) -> None:
    check(replace(BASE, lengths=((300, 1000),), dim=dim, strides=strides), replace(POOLED, pooling=pooling))
    ragged = replace(BASE, lengths=RAGGED, layout=PACKED, dim=dim, strides=strides, dtype=F16)
    check(ragged, replace(POOLED, pooling=pooling))


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_strides_of_antidiagonals(stride: int, layout: str) -> None:
    lengths = ((300, 1300),) * 2 if layout == BATCHED else CHUNKS
    check(replace(BASE, lengths=lengths, layout=layout), replace(ANTIDIAGONAL, stride=stride))


# --- what else is kept ------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"sink_blocks": 2, "window_blocks": 3},
    {"sink_blocks": 100},
    {"window_blocks": 100},
    {"last_tiles": 2},
    {"threshold": 0.0},
    {"threshold": math.inf},
    {"min_blocks": 3, "threshold": 0.0},
    {"min_blocks": 1000},
    {"min_ratio": 0.3, "threshold": 0.0},
    {"min_ratio": 0.7, "min_blocks": 2},
    {"min_ratio": 1.0},
    {"rescue_stride": 5, "threshold": 0.0},
    {"rescue_probability": 0.3, "threshold": 0.0},
    {"rescue_stride": 7, "rescue_probability": 0.1, "rescue_seed": 77, "sink_blocks": 1},
]
OPTION_CASES = [
    replace(BASE, lengths=((1100, 1100),)),
    replace(BASE, lengths=((300, 1300),), causal=False),
    replace(BASE, lengths=(*CHUNKS, (0, 50), (600, 600)), layout=PACKED),
]


@by_rule([RELATIVE_MAX, replace(RELATIVE_MAX, sharing="group"), *MASS, *(replace(r, sharing="union") for r in MASS)])
@pytest.mark.parametrize("case", OPTION_CASES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], case: Case, rule: Rule) -> None:
    check(case, replace(rule, **options))


@by_rule(MASS)
@pytest.mark.parametrize("sharing", ["none", "union"])
@pytest.mark.parametrize("probability", [0.0, 0.02, 0.2])
def test_probability(probability: float, sharing: str, rule: Rule) -> None:
    few = replace(rule, probability=probability, sharing=sharing, threshold=0.05)
    kept = check(replace(BASE, lengths=((900, 900),)), few)
    assert kept.sum() >= check(replace(BASE, lengths=((900, 900),)), replace(few, probability=1.0)).sum()


@by_rule(RULES)
@pytest.mark.parametrize("prompt_lens", [None, [1387, 900, 150, 20], [2000, 2000, 2000, 2000]])
def test_prompt_lens(prompt_lens: list[int] | None, rule: Rule) -> None:
    case = replace(BASE, lengths=CHUNKS, layout=PAGED if rule.reads_keys else PAGED_PACKED)
    check(case, replace(rule, last_tiles=1), prompt_lens=prompt_lens)


EXACT_CASES = [
    replace(BASE, lengths=((1100, 1100),), scale=EXACT_SCALE),
    replace(BASE, lengths=((256, 5000),), scale=EXACT_SCALE, causal=False),
    replace(BASE, lengths=((256, 1280), (128, 128), (512, 512)), layout=PACKED, scale=EXACT_SCALE, dim=128),
]
EXACT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.987654},
    {"threshold": 0.0},
    {"min_blocks": 4, "threshold": 0.0},
    {"min_ratio": 0.37, "threshold": 0.0},
    {"probability": 0.0234567, "threshold": 0.1234567},
    {"sharing": "union", "threshold": 0.123456},
]


@pytest.mark.parametrize("pooling", ["maxabs", "center"])
@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
@pytest.mark.parametrize("options", EXACT_OPTIONS, ids=str)
def test_exact_ties(options: dict[str, Any], case: Case, pooling: str) -> None:
    """Pooled values are small integers and the scale is a power of two: ranks are decided by ties."""
    inputs = exact_inputs(case)
    if pooling == "maxabs":  # else every tile is all ones
        inputs.queries = [torch.where(torch.arange(t.shape[0])[:, None, None] % 128 < 1, t, 0) for t in inputs.queries]
        inputs.keys = [torch.where(torch.arange(t.shape[0])[:, None, None] % 128 < 1, t, 0) for t in inputs.keys]
        inputs.lay_out()
    check(case, replace(POOLED, pooling=pooling, **options), inputs=inputs, exact=True)


def test_equal_scores_keep_the_lower_blocks() -> None:
    """All keys alike: of 8 blocks the first ones that reach the mass, the best min_blocks, and the diagonal."""
    case = replace(BASE, lengths=((1024, 1024),), hq=1, hkv=1)
    inputs = case.make()
    inputs.keys = [torch.ones_like(t) for t in inputs.keys]
    inputs.lay_out()
    kept = check(case, replace(POOLED, threshold=0.4), inputs=inputs)[7, 0]
    thresholds = replace(POOLED, threshold=0.4).thresholds(case)
    count = next(n for n in range(9) if n / 8 >= float(thresholds[0]))
    assert kept.tolist() == [j < count or j == 7 for j in range(8)]
    kept = check(case, replace(POOLED, threshold=0.0, min_blocks=3), inputs=inputs)[7, 0]
    assert kept.tolist() == [True] * 3 + [False] * 4 + [True]


# --- long rows --------------------------------------------------------------------------------------------------------


def check_long_rows(blocks: int, rule: Rule, dim: int = 64) -> None:
    """Masks against the CPU's; only the summary is as long as that. Of shorter rows scores too."""
    case = replace(BASE, lengths=((200, 40),), hq=2, hkv=1, dim=dim)
    call = Call.make(case.make(), replace(rule, threshold=0.5))
    call.inputs.max_k = blocks * 128 - 40
    call.num_rows = 3
    generator = torch.Generator().manual_seed(blocks)
    call.summary = torch.randn(1, blocks, 1, dim, generator=generator).to(BF16)
    words, counts = (t.cpu() for t in call.to(DEVICE).select())
    want = bits_of(call.select()[0], blocks)
    got = bits_of(words, blocks)
    assert torch.equal(counts, got.sum(-1, dtype=torch.int32))
    scores = call.score()
    check_bits(got, want, scores, call.thresholds, exact=False)
    if blocks <= 1025:
        check_scores(call.to(DEVICE).score().cpu(), scores, exact=False)


@pytest.mark.parametrize("rule", [POOLED, RELATIVE_MAX, replace(POOLED, min_blocks=50, min_ratio=0.01)], ids=str)
@pytest.mark.parametrize("blocks", [128, 129, 300, 513, 1023, 1024, 1025, 8192, 8193, 16_384])
def test_long_rows(blocks: int, rule: Rule) -> None:
    """Rows for one warp, with 4 to 32 blocks in a lane, for four warps and for sixteen."""
    check_long_rows(blocks, rule)


@cuda_only
@by_rule([POOLED, RELATIVE_MAX, replace(RELATIVE_MAX, sharing="group", min_blocks=50)])
def test_longest_rows(rule: Rule) -> None:
    """As long as the kernel table promises, at the head_dim that needs more memory; one block more is refused."""
    most = next(row.max_blocks for row in LIMITS["select_blocks", "cuda"] if rule.rule in (row.rules or ()))
    assert most is not None
    check_long_rows(most, rule, dim=128)
    policy: bsfa.policies.ScoredPolicy = bsfa.policies.CumulativeMass()
    if rule.rule == "relative_max":
        policy = bsfa.policies.RelativeMax(shared=rule.sharing == "group")
    q = torch.zeros(1, 128, 2, 128, dtype=BF16, device=DEVICE)
    summary = torch.zeros(1, most + 1, 1, 128, dtype=BF16, device=DEVICE)
    with pytest.raises(bsfa.UnsupportedError, match=f"with {most + 1} KV blocks"):
        bsfa.select_blocks(q, summary, policy, seqlen_k=128 * (most + 1))


@by_rule([FLAT64, ANTIDIAGONAL])
def test_long_keys(rule: Rule) -> None:
    check(replace(BASE, lengths=((40, 132_200),), hq=2, hkv=1), rule)


# --- not numbers ------------------------------------------------------------------------------------------------------


@by_rule(RULES)
@pytest.mark.parametrize("where", ["key", "last key", "query"])
def test_nan(where: str, rule: Rule) -> None:
    """What a NaN touches is kept, on both sides alike."""
    case = replace(BASE, lengths=((400, 900), (300, 300)), layout=PACKED)
    inputs = case.make()
    if where == "query":
        inputs.queries[0][200, 1] = NAN
    else:
        inputs.keys[0][899 if where == "last key" else 300, 0, 5] = NAN
    inputs.lay_out()
    call = Call.make(inputs, rule)
    words, _ = call.to(DEVICE).select()
    want, scores = bits_of(call.select()[0], 8), call.score()
    got = bits_of(words.cpu(), 8)
    check_bits(got, want, scores, call.thresholds, exact=False)
    check_scores(call.to(DEVICE).score().cpu(), scores, exact=False)


# --- the operators ----------------------------------------------------------------------------------------------------


@by_rule([*RULES, *(replace(r, sharing="union", min_blocks=3) for r in MASS)])
def test_same_bits_twice(rule: Rule) -> None:
    case = replace(BASE, lengths=((900, 1400), (300, 300), (0, 0), (1, 500)), layout=PACKED)
    call = Call.make(case.make(), rule).to(DEVICE)
    first, scores = call.select(), call.score()
    for _ in range(5):
        call.poison(DEVICE)
        again = call.select()
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
        assert torch.equal(call.score().view(torch.int32), scores.view(torch.int32))


@cuda_only
@by_rule(RULES)
def test_no_host_sync(rule: Rule) -> None:
    call = Call.make(replace(BASE, lengths=CHUNKS, layout=PACKED).make(), replace(rule, last_tiles=1)).to(DEVICE)
    call.select()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.select()
        call.score()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_rule(RULES)
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 1.0, math.inf])
def test_one_threshold(threshold: float, rule: Rule) -> None:
    """By value, as by one entry for each head."""
    call = Call.make(replace(BASE, lengths=((200, 900), (300, 700)), layout=PACKED).make(), rule).to(DEVICE)
    rest = (*(rule.last_tiles, rule.min_blocks, rule.min_ratio, rule.probability), rule.rescue_stride)
    rest = (*rest, rule.rescue_probability, rule.rescue_seed, None)
    each = torch.ops.bsfa.select_blocks(*call.arguments, torch.full_like(call.thresholds, threshold), *rest)
    one = torch.ops.bsfa.select_blocks(*call.arguments, None, *rest, threshold)
    assert torch.equal(one[0], each[0]) and torch.equal(one[1], each[1])


@cuda_only
@by_rule(RULES)
def test_cuda_graph(rule: Rule) -> None:
    """A captured selection follows what its inputs hold when it is replayed, lengths included."""
    case = replace(BASE, lengths=((300, 900), (200, 700)), layout=PACKED)
    call = Call.make(case.make(), rule).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.select()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        words, counts = call.select()
        scores = call.score()
    other = Call.make(replace(case, lengths=((250, 850), (250, 750)), seed=9).make(), rule)
    assert other.inputs.cu_q is not None and other.inputs.cu_k is not None
    call.inputs.q.copy_(other.inputs.q)
    call.inputs.k.copy_(other.inputs.k)
    call.inputs.cu_q.copy_(other.inputs.cu_q)  # type: ignore[union-attr]
    call.inputs.cu_k.copy_(other.inputs.cu_k)  # type: ignore[union-attr]
    if call.summary is not None:
        assert other.summary is not None
        call.summary[:, : other.summary.shape[1]] = other.summary.to(DEVICE)
    graph.replay()
    want_words, want_counts = call.select()
    assert torch.equal(words, want_words) and torch.equal(counts, want_counts)
    assert torch.equal(scores.view(torch.int32), call.score().view(torch.int32))


@cuda_only
def test_side_stream() -> None:
    call = Call.make(replace(BASE, lengths=((900, 900),)).make(), POOLED).to(DEVICE)
    want = call.select()[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        words = call.select()[0]
    stream.synchronize()
    assert torch.equal(words, want)


@cuda_only
@by_rule([RELATIVE_MAX, *MASS])
def test_memory(rule: Rule) -> None:
    """Scratch memory is what the library says; at a million tokens and 32 heads all memory of a selection is bounded.

    Antidiagonal has a bound of its own: each SM's CTA keeps 512 bytes per KV block (select_strided.md).
    """
    ask = torch.ops.bsfa.select_workspace_bytes
    tokens, heads, dim = 1 << 20, 32, 128
    rows = blocks = tokens // 128
    needed = ask(rows, heads, tokens, dim, rule.rule, rule.stride)
    words, counts, summary = rows * heads * (blocks // 32) * 4, rows * heads * 4, blocks * 8 * dim * 2
    if rule.rule == "antidiagonal":
        assert needed <= 700e6
    else:
        assert needed <= 100e6
        assert words + counts + summary + needed <= 400e6
    case = replace(BASE, lengths=((4096, 4096),), hq=8, hkv=2, dim=128)
    call = Call.make(case.make(), rule).to(DEVICE)
    results = call.select()
    del results
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    words_out, counts_out = call.select()
    peak = torch.cuda.max_memory_allocated() - before
    outputs = (words_out.numel() + counts_out.numel()) * 4
    assert peak <= outputs + ask(call.num_rows, 8, 4096, 128, rule.rule, rule.stride) + 4096
    if rule.rule == "relative_max":
        assert peak <= outputs + 1024, "sequences of one length need no order, and no memory for it"


@cuda_only
@pytest.mark.parametrize(
    ("case", "rule", "message"),
    [
        (replace(BASE, dtype=F32), POOLED, "no CUDA kernel"),
        (replace(BASE, dim=96), RELATIVE_MAX, "no CUDA kernel"),
        (replace(BASE, dim=32), FLAT64, "no CUDA kernel"),
        (BASE, replace(RELATIVE_MAX, sharing="union"), "no CUDA kernel"),
        (BASE, replace(ANTIDIAGONAL, stride=2), "stride or head sharing has no CUDA kernel"),
        (BASE, replace(ANTIDIAGONAL, stride=128), "stride or head sharing has no CUDA kernel"),
    ],
    ids=str,
)
def test_refused(case: Case, rule: Rule, message: str) -> None:
    call = Call.make(case.make(), rule).to(DEVICE)
    for operation in (call.select, call.score):
        with pytest.raises(RuntimeError, match=message):
            operation()


@cuda_only
def test_refused_lengths() -> None:
    call = Call.make(BASE.make(), POOLED).to(DEVICE)
    call.num_rows = 1
    with pytest.raises(RuntimeError, match="has 1 rows, this problem needs 2"):
        call.select()
    call.num_rows, call.inputs.max_k = 2, 51_201 * 128
    call.summary = torch.zeros(1, 51_201, 2, 64, dtype=BF16, device=DEVICE)
    with pytest.raises(RuntimeError, match="51201 KV blocks are more"):
        call.select()


NOTHING: list[tuple[str, Callable[[], Case]]] = [
    ("no queries", lambda: replace(BASE, lengths=((0, 500),) * 2)),
    ("no keys", lambda: replace(BASE, lengths=((300, 0),) * 2)),
    ("nothing", lambda: replace(BASE, lengths=((0, 0),))),
    ("empty packed", lambda: replace(BASE, lengths=((0, 300), (0, 0)), layout=PACKED)),
]


@by_rule(RULES)
@pytest.mark.parametrize("make", [m for _, m in NOTHING], ids=[name for name, _ in NOTHING])
def test_nothing_to_select(make: Callable[[], Case], rule: Rule) -> None:
    kept = check(make(), rule, more_rows=4)
    assert not kept.any()


# --- the policies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [bsfa.policies.RelativeMax(), bsfa.policies.CumulativeMass()], ids=lambda p: p.name)
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_attention_with_a_policy(policy: bsfa.policies.ScoredPolicy, layout: str) -> None:
    """Pooling, selection and attention in one call, against the mask that the CPU selects from the same summary."""
    lengths = ((900, 900),) * 2 if layout == BATCHED else ((700, 900), (700, 700))
    inputs = replace(BASE, lengths=lengths, layout=layout).make()
    there = inputs.to(DEVICE)
    summary = bsfa.pool_blocks(there.k, **there.layout_k)
    mask = bsfa.select_blocks(there.q, summary, policy, **there.maths, **there.layout_select)
    want = bsfa.select_blocks(inputs.q, summary.cpu(), policy, **inputs.maths, **inputs.layout_select)
    assert isinstance(mask, bsfa.BlockMask) and isinstance(want, bsfa.BlockMask)
    assert (mask.to_rows().cpu() != want.to_rows()).sum() <= 2
    out, _ = there.attend(mask)
    assert torch.equal(there.run(policy), out)
