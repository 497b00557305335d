"""Bad input is refused before a kernel starts, with a message that names the argument; raw operators never crash."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
from bsfa.policies import Antidiagonal, CumulativeMass, Fixed, RelativeMax, StaticPattern
from cases import BF16, F16, F32, NAN, PACKED, PAGED, PAGED_PACKED, Case, Inputs, int32

Change = Callable[[dict[str, Any]], None]

LENGTHS = ((70, 70), (0, 0), (3, 130))


def arguments(layout: str, **fields: Any) -> dict[str, Any]:
    """Valid keyword arguments of the layout's attention function."""
    lengths = LENGTHS if layout in (PACKED, PAGED_PACKED) else ((70, 130), (70, 130))
    inputs = Case(lengths=lengths, layout=layout, hq=4, hkv=2, dim=16, **fields).make()
    q, k, v = inputs.q, inputs.k, inputs.v
    if layout == PACKED:
        return {"q": q, "k": k, "v": v, **inputs.layout}
    if layout == "batched":
        return {"q": q, "k": k, "v": v}
    return {"q": q, "k_cache": k, "v_cache": v, **inputs.layout}


def call(layout: str, kwargs: dict[str, Any]) -> Any:
    functions = {"batched": bsfa.attention, PACKED: bsfa.attention_varlen}
    return functions.get(layout, bsfa.attention_paged)(**kwargs)


def put(**values: Any) -> Change:
    """Replace arguments; a callable value is applied to the valid one."""

    def change(kwargs: dict[str, Any]) -> None:
        for name, value in values.items():
            apply = callable(value) and not isinstance(value, type)
            kwargs[name] = value(kwargs[name]) if apply else value

    return change


def every_tensor(function: Callable[[Tensor], Tensor]) -> Change:
    def change(kwargs: dict[str, Any]) -> None:
        for name in ("q", "k", "v", "k_cache", "v_cache"):
            if name in kwargs:
                kwargs[name] = function(kwargs[name])

    return change


def strided(t: Tensor) -> Tensor:
    """The same values, last stride 2."""
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]


def zero_pages(kwargs: dict[str, Any]) -> None:
    for name in ("k_cache", "v_cache"):
        kwargs[name] = kwargs[name][:, :0]
    kwargs["seqlens_k"] = kwargs["seqlens_k"] * 0
    kwargs.pop("max_seqlen_k")


def page(index: int) -> Callable[[Tensor], Tensor]:
    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[0, 1] = index
        return table

    return change


ANY: list[tuple[Change, type[Exception], str]] = [
    (put(q=[1.0]), TypeError, "q must be a torch.Tensor"),
    (put(q=np.zeros((1, 2, 3, 4))), TypeError, "q must be a torch.Tensor"),
    (put(q=None), TypeError, "q must be"),
    (every_tensor(Tensor.double), TypeError, "q must be float32, bfloat16 or float16"),
    (every_tensor(Tensor.int), TypeError, "q must be float32"),
    (every_tensor(lambda t: t.to(torch.float8_e4m3fn)), TypeError, "q must be float32"),
    (put(q=Tensor.bfloat16), TypeError, "k is torch.float32 but q is torch.bfloat16"),
    (put(q=lambda t: t.to("meta")), ValueError, "q is on meta"),
    (put(q=lambda t: t[..., 0]), ValueError, "q"),
    (put(q=lambda t: t[None, None]), ValueError, "q must have"),
    (put(q=lambda t: t[..., :3, :]), ValueError, r"query heads \(3\) must be a multiple of KV heads"),
    (put(q=lambda t: t[..., :1, :]), ValueError, r"query heads \(1\)"),
    (put(q=lambda t: t[..., :0, :]), ValueError, r"query heads \(0\)"),
    (put(q=lambda t: t[..., :15]), ValueError, "head_dim"),
    (every_tensor(lambda t: t[..., :0]), ValueError, "head_dim"),
    (every_tensor(lambda t: t.repeat_interleave(17, -1)), ValueError, "head_dim must be 1 .. 256"),
    (put(q=strided), ValueError, "q must have unit stride"),
    (put(q=lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)), ValueError, "q must have unit stride"),
    (put(q=lambda t: t.requires_grad_()), ValueError, "q requires grad"),
    (put(causal=1), TypeError, "causal"),
    (put(causal=None), TypeError, "causal"),
    (put(softmax_scale=NAN), ValueError, "softmax_scale must be finite"),
    (put(softmax_scale=math.inf), ValueError, "softmax_scale must be finite"),
    (put(softmax_scale="1"), TypeError, "softmax_scale"),
    (put(softmax_scale=torch.tensor(1.0)), TypeError, "softmax_scale"),
    (put(softcap=-1.0), ValueError, "softcap"),
    (put(softcap=NAN), ValueError, "softcap"),
    (put(softcap=None), TypeError, "softcap"),
    (put(window_left=-1), ValueError, "window_left"),
    (put(window_left=4, causal=False), ValueError, "window_left"),
    (put(window_left=4.0), TypeError, "window_left"),
    (put(policy="relative-max"), TypeError, "policy must be"),
    (put(policy=RelativeMax), TypeError, "policy must be"),
    (put(policy=RelativeMax(), prompt_lens=int32([70])), ValueError, "prompt_lens"),
    (put(policy=RelativeMax(), prompt_lens=torch.tensor([70, 0, 130])), TypeError, "prompt_lens must be int32"),
    (put(policy=RelativeMax(), prompt_lens=[70, 0, 130]), TypeError, "prompt_lens must be a torch.Tensor"),
    (put(policy=RelativeMax(alpha=[0.1, 0.2])), ValueError, "alpha has 2 values but q has 4 heads"),
    (put(policy=CumulativeMass(mass=torch.full((5,), 0.5))), ValueError, "mass has 5 values but q has 4 heads"),
]

KEYS: list[tuple[Change, type[Exception], str]] = [  # {} is "", or "_cache" for paged keys
    (put(**{"k{}": lambda t: t.bfloat16()}), TypeError, "k is torch.bfloat16 but q is torch.float32"),
    (put(**{"v{}": lambda t: t.half()}), TypeError, "v is torch.float16 but q is torch.float32"),
    (put(**{"k{}": None}), TypeError, "k must be a torch.Tensor"),
    (put(**{"k{}": lambda t: t.to("meta")}), ValueError, "k is on meta"),
    (put(**{"v{}": lambda t: t.to("meta")}), ValueError, "v is on meta"),
    (put(**{"k{}": strided}), ValueError, "k must have unit stride"),
    (put(**{"v{}": strided}), ValueError, "v must have unit stride"),
    (put(**{"k{}": lambda t: t[..., :0, :]}), ValueError, "KV heads"),
    (put(**{"k{}": lambda t: t[..., :8]}), ValueError, "head_dim"),
    (put(**{"v{}": lambda t: t[..., :1, :]}), ValueError, "v has"),
    (put(**{"v{}": lambda t: t[:1]}), ValueError, "v has"),
    (put(**{"v{}": lambda t: t[..., :0]}), ValueError, "head_dim of v"),
    (put(**{"v{}": lambda t: t.repeat_interleave(17, -1)}), ValueError, "head_dim of v must be 1 .. 256"),
    (put(**{"k{}": lambda t: t.requires_grad_()}), ValueError, "k requires grad"),
    (put(**{"v{}": lambda t: t.requires_grad_()}), ValueError, "v requires grad"),
]

