"""Speed of attention at the head dims of MLA (192, 128), dense and over top-k token masks; the suite 'mmha'.

bfloat16, batch 1, causal, as many KV heads as query heads (un-absorbed MLA), 128 of them where an id does not say,
top-k sets of 2048 keys. Nothing is timed before sampled tiles of its output were held against float32. Run by
gpu_check.py, or by hand: ``PYTHONPATH=python python benchmarks/masked_mha.py [--output FILE]``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention as base
import bsfa
import report
from report import measurement
from timing import Work, interleaved

Row = dict[str, Any]
Call = Callable[[], object]

DEVICE = "cuda"
K = 1024  # tokens of "1k"
DIM, DIM_V, DIM_ROPE, LATENT = 192, 128, 64, 512
TOPK = 2048
HEADS = (16, 128)  # of a GPU with an eighth of a model's heads, and with all of them
CROSSOVER_HEADS, CROSSOVER_KILO = (16, 32, 64, 128), (4, 8, 16, 32)
GATHERED = 512  # queries whose keys the baseline gathers at a time: 1.2 GB
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION}
TOLERANCE = 0.01

#: What the project asks of these measurements: at least, or at most.
DEMANDED: dict[str, tuple[str, float]] = {
    **{f"mla.dense.{kilo}k.h{heads}.x_cudnn": (">=", 1.0) for kilo in (8, 32) for heads in (16, 128)},
    "mla.dense.32k.h128.tflops": (">=", 600.0),
    **{f"mmha.{kilo}k.x_dense": ("<=", 1.15) for kilo in (4, 8, 16)},
    "mmha.8k.x_sdpa_mask": (">=", 3.0),
    "mmha.build.16k.ms": ("<=", 0.5),
}


# --- inputs -----------------------------------------------------------------------------------------------------------


def random_inputs(length: int, heads: int) -> base.Inputs:
    """q, k, v [1, length, heads, dim]."""
    q, k, v = (torch.randn(1, length, heads, d, dtype=torch.bfloat16, device=DEVICE) for d in (DIM, DIM, DIM_V))
    return q, k, v


def random_sets(length: int) -> Tensor:
    """TOPK of the keys that each query may see, at random, unsorted; all and -1 where there are fewer."""
    keys = torch.arange(length, device=DEVICE)
    found = torch.full((1, length, TOPK), -1, dtype=torch.int32, device=DEVICE)
    step = 2 * K
    for first in range(0, length, step):
        rows = keys[first : first + step, None]
        scores = torch.rand(len(rows), length, device=DEVICE).masked_fill_(keys > rows, -1.0)
        best = scores.topk(min(TOPK, length), sorted=False)
        found[0, first : first + step, : best.indices.shape[1]] = torch.where(best.values >= 0, best.indices, -1)
    return found


def local_sets(length: int) -> Tensor:
    """Three quarters of the keys just before the query, the rest in four spans that the queries of a tile share."""
    near, span = TOPK * 3 // 4, TOPK // 16
    position = torch.arange(length, device=DEVICE)[:, None]
    tile = torch.arange(length, device=DEVICE) // base.BLOCK
    starts = (torch.rand(int(tile[-1]) + 1, 4, device=DEVICE)[tile] * position).long()
    spans = (starts[:, :, None] + torch.arange(span, device=DEVICE)).flatten(1)
    keys = torch.cat([position - torch.arange(near, device=DEVICE), spans], 1)
    return torch.where((keys >= 0) & (keys <= position), keys, -1).to(torch.int32)[None]


def verify(what: str, out: Tensor, inputs: base.Inputs, tokens: bsfa.TokenMask | None = None) -> None:
    """Raise unless ``out`` is finite, and four of its tiles equal softmax attention in float32."""
    if not bool(out.isfinite().all()):
        raise AssertionError(f"{what}: the output is not finite")
    q, k, v = inputs
    length, heads = q.shape[1], q.shape[2]
    tiles = -(-length // base.BLOCK)
    for i in range(4):
        tile, head = i * (tiles - 1) // 3, i * (heads - 1) // 3
        first, end = tile * base.BLOCK, min((tile + 1) * base.BLOCK, length)
        seen = torch.arange(length, device=DEVICE) <= torch.arange(first, end, device=DEVICE)[:, None]
        if tokens is not None:
            bits = tokens.words[0, first:end, :, None] >> torch.arange(32, dtype=torch.int32, device=DEVICE) & 1
            seen &= bits.flatten(1)[:, :length].bool()
        scores = q[0, first:end, head].float() @ k[0, :, head].float().T / math.sqrt(DIM)
        wanted = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[0, :, head].float()
        error = float((out[0, first:end, head].float() - wanted).norm() / wanted.norm())
        if not error < TOLERANCE:
            raise AssertionError(f"{what}: tile {tile} of head {head} is off by {error:.3g} of its norm")


# --- what is timed ----------------------------------------------------------------------------------------------------


def dense_call(inputs: base.Inputs) -> Call:
    return lambda: bsfa.attention(*inputs)


def masked_call(inputs: base.Inputs, tokens: bsfa.TokenMask) -> Call:
    return lambda: bsfa.block_sparse_attention(*inputs, None, tokens=tokens)[0]


def build_call(indices: Tensor) -> Call:
    return lambda: bsfa.TokenMask.from_indices(indices, seqlen_k=indices.shape[1], check=False)


def sdpa_call(inputs: base.Inputs, backend: SDPBackend | None = None, mask: Tensor | None = None) -> Call:
    """torch's SDPA over the same memory; with a bool mask [Sq, Sk], by the backend that torch chooses."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)

    def call() -> Tensor:
        if backend is None:
            return attend(attn_mask=mask)
        with sdpa_kernel(backend):
            return attend(is_causal=True)

    return call


