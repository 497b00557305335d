"""The tools in benchmarks/ for who changes a kernel, on made-up inputs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def app(module: ModuleType) -> typer.Typer:
    made = typer.Typer()
    made.command()(module.main)
    return made


def test_sass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sass = importlib.import_module("sass")

    def function(name: str, code: list[str]) -> str:
        lines = [f"        /*{16 * i:04x}*/                   {text} ;   /* 0x0 */" for i, text in enumerate(code)]
        return "\n\t\tFunction : " + name + "\n" + "\n".join(lines)

    first, more = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT", "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], R88"
    loop = [
        "R2UR UR8, R1",
        first,
        "R2UR UR9, R2",
        "SHFL.IDX PT, R9, R1, RZ, 0x1f",
        more,
        *["NOP"] * 70,
        "R2UR UR1, R1",
        *["NOP"] * 30,
    ]
    text = (
        function("plain", ["MOV R1, R2"]) + function("good", [*loop, first]) + function("bad", ["LDL R1, [R2]", first])
    )
    assert dict(sass.functions(text))["good"][:2] == loop[:2]
    assert sass.runs([*loop, first]) == [sass.Run(1, 2, 2, 1), sass.Run(len(loop), 1, 0, 0)]

    done = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(sass.subprocess, "run", lambda *args, **kwargs: done)
    result = CliRunner().invoke(app(sass), ["x.o"])
    assert result.exit_code == 1 and "1 local accesses" in result.output and "plain" not in result.output


def test_profile_segments(tmp_path: Path) -> None:
    profile = importlib.import_module("profile_segments")
    header = ["Address", "Source", profile.SAMPLES, profile.EXECUTED, "stall_wait", "stall_mio", "stall_wait (Not)"]
    rows = [
        ["0", "USETMAXREG 24", "7", "132", "7", "", ""],
        ["1", "IADD R1, R1, R2", "10", "2112", "10", "0", "10"],
        ["2", "FADD R1, R1, R2", "20", "2112", "5", "15", "5"],
        ["3", "SHFL R1, R2", "30", "2112", "", "30", ""],
        ["4", "FADD R1, R1, R2", "40", "1056", "40", "", ""],
    ]
    source = tmp_path / "source.csv"
    source.write_text(
        "\n".join(",".join(f'"{cell}"' for cell in row) for row in [["Kernel", "x"], header, *rows]) + "\n"
    )
    result = CliRunner().invoke(app(profile), [str(source), "--cycles", "1000", "--first", "1"])
    assert result.exit_code == 0, result.output
    named, *found = result.output.splitlines()
    assert named == "0: USETMAXREG 24"
    assert [" ".join(line.split()) for line in found] == [
        "1- 3 2.00 times 300 clocks 150.0 each wait:50% mio:50% | IADD R1, R1, R2",
        "3- 4 2.00 times 300 clocks 150.0 each mio:100% | SHFL R1, R2",
        "4- 5 1.00 times 400 clocks 400.0 each wait:100% | FADD R1, R1, R2",
    ]


@pytest.mark.parametrize("alike", [True, False])
def test_compare_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool) -> None:
    compare = importlib.import_module("compare_libraries")
    libraries = [tmp_path / "a.so", tmp_path / "b.so"]
    for library in libraries:
        library.write_text(library.name)
    seen = []

    def run(args: list[str], env: dict[str, str], **how: object) -> subprocess.CompletedProcess[str]:
        folder = Path(env["PYTHONPATH"]) / "bsfa"
        assert (folder / "__init__.py").read_text() == (compare.PACKAGE / "__init__.py").read_text()
        names = [path.name for path in (folder / "lib").glob("libbsfa_cuda*.so")]
        assert names == ["libbsfa_cuda.so"]
        seen.append((folder / "lib" / names[0]).read_text())
        found = {"hash": "1" if alike else seen[-1], "4K dense ms": 0.25}
        return subprocess.CompletedProcess(args, 0, stdout=f"noise\n{json.dumps(found)}\n")

    monkeypatch.setattr(compare.subprocess, "run", run)
    result = CliRunner().invoke(app(compare), [*map(str, libraries), "--rounds", "2"])
    assert result.exit_code == (0 if alike else 1), result.output
    assert seen == ["a.so", "b.so"] * 2
    assert result.output.count("4K dense ms 0.25") == 4