PACKED_ONLY: list[tuple[Change, type[Exception], str]] = [
    (put(cu_seqlens_q=int32([0, 70, 69, 73])), ValueError, "cu_seqlens_q .*never decrease"),
    (put(cu_seqlens_q=int32([1, 70, 70, 73])), ValueError, "cu_seqlens_q must start with 0"),
    (put(cu_seqlens_q=int32([0, 70, 70, 72])), ValueError, "cu_seqlens_q ends at 72"),
    (put(cu_seqlens_q=int32([0, 70, 70, 74])), ValueError, "cu_seqlens_q ends at 74"),
    (put(cu_seqlens_q=int32([0, 2**31 - 1, -5, 73])), ValueError, "cu_seqlens_q"),
    (put(cu_seqlens_q=int32([])), ValueError, "cu_seqlens_q"),
    (put(cu_seqlens_q=int32([0, 73])), ValueError, "cu_seqlens_"),
    (put(cu_seqlens_q=lambda t: t.long()), TypeError, "cu_seqlens_q must be int32"),
    (put(cu_seqlens_q=[0, 70, 70, 73]), TypeError, "cu_seqlens_q must be a torch.Tensor"),
    (put(cu_seqlens_q=lambda t: t[None]), ValueError, "cu_seqlens_q must have shape"),
    (put(cu_seqlens_q=lambda t: t.repeat_interleave(2)[::2]), ValueError, "cu_seqlens_q must be contiguous"),
    (put(max_seqlen_q=69), ValueError, "max_seqlen"),
    (put(max_seqlen_q=-1), ValueError, "max_seqlen_q"),
    (put(max_seqlen_q=70.0), TypeError, "max_seqlen_q must be an int"),
    (put(q=lambda t: t[None]), ValueError, "q"),
    (put(q=lambda t: t[:-1]), ValueError, "cu_seqlens_q ends at 73"),
]

VARLEN_ONLY: list[tuple[Change, type[Exception], str]] = [
    (put(cu_seqlens_k=int32([0, 70, 69, 200])), ValueError, "cu_seqlens_k .*never decrease"),
    (put(cu_seqlens_k=int32([0, 70, 70, 199])), ValueError, "cu_seqlens_k ends at 199"),
    (put(cu_seqlens_k=int32([0, 70, 200])), ValueError, "cu_seqlens_k must have shape"),
    (put(cu_seqlens_k=None), ValueError, "cu_seqlens_k"),
    (put(max_seqlen_k=129), ValueError, "max_seqlen"),
    (put(max_seqlen_k=True), TypeError, "max_seqlen_k must be an int"),
    (put(k=lambda t: t[None], v=lambda t: t[None]), ValueError, "packed q and k"),
]

PAGED_ONLY: list[tuple[Change, type[Exception], str]] = [
    (put(seqlens_k=lambda t: t + 100), ValueError, "seqlens_k must be 0 .. max_seqlen_k"),
    (put(seqlens_k=lambda t: t - 200), ValueError, "seqlens_k"),
    (put(seqlens_k=lambda t: t.long()), TypeError, "seqlens_k must be int32"),
    (put(seqlens_k=lambda t: t[:-1]), ValueError, "seqlens_k must have shape"),
    (put(seqlens_k=None), ValueError, "seqlens_k"),
    (put(block_table=lambda t: t.long()), TypeError, "block_table must be int32"),
    (put(block_table=lambda t: t[0]), ValueError, "block_table must have shape"),
    (put(block_table=page(-1)), ValueError, "block_table row 0"),
    (put(block_table=page(10**6)), ValueError, "block_table row 0"),
    (put(block_table=lambda t: t.repeat_interleave(2, 1)[:, ::2]), ValueError, "block_table must be contiguous"),
    (put(block_table=lambda t: t.to("meta")), ValueError, "block_table is on meta"),
    (put(max_seqlen_k=10**6), ValueError, "max_seqlen_k = 1000000 exceeds"),
    (put(max_seqlen_k=-1), ValueError, "max_seqlen_k"),
    (put(k_cache=lambda t: t[0], v_cache=lambda t: t[0]), ValueError, "paged k must be"),
    (zero_pages, ValueError, "page_size"),
]

CASES = [
    *(("batched", *row) for row in ANY),
    *((PACKED, *row) for row in ANY),
    *((PAGED_PACKED, *row) for row in ANY),
    *((PACKED, *row) for row in PACKED_ONLY + VARLEN_ONLY),
    *((PAGED_PACKED, *row) for row in PACKED_ONLY + PAGED_ONLY),
    *((PAGED, *row) for row in PAGED_ONLY),
    ("batched", put(q=lambda t: t[:1]), ValueError, "batch"),
    (PAGED, put(q=lambda t: t[:1]), ValueError, "q must be"),
    (PAGED, put(max_seqlen_q=71), ValueError, "max_seqlen_q"),
    (PAGED_PACKED, put(max_seqlen_q=None), ValueError, "max_seqlen_q"),
]


def refused(layout: str, change: Change, error: type[Exception], message: str) -> None:
    kwargs = arguments(layout)
    call(layout, kwargs)  # valid so far
    change(kwargs)
    with pytest.raises(error, match=message) as caught:
        call(layout, kwargs)
    assert not isinstance(caught.value, RuntimeError) or error is bsfa.UnsupportedError


@pytest.mark.parametrize(("layout", "change", "error", "message"), CASES)
def test_attention_refuses(layout: str, change: Change, error: type[Exception], message: str) -> None:
    refused(layout, change, error, message)


@pytest.mark.parametrize("layout", ["batched", PACKED, PAGED])
@pytest.mark.parametrize("row", range(len(KEYS)))
def test_attention_refuses_keys_and_values(layout: str, row: int) -> None:
    _, error, message = KEYS[row]
    suffix = "_cache" if layout == PAGED else ""
    refused(layout, lambda kwargs: rename(KEYS[row][0], kwargs, suffix), error, message)


