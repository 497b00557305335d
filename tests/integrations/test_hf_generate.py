"""examples/hf_generate.py on the shipped model: all three ways give the answer, and the policy acts."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "hf_generate.py"


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("hf_generate", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["hf_generate.py", "--tokens", "3300", "--min-seqlen", "1024"])
    assert script.main() == 0
    printed = capsys.readouterr().out
    answer = re.search(r"the answer is '(.+)'", printed)
    assert answer is not None
    assert printed.count(f" '{answer[1]}.' in ") == 3
    assert "100% of the blocks" in printed and int(re.findall(r"(\d+)% of", printed)[-1]) < 95
    monkeypatch.setattr(sys, "argv", ["hf_generate.py", "--tokens", "10"])
    with pytest.raises(SystemExit, match="within 10 tokens"):
        script.main()
