"""Speed of pool_blocks: the fraction of the device's copy bandwidth that it reaches.

Run by gpu_check.py, or by hand: ``PYTHONPATH=python python benchmarks/pool.py [--output FILE]``.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

import bsfa
from report import measurement, write_json
from timing import Work, interleaved

BLOCK_N = 128
BUFFERS = 8  # K tensors in turn: together far larger than L2
LAUNCHES = 40  # per sample


def _random_k(seqlen: int, heads: int, dim: int) -> list[torch.Tensor]:
    return [torch.randn(1, seqlen, heads, dim, device="cuda").to(torch.bfloat16) for _ in range(BUFFERS)]


def _in_turn(call: Any, inputs: list[torch.Tensor]) -> Work:
    def body() -> None:
        for i in range(LAUNCHES):
            call(inputs[i % len(inputs)])

    return Work(body, LAUNCHES)


def _pool_peers(ks: list[torch.Tensor], page_sizes: tuple[int, ...]) -> dict[str, Work]:
    _, seqlen, heads, dim = ks[0].shape
    peers = {"contiguous": _in_turn(bsfa.pool_blocks, ks)}
    for page_size in page_sizes:
        pages = seqlen // page_size
        table = torch.randperm(pages, device="cuda").to(torch.int32)[None]
        seqlens = torch.tensor([seqlen], dtype=torch.int32, device="cuda")

        def paged(k: torch.Tensor, page_size: int = page_size, table: Any = table, seqlens: Any = seqlens) -> None:
            pool = k.view(-1, page_size, *k.shape[2:])
            bsfa.pool_blocks(pool, block_table=table, seqlens_k=seqlens, max_seqlen_k=k.shape[1])

        peers[f"paged{page_size}"] = _in_turn(paged, ks)
    peers["torch_mean"] = _in_turn(lambda k: k.view(1, -1, BLOCK_N, heads, dim).mean(2), ks)
    return peers


def _copies(ks: list[torch.Tensor]) -> tuple[dict[str, Work], dict[str, int]]:
    """Ways to copy device memory, and the bytes that each reads and writes; the fastest is the device's bandwidth.

    A driver copy and an elementwise kernel over 2 GiB, and driver copies as large as what pool_blocks moves.
    """
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    halves = [k.flatten().chunk(2) for k in ks]
    works = {
        "memcpy_2gib": Work(functools.partial(target.copy_, source), eager=True),
        "kernel_2gib": Work(functools.partial(torch.mul, source, 1.0, out=target)),
        "memcpy_64mib": Work(lambda: [halves[i % len(ks)][0].copy_(halves[i % len(ks)][1]) for i in range(40)], 40),
    }
    large, small = 2 * source.numel() * 4, 2 * halves[0][0].numel() * 2
    return works, {"memcpy_2gib": large, "kernel_2gib": large, "memcpy_64mib": small}


def run() -> list[dict[str, Any]]:
    """All measurements of this suite."""
    torch.manual_seed(0)
    results = []

    ks = _random_k(65536, 8, 128)
    copies, copied_bytes = _copies(ks)
    timings, clock = interleaved({**copies, **_pool_peers(ks, (1, 16, 128))})
    copy_gbps = max(copied_bytes[name] / timings[name].us / 1e3 for name in copies)
    moved = ks[0].numel() * 2 * (1 + 1 / BLOCK_N)  # K once, the means once
    shared = {"copy_gbps": copy_gbps, "torch_mean_ms": timings["torch_mean"].us / 1e3}
    for peer, name in (("contiguous", "pool.64k"), *((f"paged{p}", f"pool.paged{p}.64k") for p in (1, 16, 128))):
        t = timings[peer]
        results.append(measurement(f"{name}.us", t.us, "us", t.n, clock, shared))
        fraction = moved / t.us / 1e3 / copy_gbps
        results.append(measurement(f"{name}.copy_fraction", fraction, "fraction", t.n, clock, shared))
    del copies

    ks = _random_k(8192, 8, 128)
    timings, clock = interleaved(_pool_peers(ks, (16,)))
    shared = {"torch_mean_ms": timings["torch_mean"].us / 1e3}
    for peer, name in (("contiguous", "pool.8k.us"), ("paged16", "pool.paged16.8k.us")):
        results.append(measurement(name, timings[peer].us, "us", timings[peer].n, clock, shared))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    found = run()
    print(json.dumps(found, indent=2))
    if output is not None:
        write_json(output, found)
