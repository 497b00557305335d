"""Attention that skips with bounds and without, on a device: how the two are held against each other; planted data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle_skip
from bsfa.policies import ExactSkip
from cases import F32, NAN, Case, Inputs, poison
from oracle import positions, visible_tokens
from skip_cases import columns, compared_values, first_masks, run_oracle
from skip_grid import Result, skip

#: Where bounds are: "cpu" checks the tests themselves, with a bound_mask of one's own there.
DEVICE = "cuda"

Masks = list[np.ndarray] | None


def bits(t: Tensor) -> Tensor:
    """The bits of a tensor, all NaN alike."""
    if not t.is_floating_point():
        return t
    return t.masked_fill(t.isnan(), NAN).view(torch.int16 if t.element_size() == 2 else torch.int32)


def same(a: Result, b: Result) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def with_bounds(policy: ExactSkip) -> ExactSkip:
    return replace(policy, bounds=True)


def bound_masks(inputs: Inputs, policy: ExactSkip, masks: Masks = None) -> tuple[Tensor, Tensor]:
    """What bounds leave, bool [rows, Hq, blocks] on the CPU, and the counts [Hq, 2]; over memory that held NaN."""
    there, moved = inputs.to(DEVICE), policy.to(torch.device(DEVICE))
    g = inputs.geometry
    poison((g.num_rows, inputs.case.hq, -(-g.num_blocks // 32)), (g.num_rows, inputs.case.hq), device=DEVICE)
    mask, counts = first_masks(there, moved, masks, operator="bound_mask")
    rows = mask.to_rows().cpu()
    assert torch.equal(mask.counts.cpu(), rows.sum(-1, dtype=torch.int32))
    return rows, counts.cpu()


def check_same(inputs: Inputs, policy: ExactSkip, masks: Masks = None) -> Tensor:
    """Hold attention with bounds against attention without, in one pass and in two; the counts [Hq, 2] of one."""
    counts = []
    for passes in (1, 2):
        once = replace(policy, passes=passes)
        want, got = (skip(inputs, p, masks, DEVICE) for p in (once, with_bounds(once)))
        for name, a, b in zip(("out", "lse", "counts"), got, want, strict=True):
            assert torch.equal(bits(a), bits(b)), f"{name} of {passes} passes with bounds is not that without"
        counts.append(got[2].cpu())
    return counts[0]


def check(inputs: Inputs, policy: ExactSkip, masks: Masks = None) -> tuple[Tensor, Tensor]:
    """:func:`check_same`, and the mask of the bounds against the oracle: no (tile, head, block) is left out that a
    group of the tile would use. Decisions of the case are to be clear. Returns the counts [Hq, 2] of attention in one
    pass, and those of the bounds.
    """
    case = inputs.case
    skips = check_same(inputs, policy, masks)
    rows, bounded = bound_masks(inputs, policy, masks)
    cuts = policy.cuts(case.hq, columns(inputs), torch.device("cpu")).double().numpy()
    counts = np.zeros((case.hq, 2), dtype=np.int64)
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        kept = inputs.rows_of_sequence(rows, b)
        used = run_oracle(inputs, b, policy, cuts, None if masks is None else masks[b]).valued
        place, seen = positions(seqlen_q, seqlen_k, case.causal), visible_tokens(seqlen_q, seqlen_k, case.causal)
        for t, tile in enumerate(inputs.tiles(b)):
            assert not kept[t, :, tile.visible :].any(), f"sequence {b}: blocks beyond what tile {t} sees"
            for j in range(tile.visible):
                keys = slice(j * case.block_n, (j + 1) * case.block_n)
                given = np.ones(case.hq, dtype=bool)
                if masks is not None:
                    given = np.repeat(masks[b][t, :, j], case.hq // masks[b].shape[1])
                wanted = used[:, tile.rows, keys].any((1, 2))
                assert not (wanted & ~kept[t, :, j]).any(), f"sequence {b}, tile {t}: block {j} is not skipped by all"
                assert not (kept[t, :, j] & ~given).any(), f"sequence {b}, tile {t}: block {j} is not in the mask"
                groups = oracle_skip.groups(tile, place, case.block_m)
                meeting = sum(bool(seen[group, keys].any()) for group in groups)
                counts[:, 0] += meeting * given
                counts[:, 1] += meeting * (given & ~kept[t, :, j])
    assert not inputs.unused_rows(rows).any()
    assert np.array_equal(bounded.numpy(), counts), f"counts {bounded.tolist()}, expected {counts.tolist()}"
    assert torch.equal(bounded[:, 0], skips[:, 0]) and bool((bounded[:, 1] <= skips[:, 1]).all())
    return skips, bounded


GATES, GATE_Q, GATE_K, CUT = 8, 16.0, 24.0, -12.0


def planted(case: Case, percent: int, alike: bool = True) -> Inputs:
    """Inputs of which a share of the (query tile, block) pairs of a head have logits near -30 nats, the others near 0.

    As in benchmarks/skip.py: of the head dims 8 are gates; a query tile is open to one of them, a block closes some.
    alike: the groups of 64 rows of a tile have one gate; else each has its own.
    """
    inputs = case.make()
    rng = np.random.default_rng((case.seed, percent))
    for (seqlen_q, seqlen_k), queries, keys in zip(case.lengths, inputs.queries, inputs.keys, strict=True):
        place = torch.from_numpy(positions(seqlen_q, seqlen_k, case.causal))
        gates = torch.from_numpy(rng.integers(GATES, size=(seqlen_q + seqlen_k, case.hq)))
        gate = gates[(place // (case.block_m if alike else 64)).clamp(min=0)]
        queries[:, :, :GATES] = (torch.nn.functional.one_hot(gate, GATES) * GATE_Q).to(case.dtype)
        closed = torch.from_numpy(rng.random((-(-seqlen_k // case.block_n), case.hkv, GATES)) < percent / 100)
        closed[:1] = False  # the sink gives every row a running maximum
        closed[-1:] &= case.causal  # what is met first is kept, for the order of visits: without causality no window
        keys[:, :, :GATES] = (closed * -GATE_K).to(case.dtype).repeat_interleave(case.block_n, dim=0)[:seqlen_k]
    inputs.lay_out()
    return inputs


def lone_pairs(dim: int) -> tuple[Inputs, Tensor]:
    """Inputs whose logits are near -35 nats but for those of one row of each tile with one key of some blocks, near 0;
    and what an absolute cut between keeps: bool [tiles, Hq, blocks].
    """
    tiles, heads = 25, 4
    length = tiles * 128
    case = Case(
        lengths=((length, length),), hq=heads, hkv=heads, dim=dim, dtype=torch.bfloat16, block_m=128, block_n=128
    )
    inputs = case.make()
    rng = np.random.default_rng(dim)
    size = (35.0 * dim**0.5) ** 0.5
    queries, keys = inputs.queries[0], inputs.keys[0]
    for x in (queries, keys):
        x /= 4
    queries[..., 0], keys[..., 0], queries[..., 1], keys[..., 1] = size, -size, 0.0, 0.0
    has_key = torch.from_numpy(rng.random((tiles, heads)) < 0.5)
    first, head = 128 * torch.arange(tiles)[:, None], torch.arange(heads)
    queries[first + torch.from_numpy(rng.integers(128, size=(tiles, heads))), head, 1] = size
    keys[first + torch.from_numpy(rng.integers(128, size=(tiles, heads))), head, 1] = (size * has_key).to(case.dtype)
    inputs.lay_out()
    always = torch.eye(tiles, dtype=torch.bool)
    always[:, 0] = True  # the sink
    visible = torch.ones(tiles, tiles, dtype=torch.bool).tril()
    return inputs, (has_key.T & visible[:, None]) | always[:, None]


def planted_policy(form: str, **options: Any) -> ExactSkip:
    return ExactSkip.absolute(CUT, **options) if form == "absolute" else ExactSkip(ratio=math.exp(CUT), **options)


def anywhere(inputs: Inputs, masks: Masks, form: str, seed: int, **options: Any) -> ExactSkip:
    """A cut for each head at one of the values that are compared, or close by; of any sign."""
    rng = np.random.default_rng((seed, 5))
    cuts = []
    for x in compared_values(inputs, ExactSkip(form=form, **options), masks):
        x = x if len(x) else np.zeros(1)
        near = 1e-3 * rng.choice((-1.0, 0.0, 1.0)) * rng.random()
        value = x[rng.integers(len(x))]
        cuts.append(value + near * abs(value))
    reference = torch.tensor(cuts, dtype=F32).reshape(-1, 1).nan_to_num()
    return ExactSkip(ratio=1.0, form=form, reference=reference, positions=(0,), **options)
