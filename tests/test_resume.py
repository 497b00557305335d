"""A calibration that is killed continues to the same bytes; nothing is mixed; old files outlive failed writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from bsfa import files
from bsfa.calibration import CalibrationCurves, CalibrationWarning, choose, collect
from bsfa.calibration.resume import discard
from bsfa.cli_common import TimeLeft
from bsfa.policies import CumulativeMass, RelativeMax
from tiny_model import make_mixed_model, make_model, make_prompts, make_rows, make_tokenizer, write_rows

POLICY = RelativeMax(block_m=32, block_n=32, sink_blocks=1, window_blocks=1, last_tiles=1)
DRIVER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return make_model(), make_tokenizer()


def drive(what: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DRIVER), what, str(folder), *map(str, arguments)]
    paths = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=300)


def same(a: CalibrationCurves, b: CalibrationCurves) -> bool:
    """Whether two results are equal, bit for bit."""
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name != "policy" and not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
            return False
    return True


# ---- killed runs ----------------------------------------------------------------------------------------------------


def test_a_killed_command_continues_to_the_same_file(tmp_path: Path) -> None:
    """Killed after two prompts, then after one more; the third run measures the rest. Prompts of two lengths."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "p.jsonl", make_rows(6))
    whole = drive("calibrate", tmp_path, -1, "whole.safetensors")
    assert whole.returncode == 0 and "measured 6" in whole.stdout, whole.stderr
    assert "earlier run" not in whole.stderr
    assert not (tmp_path / "whole.safetensors.partial").exists()

    partial = tmp_path / "t.safetensors.partial"
    for prompts, kept in ((2, 2), (1, 3)):
        died = drive("calibrate", tmp_path, prompts, "t.safetensors")
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert len(list(partial.glob("*/*.safetensors"))) == kept
        assert not (tmp_path / "t.safetensors").exists()
    finished = drive("calibrate", tmp_path, -1, "t.safetensors")
    assert finished.returncode == 0 and "measured 3" in finished.stdout, finished.stderr
    assert "% of the work was done by an earlier run" in finished.stderr
    assert not partial.exists()
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_killed_and_full_writes_leave_the_old_file(lm: tuple[Any, Any], tmp_path: Path) -> None:
    curves = collect(*lm, make_prompts(4), POLICY)
    choose(curves, 0.5).save(tmp_path / "t.safetensors")
    choose(curves, 0.6, seed=1).save(tmp_path / "other.safetensors")
    old, new = ((tmp_path / name).read_bytes() for name in ("t.safetensors", "other.safetensors"))
    assert old != new

    died = drive("replace", tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "t.safetensors").read_bytes() == old
    (left,) = tmp_path.glob(".t.*.tmp.safetensors")  # nobody could remove it; the next writer is not in its way
    assert left.read_bytes() == new
    left.unlink()

    done = drive("limit", tmp_path, 0, 100, len(new) - 1, len(new))
    assert done.returncode == 0, done.stderr
    *failed, written = done.stdout.splitlines()
    assert len(failed) == 3 and written == "written new"
    for line in failed:
        assert "File too large" in line and "t.safetensors" in line and line.endswith(" old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "t.safetensors"]
    assert (tmp_path / "t.safetensors").read_bytes() == new


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """/dev/full takes no byte: the error of the write says which file it was about."""
    path = tmp_path / "t.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as caught, files.replacing(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"new" * 100)
    assert caught.value.filename == str(path) and path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_a_full_disk_while_measuring(tmp_path: Path) -> None:
    done = drive("measure", tmp_path)
    assert done.returncode == 1 and "File too large" in done.stderr and ".safetensors" in done.stderr
    assert not list(tmp_path.glob("part/*/*.safetensors")) and not list(tmp_path.glob("part/*/.*"))


# ---- what counts, and what does not ---------------------------------------------------------------------------------


def run(lm: tuple[Any, Any], folder: Path | None, prompts: int = 3, policy: Any = POLICY, **options: Any) -> Any:
    """Curves, how many prompts were measured, and the first share that was reported."""
    shares: list[float] = []

    def progress(done: float, total: float, _: str) -> None:
        shares.append(done / total)

    curves = collect(*lm, make_prompts(prompts), policy, resume=folder, progress=progress, **options)
    assert shares[-1] == 1.0 and shares == sorted(shares)
    return curves, len(shares) - 1, shares[0]


def test_resumed_curves_are_the_measured_ones(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """Prompts that were there count at once, whatever their place among the others."""
    plain, count, first = run(lm, None, 4)
    assert (count, first) == (4, 0.0)
    cold, count, _ = run(lm, tmp_path, 4)
    assert count == 4 and same(cold, plain)
    warm, count, first = run(lm, tmp_path, 4)
    assert (count, first) == (0, 1.0) and same(warm, plain)
    stored = sorted(tmp_path.glob("*/*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
    stored[1].unlink()
    part, count, first = run(lm, tmp_path, 4)
    assert count == 1 and 0.5 < first < 1.0 and same(part, plain)
    more, count, _ = run(lm, tmp_path, 6)
    assert count == 2 and same(more, run(lm, None, 6)[0])


def test_mixed_layers_are_resumed(tmp_path: Path) -> None:
    """Which layers were dense, and why, comes back with the prompts."""
    lm = (make_mixed_model(), make_tokenizer())
    plain = run(lm, tmp_path)[0]
    warm, count, _ = run(lm, tmp_path)
    assert count == 0 and same(warm, plain) and warm.layers[0] == "dense: sliding-window attention"


def altered(model: Any) -> Any:
    """The same model after a little training."""
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.25)
    return model


OTHERS: dict[str, dict[str, Any]] = {
    "policy": {"policy": CumulativeMass(block_m=32, block_n=32)},
    "parameter": {"policy": RelativeMax(block_m=32, block_n=32, sink_blocks=2, window_blocks=1, last_tiles=1)},
    "tail": {"tail": 0.5},
    "length": {"max_length": 100},
    "weights": {"model": lambda: altered(make_model())},
    "config": {"model": lambda: make_model(rms_norm_eps=0.1)},
    "dtype": {"model": lambda: make_model().to(torch.bfloat16)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_settings_do_not_count(case: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    changes = dict(OTHERS[case])
    model = changes.pop("model", lambda: lm[0])()
    run(lm, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CalibrationWarning)
        curves, count, _ = run((model, lm[1]), tmp_path, **changes)
    assert count == 3 and same(curves, run((model, lm[1]), None, **changes)[0])
    texts = [str(w.message) for w in caught]
    if case == "length":  # other prompts of the same settings
        assert not texts
    else:
        assert len(texts) == 1 and "holds 3 finished prompts of other settings" in texts[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        assert run((model, lm[1]), tmp_path, **changes)[1] == 0


def test_the_threshold_does_not_matter(lm: tuple[Any, Any], tmp_path: Path) -> None:
    run(lm, tmp_path)
    assert run(lm, tmp_path, policy=POLICY.with_threshold(0.7))[1] == 0


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Any] = {
    "empty": lambda path, other: path.write_bytes(b""),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-5]),
    "data": lambda path, other: flip(path, -1),
    "header": lambda path, other: flip(path, 3),
    "metadata": lambda path, other: path.write_bytes(path.read_bytes().replace(b"float32", b"float16", 1)),
    "another prompt": lambda path, other: path.write_bytes(other.read_bytes()),
    "pickle": lambda path, other: torch.save({"a": torch.ones(3)}, path),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_prompts_are_measured_again(case: str, lm: tuple[Any, Any], tmp_path: Path) -> None:
    plain = run(lm, tmp_path)[0]
    first, second, _ = sorted(tmp_path.glob("*/*.safetensors"))
    DAMAGE[case](first, second)
    with pytest.warns(CalibrationWarning, match=f"{first.name}: damaged, the prompt is measured again"):
        curves, count, _ = run(lm, tmp_path)
    assert count == 1 and same(curves, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        assert run(lm, tmp_path)[1] == 0


def test_weights_that_cannot_be_read_are_told_apart_by_what_they_do(
    lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bsfa.identity.weight_fingerprint", lambda _: None)
    plain, count, _ = run(lm, tmp_path)
    assert count == 3 and plain.model.weights is None
    assert run(lm, tmp_path)[1] == 0
    with pytest.warns(CalibrationWarning, match="other settings"):
        assert run((altered(make_model()), lm[1]), tmp_path)[1] == 3


def test_a_file_in_place_of_the_folder(lm: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("")
    with pytest.raises(ValueError, match="not a directory"):
        run(lm, path)


def test_a_folder_that_cannot_be_made(lm: tuple[Any, Any], tmp_path: Path) -> None:
    """Known before the first prompt is measured."""
    (tmp_path / "x").write_text("")
    called: list[float] = []
    with pytest.raises(OSError, match="x"):
        collect(
            *lm, make_prompts(2), POLICY, resume=tmp_path / "x" / "y", progress=lambda done, *_: called.append(done)
        )
    assert not called


def test_discard_takes_only_its_own(lm: tuple[Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "part"
    run(lm, folder)
    run(lm, folder / "second pass")
    (folder / "notes.txt").write_text("mine")
    (folder / "model").mkdir()
    for name in ("settings.json", "weights.safetensors"):
        (folder / "model" / name).write_text("{}")
    discard(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["model", "notes.txt"]
    assert len(list((folder / "model").iterdir())) == 2
    for path in (folder / "model").iterdir():
        path.unlink()
    (folder / "model").rmdir()
    (folder / "notes.txt").unlink()
    discard(folder)
    discard(folder)
    assert not folder.exists()


# ---- time left ------------------------------------------------------------------------------------------------------


def test_time_left() -> None:
    """The rate is that of this run: work that was there at the start does not count. Steps may take minutes."""
    now = [100.0]
    left = TimeLeft(lambda: now[0])
    assert left.seconds() is None
    left.report(600.0, 1000.0)  # resumed
    assert left.seconds() is None
    now[0] += 50.0
    assert left.seconds() is None
    left.report(700.0, 1000.0)  # 100 in 50 s
    assert left.seconds() == pytest.approx(150.0)
    now[0] += 20.0
    assert left.seconds() == pytest.approx(130.0)
    now[0] += 80.0
    left.report(800.0, 1000.0)  # 200 in 150 s
    assert left.seconds() == pytest.approx(150.0)
    now[0] += 1000.0
    assert left.seconds() == 0.0
    left.report(1000.0, 1000.0)
    assert left.seconds() == 0.0
