"""Union, Intersection and PerLayer: what their members keep, combined block by block."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfa
import tiny_model
from bsfa.policies import (
    CumulativeMass,
    Dense,
    Fixed,
    FlexPrefill,
    Intersection,
    PerLayer,
    Policy,
    RelativeMax,
    StaticPattern,
    Union,
)
from bsfa.policies.base import Selection
from bsfa.policies.composed import on_device
from cases import BATCHED, PACKED, PAGED, PAGED_PACKED, Case, Inputs, check_attention, table

SIZES = {"block_m": 32, "block_n": 16}
PATTERN = StaticPattern(sink_blocks=1, window_blocks=2, **SIZES)
BEST = RelativeMax(alpha=0.9, sink_blocks=0, window_blocks=1, last_tiles=0, **SIZES)
MASS = CumulativeMass(mass=torch.tensor([0.1, 0.2, 0.4, 0.6]), sink_blocks=0, window_blocks=1, **SIZES)

CASES = [
    *table(
        Case(lengths=((150, 300), (150, 300)), hq=4, hkv=2, scale=0.4, **SIZES),
        layout=[BATCHED, PACKED, PAGED, PAGED_PACKED],
    ),
    Case(lengths=((65, 65), (0, 0), (1, 130), (37, 150)), hq=4, hkv=2, layout=PACKED, **SIZES),
    Case(lengths=((150, 300),), hq=4, hkv=2, causal=False, **SIZES),
]


def masks_of(inputs: Inputs, *policies: Policy) -> list[Tensor]:
    """Kept blocks of each policy alone, for each query head."""
    found = [inputs.run(p, return_info=True)[1].mask.to_rows() for p in policies]
    return [rows.repeat_interleave(inputs.case.hq // rows.shape[1], dim=1) for rows in found]


def run(inputs: Inputs, policy: Policy) -> Tensor:
    """Kept blocks [rows, heads, blocks], after checking the counts and the attention over them."""
    out, lse, info = inputs.run(policy, return_lse=True, return_info=True)
    rows = info.mask.to_rows()
    assert torch.equal(info.mask.counts, rows.sum(-1, dtype=torch.int32)) and info.dense_reason is None
    blocks = [-(-n // inputs.case.block_n) for _, n in inputs.case.lengths]
    check_attention(inputs, out, lse, [inputs.rows_of_sequence(rows, b)[:, :, :n] for b, n in enumerate(blocks)])
    return rows.repeat_interleave(inputs.case.hq // rows.shape[1], dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_union_and_intersection(case: Case) -> None:
    inputs = case.make()
    pattern, best, mass = masks_of(inputs, PATTERN, BEST, MASS)
    assert (best & ~pattern).any() and (pattern & ~best).any() and (best & ~mass).any()
    assert torch.equal(run(inputs, Union(PATTERN, BEST)), pattern | best)
    assert torch.equal(run(inputs, Union(MASS, BEST, PATTERN)), pattern | best | mass)
    assert torch.equal(run(inputs, Intersection(BEST, PATTERN)), pattern & best)
    assert torch.equal(run(inputs, Intersection(PATTERN, BEST, MASS)), pattern & best & mass)
    assert torch.equal(run(inputs, Union(PATTERN, Intersection(BEST, MASS))), pattern | (best & mass))
    assert torch.equal(run(inputs, Union(BEST)), best) and torch.equal(run(inputs, Intersection(BEST)), best)


@pytest.mark.parametrize("mask_heads", ["one", "kv", "q"])
def test_heads_are_broadcast(mask_heads: str) -> None:
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, mask="random", mask_heads=mask_heads, **SIZES).make()
    fixed = Fixed(mask=inputs.block_mask([inputs.draw_mask(0)]))
    mine, best = masks_of(inputs, fixed, BEST)
    own = masks_of(inputs, StaticPattern(sink_blocks=0, window_blocks=1, **SIZES))[0]
    assert torch.equal(run(inputs, Union(fixed, BEST)), mine | best)
    assert torch.equal(run(inputs, Intersection(fixed, BEST)), (mine & best) | own)
    assert (own & ~mine).any()
    with pytest.raises(ValueError, match="heads"):
        three = dataclasses.replace(fixed.mask, words=fixed.mask.words[:, :1].expand(-1, 3, -1).contiguous())
        run(inputs, Union(Fixed(mask=three), BEST))


def test_an_intersection_keeps_the_diagonal() -> None:
    """Of masks that have no block in common, too: no query ends with nothing."""
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, **SIZES).make()
    g = inputs.geometry
    nothing = bsfa.BlockMask.from_rows(torch.zeros((g.num_rows, 1, g.num_blocks), dtype=torch.bool), g)
    own = masks_of(inputs, StaticPattern(sink_blocks=0, window_blocks=1, **SIZES))[0]
    for policy in (
        Intersection(Fixed(mask=nothing)),
        Intersection(Fixed(mask=nothing), BEST),
        Intersection(Union(Fixed(mask=nothing)), BEST),
        Intersection(Union(Fixed(mask=nothing), Intersection(PATTERN, Fixed(mask=nothing)))),
    ):
        assert torch.equal(run(inputs, policy), own)


@pytest.mark.parametrize("dense", [None, Dense(), Dense(block_m=64), Union(None), Intersection(Dense())])
def test_dense_members(dense: Policy | None) -> None:
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, **SIZES).make()
    for policy in (Union(BEST, dense), Union(dense), Intersection(dense, dense), Union(Intersection(BEST), dense)):
        out, info = inputs.run(policy, return_info=True)
        assert info.mask is None and info.dense_reason is None and not policy.needs_summary
        assert torch.equal(out, inputs.run(None))
    both = Intersection(dense, BEST)
    assert (both.block_m, both.block_n) == (32, 16)
    assert torch.equal(run(inputs, both), masks_of(inputs, BEST)[0])


def test_one_summary_for_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, **SIZES).make()
    calls: list[str] = []
    real = torch.ops.bsfa.pool_blocks.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is real:
                calls.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Count():
        inputs.run(Union(BEST, Intersection(MASS, BEST), PATTERN))
        assert calls == ["mean"]
        inputs.run(Union(PATTERN, PATTERN))
        assert calls == ["mean"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Other(Policy):
    """Keeps what BEST keeps, and notes the summary that it was given."""

    pooling: str = "maxabs"
    seen: list[Tensor | None] = dataclasses.field(default_factory=list)
    name: ClassVar[str] = "other"

    @property
    def needs_summary(self) -> bool:
        return True

    @property
    def summary_pooling(self) -> str:
        return self.pooling

    def select(self, selection: Selection) -> bsfa.BlockMask:
        self.seen.append(selection.summary)
        return PATTERN.select(selection)


@pytest.mark.parametrize("layout", [BATCHED, PACKED, PAGED])
def test_one_summary_for_each_kind_of_pooling(layout: str) -> None:
    inputs = Case(lengths=((150, 300), (150, 300)), hq=4, hkv=2, layout=layout, **SIZES).make()
    a, b = Other(**SIZES), Other(**SIZES)
    policy = Union(BEST, a, b)
    assert policy.summary_pooling == "mean" and policy.needs_keys and not Union(a, b).needs_keys
    inputs.run(policy)
    want = torch.ops.bsfa.pool_blocks(
        inputs.k, inputs.cu_k, inputs.block_table, inputs.seqlens_k, inputs.max_k, 16, "maxabs"
    )
    assert a.seen[0] is b.seen[0] and torch.equal(a.seen[0], want)
    with pytest.raises(ValueError, match="pass k"):
        summary = bsfa.pool_blocks(inputs.k, block_n=16, **inputs.layout_k)
        bsfa.select_blocks(inputs.q, summary, policy, **inputs.layout_select)


@pytest.mark.parametrize("layout", [BATCHED, PAGED])
def test_the_mean_correction_takes_means(layout: str) -> None:
    """Whatever the members pool by, and whether means are kept beside the cache or not."""
    inputs = Case(lengths=((150, 300), (150, 300)), hq=4, hkv=2, layout=layout, **SIZES).make()
    other = CumulativeMass(mass=0.3, pooling="maxabs", **SIZES)
    for policy in (Union(other), Union(other, BEST), Union(BEST, other), Intersection(BEST, FlexPrefill(**SIZES))):
        out, info = inputs.run(policy, mean_correction=True, return_info=True)
        want = inputs.run(Fixed(mask=info.mask), mean_correction=True)
        assert float(info.density()) < 1.0 and torch.equal(out, want)
        if layout == PAGED:
            pages, page_size, hkv, dim = inputs.k.shape
            summary = bsfa.BlockSummary.allocate(
                pages, page_size, hkv, dim, block_n=16, dtype=inputs.k.dtype, pooling=policy.summary_pooling,
                head_dim_v=inputs.v.shape[-1],
            )  # fmt: skip
            before = inputs.seqlens_k - 150
            summary.update(inputs.k, inputs.block_table, before, max_seqlen_q=150, v_cache=inputs.v)
            assert torch.equal(inputs.run(policy, mean_correction=True, summary=summary), want)


def test_errors() -> None:
    for kind in (Union, Intersection):
        with pytest.raises(ValueError, match="at least one"):
            kind()
        with pytest.raises(TypeError, match="str"):
            kind(BEST, "dense")
        with pytest.raises(TypeError, match="list"):
            kind([BEST, MASS])
        with pytest.raises(ValueError, match="RelativeMax 32 x 16, StaticPattern 128 x 128"):
            kind(BEST, StaticPattern())
    assert repr(Union(Dense(), None)) == "Union(Dense(block_m=128, block_n=128), None)"
    inputs = Case(lengths=((150, 300),), hq=4, hkv=2, **SIZES).make()
    summary = bsfa.pool_blocks(inputs.k, block_n=16)
    for policy in (Union(BEST), PATTERN):
        with pytest.raises(ValueError, match=f"{type(policy).__name__} has no scores"):
            bsfa.select_blocks(inputs.q, summary, policy, seqlen_k=300, return_scores=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch.compiler.reset()
    policy = Union(PATTERN, Intersection(BEST, MASS))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return bsfa.attention(q, k, v, policy=policy)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for length in (150, 200, 97):
        inputs = Case(lengths=((length, length),), hq=4, hkv=2, **SIZES).make()
        torch.testing.assert_close(compiled(inputs.q, inputs.k, inputs.v), inputs.run(policy))


# --- PerLayer ---------------------------------------------------------------------------------------------------------


def test_per_layer() -> None:
    both = PerLayer([BEST, None, Union(MASS, PATTERN)])
    assert both.num_layers == 3 and both.layer(0) is BEST and both.layer(1) is None
    assert both.layer(2) is both.policies[2]
    for index in (3, -1):
        with pytest.raises(IndexError, match=r"0 \.\. 2"):
            both.layer(index)
    for wrong in ([], "dense", [BEST, 3], BEST):
        with pytest.raises((TypeError, ValueError), match=r"PerLayer|layer 1"):
            PerLayer(wrong)  # type: ignore[arg-type]
    assert "Union(CumulativeMass" in repr(both)


def test_thresholds_move_with_the_layer() -> None:
    moved = on_device(Union(BEST, Intersection(MASS, PATTERN)), torch.device("meta"))
    assert isinstance(moved, Union) and moved.policies[0] is BEST
    inner = moved.policies[1]
    assert isinstance(inner, Intersection) and inner.policies[1] is PATTERN
    assert isinstance(inner.policies[0], CumulativeMass) and inner.policies[0].mass.device.type == "meta"
    assert PerLayer([MASS]).layer(0, "meta").mass.device.type == "meta"


def test_a_model_takes_policies_per_layer() -> None:
    hf = pytest.importorskip("bsfa.integrations.transformers")
    model = tiny_model.make_model()
    layers = model.config.num_hidden_layers
    ids = torch.randint(0, model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    strict = RelativeMax(alpha=1.0, sink_blocks=0, window_blocks=1, last_tiles=0, **SIZES)
    chosen: list[Policy | None] = [None] * (layers - 1) + [Union(strict, PATTERN)]
    outs = []
    for policy in (chosen, PerLayer(chosen)):
        hf.set_policy(model, policy, min_seqlen=0, record=True)
        with torch.no_grad():
            outs.append(model(ids).logits)
        densities = hf.density(model)
        assert float(densities[0]) == 1.0 and float(densities[layers - 1]) < 1.0
    assert torch.equal(*outs)
    with pytest.raises(ValueError, match="layers"):
        hf.set_policy(model, PerLayer([BEST] * (layers + 1)))
    with pytest.raises(ValueError, match=f"{layers} layers, but {layers + 1}"):
        PerLayer([BEST] * (layers + 1)).check_model(model)
    PerLayer(chosen).check_model(model)
    assert isinstance(PerLayer(chosen), hf.LayerPolicies)
    assert np.isfinite(outs[0].numpy()).all()
