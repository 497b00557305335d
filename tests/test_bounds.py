"""ExactSkip's bounds where no GPU is: what is asked for, what the CPU makes of it, and what a GPU would be told to run.

The kernel and its results are the matter of gpu/test_bounds_cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bsfa
from bsfa import _library, attending, evaluation, limits
from bsfa.calibration.curves import check_calibratable
from bsfa.policies import ExactSkip, RelativeMax, StaticPattern
from bsfa.policies.base import Selection
from bsfa.stages import resolve_layout
from cases import BATCHED, PACKED, PAGED, Case, Inputs
from skip_cases import make, masks_of, policy_for

SIZES = {"block_m": 128, "block_n": 32}
BASE = Case(lengths=((150, 300), (150, 300)), hq=4, hkv=2, dim=16, **SIZES)
ROW = {"device": "cuda", "arch": "sm_90a", "dtypes": "bfloat16, float16", "head_dim": "64, 128", "blocks": "128x128"}
OPERATORS = ("pool_blocks", "select_blocks", "attention", "skip_attention", "skip_mask", "bound_mask")
ROWS: list[dict[str, Any]] = [{**ROW, "op": op} for op in OPERATORS]
ROWS[-1]["max_blocks"] = 65536
WITH_FORMS = pytest.mark.parametrize("form", ["absolute", "relative"])


# --- on the CPU -------------------------------------------------------------------------------------------------------


@WITH_FORMS
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_nothing_changes_on_the_cpu(layout: str, mask: str, passes: int, form: str) -> None:
    inputs = make(replace(BASE, layout=layout, mask=mask))
    masks = masks_of(inputs)
    policy = policy_for(inputs, masks, form, passes=passes)
    within = None if masks is None else inputs.block_mask(masks)
    want, got = (
        bsfa.block_sparse_attention(
            inputs.q, inputs.k, inputs.v, within, skip=p, return_skips=True, **inputs.maths, **inputs.layout
        )
        for p in (policy, replace(policy, bounds=True))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and int(got[2][:, 1].sum()) > 0


def test_limits_of_a_gpu_are_none_of_the_cpus() -> None:
    inputs = Case(lengths=((40, 90),), hq=2, hkv=1, dim=24, block_m=32, block_n=16).make()
    policy = ExactSkip(ratio=0.5, block_m=32, block_n=16, bounds=True, within=StaticPattern(block_m=32, block_n=16))
    assert inputs.run(policy).isfinite().all()


def test_compiles_on_the_cpu() -> None:
    inputs = make(BASE)
    policy = replace(policy_for(inputs, None, "absolute"), bounds=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, info = bsfa.attention(q, k, v, policy=policy, return_info=True)
        return out, info.skips

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs.q, inputs.k, inputs.v)
    assert all(torch.equal(a, b) for a, b in zip(got, run(inputs.q, inputs.k, inputs.v), strict=True))


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong() -> None:
    for value in (1, None, "yes"):
        with pytest.raises(TypeError, match=r"ExactSkip.bounds must be a bool"):
            ExactSkip(bounds=value)  # type: ignore[arg-type]
    with pytest.raises(bsfa.UnsupportedError, match=r"counted\) with bounds.*bounds=False"):
        ExactSkip(bounds=True, counted=True)
    with pytest.raises(bsfa.UnsupportedError, match=r"counted\) with bounds"):
        replace(ExactSkip(counted=True), bounds=True)
    meta = torch.device("meta")
    assert ExactSkip.absolute(1.0, bounds=True).to(meta).bounds and not ExactSkip().bounds


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (ExactSkip(bounds=True), "exact-skip relative with bounds"),
        (ExactSkip.absolute(1.0, bounds=True, passes=2), "exact-skip absolute in two passes with bounds"),
        (ExactSkip(bounds=True, within=RelativeMax()), "exact-skip relative with bounds within relative-max"),
    ],
    ids=str,
)
def test_evaluation_names_them(policy: ExactSkip, text: str) -> None:
    assert evaluation.describe(policy) == text


def test_calibration_and_evaluation_take_them() -> None:
    """They have no say in what is skipped."""
    for form in ("absolute", "relative"):
        check_calibratable(ExactSkip(form=form, bounds=True))
    inputs = make(replace(BASE, lengths=((300, 300),)))
    policy = policy_for(inputs, None, "absolute")
    scale: dict[str, Any] = {"causal": True, "softmax_scale": None, "softcap": 0.0}
    (_, want), (_, got) = (
        evaluation.unskipped(inputs.q, inputs.k, p, **scale) for p in (policy, replace(policy, bounds=True))
    )
    assert torch.equal(got, want)


# --- what is made of a mask by bounds ---------------------------------------------------------------------------------


def after_bounds(
    inputs: Inputs, policy: ExactSkip, monkeypatch: pytest.MonkeyPatch, slack: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Attention by ``policy``, the same after a mask by bounds that are off by ``slack`` nats, and what made that.

    The mask is what the first of two passes leaves with cuts that much lower: for certain of less.
    """
    made: list[Tensor] = []

    def bound_mask(*arguments: Any) -> Any:
        *head, cuts, form, sinks, window = arguments
        if form == "relative":
            cuts = cuts.masked_fill(cuts > 0, -torch.inf)  # as schemas.h says
        made[:] = torch.ops.bsfa.skip_mask(*head, cuts - slack, form, sinks, window)
        return tuple(made)

    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "block_table", "seqlens_k")
    layout = resolve_layout(inputs.q, inputs.k, None, inputs.case.causal, *map(inputs.layout.get, names))
    mask = policy.select(Selection(inputs.q, layout, inputs.case.softmax_scale, 0.0, None, None))
    monkeypatch.setattr(torch.ops.bsfa, "bound_mask", bound_mask)
    monkeypatch.setattr(attending, "goes_by_bounds", lambda device: True)
    given = (inputs.q, inputs.k, inputs.v, mask, layout, inputs.case.softmax_scale, 0.0)
    want = attending.attend_skipping(*given, policy)
    assert not made
    return want, attending.attend_skipping(*given, replace(policy, bounds=True)), made