def rename(change: Change, kwargs: dict[str, Any], suffix: str) -> None:
    view = {f"{name}{{}}": kwargs[f"{name}{suffix}"] for name in "kv"}
    change(view)
    kwargs.update({f"{name}{suffix}": view[f"{name}{{}}"] for name in "kv"})


def test_grad_is_refused_only_where_it_would_be_lost() -> None:
    q = torch.randn(1, 70, 2, 16, requires_grad=True)
    with pytest.raises(ValueError, match="q requires grad"):
        bsfa.attention(q, q, q)
    with torch.no_grad():
        assert not bsfa.attention(q, q, q).requires_grad
    with torch.inference_mode():
        bsfa.attention(q, q, q, policy=RelativeMax())
    bsfa.attention(q.detach(), q.detach(), q.detach())


# --- remembered checks ------------------------------------------------------------------------------------------------

module = sys.modules["bsfa.attention"]


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What plain dense calls have left behind: nothing yet."""
    monkeypatch.setattr(module, "_passed", {})
    return module._passed


def shifted(t: Tensor) -> Tensor:
    """The same values and strides, one element further in their storage."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


# Calls that are like one that passed, but for what is changed. None: valid too.
AFTERWARDS: list[tuple[str, Change, type[Exception] | None]] = [
    ("batched", every_tensor(Tensor.double), TypeError),
    ("batched", put(k=Tensor.half), TypeError),
    ("batched", put(v=Tensor.bfloat16), TypeError),
    ("batched", put(v=lambda t: t.to("meta")), ValueError),
    ("batched", every_tensor(lambda t: t.to("meta")), bsfa.UnsupportedError),
    ("batched", put(q=strided), ValueError),
    ("batched", put(k=strided), ValueError),
    ("batched", put(v=lambda t: t[:, 1:]), ValueError),
    ("batched", put(q=lambda t: t.requires_grad_()), ValueError),
    ("batched", put(v=lambda t: t.requires_grad_()), ValueError),
    ("batched", put(q=lambda t: t.tolist()), TypeError),
    ("batched", put(causal=1), TypeError),
    ("batched", put(softcap=False), TypeError),
    ("batched", put(softcap=-1.0), ValueError),
    ("batched", put(softmax_scale=True), TypeError),
    ("batched", put(softmax_scale=NAN), ValueError),
    ("batched", put(mean_correction=0), TypeError),
    ("batched", put(window_left=-1), ValueError),
    ("batched", put(policy="dense"), TypeError),
    ("batched", put(out=torch.zeros(1)), ValueError),
    ("batched", put(q=shifted), None),
    ("batched", put(q=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)), None),
    ("batched", put(causal=False), None),
    ("batched", put(softmax_scale=0.5), None),
    ("batched", put(softcap=2.0), None),
    ("batched", put(softcap=0), None),
    ("batched", put(window_left=3), None),
    ("batched", put(return_lse=True), None),
    (PACKED, put(cu_seqlens_q=lambda t: t.long()), TypeError),
    (PACKED, put(cu_seqlens_k=lambda t: t.repeat_interleave(2)[::2]), ValueError),
    (PACKED, put(cu_seqlens_k=lambda t: t[:-1]), ValueError),
    (PACKED, put(cu_seqlens_q=lambda t: t + 1), ValueError),
    (PACKED, put(cu_seqlens_k=lambda t: t - 1), ValueError),
    (PACKED, put(max_seqlen_q=lambda n: float(n)), TypeError),
    (PACKED, put(max_seqlen_k=129), ValueError),
    (PAGED, put(seqlens_k=lambda t: t + 1000), ValueError),
    (PAGED, put(seqlens_k=lambda t: t.long()), TypeError),
    (PAGED, put(block_table=lambda t: t * 0 - 1), ValueError),
    (PAGED, put(block_table=lambda t: t[:, :1]), ValueError),
    (PAGED, put(summary=0), TypeError),
    (PAGED_PACKED, put(cu_seqlens_q=lambda t: t + 1), ValueError),
    (PAGED_PACKED, put(max_seqlen_q=None), ValueError),
]


@pytest.mark.parametrize(("layout", "change", "error"), AFTERWARDS)
def test_remembered_checks_let_nothing_through(
    remembered: dict[Any, Any], layout: str, change: Change, error: type[Exception] | None
) -> None:
    """A call that differs is refused after a good one as it is without, and a valid one computes what it would."""
    kwargs, changed = arguments(layout), arguments(layout)
    change(changed)
    if error is None:
        want = call(layout, changed)
        remembered.clear()
    call(layout, kwargs)
    assert len(remembered) == 1
    if error is None:
        for _ in range(2):
            for a, b in zip(as_tuple(call(layout, changed)), as_tuple(want), strict=True):
                assert torch.equal(a, b)
    else:
        for _ in range(2):
            with pytest.raises(error):
                call(layout, changed)
        assert len(remembered) == 1  # a call that failed is not remembered


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("layout", ["batched", PACKED, PAGED, PAGED_PACKED])
def test_remembered_calls_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, remembered: dict[Any, Any], layout: str
) -> None:
    """The second call takes the short way, for other tensors of the same kind too."""
    kwargs, other = arguments(layout), arguments(layout, seed=7)
    want = [bsfa.block_sparse_attention(*call_tensors(x), mask=None, **call_layout(x)) for x in (kwargs, other)]
    call(layout, kwargs)
    monkeypatch.setattr(module, "resolve_layout", None)  # would raise
    for x, (out, lse) in zip((kwargs, other), want, strict=True):
        got = call(layout, {**x, "return_lse": True})
        assert torch.equal(got[0], out) and torch.equal(got[1], lse)
        assert torch.equal(call(layout, x), out)


def call_tensors(kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for name, value in kwargs.items() if name in ("q", "k", "v", "k_cache", "v_cache")]


def call_layout(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("q", "k", "v", "k_cache", "v_cache")}


def test_memory_of_checks_is_bounded(monkeypatch: pytest.MonkeyPatch, remembered: dict[Any, Any]) -> None:
    monkeypatch.setattr(module, "_MOST_PASSED", 4)
    for length in range(1, 12):
        q = torch.randn(1, length, 2, 16)
        want = bsfa.attention(q, q, q)
        assert 1 <= len(remembered) <= 4
        assert torch.equal(bsfa.attention(q, q, q), want)


def test_meta_tensors_are_unsupported() -> None:
    q = torch.empty(1, 300, 2, 16, device="meta")
    for policy in (None, RelativeMax(), StaticPattern()):
        with pytest.raises(bsfa.UnsupportedError, match="cannot run on meta"):
            bsfa.attention(q, q, q, policy=policy)
    with pytest.raises(bsfa.UnsupportedError, match="pool_blocks"):
        bsfa.pool_blocks(q)


