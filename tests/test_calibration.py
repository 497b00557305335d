"""Curves against brute-force selection, the model pass, the choice and its report."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bsfa
from bsfa.calibration import (
    BlockCurves,
    CalibrationCurves,
    CalibrationWarning,
    block_curves,
    choose,
    collect,
    p_value,
    split_prompts,
    threshold_grid,
)
from bsfa.calibration.statement import doubts, statement
from bsfa.integrations.transformers import observe
from bsfa.policies import Antidiagonal, CumulativeMass, RelativeMax, ScoredPolicy
from bsfa.stages import select_for
from tiny_model import make_mixed_model, make_model, make_prompts, make_tokenizer

BLOCKS = {"block_m": 32, "block_n": 32}
POLICIES = {
    "relative-max": RelativeMax(**BLOCKS, sink_blocks=1, window_blocks=1, last_tiles=1),
    "relative-max, odd blocks": RelativeMax(block_m=48, block_n=20, sink_blocks=0, window_blocks=2, last_tiles=0),
    "cumulative-mass": CumulativeMass(**BLOCKS, sink_blocks=0, window_blocks=1),
    "relative-max, shared": RelativeMax(**BLOCKS, sink_blocks=1, window_blocks=1, last_tiles=0, shared=True),
    "cumulative-mass, flat64": CumulativeMass(block_m=64, block_n=64, pooling="flat64", sink_blocks=0, window_blocks=1),
    "cumulative-mass, maxabs": CumulativeMass(
        **BLOCKS, pooling="maxabs", keep_ratio=0.1, probability=0.3, rescue_stride=40, sink_blocks=0, window_blocks=1
    ),
    "antidiagonal": Antidiagonal(**BLOCKS, stride=8),
    "cumulative-mass, min blocks": CumulativeMass(block_m=64, block_n=16, min_blocks=3, last_tiles=1),
}


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return make_model(), make_tokenizer()


def make_qkv(length: int = 450) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.randn(1, length, 4, 16) * 1.5, torch.randn(1, length, 2, 16) * 1.5
    k[:, 64:96] *= 2.0
    return q, k, torch.randn(1, length, 2, 16)


def brute_force(
    policy: ScoredPolicy,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    tail: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lost mass, that of the worst tiles, and density of one selection, token by token: [heads] each."""
    mask = select_for(q, k, policy, softmax_scale=scale, softcap=softcap)
    assert isinstance(mask, bsfa.BlockMask)
    kept = mask.to_bool()[0].repeat_interleave(q.shape[2] // mask.num_heads, dim=0)  # heads, tiles, blocks
    n, heads = q.shape[1], q.shape[2]
    logits = torch.einsum("qhd,khd->hqk", q[0].double(), k[0].double().repeat_interleave(heads // 2, 1)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    token = torch.arange(n)
    seen = token[None, :] <= token[:, None]
    p = torch.where(seen, (logits - lse[0].double()[:, :, None]).exp(), 0.0)
    tokens = kept[:, token // policy.block_m][:, :, token // policy.block_n]
    lost = (p * ~tokens).sum(2)
    tiles = torch.stack([rows.mean(1) for rows in lost.split(policy.block_m, dim=1)])
    worst = tiles.sort(0, descending=True).values[: math.ceil(tail * len(tiles))].mean(0)
    visible = torch.zeros(kept.shape[1:], dtype=torch.bool)
    visible[(token // policy.block_m)[:, None].expand(n, n)[seen], (token // policy.block_n).expand(n, n)[seen]] = True
    return lost.mean(1), worst, kept.sum((1, 2)) / visible.sum()


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("name", POLICIES)
def test_curves_are_brute_force_selection(name: str, softcap: float) -> None:
    policy, scale = POLICIES[name], 0.3
    q, k, v = make_qkv()
    _, lse = bsfa.attention(q, k, v, softmax_scale=scale, softcap=softcap, return_lse=True)  # type: ignore[misc]
    grid = threshold_grid(policy)
    curves = block_curves(policy, grid, q, k, lse, softmax_scale=scale, softcap=softcap, tail=0.3)
    lost, tail, density = curves.lost, curves.tail_lost, curves.density
    assert lost.shape == tail.shape == density.shape == (4, len(grid))
    assert bool((tail.diff(dim=-1) >= 0).all()) and bool((tail >= lost - 1e-6).all())
    assert bool((lost.diff(dim=-1) >= 0).all()) and bool((density.diff(dim=-1) <= 0).all())
    assert float(lost[:, 0].max()) == 0.0 and float(density[:, 0].min()) == 1.0
    assert float(density[:, -1].max()) < 0.6  # the grid reaches sparse masks
    for g in [0, 1, *range(2, len(grid), 9), len(grid) - 1]:
        chosen = policy.with_threshold(float(grid[g]))
        want_lost, want_tail, want_density = brute_force(chosen, q, k, lse, scale, softcap, tail=0.3)
        torch.testing.assert_close(density[:, g], want_density.float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(lost[:, g].double(), want_lost, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(tail[:, g].double(), want_tail, rtol=1e-4, atol=2e-6)


def test_curves_do_not_depend_on_the_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv()
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy = POLICIES["relative-max"]
    whole = block_curves(policy, threshold_grid(policy), q, k, lse)
    monkeypatch.setattr("bsfa.calibration.curves.CHUNK", 1)
    rows = block_curves(policy, threshold_grid(policy), q, k, lse)
    for name in ("lost", "tail_lost", "density"):
        assert torch.equal(getattr(whole, name), getattr(rows, name))


@pytest.mark.parametrize("kind", [RelativeMax, CumulativeMass, Antidiagonal])
def test_grid(kind: type[ScoredPolicy]) -> None:
    policy = kind()
    grid = threshold_grid(policy)
    assert float(grid[0]) == policy.keep_all_threshold() and len(grid) > 80
    step = grid[1:].diff()
    assert bool((step > 0).all()) if policy.keeps_at_least else bool((step < 0).all())
    assert float(grid[0]) not in grid[1:].tolist()
    assert float(grid[-1]) == (1.0 if policy.keeps_at_least else 0.0)


def test_model_pass(lm: tuple[Any, Any]) -> None:
    """The curves of a prompt are those of the calls that the model makes."""
    model, tokenizer = lm
    policy, prompts = POLICIES["relative-max"], make_prompts(3)
    seen: list[tuple[float, float]] = []
    curves = collect(
        model, tokenizer, prompts, policy, tail=0.2, progress=lambda done, total, _: seen.append((done, total))
    )
    assert curves.lost_mass.shape == curves.tail_lost.shape == curves.density.shape == (3, 2, 4, len(curves.grid))
    assert curves.layers == ("calibrated", "calibrated")
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    ids = torch.tensor([tokenizer(prompts[1].text)["input_ids"]])
    assert curves.tokens[1] == ids.shape[1]

    def check(call: Any) -> None:
        scale = {"softmax_scale": call.softmax_scale, "softcap": call.softcap}
        one: BlockCurves = block_curves(policy, curves.grid, call.q, call.k, call.lse, tail=0.2, **scale)
        torch.testing.assert_close(one.lost, curves.lost_mass[1, call.layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.tail_lost, curves.tail_lost[1, call.layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.density, curves.density[1, call.layer], rtol=0, atol=2e-3)

    with torch.no_grad(), observe(model, check):
        model(ids)


def test_one_pass_serves_many_targets_and_meets_them(lm: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = lm
    curves = collect(model, tokenizer, make_prompts(40, words=60), POLICIES["relative-max"])
    tables = {target: choose(curves, target) for target in (0.8, 0.9, 0.95)}
    densities = [float(t.density.mean()) for t in tables.values()]
    assert densities == sorted(densities) and densities[0] < densities[-1] < 1.0
    for target, table in tables.items():
        assert float(table.tail_recall.mean()) >= target
        assert bool((table.tail_recall <= table.recall + 1e-6).all())
        assert bool((table.recall_worst <= table.recall).all())
        assert sum(table.length_prompts) == 20 == table.calibration["held_out_prompts"]
        assert table.calibration["largest_bound"] <= 1 - target + 1e-12
        policy = table.layer(1)
        assert policy is not None and policy.threshold.tolist() == table.thresholds[1].tolist()  # type: ignore[union-attr]
    again = choose(collect(model, tokenizer, make_prompts(40, words=60), POLICIES["relative-max"]), 0.9)
    tables[0.9].save(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert not torch.equal(choose(curves, 0.9, seed=1).recall, again.recall)


def synthetic(prompts: int, layers: tuple[str, ...] = ("calibrated", "calibrated")) -> CalibrationCurves:
    """Curves of a made-up policy run: loss grows with the grid index, differently per prompt and head."""
    policy = RelativeMax()
    grid = threshold_grid(policy)
    weight = torch.rand(prompts, len(layers), 3, 1, generator=torch.Generator().manual_seed(3))
    ramp = torch.linspace(0, 1, len(grid)) ** 2
    return CalibrationCurves(
        policy=policy,
        grid=grid,
        lost_mass=weight * ramp / 2,
        tail_lost=weight * ramp,
        tail=0.1,
        density=(1 - 0.9 * ramp).expand(prompts, len(layers), 3, -1),
        layers=layers,
        tokens=tuple(1000 + 900 * (i % 2) for i in range(prompts)),
        prompts_sha256="0" * 64,
        model=bsfa.identity.ModelIdentity("made up"),
        attention={"softmax_scale": [0.1] * len(layers), "softcap": [0.0] * len(layers), "dtype": "float32"},
    )


def test_choice_by_hand() -> None:
    curves = synthetic(41)
    table = choose(curves, 0.9, seed=5)
    held_in, held_out = split_prompts(41, 5)
    assert len(held_in) == 21 and len(held_out) == 20
    assert sorted([*held_in.tolist(), *held_out.tolist()]) == list(range(41))
    for layer in range(2):
        for head in range(3):
            risk = curves.tail_lost[held_in, layer, head].double()
            mean, short = risk.mean(0), risk[held_in % 2 == 0].mean(0)
            long = risk[held_in % 2 == 1].mean(0)
            g = max(
                g
                for g in range(len(curves.grid))
                if (21 * float(mean[g]) + 1) / 22 <= 0.1 and float(short[g]) <= 0.1 and float(long[g]) <= 0.1
            )
            assert float(table.thresholds[layer, head]) == float(curves.grid[g])
            recall = 1 - curves.lost_mass[held_out, layer, head, g].double()
            assert float(table.recall[layer, head]) == pytest.approx(float(recall.mean()), abs=1e-6)
            assert float(table.recall_worst[layer, head]) == pytest.approx(float(recall.min()), abs=1e-6)
            assert float(table.recall_spread[layer, head]) == pytest.approx(float(recall.std(correction=0)), abs=1e-6)
    assert table.lengths == (1024, 2048)


def test_choice_with_confidence_by_hand() -> None:
    """The loosest threshold before the first whose p-value is above 1 - c, and at which every length keeps the mean."""
    curves = synthetic(61)
    table, expected = choose(curves, 0.9, confidence=0.8, seed=5), choose(curves, 0.9, seed=5)
    held_in, _ = split_prompts(61, 5)
    for layer in range(2):
        for head in range(3):
            risk = curves.tail_lost[held_in, layer, head].double()
            mean = risk.mean(0)
            lengths = [risk[held_in % 2 == parity].mean(0) for parity in (0, 1)]
            shown = (p_value(mean, 31, 1 - 0.9) <= 1 - 0.8).tolist()
            g = max(
                g for g in range(len(curves.grid)) if all(shown[: g + 1]) and all(float(x[g]) <= 0.1 for x in lengths)
            )
            assert float(table.thresholds[layer, head]) == float(curves.grid[g])
    assert bool((table.thresholds <= expected.thresholds).all()) and not torch.equal(
        table.thresholds, expected.thresholds
    )
    facts, plain = table.calibration, expected.calibration
    assert (facts["confidence"], plain["confidence"]) == (0.8, None)
    assert "Hoeffding" in facts["method"] and plain["method"] == "conformal risk control"
    assert "0.8 of all draws" in facts["promise"] and plain["promise"].endswith("in expectation")
    assert (facts["least_prompts"], plain["least_prompts"]) == (16, 9)
    assert facts["largest_bound"] <= 0.1 + 1e-9 and plain["largest_bound"] <= 0.1 + 1e-9


def test_what_held_out_prompts_say_by_hand() -> None:
    curves = synthetic(41, ("calibrated", "dense: sliding-window attention", "calibrated"))
    curves.lost_mass[:, 1] = curves.tail_lost[:, 1] = 0.0
    table = choose(curves, 0.9)
    _, held_out = split_prompts(41, 0)
    index = (table.thresholds[..., None] == curves.grid).int().argmax(-1)[[0, 2]]
    said = table.calibration["held_out"]
    for name, lost in (("recall", curves.lost_mass), ("tail_recall", curves.tail_lost)):
        at = index.expand(20, -1, -1)[..., None]
        kept = 1 - lost[held_out][:, [0, 2]].double().gather(-1, at)[..., 0]  # prompts, layers, heads
        prompts = kept.mean((1, 2))
        assert said[name]["mean"] == pytest.approx(float(prompts.mean()))
        assert said[name]["sd"] == pytest.approx(float(prompts.std(correction=0)))
        assert said[name]["worst"] == pytest.approx(float(prompts.min()))
        met = int((kept.mean(0) >= 0.9).sum())
        assert said["pairs_that_meet_target"][name] == said["sparse_pairs_that_meet_target"][name] == met
    assert said["pairs"] == said["sparse_pairs"] == 6
    assert said["pairs_that_meet_target"]["recall"] == 6  # lost mass is half of what the worst tiles lose
    few = choose(curves, 0.9, confidence=0.7).calibration["held_out"]
    assert few["tail_recall"]["mean"] > said["tail_recall"]["mean"]


def test_the_statement_of_a_file(tmp_path: Path) -> None:
    """From the file's facts; for a file that was written before there were any, from its tensors."""
    table = choose(synthetic(41), 0.9)
    lines = dict(statement(table))
    assert lines["target recall"] == "0.9 (conformal risk control)" and lines["confidence"] == "in expectation"
    assert lines["about"] == "the worst 10% of a prompt's query tiles" and lines["prompts"].startswith(
        "21 chose, 20 ch"
    )
    assert lines["heads on target"].startswith(
        f"{table.calibration['held_out']['pairs_that_meet_target']['tail_recall']} of 6"
    )
    assert not doubts(table)

    old = {k: v for k, v in table.calibration.items() if k not in ("confidence", "held_out")}
    replace(table, calibration=old).save(tmp_path / "old.safetensors")
    read = bsfa.ThresholdTable.load(tmp_path / "old.safetensors")
    before = dict(statement(read))
    assert before.keys() == lines.keys() and before["confidence"] == "in expectation"
    for name in ("target recall", "prompts", "heads on target", "sparse heads on target", "prompts needed"):
        assert before[name] == lines[name]
    assert f"mean {float(table.recall.mean()):.4f}" in before["held out, all tiles"]
    assert f"worst prompt {float(table.recall_worst.min()):.4f}" in before["held out, all tiles"]
    few = replace(read, calibration={**old, "calibration_prompts": 8})
    assert ["needs at least 9" in text for text in doubts(few)] == [True]
    sure = replace(read, calibration={**old, "confidence": 0.9})
    assert ["0.9 at confidence 0.9 needs at least 22" in text for text in doubts(sure)] == [True]
    elsewhere = replace(read, calibration={k: v for k, v in old.items() if k == "tail"})
    assert not doubts(elsewhere) and "target recall" not in dict(statement(elsewhere))


def test_too_few_prompts_for_the_confidence() -> None:
    with pytest.warns(CalibrationWarning, match=r"0.95 at confidence 0.9 needs at least 45 .* 89 prompts"):
        table = choose(synthetic(60), 0.95, confidence=0.9)
    assert bool(table.dense_heads().all())
    assert table.calibration["held_out"]["sparse_pairs"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bool(choose(synthetic(121), 0.9, confidence=0.9).dense_heads().all())
    with pytest.raises(ValueError, match="confidence"):
        choose(synthetic(20), 0.9, confidence=1.0)


def test_too_few_prompts_stay_dense_and_say_so() -> None:
    with pytest.warns(CalibrationWarning, match=r"0.95 needs at least 19 .* 37 prompts"):
        table = choose(synthetic(20), 0.95)
    assert bool(table.dense_heads().all()) and table.layer(0) is None
    assert float(table.recall.min()) == float(table.density.min()) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(synthetic(38), 0.95)
        choose(synthetic(37), 0.95)


def test_every_length_keeps_the_target() -> None:
    """Short prompts that lose nothing do not pay for long ones."""
    curves = synthetic(60)
    long = torch.tensor([n > 1000 for n in curves.tokens])
    curves.lost_mass[~long] = curves.tail_lost[~long] = 0.0
    table = choose(curves, 0.9)
    index = (table.thresholds[..., None] == curves.grid).int().argmax(-1)
    held_in, _ = split_prompts(60, 0)
    at = index[None, ..., None].expand(60, -1, -1, 1)
    risk = curves.tail_lost.gather(-1, at)[held_in[long[held_in]]].double().mean(0)
    assert float(risk.max()) <= 0.1 and float(risk.min()) > 0.08  # kept, and not by more than the grid's step


def test_a_length_that_falls_short_is_named() -> None:
    """Held-out long prompts that are worse than those that chose."""
    curves = synthetic(60)
    _, held_out = split_prompts(60, 0)
    worse = held_out[torch.tensor([curves.tokens[i] > 1000 for i in held_out.tolist()])]
    curves.lost_mass[worse] = 0.5
    with pytest.warns(CalibrationWarning, match=r"of 2K tokens keep 0\.5.* less than 0.9: .* more prompts"):
        choose(curves, 0.9)


def test_dense_layers_stay_dense() -> None:
    table = choose(synthetic(60, ("dense: sliding-window attention", "calibrated")), 0.9)
    assert table.layer(0) is None and table.layer(1) is not None
    assert float(table.density[0].min()) == 1.0 or bool((table.thresholds[0] == 0).all())


@pytest.mark.parametrize("name", ["relative-max, shared", "antidiagonal", "cumulative-mass, flat64"])
def test_other_rules_pass_through_model_choice_and_file(name: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = lm
    policy = POLICIES[name]
    curves = collect(model, tokenizer, make_prompts(6), policy)
    shared = policy.scoring.sharing == "group"
    assert curves.group == (2 if shared else 1)
    table = choose(curves, 0.6)
    assert bool((table.thresholds != policy.keep_all_threshold()).any())
    table.save(tmp_path / "t.safetensors")
    back = bsfa.ThresholdTable.load(tmp_path / "t.safetensors")
    assert torch.equal(back.thresholds, table.thresholds)
    layer = next(found for found in map(back.layer, range(back.num_layers)) if found is not None)
    assert type(layer) is type(policy) and layer.scoring == policy.scoring
    q, k = torch.randn(1, 300, table.num_heads, 16), torch.randn(1, 300, table.num_heads // 2, 16)
    assert bsfa.attention(q, k, k, policy=layer).shape == q.shape  # type: ignore[union-attr]
    if shared:
        groups = table.thresholds.unflatten(-1, (-1, 2))
        assert torch.equal(groups[..., 0], groups[..., 1])


def test_shared_heads_take_the_strictest() -> None:
    curves = synthetic(41)  # three heads
    alone = choose(curves, 0.9)
    model = replace(curves.model, fields={"num_key_value_heads": 1})
    table = choose(replace(curves, group=3, model=model, policy=RelativeMax(shared=True)), 0.9)
    assert torch.equal(table.thresholds, alone.thresholds.amin(-1, keepdim=True).expand(-1, 3))
    assert not torch.equal(table.thresholds, alone.thresholds)
    layer = table.layer(0)
    assert layer is not None and torch.equal(layer.alpha, table.thresholds[0, :1])  # type: ignore[attr-defined]


def test_a_union_of_masks_is_refused(lm: tuple[Any, Any]) -> None:
    with pytest.raises(bsfa.UnsupportedError, match="shared=False"):
        collect(*lm, make_prompts(4), CumulativeMass(shared=True))


def test_sliding_window_layers(lm: tuple[Any, Any]) -> None:
    curves = collect(make_mixed_model(), lm[1], make_prompts(2), POLICIES["relative-max"])
    assert curves.layers == ("dense: sliding-window attention", "calibrated")
    assert float(curves.lost_mass[:, 0].max()) == 0.0 and float(curves.density[:, 0].min()) == 1.0


def test_refusals(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    with pytest.raises(ValueError, match="two prompts"):
        collect(model, tokenizer, make_prompts(1), RelativeMax())
    with pytest.raises(TypeError, match="score"):
        collect(model, tokenizer, make_prompts(2), bsfa.policies.Dense())  # type: ignore[arg-type]
    q, k, v = make_qkv(64)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    with pytest.raises(ValueError, match="whole prompt"):
        block_curves(RelativeMax(), threshold_grid(RelativeMax()), q[:, 32:], k, lse[:, :, 32:].contiguous())
