"""examples/compare_policies.py with a tiny random model: every policy runs, and the table says what was measured."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bsfa
from bsfa.evaluation import DENSE
from bsfa.policies import Antidiagonal, RelativeMax
from bsfa.prompts import length_bucket, tokenize
from tiny_model import make_model, make_prompts, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 64  # flat64 takes no smaller one
TARGETS = (0.6, 0.7)
BUDGETS = (0.5, 0.7)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("compare_policies", ROOT / "examples" / "compare_policies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rule_of(x: float) -> Antidiagonal:
    return Antidiagonal(stride=8, mass=1 - x)


def test_oracle_keeps_the_fewest_blocks(script: Any) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, heads, 16) * 2 for heads in (4, 2, 2))
    policy = script.Oracle(mass=0.8, block_m=32, block_n=32)
    _, info = bsfa.attention(q, k, v, policy=policy, return_info=True)  # type: ignore[misc]
    _, lse = bsfa.block_sparse_attention(q, k, v, None)
    mass = bsfa.block_mass(q, k, lse, block_m=32, block_n=32)
    kept = info.mask.to_rows()
    blocks = torch.arange(10)
    diagonal = blocks == blocks[:, None, None]
    assert bool((kept & diagonal).any(-1).all())
    assert bool(((mass * kept).sum(-1) >= 0.8 - 1e-6).all())
    # Without its least block, other than the diagonal, a row falls short.
    least = torch.where(kept & ~diagonal, mass, torch.inf).min(-1).values
    without = (mass * (kept & ~diagonal)).sum(-1) - least
    assert bool((without[least.isfinite()] < 0.8).all())


def test_comparison(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SAME_DENSITY", 0.02)  # a handful of blocks: densities come in steps
    model, tokenizer = make_model(), make_tokenizer()
    seen: dict[str, float] = {}

    def progress(name: str, done: float, total: float, now: str) -> None:
        assert 0 <= done <= total
        seen[name] = done / total

    calibration = make_prompts(8, words=300)
    tables = script.calibrate(model, tokenizer, calibration, TARGETS, BLOCK, lambda *x: progress("calibrating", *x))
    prompts = make_prompts(2, words=400, seed=9)
    spent = script.calibrate_budgets(
        model, tokenizer, calibration, BUDGETS, BLOCK, lambda *x: progress("calibrating", *x)
    )
    assert list(spent) == [(cost, d) for cost in ("output", "loss") for d in BUDGETS]
    report, runs = script.compare(model, tokenizer, prompts, tables, spent, BLOCK, progress)
    assert seen == dict.fromkeys(("calibrating", "matching densities", "evaluating"), 1.0)

    rows = script.rows_of(report, runs)
    assert {row["policy"] for row in rows} == {DENSE, script.MATCHED, *script.STYLES}
    assert len({(row["policy"], row["parameters"]) for row in rows}) == len(rows) == len(runs) + 1
    assert all(0 < row["density"] <= 1 and 0 < row["recall"] <= 1 + 1e-5 for row in rows)
    assert not [reason for run in report.runs.values() for reason in run.dense_reasons]
    by_name = {f"{row['policy']} {row['parameters']}": row for row in rows}
    for mass in (0.9, 0.95):
        assert by_name[f"{script.ORACLE} mass {mass}"]["recall"] >= mass
    plain, corrected = (report.runs[f"{family} alpha 0.5"] for family in (script.GLOBAL, script.CORRECTED))
    assert plain.recall == corrected.recall and plain.density < 1 and plain.prose_loss != corrected.prose_loss
    for length in report.prompts_by_length:
        dense = report.runs[DENSE].accuracy_by_task_and_length["single"][length]
        assert (dense.right, dense.asked) == (rows[0][f"needles_right_{length}"], rows[0][f"needles_asked_{length}"])

    found = script.dominance(rows, TARGETS)
    assert [row["target"] for row in found] == list(TARGETS)
    for row in found:
        assert abs(row["density"][0] - row["density"][1]) < 0.05
        better = row["recall"][0] >= row["recall"][1] and row["loss_change"][0] <= row["loss_change"][1]
        assert not row["dominates"] or better

    length = list(report.prompts_by_length)[-1]
    budgets = script.budget_dominance(rows, length)
    assert len(budgets) == len(spent) * len(script.published_rules(BLOCK))
    for row in budgets:
        # Some rules always keep more than the budget of such short prompts.
        assert row["density"][1] > row["density"][0] - 0.1
        assert "antidiagonal" not in row["rule"] or abs(row["density"][0] - row["density"][1]) < 0.1
        gains = row["needles_right"][0] - row["needles_right"][1], row["loss_change"][1] - row["loss_change"][0]
        assert row["better_on_both"] == (min(gains) > 0)
    for (cost, target), table in spent.items():
        row = by_name[f"{script.BUDGET} stride 8 density {target} cost {cost}"]
        assert table.calibration["estimated_density"] <= target and abs(row[f"density_{length}"] - target) < 0.15

    again, _ = script.compare(model, tokenizer, prompts, tables, spent, BLOCK, progress)
    assert script.rows_of(again, runs) == rows

    script.write_csv(tmp_path / "a.csv", rows)
    with open(tmp_path / "a.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["density"]) for row in read] == [row["density"] for row in rows]
    script.plot(rows, list(report.prompts_by_length)[-1], tmp_path / "a.png", "caption")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.csv", "a.png"]
    # The README's section finds its rows; here target 0.7 stands for 0.95.
    for row in rows:
        row["parameters"] = row["parameters"].replace("target 0.7", "target 0.95")
    settings = {"prompts_by_length": report.prompts_by_length, "machine": "m", "dtype": "float32"}
    script.write_csv(tmp_path / "policies_tiny_lm.csv", rows)
    text = script.json.dumps({"settings": settings, "equal_density": found, "budgets": budgets})
    script.write_text(tmp_path / "policies_tiny_lm.json", text)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    section = readme.policies()
    assert section.count("\n| ") == 1 + len(readme.SHOWN) + len(spent)
    wins = [row["better_on_both"] for row in budgets if row["budget"] == "stride 8 density 0.5 cost loss"]
    assert f"{sum(wins)} of {len(wins)} (stride 8 density 0.5 cost loss)" in section
    # Without budgets there is nothing of them.
    script.write_csv(tmp_path / "policies_tiny_lm.csv", [r for r in rows if r["policy"] != script.BUDGET])
    (tmp_path / "policies_tiny_lm.json").write_text(text.replace('"budgets": [', '"budgets": [], "not": ['))
    section = readme.policies()
    assert section.count("\n| ") == 1 + len(readme.SHOWN) and "--target-density" not in section
    assert readme.BUDGET == script.BUDGET

    console = script.Console(width=200, file=open(tmp_path / "out.txt", "w"))  # noqa: SIM115
    script.show(console, rows, list(report.prompts_by_length), "title")
    script.show_dominance(console, found)
    script.show_budgets(console, budgets, length)
    console.file.close()
    assert "antidiagonal" in (tmp_path / "out.txt").read_text()


def test_matching_density(script: Any) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    ids = [tokenize(p, tokenizer).ids for p in make_prompts(2, words=300)]
    wanted = script.mean_density(model, ids, RelativeMax(alpha=0.03, block_m=16, block_n=16))
    alpha = script.matching_alpha(model, ids, wanted, 16)
    assert script.mean_density(model, ids, RelativeMax(alpha=alpha, block_m=16, block_n=16)) == pytest.approx(
        wanted, abs=script.SAME_DENSITY
    )


def test_further_prompts(script: Any) -> None:
    """More prompts than are shipped: their lengths and answers are those of the shipped kind, and new."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(script.TINY_LM / "model")
    shipped = script.load_prompts(script.TINY_LM / "prompts" / "evaluation.jsonl.gz")
    prompts = script.further_prompts(shipped, 8192, 2)
    assert [p.text for p in prompts] == [p.text for p in script.further_prompts(shipped, 8192, 2)]
    old = {p.text[a.start : a.end] for p in shipped for a in p.answers}
    for prompt in prompts:
        t = tokenize(prompt, tokenizer)
        assert length_bucket(len(t)) == 8192 and len(t) <= 8192
        tasks = [task for task, _ in t.answers]
        assert [tasks.count(task) for task in script.NEEDLES] == [4, 5, 4]
        assert sum(prompt.text[a.start : a.end] in old for a in prompt.answers) <= 2  # words may come twice


