"""README.md is true: its numbers come from benchmarks/results/, its Python runs, its files exist."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
readme = importlib.import_module("readme")

TEXT = readme.README.read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_numbers_are_those_of_the_results() -> None:
    assert readme.filled(TEXT) == TEXT, "run python benchmarks/readme.py"


def test_every_file_it_names_exists() -> None:
    named = re.findall(r"\]\(([\w./]+)\)", TEXT) + re.findall(r"`((?:examples|docs|benchmarks)/[\w./]+)`", TEXT)
    assert named
    missing = [name for name in named if not (readme.ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_its_python_runs(snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(readme.ROOT)
    exec(compile(snippet, "README.md", "exec"), {})
    if "print(" in snippet:
        assert "density" in capsys.readouterr().out


def test_its_make_targets_exist() -> None:
    makefile = (readme.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z][\w-]*)`?", TEXT))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