# --- policies ---------------------------------------------------------------------------------------------------------

POLICIES: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    *((kind, {"block_m": 0}, ValueError, "block_m") for kind in (RelativeMax, CumulativeMass, StaticPattern)),
    *((kind, {"block_n": 4097}, ValueError, "block_n") for kind in (RelativeMax, CumulativeMass, StaticPattern)),
    *((kind, {"block_n": 64.0}, TypeError, "block_n") for kind in (RelativeMax, CumulativeMass, StaticPattern)),
    *((kind, {"block_n": True}, TypeError, "block_n") for kind in (RelativeMax, CumulativeMass, StaticPattern)),
    *((kind, {"sink_blocks": -1}, ValueError, "sink_blocks") for kind in (RelativeMax, CumulativeMass, StaticPattern)),
    *(
        (kind, {"window_blocks": 0}, ValueError, "window_blocks")
        for kind in (RelativeMax, CumulativeMass, StaticPattern)
    ),
    *(
        (kind, {"window_blocks": 1.5}, TypeError, "window_blocks")
        for kind in (RelativeMax, CumulativeMass, StaticPattern)
    ),
    *((kind, {"last_tiles": -1}, ValueError, "last_tiles") for kind in (RelativeMax, CumulativeMass)),
    *((kind, {"min_blocks": -1}, ValueError, "min_blocks") for kind in (RelativeMax, CumulativeMass)),
    *((kind, {"min_blocks": 2.0}, TypeError, "min_blocks") for kind in (RelativeMax, CumulativeMass)),
    *(
        (kind, {name: value}, error, name)
        for kind, name in ((RelativeMax, "alpha"), (CumulativeMass, "mass"))
        for value, error in (
            (NAN, ValueError),
            (math.inf, ValueError),
            (-0.1, ValueError),
            (1.1, ValueError),
            ([0.5, NAN], ValueError),
            ([0.5, 2.0], ValueError),
            ("0.5", TypeError),
            (None, TypeError),
            (True, TypeError),
            ([0.5, "x"], TypeError),
            (torch.tensor(0.5), ValueError),
            (torch.tensor([[0.5]]), ValueError),
            (torch.tensor([1, 0]), ValueError),
            (torch.tensor([0.5, NAN]), ValueError),
            (torch.tensor([0.5, -0.1]), ValueError),
            (torch.tensor([0.5, 1.5]), ValueError),
        )
    ),
    (RelativeMax, {"shared": 1}, TypeError, "shared"),
    *((CumulativeMass, {"pooling": x}, ValueError, "pooling") for x in ("max", "flat", None, 3)),
    *((CumulativeMass, {"pooling": "flat64", **x}, ValueError, "64") for x in ({"block_m": 96}, {"block_n": 32})),
    (CumulativeMass, {"original_scale": True}, ValueError, "original_scale"),
    (CumulativeMass, {"original_scale": 1, "pooling": "flat64"}, TypeError, "original_scale"),
    (CumulativeMass, {"shared": None}, TypeError, "shared"),
    *(
        (CumulativeMass, {name: value}, error, name)
        for name in ("probability", "keep_ratio", "rescue_probability")
        for value, error in (
            (NAN, ValueError),
            (-0.1, ValueError),
            (1.1, ValueError),
            ("1", TypeError),
            (True, TypeError),
        )
    ),
    *(
        (CumulativeMass, {name: value}, error, name)
        for name in ("rescue_stride", "rescue_seed")
        for value, error in ((-1, ValueError), (1.0, TypeError), (None, TypeError))
    ),
    *((Antidiagonal, {"stride": x}, ValueError, "stride") for x in (0, 2, 5, 12, 128, -8)),
    *((Antidiagonal, {"stride": x}, TypeError, "stride") for x in (16.0, "16", None, True)),
    (Antidiagonal, {"stride": 32, "block_m": 48}, ValueError, "stride 32 must divide"),
    (Antidiagonal, {"stride": 64, "block_n": 96}, ValueError, "stride 64 must divide"),
    (Antidiagonal, {"mass": 1.5}, ValueError, "mass"),
    (Fixed, {"mask": torch.ones(1, 1, 1, dtype=torch.bool)}, TypeError, "mask"),
    (Fixed, {"mask": None}, TypeError, "mask"),
]


@pytest.mark.parametrize(("kind", "options", "error", "message"), POLICIES)
def test_policies_refuse(kind: type, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind(**options)


# --- stages -----------------------------------------------------------------------------------------------------------


def make(layout: str = "batched", **fields: Any) -> Inputs:
    lengths = LENGTHS if layout in (PACKED, PAGED_PACKED) else ((70, 130), (70, 130))
    return Case(lengths=lengths, layout=layout, hq=4, hkv=2, dim=16, **fields).make()


MASKS: list[tuple[dict[str, Any], str]] = [
    ({"lengths": ((71, 130), (71, 130))}, "does not fit"),
    ({"lengths": ((70, 129), (70, 129))}, "does not fit"),
    ({"lengths": ((70, 130),)}, "does not fit"),
    ({"causal": False}, "does not fit"),
    ({"hq": 3, "hkv": 1}, "heads"),
    ({"hq": 8, "hkv": 4}, "heads"),
]


@pytest.mark.parametrize(("fields", "message"), MASKS)
def test_masks_of_another_call_are_refused(fields: dict[str, Any], message: str) -> None:
    inputs = make()
    other = Case(**{"lengths": inputs.case.lengths, "hq": 4, "hkv": 2, "dim": 16, "mask": "all", **fields}).make()
    mask = other.block_mask([other.draw_mask(b) for b in range(len(other))])
    with pytest.raises(ValueError, match=message):
        bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, mask)
    with pytest.raises(ValueError, match=message):
        bsfa.attention(inputs.q, inputs.k, inputs.v, policy=Fixed(mask=mask))


def test_masks_of_another_packing_are_refused() -> None:
    """Same number of rows and longest lengths, other sequences: the rows would mean other tiles."""
    inputs = Case(lengths=((130, 130), (64, 64), (70, 70)), layout=PACKED, mask="all").make()
    other = Case(lengths=((70, 70), (64, 64), (130, 130)), layout=PACKED, mask="all").make()
    mask = other.block_mask([other.draw_mask(b) for b in range(3)])
    with pytest.raises(ValueError, match="does not fit"):
        inputs.attend(mask)


def test_block_sparse_attention_refuses_what_is_no_mask() -> None:
    inputs = make()
    with pytest.raises(TypeError, match="mask must be a"):
        bsfa.block_sparse_attention(inputs.q, inputs.k, inputs.v, torch.ones(2, 4, 2, 2))  # type: ignore[arg-type]


