"""README.md is true: its numbers come from benchmarks/results/, its Python (and that of some of docs/) runs, its files
exist.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
readme = importlib.import_module("readme")

TEXT = readme.README.read_text()
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SNIPPETS = [
    (page.name, code)
    for page in (
        readme.README,
        *(readme.ROOT / "docs" / name for name in ("selection.md", "exact_skip.md", "masked_mha.md")),
    )
    for language, code in FENCED.findall(page.read_text())
    if language == "python"
]


def test_numbers_are_those_of_the_results() -> None:
    assert readme.filled(TEXT) == TEXT, "run python benchmarks/readme.py"


def test_every_file_it_names_exists() -> None:
    named = re.findall(r"\]\(([\w./]+)\)", TEXT) + re.findall(r"`((?:examples|docs|benchmarks)/[\w./]+)`", TEXT)
    assert named
    missing = [name for name in named if not (readme.ROOT / name).exists()]
    assert not missing


def test_the_pages_have_python() -> None:
    assert {page for page, _ in SNIPPETS} == {"README.md", "selection.md", "exact_skip.md", "masked_mha.md"}


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_its_python_runs(
    page: str, snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(readme.ROOT)
    exec(compile(snippet, page, "exec"), {})
    if "print(" in snippet:
        assert "density" in capsys.readouterr().out


def make_targets(text: str) -> set[str]:
    """What ``make`` is called with in code: fenced, indented, or between backticks. Prose may make what it likes."""
    prose = FENCED.sub("", text)
    code = [code for _, code in FENCED.findall(text)]
    code += re.findall(r"^ {4}.*", prose, re.MULTILINE) + re.findall(r"`([^`\n]+)`", prose)
    return set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(code)))


def test_make_is_a_command_in_code_alone() -> None:
    text = (
        "To make sure:\n\n    make demo  # first\n\n```sh\nmake test\n```\n\nOr `make cuda`, which may make trouble.\n"
    )
    assert make_targets(text) == {"demo", "test", "cuda"}


def test_its_make_targets_exist() -> None:
    makefile = (readme.ROOT / "Makefile").read_text()
    targets = make_targets(TEXT)
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