def runs(name: str, call: Call) -> bool:
    """Whether a peer takes the shape; says so where it does not."""
    try:
        call()
        return True
    except RuntimeError as error:
        print(f"{name} is left out: {str(error).splitlines()[0][:200]}", flush=True)
        return False


def gather_call(length: int, heads: int, indices: Tensor) -> Call:
    """The absorbed form in torch: each query's TOPK latent rows are gathered, and shared by its heads."""
    dim = LATENT + DIM_ROPE
    q = torch.randn(length, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    latent = torch.randn(length, dim, dtype=torch.bfloat16, device=DEVICE)
    hidden = indices[0] < 0
    rows = indices[0].clamp(min=0)
    out = torch.empty(length, heads, LATENT, dtype=torch.bfloat16, device=DEVICE)

    def call() -> Tensor:
        for first in range(0, length, GATHERED):
            part = slice(first, first + GATHERED)
            keys = latent[rows[part]]  # [queries, TOPK, dim]
            scores = torch.bmm(q[part], keys.transpose(1, 2)) / math.sqrt(DIM)
            weights = scores.masked_fill_(hidden[part, None], -math.inf).softmax(-1)
            torch.bmm(weights, keys[..., :LATENT], out=out[part])
        return out

    return call


def take_turns(length: int, peers: dict[str, Call], shares: dict[str, float] | None = None) -> base.Turns:
    return base.take_turns(length, {name: [call] for name, call in peers.items()}, shares)


def tflops(length: int, heads: int, ms: float) -> float:
    """Of causal attention: half of the multiplications of the full square."""
    return 2 * heads * length * length * (DIM + DIM_V) / 2 / ms / 1e9


def row(turns: base.Turns, id_: str, value: float, unit: str, **peers: float) -> Row:
    return measurement(id_, value, unit, turns.n, turns.clock_mhz, peers)


# --- sections ---------------------------------------------------------------------------------------------------------


def dense() -> list[Row]:
    """Dense causal attention against cuDNN's."""
    rows = []
    for kilo in (8, 32):
        for heads in HEADS:
            length, name = kilo * K, f"mla.dense.{kilo}k.h{heads}"
            inputs = random_inputs(length, heads)
            verify(name, bsfa.attention(*inputs), inputs)  # type: ignore[arg-type]
            peers = {"bsfa": dense_call(inputs)}
            for peer, backend in PEERS.items():
                call = sdpa_call(inputs, backend)
                if runs(f"{peer} at {name}", call):
                    peers[peer] = call
            turns = take_turns(length, peers)
            ms = turns.ms
            others = {f"{peer}_ms": ms[peer] for peer in PEERS if peer in ms}
            rows.append(row(turns, f"{name}.ms", ms["bsfa"], "ms", **others))
            rows.append(row(turns, f"{name}.tflops", tflops(length, heads, ms["bsfa"]), "TFLOP/s", **others))
            for peer in PEERS:
                if peer in ms:
                    rows.append(row(turns, f"{name}.x_{peer}", ms[peer] / ms["bsfa"], "speed-up", **others))
            del inputs, peers
    return rows


def masked() -> list[Row]:
    """Random sets, which leave no block empty, and local ones, against our own dense attention; a bool mask of SDPA."""
    rows = []
    for kilo in (4, 8, 16):
        length = kilo * K
        sets = {"": random_sets(length), "local.": local_sets(length)}
        masks = {kind: bsfa.TokenMask.from_indices(x, seqlen_k=length, check=True) for kind, x in sets.items()}
        density = {kind: float(mask.blocks.density()) for kind, mask in masks.items()}
        for heads in HEADS:
            inputs = random_inputs(length, heads)
            named = f"mmha.{kilo}k." if heads == HEADS[-1] else f"mmha.{kilo}k.h{heads}."
            peers, shares = {"dense": dense_call(inputs)}, {}
            for kind, mask in masks.items():
                call = peers[f"{kind}masked"] = masked_call(inputs, mask)
                verify(f"{named}{kind}", call(), inputs, mask)  # type: ignore[arg-type]
            if kilo == 8 and heads == HEADS[-1]:
                peers["sdpa_mask"] = sdpa_call(inputs, mask=masks[""].to_bool()[0])
                shares["sdpa_mask"] = 8.0  # long enough for one call a turn
            turns = take_turns(length, peers, shares)
            ms = turns.ms
            for kind in masks:
                facts = {"dense_ms": ms["dense"], "masked_ms": ms[f"{kind}masked"], "density": density[kind]}
                ratio = ms[f"{kind}masked"] / ms["dense"]
                rows.append(row(turns, f"{named}{kind}x_dense", ratio, "ratio", **facts))
                if kind:
                    rows.append(row(turns, f"{named}{kind}efficiency", density[kind] / ratio, "fraction", **facts))
            if "sdpa_mask" in ms:
                facts = {"sdpa_mask_ms": ms["sdpa_mask"], "masked_ms": ms["masked"]}
                rows.append(row(turns, f"{named}x_sdpa_mask", ms["sdpa_mask"] / ms["masked"], "speed-up", **facts))
            del inputs, peers
    return rows


def build() -> list[Row]:
    """Token mask and block mask from indices: one operator, from memory that is larger than any L2."""
    rows = []
    for kilo in (4, 16):
        length = kilo * K
        peers = {"": build_call(random_sets(length)), "local.": build_call(local_sets(length))}
        turns = take_turns(length, peers)
        traffic = 4 * length * (TOPK + -(-length // 128) * 4) / 1e6  # MB: indices read, words written
        for kind, ms in turns.ms.items():
            rows.append(row(turns, f"mmha.build.{kilo}k.{kind}ms", ms, "ms", gbps=traffic / ms))
    return rows


def crossover() -> list[Row]:
    """Masked, with the mask's building, against gathering the chosen latent rows: attention alone, no projections."""
    rows = []
    for kilo in CROSSOVER_KILO:
        length = kilo * K
        indices = random_sets(length)
        for heads in CROSSOVER_HEADS:
            inputs = random_inputs(length, heads)
            make = build_call(indices)

            def call(inputs: base.Inputs = inputs, make: Call = make) -> object:
                return masked_call(inputs, make())()  # type: ignore[arg-type]

            works = {
                "masked": Work(call),
                "gather": Work(gather_call(length, heads, indices), eager=True),  # long calls: gaps do not count
            }
            timings, clock = interleaved(works, rounds=10, warmup=1)
            ms = {name: t.us / 1e3 for name, t in timings.items()}
            facts = {f"{name}_ms": value for name, value in ms.items()}
            turns = base.Turns(ms, min(t.n for t in timings.values()), clock)
            speedup = ms["gather"] / ms["masked"]
            rows.append(row(turns, f"mmha.cross.{kilo}k.h{heads}.x_gather", speedup, "speed-up", **facts))
            del inputs, works
    return rows


@torch.no_grad()
def run() -> list[Row]:
    """All measurements of this suite."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for section in (dense, masked, build, crossover):
        started = time.monotonic()
        rows += section()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        print(f"{section.__name__}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    report.suite_main(__doc__, run, DEMANDED)
