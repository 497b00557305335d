"""The kernel table is parsed once, and a call that no kernel of its GPU can run is refused by name, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import bsfa
from bsfa import _library, limits
from bsfa.policies import CumulativeMass, Dense, ExactSkip, RelativeMax, ScoredPolicy, StaticPattern
from bsfa.policies.base import Scoring

POOL = {"op": "pool_blocks", "device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "head_dim": "any"}
ATTENTION = {**POOL, "op": "attention", "head_dim": "64, 128, 192/128", "blocks": "128x128"}
SKIP = {**ATTENTION, "op": "skip_attention", "head_dim": "64, 128"}
SKIP_MASK = {**SKIP, "op": "skip_mask"}
BOUND_MASK = {**SKIP, "op": "bound_mask"}
SELECT = {**SKIP, "op": "select_blocks", "rule": "relative_max", "sharing": "none, group", "max_blocks": 40}
SELECT_STRIDED = {**SKIP, "op": "select_blocks", "rule": "flat64, antidiagonal", "stride": "4..64"}
SELECT_STRIDED = {**SELECT_STRIDED, "max_blocks": 100}
SELECT_POOLED = {**ATTENTION, "op": "select_blocks", "head_dim": "1..256", "rule": "pooled", "max_blocks": 100}
MASS = {**SKIP, "op": "block_mass", "blocks": "64x128, 128x128"}
MAXIMA = {**MASS, "op": "tile_max"}
TOKENS = {**POOL, "op": "token_mask", "dtypes": "int32", "blocks": "128x128", "max_blocks": 100}
ROWS = [POOL, ATTENTION, TOKENS, SKIP, SKIP_MASK, BOUND_MASK, SELECT, SELECT_STRIDED, SELECT_POOLED, MASS, MAXIMA]
CPU = {**POOL, "device": "cpu", "dtypes": "float32", "head_dim": "1..256"}


def test_parse() -> None:
    older = {**ATTENTION, "arch": "sm_80", "dtypes": "float16", "head_dim": "1..96, 128", "blocks": "128x64, 64x64"}
    table = limits.parse([CPU, POOL, ATTENTION, older])
    assert set(table) == {("pool_blocks", "cuda"), ("attention", "cuda")}
    half = (torch.bfloat16, torch.float16)
    assert table["pool_blocks", "cuda"] == (limits.Limits("sm_90a", (90, 90), half, None, None),)
    first, second = table["attention", "cuda"]
    assert first == limits.Limits(
        "sm_90a", (90, 90), half, ((64, 64, None), (128, 128, None), (192, 192, 128)), ((128, 128),)
    )
    assert second == limits.Limits(
        "sm_80", (80, 89), (torch.float16,), ((1, 96, None), (128, 128, None)), ((128, 64), (64, 64))
    )


def test_rules() -> None:
    one, strided, pooled = limits.parse([SELECT, SELECT_STRIDED, SELECT_POOLED])["select_blocks", "cuda"]
    assert one.rules == ("relative_max",) and strided.rules == ("flat64", "antidiagonal")
    assert one.sharings == ("none", "group") and one.max_blocks == 40 and strided.strides == ((4, 64),)
    attention = limits.parse([ATTENTION])["attention", "cuda"][0]
    assert attention.rules is attention.strides is attention.sharings is attention.max_blocks is None
    assert pooled.sharings is one.strides is None


@pytest.mark.parametrize(
    ("arch", "capabilities"),
    [("sm_90a", (90, 90)), ("sm_86", (86, 89)), ("sm_100f", (100, 100))],
)
def test_architectures(arch: str, capabilities: tuple[int, int]) -> None:
    assert limits.parse([{**POOL, "arch": arch}])["pool_blocks", "cuda"][0].capabilities == capabilities


@pytest.mark.parametrize("row", [{"arch": "hopper"}, {"dtypes": "float7"}, {"head_dim": "some"}, {"blocks": "128"}])
def test_rows_that_make_no_sense(row: dict[str, str]) -> None:
    with pytest.raises((ValueError, AttributeError)):
        limits.parse([{**ATTENTION, **row}])


def test_this_build() -> None:
    assert all(key[1] != "cpu" for key in limits.LIMITS)
    assert {op for op, _ in limits.LIMITS} <= set(_library.OPERATORS)


# --- calls on a GPU that is not there ---------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors on a device 0 of capability 9.0, with the kernels of the table above."""
    monkeypatch.setitem(_library.KERNELS, "cuda", frozenset(row["op"] for row in ROWS))
    monkeypatch.setattr(limits, "LIMITS", limits.parse(ROWS))
    monkeypatch.setattr(limits, "_capability_of", {0: 90})
    torch.compiler.reset()
    with FakeTensorMode():
        yield
    torch.compiler.reset()


