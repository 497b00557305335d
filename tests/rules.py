"""Random and structured inputs for every selection rule, and the check of masks and scores against oracle_rules.

The same body runs on the CPU and, with another :class:`Profile`, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import bsfa
import oracle
import oracle_rules
from bsfa.policies import Antidiagonal, CumulativeMass, RelativeMax, ScoredPolicy
from cases import BATCHED, BF16, F16, F32, PACKED, PAGED, PAGED_PACKED, Case, Inputs, int32, poison

Rng = np.random.Generator


@dataclass(frozen=True)
class Profile:
    """Where a check runs and what it draws from. ``blocks``: block sizes in tokens."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (F32, F32, BF16, F16)
    dims: tuple[int, ...] = (8, 20, 32, 64)
    blocks: tuple[int, ...] = (16, 32, 48, 64)
    blocks64: tuple[int, ...] = (64, 128)  #: for flat64
    longest: int = 8  #: longest prompt, in blocks
    epsilon: float = 3e-6  #: error of a logit, relative to 1 + the largest of its head
    rare: float = 0.005  #: share of blocks that may be near their threshold, by that error


CPU = Profile()
# Tensor cores sum less exactly. Where the softmax is sharp (flat64 in its original scale, maxabs) many more blocks are
# then near: counted with this error, up to 6.6 % of the inputs' blocks.
CUDA = Profile("cuda", (BF16,), (64, 128), (128,), (128,), 12, 1e-5, 0.1)


@dataclass(frozen=True)
class Form:
    """A policy class with fixed options; thresholds and the rest are drawn."""

    kind: type[ScoredPolicy]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.kind.name, *(f"{k}={v}" for k, v in self.options)])

    def draw(self, rng: Rng, case: Case) -> ScoredPolicy:
        """With random thresholds (often one per head), sinks, window, last tiles and min_blocks."""
        options = dict(self.options)
        heads = case.hkv if self.kind is RelativeMax and options.get("shared") else case.hq
        low, high = (0.02, 0.9) if self.kind is RelativeMax else (0.3, 0.97)
        threshold: Any = float(rng.uniform(low, high))
        if rng.random() < 0.5:
            threshold = rng.uniform(low, high, heads).tolist()
            if rng.random() < 0.3:
                threshold[0] = float(rng.integers(0, 2))  # the ends
        drawn: dict[str, Any] = {
            "sink_blocks": int(rng.integers(0, 3)),
            "window_blocks": int(rng.integers(1, 3)),
            "last_tiles": int(rng.integers(0, 2)),
            "min_blocks": int(rng.choice([0, 0, 1, 3])),
        }
        for name, value in options.items():
            drawn[name] = value(rng) if callable(value) else value
        drawn[self.kind.threshold_name] = threshold
        return self.kind(block_m=case.block_m, block_n=case.block_n, **drawn)


def form(kind: type[ScoredPolicy], **options: Any) -> Form:
    return Form(kind, tuple(options.items()))


FORMS = [
    form(RelativeMax),
    form(RelativeMax, shared=True),
    *(form(CumulativeMass, pooling=pooling) for pooling in ("mean", "maxabs", "center", "flat64")),
    form(CumulativeMass, pooling="flat64", original_scale=True),
    form(CumulativeMass, pooling="mean", shared=True),
    form(CumulativeMass, pooling="flat64", shared=True),
    form(CumulativeMass, pooling="maxabs", keep_ratio=0.35),
    form(CumulativeMass, pooling="flat64", shared=True, probability=0.07),
    form(CumulativeMass, pooling="mean", rescue_stride=5, rescue_seed=3),
    form(CumulativeMass, pooling="center", shared=True, rescue_probability=0.2, rescue_seed=77),
    *(form(Antidiagonal, stride=stride) for stride in (4, 8, 16)),
]


