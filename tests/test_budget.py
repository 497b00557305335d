"""Budget mode: measured errors against float64 arithmetic and finite differences, allocation against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import bsfa
from bsfa.calibration import CalibrationCurves, collect, output_error, spend, split_prompts
from bsfa.calibration.budget import least_density, least_error, monotone
from bsfa.calibration.output_error import (
    between,
    draw_labels,
    gram_matrices,
    loss_gradients,
    output_projections,
    projected,
    spread_points,
)
from bsfa.cli import app
from bsfa.errors import UnsupportedError
from bsfa.integrations.transformers import AttentionCall, observe
from bsfa.policies import Antidiagonal, CumulativeMass, RelativeMax, ScoredPolicy
from bsfa.stages import select_for
from bsfa.thresholds import ThresholdTable
from tiny_model import make_mixed_model, make_model, make_prompts, make_rows, make_tokenizer, write_rows

SMALL: dict[str, int] = {"block_m": 16, "block_n": 16, "sink_blocks": 1, "window_blocks": 1}
POLICIES: dict[str, ScoredPolicy] = {
    "relative-max": RelativeMax(**SMALL, last_tiles=1),
    "relative-max, odd blocks": RelativeMax(block_m=48, block_n=20, sink_blocks=0, window_blocks=2, last_tiles=0),
    "relative-max, two sinks": RelativeMax(**{**SMALL, "sink_blocks": 2}, last_tiles=0),
    "relative-max, shared": RelativeMax(**SMALL, last_tiles=0, shared=True),
    "cumulative-mass": CumulativeMass(**SMALL, min_blocks=2),
    "antidiagonal": Antidiagonal(**SMALL, stride=8),
}
WORDS = 60


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return make_model(), make_tokenizer()


def calls_of(model: Any, ids: torch.Tensor) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), observe(model, calls.append):
        model(ids[None])
    return calls


def token_ids(lm: tuple[Any, Any], index: int, count: int = 3) -> torch.Tensor:
    return torch.tensor(lm[1](make_prompts(count, words=WORDS)[index].text)["input_ids"])


# ---- what is measured -----------------------------------------------------------------------------------------------


def attention64(
    policy: ScoredPolicy, call: AttentionCall, thresholds: torch.Tensor | None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Attention output [tokens, heads, D] in float64, over the tokens that the policy keeps (None: all)."""
    q, k, v = (t[0].double().numpy() for t in (call.q, call.k, call.v))
    tokens, heads = q.shape[:2]
    position = np.arange(tokens)
    out = np.zeros((tokens, heads, v.shape[2]))
    kept = np.ones((heads, tokens, tokens), dtype=bool)
    if thresholds is not None:
        mask = select_for(call.q, call.k, policy.with_threshold(thresholds), softmax_scale=call.softmax_scale)
        assert isinstance(mask, bsfa.BlockMask)
        rows = mask.to_bool()[0].numpy()
        rows = np.repeat(rows, heads // rows.shape[0], axis=0)
        kept = rows[:, position // policy.block_m][:, :, position // policy.block_n]
    for h in range(heads):
        kv = h // (heads // k.shape[1])
        logits = q[:, h] @ k[:, kv].T * call.softmax_scale
        p = np.where(kept[h] & (position[None] <= position[:, None]), np.exp(logits - logits.max(1, keepdims=True)), 0)
        out[:, h] = p / p.sum(1, keepdims=True) @ v[:, kv]
    return out


@pytest.mark.parametrize("cost", ["output", "loss"])
@pytest.mark.parametrize("name", POLICIES)
def test_measured_errors_are_those_of_float64(name: str, cost: str, lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    policy = POLICIES[name]
    curves = collect(model, tokenizer, make_prompts(2, words=WORDS), policy, errors=cost)
    assert curves.error is not None and curves.error.shape == curves.density.shape and curves.cost == cost
    assert bool((curves.error[..., 0] == 0).all()) and bool((curves.error[0, ..., -1] > 0).all())
    ids = token_ids(lm, 0, 2)
    gradients = loss_gradients(model, ids)
    for call in calls_of(model, ids):
        density = curves.density[0, call.layer]
        group = 2 if policy.shares_thresholds else 1
        index = spread_points(density, group)
        assert index.shape == (4, output_error.POINTS) and bool((index[:, -1] == density.shape[1] - 1).all())
        weight = model.model.layers[call.layer].self_attn.o_proj.weight.detach().double().numpy()
        dense = attention64(policy, call, None)
        power = ((dense.reshape(len(ids), -1) @ weight.T) ** 2).sum(1).mean()
        g = gradients[call.layer].view(len(ids), 4, -1).double().numpy()
        for point in (3, 9, 15, 21):
            at = index[:, point]
            change = attention64(policy, call, curves.grid[at][::group]) - dense
            for h in range(4):
                if cost == "output":
                    moved = change[:, h] @ weight[:, h * 16 : (h + 1) * 16].T
                    want = (moved**2).sum(1).mean() / power
                else:
                    want = ((g[:, h] * change[:, h]).sum(1) ** 2).mean() / 2
                got = float(curves.error[0, call.layer, h, at[h]])
                assert got == pytest.approx(want, rel=2e-3, abs=1e-9)


MASKS: dict[str, ScoredPolicy] = {
    **POLICIES,
    "relative-max, best blocks": RelativeMax(**SMALL, min_blocks=3),
    "cumulative-mass, rescue": CumulativeMass(
        **SMALL, keep_ratio=0.2, probability=0.1, rescue_stride=7, rescue_probability=0.05
    ),
    "antidiagonal, odd blocks": Antidiagonal(block_m=48, block_n=24, stride=8, sink_blocks=0),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("odd", [False, True], ids=["", "NaN and zeros"])
def test_masks_of_many_thresholds_are_those_of_selection(name: str, odd: bool) -> None:
    """Bit for bit, on both ends of the thresholds and at scores themselves."""
    policy = MASKS[name]
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 500, heads, 16, generator=generator) for heads in (4, 2))
    if odd:
        k[:, 430:440] = torch.nan  # of the last rows
        q[:, 300:330] = 0.0
    heads = 2 if policy.shares_thresholds else 4
    options: dict[str, Any] = {"causal": True, "softmax_scale": 0.3, "softcap": 0.0}
    both = select_for(q, k, policy, return_scores=True, **options)
    assert isinstance(both, tuple)
    own = both[1][20 if policy.block_m < 20 else 8, :, :3].T.nan_to_num(nan=0.5).clamp(0.0, 1.0)
    levels = [torch.full((heads,), x) for x in (0.0, 1e-7, 0.05, 0.3, 0.9, 1.0 - 2.0**-24, 1.0)]
    maker = output_error.MaskMaker(policy, q, k, **options)
    kept = set()
    for threshold in [*levels, *own, torch.linspace(0.0, 1.0, heads)]:
        want = select_for(q, k, policy.with_threshold(threshold), **options)
        got = maker.mask(threshold)
        assert isinstance(want, bsfa.BlockMask)
        assert torch.equal(got.words, want.words) and torch.equal(got.counts, want.counts)
        kept.add(int(got.counts.sum()))
    assert len(kept) > 5


def test_squared_changes_scores_once(lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = lm
    call = calls_of(model, token_ids(lm, 0))[0]
    count = {"pool": 0, "select": 0}

    def counted(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(output_error, "pool_blocks", counted("pool", output_error.pool_blocks))
    monkeypatch.setattr(output_error, "select_blocks", counted("select", output_error.select_blocks))
    thresholds = torch.tensor([0.9, 0.3, 0.1, 0.01]).expand(4, -1)
    grams = torch.eye(16).expand(4, -1, -1)
    error = output_error.squared_changes(POLICIES["relative-max"], thresholds, call, grams=grams)
    assert count == {"pool": 1, "select": 1} and bool((error[:, 0] > 0).all())


def test_no_errors_unless_asked_for(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    plain = collect(model, tokenizer, make_prompts(2, words=40), POLICIES["antidiagonal"])
    also = collect(model, tokenizer, make_prompts(2, words=40), POLICIES["antidiagonal"], errors="output")
    assert plain.error is None and plain.cost is None
    for name in ("lost_mass", "tail_lost", "density"):
        assert torch.equal(getattr(plain, name), getattr(also, name))
    with pytest.raises(ValueError, match="no errors: collect"):
        spend(plain, target_density=0.5)
    with pytest.raises(ValueError, match="errors must be None or one of output, loss"):
        collect(model, tokenizer, make_prompts(2), POLICIES["antidiagonal"], errors="magic")


def test_chunks_of_rows_change_nothing_that_matters(lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = lm
    whole = collect(model, tokenizer, make_prompts(2, words=40), POLICIES["antidiagonal"], errors="output")
    again = collect(model, tokenizer, make_prompts(2, words=40), POLICIES["antidiagonal"], errors="output")
    monkeypatch.setattr(output_error, "CHUNK", 64 * 50)
    rows = collect(model, tokenizer, make_prompts(2, words=40), POLICIES["antidiagonal"], errors="output")
    assert whole.error is not None and again.error is not None and rows.error is not None
    assert torch.equal(whole.error, again.error)
    torch.testing.assert_close(whole.error, rows.error, rtol=1e-4, atol=1e-12)


def test_points_are_spread_by_density() -> None:
    density = torch.cat((torch.ones(1), torch.linspace(0.9, 0.05, 90)))[None].repeat(2, 1)
    density[1, 40:] = 0.04
    index = spread_points(density, points=10)
    assert bool((index.diff(dim=1) >= 0).all()) and index[:, -1].tolist() == [90, 90]
    ratios = density[0][index[0, 1:]] / density[0][index[0, :-1]]
    assert float(ratios[:5].min()) > 0.6 and float(ratios[:5].max()) < 0.85
    together = spread_points(density, group=2, points=10)
    assert torch.equal(together[0], together[1]) and torch.equal(together[0], index[0])


def test_between_points_errors_are_linear_in_the_density() -> None:
    density = torch.tensor([[1.0, 0.9, 0.7, 0.6, 0.6, 0.2]])
    full = between(density, torch.tensor([[2, 5]]), torch.tensor([[3.0, 8.0]], dtype=torch.float64))
    want = [0.0, 1.0, 3.0, 3.0 + 5.0 * 0.1 / 0.5, 4.0, 8.0]
    assert full[0].tolist() == pytest.approx(want)
    flat = between(torch.ones(1, 3), torch.tensor([[1, 2]]), torch.tensor([[2.0, 5.0]], dtype=torch.float64))
    assert flat[0].tolist() == [0.0, 2.0, 5.0]


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_loss_gradients_are_finite_differences(lm: tuple[Any, Any]) -> None:
    """A small change of one token's attention output changes log p(labels) as the gradient says."""
    model, _ = lm
    model = make_model().double()
    ids = token_ids(lm, 2)[:70]
    found = loss_gradients(model, ids)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        labels = draw_labels(model(ids[None]).logits[0], ids)
    assert torch.equal(labels, draw_labels(model(ids[None]).logits[0].detach(), ids))
    assert all(p.requires_grad for p in model.parameters())
    generator = torch.Generator().manual_seed(1)
    for layer, token in ((0, 5), (0, 69), (1, 33)):
        direction = torch.randn(64, generator=generator, dtype=torch.float64)

        def value(step: float, layer: int = layer, token: int = token, along: torch.Tensor = direction) -> float:
            def hook(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                x = args[0].clone()
                x[0, token] += step * along
                return (x,)

            handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
            with torch.no_grad():
                logits = model(ids[None]).logits[0].double()
            handle.remove()
            return float(torch.log_softmax(logits, -1).gather(-1, labels).sum())

        step = 1e-3
        want = (value(step) - value(-step)) / (2 * step)
        got = float(found[layer][token].double() @ direction)
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4) and abs(got) > 1e-4


def test_labels_follow_the_predictions() -> None:
    share = torch.tensor([0.5, 0.3, 0.0, 0.2])
    labels = draw_labels(share.log().expand(20000, -1), torch.arange(5))
    counts = torch.bincount(labels[:, 0], minlength=4) / 20000
    assert counts.tolist() == pytest.approx(share.tolist(), abs=0.015) and float(counts[2]) == 0
    assert not torch.equal(labels, draw_labels(share.log().expand(20000, -1), torch.arange(6)))


# ---- projections ----------------------------------------------------------------------------------------------------


def test_projection_is_read_by_running_it() -> None:
    """With a bias, in low precision, and transposed as GPT-2 has it."""
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    linear = torch.nn.Linear(12, 20)
    with torch.no_grad():
        torch.testing.assert_close(projected(linear, x), x @ linear.weight.T, rtol=1e-5, atol=1e-5)
        grams = gram_matrices(linear, 3, torch.empty(5, 3, 4))
        low = gram_matrices(linear.bfloat16(), 3, torch.empty(5, 3, 4, dtype=torch.bfloat16))
    for h in range(3):
        columns = linear.weight.detach().float()[:, 4 * h : 4 * h + 4]
        torch.testing.assert_close(low[h], columns.T @ columns, rtol=0.01, atol=0.01)
    torch.testing.assert_close(grams, low, rtol=0.05, atol=0.02)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=50, n_positions=64)
    gpt2 = GPT2LMHeadModel(config).eval()
    module = output_projections(gpt2)[0]
    assert module is gpt2.transformer.h[0].attn.c_proj
    y = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(projected(module, y), y @ module.weight, rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_unknown_projection_names_the_layer(lm: tuple[Any, Any]) -> None:
    model = make_model()
    attention = model.model.layers[1].self_attn
    attention.mystery = attention.o_proj
    del attention.o_proj
    with pytest.raises(UnsupportedError, match=r"layer 1: LlamaAttention has no output projection .*o_proj"):
        collect(model, lm[1], make_prompts(2), POLICIES["antidiagonal"], errors="output")


def test_changed_attention_output_is_refused(lm: tuple[Any, Any]) -> None:
    model = make_model()
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
    with pytest.raises(UnsupportedError, match="layer 1: attention's output is changed before its projection"):
        collect(model, lm[1], make_prompts(2, words=40), POLICIES["antidiagonal"], errors="output")
    handle.remove()
    collect(model, lm[1], make_prompts(2, words=40), POLICIES["antidiagonal"], errors="output")


@pytest.mark.parametrize("cost", ["output", "loss"])
def test_offloaded_models_measure_like_plain_ones(cost: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    prompts, policy = make_prompts(2, words=40), POLICIES["cumulative-mass"]
    plain = collect(make_model(), lm[1], prompts, policy, errors=cost)
    model = make_model()
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    offloaded = collect(model, lm[1], prompts, policy, errors=cost)
    assert plain.error is not None and offloaded.error is not None and float(plain.error.max()) > 0
    assert torch.equal(plain.error, offloaded.error)


def test_layers_that_stay_dense_have_no_error(lm: tuple[Any, Any]) -> None:
    curves = collect(make_mixed_model(), lm[1], make_prompts(4), POLICIES["relative-max"], errors="output")
    assert curves.error is not None and float(curves.error[:, 0].max()) == 0 < float(curves.error[:, 1].max())
    table = spend(curves, target_density=0.5)
    assert bool(table.dense_heads()[0].all()) and not bool(table.dense_heads()[1].any())
    assert table.calibration["estimated_density"] <= 0.5


# ---- allocation -----------------------------------------------------------------------------------------------------


@st.composite
def budgets(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Monotone curves of a few heads, ties and flat pieces among them, and a budget that can be met."""
    heads, points = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    cells = st.lists(st.integers(0, 6), min_size=points - 1, max_size=points - 1)
    density, error = [], []
    for _ in range(heads):
        falls, rises = draw(cells), draw(cells)
        density.append([1.0 - sum(falls[:g]) / 32 for g in range(points)])
        error.append([float(sum(rises[:g])) for g in range(points)])
    d, e = torch.tensor(density, dtype=torch.float64), torch.tensor(error, dtype=torch.float64)
    floor = float(d[:, -1].sum())
    return d, e, floor + (heads - floor) * draw(st.floats(0.0, 1.0))


def choices(density: torch.Tensor, error: torch.Tensor) -> list[tuple[float, float]]:
    """(density, error) of all combinations of thresholds."""
    rows = [list(zip(d, e, strict=True)) for d, e in zip(density.tolist(), error.tolist(), strict=True)]
    return [(sum(d for d, _ in combo), sum(e for _, e in combo)) for combo in itertools.product(*rows)]


def sums(density: torch.Tensor, error: torch.Tensor, index: torch.Tensor) -> tuple[float, float]:
    return tuple(float(x.gather(-1, index[:, None]).sum()) for x in (density, error))  # type: ignore[return-value]


def longest_step(density: torch.Tensor) -> float:
    return float((density[:, 0] - density[:, -1]).max())


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_least_error_is_that_of_brute_force(case: tuple[torch.Tensor, torch.Tensor, float]) -> None:
    density, error, budget = case
    kept, lost = sums(density, error, least_error(density, error, budget))
    every = choices(density, error)
    assert kept <= budget + 1e-9
    assert lost >= min(e for d, e in every if d <= budget + 1e-9) - 1e-9
    # The best Lagrangian choice below the budget, at any price of a block, is no better.
    for price in (0.0, 0.5, 3.0, 10.0, 30.0, 100.0, 1e4):
        best = min(e + price * d for d, e in every)
        fitting = [e for d, e in every if e + price * d <= best + 1e-9 and d <= budget + 1e-9]
        assert not fitting or lost <= min(fitting) + 1e-9
    # Nor is anything that leaves room for one more step of any head.
    roomy = [e for d, e in every if d <= budget - longest_step(density)]
    assert not roomy or lost <= min(roomy) + 1e-9


@settings(max_examples=150, deadline=None)
@given(budgets(), st.floats(0.0, 1.0))
def test_more_density_is_never_worse(case: tuple[torch.Tensor, torch.Tensor, float], share: float) -> None:
    """Once it is enough for one more step; below that, what fills the rest may differ."""
    density, error, budget = case
    floor = float(density[:, -1].sum())
    less = max(floor, budget - longest_step(density) - share)
    if less > budget - longest_step(density):
        return
    assert sums(density, error, least_error(density, error, budget))[1] <= (
        sums(density, error, least_error(density, error, less))[1] + 1e-9
    )


@settings(max_examples=200, deadline=None)
@given(budgets(), st.floats(0.0, 1.0))
def test_least_density_meets_the_error(case: tuple[torch.Tensor, torch.Tensor, float], share: float) -> None:
    density, error, _ = case
    most = float(error[:, -1].sum()) * share
    kept, lost = sums(density, error, least_density(density, error, most))
    every = choices(density, error)
    assert lost <= most + 1e-9
    least = min(d for d, e in every if e <= most + 1e-9)
    assert least - 1e-9 <= kept <= least + longest_step(density) + 1e-9


def test_allocation_by_hand() -> None:
    density = torch.tensor([[1.0, 0.5, 0.1], [1.0, 0.5, 0.1]], dtype=torch.float64)
    error = monotone(torch.tensor([[0.0, 1.0, 9.0], [0.0, 3.0, 2.0]], dtype=torch.float64))
    assert error[1].tolist() == [0.0, 3.0, 3.0]
    # Head 0 gains 8 by 0.4, then 1 by 0.5; head 1 gains 3 by 0.9 (its middle point is worse than the chord).
    for budget, want in ((0.2, [2, 2]), (0.6, [1, 2]), (1.1, [0, 2]), (1.5, [1, 0]), (2.0, [0, 0])):
        assert least_error(density, error, budget).tolist() == want, budget
    with pytest.raises(ValueError, match="below the density of the loosest"):
        least_error(density, error, 0.1)
    for most, want in ((12.0, [2, 2]), (4.0, [1, 2]), (3.0, [0, 2]), (1.0, [1, 0]), (0.0, [0, 0])):
        assert least_density(density, error, most).tolist() == want, most


# ---- tables ---------------------------------------------------------------------------------------------------------


def synthetic(prompts: int = 12, group: int = 1, **changes: Any) -> CalibrationCurves:
    """Curves in which heads differ in what a block is worth; every other prompt is twice as long and sparser."""
    policy = RelativeMax()
    grid = bsfa.calibration.threshold_grid(policy)
    generator = torch.Generator().manual_seed(3)
    ramp = torch.linspace(0, 1, len(grid))
    worth = torch.rand(1, 2, 4 // group, 1, generator=generator).repeat_interleave(group, dim=2)
    noise = 1 + 0.1 * torch.rand(prompts, 2, 4, 1, generator=generator)
    long = torch.tensor([i % 2 for i in range(prompts)]).view(-1, 1, 1, 1)
    density = (1 - (0.8 + 0.1 * long) * ramp.sqrt()).expand(prompts, 2, 4, -1).contiguous()
    values: dict[str, Any] = {
        "policy": policy,
        "grid": grid,
        "lost_mass": (ramp**2 / 2).expand(prompts, 2, 4, -1),
        "tail_lost": (ramp**2).expand(prompts, 2, 4, -1),
        "tail": 0.1,
        "density": density,
        "layers": ("calibrated", "calibrated"),
        "tokens": tuple(1000 + 1000 * (i % 2) for i in range(prompts)),
        "prompts_sha256": "0" * 64,
        "model": bsfa.identity.ModelIdentity("made up", {"num_key_value_heads": 4 // group}),
        "attention": {"softmax_scale": [0.1] * 2, "softcap": [0.0] * 2, "dtype": "float32"},
        "cost": "output",
        "error": worth**4 * ramp**3 * noise,
        "group": group,
    }
    return CalibrationCurves(**{**values, **changes})


def test_table_says_what_was_asked_for_and_measured(tmp_path: Path) -> None:
    curves = synthetic()
    assert curves.error is not None
    table = spend(curves, target_density=0.3, seed=2)
    held_in, held_out = split_prompts(12, 2)
    index = torch.stack([torch.searchsorted(curves.grid, row) for row in table.thresholds])
    long = [i for i in held_in.tolist() if i % 2]
    kept = torch.stack([curves.density[i].gather(-1, index[..., None])[..., 0] for i in long]).double()
    assert table.calibration["estimated_density"] == pytest.approx(float(kept.mean()), abs=1e-6)
    assert 0.29 < float(kept.mean()) <= 0.3
    out = torch.stack([curves.error[i].gather(-1, index[..., None])[..., 0] for i in held_out.tolist()]).double()
    found = table.calibration["held_out"]
    assert found["error"] == pytest.approx(math.sqrt(float(out.mean(0).sum(-1).mean())), rel=1e-6)
    assert sorted(found["error_by_length"]) == ["1024", "2048"]
    torch.testing.assert_close(torch.tensor(found["error_per_head"]), out.mean(0).float(), rtol=1e-3, atol=1e-9)
    density = torch.stack([curves.density[i].gather(-1, index[..., None])[..., 0] for i in held_out.tolist()])
    torch.testing.assert_close(table.density, density.mean(0))
    assert table.target_recall is None and table.goal == "target density 0.3" and "target density 0.3" in repr(table)
    # Blocks go where they are worth something.
    worth = curves.error[..., -1].mean(0).flatten()
    assert float(table.density.flatten()[worth.argmax()]) > float(table.density.flatten()[worth.argmin()]) + 0.1
    table.save(tmp_path / "a.safetensors")
    read = ThresholdTable.load(tmp_path / "a.safetensors")
    assert torch.equal(read.thresholds, table.thresholds) and read.calibration == table.calibration
    spend(curves, target_density=0.3, seed=2).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_targets_are_met_and_ordered() -> None:
    curves = synthetic()
    tables = [spend(curves, target_density=d) for d in (0.15, 0.3, 0.5, 0.8, 1.0)]
    errors = [t.calibration["estimated_error"] for t in tables]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0 and len(set(errors)) == 5
    for target, table in zip((0.15, 0.3, 0.5, 0.8, 1.0), tables, strict=True):
        assert table.calibration["estimated_density"] <= target + 1e-9
    for target in (0.5, 0.2, 0.05):
        table = spend(curves, target_output_error=target)
        assert 0.8 * target < table.calibration["estimated_error"] <= target + 1e-9
        assert table.goal == f"target output error {target:g}"
    # All heads at one threshold do worse at the same density.
    assert curves.error is not None
    held_in = split_prompts(12, 0)[0]
    long = held_in[held_in % 2 == 1]
    density, error = curves.density[long].double().mean((0, 1, 2)), curves.error[held_in].double().mean(0)
    same = int((density > 0.3).sum())
    alike = math.sqrt(float(error[..., same].sum(-1).mean()))
    assert errors[1] < 0.9 * alike


def test_held_out_prompts_choose_nothing() -> None:
    curves = synthetic()
    assert curves.error is not None
    held_in, held_out = split_prompts(12, 0)
    table = spend(curves, target_density=0.3)
    error, density = curves.error.clone(), curves.density.clone()
    error[held_out] = error[held_out].flip(2) * 7
    density[held_out] = density[held_out] ** 2
    other = spend(replace(curves, error=error, density=density), target_density=0.3)
    assert torch.equal(table.thresholds, other.thresholds)
    assert table.calibration["estimated_error"] == other.calibration["estimated_error"]
    assert table.calibration["held_out"]["error"] != other.calibration["held_out"]["error"]
    error = curves.error.clone()
    error[held_in] = error[held_in].flip(2)
    assert not torch.equal(table.thresholds, spend(replace(curves, error=error), target_density=0.3).thresholds)


def test_heads_that_share_a_threshold_are_allotted_together(lm: tuple[Any, Any]) -> None:
    curves = collect(lm[0], lm[1], make_prompts(4), POLICIES["relative-max, shared"], errors="output")
    thresholds = spend(curves, target_density=0.5).thresholds.unflatten(-1, (2, 2))
    assert torch.equal(thresholds[..., 0], thresholds[..., 1]) and len(thresholds[..., 0].unique()) > 1
    table = spend(synthetic(group=2), target_density=0.3)
    pairs = table.thresholds.unflatten(-1, (2, 2))
    assert torch.equal(pairs[..., 0], pairs[..., 1]) and len(pairs[..., 0].unique()) > 2


def test_targets_that_cannot_be_met() -> None:
    curves = synthetic()
    with pytest.raises(ValueError, match=r"target density 0.05 is below 0.1000, what sinks, window, .* of 2K tokens"):
        spend(curves, target_density=0.05)
    for bad in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="target density must be above 0 and at most 1"):
            spend(curves, target_density=bad)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="target output error must be above 0"):
            spend(curves, target_output_error=bad)
    with pytest.raises(ValueError, match="either target_density or target_output_error"):
        spend(curves)
    with pytest.raises(ValueError, match="either target_density or target_output_error"):
        spend(curves, target_density=0.3, target_output_error=0.1)
    with pytest.raises(ValueError, match="not 'loss'"):
        spend(replace(curves, cost="loss"), target_output_error=0.1)


@pytest.mark.parametrize("cost", ["output", "loss"])
def test_resumed_is_uninterrupted(cost: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = lm
    prompts, policy = make_prompts(5, words=40), POLICIES["antidiagonal"]
    whole = collect(model, tokenizer, prompts, policy, errors=cost)

    class Killed(Exception):
        pass

    def killed(done: float, total: float, now: str) -> None:
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        collect(model, tokenizer, prompts, policy, errors=cost, resume=tmp_path / "r", progress=killed)
    finished = len(list((tmp_path / "r").glob("*/*.safetensors")))
    assert 0 < finished < 5
    seen: list[str] = []
    again = collect(
        model, tokenizer, prompts, policy, errors=cost, resume=tmp_path / "r", progress=lambda *x: seen.append(x[2])
    )
    assert len(seen) == 5 - finished + 1
    assert whole.error is not None and again.error is not None
    for name in ("lost_mass", "tail_lost", "density", "error"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
    # Without errors, or with others, nothing of it counts.
    with pytest.warns(bsfa.calibration.CalibrationWarning, match="other settings"):
        plain = collect(model, tokenizer, prompts, policy, resume=tmp_path / "r")
    assert plain.error is None


# ---- command line ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget")
    make_model().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    write_rows(path / "p.jsonl", make_rows(6, words=150))
    return path


def run(place: Path, *arguments: object) -> Any:
    fixed = ["calibrate", "--model", place / "model", "--data", place / "p.jsonl", "--block-size", 16]
    return CliRunner().invoke(app, [str(a) for a in (*fixed, *arguments, "--device", "cpu")])


def test_command_line(place: Path) -> None:
    result = run(
        place, "-o", place / "d-{target}.safetensors", "--policy", "antidiagonal", "--stride", 4, "--sink-blocks", 1,
        "--target-density", 0.4, "--target-density", 0.6,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "recall, density and error on 3 of 6 prompts" in result.output
    tables = [ThresholdTable.load(place / f"d-{d}.safetensors") for d in (0.4, 0.6)]
    for d, table in zip((0.4, 0.6), tables, strict=True):
        assert table.calibration["target_density"] == d and table.calibration["cost"] == "output"
        assert table.policy.stride == 4  # type: ignore[attr-defined]
        assert table.calibration["estimated_density"] <= d
    assert bool((tables[0].thresholds <= tables[1].thresholds).any()) and not list(place.glob("*.partial"))
    shown = CliRunner().invoke(app, ["inspect", str(place / "d-0.4.safetensors"), "--plot", str(place / "x.png")])
    assert shown.exit_code == 0, shown.output
    for text in (
        "target density 0.4",
        "cost  ",
        "estimated",
        "held out, error",
        "none: the thresholds have the least",
    ):
        assert text in shown.output
    assert "target recall" not in shown.output
    few = ("--sink-blocks", 1, "--window-blocks", 1, "--last-tiles", 0)
    result = run(place, "-o", place / "l.safetensors", *few, "--target-density", 0.5, "--cost", "loss")
    assert result.exit_code == 0, result.output
    assert "nats per token" in CliRunner().invoke(app, ["inspect", str(place / "l.safetensors")]).output
    result = run(place, "-o", place / "e.safetensors", *few, "--target-output-error", 0.3)
    assert result.exit_code == 0, result.output
    assert ThresholdTable.load(place / "e.safetensors").goal == "target output error 0.3"


ERRORS: dict[str, tuple[list[object], str]] = {
    "two kinds": (["--target-density", 0.3, "--target-recall", 0.9], "one kind of target at a time"),
    "density": (["--target-density", 30], "target density must be above 0 and at most 1"),
    "error": (["--target-output-error", 0], "target output error must be above 0"),
    "loss": (["--target-output-error", 0.1, "--cost", "loss"], "not 'loss'"),
    "cost": (["--target-density", 0.3, "--cost", "magic"], "choose one of output, loss"),
    "cost of recall": (["--cost", "output"], "--cost belongs to --target-density"),
    "confidence": (["--target-density", 0.3, "--confidence", 0.9], "a budget promises nothing"),
    "stride": (["--stride", 4], "relative-max has none"),
    "exact-skip": (["--target-density", 0.3, "--policy", "exact-skip"], "calibrated for a target recall only"),
    "kth": (["--target-density", 0.3, "--policy", "exact-skip", "--rule", "kth", "--k", 3], "--k has no target"),
    "floor": (["--target-density", 0.01], "target density 0.01 is below"),
    "several": (["--target-density", 0.3, "--target-density", 0.4], "{target}"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, place: Path, tmp_path: Path) -> None:
    arguments, message = ERRORS[case]
    result = run(place, "-o", tmp_path / "t.safetensors", *arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert not list(tmp_path.glob("*.safetensors"))