POOL: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("batched", {"block_n": 0}, ValueError, "block_n"),
    ("batched", {"block_n": 5000}, ValueError, "block_n"),
    ("batched", {"block_n": 1.0}, TypeError, "block_n"),
    ("batched", {"seqlens_k": int32([1, 2])}, ValueError, "seqlens_k"),
    ("batched", {"max_seqlen_k": 129}, ValueError, "max_seqlen_k"),
    (PACKED, {"max_seqlen_k": None}, ValueError, "max_seqlen_k"),
    (PACKED, {"max_seqlen_k": 129}, ValueError, "max_seqlen"),
    (PACKED, {"max_seqlen_k": -1}, ValueError, "max_seqlen_k"),
    (PACKED, {"cu_seqlens_k": int32([0, 70, 60, 200])}, ValueError, "cu_seqlens_k"),
    (PACKED, {"cu_seqlens_k": int32([0, 70, 70, 201])}, ValueError, "cu_seqlens_k ends"),
    (PACKED, {"cu_seqlens_k": torch.tensor([0, 70, 70, 200])}, TypeError, "cu_seqlens_k must be int32"),
    (PACKED, {"cu_seqlens_k": int32([])}, ValueError, "cu_seqlens_"),
    (PACKED, {"seqlens_k": int32([70, 0, 130])}, ValueError, "seqlens_k"),
    (PAGED_PACKED, {"seqlens_k": None}, ValueError, "seqlens_k"),
    (PAGED_PACKED, {"seqlens_k": int32([70, 0, 131])}, ValueError, "seqlens_k"),
    (PAGED_PACKED, {"seqlens_k": int32([70, 0])}, ValueError, "seqlens_k"),
    (PAGED_PACKED, {"max_seqlen_k": 10**6}, ValueError, "max_seqlen_k"),
    (PAGED_PACKED, {"block_table": torch.full((3, 12), -1, dtype=torch.int32)}, ValueError, "block_table row 0"),
    (PAGED_PACKED, {"cu_seqlens_k": int32([0, 70, 70, 200])}, ValueError, "block_table|cu_seqlens_k"),
]


@pytest.mark.parametrize(("layout", "changes", "error", "message"), POOL)
def test_pool_blocks_refuses(layout: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make(layout)
    bsfa.pool_blocks(inputs.k, **inputs.layout_k)
    with pytest.raises(error, match=message):
        bsfa.pool_blocks(inputs.k, **{**inputs.layout_k, **changes})


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (None, TypeError, "k must be a torch.Tensor"),
        (torch.zeros(1, 8, 2, 4, dtype=torch.float64), TypeError, "k must be float32"),
        (torch.zeros(8, 4), ValueError, "k must have"),
        (torch.zeros(8, 2, 4), ValueError, "batched keys|k must"),
        (strided(torch.zeros(1, 8, 2, 4)), ValueError, "k must have unit stride"),
        (torch.zeros(1, 8, 2, 4, requires_grad=True), ValueError, "k requires grad"),
    ],
)
def test_pool_blocks_refuses_keys(k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bsfa.pool_blocks(k)


SELECT: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("batched", {"seqlen_k": None}, ValueError, "seqlen_k"),
    ("batched", {"seqlens_k": int32([130, 130])}, ValueError, "seqlen"),
    ("batched", {"seqlen_k": 260}, ValueError, "summary"),
    ("batched", {"seqlen_k": -1}, ValueError, "seqlen_k"),
    ("batched", {"seqlen_k": 130.0}, TypeError, "seqlen_k"),
    ("batched", {"causal": 1}, TypeError, "causal"),
    ("batched", {"policy": "x"}, TypeError, "policy"),
    ("batched", {"policy": RelativeMax(block_n=64)}, ValueError, "summary"),
    ("batched", {"summary": None}, ValueError, "pool_blocks"),
    ("batched", {"summary": lambda t: t.bfloat16()}, TypeError, "summary"),
    ("batched", {"summary": lambda t: t[:1]}, ValueError, "summary"),
    ("batched", {"summary": lambda t: t.repeat_interleave(2, 2)[:, :, ::2]}, ValueError, "summary"),
    ("batched", {"summary": lambda t: t[..., :8].contiguous()}, ValueError, "summary"),
    ("batched", {"summary": lambda t: torch.cat([t, t[:, :, :1]], 2).contiguous()}, ValueError, "heads"),
    ("batched", {"summary": lambda t: t[:, :, :0].contiguous()}, ValueError, "heads"),
    ("batched", {"softmax_scale": NAN}, ValueError, "softmax_scale"),
    ("batched", {"softcap": -1.0}, ValueError, "softcap"),
    ("batched", {"prompt_lens": int32([130])}, ValueError, "prompt_lens"),
    ("batched", {"policy": StaticPattern(), "return_scores": True}, ValueError, "scores"),
    ("batched", {"q": lambda t: t[0]}, ValueError, "q must be"),
    ("batched", {"q": lambda t: t.double()}, TypeError, "q must be"),
    ("batched", {"policy": Antidiagonal()}, ValueError, "pass k"),
    ("batched", {"policy": CumulativeMass(pooling="flat64")}, ValueError, "pass k"),
    ("batched", {"policy": RelativeMax(shared=True, alpha=[0.5] * 4)}, ValueError, "k has 2 heads"),
    ("batched", {"policy": RelativeMax(alpha=[0.5] * 2)}, ValueError, "q has 4 heads"),
    ("batched", {"block_table": int32([0, 1])[None]}, ValueError, "block_table belongs to k"),
    *(
        ("batched", {"policy": Antidiagonal(), "k": torch.randn(shape)}, ValueError, message)
        for shape, message in (
            ((2, 131, 2, 16), "max_seqlen_k|contradicts"),
            ((1, 130, 2, 16), "batch"),
            ((2, 130, 3, 16), "heads"),
            ((2, 130, 2, 8), "head_dim"),
            ((2, 2, 16), "batched keys"),
        )
    ),
    ("batched", {"policy": Antidiagonal(), "k": torch.randn(2, 130, 2, 16).half()}, TypeError, "k"),
    (PACKED, {"policy": Antidiagonal(), "k": torch.randn(1, 130, 2, 16)}, ValueError, "packed"),
    (PACKED, {"policy": Antidiagonal(), "k": torch.randn(130, 2, 16)}, ValueError, "tokens were given"),
    (PAGED, {"policy": Antidiagonal(), "k": torch.randn(9, 16, 2, 16)}, ValueError, "seqlens_k"),
    (PACKED, {"max_seqlen_q": None}, ValueError, "max_seqlen_q"),
    (PACKED, {"max_seqlen_k": None}, ValueError, "max_seqlen_k"),
    (PACKED, {"max_seqlen_q": 69}, ValueError, "max_seqlen"),
    (PACKED, {"max_seqlen_k": 128}, ValueError, "max_seqlen|summary"),
    (PACKED, {"cu_seqlens_q": int32([0, 70, 60, 73])}, ValueError, "cu_seqlens_q"),
    (PACKED, {"cu_seqlens_q": int32([0, 70, 70, 80])}, ValueError, "cu_seqlens_q"),
    (PACKED, {"cu_seqlens_k": int32([0, 70, 60, 200])}, ValueError, "cu_seqlens_k"),
    (PACKED, {"cu_seqlens_k": int32([0, 70, 200])}, ValueError, "cu_seqlens_k"),
    (PACKED, {"cu_seqlens_k": torch.tensor([0, 70, 70, 200])}, TypeError, "cu_seqlens_k"),
    (PAGED_PACKED, {"seqlens_k": int32([70, 0, 131])}, ValueError, "seqlens_k"),
    (PAGED_PACKED, {"seqlens_k": int32([70, 0, -1])}, ValueError, "seqlens_k"),
]


