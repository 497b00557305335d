"""Speed of attention, dense and block-sparse, against torch's kernels in the same process.

bfloat16, batch 1, 32 query and 8 KV heads, causal, random normal data. Before anything is timed its output is checked:
finite everywhere, and sampled tiles equal to attention in float32. Run by gpu_check.py, or by hand:
``PYTHONPATH=python python benchmarks/attention.py [--output FILE]``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

import bsfa
import report
from report import measurement
from timing import Work, interleaved

HEADS_Q, HEADS_KV, BLOCK = 32, 8, 128
K = 1024  # tokens of "1k"
DEVICE = "cuda"
L2_BYTES = 128 << 20  # inputs and outputs of a sample's calls together are larger than any L2
# Their order is that of even rounds; odd rounds go backwards.
SDPA = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
MIN_SHARE = 0.02  # see take_turns
TOLERANCE = 0.01  # |out - reference| / |reference| of a tile; bfloat16 gives 0.003, a block too few at 256K 0.02

Inputs = tuple[Tensor, Tensor, Tensor]
Row = dict[str, Any]

#: What the project asks of these measurements: at least, or at most.
DEMANDED: dict[str, tuple[str, float]] = {
    **{f"attn.dense.d128.{size}.x_cudnn": (">=", 1.13) for size in ("16k", "64k", "128k")},
    **{f"attn.dense.d128.{size}.x_fa2": (">=", 1.9) for size in ("16k", "64k", "128k")},
    "attn.dense.d128.4k.x_cudnn": (">=", 1.0),
    "attn.dense.d64.16k.x_cudnn": (">=", 1.1),
    "attn.sparse10.16k.efficiency": (">=", 0.82),
    "attn.sparse10.64k.efficiency": (">=", 0.93),
    "attn.sparse10.128k.efficiency": (">=", 0.93),
    "attn.sparse5.128k.efficiency": (">=", 0.90),
    "attn.sparse5.256k.efficiency": (">=", 0.90),
    **{f"attn.sweep.density.64k.d{percent}.efficiency": (">=", 0.93) for percent in (10, 20, 40, 70)},
    # FlashAttention-4's block-sparse path, as published, over contiguous keys.
    **{f"attn.{keys}sparse10.16k.ms": ("<=", 0.43) for keys in ("", "paged16.", "paged128.")},
    **{f"attn.{keys}sparse10.128k.ms": ("<=", 24.2) for keys in ("", "paged16.", "paged128.")},
    "attn.skew.half.x_uniform": ("<=", 1.08),
    "attn.skew.one.x_uniform": ("<=", 1.08),
    **{
        f"attn.paged{page_size}.{kind}.x_contiguous": ("<=", most)
        for page_size, most in ((16, 1.08), (64, 1.04), (128, 1.03))
        for kind in ("dense", "sparse10")
    },
    "attn.launch.1k.us": ("<=", 15.0),
}


# --- inputs -----------------------------------------------------------------------------------------------------------


def random_inputs(length: int, dim: int = 128) -> Inputs:
    """q, k, v [1, length, heads, dim]."""
    shapes = ((1, length, heads, dim) for heads in (HEADS_Q, HEADS_KV, HEADS_KV))
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for shape in shapes)
    return q, k, v


def random_mask(length: int, densities: float | Sequence[float]) -> bsfa.BlockMask:
    """A random share of the visible blocks (of each query head), always with the diagonal and the sink block."""
    per_head = [densities] * HEADS_Q if isinstance(densities, float) else densities
    tiles = -(-length // BLOCK)
    visible = torch.ones(tiles, tiles, dtype=torch.bool, device=DEVICE).tril()
    forced = torch.eye(tiles, dtype=torch.bool, device=DEVICE)
    forced[:, 0] = True
    num_visible, num_forced = tiles * (tiles + 1) // 2, 2 * tiles - 1
    kept = torch.empty(1, len(per_head), tiles, tiles, dtype=torch.bool, device=DEVICE)
    for head, density in enumerate(per_head):
        share = (density * num_visible - num_forced) / max(num_visible - num_forced, 1)
        kept[0, head] = (torch.rand(tiles, tiles, device=DEVICE) < share) & visible | forced
    return bsfa.BlockMask.from_bool(kept, seqlen_q=length, seqlen_k=length, block_m=BLOCK, block_n=BLOCK)


def verify(what: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: bsfa.BlockMask | None = None) -> None:
    """Raise unless ``out`` is finite, and four of its tiles equal softmax attention in float32."""
    if not bool(out.isfinite().all()):
        raise AssertionError(f"{what}: the output is not finite")
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    tiles = -(-length // BLOCK)
    kept = None if mask is None else mask.to_rows()
    for i in range(4):
        tile, head = i * (tiles - 1) // 3, i * (HEADS_Q - 1) // 3
        first, end = tile * BLOCK, min((tile + 1) * BLOCK, length)
        seen = torch.arange(end, device=DEVICE) <= torch.arange(first, end, device=DEVICE)[:, None]
        if kept is not None:
            seen = seen & kept[tile, head * kept.shape[1] // q.shape[2]].repeat_interleave(BLOCK)[:end]
        keys, values = (x[0, :end, head // group].float() for x in (k, v))
        scores = q[0, first:end, head].float() @ keys.T / math.sqrt(q.shape[3])
        wanted = scores.masked_fill(~seen, -math.inf).softmax(-1) @ values
        error = float((out[0, first:end, head].float() - wanted).norm() / wanted.norm())
        if not error < TOLERANCE:
            raise AssertionError(f"{what}: tile {tile} of head {head} is off by {error:.3g} of its norm")


# --- peers ------------------------------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """torch's SDPA over the same memory: heads become the second dimension by a view, GQA is the backend's own."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return call


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention, dynamic=False)


