"""The command line from end to end, and its errors: one line, exit code 2."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bsfa import cli_calibrate
from bsfa.cli import app
from bsfa.thresholds import ThresholdTable
from tiny_model import make_model, make_rows, make_tokenizer, write_rows


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "p.jsonl", make_rows(24, words=100))


@pytest.fixture(scope="module")
def thresholds(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From `bsfa calibrate`."""
    path = tmp_path_factory.mktemp("out") / "t.safetensors"
    result = run(
        "calibrate", "--model", model_dir, "--data", data, "-o", path, "--target-recall", 0.9, "--block-size", 32,
        "--last-tiles", 1, "--sink-blocks", 1, "--window-blocks", 1, "--max-length", 150, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"wrote {path}" in result.output and "dense heads" in result.output
    return path


def test_calibrate(thresholds: Path, model_dir: Path) -> None:
    table = ThresholdTable.load(thresholds, block_m=32, block_n=32)
    assert table.policy.name == "relative-max" and table.policy.last_tiles == 1 and table.target_recall == 0.9
    assert max(table.calibration["tokens"]) == 150 and len(table.calibration["tokens"]) == 24
    assert table.model.name == str(model_dir)
    table.check_model(make_model())


def test_several_targets_and_another_policy(model_dir: Path, data: Path, tmp_path: Path) -> None:
    result = run(
        "calibrate", "--model", model_dir, "--data", data, "-o", tmp_path / "t-{target}.safetensors",
        "--max-prompts", 4, "--policy", "cumulative-mass", "--target-recall", 0.5, "--target-recall", 0.9,
        "--dtype", "bfloat16",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "warning: all heads stay dense: 2 calibration prompts" in result.output
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["t-0.5.safetensors", "t-0.9.safetensors"]
    tables = [ThresholdTable.load(tmp_path / name) for name in names]
    assert run("inspect", tmp_path / names[1], "--plot", tmp_path / "dense.png").exit_code == 0
    assert [t.policy.name for t in tables] == ["cumulative-mass"] * 2 and tables[0].model.dtype == "bfloat16"


def test_inspect(thresholds: Path, tmp_path: Path) -> None:
    result = run("inspect", thresholds, "--plot", tmp_path / "heat.png")
    assert result.exit_code == 0, result.output
    for text in (
        "relative-max version 1",
        "target recall 0.9 (conformal risk control)",
        "confidence in expectation",
        "12 chose, 12 checked",
        "prompts needed 9 that choose",
        "held out, worst tiles recall mean 0.",
        "sd 0.",
        "worst prompt 0.",
        "of 8 (",
        "by layer",
        "worst head",
    ):
        assert text in " ".join(result.output.split())
    assert "warning" not in result.output
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_confidence(model_dir: Path, data: Path, tmp_path: Path) -> None:
    """24 prompts are enough for 0.8 at 0.9, not for 0.95; inspect says which, the command warns, nothing else stays."""
    result = run(
        "calibrate", "--model", model_dir, "--data", data, "-o", tmp_path / "t-{target}.safetensors", "--block-size",
        32, "--target-recall", 0.8, "--target-recall", 0.95, "--confidence", 0.9, "--max-length", 150,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    warning = (
        "warning: all heads stay dense: 12 calibration prompts can promise a recall of at most 0.825 with confidence"
    )
    assert warning in result.output and "0.95 at confidence 0.9 needs at least 45 (that is 89 prompts" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t-0.8.safetensors", "t-0.95.safetensors"]
    enough, few = (
        " ".join(run("inspect", tmp_path / name).output.split()) for name in ("t-0.8.safetensors", "t-0.95.safetensors")
    )
    for text in (
        "Hoeffding-Bentkus",
        "confidence 0.9 for each head",
        "prompts needed 11 that choose",
    ):
        assert text in enough
    assert "warning" not in enough
    assert warning in few and "prompts needed 45" in few


def test_without_resume(model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--no-resume keeps nothing, and takes up nothing."""
    command = ["calibrate", "--model", model_dir, "--data", data, "-o", tmp_path / "t.safetensors", "--max-prompts", 2]
    folders: list[Path | None] = []
    collect = cli_calibrate.collect
    monkeypatch.setattr(cli_calibrate, "collect", lambda *a, **k: (folders.append(k["resume"]), collect(*a, **k))[1])
    for options in ([], ["--no-resume"]):
        assert run(*command, "--target-recall", 0.3, *options).exit_code == 0
    assert folders == [tmp_path / "t.safetensors.partial", None]
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_failed_save_keeps_the_finished_prompts(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "t.safetensors"))

    command = ["calibrate", "--model", model_dir, "--data", data, "-o", tmp_path / "t.safetensors", "--max-prompts", 2]
    monkeypatch.setattr(ThresholdTable, "save", full)
    result = run(*command, "--target-recall", 0.3)
    assert result.exit_code == 2 and "t.safetensors: No space left on device" in result.output
    assert len(list(tmp_path.glob("t.safetensors.partial/*/*.safetensors"))) == 2


def test_eval(thresholds: Path, model_dir: Path, data: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = run(
        "eval", "--model", model_dir, "--thresholds", thresholds, "--data", data, "--max-prompts", 3, "--json", report
    )
    assert result.exit_code == 0, result.output
    for text in (
        "prose loss",
        "answers right",
        "single",
        "recall (mass kept)",
        "prefill, seconds",
        "prefill speed-up",
        "1.00x",
        "t: by layer",
    ):
        assert text in result.output
    heads = run(
        "eval", "--model", model_dir, "--thresholds", thresholds, "--data", data, "--max-prompts", 1, "--per-head"
    )
    assert heads.exit_code == 0 and "recall of each head" in heads.output and "head 3" in heads.output
    runs = json.loads(report.read_text())["runs"]
    assert runs["dense"]["speedup"] == 1.0 and set(runs["dense"]["speedup_by_length"].values()) == {1.0}
    assert runs["t"]["speedup"] == pytest.approx(runs["dense"]["seconds"] / runs["t"]["seconds"])
    for length, ratio in runs["t"]["speedup_by_length"].items():
        seconds = [runs[name]["seconds_by_length"][length] for name in ("dense", "t")]
        assert ratio == pytest.approx(seconds[0] / seconds[1])
    assert list(runs) == ["dense", "t"] and runs["t"]["density"] < 1.0 and runs["t"]["recall"] > 0.8


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0 and "block_mass" in result.output and "operations" in result.output


def test_missing_matplotlib(thresholds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("inspect", thresholds, "--plot", tmp_path / "heat.png")
    assert result.exit_code == 2 and 'pip install "bsfa[plot]"' in result.output


CALIBRATE = ["calibrate", "--model", "{model}", "--data", "{data}", "-o", "{tmp}/t.safetensors"]
EVAL = ["eval", "--model", "{model}", "--data", "{data}", "--thresholds", "{thresholds}"]
ERRORS: dict[str, tuple[list[str], str]] = {
    "no model": ([*CALIBRATE, "--model", "{tmp}/none"], "no such directory"),
    "no config": ([*CALIBRATE, "--model", "{tmp}"], "no config.json"),
    "no data": ([*CALIBRATE, "--data", "{tmp}/none.jsonl"], "none.jsonl: No such file"),
    "bad data": ([*CALIBRATE, "--data", "{tmp}/bad.jsonl"], "bad.jsonl:1: not JSON"),
    "one prompt": ([*CALIBRATE, "--max-prompts", "1"], "two prompts"),
    "policy": ([*CALIBRATE, "--policy", "magic"], "choose one of relative-max"),
    "dtype": ([*CALIBRATE, "--dtype", "int3"], "choose one of auto"),
    "device": ([*CALIBRATE, "--device", "abacus"], "--device abacus"),
    "target": ([*CALIBRATE, "--target-recall", "95"], "between 0 and 1"),
    "confidence": ([*CALIBRATE, "--confidence", "90"], "confidence must lie between 0 and 1"),
    "targets": ([*CALIBRATE, "--target-recall", "0.9", "--target-recall", "0.8"], "{target}"),
    "output": ([*CALIBRATE, "-o", "{tmp}/none/t.safetensors"], "is not a directory"),
    "block size": ([*CALIBRATE, "--block-size", "9999"], "block_m must be 1 .. 4096"),
    "usage": (["calibrate"], "Missing option"),
    "inspect none": (["inspect", "{tmp}/none"], "No such file"),
    "inspect other": (["inspect", "{data}"], "not a sound safetensors file"),
    "plot": (["inspect", "{thresholds}", "--plot", "{tmp}/x.nope"], "nope"),
    "eval other": ([*EVAL, "--thresholds", "{data}"], "not a sound safetensors file"),
    "eval model": ([*EVAL, "--model", "{other}"], "num_hidden_layers is 2 in the file but 1 in the model"),
    "eval json": ([*EVAL, "--json", "{tmp}/none/r.json"], "is not a directory"),
}


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other")
    make_model(num_hidden_layers=1).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, model_dir: Path, other_dir: Path, data: Path, thresholds: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    places = {"model": model_dir, "other": other_dir, "data": data, "thresholds": thresholds, "tmp": tmp_path}
    arguments, message = ERRORS[case]
    result = run(*(a.format(**places) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output
    if case != "usage":
        lines = [x for x in result.output.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1 and result.output.strip().endswith(lines[0])
    assert not list(tmp_path.glob("*.safetensors"))


def test_unexpected_errors(monkeypatch: pytest.MonkeyPatch, thresholds: Path) -> None:
    monkeypatch.setattr(ThresholdTable, "load", lambda *_: 1 / 0)
    result = run("inspect", thresholds)
    assert result.exit_code == 1 and "error: ZeroDivisionError: division by zero" in result.output
    assert isinstance(run("--traceback", "inspect", thresholds).exception, ZeroDivisionError)