@pytest.mark.parametrize(("layout", "changes", "error", "message"), SELECT)
def test_select_blocks_refuses(layout: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make(layout)
    valid = {"q": inputs.q, "summary": bsfa.pool_blocks(inputs.k, **inputs.layout_k), "policy": RelativeMax()}
    valid |= inputs.layout_select
    bsfa.select_blocks(**valid)
    for name, value in changes.items():
        valid[name] = value(valid[name]) if callable(value) else value
    with pytest.raises(error, match=message) as caught:
        bsfa.select_blocks(**valid)
    assert not isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("lse", "error"),
    [
        (lambda t: t.double(), TypeError),
        (lambda t: None, TypeError),
        (lambda t: t[..., :-1], ValueError),
        (lambda t: t.transpose(1, 2), ValueError),
        (lambda t: t.repeat_interleave(2, 2)[..., ::2], ValueError),
        (lambda t: t.to("meta"), ValueError),
    ],
)
def test_block_mass_refuses_other_lse(lse: Callable[[Tensor], Any], error: type[Exception]) -> None:
    inputs = make()
    good = inputs.attend(None)[1]
    bsfa.block_mass(inputs.q, inputs.k, good)
    with pytest.raises(error, match="lse"):
        bsfa.block_mass(inputs.q, inputs.k, lse(good))
    with pytest.raises(ValueError, match="block_m"):
        bsfa.block_mass(inputs.q, inputs.k, good, block_m=0)


@pytest.mark.parametrize(("options", "message"), [({"form": "both"}, "form"), ({"block_m": 0}, "block_m")])
def test_tile_max_refuses(options: dict[str, Any], message: str) -> None:
    inputs = make()
    with pytest.raises(ValueError, match=message):
        bsfa.tile_max(inputs.q, inputs.k, **options)


def test_layouts_cannot_be_mixed() -> None:
    packed, paged, batched = make(PACKED), make(PAGED_PACKED), make()
    attend = bsfa.block_sparse_attention
    with pytest.raises(ValueError, match="block_table and seqlens_k"):
        attend(paged.q, paged.k, paged.v, None, **{**paged.layout, "cu_seqlens_k": int32([0, 70, 70, 200])})
    with pytest.raises(ValueError, match="seqlens_k belongs to paged keys"):
        attend(batched.q, batched.k, batched.v, None, seqlens_k=int32([130, 100]))
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        attend(packed.q, packed.k, packed.v, None, cu_seqlens_k=packed.cu_k, max_seqlen_k=130)
    with pytest.raises(ValueError, match="dimensions"):
        attend(packed.q, batched.k, batched.v, None)
    with pytest.raises(ValueError, match="max_seqlen"):
        attend(batched.q, batched.k, batched.v, None, max_seqlen_q=7, max_seqlen_k=9)


# --- raw operators ----------------------------------------------------------------------------------------------------

ops = torch.ops.bsfa


def raw_attention(inputs: Inputs, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "cu_seqlens_q": inputs.cu_q,
        "cu_seqlens_k": inputs.cu_k,
        "block_table": inputs.block_table,
        "seqlens_k": inputs.seqlens_k,
        "max_seqlen_q": inputs.max_q,
        "max_seqlen_k": inputs.max_k,
        "mask_words": None,
        "mask_counts": None,
        "k_means": None,
        "v_means": None,
        "block_m": 64,
        "block_n": 64,
        "causal": True,
        "softmax_scale": 0.25,
        "softcap": 0.0,
        "window_left": -1,
    }
    for name, value in changes.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return ops.attention(*arguments.values())


