"""examples/target_table.py with a tiny random model: what it writes is what was calibrated, measured and timed."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bsfa
from bsfa.policies import RelativeMax
from tiny_model import make_model, make_prompts, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (0.5, 0.7)
BLOCK = 64  # exact skip takes multiples of it


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("target_table")


def test_all_of_it(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_length = make_prompts(3, words=400, seed=9)[1:]
    texts = {"calibration": make_prompts(12, words=300), "evaluation": one_length}
    asked: dict[str, int] = {}

    def prompts_of_length(kind: str, tokenizer: Any, length: int, count: int, passed_over: int = 0) -> Any:
        asked[kind] = passed_over
        return texts[kind][:count]

    tables: dict[Any, bsfa.ThresholdTable] = {}

    def calibrate(*arguments: Any) -> Any:
        tables.update(kept(*arguments))
        return tables

    kept = script.calibrate
    for name, value in {
        "TARGETS": TARGETS,
        "RelativeMax": lambda **sizes: RelativeMax(**(sizes or {"block_m": BLOCK, "block_n": BLOCK})),
        "prompts_of_length": prompts_of_length,
        "calibrate": calibrate,
    }.items():
        assert hasattr(script, name)
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script.AutoTokenizer, "from_pretrained", lambda path: make_tokenizer())
    monkeypatch.setattr(script.LlamaForCausalLM, "from_pretrained", lambda path, dtype: make_model())
    arguments = ["--device", "cpu", "--calibration", "12", "--prompts", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["target_table.py", *arguments])
    script.main()
    # Draws with the needles of the evaluation prompts calibrate nothing.
    assert asked == {"evaluation": 0, "calibration": 2}

    with open(tmp_path / "targets_tiny_lm.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(script.policies(BLOCK))
    assert [(r["policy"], float(r["target"])) for r in rows] == [(n, t) for n in names for t in TARGETS]
    for row in rows:
        table = tables[row["policy"], float(row["target"])]
        assert table.target_recall == float(row["target"])
        n = {name: float(value) for name, value in row.items() if name != "policy" and value}
        assert n["prompts_chose"] + n["prompts_held_out"] == (11 if "skip" in row["policy"] else 12)
        assert n["held_out_recall"] == pytest.approx(float(table.recall.mean()), abs=1e-4)
        assert n["held_out_density"] == pytest.approx(float(table.density.mean()), abs=1e-4)
        met = (table.tail_recall >= table.target_recall).float().mean()
        assert n["held_out_tail_pairs_on_target"] == pytest.approx(float(met), abs=1e-4)
        assert 0 < n["density"] <= 1 and n["held_out_tail_recall"] <= n["held_out_recall"] + 1e-6
        assert n["attention_ms"] > 0 and n["pairs"] == table.thresholds.numel()
    loose, strict = ([float(r["density"]) for r in rows[i::2]] for i in (0, 1))
    assert all(a <= b for a, b in zip(loose, strict, strict=True)) and min(loose) < 1
    settings = json.loads((tmp_path / "targets_tiny_lm.json").read_text())["settings"]
    assert (settings["calibration_prompts"], settings["prompts"], settings["heads"]) == (12, 2, [4, 2])

    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    section = readme.targets()
    assert section.count("\n| ") == 1 + len(rows) and "2 other prompts" in section
    assert "8 of 8 rows, and in at least 100%" in section
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "nothing")
    assert readme.targets() == ""


def test_captured_calls_are_the_models(script: Any) -> None:
    """Attention over what was captured is what the layers computed; every table's layers are called."""
    model, tokenizer = make_model(), make_tokenizer()
    ids = torch.arange(300) % 200
    outs: list[torch.Tensor] = []
    with torch.inference_mode():
        calls = script.captured(model, ids)
        with script.dense_model(model), script.observe(model, lambda call: outs.append(call.out.clone())):
            script.prefill(model, ids)
        assert len(calls) == len(outs) == 2
        for (q, k, v, scale), out in zip(calls, outs, strict=True):
            torch.testing.assert_close(bsfa.attention(q, k, v, softmax_scale=scale), out, rtol=0, atol=0)
        curves = script.collect(model, tokenizer, make_prompts(8, words=100), RelativeMax(block_m=16, block_n=16))
        key = ("relative-max", 0.5)
        ms, graphs, clock = script.attention_ms(calls, {key: script.choose(curves, 0.5)})
    assert set(ms) == set(graphs) == {script.DENSE, key} and min(ms.values()) > 0
    assert not any(graphs.values()) and clock is None


def test_small_runs_leave_the_record_alone(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["target_table.py", "--small"])
    with pytest.raises(SystemExit):
        script.main()


def test_remembered_texts(script: Any) -> None:
    tokenizer, texts = make_tokenizer(), ["amber river", "castle cold tower"]
    known = script.RememberedTexts(tokenizer, texts)
    for text in texts:
        wanted = tokenizer(text, return_offsets_mapping=True)
        assert known(text) == {name: wanted[name] for name in ("input_ids", "offset_mapping")}
