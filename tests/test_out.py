"""``out=``: attention writes into a given tensor, what attention without it returns, and nothing beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import Dense, ExactSkip, Policy, RelativeMax, StaticPattern
from cases import BATCHED, BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, Inputs, table

RAGGED = ((65, 65), (0, 0), (1, 130), (0, 40), (37, 150))
CHUNKS = ((70, 130), (70, 130))
BASE = Case(lengths=CHUNKS, hq=4, hkv=2, dim=16, mask="random")
CASES = [
    *table(BASE, layout=[BATCHED, PAGED], dtype=[F32, BF16, F16]),
    *table(replace(BASE, lengths=RAGGED), layout=[PACKED, PAGED_PACKED], dtype=[F32, BF16]),
    replace(BASE, dim_v=40, causal=False),
    replace(BASE, lengths=((130, 1),), softcap=3.0),
]
FILL = -7.0


def shape_of(inputs: Inputs) -> tuple[int, ...]:
    return (*inputs.q.shape[:-1], inputs.v.shape[-1])


# Each takes a shape and returns (a buffer full of FILL, a view of that shape into it).
def plain(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    buffer = torch.full(shape, FILL, dtype=dtype)
    return buffer, buffer


def gaps(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    *outer, tokens, heads, dim = shape
    buffer = torch.full((*outer, tokens + 2, heads + 3, dim + 5), FILL, dtype=dtype)
    return buffer, buffer[..., 1 : tokens + 1, 2 : heads + 2, 3 : dim + 3]


def head_major(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    *outer, tokens, heads, dim = shape
    buffer = torch.full((*outer, heads, tokens, dim), FILL, dtype=dtype)
    return buffer, buffer.transpose(-2, -3)


def interleaved(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    buffer = torch.full((*shape[:-1], 2 * shape[-1]), FILL, dtype=dtype)
    return buffer, buffer[..., shape[-1] :]


VIEWS = [plain, gaps, head_major, interleaved]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_holds_what_is_returned_without_it(case: Case, view: Callable[..., tuple[Tensor, Tensor]]) -> None:
    inputs = case.make()
    mask = inputs.block_mask([inputs.draw_mask(b) for b in range(len(inputs))])
    want, want_lse = inputs.attend(mask)
    buffer, out = view(shape_of(inputs), case.dtype)
    got, lse = bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, mask, out=out, **inputs.maths, **inputs.layout)
    assert got is out
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    out.fill_(FILL)
    assert (buffer == FILL).all(), "something outside of out was written"


@pytest.mark.parametrize(
    "policy",
    [
        None,
        Dense(),
        StaticPattern(block_m=32, block_n=16),
        RelativeMax(alpha=0.5),
        ExactSkip.absolute(0.5, block_m=32, block_n=16),
    ],
    ids=lambda p: p.name if p else "none",
)
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED, PAGED_PACKED])
def test_every_function_takes_it(layout: str, policy: Policy | None) -> None:
    inputs = replace(BASE, layout=layout, mask="none").make()
    want, want_lse, info = inputs.run(policy, return_lse=True, return_info=True)
    _, out = gaps(shape_of(inputs), F32)
    got, lse, got_info = inputs.run(policy, return_lse=True, return_info=True, out=out)
    assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)
    assert float(got_info.density()) == float(info.density())
    out.fill_(NAN)
    assert inputs.run(policy, out=out) is out and torch.equal(out, want)


@pytest.mark.parametrize("lengths", [((0, 70),), ((70, 0),), ((0, 0),)])
def test_empty_sequences(lengths: tuple[tuple[int, int], ...]) -> None:
    inputs = Case(lengths=lengths, layout=PACKED).make()
    _, out = gaps(shape_of(inputs), F32)
    assert inputs.run(None, out=out) is out and (out == 0).all()


# --- what is refused --------------------------------------------------------------------------------------------------

Make = Callable[[Tensor], Any]

BAD: list[tuple[str, Make, type[Exception], str]] = [
    ("list", lambda t: [1.0], TypeError, "out must be a torch.Tensor"),
    ("float16", lambda t: t.half(), TypeError, "out is torch.float16 but q is torch.float32"),
    ("float64", lambda t: t.double(), TypeError, "out is torch.float64"),
    ("device", lambda t: t.to("meta"), ValueError, "out is on meta but q is on cpu"),
    ("tokens", lambda t: t[:, :-1], ValueError, "out must have shape"),
    ("heads", lambda t: t[..., :1, :], ValueError, "out must have shape"),
    ("head_dim", lambda t: t[..., :-1], ValueError, "out must have shape"),
    ("head_dim of q", lambda t: t.new_zeros(2, 70, 4, 16), ValueError, r"out must have shape \(2, 70, 4, 24\)"),
    ("rank", lambda t: t.flatten(0, 1), ValueError, "out must have shape"),
    ("last stride", lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2), ValueError, "out must have unit"),
    ("grad", lambda t: t.requires_grad_(), ValueError, "out requires grad"),
    ("heads expanded", lambda t: t[:, :, :1].expand(-1, -1, 4, -1), ValueError, "out overlaps itself"),
    ("batch expanded", lambda t: t[:1].expand(2, -1, -1, -1), ValueError, "out overlaps itself"),
    ("rows overlap", lambda t: t.as_strided(t.shape, (70 * 96, 96, 20, 1)), ValueError, "out overlaps itself"),
    ("windows", lambda t: t.as_strided(t.shape, (96, 96, 24, 1)), ValueError, "out overlaps itself"),
]


@pytest.mark.parametrize(("make", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_outs_are_refused_before_anything_runs(make: Make, error: type[Exception], message: str) -> None:
    inputs = Case(lengths=((70, 130), (70, 130)), hq=4, hkv=2, dim=16, dim_v=24).make()
    good = torch.full((2, 70, 4, 24), FILL)
    bad = make(good)
    with torch.no_grad():
        with pytest.raises(error, match=message):
            inputs.run(None, out=bad)
        with pytest.raises(error, match=message):
            bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, None, out=bad)
    assert (good == FILL).all()


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_may_not_share_memory_with_the_inputs(layout: str, name: str) -> None:
    inputs = Case(lengths=((64, 64), (64, 64)), layout=layout, page_size=64, hq=2, hkv=2, dim=16).make()
    given = getattr(inputs, name)
    size = inputs.q.numel()
    with pytest.raises(ValueError, match=f"out may overlap {name}"):
        inputs.run(None, out=given.flatten()[:size].view(inputs.q.shape))
    whole = torch.cat([given.flatten(), torch.zeros(size)])  # the same storage, side by side: fine
    setattr(inputs, name, whole[: given.numel()].view(given.shape))
    out = whole[given.numel() :].view(inputs.q.shape)
    want = inputs.run(None)
    assert torch.equal(inputs.run(None, out=out), want)


def test_raw_operator_raises_rather_than_crash() -> None:
    q = torch.randn(2, 70, 4, 16)
    rest = (q, q, q, None, None, None, None, 70, 70, None, None, None, None, 64, 64, True, 0.25, 0.0, -1)
    torch.ops.bsfa.attention_out(torch.empty_like(q), *rest)
    for bad in (
        q.new_empty(2, 70, 4, 15),
        q.new_empty(2, 70, 3, 16),
        q.new_empty(2, 69, 4, 16),
        q.new_empty(1, 70, 4, 16),
        q.new_empty(140, 4, 16),
        q.new_empty(0),
        q.new_empty(2, 70, 4, 16, dtype=torch.float16),
        q.new_empty(2, 70, 4, 16, dtype=torch.float64),
        q.new_empty(2, 70, 16, 4).transpose(-1, -2),
        q.new_empty(2, 70, 1, 16).expand(-1, -1, 4, -1),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.bsfa.attention_out(bad, *rest)


def test_raw_dense_operator_raises_rather_than_crash() -> None:
    q = torch.randn(2, 70, 4, 16)
    maths = (True, 0.25, 0.0)
    table, lengths = torch.zeros(2, 1, dtype=torch.int32), torch.full((2,), 70, dtype=torch.int32)
    attend = torch.ops.bsfa.dense_attention
    assert torch.equal(attend(q, q, q, *maths, None, None, table, lengths, 0, 70)[0], attend(q, q, q, *maths)[0])
    for bad in (
        (q[0], q, q, *maths),
        (q, q[:1], q[:1], *maths),
        (q, q, q[:, :-1], *maths),
        (q, q.half(), q.half(), *maths),
        (q[0, 0, 0], q, q, *maths),
        (q, q[0, 0], q[0, 0], *maths),
        (q[..., :3, :], q[..., :2, :], q[..., :2, :], *maths),
        (q, q, q, *maths, None, None, table, None, 0, 70),
        (q, q, q, *maths, None, None, table, lengths + 1, 0, 70),
        (q, q, q, *maths, None, None, table + 2, lengths, 0, 70),
        (q, q, q, *maths, None, None, table, lengths, 0, 71),
        (q[0], q[0], q[0], *maths, lengths[:1] * 0, None, None, None, 70, 70),
        (q[0], q[0], q[0], *maths, lengths - lengths[0], lengths, None, None, 70, 70),
    ):
        with pytest.raises(RuntimeError):
            attend(*bad)


# --- torch ------------------------------------------------------------------------------------------------------------


def test_autograd_notices_the_write() -> None:
    """A tensor that autograd saved for a backward pass may not change unseen."""
    q = torch.randn(1, 70, 2, 16)
    weight = torch.ones(16, requires_grad=True)
    out = torch.ones(1, 70, 2, 16)
    product = (weight * out).sum()
    bsfa.attention(q, q, q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode() -> None:
    q = torch.randn(1, 70, 2, 16)
    want = bsfa.attention(q, q, q)
    before = torch.empty_like(q)
    with torch.inference_mode():
        assert torch.equal(bsfa.attention(q, q, q, out=before), want)
        assert torch.equal(bsfa.attention(q, q, q, out=torch.empty_like(q)), want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_fullgraph(backend: str, dynamic: bool | None) -> None:
    torch.compiler.reset()

    def run(q: Tensor, k: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        policy = StaticPattern(block_m=32, block_n=16)
        out, lse = bsfa.attention(q, k, k, policy=policy, out=buffer[:, 1:, :, :16], return_lse=True)
        return out * 2, lse, buffer.sum()

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (70, 100, 33):
        q, k = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16)
        want_buffer, buffer = (torch.full((2, length + 1, 4, 20), FILL) for _ in range(2))
        want, got = run(q, k, want_buffer), compiled(q, k, buffer)
        assert torch.equal(buffer, want_buffer)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_return_the_given_tensor(backend: str) -> None:
    torch.compiler.reset()
    q = torch.randn(1, 70, 2, 16)
    out = torch.full_like(q, FILL)
    compiled = torch.compile(lambda q, out: bsfa.attention(q, q, q, out=out), fullgraph=True, backend=backend)
    assert compiled(q, out) is out and torch.equal(out, bsfa.attention(q, q, q))
