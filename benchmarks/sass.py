"""What to look at in the machine code of the tensor-core kernels after every change; needs no GPU.

    python benchmarks/sass.py build/CMakeFiles/bsfa_cuda_kernels.dir/csrc/cuda/attention/sm90/bf16_d128.cu.o

Per kernel: instructions, products, accesses of local memory (there are to be none), and for each run of products (the
inner loop's is one of them) the moves to uniform registers before and between them, what descriptors cost that ptxas
does not keep there, and the shuffles, of which flags that are branched on should be one.
docs/kernels/attention_sm90.md, "What was learnt", says what they are worth. cuobjdump comes with CUDA, and with the
package triton (``--cuobjdump .../triton/backends/nvidia/bin/cuobjdump``).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

BEFORE = 25  # instructions before a run of products that prepare it
APART = 60  # without a product: the run has ended


@dataclass(frozen=True)
class Run:
    """Products that follow each other: where the first is, and how many; moves to uniform registers, and shuffles."""

    at: int
    products: int
    moves: int
    shuffles: int


def functions(sass: str) -> Iterator[tuple[str, list[str]]]:
    """Names and instructions of the functions in what ``cuobjdump -sass`` prints."""
    for text in re.split(r"\n\s*Function : ", sass)[1:]:
        name = text.splitlines()[0].strip()
        yield name, [match.strip() for match in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);\s+/\*", text)]


def runs(instructions: Sequence[str]) -> list[Run]:
    """Runs of products that begin with one that adds to nothing, and what follows it."""
    is_product = ["HGMMA" in text for text in instructions]
    found = []
    for at, text in enumerate(instructions):
        if not (is_product[at] and "RZ, !UPT" in text):
            continue
        last = at
        for i in range(at + 1, len(instructions)):
            if is_product[i]:
                last = i
            elif i - last >= APART:
                break
        span = instructions[max(at - BEFORE, 0) : last + 1]
        counts = (sum(word in text for text in span) for word in ("HGMMA", "R2UR", "SHFL.IDX"))
        found.append(Run(at, *counts))
    return found


def main(files: list[Path], cuobjdump: str = "cuobjdump") -> None:
    """Print it for the kernels with products in FILES; exit with 1 if one of them uses local memory."""
    spills = 0
    for file in files:
        sass = subprocess.run([cuobjdump, "-sass", str(file)], check=True, capture_output=True, text=True).stdout
        for name, instructions in functions(sass):
            local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in instructions)
            found = runs(instructions)
            if not found:
                continue
            products = sum("HGMMA" in text for text in instructions)
            print(
                f"{file.name} {name}\n  {len(instructions)} instructions, {products} products, {local} local accesses"
            )
            for run in found:
                print(f"  at {run.at:5d}: {run.products:3d} products, {run.moves:3d} R2UR, {run.shuffles} SHFL.IDX")
            spills += local
    raise SystemExit(1 if spills else 0)


if __name__ == "__main__":
    typer.run(main)
