"""Dense against sparse on prompts with known answers: quality, mass kept, blocks kept and time.

For every prompt the model runs once densely and once per entry. The dense run also gives each entry's *recall*: the
attention mass that its blocks would keep, on the queries and keys of the dense run. *Density* is that of the masks that
the sparse run used, less what it skipped inside attention (:meth:`bsfa.AttentionInfo.density`). *Time* is the wall
clock of the whole prefill (all layers, and logits at the scored positions). On a CPU it is that of the measured run
less the time that the measuring itself took; on a GPU, where waiting for the clock at every layer would cost time of
its own, the prompt runs once more, unobserved: at its own length, and so warm.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bsfa._library import KERNELS
from bsfa.block_mask import BlockMask
from bsfa.calibration.collect import Progress, dense_model, prefill_work, text_config
from bsfa.calibration.curves import call_geometry, row_queries
from bsfa.calibration.forward import logits_at, prefill, synchronize
from bsfa.errors import UnsupportedError
from bsfa.measuring import block_mass, tile_max
from bsfa.placement import input_device, model_devices
from bsfa.policies import ExactSkip, PerLayer, Policy, StaticPattern
from bsfa.policies.exact_skip import SKIP_ROWS
from bsfa.prompts import Prompt, TokenizedPrompt, length_bucket, length_name, tokenize
from bsfa.stages import select_for
from bsfa.thresholds import ThresholdTable

if TYPE_CHECKING:
    from bsfa.integrations.transformers import AttentionCall

Entry = ThresholdTable | PerLayer | Policy | None

DENSE = "dense"
PROSE_TOKENS = 4096  # scored prose tokens per prompt, evenly spaced
LOGITS = 1 << 28  # largest [positions, vocab] to make
PROBABILITIES = 1 << 27  # largest [heads, queries, keys] to make, if one tile's are not more
WARM_UP = 256  # tokens


def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_m: int,
    block_n: int,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """:func:`bsfa.block_mass` of one whole prompt, on any device: where it has no kernel, by torch operations.

    Those make all probabilities, a few query tiles at a time: slow, but the same numbers. They also stand in where the
    device has a kernel, but not for these sizes or this dtype.
    """
    if "block_mass" in KERNELS.get(q.device.type, frozenset()):
        sizes: dict[str, Any] = {"block_m": block_m, "block_n": block_n, "causal": causal}
        with contextlib.suppress(UnsupportedError):
            return block_mass(q, k, lse, **sizes, softmax_scale=softmax_scale, softcap=softcap)
    return dense_mass(q, k, lse, block_m, block_n, causal, softmax_scale, softcap)


def dense_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_m: int,
    block_n: int,
    causal: bool,
    softmax_scale: float | None,
    softcap: float,
) -> Tensor:
    """:func:`bsfa.block_mass` of one whole prompt by torch operations: q [1, S, Hq, D], k [1, S, Hkv, D]."""
    geometry = call_geometry(q, k, causal, block_m, block_n)
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    keys = k[0].float().permute(1, 2, 0)[:, None]  # [Hkv, 1, D, S]
    columns = torch.arange(tokens, device=q.device)
    result = torch.zeros(geometry.num_rows, heads, geometry.num_blocks, device=q.device)
    step = max(PROBABILITIES // max(heads * tokens * block_m, 1), 1)  # tiles
    for tile in range(0, geometry.num_rows, step):
        rows = slice(tile * block_m, min((tile + step) * block_m, tokens))
        queries = q[0, rows].float().permute(1, 0, 2).unflatten(0, (kv_heads, -1))
        logits = (queries @ keys).flatten(0, 1) * scale  # [Hq, rows, S]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        shares = (logits - lse[0, :, rows, None]).exp()
        if causal:
            shares.masked_fill_(columns > columns[rows, None], 0.0)
        blocks = torch.nn.functional.pad(shares, (0, -tokens % block_n)).unflatten(-1, (-1, block_n)).sum(-1)
        for part, rows_of_tile in enumerate(blocks.split(block_m, dim=1)):
            result[tile + part] = rows_of_tile.mean(1)
    return result


def unskipped(
    q: Tensor, k: Tensor, policy: ExactSkip, *, causal: bool, softmax_scale: float | None, softcap: float
) -> tuple[int, Tensor]:
    """What ``policy`` would not skip of one whole prompt, if all blocks were met: a number of tokens that divides
    block_m (64, where that does), and bool [tiles of so many tokens, Hq, blocks].

    The form "relative" is judged by running maxima over all blocks. That is what attention does without ``within`` and
    with cuts of at most 0; otherwise its running maxima may be lower, and it skips less.
    """
    unit = math.gcd(SKIP_ROWS, policy.block_m)
    scale: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "softcap": softcap}
    maxima = tile_max(q, k, form=policy.form, block_m=unit, block_n=policy.block_n, **scale)
    tiles = -(-q.shape[1] // policy.block_m)
    units = policy.block_m // unit
    padded = torch.nn.functional.pad(maxima, (0, 0, 0, 0, 0, tiles * units - len(maxima)), value=-math.inf)
    # Units of a group, or of a tile in two passes, decide together: by the largest of their values, NaN if one is.
    together = SKIP_ROWS // unit if policy.passes == 1 else units
    groups = padded.unflatten(0, (tiles, units)).split(together, dim=1)
    top = torch.cat([g.amax(1, keepdim=True).expand_as(g) for g in groups], dim=1)  # [tiles, units, Hq, blocks]
    cuts = policy.cuts(q.shape[2], tiles, q.device).T[:, None, :, None]
    always = StaticPattern(
        sink_blocks=policy.sink_blocks,
        window_blocks=policy.window_blocks,
        block_m=policy.block_m,
        block_n=policy.block_n,
    )
    forced = select_for(q, k, always, causal=causal)
    assert isinstance(forced, BlockMask)
    return unit, (~(top < cuts) | forced.to_rows()[:, None]).flatten(0, 1)[: len(maxima)]


@dataclass(frozen=True)
class Accuracy:
    """Questions answered right (argmax at every token of the answer) of those asked."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """right / asked; NaN if nothing was asked."""
        return self.right / self.asked if self.asked else math.nan


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What one entry achieved. ``by_length`` keys are prompt lengths like "8K" (nearest power of two).

    prose_loss: nats per token over ``prose_tokens`` tokens; NaN without prose. ``prose_loss_by_length``: likewise.
    density, recall: means over prompts, full-attention layers and heads; 1.0 for the dense run.
    layer_density, layer_recall: [layers][heads]; NaN for layers without full attention through bsfa.
    seconds: prefill wall clock of all prompts together; speedup: the dense run's seconds / this one's (1.0 for itself).
    dense_reasons: layers that ran dense against the entry's wish.
    """

    name: str
    policy: str
    prose_loss: float
    prose_tokens: int
    prose_loss_by_length: dict[str, float]
    accuracy: Accuracy
    accuracy_by_task: dict[str, Accuracy]
    accuracy_by_length: dict[str, Accuracy]
    accuracy_by_task_and_length: dict[str, dict[str, Accuracy]]
    density: float
    recall: float
    density_by_length: dict[str, float]
    recall_by_length: dict[str, float]
    seconds: float
    seconds_by_length: dict[str, float]
    speedup: float
    speedup_by_length: dict[str, float]
    layer_density: list[list[float]]
    layer_recall: list[list[float]]
    dense_reasons: list[str]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The dense run and one run per entry, over the same prompts."""

    prompts: int
    prompts_by_length: dict[str, int]
    tokens: int
    runs: dict[str, RunReport]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN becomes None, and an accuracy {"right", "asked"}."""
        result: dict[str, Any] = _jsonable(asdict(self))
        return result


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Totals:
    """Sums of one run over the prompts."""

    nll: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by length, like the tokens
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    answers: list[tuple[str, str, bool]] = field(default_factory=list)  # task, length, right
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    density: list[Tensor] = field(default_factory=list)  # [layers, heads] per prompt
    recall: list[Tensor] = field(default_factory=list)
    reasons: dict[str, None] = field(default_factory=dict)