@WITH_FORMS
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
@pytest.mark.parametrize("within", [None, StaticPattern(window_blocks=6, sink_blocks=2, **SIZES)])
def test_results_and_counts_are_those_without(
    within: StaticPattern | None, layout: str, passes: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(replace(BASE, layout=layout, lengths=((260, 500), (260, 500))))
    policy = replace(policy_for(inputs, None, form, passes=passes), within=within)
    want, got, (_, _, bounded) = after_bounds(
        inputs, policy, monkeypatch, slack=torch.tensor([[0.01], [0.5], [1e30], [0.2]])
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    left_out, skipped = int(bounded[:, 1].sum()), int(got[2][:, 1].sum())
    assert torch.equal(bounded[:, 0], got[2][:, 0]) and 0 < left_out < skipped


@pytest.mark.parametrize("passes", [1, 2])
def test_cuts_above_the_running_maximum(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two passes a skipped block may raise the running maxima then: bounds leave such heads alone."""
    inputs = make(replace(BASE, lengths=((200, 500),)))
    reference = torch.tensor([[0.4], [-0.4], [0.2], [1.3]])
    policy = ExactSkip(ratio=1.0, reference=reference, positions=(0,), passes=passes, **SIZES)
    want, got, (_, _, bounded) = after_bounds(inputs, policy, monkeypatch, slack=torch.tensor(0.05))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and bool((want[2][:, 1] > 0).all())
    assert bounded[:, 1].ne(0).tolist() == [False, True, False, False]


# --- on a GPU that is not there ---------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The operators of bsfa that run inside, and what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.given: list[tuple[Any, ...]] = []
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "bsfa":
            self.names.append(func._opname)
            self.given.append(args)
            self.made.append(result)
        return result


def pretend(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
    monkeypatch.setitem(_library.KERNELS, "cuda", frozenset(row["op"] for row in rows))
    monkeypatch.setattr(limits, "LIMITS", limits.parse(rows))
    monkeypatch.setattr(limits, "_capability_of", {0: 90})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pretend(monkeypatch, ROWS)
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    torch.compiler.reset()


def data(length: int = 300, dim: int = 64, heads: int = 4) -> Tensor:
    return torch.empty(2, length, heads, dim, device="cuda:0", dtype=torch.bfloat16)


@pytest.mark.usefixtures("hopper")
@WITH_FORMS
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("within", [False, True])
def test_the_order_of_operators(within: bool, passes: int, form: str) -> None:
    """Bounds over the mask that is given, the passes over theirs."""
    inner = RelativeMax() if within else None
    policy = ExactSkip(form=form, passes=passes, bounds=True, within=inner)
    into = data()
    with Calls() as calls:
        out, lse, info = bsfa.attention(
            data(), data(heads=2), data(heads=2), policy=policy, out=into, return_lse=True, return_info=True
        )
    last = ["skip_attention_out"] if passes == 1 else ["skip_mask", "attention_out"]
    first = 2 if within else 0
    assert calls.names == [*["pool_blocks", "select_blocks"][:first], "bound_mask", *last] and out is into
    words, counts, skips = calls.made[first]
    assert [tuple(t.shape) for t in (words, counts, skips)] == [(6, 4, 1), (6, 4), (4, 2)]
    assert [t.dtype for t in (words, counts, skips)] == [torch.int32, torch.int32, torch.int64]
    after, place = calls.given[first + 1], 9 if passes == 2 else 10
    assert after[place] is words and (passes == 2 or after[place + 1] is counts)
    given = calls.given[first][9]
    assert (info.mask is None and given is None) if not within else given is info.mask.words
    assert tuple(info.skips.shape) == (4, 2) and info.skips.dtype == torch.int64
    assert tuple(lse.shape) == (2, 4, 300)


@pytest.mark.usefixtures("hopper")
def test_without_bounds_no_such_operator_runs() -> None:
    with Calls() as calls:
        bsfa.attention(data(), data(heads=2), data(heads=2), policy=ExactSkip(ratio=0.5))
    assert calls.names == ["skip_attention"] or calls.names == ["skip_attention_out"]


@pytest.mark.usefixtures("hopper")
@WITH_FORMS
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_fullgraph(dynamic: bool | None, passes: int, form: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    policy = ExactSkip(form=form, passes=passes, bounds=True)

    def run(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        out, info = bsfa.attention(q, k, k, policy=policy, return_info=True)
        return out, info.skips

    compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (300, 200, 100):
        out, skips = compiled(data(length), data(length, heads=2))
        assert tuple(out.shape) == (2, length, 4, 64) and tuple(skips.shape) == (4, 2)
    for graph in graphs:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("bound_mask" in name for name in called) == 1


@pytest.mark.usefixtures("hopper")
def test_a_build_without_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ROWS[:-1])
    policy = ExactSkip(ratio=0.5, bounds=True)
    with pytest.raises(bsfa.UnsupportedError, match=r"bounds=True\): bsfa operation 'bound_mask'.* leave bounds off"):
        bsfa.attention(data(), data(heads=2), data(heads=2), policy=policy)
    bsfa.attention(data(), data(heads=2), data(heads=2), policy=replace(policy, bounds=False))
    pretend(monkeypatch, [*ROWS[:-1], {**ROWS[-1], "max_blocks": 3}])
    bsfa.attention(data(), data(384, heads=2), data(384, heads=2), policy=policy)
    with pytest.raises(bsfa.UnsupportedError, match=r"'bound_mask' .*4 KV blocks .*at most 3.* leave bounds off"):
        bsfa.attention(data(), data(385, heads=2), data(385, heads=2), policy=policy)
    narrow = {**ROWS[-1], "head_dim": "64"}
    pretend(monkeypatch, [*ROWS[:-1], narrow])
    with pytest.raises(bsfa.UnsupportedError, match=r"'bound_mask' cannot run .*head_dim 128.* leave bounds off"):
        bsfa.attention(data(dim=128), data(dim=128, heads=2), data(dim=128, heads=2), policy=policy)
