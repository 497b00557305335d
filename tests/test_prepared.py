"""Prepared calls on the CPU: what finds them, what keeps them from being used, and what their runner is given.

The runner here is a function of these tests in place of a launch; tests/gpu/test_short_calls_cuda.py has the real one.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bsfa
from bsfa import _C, prepared

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("torch has no table of DLPack functions", allow_module_level=True)

B, SQ, SK, HQ, HKV, D = 2, 5, 7, 4, 2, 8
CPU = 1  # DLPack's
BYTES = b"what the runner is given"
ATTENTION = sys.modules["bsfa.attention"]

RUNNER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


def tensors(dtype: torch.dtype = torch.bfloat16, heads: int = HQ) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(B, SQ, heads, D).to(dtype),
        torch.randn(B, SK, HKV, D).to(dtype),
        torch.randn(B, SK, HKV, D).to(dtype),
    )


class Runner:
    """Counts and writes down calls; the result is filled with their number, unless it fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.fails = False
        self.function = RUNNER(self.run)
        self.address = ctypes.cast(self.function, ctypes.c_void_p).value

    def run(self, call: int, addresses: Any) -> int:
        assert ctypes.string_at(call, len(BYTES)) == BYTES
        if self.fails:
            return 1
        self.calls.append(tuple(addresses[i] for i in range(4)))
        out = torch.full((B, SQ, HQ, D), float(len(self.calls)), dtype=torch.bfloat16)
        ctypes.memmove(addresses[3], out.data_ptr(), out.numel() * 2)
        return 0

    def connect(self, idle: tuple[Callable[[], object], ...]) -> None:
        assert prepared.connect(self.address, CPU, Tensor.__dlpack_c_exchange_api__, idle)


@pytest.fixture
def runner() -> Iterator[Runner]:
    runner = Runner()
    runner.connect(prepared.idle_functions())
    yield runner
    ATTENTION._passed.clear()  # what it says about preparation is no longer so
    if not prepared._connect():
        prepared.connect(0, CPU, Tensor.__dlpack_c_exchange_api__, ())


Call = tuple[Tensor, Tensor, Tensor, bool, float | None, float]


def remember(call: Call) -> bool:
    return _C.prepared_remember(*call, ctypes.cast(BYTES, ctypes.c_void_p).value, len(BYTES))


