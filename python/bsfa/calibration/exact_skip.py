"""Calibrating ExactSkip: the references that its thresholds are counted from, and the thresholds.

    curves = collect_skip(model, tokenizer, prompts, ExactSkip(form="relative"))
    choose_skip(curves, 0.95).save("skip-0.95.safetensors")

* *relative*: per head, ``ln(lambda) - slope * ln(max(p, 1024) / 1024)`` at query position p: lambda by risk control,
  the slope (how lambda falls with the length; BLASST: 1) one of :data:`SLOPES`.
* *absolute*: per head, ``ln(ratio) + reference(p)``, the reference being the mean LSE of the dense attention near p:
  a block is skipped iff none of its logits reaches that share of an average query's softmax denominator.
* *absolute, by BSFA's own statement* (:func:`calibrate_kth`): the mean over prompts of what parts the k-th largest tile
  maximum from the next. No target, hence nothing promised; measured like the others.

Slopes and references are chosen by a quarter of the calibration half, which then chooses nothing else: given them,
the prompts that choose lambda or the ratio and a new prompt are exchangeable, as risk control requires.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bsfa.calibration.choose import HeldOut, by_length, choose, split_prompts, split_spent
from bsfa.calibration.collect import (
    TAIL,
    CalibrationCurves,
    Collector,
    CurveCollector,
    Progress,
    as_curves,
    check_options,
    measure,
    num_layers,
    prefill_work,
)
from bsfa.calibration.curves import (
    BlockCurves,
    always_kept,
    call_geometry,
    check_calibratable,
    skip_curves,
    threshold_grid,
)
from bsfa.calibration.resume import run_settings, tensors_sha256
from bsfa.calibration.risk import check_target, loosest_mean
from bsfa.errors import UnsupportedError
from bsfa.identity import ModelIdentity
from bsfa.measuring import tile_max
from bsfa.policies import ExactSkip
from bsfa.prompts import Prompt, TokenizedPrompt, tokenize
from bsfa.thresholds import CALIBRATED, ThresholdTable

if TYPE_CHECKING:
    from bsfa.integrations.transformers import AttentionCall

#: How a head's relative threshold may fall with the query's position p: as p^-slope. BLASST's rule is 1.
SLOPES = (0.0, 0.5, 1.0, 1.5)
ORIGIN = 1024  # tokens; relative thresholds are constant up to there
FARTHEST = 1 << 20  # tokens; and from there on
FIRST = 128  # tokens; first knot of absolute references
MAX_KNOTS = 64  # of calibrate_kth
LSE_UNIT = 2.0**-20  # nats: LSEs are summed as integers of this unit, so the order of a GPU's additions is free


def half_octaves(first: int, last: int) -> tuple[int, ...]:
    """Positions ``first * 2^(i / 2)``, rounded, up to ``last``, in tokens.

    Between two, linear interpolation of ``ln p`` is less than ``(ln 2)^2 / 32 = 0.016`` too small.
    """
    count = math.floor(2 * math.log2(last / first) + 1e-9) + 1 if last >= first else 1
    return tuple(round(first * 2 ** (i / 2)) for i in range(count))


LOG_KNOTS = half_octaves(ORIGIN, FARTHEST)


def log_reference(slopes: Tensor) -> Tensor:
    """``-slope * ln(p / ORIGIN)`` at :data:`LOG_KNOTS`, float32 [..., knots], of slopes [...]."""
    knots = torch.tensor(LOG_KNOTS, dtype=torch.float64)
    reference: Tensor = (-slopes.double()[..., None] * (knots / ORIGIN).log()).to(torch.float32) + 0.0  # no -0.0
    return reference


# ---- first pass: references from the dense model --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Levels:
    """What a prompt says about the references of each head, float32 [heads, places]."""

    nats: Tensor


class LseCollector(Collector[Levels]):
    """Mean LSE of the queries near each knot; 0 where the prompt has none."""

    kind = Levels
    dense: ClassVar[Mapping[str, float]] = {"nats": 0.0}

    def __init__(self, policy: ExactSkip, layers: int, knots: Sequence[int]):
        super().__init__(policy, layers)
        self.knots = knots

    def reduce(self, call: AttentionCall) -> Levels:
        return Levels(lse_means(call.lse[0], self.knots).cpu())


def knot_starts(knots: Sequence[int]) -> list[int]:
    """Where the queries that are nearest to each knot begin, by ratio of positions."""
    return [0, *(math.ceil(math.sqrt(a * b)) for a, b in itertools.pairwise(knots))]


def lse_means(lse: Tensor, knots: Sequence[int]) -> Tensor:
    """Mean LSE of the queries nearest to each knot, float32 [heads, knots], of lse [heads, S]; 0 for none."""
    if not bool(lse.isfinite().all()):
        raise UnsupportedError("the model's attention has an LSE that is not finite: nothing to calibrate against")
    units = (lse.double() / LSE_UNIT).round().to(torch.int64)
    starts = knot_starts(knots)
    means = [
        (units[:, a:b].sum(-1).double() / max(units[:, a:b].shape[1], 1)) * LSE_UNIT
        for a, b in zip(starts, [*starts[1:], lse.shape[1]], strict=True)
    ]
    return torch.stack(means, dim=-1).to(torch.float32)


class KthCollector(Collector[Levels]):
    """Per query tile, what parts the k-th largest tile maximum from the next; NaN for tiles that a prompt has not."""

    kind = Levels
    dense: ClassVar[Mapping[str, float]] = {"nats": -math.inf}

    def __init__(self, policy: ExactSkip, layers: int, k: int, tiles: int):
        super().__init__(policy, layers)
        self.k = k
        self.tiles = tiles

    def reduce(self, call: AttentionCall) -> Levels:
        policy = self.policy
        assert isinstance(policy, ExactSkip)
        if not call.causal:
            raise UnsupportedError("BSFA's statement is about blocks before the diagonal: attention must be causal")
        maxima = tile_max(
            call.q,
            call.k,
            form="absolute",
            block_m=policy.block_m,
            block_n=policy.block_n,
            softmax_scale=call.softmax_scale,
            softcap=call.softcap,
        )
        found = torch.full((maxima.shape[1], self.tiles), math.nan)
        visible = call_geometry(call.q, call.k, True, policy.block_m, policy.block_n).visible_blocks()
        candidates = torch.arange(maxima.shape[2], device=maxima.device) < visible[:, None]
        candidates &= ~always_kept(policy, call.q, call.k, True)
        found[:, : maxima.shape[0]] = kth_levels(maxima, candidates, self.k).cpu()
        return Levels(found)


def kth_levels(maxima: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Midpoint of the k-th and (k + 1)-th largest of each tile's maxima, float32 [heads, tiles].

    maxima: [tiles, heads, blocks]; candidates: bool [tiles, blocks]. -inf where there are at most k candidates.
    """
    if not bool(maxima.masked_fill(~candidates[:, None], 0.0).isfinite().all()):
        raise UnsupportedError("the model's attention has a logit that is not finite: nothing to calibrate against")
    if maxima.shape[2] <= k:
        return torch.full((maxima.shape[1], maxima.shape[0]), -math.inf, device=maxima.device)
    best = maxima.masked_fill(~candidates[:, None], -math.inf).topk(k + 1, dim=-1).values.double()
    middle = ((best[..., k - 1] + best[..., k]) / 2).to(torch.float32)
    return middle.masked_fill((candidates.sum(-1) <= k)[:, None], -math.inf).t()


