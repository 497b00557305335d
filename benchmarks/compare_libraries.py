"""Two builds of the CUDA library, in turns on one GPU: the same outputs to the bit, and their times and cycles.

    python benchmarks/compare_libraries.py build/before.so python/bsfa/lib/libbsfa_cuda.so

Each turn is a process of its own, since a process can load one library only. Dense and sparse attention take turns in
it as in the suite (attention.py). Compare cycles, and times of runs that follow each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import typer

from report import ROOT

PACKAGE = ROOT / "python" / "bsfa"
CASES = ((8, 0.3), (16, 0.1), (32, 0.05))  # of the hash: thousands of tokens, density


def package(library: Path, folder: Path) -> Path:
    """A copy of the package in ``folder`` that has ``library``; what PYTHONPATH wants."""
    ignored = shutil.ignore_patterns("libbsfa_cuda*.so", "__pycache__")
    shutil.copytree(PACKAGE, folder / "bsfa", ignore=ignored)
    (folder / "bsfa" / "lib").mkdir(exist_ok=True)
    shutil.copy(library, folder / "bsfa" / "lib" / "libbsfa_cuda.so")
    return folder


@torch.no_grad()
def measure(kilos: list[int], density: float) -> dict[str, object]:
    """By the library that is loaded here: a hash of outputs; ms and millions of cycles, dense and sparse."""
    import attention as suite

    outputs = hashlib.sha256()
    for kilo, kept in CASES:
        torch.manual_seed(kilo)
        inputs = suite.random_inputs(kilo * suite.K)
        out = suite.sparse_call(*inputs, suite.random_mask(kilo * suite.K, kept))()
        outputs.update(out.view(torch.int16).cpu().numpy().tobytes())
    found: dict[str, object] = {"hash": outputs.hexdigest()[:16]}
    for kilo in kilos:
        torch.manual_seed(0)
        inputs = suite.random_inputs(kilo * suite.K)
        mask = suite.random_mask(kilo * suite.K, density)
        calls = {"dense": [suite.dense_call(*inputs)], "sparse": [suite.sparse_call(*inputs, mask)]}
        turns = suite.take_turns(kilo * suite.K, calls, {"sparse": density}, in_cycles=True)
        for name, ms in turns.ms.items():
            found[f"{kilo}K {name} ms"] = ms
            if name in turns.cycles:
                found[f"{kilo}K {name} Mcycles"] = turns.cycles[name] / 1e6
    return found


def main(
    libraries: list[Path], kilos: str = "4,16,64", density: float = 0.1, rounds: int = 2, measure_here: bool = False
) -> None:
    """Print what each of LIBRARIES takes, round by round; exit with 1 if their outputs differ."""
    if measure_here:
        print(json.dumps(measure([int(kilo) for kilo in kilos.split(",")], density)))
        return
    hashes = set()
    with tempfile.TemporaryDirectory() as folder:
        paths = [package(library, Path(folder) / str(i)) for i, library in enumerate(libraries)]
        for _ in range(rounds):
            for library, path in zip(libraries, paths, strict=True):
                options = ["--kilos", kilos, "--density", str(density), "--measure-here", str(library)]
                done = subprocess.run(
                    [sys.executable, __file__, *options],
                    env={**os.environ, "PYTHONPATH": str(path)},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    timeout=300,
                )
                found = json.loads(done.stdout.splitlines()[-1])
                hashes.add(found.pop("hash"))
                print(f"{library}: " + ", ".join(f"{name} {value:.5g}" for name, value in found.items()), flush=True)
    print("outputs alike" if len(hashes) == 1 else f"outputs differ: {sorted(hashes)}")
    raise SystemExit(0 if len(hashes) == 1 else 1)


if __name__ == "__main__":
    typer.run(main)
