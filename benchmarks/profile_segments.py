"""Where a kernel's time goes, by segments of its machine code, from Nsight Compute's samples.

    ncu --section SourceCounters --warp-sampling-interval 0 -k regex:attention_kernel -c 1 -o profile python CASE.py
    ncu -i profile.ncu-rep --page source --csv --print-units base > source.csv
    python benchmarks/profile_segments.py source.csv --cycles CYCLES --first I --last J

CYCLES: of the kernel. I and J: instructions between which one role's code lies, for a kernel whose warps have roles;
such code begins at a USETMAXREG, and these are named. A segment is a run of instructions that are executed alike often,
between products, barriers, shuffles and the like. Of each are printed: how often a warp of the role executes it, the
clocks that a warp spends there in all and each time, and why it waits.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

BOUNDARIES = (
    "HGMMA",
    "WARPGROUP",
    "SYNCS",
    "WARPSYNC",
    "STSM",
    "UTMA",
    "REDUX",
    "BSYNC",
    "VOTE",
    "SHFL",
    "EXIT",
    "MEMBAR",
)
SAMPLES, EXECUTED = "Warp Stall Sampling (All Samples)", "Instructions Executed"


@dataclass
class Segment:
    """Instructions ``first`` to before ``end``: how often executed, samples, and samples by reason."""

    first: int
    end: int
    executed: float
    samples: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def instructions(lines: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The rows of ncu's source page, after its header."""
    header = next(i for i, line in enumerate(lines) if "Source" in line)
    return [dict(zip(lines[header], line, strict=False)) for line in lines[header + 1 :]]


def segments(code: Sequence[dict[str, str]], first: int, last: int) -> list[Segment]:
    found: list[Segment] = []
    for i in range(first, last):
        row = code[i]
        executed = number(row[EXECUTED])
        if not found or executed != found[-1].executed or any(word in row["Source"] for word in BOUNDARIES):
            found.append(Segment(i, i, executed))
        segment = found[-1]
        segment.end = i + 1
        segment.samples += number(row[SAMPLES])
        for key, value in row.items():
            if key.startswith("stall_") and "(" not in key and number(value):
                segment.reasons[key.removeprefix("stall_")] += number(value)
    return found


def main(
    source: Path,
    cycles: Annotated[float, typer.Option()],
    first: int = 0,
    last: int = -1,
    warps: int = 8,
    sms: int = 132,
    least: float = 0.001,
) -> None:
    """Print the segments that take at least LEAST of the time. WARPS: of an SM, in the role."""
    with source.open(newline="") as file:
        code = instructions(list(csv.reader(file)))
    for i, row in enumerate(code):
        if "USETMAXREG" in row["Source"]:
            print(f"{i}: {row['Source'].strip()}")
    found = segments(code, first, len(code) if last < 0 else last)
    total = sum(segment.samples for segment in found)
    for segment in found:
        clocks, times = segment.samples / total * cycles, segment.executed / (warps * sms)
        if clocks < least * cycles:
            continue
        each = clocks / times if times else 0.0
        reasons = " ".join(f"{name}:{n / segment.samples:.0%}" for name, n in segment.reasons.most_common(3))
        begins = code[segment.first]["Source"].strip()
        place = f"{segment.first:5d}-{segment.end:5d}"
        print(f"{place} {times:8.2f} times {clocks:9.0f} clocks {each:8.1f} each  {reasons}  | {begins}")


if __name__ == "__main__":
    typer.run(main)
