"""Calibrating ExactSkip: curves against attention itself and the oracle, references, choice, and imported files."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import bsfa
import oracle_skip
from bsfa.calibration import (
    CalibrationCurves,
    CalibrationWarning,
    SkipCurves,
    block_curves,
    calibrate_kth,
    choose,
    choose_skip,
    collect_skip,
    split_prompts,
    threshold_grid,
)
from bsfa.calibration.choose import split_spent
from bsfa.calibration.exact_skip import (
    LOG_KNOTS,
    SLOPES,
    SlopeCollector,
    half_octaves,
    kth_levels,
    log_reference,
    lse_means,
    mean_levels,
    mean_lse,
    thinned,
)
from bsfa.cli import app
from bsfa.integrations.transformers import observe
from bsfa.policies import ExactSkip, RelativeMax
from bsfa.prompts import Prompt, length_bucket, parse_prompt
from tiny_model import WORDS, make_mixed_model, make_model, make_prompts, make_tokenizer, write_rows

SCALE = 0.3


def make_qkv(length: int = 700) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.randn(1, length, 4, 16) * 1.5, torch.randn(1, length, 2, 16) * 1.5
    k *= (torch.rand(-(-length // 32)) * 1.5 + 0.02).repeat_interleave(32)[:length, None, None]  # low and high blocks
    k[:, 128:384] *= 0.02
    return q, k, torch.randn(1, length, 2, 16)


def reference(form: str, heads: int = 4) -> dict[str, Any]:
    nats = -torch.rand(heads, 3) * 2.0 if form == "relative" else torch.rand(heads, 3) * 3.0 + 4.0
    return {"form": form, "reference": nats, "positions": (60, 200, 500)}


CURVES: dict[str, tuple[dict[str, Any], bool]] = {
    "relative": ({"form": "relative"}, True),
    "relative, reference": (reference("relative"), True),
    "relative, not causal": ({"form": "relative", "window_blocks": 2}, False),
    "absolute": (reference("absolute"), True),
    "absolute, small blocks": ({**reference("absolute"), "block_n": 32, "sink_blocks": 0, "window_blocks": 2}, True),
    "absolute, large tiles": ({**reference("absolute"), "block_m": 192, "block_n": 64, "sink_blocks": 2}, True),
    "absolute, nothing skipped at first": (
        {**reference("absolute"), "reference": torch.tensor([[-torch.inf, 5.0, 6.0]])},
        True,
    ),
    "absolute, one reference": ({**reference("absolute", 1), "block_m": 64, "block_n": 64}, True),
    "relative, large blocks": ({**reference("relative"), "block_m": 64, "sink_blocks": 0}, True),
}


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("name", CURVES)
def test_curves_are_what_attention_skips(name: str, softcap: float) -> None:
    fields, causal = CURVES[name]
    policy = ExactSkip(**fields)
    q, k, v = make_qkv()
    maths: dict[str, Any] = {"softmax_scale": SCALE, "softcap": softcap, "causal": causal}
    _, lse = bsfa.attention(q, k, v, return_lse=True, **maths)
    grid = threshold_grid(policy)
    curves = block_curves(policy, grid, q, k, lse, tail=0.3, **maths)
    lost, tail, density = curves.lost, curves.tail_lost, curves.density
    assert lost.shape == tail.shape == density.shape == (4, len(grid))
    assert bool((tail.diff(dim=-1) >= 0).all()) and bool((tail >= lost - 1e-6).all())
    assert bool((lost.diff(dim=-1) >= 0).all()) and bool((density.diff(dim=-1) <= 0).all())
    assert float(lost[:, 0].max()) == 0.0 and float(density[:, 0].min()) == 1.0
    assert float(density.min()) < 0.9
    dense = oracle_skip.attention(
        *(x[0].double().numpy() for x in (q, k, v)),
        scale=SCALE,
        softcap=softcap,
        causal=causal,
        thresholds=torch.full((4, 1), -torch.inf).numpy(),
        form=policy.form,
    )
    for g in [0, 1, *range(40, len(grid), 9), len(grid) - 1]:
        chosen = policy.with_threshold(float(grid[g]))
        _, info = bsfa.attention(q, k, v, policy=chosen, return_info=True, **maths)
        kept = torch.ones(4, dtype=torch.float64)
        if info.skips is not None:
            kept -= info.skips[:, 1].double() / info.skips[:, 0].double()
        torch.testing.assert_close(density[:, g].double(), kept, rtol=0, atol=1e-7)
        if g % 3:
            continue
        ran = oracle_skip.attention(
            *(x[0].double().numpy() for x in (q, k, v)),
            scale=SCALE,
            softcap=softcap,
            causal=causal,
            thresholds=chosen.cuts(4, -(-700 // policy.block_m), q.device).numpy(),
            form=policy.form,
            block_m=policy.block_m,
            block_n=policy.block_n,
            sink_blocks=policy.sink_blocks,
            window_blocks=policy.window_blocks,
        )
        rows = torch.from_numpy((dense.weights * ~ran.entered).sum(-1))
        groups = torch.stack([part.mean(1) for part in rows.split(64, dim=1)])
        worst = groups.sort(0, descending=True).values[: math.ceil(0.3 * len(groups))].mean(0)
        torch.testing.assert_close(lost[:, g].double(), rows.mean(1), rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(tail[:, g].double(), worst, rtol=1e-4, atol=2e-6)


def test_curves_do_not_depend_on_the_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv(500)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy = ExactSkip(**reference("absolute"))
    whole = block_curves(policy, threshold_grid(policy), q, k, lse)
    monkeypatch.setattr("bsfa.calibration.curves.CHUNK", 1)
    rows = block_curves(policy, threshold_grid(policy), q, k, lse)
    for name in ("lost", "tail_lost", "density"):
        assert torch.equal(getattr(whole, name), getattr(rows, name))


def test_a_logit_that_is_no_number_is_never_skipped() -> None:
    q, k, v = make_qkv(500)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy = ExactSkip.absolute(50.0)
    grid = threshold_grid(policy)
    assert float(block_curves(policy, grid, q, k, lse).density[0, -1]) < 0.9
    q[0, 400:, :] = torch.nan
    with_nan = block_curves(policy, grid, q, k, lse.nan_to_num()).density[:, -1]
    _, info = bsfa.attention(q, k, v, policy=policy.with_threshold(1.0), return_info=True)  # type: ignore[misc]
    assert info.skips is not None
    torch.testing.assert_close(with_nan, 1 - info.skips[:, 1] / info.skips[:, 0], rtol=0, atol=1e-6)


REFUSED = {
    "within": (ExactSkip(within=RelativeMax()), "within another policy"),
    "half groups": (ExactSkip(block_m=96), "multiple of 64"),
    "order of visits": (ExactSkip(block_m=128, block_n=64), "order of visits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_curves_cannot_say(case: str) -> None:
    q, k, v = make_qkv(200)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy, message = REFUSED[case]
    with pytest.raises(bsfa.UnsupportedError, match=message):
        block_curves(policy, threshold_grid(policy), q, k, lse)
    above = ExactSkip(reference=torch.ones(4, 1), positions=(0,))
    with pytest.raises(ValueError, match="running maximum"):
        block_curves(above, threshold_grid(above), q, k, lse)


# ---- references ------------------------------------------------------------------------------------------------------


def test_knots_bound_the_interpolation() -> None:
    assert LOG_KNOTS[0] == 1024 and LOG_KNOTS[-1] == 1 << 20 and len(LOG_KNOTS) == 21
    assert half_octaves(128, 100) == (128,) and half_octaves(128, 256) == (128, 181, 256)
    policy = ExactSkip(ratio=1.0, reference=log_reference(torch.tensor([1.5])), positions=LOG_KNOTS)
    tiles = torch.cat((torch.arange(9000), torch.tensor([10000])))
    cuts = policy.cuts(1, 10001, torch.device("cpu"))[0, tiles].double()
    exact = -1.5 * (tiles * 128 / 1024.0).clamp(1.0, 1024.0).log()
    assert float((cuts - exact).abs().max()) < 1.5 * 0.016
    assert float(cuts[0]) == 0.0 and not math.copysign(1.0, float(log_reference(torch.zeros(1))[0, 0])) < 0


def test_mean_lse_near_each_knot() -> None:
    lse = torch.randn(3, 500, generator=torch.Generator().manual_seed(4))
    knots = half_octaves(128, 500)
    nearest = (torch.arange(500).clamp(min=1).log()[:, None] - torch.tensor(knots).log()).abs().argmin(-1)
    means = lse_means(lse, knots)
    for i in range(len(knots)):
        torch.testing.assert_close(means[:, i], lse[:, nearest == i].mean(-1), rtol=0, atol=2e-6)
    assert lse_means(lse[:, :10], knots)[:, 1:].abs().max() == 0.0
    with pytest.raises(bsfa.UnsupportedError, match="not finite"):
        lse_means(torch.full((1, 4), torch.nan), knots)
    long, short = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    mean, used = mean_lse([long, short], [500, 200], knots)
    assert used == knots and mean[0, 0].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert mean_lse([long, short], [200, 200], knots)[1] == knots[:2]


def test_kth_levels_by_hand() -> None:
    maxima, candidates = torch.randn(6, 2, 9), torch.zeros(6, 9, dtype=torch.bool)
    for tile in range(6):
        candidates[tile, 1 : tile + 2] = True
    levels = kth_levels(maxima, candidates, 3)
    for tile in range(6):
        for head in range(2):
            best = sorted(maxima[tile, head, 1 : tile + 2].tolist(), reverse=True)
            want = (best[2] + best[3]) / 2 if len(best) > 3 else -math.inf
            assert float(levels[head, tile]) == pytest.approx(want)
    assert bool((kth_levels(maxima, candidates, 20) == -math.inf).all())
    maxima[5, 0, 1] = torch.inf
    with pytest.raises(bsfa.UnsupportedError, match="not finite"):
        kth_levels(maxima, candidates, 3)


def test_mean_levels_and_their_knots() -> None:
    long = torch.full((1, 2, 5), -math.inf)
    long[:, :, 2:] = torch.tensor([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    short = torch.full((1, 2, 5), math.nan)
    short[:, :, :2], short[:, :, 2] = -math.inf, 1.0
    mean, positions = mean_levels([long, short], 128)
    assert positions == (128, 256, 384, 512)
    assert mean[0].tolist() == [[-math.inf, 2.0, 4.0, 5.0], [-math.inf, 3.5, 7.0, 8.0]]
    nothing, positions = mean_levels([torch.full((1, 2, 5), -math.inf)], 128)
    assert positions == (0,) and bool((nothing == -math.inf).all())
    for first, count in ((0, 1), (0, 64), (5, 68), (5, 69), (33, 1024), (0, 1024), (1000, 1024), (900, 1024)):
        knots = thinned(first, count)
        assert len(knots) <= 64 and knots == sorted(set(knots)) and knots[-1] == count - 1
        assert set(knots[:2]) >= {first} and (first == 0 or knots[0] == first - 1)
        assert len(knots) == 64 or knots[-(count - first) :] == list(range(first, count))


# ---- with a model ----------------------------------------------------------------------------------------------------

RELATIVE = ExactSkip(form="relative", block_m=64, block_n=64)
ABSOLUTE = ExactSkip(form="absolute", block_m=64, block_n=64)


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return make_model(), make_tokenizer()


def runs(count: int, words: int = 500, seed: int = 3) -> list[Prompt]:
    """Prompts of words that are repeated: what one of them does not care for, its neighbours do not either."""
    rng = random.Random(seed)
    texts = (" ".join(" ".join([rng.choice(WORDS)] * 60) for _ in range(words // 60 + i % 3)) for i in range(count))
    return [parse_prompt({"text": text}) for text in texts]


@pytest.fixture(scope="module")
def curves(lm: tuple[Any, Any]) -> dict[str, SkipCurves]:
    return {p.form: collect_skip(*lm, runs(30), p, max_length=800) for p in (RELATIVE, ABSOLUTE)}


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_target_recall(form: str, lm: tuple[Any, Any], curves: dict[str, SkipCurves], tmp_path: Path) -> None:
    densities = []
    for target in (0.5, 0.8):
        table = choose_skip(curves[form], target)
        assert float(table.tail_recall.mean()) >= target and table.calibration["largest_bound"] <= 1 - target + 1e-12
        densities.append(float(table.density.mean()))
        assert table.calibration["calibration_prompts"] == 12 and table.calibration["held_out_prompts"] == 15
        assert len(table.calibration["reference_prompts"]) == 3
    assert densities[0] < densities[1] < 1.0
    table.save(tmp_path / "t.safetensors")
    back = bsfa.ThresholdTable.load(tmp_path / "t.safetensors")
    assert back.metadata() == table.metadata() and back.metadata()["format_version"] == 2
    policy = back.layer(0)
    assert isinstance(policy, ExactSkip) and policy.form == form and policy.reference is not None
    assert policy.positions == back.positions and bool(policy.reference.isfinite().all())
    # A held-out prompt through the model: its density is that of the table's curves.
    ids = torch.tensor([lm[1](runs(30)[1].text)["input_ids"][:800]])
    grid = curves[form].candidates[0].grid
    seen: dict[int, float] = {}

    def check(call: Any) -> None:
        layer = back.layer(call.layer)
        if layer is None:
            return
        maths: dict[str, Any] = {"softmax_scale": call.softmax_scale}
        _, info = bsfa.attention(call.q, call.k, call.v, policy=layer, return_info=True, **maths)
        index = (back.thresholds[call.layer, :, None] == grid).int().argmax(-1)
        one = block_curves(layer, grid, call.q, call.k, call.lse, **maths).density.gather(-1, index[:, None])[:, 0]
        torch.testing.assert_close(one, info.density(per_head=True))
        seen[call.layer] = float(info.density())

    with torch.no_grad(), observe(lm[0], check):
        lm[0](ids)
    assert seen and min(seen.values()) < 1.0


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_model_pass(form: str, lm: tuple[Any, Any], curves: dict[str, SkipCurves]) -> None:
    """The curves of a prompt are those of the calls that the model makes, under every candidate."""
    ids = torch.tensor([lm[1](runs(30)[7].text)["input_ids"][:800]])

    def check(call: Any) -> None:
        for i, found in enumerate(curves[form].candidates):
            if form == "relative":
                nats, positions = log_reference(torch.full((4,), SLOPES[i])), LOG_KNOTS
            else:
                assert found.reference is not None
                nats, positions = found.reference[call.layer], found.positions
            policy = ExactSkip(form=form, block_m=64, block_n=64, reference=nats, positions=positions)
            one = block_curves(policy, found.grid, call.q, call.k, call.lse, softmax_scale=call.softmax_scale, tail=0.1)
            torch.testing.assert_close(one.lost, found.lost_mass[7, call.layer], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(one.tail_lost, found.tail_lost[7, call.layer], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(one.density, found.density[7, call.layer], rtol=0, atol=2e-3)

    with torch.no_grad(), observe(lm[0], check):
        lm[0](ids)


def test_slopes_of_one_look_at_the_logits() -> None:
    """Beyond the origin the candidates differ, and each is the ExactSkip with that reference."""
    q, k, v = make_qkv(2600)
    _, lse = bsfa.attention(q, k, v, return_lse=True)  # type: ignore[misc]
    policy = ExactSkip(form="relative")
    grid = threshold_grid(policy)
    collector = SlopeCollector(policy, 1, grid, 0.1)
    found = collector.reduce(
        SimpleNamespace(layer=0, q=q, k=k, lse=lse, causal=True, softmax_scale=0.25, softcap=0.0)  # type: ignore[arg-type]
    )
    assert found.lost.shape == (4, len(SLOPES), len(grid))
    for i, slope in enumerate(SLOPES):
        reference = log_reference(torch.full((4,), slope))
        one = block_curves(replace(policy, reference=reference, positions=LOG_KNOTS), grid, q, k, lse, tail=0.1)
        for name in ("lost", "tail_lost", "density"):
            assert torch.equal(getattr(one, name), getattr(found, name)[:, i])
    assert bool((found.density[:, 0] < found.density[:, 3]).any())


def test_the_split_has_three_parts(curves: dict[str, SkipCurves]) -> None:
    spent, held_in, held_out = split_spent(30, 0)
    assert sorted([*spent.tolist(), *held_in.tolist(), *held_out.tolist()]) == list(range(30))
    assert torch.equal(held_out, split_prompts(30, 0)[1]) and len(spent) == 3
    with pytest.raises(ValueError, match="of seed 1: use theirs"):
        choose(curves["absolute"].candidates[0], 0.5, seed=1)


def test_slopes_are_those_of_the_lowest_density(curves: dict[str, SkipCurves]) -> None:
    """Each head by hand: density that the reference prompts need, for every candidate."""
    found, target = curves["relative"], 0.6
    table = choose_skip(found, target)
    spent = list(found.candidates[0].spent)
    tokens = found.candidates[0].tokens
    lengths = {length_bucket(tokens[i]) for i in spent}
    for layer in range(2):
        for head in range(4):
            densities = []
            for one in found.candidates:
                groups = [spent, *([i for i in spent if length_bucket(tokens[i]) == n] for n in lengths)]
                ok = [one.tail_lost[g, layer, head].double().mean(0) <= 1 - target for g in groups]
                index = int(torch.stack(ok).all(0).nonzero().max())
                densities.append(float(one.density[spent, layer, head, index].double().mean()))
            slope = table.calibration["slopes"][layer][head]
            assert slope == found.slopes[densities.index(min(densities))]
            assert table.reference is not None
            torch.testing.assert_close(table.reference[layer, head], log_reference(torch.tensor(slope)))


def test_slopes_of_made_up_curves() -> None:
    """One head needs the slope 1, another none."""
    policy = ExactSkip(form="relative")
    grid = threshold_grid(policy)
    ramp = torch.linspace(0, 1, len(grid))

    def curve(needs: float) -> CalibrationCurves:
        cost = torch.stack([1 + abs(needs - s) for s in (torch.tensor(1.0), torch.tensor(0.0))])
        lost = (ramp * cost[:, None]).clamp(max=1.0).expand(40, 1, 2, -1).contiguous()
        return CalibrationCurves(
            policy=policy, grid=grid, lost_mass=lost / 2, tail_lost=lost, tail=0.1,
            density=(1 - ramp).expand(40, 1, 2, -1).contiguous(), layers=("calibrated",), tokens=(1000,) * 40,
            prompts_sha256="0" * 64, model=bsfa.identity.ModelIdentity("made up"),
            attention={"softmax_scale": [0.1], "softcap": [0.0], "dtype": "float32"},
            spent=tuple(split_spent(40, 0)[0].tolist()),
        )  # fmt: skip

    found = SkipCurves(candidates=tuple(curve(s) for s in SLOPES), slopes=SLOPES, seed=0)
    table = choose_skip(found, 0.8)
    assert table.calibration["slopes"] == [[1.0, 0.0]]
    want = [float(grid[1:][(ramp[1:] <= 0.2)][-1])] * 2
    assert table.thresholds[0].tolist() <= want and float(table.density.max()) < 0.9


def test_too_few_prompts(curves: dict[str, SkipCurves]) -> None:
    with pytest.warns(CalibrationWarning, match=r"12 calibration prompts .* at least 19 \(that is 49 prompts.* eighth"):
        table = choose_skip(curves["absolute"], 0.95)
    assert bool(table.dense_heads().all()) and table.layer(0) is None
    assert len(split_spent(49, 0)[1]) == 19 and len(split_spent(48, 0)[1]) == 18


def test_same_prompts_same_bytes_also_after_a_kill(lm: tuple[Any, Any], tmp_path: Path) -> None:
    prompts = make_prompts(6, words=200)

    class Killed(Exception):
        pass

    for policy in (RELATIVE, ABSOLUTE):
        choose_skip(collect_skip(*lm, prompts, policy), 0.5).save(tmp_path / "whole")
        for count in (1, 2, 2):
            seen: list[float] = []

            def stop(done: float, total: float, now: str, seen: list[float] = seen, count: int = count) -> None:
                seen.append(done / total)
                if len(seen) > count:
                    raise Killed

            with pytest.raises(Killed):  # each time after as many prompts more
                collect_skip(*lm, prompts, policy, resume=tmp_path / policy.form, progress=stop)
        seen = []

        def watch(done: float, total: float, now: str, seen: list[float] = seen) -> None:
            seen.append(done / total)

        again = collect_skip(*lm, prompts, policy, resume=tmp_path / policy.form, progress=watch)
        assert seen[0] > 0.0 and seen[-1] == pytest.approx(1.0) and seen == sorted(seen)
        choose_skip(again, 0.5).save(tmp_path / "resumed")
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_kth(lm: tuple[Any, Any], tmp_path: Path) -> None:
    prompts = make_prompts(8, words=400)
    sparse = calibrate_kth(*lm, prompts, ABSOLUTE, 2, max_length=900)
    loose = calibrate_kth(*lm, prompts, ABSOLUTE, 8, max_length=900, resume=tmp_path / "partial")
    assert float(sparse.density.mean()) < float(loose.density.mean()) < 1.0
    assert float(sparse.recall.mean()) < float(loose.recall.mean()) < 1.0
    assert sparse.target_recall is None and "BSFA's k" in sparse.goal and sparse.calibration["k"] == 2
    assert sparse.calibration["calibration_prompts"] == sparse.calibration["held_out_prompts"] == 4
    assert sparse.reference is not None and sparse.positions[0] == 3 * 64  # sink, two candidates, diagonal: nothing yet
    assert bool((sparse.reference[..., 0] == -math.inf).all()) and bool(sparse.reference[..., 1:].isfinite().all())
    loose.save(tmp_path / "t.safetensors")
    back = bsfa.ThresholdTable.load(tmp_path / "t.safetensors")
    assert back.metadata() == loose.metadata() and back.measured and "recall=" in repr(back)
    calibrate_kth(*lm, prompts, ABSOLUTE, 8, max_length=900, resume=tmp_path / "partial").save(tmp_path / "again")
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "again").read_bytes()
    # By hand: one calibration prompt's maxima, through the model's own calls.
    held_in = split_prompts(8, 0)[0].tolist()
    one = calibrate_kth(*lm, [prompts[held_in[0]]] * 2, ABSOLUTE, 2, max_length=900)
    assert one.reference is not None
    ids = torch.tensor([lm[1](prompts[held_in[0]].text)["input_ids"][:900]])

    def check(call: Any) -> None:
        q, k = call.q[0].double(), call.k[0].double().repeat_interleave(2, 1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * call.softmax_scale
        for knot, position in list(enumerate(one.positions))[1::3]:
            own = position // 64
            best = logits[:, position : position + 64, 64 : own * 64].unflatten(-1, (-1, 64)).amax((1, 3))
            top = best.sort(-1, descending=True).values
            torch.testing.assert_close(
                one.reference[call.layer, :, knot], ((top[:, 1] + top[:, 2]) / 2).float(), rtol=1e-5, atol=1e-5
            )

    with torch.no_grad(), observe(lm[0], check):
        lm[0](ids)


def test_sliding_window_layers(lm: tuple[Any, Any]) -> None:
    model, prompts = make_mixed_model(), make_prompts(6, words=200)
    for policy in (RELATIVE, ABSOLUTE):
        table = choose_skip(collect_skip(model, lm[1], prompts, policy), 0.5)
        assert table.layers == ("dense: sliding-window attention", "calibrated") and table.layer(0) is None
        assert table.layer(1) is not None and float(table.density[0].min()) == 1.0
    assert calibrate_kth(model, lm[1], prompts, ABSOLUTE, 1).layer(0) is None


def test_refusals(lm: tuple[Any, Any]) -> None:
    prompts = make_prompts(4)
    with pytest.raises(ValueError, match="three prompts"):
        collect_skip(*lm, prompts[:2], RELATIVE)
    with pytest.raises(TypeError, match="expected an ExactSkip"):
        collect_skip(*lm, prompts, RelativeMax())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without one"):
        collect_skip(*lm, prompts, ExactSkip.absolute(1.0))
    with pytest.raises(bsfa.UnsupportedError, match="order of visits"):
        collect_skip(*lm, prompts, ExactSkip(block_n=64))
    with pytest.raises(ValueError, match="of that form"):
        calibrate_kth(*lm, prompts, RELATIVE, 3)
    with pytest.raises(ValueError, match="at least 1"):
        calibrate_kth(*lm, prompts, ABSOLUTE, 0)
    with pytest.raises(TypeError, match="k must be an int"):
        calibrate_kth(*lm, prompts, ABSOLUTE, 2.0)  # type: ignore[arg-type]


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(lm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    path = tmp_path_factory.mktemp("cli")
    for part in lm:
        part.save_pretrained(path)
    data = write_rows(path / "p.jsonl", [{"text": p.text} for p in runs(10)])
    return ["calibrate", "--model", path, "--data", data, "--block-size", 64, "--max-length", 500, "--device", "cpu"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_calibrate_command(form: str, places: list[object], lm: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "t-{target}.safetensors"
    options = ("--form", "absolute") if form == "absolute" else ()
    result = run(*places, "-o", out, "--policy", "exact-skip", *options, "--target-recall", 0.5, "--target-recall", 0.6)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t-0.5.safetensors", "t-0.6.safetensors"]  # nothing partial
    table = bsfa.ThresholdTable.load(tmp_path / "t-0.5.safetensors", block_m=64, block_n=64)
    bounded = replace(RELATIVE, form=form, bounds=True)  # which changes nothing, and is kept
    direct = choose_skip(collect_skip(*lm, runs(10), bounded, max_length=500), 0.5)
    assert torch.equal(table.thresholds, direct.thresholds) and torch.equal(table.density, direct.density)
    direct.save(tmp_path / "bounded.safetensors")
    assert "bounds=True" in run("inspect", tmp_path / "bounded.safetensors").output
    again = bsfa.ThresholdTable.load(tmp_path / "bounded.safetensors", block_m=64, block_n=64)
    assert again.layer(0).bounds and not table.layer(0).bounds  # type: ignore[union-attr]
    result = run("inspect", tmp_path / "t-0.5.safetensors", "--plot", tmp_path / "heat.png")
    assert result.exit_code == 0, result.output
    for text in ("1 chose the references, 4 chose, 5 checked", f"form={form}", "target recall", "ratio"):
        assert text in result.output
    assert ("slope" in result.output) == (form == "relative")


def test_kth_command(places: list[object], tmp_path: Path) -> None:
    result = run(*places, "-o", tmp_path / "k{target}.safetensors", "--policy", "exact-skip", "--rule", "kth", "--k", 2)
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["k2.safetensors"]
    result = run("inspect", tmp_path / "k2.safetensors", "--plot", tmp_path / "heat.png")
    assert result.exit_code == 0, result.output
    for text in ("2 blocks a query tile besides sinks and window", "5 chose, 5 checked", "recall mean"):
        assert text in result.output


WRONG_OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "form of another": (("--form", "absolute"), "belong to --policy exact-skip"),
    "k of another": (("--k", 3), "belong to --policy exact-skip"),
    "form": (("--policy", "exact-skip", "--form", "both"), "--form both: choose one of absolute, relative"),
    "rule": (("--policy", "exact-skip", "--rule", "best"), "--rule best: choose one of target, kth"),
    "no k": (("--policy", "exact-skip", "--rule", "kth"), "needs --k"),
    "k alone": (("--policy", "exact-skip", "--k", 3), "--k needs --rule kth"),
    "relative kth": (
        ("--policy", "exact-skip", "--rule", "kth", "--k", 3, "--form", "relative"),
        "absolute thresholds",
    ),
    "k and target": (("--policy", "exact-skip", "--rule", "kth", "--k", 3, "--target-recall", 0.9), "has no target"),
    "last tiles": (("--policy", "exact-skip", "--last-tiles", 1), "--last-tiles: exact-skip has no such parameter"),
    "block size": (("--policy", "exact-skip", "--block-size", 32), "multiple of 64"),
    "policy": (("--policy", "best"), "choose one of relative-max, .*exact-skip"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_do_not_fit(case: str, places: list[object], tmp_path: Path) -> None:
    options, message = WRONG_OPTIONS[case]
    result = run(*places, "-o", tmp_path / "t.safetensors", *options)
    assert result.exit_code == 2 and re.search(message, result.output), result.output
    assert list(tmp_path.iterdir()) == []