# ---- second pass: curves, given references --------------------------------------------------------------------------


class SlopeCollector(CurveCollector):
    """Curves [heads, slopes, G] for every slope, from one look at the logits."""

    def reduce(self, call: AttentionCall) -> BlockCurves:
        policy = self.policy
        assert isinstance(policy, ExactSkip)
        candidates = [replace(policy, reference=log_reference(torch.tensor([s])), positions=LOG_KNOTS) for s in SLOPES]
        found = skip_curves(
            candidates,
            self.grid,
            call.q,
            call.k,
            call.lse,
            causal=call.causal,
            softmax_scale=call.softmax_scale,
            softcap=call.softcap,
            tail=self.tail,
        )
        return BlockCurves(**{f.name: torch.stack([getattr(c, f.name) for c in found], 1) for f in fields(BlockCurves)})


class ReferenceCollector(CurveCollector):
    """Curves under the reference [layers, heads, knots] of each layer."""

    def __init__(self, policy: ExactSkip, grid: Tensor, tail: float, reference: Tensor, positions: tuple[int, ...]):
        super().__init__(policy, reference.shape[0], grid, tail)
        self.reference = reference
        self.positions = positions

    def layer_policy(self, layer: int) -> ExactSkip:
        assert isinstance(self.policy, ExactSkip)
        return replace(self.policy, reference=self.reference[layer], positions=self.positions)


