"""Speed of block selection: alone, and with the attention over what it keeps; the suite 'select'.

bfloat16, batch 1, 32 query and 8 KV heads, head_dim 128, causal, 128 x 128 blocks, fresh random normal data. A
selection starts from the keys: pooling them is in its time. Run by gpu_check.py, or by hand:
``PYTHONPATH=python python benchmarks/selection.py [--output FILE]``. (A file select.py here would hide Python's own.)
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attention as base
import bsfa
import report
from bsfa.block_mask import unpack_bits
from bsfa.policies import Antidiagonal, CumulativeMass, FlexPrefill, Policy, RelativeMax
from report import measurement
from timing import Work, interleaved

Row = dict[str, Any]
Call = Callable[[], object]

PAGE = 16
CHUNK_KILO = 8  # of the chunk that is selected for at the end of a cached context
SCORE_TOLERANCE = 0.005  # a block may go either way if its score is this close to alpha, relatively

#: What the project asks of these measurements: at least, or at most.
DEMANDED: dict[str, tuple[str, float]] = {
    "select.relmax.4k.ms": ("<=", 0.05),
    "select.relmax.16k.ms": ("<=", 0.10),
    "select.relmax.128k.ms": ("<=", 2.0),
    "select.relmax.256k.ms": ("<=", 7.0),
    "select.cached_chunk.128k.ms": ("<=", 0.25),
    "select.antidiagonal.128k.ms": ("<=", 8.0),
    "select.flexprefill.128k.ms": ("<=", 6.0),
    "select.workspace.1m.mb": ("<=", 400.0),
    "e2e.relmax.4k.x_fa2": (">=", 2.5),
    "e2e.relmax.128k.x_fa2": (">=", 28.0),
    "e2e.relmax.256k.x_fa2": (">=", 35.0),
    "attn.correction.64k.of_limit": ("<=", 1.0),
}


@dataclass(frozen=True)
class Size:
    """How the relative-max section measures one length.

    density: alpha is searched so that the mask keeps this share of the blocks.
    variants: also "all" (the default alpha, which on random data keeps every block), "least" (alpha = 1, the fewest
    blocks that the policy can keep), "shared" (one mask per KV head, of the same density).
    rounds, samples: turns of every peer, and samples that our own calls take in a turn; rounds * samples >= 10.
    eager: also without CUDA graphs.
    """

    kilo: int
    density: float
    rounds: int
    samples: int
    eager: bool = False
    variants: tuple[str, ...] = ()


# At 4K a model's own density: published for this rule are 0.70 to 0.76 (FlashPrefill V2). Random data has none.
SIZES = (
    Size(4, 0.73, 15, 1, eager=True, variants=("all", "least")),
    Size(16, 0.05, 15, 1, eager=True),
    Size(64, 0.05, 5, 2),
    Size(128, 0.05, 5, 2),
    Size(256, 0.05, 3, 4, variants=("shared",)),  # FlashAttention-2 takes 1.8 s a call
)


# --- inputs -----------------------------------------------------------------------------------------------------------


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=base.DEVICE)


def blocks() -> dict[str, int]:
    return {"block_m": base.BLOCK, "block_n": base.BLOCK}


def select(q: Tensor, k: Tensor, policy: Policy) -> bsfa.BlockMask:
    """Pool the keys if the policy wants that, and select."""
    summary = bsfa.pool_blocks(k, block_n=policy.block_n) if policy.needs_summary else None
    mask = bsfa.select_blocks(q, summary, policy, k=k, seqlen_k=k.shape[1])
    assert isinstance(mask, bsfa.BlockMask)
    return mask


def relmax_for(density: float, q: Tensor, k: Tensor, shared: bool = False) -> RelativeMax:
    """The policy whose alpha keeps about this share of the blocks; alpha = 1 if that keeps more.

    Keys of random data have nearly equal means, so that alpha is close to 1 there.
    """
    summary = bsfa.pool_blocks(k, block_n=base.BLOCK)

    def reached(alpha: float) -> bool:
        mask = bsfa.select_blocks(q, summary, RelativeMax(alpha=alpha, shared=shared, **blocks()), seqlen_k=k.shape[1])
        assert isinstance(mask, bsfa.BlockMask)
        return float(mask.density()) >= density

    low, high = 0.0, 1.0
    if not reached(high):
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(middle) else (low, middle)
    return RelativeMax(alpha=high, shared=shared, **blocks())


def paged_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """The keys [1, S, Hkv, D] in pages in random order, and their block table."""
    table = torch.randperm(k.shape[1] // PAGE, device=base.DEVICE)
    return base.in_pages(k, table, PAGE), table.to(torch.int32)[None]


# --- checks before the clock ------------------------------------------------------------------------------------------


def verify_relmax(what: str, mask: bsfa.BlockMask, policy: RelativeMax, q: Tensor, k: Tensor) -> None:
    """Raise unless four of the mask's rows are those of the definition in float32, scores next to alpha aside."""
    length, group, block = q.shape[1], q.shape[2] // k.shape[2], base.BLOCK
    tiles = -(-length // block)
    means = bsfa.pool_blocks(k, block_n=block)[0].float()
    alpha = float(policy.alpha)  # type: ignore[arg-type]
    for i in range(4):
        tile, head = i * (tiles - 1) // 3, i * (q.shape[2] - 1) // 3
        rows = torch.arange(tile * block, min((tile + 1) * block, length), device=q.device)
        columns = torch.arange(tile + 1, device=q.device)
        logits = q[0, rows, head].float() @ means[: tile + 1, head // group].T / math.sqrt(q.shape[3])
        logits = logits.masked_fill((columns + 1) * block - 1 > rows[:, None], -math.inf)
        energy = (logits - logits.max()).exp().sum(0)
        score = energy / energy.max()
        forced = (columns < policy.sink_blocks) | (columns > tile - policy.window_blocks)
        forced |= torch.tensor(tile >= tiles - policy.last_tiles, device=q.device)
        kept = unpack_bits(mask.words[tile, head], tile + 1)
        wrong = (kept != (forced | (score >= alpha))) & ((score - alpha).abs() > SCORE_TOLERANCE * alpha)
        if bool(wrong.any()):
            raise AssertionError(f"{what}: tile {tile} of head {head} keeps other blocks than its scores say")


def verify_mask(what: str, mask: bsfa.BlockMask) -> float:
    """The mask's density; raise unless every row keeps a block and not all do."""
    rows = int(mask.geometry.cu_tiles()[-1])
    density = float(mask.density())
    if int(mask.counts[:rows].min()) < 1 or not 0.0 < density <= 1.0:
        raise AssertionError(f"{what}: rows without blocks, or density {density}")
    return density


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """Peers that took turns: median ms of a call and number of samples of each, SM clock."""

    ms: dict[str, float]
    n: dict[str, int]
    clock_mhz: int | None

    def row(self, id_: str, value: float, unit: str, of: str, **peers: float) -> Row:
        """``of``: the peer whose samples the value's number is."""
        return measurement(id_, value, unit, self.n[of], self.clock_mhz, peers)


def take_turns(works: Mapping[str, Work], rounds: int = 15, warmup: int = 1) -> Turns:
    timings, clock = interleaved(works, rounds=rounds, warmup=warmup)
    return Turns({name: t.us / 1e3 for name, t in timings.items()}, {name: t.n for name, t in timings.items()}, clock)


def ours(calls: Sequence[Call], launches: int, samples: int = 1, eager: bool = False) -> Work:
    return base.repeated(calls, launches, eager=eager or not capturable(calls[0]), samples=samples)


def capturable(call: Call) -> bool:
    """Whether a CUDA graph can hold the call; says so where not, and it is then timed eagerly."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
    except RuntimeError as error:
        print(f"no CUDA graph, timed eagerly: {str(error).splitlines()[0][:200]}", flush=True)
        torch.cuda.synchronize()
        return False
    return True


def free() -> None:
    if base.DEVICE == "cuda":
        torch.cuda.empty_cache()


# --- sections ---------------------------------------------------------------------------------------------------------


def relmax() -> list[Row]:
    """Pool and select by relative maximum, and attention by it against torch's kernels and our dense one."""
    rows: list[Row] = []
    for size in SIZES:
        rows += relmax_rows(size)
        free()
    return rows


def relmax_rows(size: Size) -> list[Row]:
    length, name = size.kilo * base.K, f"{size.kilo}k"
    dim = 128
    bytes_per_call = 2 * 2 * (base.HEADS_Q + base.HEADS_KV) * length * dim
    buffers = [base.random_inputs(length, dim) for _ in range(-(-base.L2_BYTES // bytes_per_call))]
    q, k, v = buffers[0]
    policies = {"": relmax_for(size.density, q, k)}
    if "all" in size.variants:
        policies["_all"] = RelativeMax(**blocks())
    if "least" in size.variants:
        policies["_least"] = RelativeMax(alpha=1.0, **blocks())
    if "shared" in size.variants:
        policies["_shared"] = relmax_for(size.density, q, k, shared=True)
    calls: dict[str, list[Call]] = {}
    density = {}
    for suffix, policy in policies.items():
        mask = select(q, k, policy)
        density[suffix] = verify_mask(f"{name}{suffix}", mask)
        if not policy.shared:
            verify_relmax(f"{name}{suffix}", mask, policy, q, k)
        base.verify(f"{name}{suffix}", bsfa.attention(q, k, v, policy=policy), q, k, v, mask)  # type: ignore[arg-type]
        calls[f"select{suffix}"] = [functools.partial(select, b[0], b[1], policy) for b in buffers]
        calls[f"e2e{suffix}"] = [functools.partial(bsfa.attention, *b, policy=policy) for b in buffers]
        del mask

    launches = min(max(64 * base.K // length, 1), 16)
    works: dict[str, Work] = {}
    for peer, own in calls.items():
        # Turns of a few launches more, so that a short call is not timed at the clock that a long one has left.
        works[peer] = ours(own, launches * 8 if peer.startswith("select") else launches * 4, size.samples)
        if size.eager:
            works[f"{peer}_eager"] = ours(own, 4 * launches, size.samples, eager=True)
    works["dense"] = base.repeated([base.dense_call(*b) for b in buffers], launches)
    for peer, backend in base.SDPA.items():
        works[peer] = base.repeated([functools.partial(base.sdpa(backend), *b) for b in buffers], launches)
    turns = take_turns(works, size.rounds)

    ms, rows = turns.ms, []
    others = {f"{peer}_ms": ms[peer] for peer in ("dense", *base.SDPA)}
    for suffix, policy in policies.items():
        facts = {
            **others,
            "density": density[suffix],
            "alpha": float(policy.alpha),  # type: ignore[arg-type]
            "graph": float(not works[f"e2e{suffix}"].eager),
            "peer_rounds": float(size.rounds),
        }
        for kind, id_ in (("select", f"select.relmax.{name}{suffix}"), ("e2e", f"e2e.relmax.{name}{suffix}")):
            peer = f"{kind}{suffix}"
            rows.append(turns.row(f"{id_}.ms", ms[peer], "ms", peer, **facts))
            if size.eager:
                rows.append(turns.row(f"{id_}.eager_ms", ms[f"{peer}_eager"], "ms", f"{peer}_eager", **facts))
        own = f"e2e{suffix}"
        facts |= {"e2e_ms": ms[own], "select_ms": ms[f"select{suffix}"]}
        for peer in ("dense", *base.SDPA):
            rows.append(turns.row(f"e2e.relmax.{name}{suffix}.x_{peer}", ms[peer] / ms[own], "speed-up", own, **facts))
    return rows


def other_selections() -> list[Row]:
    """The other policies, paged keys and a chunk with cached means; 128K."""
    length = 128 * base.K
    q, k, _ = base.random_inputs(length)
    policies: dict[str, Policy] = {
        "relmax": relmax_for(0.05, q, k),
        "antidiagonal": Antidiagonal(stride=base.BLOCK // 8, **blocks()),
        "flexprefill": FlexPrefill(**blocks()),
        "mass95": CumulativeMass(mass=0.95, **blocks()),
        "flat64_95": CumulativeMass(mass=0.95, pooling="flat64", **blocks()),
    }
    calls: dict[str, Call] = {name: functools.partial(select, q, k, policy) for name, policy in policies.items()}
    density = {name: verify_mask(name, call()) for name, call in calls.items()}  # type: ignore[arg-type]

    pages, table = paged_keys(k)
    cache: dict[str, Any] = {"seqlens_k": int32(length), "max_seqlen_k": length}

    def paged() -> bsfa.BlockMask:
        summary = bsfa.pool_blocks(pages, block_n=base.BLOCK, block_table=table, **cache)
        mask = bsfa.select_blocks(q, summary, policies["relmax"], **cache)
        assert isinstance(mask, bsfa.BlockMask)
        return mask

    density["relmax_paged"] = verify_mask("paged", paged())
    if abs(density["relmax_paged"] - density["relmax"]) > 1e-3:
        raise AssertionError(f"pages change the density: {density['relmax_paged']} and {density['relmax']}")
    calls["relmax_paged"] = paged
    calls["cached_chunk"] = cached_chunk(q, pages, table, cache, policies["relmax"])

    launches = {"relmax": 8, "relmax_paged": 8, "cached_chunk": 40}
    turns = take_turns({name: ours([call], launches.get(name, 2)) for name, call in calls.items()}, rounds=11)
    ids = {
        "relmax_paged": "select.relmax.paged.128k.ms",
        "cached_chunk": "select.cached_chunk.128k.ms",
        "antidiagonal": "select.antidiagonal.128k.ms",
        "flexprefill": "select.flexprefill.128k.ms",
        "mass95": "select.mass95.128k.ms",
        "flat64_95": "select.flat64_95.128k.ms",
    }
    return [
        turns.row(
            id_,
            turns.ms[name],
            "ms",
            name,
            relmax_ms=turns.ms["relmax"],
            **({"density": density[name]} if name in density else {}),
        )
        for name, id_ in ids.items()
    ]


def cached_chunk(q: Tensor, pages: Tensor, table: Tensor, cache: dict[str, Any], policy: RelativeMax) -> Call:
    """Take a chunk's keys into the summary that lies beside the pages, read the context's means, select for the chunk.

    The context before the chunk is in the summary already.
    """
    length, chunk = cache["max_seqlen_k"], CHUNK_KILO * base.K
    summary = bsfa.BlockSummary.allocate(
        pages.shape[0],
        PAGE,
        pages.shape[2],
        pages.shape[3],
        block_n=base.BLOCK,
        dtype=pages.dtype,
        device=pages.device,
    )
    lengths = cache["seqlens_k"]
    summary.update(pages, table, lengths, cu_seqlens_q=int32(0, length), max_seqlen_q=length)
    cu_seqlens_q, last = int32(0, chunk), q[:, -chunk:].contiguous()

    def call() -> bsfa.BlockMask:
        summary.update(pages, table, lengths, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=chunk)
        means = summary.gather(table, lengths, max_seqlen_k=length)
        mask = bsfa.select_blocks(last, means, policy, **cache)
        assert isinstance(mask, bsfa.BlockMask)
        return mask

    verify_mask("cached chunk", call())
    wanted = bsfa.pool_blocks(pages, block_n=base.BLOCK, block_table=table, **cache)
    if not torch.equal(summary.gather(table, lengths, max_seqlen_k=length), wanted):
        raise AssertionError("the cached means are not those of the keys")
    return call


def workspace() -> list[Row]:
    """Memory of a selection at 1M tokens: computed from its parts, and the peak that torch's allocator saw."""
    length = 1024 * base.K
    q, k = (
        torch.randn((1, length, heads, 128), dtype=torch.bfloat16, device=base.DEVICE)
        for heads in (base.HEADS_Q, base.HEADS_KV)
    )
    policy = RelativeMax(**blocks())
    call = functools.partial(select, q, k, policy)
    peak, mask = peak_bytes(call)
    verify_mask("1M tokens", mask)
    tiles = -(-length // base.BLOCK)
    parts = {
        "words": mask.words.nbytes,
        "counts": mask.counts.nbytes,
        "summary": tiles * base.HEADS_KV * 128 * q.element_size(),
        "workspace": workspace_bytes(policy, mask.words.shape[0], base.HEADS_Q, length, 128),
    }
    del mask
    turns = take_turns({"select": ours([call], 1)}, rounds=10)
    facts = {f"{name}_mb": size / 1e6 for name, size in parts.items()} | {"peak_mb": peak / 1e6}
    return [
        turns.row("select.workspace.1m.mb", sum(parts.values()) / 1e6, "MB", "select", **facts),
        turns.row("select.relmax.1m.ms", turns.ms["select"], "ms", "select"),
    ]


def workspace_bytes(policy: RelativeMax, num_rows: int, heads: int, max_seqlen_k: int, head_dim: int) -> int:
    """What a selection allocates beside what it returns."""
    scoring = policy.scoring
    size: int = torch.ops.bsfa.select_workspace_bytes(
        num_rows, heads, max_seqlen_k, head_dim, scoring.rule, scoring.stride
    )
    return size


def peak_bytes(call: Callable[[], bsfa.BlockMask]) -> tuple[int, bsfa.BlockMask]:
    """Most memory that torch held at once during a call, beyond what it held before; and the call's result."""
    free()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def correction() -> list[Row]:
    """Attention that counts dropped blocks by their means, against the same without; 64K, 10 % of the blocks."""
    length = 64 * base.K
    q, k, v = base.random_inputs(length)
    mask = base.random_mask(length, 0.10)
    means = {
        "k_means": bsfa.pool_blocks(k, block_n=base.BLOCK),
        "v_means": bsfa.pool_blocks(v, block_n=base.BLOCK),
    }
    plain = base.sparse_call(q, k, v, mask)

    def corrected() -> Tensor:
        return bsfa.block_sparse_attention(q, k, v, mask, **means)[0]

    out = corrected()
    if not bool(out.isfinite().all()) or torch.equal(out, plain()):
        raise AssertionError("correction: the output is not finite, or no other than without")
    # Random keys and values: what is dropped is worth about its mean, so the corrected output is nearer to dense.
    wanted = base.dense_call(q, k, v)().float()
    errors = [float((x.float() - wanted).norm() / wanted.norm()) for x in (out, plain())]
    if not errors[0] < errors[1]:
        raise AssertionError(f"correction: error {errors[0]:.3g} against dense with it, {errors[1]:.3g} without")
    del out, wanted
    works = {
        "plain": ours([plain], 8),
        "corrected": ours([corrected], 8),
        "dense": base.repeated([base.dense_call(q, k, v)], 1),
    }
    turns = take_turns(works)
    ratio = turns.ms["corrected"] / turns.ms["plain"]
    # A mean stands for 128 keys, so all of them cost a 128th of dense attention at least: twice that is allowed, and a
    # tenth of the time without them.
    limit = 1.1 + turns.ms["dense"] / 64 / turns.ms["plain"]
    facts = {f"{name}_ms": value for name, value in turns.ms.items()} | {"density": float(mask.density())}
    return [
        turns.row("attn.correction.64k.x_plain", ratio, "ratio", "corrected", limit=limit, **facts),
        turns.row("attn.correction.64k.of_limit", ratio / limit, "ratio", "corrected", limit=limit, **facts),
    ]


@torch.no_grad()
def run() -> list[Row]:
    """All measurements of this suite."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for section in (relmax, other_selections, workspace, correction):
        started = time.monotonic()
        rows += section()
        free()
        print(f"{section.__name__}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    report.suite_main(__doc__, run, DEMANDED)
