"""Speed of attention that skips by exact logits (ExactSkip), against our own without; the suite 'skip'.

bfloat16, batch 1, 64K tokens, 32 query and 8 KV heads, head_dim 128, causal, 128 x 128 blocks. Which blocks can be
skipped is planted in the data (see :func:`planted`), so that every decision is known before. Nothing is timed before
its output was held against float32 on sampled tiles, and its counts against what was planted. Run by gpu_check.py, or
by hand: ``PYTHONPATH=python python benchmarks/skip.py [--output FILE]``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attention as base
import bsfa
import report
from bsfa._library import KERNELS
from bsfa.policies import ExactSkip
from report import measurement

Row = dict[str, Any]

GATES = 8  # head dims that hold the plant; the other 120 are normal
GATE_Q, GATE_K = 16.0, 24.0  # exact in bfloat16; together 34 nats after 1 / sqrt(128)
CUT = -12.0  # nats, far from both: logits are within 6 of 0, or of -34
SKIP_ROWS = 64
PERCENTS = (0, 50, 70, 90)

#: What the project asks of these measurements: at least, or at most.
DEMANDED: dict[str, tuple[str, float]] = {
    "skip.0.x_dense": (">=", 0.97),
    "skip.50.x_dense": (">=", 1.35),
    "skip.70.x_dense": (">=", 1.60),
    "skip.90.x_dense": (">=", 1.90),
}


@dataclass(frozen=True)
class Plant:
    """Inputs, and for every query head which blocks of which group of 64 rows can be skipped."""

    inputs: base.Inputs
    low: Tensor  #: bool [groups, Hq, blocks]: visible, neither sink nor diagonal, and all logits near -34
    visible: Tensor  #: bool [groups, 1, blocks]

    @property
    def share(self) -> float:
        """Skippable / visible pairs."""
        return float(self.low.sum() / (self.visible.sum() * self.low.shape[1]))

    def low_tiles(self) -> Tensor:
        """``low`` where all groups of a tile decide together."""
        together = self.low.unflatten(0, (-1, groups_per_tile())).all(1)
        return together.repeat_interleave(groups_per_tile(), dim=0)

    def kept(self) -> bsfa.BlockMask:
        """The blocks that a group of the tile cannot skip."""
        per_tile = (~self.low & self.visible).unflatten(0, (-1, groups_per_tile())).any(1)
        length = self.inputs[0].shape[1]
        return bsfa.BlockMask.from_bool(
            per_tile.transpose(0, 1)[None], seqlen_q=length, seqlen_k=length, block_m=base.BLOCK, block_n=base.BLOCK
        )


def groups_per_tile() -> int:
    """Groups of rows that decide together, in a query tile."""
    return -(-base.BLOCK // SKIP_ROWS)


def free_blocks(length: int) -> Tensor:
    """bool [tiles, blocks]: visible, and neither sink nor diagonal."""
    index = torch.arange(length // base.BLOCK, device=base.DEVICE)
    return (index > 0) & (index < index[:, None])


def planted(length: int, percent: int, alike: bool = True) -> Plant:
    """Random normal inputs of which a share of the (query tile, KV block) pairs of every query head can be skipped.

    Of the head dims, 8 are gates, which add to a logit 0 or -34 nats. A query tile is open to one gate, chosen at
    random for each query head; a KV block has a random set of the gates, each with the wanted probability, for each KV
    head, the sink none. So whether a pair can be skipped is random along both axes, without runs, and the heads of a
    group differ. The probability is corrected for sinks and diagonals, which are never skipped.

    alike: the two groups of 64 rows of a tile have one gate, so that they skip alike; else each has its own.
    """
    q, k, v = base.random_inputs(length)
    tiles = length // base.BLOCK
    free = free_blocks(length)
    visible = torch.ones_like(free).tril()
    probability = percent / 100 * float(visible.sum() / free.sum().clamp(min=1))
    closed = torch.rand(tiles, base.HEADS_KV, GATES, device=q.device) < probability  # [blocks, Hkv, gates]
    closed[0] = False  # the sink gives every row a running maximum
    choices = torch.randint(GATES, (tiles, groups_per_tile(), base.HEADS_Q), device=q.device)
    if alike:
        choices[:, 1:] = choices[:, :1]
    gate = choices.flatten(0, 1)  # [groups, Hq]
    rows = length // gate.shape[0]
    q[0, :, :, :GATES] = (
        torch.nn.functional.one_hot(gate, GATES).to(q.dtype).mul_(GATE_Q).repeat_interleave(rows, dim=0)
    )
    k[0, :, :, :GATES] = closed.to(k.dtype).mul_(-GATE_K).repeat_interleave(base.BLOCK, dim=0)
    per_head = closed.repeat_interleave(base.HEADS_Q // base.HEADS_KV, dim=1)  # [blocks, Hq, gates]
    low = per_head.permute(1, 2, 0)[torch.arange(base.HEADS_Q, device=q.device), gate]  # [groups, Hq, blocks]
    groups = torch.arange(gate.shape[0], device=q.device) // groups_per_tile()
    return Plant((q, k, v), low & free[groups][:, None], visible[groups][:, None])


def policy(form: str = "absolute", **options: Any) -> ExactSkip:
    """The policy that skips what is planted, on the device."""
    sizes = {"block_m": base.BLOCK, "block_n": base.BLOCK}
    if form == "absolute":
        return ExactSkip.absolute(CUT, **sizes, **options).to(torch.device(base.DEVICE, 0))
    return ExactSkip(ratio=math.exp(CUT), form=form, **sizes, **options)


def skip_call(plant: Plant, p: ExactSkip) -> Callable[[], Tensor]:
    return lambda: bsfa.attention(*plant.inputs, policy=p)  # type: ignore[return-value]


def check_counts(what: str, skips: Tensor, met: Tensor, skipped: Tensor) -> float:
    """The share of the met pairs that was skipped; raises unless the counts are those of bool [groups, Hq, blocks]."""
    want = torch.stack([x.expand(-1, base.HEADS_Q, -1).sum((0, 2)) for x in (met, skipped)], dim=1)
    if not torch.equal(skips, want):
        raise AssertionError(f"{what}: met and skipped are {skips.tolist()}, planted {want.tolist()}")
    return float(skips[:, 1].sum() / skips[:, 0].sum())


def checked(what: str, plant: Plant, p: ExactSkip) -> float:
    """The share skipped by a call of attention, after checking its output and counts."""
    out, info = bsfa.attention(*plant.inputs, policy=p, return_info=True)
    base.verify(what, out, *plant.inputs, plant.kept())
    return check_counts(what, info.skips, plant.visible, plant.low if p.passes == 1 else plant.low_tiles())


def has(op: str) -> bool:
    """Whether the device has an operator."""
    return op in KERNELS.get(base.DEVICE, frozenset())


def ways(p: ExactSkip) -> dict[str, ExactSkip]:
    """The forms in which the device can run a policy: in one pass, in two, and in one after bounds."""
    found = {"one_pass": p}
    if not p.counted and has("skip_mask"):
        found["two_pass"] = replace(p, passes=2)
    if not p.counted and (has("bound_mask") or base.DEVICE == "cpu"):  # the CPU ignores bounds
        found["bounds"] = replace(p, bounds=True)
    return found


def rows_of(turns: base.Turns, name: str, peer: str, over: str, **facts: float) -> list[Row]:
    """Under ``name``: the speed-up of ``peer`` over the peer ``over``, and its ms."""
    peers = {f"{over}_ms": turns.ms[over], **facts}
    speedup = measurement(
        f"skip.{name}.x_{over}", turns.ms[over] / turns.ms[peer], "speed-up", turns.n, turns.clock_mhz, peers
    )
    return [speedup, measurement(f"skip.{name}.ms", turns.ms[peer], "ms", turns.n, turns.clock_mhz, peers)]


def rows_of_ways(turns: base.Turns, name: str, shares: dict[str, float], over: str, **facts: float) -> list[Row]:
    """What was timed as ``<way>.<name>`` for the ways of ``shares`` (skipped, by way): under ``name`` the fastest, with
    the times of all as peers, and each under its own name if there are several.
    """
    ms = {way: turns.ms[f"{way}.{name}"] for way in shares}
    best = min(ms, key=ms.__getitem__)
    times = {f"{way}_ms": value for way, value in ms.items()}
    rows = rows_of(turns, name, f"{best}.{name}", over, skipped=shares[best], **times, **facts)
    for way, share in shares.items() if len(shares) > 1 else ():
        rows += rows_of(turns, f"{way}.{name}", f"{way}.{name}", over, skipped=share, **facts)
    return rows


# --- sections ---------------------------------------------------------------------------------------------------------


def compared(length: int, plant: Plant, policies: dict[str, ExactSkip]) -> list[Row]:
    """Policies by name, in all their forms, against dense attention over the same inputs, in turns."""
    runs = {name: ways(p) for name, p in policies.items()}
    shares = {
        name: {way: checked(f"skip, {way}.{name}", plant, p) for way, p in of_name.items()}
        for name, of_name in runs.items()
    }
    peers = {"dense": [base.dense_call(*plant.inputs)]}
    peers |= {f"{way}.{name}": [skip_call(plant, p)] for name, found in runs.items() for way, p in found.items()}
    turns = base.take_turns(length, peers)
    return [row for name, found in shares.items() for row in rows_of_ways(turns, name, found, "dense")]


def against_dense() -> list[Row]:
    """Both forms of threshold against dense attention over the same inputs."""
    length, rows = 64 * base.K, []
    for percent in PERCENTS:
        policies = {f"{percent}": policy()}
        if percent == 70:
            policies[f"relative.{percent}"] = policy("relative")
            policies[f"counted.{percent}"] = policy(counted=True)
        rows += compared(length, planted(length, percent), policies)
    return rows


def groups_that_differ() -> list[Row]:
    """70 % again, where the two groups of a tile do not skip the same blocks: in two passes fewer are skipped."""
    length = 64 * base.K
    return compared(length, planted(length, 70, alike=False), {"apart.70": policy()})


def on_a_mask() -> list[Row]:
    """On 10 % of the blocks at random, of which half can be skipped, against the same mask without skipping."""
    length = 64 * base.K
    plant, runs = planted(length, 50), ways(policy())
    mask = base.random_mask(length, 0.10)
    kept = mask.to_rows().repeat_interleave(groups_per_tile(), dim=0) & plant.visible
    peers: dict[str, list[Callable[[], object]]] = {"sparse": [base.sparse_call(*plant.inputs, mask)]}
    shares = {}
    for way, p in runs.items():
        what = f"skip on a mask, {way}"
        out, _, skips = bsfa.block_sparse_attention(*plant.inputs, mask, skip=p, return_skips=True)
        base.verify(what, out, *plant.inputs, mask & plant.kept())
        shares[way] = check_counts(what, skips, kept, kept & (plant.low if p.passes == 1 else plant.low_tiles()))
        peers[f"{way}.sparse10"] = [lambda p=p: bsfa.block_sparse_attention(*plant.inputs, mask, skip=p)[0]]
    turns = base.take_turns(length, peers, dict.fromkeys(peers, 0.10))
    return rows_of_ways(turns, "sparse10", shares, "sparse", density=float(mask.density()))


@torch.no_grad()
def run() -> list[Row]:
    """All measurements of this suite."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for section in (against_dense, groups_that_differ, on_a_mask):
        started = time.monotonic()
        rows += section()
        print(f"{section.__name__}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    report.suite_main(__doc__, run, DEMANDED)