@dataclass(frozen=True, eq=False, kw_only=True)
class SkipCurves:
    """What the passes over the prompts measured; :func:`choose_skip` makes tables for any target from it.

    candidates: the same prompts under every slope of ``slopes``, or under the one reference of the absolute form.
    seed: of the split into prompts that choose references, that choose thresholds, and that check.
    """

    candidates: tuple[CalibrationCurves, ...]
    slopes: tuple[float, ...]
    seed: int


def _check(policy: ExactSkip, k: int | None = None) -> None:
    if not isinstance(policy, ExactSkip):
        raise TypeError(f"expected an ExactSkip, got {type(policy).__name__}")
    if policy.reference is not None:
        raise ValueError("calibration chooses the reference: give an ExactSkip without one")
    check_calibratable(policy)
    if k is None:
        return
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if policy.form != "absolute":
        raise ValueError("the k-th largest tile maximum is an absolute threshold: give an ExactSkip of that form")


def _part(progress: Progress | None, before: float, own: float, after: float) -> Progress | None:
    """Progress of a pass in the middle of others."""
    if progress is None:
        return None

    def report(done: float, total: float, now: str) -> None:
        progress(before + own * done / max(total, 1.0), before + own + after, now)

    return report


def _work(prompts: Sequence[TokenizedPrompt]) -> float:
    return sum(prefill_work(len(t)) for t in prompts)


def _folder(resume: str | Path | None, name: str) -> Path | None:
    return None if resume is None else Path(resume) / name


#: Folders inside ``resume``, one a pass.
PASSES = ("references", "curves")