def same_layout(x: Tensor) -> Tensor:
    """Another tensor with the shape and strides of ``x``."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def test_is_found_by_layout_and_given_addresses(runner: Runner) -> None:
    q, k, v = tensors()
    assert prepared.run(q, k, v, True, None, 0.0) is None
    assert remember((q, k, v, True, None, 0.0))
    for i in range(1, 4):
        q, k, v = (same_layout(x) for x in (q, k, v))
        out = prepared.run(q, k, v, True, None, 0.0)
        assert out is not None and torch.equal(out, torch.full_like(q, float(i)))
        assert runner.calls[-1] == (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    prepared.forget()
    assert prepared.run(q, k, v, True, None, 0.0) is None and len(runner.calls) == 3


def test_views_are_given_where_they_begin(runner: Runner) -> None:
    whole = torch.randn(B, SQ, HQ + 2 * HKV, D).bfloat16()
    q, k, v = whole.split([HQ, HKV, HKV], dim=2)
    assert not q.is_contiguous() and remember((q, k, v, True, 0.5, 0.0))
    out = prepared.run(q, k, v, True, 0.5, 0.0)
    assert out is not None and out.is_contiguous() and out.shape == q.shape and torch.all(out == 1)
    assert runner.calls == [(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())]


def at_other_strides(x: Tensor) -> Tensor:
    """The memory of ``x``, read as [B, H, S, D] and turned."""
    b, s, h, d = x.shape
    return x.view(b, h, s, d).transpose(1, 2)


class Subclass(Tensor):
    pass


CHANGES: dict[str, Callable[[Any, Any, Any], tuple[Any, ...]]] = {
    "shape of q": lambda q, k, v: (q[:1], k[:1], v[:1], True, 0.5, 0.0),
    "fewer queries": lambda q, k, v: (q[:, :4], k, v, True, 0.5, 0.0),
    "fewer keys": lambda q, k, v: (q, k[:, :6], v[:, :6], True, 0.5, 0.0),
    "fewer heads": lambda q, k, v: (q[:, :, :2], k, v, True, 0.5, 0.0),
    "strides of q, same memory": lambda q, k, v: (at_other_strides(q), k, v, True, 0.5, 0.0),
    "strides of k, same memory": lambda q, k, v: (q, at_other_strides(k), v, True, 0.5, 0.0),
    "strides of v, same memory": lambda q, k, v: (q, k, at_other_strides(v), True, 0.5, 0.0),
    "values for keys": lambda q, k, v: (q, at_other_strides(k), at_other_strides(v), True, 0.5, 0.0),
    "three dimensions": lambda q, k, v: (q[0], k[0], v[0], True, 0.5, 0.0),
    "other dtype": lambda q, k, v: (q.half(), k.half(), v.half(), True, 0.5, 0.0),
    "other dtype of v": lambda q, k, v: (q, k, v.half(), True, 0.5, 0.0),
    "other device": lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta"), True, 0.5, 0.0),
    "not causal": lambda q, k, v: (q, k, v, False, 0.5, 0.0),
    "causal of another type": lambda q, k, v: (q, k, v, 1, 0.5, 0.0),
    "default scale": lambda q, k, v: (q, k, v, True, None, 0.0),
    "other scale": lambda q, k, v: (q, k, v, True, 0.25, 0.0),
    "scale of another type": lambda q, k, v: (q, k, v, True, torch.tensor(0.5), 0.0),
    "softcap": lambda q, k, v: (q, k, v, True, 0.5, 30.0),
    "softcap of another type": lambda q, k, v: (q, k, v, True, 0.5, 0),
    "requires grad": lambda q, k, v: (q, k, same_layout(v).requires_grad_(), True, 0.5, 0.0),
    "parameter": lambda q, k, v: (q, torch.nn.Parameter(k, requires_grad=False), v, True, 0.5, 0.0),
    "subclass": lambda q, k, v: (q.as_subclass(Subclass), k, v, True, 0.5, 0.0),
    "turned sign": lambda q, k, v: (torch._neg_view(q), k, v, True, 0.5, 0.0),
    "zeros without memory": lambda q, k, v: (torch._efficientzerotensor(q.shape, dtype=q.dtype), k, v, True, 0.5, 0.0),
    "not a tensor": lambda q, k, v: (q, k, v.tolist(), True, 0.5, 0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_not_it(runner: Runner, change: str) -> None:
    q, k, v = tensors()
    assert remember((q, k, v, True, 0.5, 0.0))
    assert _C.prepared_run(*CHANGES[change](q, k, v)) is None  # type: ignore[arg-type]
    assert runner.calls == []
    assert prepared.run(q, k, v, True, 0.5, 0.0) is not None


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "functions": SeesFunctions,
    "operators": SeesOperators,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "device": lambda: torch.device("cpu"),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "old profiler": lambda: torch.autograd.profiler.profile(),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_see_the_operator(runner: Runner, mode: str) -> None:
    q, k, v = tensors()
    assert remember((q, k, v, True, None, 0.0))
    with MODES[mode]():
        assert not _C.prepared_idle()
        assert prepared.run(q, k, v, True, None, 0.0) is None
        assert not remember((q, k, v, True, None, 0.0))
    assert _C.prepared_idle() and prepared.run(q, k, v, True, None, 0.0) is not None


def test_transformations_and_tracing_see_the_operator(runner: Runner) -> None:
    q, k, v = tensors()
    assert remember((q, k, v, True, None, 0.0))
    seen: list[object] = []

    def look(x: Tensor) -> Tensor:
        seen.append(prepared.run(q, k, v, True, None, 0.0))
        seen.append(prepared.run(x, k, v, True, None, 0.0))
        return x * 2

    torch.vmap(look)(torch.stack([q, q]))
    torch.func.grad(lambda x: look(x).sum())(q.float())
    torch.jit.trace(look, (q,), check_trace=False)
    assert seen == [None] * 6 and runner.calls == []


def test_wrapped_tensors_are_not_read_even_unasked(runner: Runner) -> None:
    """Inside of transformations: plain Tensors by their type, with shapes, but with no memory of their own."""
    runner.connect(())
    q, k, v = tensors()
    assert remember((q, k, v, True, None, 0.0))
    seen: list[object] = []

    def look(x: Tensor) -> Tensor:
        assert type(x) is Tensor and x.shape == q.shape
        seen.append(prepared.run(x, k, v, True, None, 0.0))
        return x

    torch.vmap(look)(torch.stack([q, q]))
    look(torch._to_functional_tensor(q))
    assert seen == [None] * 2 and runner.calls == []


def test_a_failed_launch_is_left_to_the_operator(runner: Runner) -> None:
    q, k, v = tensors()
    assert remember((q, k, v, True, None, 0.0))
    runner.fails = True
    assert prepared.run(q, k, v, True, None, 0.0) is None


def test_values_of_another_head_dim_are_not_remembered(runner: Runner) -> None:
    q, k, v = tensors()
    assert not remember((q, k, v[..., :4], True, None, 0.0))


def test_inference_mode_gives_an_inference_tensor(runner: Runner) -> None:
    q, k, v = tensors()
    assert remember((q, k, v, True, None, 0.0))
    with torch.inference_mode():
        out = prepared.run(q, k, v, True, None, 0.0)
        assert out is not None and out.is_inference()


def test_attention_runs_it_for_plain_calls_alone(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    want, lse = bsfa.attention(q, k, v, return_lse=True)
    monkeypatch.setattr(prepared, "READY", True)
    assert torch.equal(bsfa.attention(q, k, v), want) and runner.calls == []
    assert remember((q, k, v, True, None, 0.0))
    assert torch.all(bsfa.attention(q, k, v) == 1) and len(runner.calls) == 1
    calls: list[dict[str, Any]] = [
        {"return_lse": True},
        {"return_info": True},
        {"out": torch.empty_like(q)},
        {"policy": bsfa.policies.Dense()},
        {"window_left": 100},
        {"softmax_scale": D**-0.5},
    ]
    for options in calls:
        answer = bsfa.attention(q, k, v, **options)
        got = answer[0] if isinstance(answer, tuple) else answer
        assert torch.equal(got, want), options
    assert torch.equal(bsfa.attention(q, k, v, return_lse=True)[1], lse)
    with pytest.raises((TypeError, ValueError)):
        bsfa.attention(q, k, v, mean_correction=None)  # type: ignore[arg-type]
    assert len(runner.calls) == 1
    runner.fails = True
    assert torch.equal(bsfa.attention(q, k, v), want)


def test_compiled_calls_are_graphs_of_the_operator(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "READY", True)
    q, k, v = tensors()
    want = bsfa.attention(q, k, v)
    assert remember((q, k, v, True, None, 0.0))
    compiled = torch.compile(lambda *x: bsfa.attention(*x) + 0, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), want + 0) and runner.calls == []


def test_calls_that_could_not_be_prepared_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, False, True]
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(prepared, "remember", lambda *call: asked.append(call[3:]) or answers[len(asked) - 1])
    monkeypatch.setattr(ATTENTION, "_passed", {})
    q, k, v = tensors()
    results = [bsfa.attention(q, k, v) for _ in range(5)]
    assert asked == [(True, None, 0.0, 1 / math.sqrt(D))] * 3
    assert all(torch.equal(result, results[0]) for result in results)
    cu = torch.tensor([0, SQ], dtype=torch.int32)
    bsfa.attention_varlen(q[0], k[0], v[0], cu, torch.tensor([0, SK], dtype=torch.int32), SQ, SK)
    assert len(asked) == 3


def test_forgets_with_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(prepared, "forget", lambda: forgotten.append(1))
    monkeypatch.setattr(ATTENTION, "_passed", {})
    monkeypatch.setattr(ATTENTION, "_MOST_PASSED", 2)
    q, k, v = tensors()
    for scale in (0.1, 0.2, 0.3, 0.4):
        bsfa.attention(q, k, v, softmax_scale=scale)
    assert len(forgotten) == 1 and len(ATTENTION._passed) == 2


def test_another_version_of_the_table_is_not_used(runner: Runner) -> None:
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = b"dlpack_exchange_api"
    for major, works in ((1, True), (2, False)):
        table = (ctypes.c_uint32 * 32)(major, *[1] * 31)  # functions that are not called here
        capsule = new_capsule(ctypes.addressof(table), name, None)
        assert prepared.connect(runner.address, CPU, capsule, ()) is works
    q, k, v = tensors()
    assert prepared.run(q, k, v, True, None, 0.0) is None and not _C.prepared_idle()
    with pytest.raises(ValueError, match="PyCapsule"):
        prepared.connect(runner.address, CPU, object(), ())
    with pytest.raises(TypeError, match="6 arguments"):
        _C.prepared_run(q, k, v)  # type: ignore[call-arg]


def test_threads(runner: Runner) -> None:
    """Some run a call while others forget and prepare it: each gets its own result, or none."""
    errors: list[BaseException] = []
    runs = [0]

    def work(number: int) -> None:
        try:
            call = (*tensors(), True, None, 0.0)
            for _ in range(200):
                if number == 0:
                    prepared.forget()
                assert remember(call)
                out = prepared.run(*call)
                if out is not None:
                    runs[0] += 1
                    assert torch.all(out == out.flatten()[0]) and out.flatten()[0] >= 1
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == [] and runs[0] > 0
