"""The operators obey torch's rules, and calls trace into one graph that computes what eager computes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfa
from bsfa.policies import Antidiagonal, CumulativeMass, ExactSkip, Policy, RelativeMax, StaticPattern
from cases import BF16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, int32

RAGGED = ((65, 65), (0, 0), (1, 130), (37, 150))
SAMPLES = [
    Case(lengths=((70, 130), (70, 130)), hq=4, hkv=2, dim=16),
    Case(lengths=((70, 130), (70, 130)), hq=4, hkv=2, dim=16, dtype=BF16, strides="gaps", causal=False),
    Case(lengths=RAGGED, hq=4, hkv=2, dim=16, dim_v=8, layout=PACKED),
    Case(lengths=((70, 130), (70, 90)), hq=4, hkv=2, dim=16, layout=PAGED, page_size=7, strides="interleaved"),
    Case(lengths=RAGGED, hq=4, hkv=2, dim=16, layout=PAGED_PACKED, dtype=BF16),
]

POLICIES: list[Policy | None] = [
    None,
    StaticPattern(sink_blocks=1, window_blocks=1, block_m=32, block_n=16),
    RelativeMax(alpha=0.8, block_m=32, block_n=16),
    CumulativeMass(mass=[0.3, 0.5, 0.7, 0.9], block_m=32, block_n=16),
    RelativeMax(alpha=[0.8, 0.6], shared=True, block_m=32, block_n=16),
    Antidiagonal(mass=0.5, stride=8, block_m=32, block_n=16),
    ExactSkip(ratio=0.3, within=RelativeMax(alpha=0.5, block_m=32, block_n=16), block_m=32, block_n=16),
    ExactSkip(
        form="absolute",
        ratio=[0.5, 0.6, 0.7, 0.8],
        reference=torch.tensor([[0.5, 1.0]]),
        positions=(40, 150),
        counted=True,
        block_m=32,
        block_n=16,
    ),
]


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch.compiler.reset()


def finite(inputs: Inputs) -> Inputs:
    """Without NaN in what is not read: opcheck compares inputs with copies of themselves."""
    for name in ("q", "k", "v"):
        tensor = getattr(inputs, name)
        tensor.copy_(tensor.nan_to_num())
    return inputs


def kv(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.cu_k, inputs.block_table, inputs.seqlens_k


def test_info_compiles() -> None:
    """Counts and density are part of the graph."""
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, dim=16).make()
    policy = ExactSkip.absolute(0.5, block_m=32, block_n=16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, info = bsfa.attention(q, k, v, policy=policy, return_info=True)
        return out, info.skips, info.density()

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs.q, inputs.k, inputs.v)
    for a, b in zip(got, run(inputs.q, inputs.k, inputs.v), strict=True):
        assert torch.equal(a, b)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_pool_blocks(case: Case) -> None:
    inputs = finite(case.make())
    for pooling in ("mean", "maxabs", "center"):
        torch.library.opcheck(torch.ops.bsfa.pool_blocks.default, (inputs.k, *kv(inputs), inputs.max_k, 16, pooling))


@pytest.mark.parametrize(
    ("rule", "pooling", "sharing"),
    [
        ("relative_max", "mean", "none"),
        ("relative_max", "mean", "group"),
        ("pooled", "mean", "none"),
        ("pooled", "maxabs", "union"),
        ("flat64", "mean", "union"),
        ("antidiagonal", "mean", "none"),
    ],
)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_score_and_select_blocks(case: Case, rule: str, pooling: str, sharing: str) -> None:
    inputs = finite(case.make())
    blocks = (64, 64) if rule == "flat64" else (32, 16)
    if rule in ("flat64", "antidiagonal"):
        keys = (None, inputs.k, inputs.cu_q, inputs.cu_k, inputs.block_table)
    else:
        summary = bsfa.pool_blocks(inputs.k, block_n=blocks[1], pooling=pooling, **inputs.layout_k)
        keys = (summary, None, inputs.cu_q, inputs.cu_k, None)
    lengths = (*keys, inputs.seqlens_k, inputs.max_q, inputs.max_k)
    scoring = (rule, pooling, 16, sharing, 1, 2)
    shared = (inputs.q, *lengths, 8 * len(inputs), *blocks, case.causal, 0.25, 0.0, *scoring)
    torch.library.opcheck(torch.ops.bsfa.score_blocks.default, shared)
    thresholds = torch.full((2 if sharing == "group" else 4,), 0.5)
    for prompt_lens in (None, int32([200] * len(inputs))):
        select = (*shared, thresholds, 1, 2, 0.2, 0.9, 7, 0.1, 1, prompt_lens)
        torch.library.opcheck(torch.ops.bsfa.select_blocks.default, select)


@pytest.mark.parametrize(("page_size", "block_n"), [(16, 128), (128, 128), (64, 16)])
def test_opcheck_summary(page_size: int, block_n: int) -> None:
    table, seqlens = torch.arange(48, dtype=torch.int32).view(2, 24), int32([100, 230])
    sizes = (page_size, block_n)
    torch.library.opcheck(torch.ops.bsfa.summary_entries.default, (table, seqlens, *sizes, 16, 48))
    torch.library.opcheck(torch.ops.bsfa.summary_window.default, (table, seqlens, int32([30, 0]), *sizes, 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_attention(case: Case, masked: bool) -> None:
    inputs = finite(case.make())
    lengths = (inputs.cu_q, *kv(inputs), inputs.max_q, inputs.max_k)
    words = inputs.block_mask([inputs.draw_mask(b) for b in range(len(inputs))]).words if masked else None
    window = 20 if case.causal and not masked else -1
    sizes = (case.block_m, case.block_n)
    torch.library.opcheck(
        torch.ops.bsfa.attention.default,
        (inputs.q, inputs.k, inputs.v, *lengths, words, None, None, None, *sizes, case.causal, 0.25, 2.0, window),
    )


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_dense_attention(case: Case) -> None:
    inputs = finite(case.make())
    shared = (inputs.q, inputs.k, inputs.v, case.causal, 0.25, 2.0)
    lengths = (inputs.cu_q, *kv(inputs))
    given = (*shared, *lengths, inputs.max_q, inputs.max_k)
    torch.library.opcheck(torch.ops.bsfa.dense_attention.default, given)
    maths = (*[None] * 4, 128, 128, case.causal, 0.25, 2.0, -1)
    want = torch.ops.bsfa.attention(*shared[:3], *lengths, inputs.max_q, inputs.max_k, *maths)[0]
    assert torch.equal(torch.ops.bsfa.dense_attention(*given), want)
    if all(x is None for x in lengths):
        assert torch.equal(torch.ops.bsfa.dense_attention(*shared), want)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_attention_out(case: Case) -> None:
    inputs = finite(case.make())
    lengths = (inputs.cu_q, *kv(inputs), inputs.max_q, inputs.max_k)
    out = torch.zeros((*inputs.q.shape[:-1], inputs.v.shape[-1] + 3), dtype=case.dtype)[..., :-3]
    sizes = (case.block_m, case.block_n)
    shared = (inputs.q, inputs.k, inputs.v, *lengths, None, None, None, None, *sizes, case.causal, 0.25, 2.0, -1)
    torch.library.opcheck(torch.ops.bsfa.attention_out.default, (out, *shared))


@pytest.mark.parametrize("form", ["absolute", "relative"])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_skipping(case: Case, form: str) -> None:
    inputs = finite(case.make())
    lengths = (inputs.cu_q, *kv(inputs), inputs.max_q, inputs.max_k)
    mask = inputs.block_mask([inputs.draw_mask(b) for b in range(len(inputs))])
    out = torch.zeros((*inputs.q.shape[:-1], inputs.v.shape[-1] + 3), dtype=case.dtype)[..., :-3]
    maths = (case.block_m, case.block_n, case.causal, 0.25, 2.0)
    shared = (inputs.q, inputs.k, inputs.v, *lengths, mask.words, mask.counts, *maths)
    thresholds = torch.full((inputs.q.shape[-2], 2), 0.5 if form == "absolute" else -0.5)
    skip = (thresholds, form, 1, 2, True)
    torch.library.opcheck(torch.ops.bsfa.skip_attention.default, (*shared, *skip))
    torch.library.opcheck(torch.ops.bsfa.skip_attention_out.default, (out, *shared, *skip))
    rows = (inputs.q, inputs.k, *lengths, 8 * len(inputs), 32, 16, *maths[2:], form)
    torch.library.opcheck(torch.ops.bsfa.tile_max.default, rows)
    num_rows = inputs.geometry.num_rows
    first = (inputs.q, inputs.k, *lengths, num_rows, mask.words, *maths, *skip[:-1])
    torch.library.opcheck(torch.ops.bsfa.skip_mask.default, first)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_block_mass(case: Case) -> None:
    inputs = finite(case.make())
    lse = inputs.attend(None)[1]
    lengths = (inputs.cu_q, *kv(inputs), inputs.max_q, inputs.max_k)
    torch.library.opcheck(
        torch.ops.bsfa.block_mass.default,
        (inputs.q, inputs.k, lse, *lengths, 8 * len(inputs), 32, 16, case.causal, 0.25, 0.0),
    )


@pytest.mark.parametrize("case", SAMPLES[:2], ids=str)
@pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda p: f"{p.name}-{p.form}" if isinstance(p, ExactSkip) else p.name if p else "none"
)
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case, policy: Policy | None) -> None:
    inputs = case.make()
    real = inputs.run(policy, return_lse=True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name in ("q", "k", "v"):
            setattr(inputs, name, mode.from_tensor(getattr(inputs, name)))
        fake = inputs.run(policy, return_lse=True)
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


# --- modules ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """What a model's attention layer does: project, attend, project."""

    def __init__(self, policy: Policy | None, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.policy, self.options = policy, options
        self.project = nn.Parameter(torch.randn(32, (4 + 2 + 2) * 16, generator=generator) / 6, requires_grad=False)
        self.merge = nn.Parameter(torch.randn(4 * 16, 32, generator=generator) / 8, requires_grad=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x @ self.project).unflatten(-1, (8, 16)).split([4, 2, 2], dim=-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = bsfa.attention(q, k, v, policy=self.policy, **self.options)
        assert isinstance(out, Tensor)
        return x + out.flatten(-2) @ self.merge


class PackedAttention(Attention):
    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:  # type: ignore[override]
        q, k, v = self.heads(x)
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        out, lse = bsfa.attention_varlen(q, k, v, *lengths, policy=self.policy, return_lse=True, **self.options)
        return x + out.flatten(-2) @ self.merge + lse.mean()


class PagedAttention(Attention):
    def forward(  # type: ignore[override]
        self, x: Tensor, cache: Tensor, block_table: Tensor, seqlens_k: Tensor
    ) -> Tensor:
        q, _, _ = self.heads(x)
        out = bsfa.attention_paged(q, cache[0], cache[1], block_table, seqlens_k, policy=self.policy, **self.options)
        assert isinstance(out, Tensor)
        return x + out.flatten(-2) @ self.merge


def compiled(module: nn.Module, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(module, fullgraph=True, backend=backend, **options)


WITH_POLICY = pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda p: f"{p.name}-{p.form}" if isinstance(p, ExactSkip) else p.name if p else "none"
)


@WITH_POLICY
def test_attention_compiles(policy: Policy | None) -> None:
    module = Attention(policy)
    for seed in (0, 1):
        x = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(module)(x), module(x))


@WITH_POLICY
def test_attention_varlen_compiles(policy: Policy | None) -> None:
    module = PackedAttention(policy)
    run = compiled(module)
    for lengths in ([0, 65, 65, 200], [0, 100, 150, 200]):
        x = torch.randn(200, 32)
        torch.testing.assert_close(run(x, int32(lengths), 135), module(x, int32(lengths), 135))


@WITH_POLICY
def test_attention_paged_compiles(policy: Policy | None) -> None:
    module = PagedAttention(policy)
    run = compiled(module)
    inputs = Case(lengths=((70, 130), (70, 90)), hq=4, hkv=2, dim=16, layout=PAGED, page_size=7).make()
    cache = torch.stack([inputs.k, inputs.v])
    for seqlens in ([130, 90], [70, 84]):
        x = torch.randn(2, 70, 32)
        torch.testing.assert_close(
            run(x, cache, inputs.block_table, int32(seqlens)), module(x, cache, inputs.block_table, int32(seqlens))
        )


@WITH_POLICY
@pytest.mark.parametrize("dynamic", [True, None])
def test_lengths_may_change(policy: Policy | None, dynamic: bool | None) -> None:
    """dynamic=None: the second length makes the graph dynamic; further lengths do not compile anew."""
    module = Attention(policy)
    run = compiled(module, dynamic=dynamic)
    for length in (150, 200, 97):
        x = torch.randn(1, length, 32)
        torch.testing.assert_close(run(x), module(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (64, 65, 333):
            x = torch.randn(1, length, 32)
            torch.testing.assert_close(run(x), module(x))


def test_packed_lengths_may_change() -> None:
    module = PackedAttention(POLICIES[2])
    run = compiled(module, dynamic=True)
    for lengths in ([0, 65, 65, 200], [0, 30, 100], [0, 150]):
        longest = max(b - a for a, b in pairwise(lengths))
        x = torch.randn(lengths[-1], 32)
        torch.testing.assert_close(run(x, int32(lengths), longest), module(x, int32(lengths), longest))


def test_options_compile() -> None:
    x = torch.randn(1, 150, 32)
    for options in ({"causal": False}, {"softmax_scale": 0.5}, {"softcap": 4.0}, {"window_left": 20}):
        module = Attention(None, **options)
        torch.testing.assert_close(compiled(module)(x), module(x))
    for policy in POLICIES[1:]:
        torch.compiler.reset()  # all are forward of one class, and torch compiles a function only so often
        module = Attention(policy, softcap=4.0, softmax_scale=0.5, prompt_lens=int32([300]))
        torch.testing.assert_close(compiled(module)(x), module(x))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_inductor(dtype: torch.dtype) -> None:
    module = Attention(POLICIES[2]).to(dtype)
    x = torch.randn(1, 150, 32, dtype=dtype)
    tolerance = 1e-5 if dtype == F32 else 3e-2
    torch.testing.assert_close(compiled(module, "inductor")(x), module(x), rtol=tolerance, atol=tolerance)


def test_export() -> None:
    """torch.export keeps the operators as they are."""
    module = Attention(POLICIES[3])
    x, other = torch.randn(2, 1, 150, 32).unbind()
    program = torch.export.export(module, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    for op in ("pool_blocks", "select_blocks", "attention"):
        assert any(f"bsfa.{op}" in target for target in targets)
    torch.testing.assert_close(program.module()(other), module(other))


def test_masks_cross_a_graph() -> None:
    """Selection in one compiled function, attention in another."""
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, dim=16).make()
    policy = RelativeMax(alpha=0.8, block_m=32, block_n=16)

    def select(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        mask = bsfa.select_blocks(q, bsfa.pool_blocks(k, block_n=16), policy, seqlen_k=300)
        assert isinstance(mask, bsfa.BlockMask)
        return mask.words, mask.counts

    words, counts = torch.compile(select, fullgraph=True, backend="aot_eager")(inputs.q, inputs.k)
    want = bsfa.select_blocks(inputs.q, bsfa.pool_blocks(inputs.k, block_n=16), policy, seqlen_k=300)
    assert torch.equal(words, want.words) and torch.equal(counts, want.counts)
    mask = bsfa.BlockMask(words, counts, want.geometry)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return bsfa.block_sparse_attention(q, k, v, mask)

    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(inputs.q, inputs.k, inputs.v)
    for a, b in zip(got, bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, want), strict=True):
        assert torch.equal(a, b)