def flex_call(inputs: Inputs, mask: bsfa.BlockMask) -> Callable[[], Tensor] | None:
    """flex_attention over the mask's blocks, compiled once per shape; None (with a word) if it does not run here."""
    m = mask.to_flex()
    # Its own mask_mod asks the mask again for every token; inside kept blocks causality is all there is to ask.
    blocks = flex.BlockMask.from_kv_blocks(
        m.kv_num_blocks,
        m.kv_indices,
        m.full_kv_num_blocks,
        m.full_kv_indices,
        BLOCK_SIZE=m.BLOCK_SIZE,
        mask_mod=causal,
        seq_lengths=m.seq_lengths,
    )
    heads_first = [x.transpose(1, 2) for x in inputs]

    def call() -> Tensor:
        return compiled_flex()(*heads_first, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    try:
        verify("flex_attention", call(), *inputs, mask)
    except Exception as error:
        print(f"flex_attention is left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None
    return call


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """Peers that took turns: median ms of a call, samples each, SM clock; cycles of a call, where they were counted."""

    ms: dict[str, float]
    n: int
    clock_mhz: int | None
    cycles: Mapping[str, float] = field(default_factory=dict)

    def row(self, id_: str, value: float, unit: str, **peers: float) -> Row:
        return measurement(f"attn.{id_}", value, unit, self.n, self.clock_mhz, peers)


def repeated(calls: Sequence[Callable[[], object]], launches: int, **how: Any) -> Work:
    """``launches`` calls, taking ``calls`` in turn; ``how``: as for :class:`Work`."""

    def body() -> None:
        for i in range(launches):
            calls[i % len(calls)]()

    return Work(body, launches, **how)


def take_turns(
    length: int,
    peers: Mapping[str, Sequence[Callable[[], object]]],
    shares: Mapping[str, float] | None = None,
    in_cycles: bool = False,
) -> Turns:
    """Time peers, each given as calls over its buffers, at ``length`` tokens.

    shares: what a call of a peer takes of the longest one's time, where that is much less: it is then called as many
    times more in its turn. A short piece of work right after a long one would be timed at the clock that the long one
    leaves, which is not its own.
    in_cycles: cycles are counted as well.
    """
    launches = min(max(64 * K // length, 1), 40)
    long = length >= 128 * K
    share = shares or {}
    works = {
        name: repeated(calls, max(round(launches / share.get(name, 1.0)), 1), in_cycles=in_cycles)
        for name, calls in peers.items()
    }
    timings, clock = interleaved(works, rounds=10 if long else 15, warmup=1 if long else 3)
    cycles = {name: t.cycles for name, t in timings.items() if t.cycles is not None}
    return Turns({name: t.us / 1e3 for name, t in timings.items()}, min(t.n for t in timings.values()), clock, cycles)


def tflops(length: int, dim: int, ms: float) -> float:
    """Of causal attention: half of the multiplications of the full square."""
    return 4 * HEADS_Q * length * length * dim / 2 / ms / 1e9


def dense_call(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    return lambda: bsfa.attention(q, k, v)  # type: ignore[return-value]


def sparse_call(q: Tensor, k: Tensor, v: Tensor, mask: bsfa.BlockMask) -> Callable[[], Tensor]:
    return lambda: bsfa.block_sparse_attention(q, k, v, mask)[0]


# --- sections ---------------------------------------------------------------------------------------------------------


def dense() -> list[Row]:
    """Dense attention against cuDNN's and FlashAttention-2's."""
    rows = []
    for kilo in (1, 2, 4, 8, 16, 32, 64, 128):
        turns = dense_turns(kilo * K, 128)
        speed = {name: tflops(kilo * K, 128, ms) for name, ms in turns.ms.items()}
        peers = {f"{name}_tflops": speed[name] for name in SDPA}
        rows.append(turns.row(f"sweep.dense.{kilo}k.tflops", speed["bsfa"], "TFLOP/s", **peers))
        if kilo in (4, 16, 64, 128):
            rows += dense_rows(turns, kilo, 128)
    return rows + dense_rows(dense_turns(16 * K, 64), 16, 64)


def dense_turns(length: int, dim: int) -> Turns:
    bytes_per_call = 2 * 2 * (HEADS_Q + HEADS_KV) * length * dim
    buffers = [random_inputs(length, dim) for _ in range(-(-L2_BYTES // bytes_per_call))]
    what = f"dense, {length} tokens, head_dim {dim}"
    out = dense_call(*buffers[0])()
    verify(what, out, *buffers[0])
    if length == 16 * K:  # all of it, once
        wanted = sdpa(SDPA["fa2"])(*buffers[0]).float()
        if not float((out.float() - wanted).norm() / wanted.norm()) < TOLERANCE:
            raise AssertionError(f"{what}: differs from torch's SDPA")
    peers: dict[str, Sequence[Callable[[], object]]] = {"bsfa": [dense_call(*buffer) for buffer in buffers]}
    for name, backend in SDPA.items():
        peers[name] = [functools.partial(sdpa(backend), *buffer) for buffer in buffers]
    return take_turns(length, peers)


def dense_rows(turns: Turns, kilo: int, dim: int) -> list[Row]:
    name, ms = f"dense.d{dim}.{kilo}k", turns.ms
    peers = {f"{peer}_ms": ms[peer] for peer in SDPA}
    return [
        turns.row(f"{name}.ms", ms["bsfa"], "ms", **peers),
        turns.row(f"{name}.tflops", tflops(kilo * K, dim, ms["bsfa"]), "TFLOP/s", **peers),
        *(turns.row(f"{name}.x_{peer}", ms[peer] / ms["bsfa"], "speed-up", **peers) for peer in SDPA),
    ]


def sparse() -> list[Row]:
    """Block-sparse attention: how much of the time that its density promises over dense is really saved."""
    rows = []
    for kilo, percents, with_flex in ((16, (10,), True), (64, (10,), True), (128, (10, 5), False), (256, (5,), False)):
        rows += sparse_rows(f"sparse{{}}.{kilo}k", kilo * K, percents, with_flex)
    return rows


def density_sweep() -> list[Row]:
    """Efficiency against density at 64K."""
    return sparse_rows("sweep.density.64k.d{}", 64 * K, (2, 5, 10, 20, 40, 70, 100), with_flex=True)


def sparse_rows(name: str, length: int, percents: Sequence[int], with_flex: bool) -> list[Row]:
    """For each percentage of blocks, which goes into ``name``: efficiency, and ms.

    Each mask takes turns with dense attention alone: what draws less power, like flex_attention, leaves whoever comes
    next a higher clock. Peer ``in_cycles`` is the efficiency in cycles instead of time.
    """
    inputs = random_inputs(length)
    masks = {percent: random_mask(length, percent / 100) for percent in percents}
    flex_ms = flex_times(inputs, masks) if with_flex else {}
    rows = []
    for percent, mask in masks.items():
        call = sparse_call(*inputs, mask)
        verify(f"{percent} % of the blocks, {length} tokens", call(), *inputs, mask)
        peers_of = {"dense": [dense_call(*inputs)], "sparse": [call]}
        turns = take_turns(length, peers_of, {"sparse": max(percent / 100, MIN_SHARE)}, in_cycles=True)
        ms, density = turns.ms, float(mask.density())
        peers = {"dense_ms": ms["dense"], "density": density}
        if percent in flex_ms:
            peers |= {"flex_ms": flex_ms[percent], "flex_dense_ms": flex_ms[100]}
        for peer, cycles in turns.cycles.items():
            peers[f"{peer}_mhz"] = cycles / ms[peer] / 1e3
        if len(turns.cycles) == 2:
            peers["in_cycles"] = density * turns.cycles["dense"] / turns.cycles["sparse"]
        id_ = name.format(percent)
        rows.append(turns.row(f"{id_}.efficiency", density * ms["dense"] / ms["sparse"], "fraction", **peers))
        rows.append(turns.row(f"{id_}.ms", ms["sparse"], "ms", **peers))
    return rows


def flex_times(inputs: Inputs, masks: Mapping[int, bsfa.BlockMask]) -> dict[int, float]:
    """ms of flex_attention over the masks, by percentage, with 100 in any case; empty if it does not run here."""
    length = inputs[0].shape[1]
    calls = {}
    for percent in sorted({*masks, 100}):
        call = flex_call(inputs, masks.get(percent) or random_mask(length, percent / 100))
        if call is None:
            return {}
        calls[percent] = call
    peers = {str(percent): [call] for percent, call in calls.items()}
    turns = take_turns(length, peers, {str(percent): max(percent / 100, MIN_SHARE) for percent in calls})
    return {percent: turns.ms[str(percent)] for percent in calls}


def skew() -> list[Row]:
    """Heads of very different density, the dense ones last, against the same work spread evenly; 64K."""
    length, half = 64 * K, HEADS_Q // 2
    cases = {"half": [0.02] * half + [0.40] * half, "one": [0.03] * (HEADS_Q - 1) + [1.0]}
    inputs = random_inputs(length)
    rows = []
    for name, densities in cases.items():
        masks = {"skewed": random_mask(length, densities), "uniform": random_mask(length, sum(densities) / HEADS_Q)}
        peers = {which: [sparse_call(*inputs, mask)] for which, mask in masks.items()}
        for which, mask in masks.items():
            verify(f"skew.{name}, {which}", peers[which][0](), *inputs, mask)
        turns = take_turns(length, peers)
        # Random masks keep the same number of blocks only within a thousandth: compare times per kept block.
        per_block = {which: turns.ms[which] / int(mask.counts.sum()) for which, mask in masks.items()}
        ratio = per_block["skewed"] / per_block["uniform"]
        peers_ms = {f"{which}_ms": ms for which, ms in turns.ms.items()}
        rows.append(turns.row(f"skew.{name}.x_uniform", ratio, "ratio", **peers_ms))
    return rows


def in_pages(x: Tensor, table: Tensor, page_size: int) -> Tensor:
    """x [1, S, heads, D] as pages, of which ``table`` numbers those that the tokens lie in, one after the other."""
    pages = torch.empty_like(x).view(-1, page_size, *x.shape[2:])
    pages[table] = x.view(pages.shape)
    return pages


@dataclass(frozen=True)
class PagedInputs:
    """Keys and values in pages in random order, and the same in one piece; a mask for either."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: bsfa.BlockMask
    mask_of_pages: bsfa.BlockMask

    @staticmethod
    def random(length: int, density: float) -> PagedInputs:
        q, k, v = random_inputs(length)
        mask = random_mask(length, density)
        seqlens = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        any_policy = bsfa.policies.StaticPattern(block_m=BLOCK, block_n=BLOCK)
        shape = bsfa.select_blocks(q, None, any_policy, seqlens_k=seqlens, max_seqlen_k=length)
        assert isinstance(shape, bsfa.BlockMask)
        spare = shape.geometry.num_rows - mask.geometry.num_rows  # rows for lengths that the host does not know
        kept = torch.nn.functional.pad(mask.to_rows(), (0, 0, 0, 0, 0, spare))
        return PagedInputs(q, k, v, mask, bsfa.BlockMask.from_rows(kept, shape.geometry))

    def calls(self, page_sizes: Sequence[int], sparse: bool) -> dict[str, Callable[[], Tensor]]:
        """``contiguous``, ``paged16``, ...; each one verified."""
        q, k, v = self.q, self.k, self.v
        calls = {"contiguous": sparse_call(q, k, v, self.mask) if sparse else dense_call(q, k, v)}
        calls |= {f"paged{size}": self._call(size, self.mask_of_pages if sparse else None) for size in page_sizes}
        for name, call in calls.items():
            verify(f"{name}, {'sparse' if sparse else 'dense'}", call(), q, k, v, self.mask if sparse else None)
        return calls

    def _call(self, page_size: int, mask: bsfa.BlockMask | None) -> Callable[[], Tensor]:
        length = self.k.shape[1]
        table = torch.randperm(length // page_size, device=DEVICE)
        k, v = (in_pages(x, table, page_size) for x in (self.k, self.v))
        seqlens = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        where: dict[str, Any] = {"block_table": table.to(torch.int32)[None], "seqlens_k": seqlens}
        return lambda: bsfa.block_sparse_attention(self.q, k, v, mask, max_seqlen_k=length, **where)[0]


def paged() -> list[Row]:
    """Keys and values in pages in random order against the same in one piece; 64K."""
    length = 64 * K
    inputs = PagedInputs.random(length, 0.10)
    rows = []
    for kind in ("dense", "sparse10"):
        calls = inputs.calls((16, 64, 128), sparse=kind != "dense")
        turns = take_turns(length, {name: [call] for name, call in calls.items()})
        for name in list(calls)[1:]:
            ratio = turns.ms[name] / turns.ms["contiguous"]
            peers = {"paged_ms": turns.ms[name], "contiguous_ms": turns.ms["contiguous"]}
            rows.append(turns.row(f"{name}.{kind}.x_contiguous", ratio, "ratio", **peers))
    return rows


def paged_sparse() -> list[Row]:
    """The time of 10 % of the blocks over pages, where that of the best published kernel is known."""
    rows = []
    for kilo in (16, 128):
        inputs = PagedInputs.random(kilo * K, 0.10)
        calls = inputs.calls((16, 128), sparse=True)
        turns = take_turns(kilo * K, {name: [call] for name, call in calls.items()}, dict.fromkeys(calls, 0.10))
        peers = {"contiguous_ms": turns.ms["contiguous"], "density": float(inputs.mask.density())}
        for name in list(calls)[1:]:
            rows.append(turns.row(f"{name}.sparse10.{kilo}k.ms", turns.ms[name], "ms", **peers))
    return rows


def launch() -> list[Row]:
    """What one eager call on an idle device takes beyond its kernels, 1K tokens.

    ``eager``: from an event recorded just before the Python call to one just after it, the device being idle; so it
    holds the host's work up to the last launch, the latency of that launch, and the kernels. ``kernel``: the same call
    captured 40 times in one graph, per call. The overhead is the difference of their medians, taken in turns of ten
    eager calls. ``graph``: one replay of one captured call, measured like ``eager``. ``single``: like ``eager``, but a
    call at a time after replays, which do not leave the host's caches as a call does. The peers' overhead is defined
    alike.
    """

    def timed(call: Callable[[], object]) -> tuple[dict[str, float], int, int | None]:
        works = {
            "graph": Work(call, samples=10),
            "single": Work(call, eager=True),
            "kernel": repeated([call], 40),
            "eager": Work(call, eager=True, samples=10),
        }
        timings, clock = interleaved(works, rounds=40, warmup=10, watch_clock=False)
        return {name: t.us for name, t in timings.items()}, timings["eager"].n, clock

    inputs = random_inputs(K)
    us, n, clock = timed(dense_call(*inputs))
    peers = {f"{name}_us": value for name, value in us.items()}
    heads_first = [x.transpose(1, 2) for x in inputs]
    torch_call = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    for name, backend in SDPA.items():
        with sdpa_kernel(backend):  # outside of what is timed
            theirs = timed(functools.partial(torch_call, *heads_first))[0]
        peers[f"{name}_us"] = theirs["eager"] - theirs["kernel"]
    return [Turns({}, n, clock).row("launch.1k.us", us["eager"] - us["kernel"], "us", **peers)]


@torch.no_grad()
def run() -> list[Row]:
    """All measurements of this suite."""
    torch.manual_seed(0)
    rows: list[Row] = []
    # What torch.compile leaves running doubles what the host takes for a launch: that one is first.
    for section in (launch, dense, sparse, density_sweep, skew, paged, paged_sparse):
        started = time.monotonic()
        rows += section()
        print(f"{section.__name__}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    report.suite_main(__doc__, run, DEMANDED)