def make(*shape: int, strides: tuple[int, ...] | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    return torch.empty_strided(shape, strides, device="cuda:0", dtype=dtype)


def select(policy: ScoredPolicy, q: Tensor | None = None, seqlen_k: int = 300) -> Any:
    """With the pooled keys or the keys, as the policy wants."""
    q = make(2, 300, 4, 64) if q is None else q
    tokens = -(-seqlen_k // policy.block_n) if policy.needs_summary else seqlen_k
    keys = make(2, tokens, 2, q.shape[-1], dtype=q.dtype)
    summary, k = (keys, None) if policy.needs_summary else (None, keys)
    return bsfa.select_blocks(q, summary, policy, k=k, seqlen_k=seqlen_k).words


def attend(q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **options: Any) -> Any:
    q = make(2, 300, 4, 64) if q is None else q
    k = make(2, 300, 2, q.shape[-1], dtype=q.dtype) if k is None else k
    return bsfa.attention(q, k, k if v is None else v, **options)


def mass(*shape: int, dtype: torch.dtype = torch.bfloat16, k: Tensor | None = None, **blocks: int) -> Tensor:
    q = make(*shape, dtype=dtype)
    lse = make(shape[0], shape[2], shape[1], dtype=torch.float32)
    return bsfa.block_mass(q, q if k is None else k, lse, **blocks)


def maxima(*shape: int, dtype: torch.dtype = torch.bfloat16, k: Tensor | None = None, **options: Any) -> Tensor:
    q = make(*shape, dtype=dtype)
    return bsfa.tile_max(q, q if k is None else k, **options)


def masked(dim: int, dim_v: int, seqlen_k: int = 300, **options: Any) -> Any:
    q, k, v = make(2, 300, 4, dim), make(2, seqlen_k, 2, dim), make(2, seqlen_k, 2, dim_v)
    return bsfa.masked_mha(q, k, v, make(2, 300, 8, dtype=torch.int32), **options)


@dataclass(frozen=True, eq=False)
class Ruled(CumulativeMass):
    """A policy that asks for any rule."""

    rule: str
    stride: int = 16
    sharing: str = "none"

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.rule, stride=self.stride, sharing=self.sharing)


SUPPORTED: list[Callable[[], Any]] = [
    lambda: attend(),
    lambda: attend(make(2, 300, 4, 128, dtype=torch.float16)),
    lambda: attend(policy=Dense(block_m=64)),
    lambda: attend(policy=RelativeMax()),
    lambda: attend(policy=RelativeMax(block_n=64), window_left=5),  # dense by its window
    lambda: attend(k=make(2, 300, 2, 64, strides=(300 * 256, 256, 64, 1))),
    lambda: attend(q=make(2, 300, 1, 64, strides=(300 * 64, 64, 3, 1)), k=make(2, 300, 1, 64)),  # one head: no stride
    lambda: attend(k=make(1, 300, 1, 64, strides=(0, 64, 0, 1)), q=make(1, 300, 2, 64)),
    lambda: attend(out=make(2, 300, 4, 64, strides=(300 * 280, 280, 67, 1))),
    lambda: attend(q=make(2, 0, 4, 64)),
    lambda: attend(policy=ExactSkip(ratio=0.1)),
    lambda: attend(policy=ExactSkip(within=RelativeMax())),
    lambda: attend(policy=ExactSkip(ratio=0.1, bounds=True)),
    lambda: attend(policy=ExactSkip(ratio=0.1, bounds=True, passes=2, within=RelativeMax())),
    lambda: attend(policy=ExactSkip(block_n=64), window_left=5),
    lambda: bsfa.pool_blocks(make(2, 300, 2, 33)),
    lambda: select(RelativeMax()),
    lambda: select(RelativeMax(shared=True)),
    lambda: select(RelativeMax(), seqlen_k=40 * 128),
    lambda: select(CumulativeMass()),
    lambda: select(CumulativeMass(shared=True), seqlen_k=100 * 128),
    lambda: select(CumulativeMass(pooling="flat64", shared=True), seqlen_k=100 * 128),
    lambda: select(Ruled("antidiagonal", 4, "union"), seqlen_k=100 * 128),
    lambda: select(CumulativeMass(), make(2, 300, 4, 33, strides=(300 * 135, 135, 33, 1))),
    lambda: masked(192, 128),
    lambda: masked(192, 128, 100 * 128),
    lambda: masked(64, 64, max_dense_seqlen=300),  # dense
    lambda: mass(2, 300, 4, 64),
    lambda: mass(2, 300, 4, 128, block_m=64, dtype=torch.float16),
    lambda: maxima(2, 300, 4, 64),
    lambda: maxima(2, 300, 4, 128, block_m=128, form="relative", k=make(2, 400, 2, 128)),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.filterwarnings("ignore::bsfa.DenseFallbackWarning")
@pytest.mark.parametrize("call", SUPPORTED, ids=range(len(SUPPORTED)))
def test_supported(call: Callable[[], Any]) -> None:
    assert call().device == torch.device("cuda:0")


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: attend(make(2, 300, 4, 64, dtype=torch.float32)), "'attention'.*float32.*take bfloat16, float16.*Convert"),
    (lambda: attend(make(2, 300, 4, 80)), "head_dim 80: its kernels take 64, 128.*Pad"),
    (lambda: attend(make(2, 300, 4, 96), policy=RelativeMax()), "head_dim 96"),
    (lambda: attend(v=make(2, 300, 2, 128)), r"head_dim 64 of q and k and 128 of v: .* 64, 128, 192 \(v: 128\)"),
    (lambda: attend(make(2, 300, 4, 192), make(2, 300, 2, 192), make(2, 300, 2, 192)), "with head_dim 192: .*Pad"),
    (lambda: masked(192, 64), "'attention'.*192 of q and k and 64 of v"),
    (lambda: masked(192, 128, 101 * 128), "'token_mask'.*with 101 KV blocks .*its kernels take at most 100. Move"),
    (lambda: attend(policy=StaticPattern(block_m=64)), "mask of 64 x 128 .*take 128 x 128.*Give the policy"),
    (lambda: attend(policy=RelativeMax(block_n=64)), "mask of 128 x 64"),
    (lambda: attend(policy=ExactSkip(block_n=64)), "'skip_attention'.*128 x 64 .*take 128 x 128"),
    (
        lambda: attend(make(2, 300, 4, 80), policy=ExactSkip()),
        "'skip_attention'.*head_dim 80: its kernels take 64, 128",
    ),
    (lambda: attend(v=make(2, 300, 2, 128), policy=ExactSkip()), "'skip_attention'.*head_dim 64 of q and k and 128"),
    (
        lambda: attend(k=make(2, 300, 2, 64, strides=(0, 128, 64, 1)), policy=ExactSkip()),
        r"'skip_attention'.*k\.contiguous",
    ),
    (lambda: attend(policy=ExactSkip(block_n=64, passes=2)), "'skip_mask'.*128 x 64 .*take 128 x 128"),
    (lambda: attend(make(2, 300, 4, 80), policy=ExactSkip(passes=2)), "'skip_mask'.*head_dim 80"),
    (lambda: attend(v=make(2, 300, 2, 128), policy=ExactSkip(passes=2)), "'attention'.*head_dim 64 of q and k and 128"),
    (
        lambda: attend(k=make(2, 300, 2, 64, strides=(0, 128, 64, 1)), policy=ExactSkip(passes=2)),
        r"'attention'.*k\.contiguous",
    ),
    (lambda: attend(policy=ExactSkip(block_n=64, bounds=True)), "'skip_attention'.*128 x 64 .*take 128 x 128"),
    (lambda: attend(make(2, 300, 4, 80), policy=ExactSkip(passes=2, bounds=True)), "'skip_mask'.*head_dim 80"),
    (lambda: attend(make(2, 300, 4, 64, strides=(300 * 260, 260, 65, 1))), r"q of strides .*q\.contiguous\(\)"),
    (lambda: attend(make(2, 300, 4, 64, strides=(300 * 257, 257, 64, 1))), r"q\.contiguous"),
    (lambda: attend(k=make(2, 300, 2, 64, strides=(0, 128, 64, 1))), r"k\.contiguous"),
    (lambda: attend(k=make(2, 300, 2, 64, strides=(19200, 64, 0, 1))), r"no stride of 0 \(expand\).*k\.contiguous"),
    (lambda: attend(v=make(2, 300, 2, 64, strides=(300 * 128 + 4, 128, 64, 1))), r"v\.contiguous"),
    (lambda: select(RelativeMax(), make(2, 300, 4, 64, dtype=torch.float32)), "'select_blocks'.*float32"),
    (lambda: select(RelativeMax(), make(2, 300, 4, 96)), "'select_blocks'.*head_dim 96: its kernels take 64, 128"),
    (lambda: select(CumulativeMass(), make(2, 300, 4, 64, dtype=torch.float32)), "'select_blocks'.*float32"),
    (lambda: select(RelativeMax(), make(2, 300, 4, 64, strides=(300 * 260, 260, 65, 1))), r"q\.contiguous\(\)"),
    (lambda: select(Ruled("antidiagonal", 2)), "'select_blocks'.*a stride of 2: its kernels take 4..64"),
    (lambda: select(Ruled("something", 16)), "'select_blocks'.*score rule something, which has no kernel"),
    (lambda: select(Ruled("relative_max", sharing="union")), "relative_max .* sharing 'union': .* take none, group"),
    (lambda: select(RelativeMax(), seqlen_k=40 * 128 + 1), "'select_blocks'.*with 41 KV blocks .* at most 40"),
    (lambda: select(CumulativeMass(), seqlen_k=100 * 128 + 1), "'select_blocks'.*with 101 KV blocks .* at most 100"),
    (lambda: select(Ruled("antidiagonal"), seqlen_k=100 * 128 + 1), "'select_blocks'.*101 KV blocks .* at most 100"),
    (lambda: bsfa.pool_blocks(make(2, 300, 2, 64, dtype=torch.float32)), "'pool_blocks'.*float32"),
    (
        lambda: bsfa.select_blocks(
            make(2, 300, 4, 64), make(2, 3, 2, 64), RelativeMax(), seqlen_k=300, return_scores=True
        ),
        "'score_blocks'.*no CUDA kernel|'score_blocks'.*this torch",
    ),
    (lambda: mass(2, 300, 4, 64, dtype=torch.float32), "'block_mass'.*float32"),
    (lambda: mass(2, 300, 4, 96), "'block_mass'.*head_dim 96"),
    (lambda: mass(2, 300, 4, 64, block_m=32), "'block_mass'.*32 x 128 .*take 64 x 128, 128 x 128"),
    (lambda: mass(2, 300, 4, 64, k=make(2, 300, 2, 64, strides=(300 * 130, 130, 65, 1))), r"k\.contiguous"),
    (lambda: maxima(2, 300, 4, 64, dtype=torch.float32), "'tile_max'.*float32"),
    (lambda: maxima(2, 300, 4, 32), "'tile_max'.*head_dim 32"),
    (lambda: maxima(2, 300, 4, 64, block_n=64), "'tile_max'.*64 x 64"),
    (lambda: maxima(2, 300, 4, 64, k=make(2, 300, 4, 64, strides=(0, 256, 64, 1))), r"'tile_max'.*k\.contiguous"),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(bsfa.UnsupportedError, match=message):
        call()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("has", [(8, 0), (8, 9), (9, 1), (10, 0), (12, 0)])
def test_other_gpus(has: tuple[int, int]) -> None:
    limits._capability_of[0] = 10 * has[0] + has[1]
    with pytest.raises(bsfa.UnsupportedError, match=rf"compiled for sm_90a.*capability {has[0]}\.{has[1]}\. Move"):
        attend()
    with pytest.raises(bsfa.UnsupportedError, match=r"'pool_blocks'.*sm_90a"):
        bsfa.pool_blocks(make(2, 300, 2, 64))


@pytest.mark.usefixtures("hopper")
def test_any_row_may_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {**ATTENTION, "dtypes": "bfloat16", "head_dim": "256", "blocks": "128x64"}
    monkeypatch.setattr(limits, "LIMITS", limits.parse([ATTENTION, wide]))
    attend(make(2, 300, 4, 256), policy=RelativeMax(block_n=64))
    attend(make(2, 300, 4, 128), policy=RelativeMax())
    with pytest.raises(bsfa.UnsupportedError, match=r"128 x 64 .*take 128 x 128"):
        attend(make(2, 300, 4, 128), policy=RelativeMax(block_n=64))
    with pytest.raises(bsfa.UnsupportedError, match="head_dim 256: its kernels take 64, 128"):
        attend(make(2, 300, 4, 256, dtype=torch.float16))
    with pytest.raises(bsfa.UnsupportedError, match=r"head_dim 32: its kernels take 64, 128, 192 .v: 128., 256"):
        attend(make(2, 300, 4, 32))


def test_storage_offset() -> None:
    """On the CPU: fake tensors of a torch without CUDA cannot be sliced."""
    flat = torch.zeros(2 * 300 * 128 + 8, dtype=torch.bfloat16)
    limits.check_tma("attention", k=flat[8:].view(2, 300, 2, 64))
    with pytest.raises(bsfa.UnsupportedError, match=r"storage offset 4.*Call k\.clone\(\)"):
        limits.check_tma("attention", k=flat[4:-4].view(2, 300, 2, 64))
    limits.check_tma("attention", k=flat.float()[4:-4].view(2, 300, 2, 64))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_fullgraph(dynamic: bool | None) -> None:
    """The checks leave nothing in the graph, hold for lengths that change, and refuse while tracing."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k: bsfa.attention(q, k, k), fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (300, 200, 100):
        q = make(2, length, 4, 64)
        assert compiled(q, make(2, length, 2, 64)).shape == q.shape
    calls = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.bsfa.attention.default in calls or torch.ops.bsfa.attention in calls
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(make(2, 300, 4, 64, strides=(300 * 260, 260, 65, 1)), make(2, 300, 2, 64))