def collect_skip(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policy: ExactSkip,
    *,
    tail: float = TAIL,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> SkipCurves:
    """Measure what ``policy`` (its form, blocks, sinks and window) loses and skips at every ratio of a fixed grid.

    Arguments as in :func:`bsfa.calibration.collect`; at least three prompts. The relative form takes one dense pass;
    the absolute form another one before it, over the prompts that choose its references (an eighth of all, by
    ``seed``). ``tail`` is about groups of 64 query rows. Raises what ``collect`` raises.
    """
    _check(policy)
    check_options(prompts, tail, least=3)
    tokenized = [tokenize(p, tokenizer, max_length) for p in prompts]
    spent = split_spent(len(prompts), seed)[0].tolist()
    grid, layers, relative = threshold_grid(policy), num_layers(model), policy.form == "relative"
    names = [f.name for f in fields(BlockCurves)]
    identity = ModelIdentity.of(model)
    reference: Tensor | None = None
    positions: tuple[int, ...] = ()
    before = 0.0
    collector: CurveCollector
    if relative:
        collector = SlopeCollector(policy, layers, grid, tail)
        extra: dict[str, Any] = {"curves": names, "slopes": list(SLOPES), "knots": list(LOG_KNOTS)}
    else:
        some = [tokenized[i] for i in spent]
        knots = half_octaves(FIRST, max(map(len, some)))
        first = LseCollector(policy, layers, knots)
        before, after = _work(some), _work(tokenized)
        levels = measure(
            model,
            some,
            first,
            lambda: run_settings(model, identity, policy, grid, tail, {"lse": list(knots)}),
            progress=_part(progress, 0.0, before, after),
            resume=_folder(resume, PASSES[0]),
        )
        reference, positions = mean_lse([x.nats for x in levels], [len(t) for t in some], knots)
        collector = ReferenceCollector(policy, grid, tail, reference, positions)
        extra = {"curves": names, "reference": tensors_sha256({"reference": reference}), "knots": list(positions)}
    found = measure(
        model,
        tokenized,
        collector,
        lambda: run_settings(model, identity, policy, grid, tail, extra),
        progress=_part(progress, before, _work(tokenized), 0.0),
        resume=_folder(resume, PASSES[1]),
    )
    whole = as_curves(identity, prompts, tokenized, collector, found)
    whole = replace(whole, spent=tuple(spent), reference=reference, positions=positions)
    if not relative:
        facts = {"reference": "mean LSE near each position, over the reference prompts", "reference_prompts": spent}
        return SkipCurves(candidates=(replace(whole, facts=facts),), slopes=(), seed=seed)
    each = [
        replace(
            whole,
            lost_mass=whole.lost_mass[:, :, :, i],
            tail_lost=whole.tail_lost[:, :, :, i],
            density=whole.density[:, :, :, i],
        )
        for i in range(len(SLOPES))
    ]
    return SkipCurves(candidates=tuple(each), slopes=SLOPES, seed=seed)


def mean_lse(levels: Sequence[Tensor], tokens: Sequence[int], knots: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Mean over the prompts that reach each knot, float32 [layers, heads, knots], and the knots that one reaches."""
    starts = torch.tensor(knot_starts(knots))
    total, count = torch.zeros_like(levels[0], dtype=torch.float64), torch.zeros(len(knots), dtype=torch.float64)
    for nats, length in zip(levels, tokens, strict=True):
        reached = starts < length
        total += nats.double() * reached
        count += reached
    used = int((count > 0).sum())
    mean = (total[..., :used] / count[:used]).to(torch.float32)
    return mean.contiguous(), tuple(knots[:used])


def choose_skip(curves: SkipCurves, target_recall: float, *, confidence: float | None = None) -> ThresholdTable:
    """Thresholds that keep ``target_recall`` of the attention mass, as :func:`bsfa.calibration.choose` promises it.

    Relative: first the slope of each head, the one of ``curves.slopes`` with which the reference prompts need the
    lowest density for the target in the mean over them and over those of every length (ties: the smaller slope);
    ``table.calibration["slopes"]`` [layers][heads] has it, null in layers that stay dense.
    """
    check_target(target_recall)
    if not curves.slopes:
        return choose(curves.candidates[0], target_recall, confidence=confidence, seed=curves.seed)
    first = curves.candidates[0]
    spent = torch.tensor(first.spent)
    needed = [_density_at_target(one, spent, target_recall) for one in curves.candidates]
    best, least = torch.zeros_like(needed[0], dtype=torch.int64), needed[0]  # [layers, heads]
    for i, density in enumerate(needed):
        best, least = torch.where(density < least, i, best), torch.minimum(density, least)
    slopes = torch.tensor(curves.slopes, dtype=torch.float64)[best]
    calibrated = [kind == CALIBRATED for kind in first.layers]
    per_head = [row.tolist() if on else None for row, on in zip(slopes, calibrated, strict=True)]
    chosen = replace(
        first,
        lost_mass=_picked([c.lost_mass for c in curves.candidates], best),
        tail_lost=_picked([c.tail_lost for c in curves.candidates], best),
        density=_picked([c.density for c in curves.candidates], best),
        reference=log_reference(slopes).contiguous(),
        positions=LOG_KNOTS,
        facts={
            "reference": f"-slope * ln(max(p, {ORIGIN}) / {ORIGIN}) at query position p",
            "reference_prompts": list(first.spent),
            "slope_candidates": list(curves.slopes),
            "slopes": per_head,
        },
    )
    return choose(chosen, target_recall, confidence=confidence, seed=curves.seed)


def _picked(candidates: Sequence[Tensor], best: Tensor) -> Tensor:
    """Curves [prompts, layers, heads, G], each head's from the candidate that ``best`` [layers, heads] names."""
    picked = candidates[0].clone()
    for i, one in enumerate(candidates):
        mine = best == i
        picked[:, mine] = one[:, mine]
    return picked


def _density_at_target(curves: CalibrationCurves, prompts: Tensor, target: float) -> Tensor:
    """Density that the prompts need for the target, in the mean over them and over those of every length."""
    risks = curves.tail_lost[prompts]
    index = loosest_mean(risks, target)
    for members in by_length(curves.tokens, prompts).values():
        index = torch.minimum(index, loosest_mean(risks[members], target))
    density = curves.density[prompts].double().mean(0)
    return density.gather(-1, index.clamp(min=0)[..., None])[..., 0]


# ---- BSFA's own statement -------------------------------------------------------------------------------------------


def calibrate_kth(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policy: ExactSkip,
    k: int,
    *,
    tail: float = TAIL,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> ThresholdTable:
    """Absolute thresholds that leave about k blocks a query tile besides sinks and window, as BSFA chooses them.

    Per layer, head and query tile the midpoint of the k-th and (k + 1)-th largest tile maximum among the blocks that
    are not always kept, -inf (nothing is skipped) where there are at most k; then the mean over the calibration half of
    the prompts, at up to 64 tile positions. Thresholds of logits in nats: how many blocks another prompt keeps depends
    on its logits, and no recall is promised. The held-out half measures recall and density.

    Arguments as in :func:`collect_skip`; at least two prompts. Differs from the original: maxima of tiles of
    ``block_m`` x ``block_n`` (128 x 128) instead of 128 x 64, sinks are no candidates, linear interpolation between
    positions, and the mean is over the prompts that are long enough.
    """
    _check(policy, k)
    check_options(prompts, tail)
    tokenized = [tokenize(p, tokenizer, max_length) for p in prompts]
    held_in, held_out = split_prompts(len(prompts), seed)
    some, rest = [tokenized[i] for i in held_in.tolist()], [tokenized[i] for i in held_out.tolist()]
    tiles, layers = -(-max(map(len, some)) // policy.block_m), num_layers(model)
    grid = torch.tensor([policy.keep_all_threshold(), 1.0])
    identity = ModelIdentity.of(model)
    first = KthCollector(policy, layers, k, tiles)
    levels = measure(
        model,
        some,
        first,
        lambda: run_settings(model, identity, policy, grid, tail, {"k": k, "tiles": tiles}),
        progress=_part(progress, 0.0, _work(some), _work(rest)),
        resume=_folder(resume, PASSES[0]),
    )
    reference, positions = mean_levels([x.nats for x in levels], policy.block_m)
    collector = ReferenceCollector(policy, grid, tail, reference, positions)
    extra = {
        "curves": [f.name for f in fields(BlockCurves)],
        "reference": tensors_sha256({"reference": reference}),
        "knots": list(positions),
    }
    found = measure(
        model,
        rest,
        collector,
        lambda: run_settings(model, identity, policy, grid, tail, extra),
        progress=_part(progress, _work(some), _work(rest), 0.0),
        resume=_folder(resume, PASSES[1]),
    )
    curves = as_curves(identity, prompts, rest, collector, found)
    calibrated = torch.tensor([kind == CALIBRATED for kind in curves.layers])
    sparse = calibrated[:, None] & (reference > -math.inf).any(-1)
    return ThresholdTable(
        policy=policy.with_threshold(policy.keep_all_threshold()),
        thresholds=sparse.to(torch.float32),
        layers=curves.layers,
        reference=reference,
        positions=positions,
        model=curves.model,
        attention=curves.attention,
        calibration={
            "method": "mean of the k-th largest tile maximum (BSFA)",
            "goal": f"{k} blocks a query tile besides sinks and window (BSFA's k)",
            "promise": "none: recall and density are what the held-out prompts gave",
            "k": k,
            "tail": float(tail),
            "calibration_prompts": len(held_in),
            "held_out_prompts": len(held_out),
            "tokens": [len(t) for t in tokenized],
            "prompts_sha256": curves.prompts_sha256,
            "seed": seed,
        },
        **HeldOut(curves, sparse.to(torch.int64), torch.arange(len(rest))).fields(),
    )


def mean_levels(levels: Sequence[Tensor], block_m: int) -> tuple[Tensor, tuple[int, ...]]:
    """Mean over the prompts that have a tile, float32 [layers, heads, knots], and the knots' positions.

    levels: [layers, heads, tiles], NaN past a prompt's end, -inf for tiles with too few candidates (the same ones in
    every prompt: the first). All tiles are knots, or 64 of them: the last that skips nothing, the next and the last,
    and others between in even ratio; a tile between two has the value of the straight line.
    """
    total, count = torch.zeros_like(levels[0], dtype=torch.float64), torch.zeros_like(levels[0], dtype=torch.float64)
    for nats in levels:
        there = ~nats.isnan()
        total += torch.where(there, nats, 0.0).double()
        count += there
    mean = (total / count.clamp(min=1)).to(torch.float32)
    mean = torch.where(count > 0, mean, -math.inf)
    finite = (mean > -math.inf).any(0).any(0).nonzero().flatten().tolist()
    knots = thinned(finite[0] if finite else mean.shape[-1], mean.shape[-1])
    return mean[..., knots].contiguous(), tuple(i * block_m for i in knots)


def thinned(first: int, count: int) -> list[int]:
    """At most :data:`MAX_KNOTS` of the tiles 0 .. count - 1, of which those before ``first`` skip nothing."""
    if first >= count:
        return [0]
    head = [first - 1] if first else []
    room = MAX_KNOTS - len(head)
    tiles = count - first
    if tiles <= room:
        return [*head, *range(first, count)]
    # In even ratio of positions; where that would be less than a tile apart, every tile.
    chosen: list[int] = []
    at = first
    while len(chosen) < room - 1:
        chosen.append(at)
        ratio = (count - 1) / max(at, 1)
        at = max(at + 1, round(at * ratio ** (1 / (room - len(chosen)))))
    return [*head, *chosen, count - 1]
