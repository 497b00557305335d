"""Puts measured results between README.md's markers, so that no number there is written by hand.

    python benchmarks/readme.py            # rewrite README.md
    python benchmarks/readme.py --check    # exit with 1 if README.md is not what the results say

Sources: benchmarks/results/demo.txt (printed by examples/demo.py), cpu.json and h200.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from report import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def _load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    report = json.loads((RESULTS / name).read_text())
    return report, {m["id"]: m for m in report["measurements"]}


def demo() -> str:
    """The demo's own output."""
    return "```text\n" + (RESULTS / "demo.txt").read_text().rstrip() + "\n```"


def benchmarks() -> str:
    """One paragraph per machine."""
    cpu, c = _load("cpu.json")
    h200, g = _load("h200.json")
    machine = cpu["machine"]
    rows = [
        f"Measured on a CPU ({machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, torch "
        f"{machine['torch']}; 8 query and 2 KV heads, head_dim 64, causal, 16K tokens; `make bench-cpu`):",
        "",
        "| | torch SDPA | bsfa dense | | bsfa, 10 % of the blocks | |",
        "|---|---|---|---|---|---|",
    ]
    for dtype, name in (("f32", "float32"), ("bf16", "bfloat16")):
        dense, sparse = c[f"cpu.dense.16k.{dtype}.ms"], c[f"cpu.sparse10.16k.{dtype}.ms"]
        over = c[f"cpu.dense.16k.{dtype}.time_over_sdpa"]["value"]
        faster = c[f"cpu.sparse10.16k.{dtype}.x_sdpa"]["value"]
        rows.append(
            f"| {name} | {dense['peers']['sdpa_ms']:.0f} ms | {dense['value']:.0f} ms | {over:.2f}x the time | "
            f"{sparse['value']:.0f} ms | {faster:.1f}x faster |"
        )
    pool, paged = g["pool.64k.copy_fraction"], g["pool.paged16.64k.copy_fraction"]
    rows += [
        "",
        f"On one {h200['device']['name']} (torch {h200['device']['torch']}; `make gpu-check`), `pool_blocks` over 64K "
        f"tokens, 8 KV heads, head_dim 128, bfloat16 takes {g['pool.64k.us']['value']:.1f} us: {pool['value']:.0%} of "
        f"the bandwidth of a device copy, and {paged['value']:.0%} with pages of 16 tokens. There "
        f"{h200['tests']['passed']} GPU tests passed, {h200['tests']['failed']} failed, and compute-sanitizer found "
        f"{sum(v or 0 for v in h200['sanitizer'].values())} errors.",
    ]
    return "\n".join(rows)


def filled(text: str) -> str:
    """README.md with both marked places replaced."""
    for name, content in (("demo", demo()), ("benchmarks", benchmarks())):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"README.md must have exactly one place marked '{name}', it has {count}")
    return text


def main() -> None:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text()
    wanted = filled(text)
    if check and text != wanted:
        sys.exit("README.md does not say what benchmarks/results/ says: run python benchmarks/readme.py")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