class _Observer:
    """Callback of ``observe`` that knows how long it took; ``measure`` fills [layer] -> values [heads]."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.density: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self.recall: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self.reasons: list[str] = []

    def __call__(self, call: AttentionCall) -> None:
        start = time.perf_counter()
        if call.window_left is None:
            self.measure(call)
        self.seconds += time.perf_counter() - start

    def measure(self, call: AttentionCall) -> None:
        raise NotImplementedError


class _DenseObserver(_Observer):
    """On the dense run: the mass that every entry's selection would keep."""

    def __init__(self, entries: Mapping[str, Entry]):
        super().__init__()
        self.entries = entries

    def measure(self, call: AttentionCall) -> None:
        mass: dict[tuple[int, int], Tensor] = {}
        scale: dict[str, Any] = {"softmax_scale": call.softmax_scale, "softcap": call.softcap, "causal": call.causal}
        everything = torch.ones(call.q.shape[2], device=call.q.device)
        self.density[call.layer][DENSE] = self.recall[call.layer][DENSE] = everything
        for name, entry in self.entries.items():
            self.recall[call.layer][name] = everything
            policy = entry.layer(call.layer, call.q.device) if isinstance(entry, ThresholdTable | PerLayer) else entry
            if policy is None:
                continue
            mask = select_for(call.q, call.k, policy, **scale)
            kept: Tensor | None = None
            if isinstance(mask, BlockMask):
                kept = mask.to_rows().repeat_interleave(call.q.shape[2] // mask.num_heads, dim=1)
            sizes = (policy.block_m, policy.block_n)
            if isinstance(policy, ExactSkip):
                unit, stays = unskipped(call.q, call.k, policy, **scale)
                kept = stays if kept is None else stays & kept.repeat_interleave(sizes[0] // unit, 0)[: len(stays)]
                sizes = (unit, sizes[1])
            if kept is None:
                continue
            geometry = call_geometry(call.q, call.k, call.causal, *sizes)
            if sizes not in mass:
                mass[sizes] = attention_mass(call.q, call.k, call.lse, block_m=sizes[0], block_n=sizes[1], **scale)
            share = (mass[sizes] * kept).sum(-1) * row_queries(geometry)[:, None]
            self.recall[call.layer][name] = share.sum(0) / call.q.shape[1]


class _SparseObserver(_Observer):
    """On a sparse run: the blocks that were kept and not skipped, and why a call was dense."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def measure(self, call: AttentionCall) -> None:
        info = call.info
        if info.dense_reason is not None:
            self.reasons.append(f"layer {call.layer}: {info.dense_reason}")
        self.density[call.layer][self.name] = info.density(per_head=True)


def _gather(values: Mapping[int, Mapping[str, Tensor]], name: str, layers: int) -> Tensor:
    """[layers, heads], NaN for layers that were not observed."""
    heads = max((v[name].shape[0] for v in values.values()), default=0)
    result = torch.full((layers, heads), math.nan)
    for layer, v in values.items():
        result[layer, : v[name].shape[0]] = v[name].float().cpu()
    return result


@dataclass(frozen=True, eq=False)
class _Scored:
    """Positions to score: sorted and unique, with the prose among them and the answers as index lists into them."""

    positions: Tensor
    prose: Tensor
    answers: list[tuple[str, Tensor]]


def _positions(prompt: TokenizedPrompt, vocab: int) -> _Scored:
    answers = [p for _, p in prompt.answers]
    room = max(min(PROSE_TOKENS, LOGITS // max(vocab, 1) - sum(map(len, answers))), 1)
    prose = prompt.prose
    if len(prose) > room:
        prose = prose[torch.arange(room) * len(prose) // room]
    positions = torch.unique(torch.cat((prose, *answers)))
    if len(positions) == 0:
        raise ValueError(f"prompt '{prompt.id}' has neither prose nor answers to score")
    index = [(task, torch.searchsorted(positions, p)) for task, p in prompt.answers]
    return _Scored(positions, torch.searchsorted(positions, prose), index)


def _timed_logits(
    model: Any, prompt: TokenizedPrompt, scored: _Scored, devices: Sequence[torch.device]
) -> tuple[Tensor, float]:
    """Logits at the scored positions, and the seconds until all devices were done with them."""
    synchronize(*devices)
    start = time.perf_counter()
    logits = logits_at(model, prompt.ids, scored.positions - 1)
    synchronize(*devices)
    return logits, time.perf_counter() - start


def _score(logits: Tensor, targets: Tensor, step: int = 512) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (float32 [n], nats) and whether the argmax is right (bool [n])."""
    targets = targets.to(logits.device)
    nll, right = [], []
    for rows, want in zip(logits.split(step), targets.split(step), strict=True):
        rows = rows.float()
        nll.append(torch.nn.functional.cross_entropy(rows, want, reduction="none"))
        right.append(rows.argmax(-1) == want)
    return torch.cat(nll).cpu(), torch.cat(right).cpu()


def _on_device(entry: Entry, device: torch.device) -> Policy | list[Policy | None] | None:
    if isinstance(entry, ThresholdTable | PerLayer):
        return [entry.layer(i, device) for i in range(entry.num_layers)]
    return entry


def describe(entry: Entry) -> str:
    """A short name of what an entry runs."""
    if isinstance(entry, ThresholdTable):
        return f"{_name(entry.policy)}, {entry.goal}"
    if isinstance(entry, PerLayer):
        return f"per layer: {', '.join(dict.fromkeys(map(_name, entry.policies)))}"
    return _name(entry)


def _name(policy: Policy | None) -> str:
    if isinstance(policy, ExactSkip):
        how = (" in two passes" if policy.passes == 2 else "") + (" with bounds" if policy.bounds else "")
        within = "" if policy.within is None else f" within {policy.within.name}"
        return f"{policy.name} {policy.form}{how}{within}"
    return DENSE if policy is None else policy.name


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    tables: Mapping[str, Entry],
    *,
    corrected: Collection[str] = (),
    max_length: int | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Run the model densely and with each of ``tables`` (by name: ThresholdTable, policy or PerLayer) over the prompts.

    A question is right iff the argmax is the text's token at every token of its answer. Prose loss is over at most 4096
    evenly spaced prose tokens a prompt (fewer with a large vocabulary), the same for every run. ``corrected``: names of
    entries that run with ``mean_correction`` (see :func:`bsfa.attention`). ``max_length``: cut prompts to that many
    tokens.

    Afterwards the model has no policy. Raises ``ValueError`` for prompts with nothing to score or an entry called
    "dense", :class:`bsfa.ThresholdMismatchError` for a table of another model.
    """
    from bsfa.integrations.transformers import observe, set_policy

    if DENSE in tables:
        raise ValueError(f"'{DENSE}' is the name of the reference run: call the entry something else")
    if not prompts:
        raise ValueError("there are no prompts to evaluate")
    unknown = sorted(set(corrected) - set(tables))
    if unknown:
        raise ValueError(f"corrected names entries that do not exist: {', '.join(unknown)}")
    for entry in tables.values():
        if isinstance(entry, ThresholdTable | PerLayer):
            entry.check_model(model)
        elif entry is not None and not isinstance(entry, Policy):
            raise TypeError(f"expected a ThresholdTable, a policy, a PerLayer or None, got {type(entry).__name__}")
    config = text_config(model)
    layers = int(config.num_hidden_layers)
    tokenized = [tokenize(p, tokenizer, max_length) for p in prompts]
    scored = [_positions(t, int(config.vocab_size)) for t in tokenized]
    buckets = [length_name(length_bucket(len(t))) for t in tokenized]
    device, devices = input_device(model), model_devices(model)
    on_gpu = any(d.type == "cuda" for d in devices)
    entries: dict[str, Entry] = {DENSE: None, **tables}
    policies = {name: _on_device(entry, device) for name, entry in entries.items()}
    totals = {name: _Totals() for name in entries}
    work, done = sum(prefill_work(len(t)) for t in tokenized) * len(entries), 0.0
    with dense_model(model):
        if not on_gpu:
            for name, policy in policies.items():
                set_policy(model, policy, min_seqlen=0, mean_correction=name in corrected)
                prefill(model, tokenized[0].ids[:WARM_UP])
        for t, s, bucket in zip(tokenized, scored, buckets, strict=True):
            for name, policy in policies.items():
                if progress is not None:
                    progress(done, work, f"{name}, {len(t)} tokens")
                set_policy(model, policy, min_seqlen=0, mean_correction=name in corrected)
                observer = _DenseObserver(tables) if name == DENSE else _SparseObserver(name)
                with observe(model, observer):
                    logits, seconds = _timed_logits(model, t, s, devices)
                seconds -= observer.seconds
                if on_gpu:
                    seconds = _timed_logits(model, t, s, devices)[1]
                total = totals[name]
                _add(total, logits, t, s, bucket)
                del logits
                total.seconds[bucket] += seconds
                total.density.append(_gather(observer.density, name, layers))
                total.reasons.update(dict.fromkeys(observer.reasons))
                if isinstance(observer, _DenseObserver):
                    for other in entries:
                        totals[other].recall.append(_gather(observer.recall, other, layers))
                done += prefill_work(len(t))
    if progress is not None:
        progress(work, work, "done")
    return EvaluationReport(
        prompts=len(prompts),
        prompts_by_length={b: buckets.count(b) for b in _in_order(buckets)},
        tokens=sum(map(len, tokenized)),
        runs={name: _report(name, entries[name], total, totals[DENSE], buckets) for name, total in totals.items()},
    )


def _in_order(buckets: Sequence[str]) -> list[str]:
    return sorted(set(buckets), key=lambda b: int(b[:-1]) * 1024 if b.endswith("K") else int(b))


def _add(total: _Totals, logits: Tensor, prompt: TokenizedPrompt, scored: _Scored, bucket: str) -> None:
    nll, right = _score(logits, prompt.ids[scored.positions])
    total.nll[bucket] += float(nll[scored.prose].double().sum())
    total.tokens[bucket] += len(scored.prose)
    total.answers += [(task, bucket, bool(right[index].all())) for task, index in scored.answers]


def _mean(values: Sequence[Tensor]) -> float:
    """Mean over prompts of the mean over observed layers and heads."""
    means = [float(v.nanmean()) for v in values]
    return sum(means) / len(means) if means else math.nan


def _per_token(nll: float, tokens: int) -> float:
    return nll / tokens if tokens else math.nan


def _accuracy(right: Sequence[bool]) -> Accuracy:
    return Accuracy(sum(right), len(right))


def _ratio(dense: float, seconds: float) -> float:
    return dense / seconds if seconds > 0 else math.nan


def _report(name: str, entry: Entry, total: _Totals, dense: _Totals, buckets: Sequence[str]) -> RunReport:
    lengths = _in_order(buckets)
    tasks = sorted({task for task, _, _ in total.answers})

    def by_length(values: Sequence[Tensor]) -> dict[str, float]:
        return {b: _mean([v for v, other in zip(values, buckets, strict=True) if other == b]) for b in lengths}

    return RunReport(
        name=name,
        policy=describe(entry),
        prose_loss=_per_token(sum(total.nll.values()), sum(total.tokens.values())),
        prose_tokens=sum(total.tokens.values()),
        prose_loss_by_length={b: _per_token(total.nll[b], total.tokens[b]) for b in lengths},
        accuracy=_accuracy([ok for _, _, ok in total.answers]),
        accuracy_by_task={t: _accuracy([ok for task, _, ok in total.answers if task == t]) for t in tasks},
        accuracy_by_length={b: _accuracy([ok for _, other, ok in total.answers if other == b]) for b in lengths},
        accuracy_by_task_and_length={
            t: {b: _accuracy([ok for task, other, ok in total.answers if (task, other) == (t, b)]) for b in lengths}
            for t in tasks
        },
        density=_mean(total.density),
        recall=_mean(total.recall),
        density_by_length=by_length(total.density),
        recall_by_length=by_length(total.recall),
        seconds=sum(total.seconds.values()),
        seconds_by_length={b: total.seconds[b] for b in lengths},
        speedup=_ratio(sum(dense.seconds.values()), sum(total.seconds.values())),
        speedup_by_length={b: _ratio(dense.seconds[b], total.seconds[b]) for b in lengths},
        layer_density=torch.stack(total.density).mean(0).tolist(),
        layer_recall=torch.stack(total.recall).mean(0).tolist(),
        dense_reasons=list(total.reasons),
    )