def words(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


RAW: list[tuple[str, dict[str, Any]]] = [
    *(("batched", {name: lambda t: t.double()}) for name in "qkv"),
    *(("batched", {name: lambda t: t[0]}) for name in "qkv"),
    *(("batched", {name: strided}) for name in "qkv"),
    *(("batched", {name: lambda t: t[:, :-1]}) for name in "qkv"),
    *(("batched", {name: lambda t: t[:1]}) for name in "qkv"),
    *(("batched", {name: lambda t: t[..., :1, :]}) for name in "v"),
    *(("batched", {name: lambda t: t[..., :0, :]}) for name in "qkv"),
    *(("batched", {name: lambda t: t[..., :0]}) for name in "qkv"),
    *(("batched", {name: lambda t: t.reshape(-1)}) for name in "qkv"),
    *(("batched", {name: lambda t: t[0, 0, 0, 0]}) for name in "qkv"),
    ("batched", {"q": lambda t: t[..., :3, :]}),
    ("batched", {"q": lambda t: t.repeat_interleave(17, -1), "k": lambda t: t.repeat_interleave(17, -1)}),
    ("batched", {"v": lambda t: t.repeat_interleave(17, -1)}),
    *(("batched", {name: value}) for name in ("block_m", "block_n") for value in (0, -1, 4097, 2**40)),
    *(("batched", {name: value}) for name in ("max_seqlen_q", "max_seqlen_k") for value in (-1, 71, 131, 2**31, 2**40)),
    ("batched", {"window_left": -2}),
    ("batched", {"window_left": 3, "causal": False}),
    ("batched", {"seqlens_k": int32([130, 130])}),
    ("batched", {"mask_words": words(6, 4, 1, dtype=torch.int64)}),
    ("batched", {"mask_words": words(6, 4)}),
    ("batched", {"mask_words": words(3, 4, 1)}),
    ("batched", {"mask_words": words(0, 4, 1)}),
    ("batched", {"mask_words": words(6, 3, 1)}),
    ("batched", {"mask_words": words(6, 4, 2)}),
    ("batched", {"mask_words": words(6, 4, 0)}),
    ("batched", {"mask_words": words(6, 8, 1)[:, ::2]}),
    (PACKED, {"cu_seqlens_q": int32([0, 70, 60, 73])}),
    (PACKED, {"cu_seqlens_q": int32([0, 70, 70, 10**6])}),
    (PACKED, {"cu_seqlens_q": int32([-5, 70, 70, 73])}),
    (PACKED, {"cu_seqlens_q": int32([0, 73])}),
    (PACKED, {"cu_seqlens_q": int32([0])}),
    (PACKED, {"cu_seqlens_q": int32([])}),
    (PACKED, {"cu_seqlens_q": lambda t: t.long()}),
    (PACKED, {"cu_seqlens_q": lambda t: t[None]}),
    (PACKED, {"cu_seqlens_q": None}),
    (PACKED, {"cu_seqlens_k": None}),
    (PACKED, {"cu_seqlens_k": int32([])}),
    (PACKED, {"cu_seqlens_k": int32([0, 70, 60, 200])}),
    (PACKED, {"cu_seqlens_k": int32([0, 70, 70, 2**31 - 1])}),
    (PACKED, {"cu_seqlens_k": lambda t: t.float()}),
    (PACKED, {"max_seqlen_q": 69}),
    (PACKED, {"max_seqlen_k": 129}),
    (PACKED, {"q": lambda t: t[:-1]}),
    (PACKED, {"k": lambda t: t[:-1], "v": lambda t: t[:-1]}),
    (PAGED, {"block_table": page(-1)}),
    (PAGED, {"block_table": page(10**9)}),
    (PAGED, {"block_table": None}),
    (PAGED, {"block_table": lambda t: t[:, :2]}),
    (PAGED, {"block_table": lambda t: t.long()}),
    (PAGED, {"block_table": lambda t: t.t().contiguous().t()}),
    (PAGED, {"seqlens_k": None}),
    (PAGED, {"seqlens_k": int32([130, 131])}),
    (PAGED, {"seqlens_k": int32([130, -1])}),
    (PAGED, {"seqlens_k": int32([130])}),
    (PAGED, {"max_seqlen_k": 10**6}),
    (PAGED, {"k": lambda t: t[:, :0], "v": lambda t: t[:, :0]}),
]


@pytest.mark.parametrize(("layout", "changes"), RAW)
def test_raw_attention_raises_rather_than_crash(layout: str, changes: dict[str, Any]) -> None:
    inputs = make(layout)
    raw_attention(inputs)
    with pytest.raises((RuntimeError, NotImplementedError)):
        raw_attention(inputs, **changes)


def raw_select(op: Any, inputs: Inputs, changes: dict[str, Any]) -> Any:
    arguments: dict[str, Any] = {
        "q": inputs.q,
        "summary": bsfa.pool_blocks(inputs.k, block_n=64, **inputs.layout_k),
        "k": None,
        "cu_seqlens_q": inputs.cu_q,
        "cu_seqlens_k": inputs.cu_k,
        "block_table": None,
        "seqlens_k": inputs.seqlens_k,
        "max_seqlen_q": inputs.max_q,
        "max_seqlen_k": inputs.max_k,
        "num_rows": 8,
        "block_m": 64,
        "block_n": 64,
        "causal": True,
        "softmax_scale": 0.25,
        "softcap": 0.0,
        "rule": "relative_max",
        "pooling": "mean",
        "stride": 16,
        "sharing": "none",
        "sink_blocks": 0,
        "window_blocks": 1,
    }
    if op is ops.select_blocks:
        arguments |= {
            "thresholds": torch.full((4,), 0.5),
            "last_tiles": 0,
            "min_blocks": 0,
            "min_ratio": 0.0,
            "probability": 1.0,
            "rescue_stride": 0,
            "rescue_probability": 0.0,
            "rescue_seed": 1,
            "prompt_lens": None,
        }
    for name, value in changes.items():
        if name in arguments:
            arguments[name] = value(arguments[name]) if callable(value) else value
    return op(*arguments.values())


RAW_SCORE: list[tuple[str, dict[str, Any]]] = [
    ("batched", {"pooling": "max"}),
    ("batched", {"sharing": "all"}),
    ("batched", {"rule": "pooled", "sharing": "group"}),
    ("batched", {"rule": "antidiagonal"}),
    ("batched", {"rule": "flat64"}),
    ("batched", {"k": torch.randn(2, 130, 2, 16)}),
    *(
        ("batched", {"rule": rule, "summary": None, "k": torch.randn(2, 130, 2, 16)} | change)
        for rule in ("antidiagonal", "flat64")
        for change in (
            {"block_m": 40},
            {"block_n": 40},
            {"k": torch.randn(2, 130, 2, 16).half()},
            {"k": torch.randn(2, 130, 2, 8)},
            {"k": torch.randn(2, 130, 3, 16)},
            {"k": torch.randn(1, 130, 2, 16)},
            {"k": torch.randn(2, 129, 2, 16)},
            {"k": torch.randn(130, 2, 16)},
            {"seqlens_k": int32([130, 130])},
        )
    ),
    *(
        ("batched", {"rule": "antidiagonal", "summary": None, "k": torch.randn(2, 130, 2, 16), "stride": stride})
        for stride in (0, -8, 48, 2**40)
    ),
    ("batched", {"rule": "topk"}),
    ("batched", {"num_rows": 3}),
    ("batched", {"num_rows": -1}),
    ("batched", {"num_rows": 0}),
    ("batched", {"block_n": 32}),
    ("batched", {"block_m": 0}),
    ("batched", {"q": lambda t: t.double()}),
    ("batched", {"q": lambda t: t[..., :8]}),
    ("batched", {"q": strided}),
    ("batched", {"summary": lambda t: t.half()}),
    ("batched", {"summary": lambda t: t[:1]}),
    ("batched", {"summary": lambda t: t[:, :-1].contiguous()}),
    ("batched", {"summary": lambda t: t[0]}),
    ("batched", {"summary": lambda t: t[:, :, :0].contiguous()}),
    ("batched", {"summary": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}),
    ("batched", {"max_seqlen_k": -1}),
    ("batched", {"max_seqlen_k": 2**40}),
    ("batched", {"seqlens_k": int32([130, 131])}),
    ("batched", {"seqlens_k": int32([-1, 130])}),
    (PACKED, {"cu_seqlens_q": int32([0, 70, 60, 73])}),
    (PACKED, {"cu_seqlens_q": int32([0, 70, 70, 100])}),
    (PACKED, {"cu_seqlens_k": int32([0, 70, 60, 200])}),
    (PACKED, {"cu_seqlens_k": int32([0, 200])}),
    (PACKED, {"seqlens_k": int32([70, 0, 130])}),
]
RAW_SELECT: list[tuple[str, dict[str, Any]]] = [
    *RAW_SCORE,
    ("batched", {"thresholds": torch.full((3,), 0.5)}),
    ("batched", {"sharing": "group"}),
    *(
        ("batched", {name: value})
        for name in ("min_ratio", "probability", "rescue_probability")
        for value in (-0.1, 1.1, NAN)
    ),
    *(("batched", {name: value}) for name in ("rescue_stride", "rescue_seed") for value in (-1, 2**40)),
    ("batched", {"thresholds": torch.full((4,), 0.5, dtype=torch.float64)}),
    ("batched", {"thresholds": torch.full((8,), 0.5)[::2]}),
    *(("batched", {n: v}) for n in ("sink_blocks", "window_blocks", "last_tiles", "min_blocks") for v in (-1, 2**40)),
    ("batched", {"prompt_lens": int32([130])}),
    ("batched", {"prompt_lens": torch.tensor([130, 130])}),
]


@pytest.mark.parametrize(("layout", "changes"), RAW_SCORE)
def test_raw_score_blocks_raises_rather_than_crash(layout: str, changes: dict[str, Any]) -> None:
    inputs = make(layout)
    raw_select(ops.score_blocks, inputs, {})
    with pytest.raises(RuntimeError):
        raw_select(ops.score_blocks, inputs, changes)


@pytest.mark.parametrize(("layout", "changes"), RAW_SELECT)
def test_raw_select_blocks_raises_rather_than_crash(layout: str, changes: dict[str, Any]) -> None:
    inputs = make(layout)
    raw_select(ops.select_blocks, inputs, {})
    with pytest.raises(RuntimeError):
        raw_select(ops.select_blocks, inputs, changes)


@pytest.mark.parametrize("huge", [2**31 - 1])
@pytest.mark.parametrize("name", ["sink_blocks", "window_blocks", "last_tiles", "min_blocks"])
def test_huge_counts_keep_everything(name: str, huge: int) -> None:
    inputs = make()
    selected, counts = raw_select(ops.select_blocks, inputs, {name: huge, "thresholds": torch.full((4,), 2.0)})
    visible = inputs.geometry.visible_blocks()
    assert (counts[: len(visible)] == visible[:, None]).all() and not selected[len(visible) :].any()


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("batched", {"max_seqlen_k": 131}),
        ("batched", {"max_seqlen_k": -1}),
        ("batched", {"block_n": 0}),
        ("batched", {"pooling": "flat64"}),
        ("batched", {"k": lambda t: t.double()}),
        ("batched", {"k": lambda t: t[0]}),
        ("batched", {"k": lambda t: t[0, 0, 0]}),
        ("batched", {"k": strided}),
        (PACKED, {"cu_seqlens_k": int32([0, 70, 60, 200])}),
        (PACKED, {"cu_seqlens_k": int32([])}),
        (PACKED, {"cu_seqlens_k": int32([0, 70, 70, 300])}),
        (PACKED, {"max_seqlen_k": 129}),
        (PAGED, {"block_table": page(-1)}),
        (PAGED, {"block_table": page(10**9)}),
        (PAGED, {"seqlens_k": int32([130, 131])}),
        (PAGED, {"seqlens_k": None}),
        (PAGED, {"k": lambda t: t[:, :0]}),
    ],
)
def test_raw_pool_blocks_raises_rather_than_crash(layout: str, changes: dict[str, Any]) -> None:
    inputs = make(layout)
    arguments: dict[str, Any] = {
        "k": inputs.k,
        "cu_seqlens_k": inputs.cu_k,
        "block_table": inputs.block_table,
        "seqlens_k": inputs.seqlens_k,
        "max_seqlen_k": inputs.max_k,
        "block_n": 64,
        "pooling": "mean",
    }
    ops.pool_blocks(*arguments.values())
    for name, value in changes.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(RuntimeError):
        ops.pool_blocks(*arguments.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"lse": lambda t: t.double()},
        {"lse": lambda t: t[..., :-1].contiguous()},
        {"lse": lambda t: t.transpose(1, 2)},
        {"num_rows": 3},
        {"num_rows": -1},
        {"block_m": 0},
        {"block_n": 2**40},
        {"k": lambda t: t.half()},
        {"k": lambda t: t[:, :-1]},
        {"q": lambda t: t[:1]},
    ],
)
def test_raw_block_mass_raises_rather_than_crash(changes: dict[str, Any]) -> None:
    inputs = make()
    arguments: dict[str, Any] = {"q": inputs.q, "k": inputs.k, "lse": inputs.attend(None)[1]}
    arguments |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "block_table", "seqlens_k"))
    arguments |= {"max_seqlen_q": 70, "max_seqlen_k": 130, "num_rows": 8, "block_m": 64, "block_n": 64}
    arguments |= {"causal": True, "softmax_scale": 0.25, "softcap": 0.0}
    ops.block_mass(*arguments.values())
    for name, value in changes.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(RuntimeError):
        ops.block_mass(*arguments.values())


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_valid_calls_after_all_that(dtype: torch.dtype) -> None:
    """Nothing above leaves a trace."""
    inputs = make(PACKED, dtype=dtype)
    assert inputs.run(None).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 0},
        {"page_size": 24},
        {"block_n": -128},
        {"blocks": -1},
        {"num_pages": 2},
        {"seqlens_k": int32([129, 10])},
        {"seqlens_k": int32([10])},
        {"block_table": int32([[0], [-1]])},
    ],
)
def test_raw_summary_entries_raises_rather_than_crash(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"block_table": int32([[0], [3]]), "seqlens_k": int32([128, 10])}
    arguments |= {"page_size": 128, "block_n": 128, "blocks": 2, "num_pages": 4}
    assert ops.summary_entries(*arguments.values()).tolist() == [[0, 4], [3, 4]]
    with pytest.raises(RuntimeError):
        ops.summary_entries(*(arguments | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 0},
        {"page_size": 24},
        {"units": -1},
        {"units": 2**28},
        {"lengths_q": int32([1])},
        {"lengths_q": int32([-1, 0])},
        {"block_table": int32([[], []])},
    ],
)
def test_raw_summary_window_raises_rather_than_crash(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"block_table": int32([[0, 1, 2], [5, 6, 7]]), "seqlens_k": int32([300, 130])}
    arguments |= {"lengths_q": int32([100, 200]), "page_size": 128, "block_n": 128, "units": 2}
    table, seqlens = ops.summary_window(*arguments.values())
    assert table.tolist() == [[1, 2], [5, 6]] and seqlens.tolist() == [172, 130]
    with pytest.raises(RuntimeError):
        ops.summary_window(*(arguments | changes).values())