def draw_case(form: Form, profile: Profile, rng: Rng) -> Case:
    """Random lengths, heads, sizes, layout and maths that the form and the profile allow."""
    options = dict(form.options)

    def pick(values: tuple[Any, ...]) -> Any:
        return values[int(rng.integers(len(values)))]

    blocks = profile.blocks64 if options.get("pooling") == "flat64" else profile.blocks
    block_m, block_n = pick(blocks), pick(blocks)
    layout = pick((BATCHED, PACKED, PAGED, PAGED_PACKED))
    longest = profile.longest * block_n

    def lengths() -> tuple[int, int]:
        seqlen_k = int(rng.integers(1, longest))
        kind = rng.random()
        if kind < 0.4:  # a whole prompt
            return seqlen_k, seqlen_k
        if kind < 0.95:  # a chunk
            return int(rng.integers(1, seqlen_k + 1)), seqlen_k
        return seqlen_k + int(rng.integers(1, 50)), seqlen_k  # queries before the first key

    count = int(rng.integers(1, 3))
    drawn = [lengths() for _ in range(count)]
    if layout in (PACKED, PAGED_PACKED):
        drawn.insert(1, (0, 0) if rng.random() < 0.3 else (1, drawn[0][1]))
    elif layout == PAGED:
        seqlen_q = min(n for n, _ in drawn)
        drawn = [(seqlen_q, max(seqlen_k, 1)) for _, seqlen_k in drawn]
    else:
        drawn = drawn[:1] * count
    hkv = int(rng.integers(1, 3))
    return Case(
        lengths=tuple(drawn),
        layout=layout,
        page_size=int(pick((7, 16, 64))),
        strides=pick(("plain", "plain", "interleaved", "head-major")),
        hq=hkv * int(pick((1, 2, 3, 5))),
        hkv=hkv,
        dim=int(pick(profile.dims)),
        dtype=pick(profile.dtypes),
        causal=bool(rng.random() < 0.75),
        softcap=float(pick((0.0, 0.0, 3.0))),
        scale=float(pick((0.2, 0.5))),
        block_m=int(block_m),
        block_n=int(block_n),
        seed=int(rng.integers(1 << 30)),
    )


# --- structured inputs: what attention of trained models looks like ---------------------------------------------------


def sinks(q: torch.Tensor, k: torch.Tensor, offset: int, rng: Rng) -> None:
    """The first tokens draw every query."""
    direction = torch.from_numpy(rng.standard_normal(k.shape[-1])).float()
    direction /= direction.norm()
    k[:4] += 6 * direction
    q += 2 * direction


def verticals(q: torch.Tensor, k: torch.Tensor, offset: int, rng: Rng) -> None:
    """A few tokens anywhere draw every query."""
    direction = torch.from_numpy(rng.standard_normal(k.shape[-1])).float()
    direction /= direction.norm()
    columns = torch.from_numpy(rng.integers(0, max(len(k), 1), 5))
    k[columns[columns < len(k)]] += 9 * direction
    q += 2 * direction


def slashes(q: torch.Tensor, k: torch.Tensor, offset: int, rng: Rng) -> None:
    """Each query looks for the key a fixed distance before it."""
    group = q.shape[1] // k.shape[1]
    distance = int(rng.integers(0, 120))
    for i in range(len(q)):
        target = offset + i - distance
        if 0 <= target < len(k):
            q[i] += 1.5 * k[target].repeat_interleave(group, dim=0)


