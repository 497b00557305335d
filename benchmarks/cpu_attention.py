"""CPU attention against torch's scaled_dot_product_attention on the same machine: writes benchmarks/results/cpu.json.

Batch 1, 8 query heads, 2 KV heads, head_dim 64, causal, 16K tokens, float32 and bfloat16, fresh random normal data.
The peers run interleaved in one process (A B A B ...); medians of whole calls. The sparse mask keeps a random 10 % of
the visible 128 x 128 blocks, always with the diagonal.

    python benchmarks/cpu_attention.py [--seqlen 16384] [--repeats 10] [--output FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bsfa
from report import ROOT, TREES, measurement, tree_hash, write_json

HEADS_Q, HEADS_KV, HEAD_DIM, BLOCK = 8, 2, 64, 128


def random_mask(seqlen: int, density: float) -> bsfa.BlockMask:
    """A random share ``density`` of the visible blocks, diagonal included."""
    tiles = -(-seqlen // BLOCK)
    diagonal = torch.eye(tiles, dtype=torch.bool)
    off_diagonal = torch.ones(tiles, tiles, dtype=torch.bool).tril(-1)
    share = (density * (off_diagonal.sum() + tiles) - tiles) / off_diagonal.sum()
    kept = (torch.rand(1, HEADS_Q, tiles, tiles) < share) & off_diagonal | diagonal
    return bsfa.BlockMask.from_bool(kept, seqlen_q=seqlen, seqlen_k=seqlen, block_m=BLOCK, block_n=BLOCK)


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def measure(dtype: torch.dtype, seqlen: int, repeats: int) -> list[dict[str, Any]]:
    """Dense and 10 % sparse against SDPA for one dtype."""
    q = torch.randn(1, seqlen, HEADS_Q, HEAD_DIM).to(dtype)
    k, v = (torch.randn(1, seqlen, HEADS_KV, HEAD_DIM).to(dtype) for _ in range(2))
    mask = random_mask(seqlen, 0.10)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    seconds = interleaved(
        {
            "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=True
            ),
            "dense": lambda: bsfa.attention(q, k, v),
            "sparse": lambda: bsfa.block_sparse_attention(q, k, v, mask),
        },
        repeats,
    )
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    size = f"{seqlen // 1024}k"
    peers = {"sdpa_ms": seconds["sdpa"] * 1e3}
    flops = 4 * HEADS_Q * seqlen * seqlen * HEAD_DIM / 2
    rows = [
        (f"cpu.dense.{size}.{name}.ms", seconds["dense"] * 1e3, "ms"),
        (f"cpu.dense.{size}.{name}.gflops", flops / seconds["dense"] / 1e9, "GFLOP/s"),
        (f"cpu.dense.{size}.{name}.time_over_sdpa", seconds["dense"] / seconds["sdpa"], "ratio"),
        (f"cpu.sparse10.{size}.{name}.ms", seconds["sparse"] * 1e3, "ms"),
        (f"cpu.sparse10.{size}.{name}.density", float(mask.density()), "ratio"),
        (f"cpu.sparse10.{size}.{name}.x_sdpa", seconds["sdpa"] / seconds["sparse"], "speed-up"),
    ]
    return [measurement(id_, value, unit, repeats, None, peers) for id_, value, unit in rows]


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype, arguments.seqlen, arguments.repeats)
    ]
    facts = bsfa.doctor()
    report = {
        "schema": 1,
        "tree": {folder: tree_hash(folder) for folder in TREES},
        "machine": {
            **{key: facts["machine"][key] for key in ("cpu", "threads", "torch")},
            "instruction_set": facts["build"]["cpu_instruction_set"],
        },
        "measurements": rows,
    }
    for row in rows:
        print(f"{row['id']:<40} {row['value']:>10.4g} {row['unit']:<9} (sdpa {row['peers']['sdpa_ms']:.4g} ms)")
    write_json(arguments.output, report)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