def test_all_of_it(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself on the tiny model: tables are written, then read, and the files say the same."""
    tokenizer, calibration, prompts = make_tokenizer(), make_prompts(8, words=300), make_prompts(2, words=400, seed=9)
    monkeypatch.setattr(script, "TARGETS", TARGETS)
    monkeypatch.setattr(script, "BISECTIONS", 3)
    monkeypatch.setattr(script, "published_rules", lambda block: {"antidiagonal stride 8 mass": rule_of})
    monkeypatch.setattr(script.AutoTokenizer, "from_pretrained", lambda path: tokenizer)
    monkeypatch.setattr(script.LlamaForCausalLM, "from_pretrained", lambda path, dtype: make_model())
    monkeypatch.setattr(script, "load_prompts", lambda path: calibration)
    monkeypatch.setattr(script, "evaluation_prompts", lambda tokenizer, count: prompts)
    monkeypatch.setattr(script, "fixed_runs", lambda block: [])
    for results in ("first", "second"):
        places = ("--tables", tmp_path / "t", "--results", tmp_path / results, "--image", tmp_path / f"{results}.png")
        arguments = ["script", "--device", "cpu", *map(str, places), "--budgets", "0.6", "0.8"]
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
    written = {path.name for path in (tmp_path / "t").iterdir()}
    names = {f"thresholds-budget-{cost}-{d}.safetensors" for cost in ("output", "loss") for d in ("0.60", "0.80")}
    assert written == names | {"thresholds-0.60.safetensors", "thresholds-0.70.safetensors"}
    for name in ("policies_tiny_lm.csv", "policies_tiny_lm.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    facts = script.json.loads((tmp_path / "first" / "policies_tiny_lm.json").read_text())
    assert [row["budget"] for row in facts["budgets"]] == [
        f"stride 8 density {d} cost {cost}" for cost in ("output", "loss") for d in ("0.6", "0.8")
    ]