def block_diagonal(q: torch.Tensor, k: torch.Tensor, offset: int, rng: Rng) -> None:
    """Tokens of one passage look at each other."""
    passage = int(rng.integers(30, 150))
    directions = torch.from_numpy(rng.standard_normal((len(k) // passage + 1, k.shape[-1]))).float()
    directions *= 2.0 / directions.norm(dim=-1, keepdim=True)
    for i in range(len(k)):
        k[i] += directions[i // passage]
    for i in range(len(q)):
        if 0 <= offset + i < len(k):
            q[i] += directions[(offset + i) // passage]


def needle(q: torch.Tensor, k: torch.Tensor, offset: int, rng: Rng) -> None:
    """One token holds what the last queries look for; everything else is faint."""
    if len(k) == 0 or len(q) == 0:
        return
    direction = torch.from_numpy(rng.standard_normal(k.shape[-1])).float()
    k *= 0.3
    k[int(rng.integers(len(k)))] += 12 * direction / direction.norm()
    q[-8:] += 4 * direction / direction.norm()


STRUCTURES: list[Callable[[torch.Tensor, torch.Tensor, int, Rng], None]] = [
    sinks,
    verticals,
    slashes,
    block_diagonal,
    needle,
]


def structured(case: Case, which: int, rng: Rng) -> Inputs:
    """The inputs of a case with one of the structures in them."""
    inputs = case.make()
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        q, k = inputs.queries[b].float(), inputs.keys[b].float()
        STRUCTURES[which % len(STRUCTURES)](q, k, seqlen_k - seqlen_q if case.causal else 0, rng)
        inputs.queries[b], inputs.keys[b] = q.to(case.dtype), k.to(case.dtype)
    inputs.lay_out()
    return inputs


# --- check ------------------------------------------------------------------------------------------------------------


def thresholds(policy: ScoredPolicy, heads: int) -> np.ndarray:
    """float64 [heads], rounded as the kernels have them."""
    return np.broadcast_to(np.float32(policy.threshold), (heads,)).astype(np.float64)


def verdict(
    policy: ScoredPolicy,
    inputs: Inputs,
    b: int,
    tile: oracle.Tile,
    summary: np.ndarray | None,
    always: np.ndarray,
    epsilon: float,
) -> oracle_rules.Verdict:
    """What the rule says about a tile of sequence ``b``, per score head (union: per KV head)."""
    case = inputs.case
    q, k, _ = inputs.arrays(b)
    seqlen_q, seqlen_k = case.lengths[b]
    offset = seqlen_k - seqlen_q if case.causal else 0
    maths: dict[str, Any] = {"scale": case.softmax_scale, "softcap": case.softcap}
    sizes = {"block_m": case.block_m, "block_n": case.block_n}
    if isinstance(policy, RelativeMax):
        assert summary is not None
        return oracle_rules.relative_max(
            q,
            summary,
            tile,
            seqlen_k,
            block_n=case.block_n,
            causal=case.causal,
            **maths,
            epsilon=epsilon,
            grouped=policy.shared,
            alpha=thresholds(policy, case.hkv if policy.shared else case.hq),
            top=oracle_rules.best_count(policy.min_blocks, 0.0, tile.visible),
        )
    mass = thresholds(policy, case.hq)
    if isinstance(policy, Antidiagonal):
        weights, error = oracle_rules.antidiagonal_weights(
            q, k, tile, offset, stride=policy.stride, **sizes, causal=case.causal, **maths, epsilon=epsilon
        )
        logs = np.log(np.maximum(weights, oracle_rules.TINY))
        top = oracle_rules.best_count(policy.min_blocks, 0.0, tile.visible)
        return oracle_rules.by_mass(logs, error, always, mass=mass, top=top, probability=1.0)
    assert isinstance(policy, CumulativeMass)
    if policy.pooling == "flat64":
        maths["scale"] *= 64 if policy.original_scale else 1
        logs = oracle_rules.flat64_logits(q, k, tile, offset, **sizes, **maths)
    else:
        assert summary is not None
        logs = oracle_rules.pooled_logits(q, summary, tile, mode=policy.pooling, **maths)
    found = oracle_rules.by_mass(
        logs,
        oracle_rules.error_of(logs, epsilon),
        np.zeros(tile.visible, dtype=bool),
        mass=mass,
        top=oracle_rules.best_count(policy.min_blocks, policy.keep_ratio, tile.visible),
        probability=1.0 if policy.probability is None else float(np.float32(policy.probability)),
    )
    return found.union(case.hkv) if policy.shared else found


def run(policy: ScoredPolicy, inputs: Inputs, device: str, prompt_lens: list[int] | None = None) -> Any:
    """(mask rows, counts, scores, summary) on the CPU, made on ``device``."""
    case, moved = inputs.case, inputs if device == "cpu" else inputs.to(device)
    g = moved.geometry
    poison((g.num_rows, case.hq, g.num_blocks), device=device)
    summary = None
    if policy.needs_summary:
        summary = bsfa.pool_blocks(moved.k, block_n=case.block_n, pooling=policy.summary_pooling, **moved.layout_k)
    keys = {"k": moved.k, "block_table": moved.block_table} if policy.needs_keys else {}
    mask, scores = bsfa.select_blocks(
        moved.q,
        summary,
        policy,
        prompt_lens=None if prompt_lens is None else int32(prompt_lens).to(device),
        return_scores=True,
        **keys,
        **moved.maths,
        **moved.layout_select,
    )
    return mask.to_rows().cpu(), mask.counts.cpu(), scores.cpu(), None if summary is None else summary.cpu()


def check(policy: ScoredPolicy, inputs: Inputs, profile: Profile = CPU) -> tuple[int, int]:
    """Assert that mask and scores are the oracle's; returns (blocks that rounding may decide, all visible blocks)."""
    case = inputs.case
    rows, counts, scores, summary = run(policy, inputs, profile.device)
    shared = bool(getattr(policy, "shared", False))
    heads = case.hkv if shared else case.hq
    g = inputs.geometry
    assert rows.shape == (g.num_rows, heads, g.num_blocks)
    grouped = shared and isinstance(policy, RelativeMax)
    assert scores.shape == (g.num_rows, case.hkv if grouped else case.hq, g.num_blocks)
    assert torch.equal(counts, rows.sum(-1, dtype=torch.int32))
    exempt = total = 0
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        pooled = None
        if summary is not None and seqlen_k:
            pooled = summary[b, : -(-seqlen_k // case.block_n)].double().numpy()
            if policy.summary_pooling != "mean":  # (means: test_pool.py)
                want = oracle_rules.pool_blocks(inputs.arrays(b)[1], case.block_n, policy.summary_pooling)
                assert np.array_equal(pooled, want), f"sequence {b}: pooled keys"
        got_rows, got_scores = inputs.rows_of_sequence(rows, b), inputs.rows_of_sequence(scores, b)
        end = seqlen_k if case.causal else seqlen_q
        for t, tile in enumerate(inputs.tiles(b)):
            n, where = tile.visible, f"{case}, {policy}: sequence {b}, tile {t}"
            assert not got_rows[t, :, n:].any() and (got_scores[t, :, n:] == -1).all(), f"{where}: invisible blocks"
            if n == 0:
                continue
            always = oracle.always_kept(
                tile,
                seqlen_q,
                seqlen_k,
                block_m=case.block_m,
                block_n=case.block_n,
                causal=case.causal,
                sink=policy.sink_blocks,
                window=policy.window_blocks,
            )
            found = verdict(policy, inputs, b, tile, pooled, always, profile.epsilon)
            got = got_scores[t, :, :n]
            assert (got >= found.low).all() and (got <= found.high).all(), f"{where}: scores"
            keep = np.broadcast_to(always, (heads, n))
            if policy.last_tiles and tile.index >= -(-end // case.block_m) - policy.last_tiles:
                keep = np.ones((heads, n), dtype=bool)
            if isinstance(policy, CumulativeMass):
                keep = keep | oracle_rules.rescued(
                    tile.index,
                    n,
                    heads,
                    stride=policy.rescue_stride,
                    probability=policy.rescue_probability,
                    seed=policy.rescue_seed,
                )
            found = found.with_always(keep)
            assert not (found.must & ~found.kept).any() and not (found.kept & ~found.may).any(), f"{where}: the oracle"
            wrong = (got_rows[t, :, :n] & ~found.may) | (~got_rows[t, :, :n] & found.must)
            assert not wrong.any(), f"{where}: (head, block) {np.argwhere(wrong).tolist()}"
            exempt += int((found.may & ~found.must).sum())
            total += wrong.size
    assert not inputs.unused_rows(rows).any() and (inputs.unused_rows(scores) == -1).all(), "rows of no tile"
    return exempt, total


def check_many(form: Form, profile: Profile, random: int, structures: int) -> None:
    """``random`` random and ``structures`` structured inputs; blocks that rounding decides must be rare."""
    for count, kind in ((random, "random"), (structures, "structured")):
        exempt = total = 0
        for i in range(count):
            rng = np.random.default_rng((count, i))
            case = draw_case(form, profile, rng)
            if kind == "structured":
                case = replace(case, lengths=tuple((max(a, 40), max(n, 200)) for a, n in case.lengths))
            inputs = structured(case, i, rng) if kind == "structured" else case.make()
            near, blocks = check(form.draw(rng, case), inputs, profile)
            exempt, total = exempt + near, total + blocks
        assert total > 20 * count
        assert exempt <= max(2, profile.rare * total), f"{kind}: {exempt} of {total} blocks are near their threshold"
