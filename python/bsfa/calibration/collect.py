"""Runs the model densely over the prompts and keeps, per prompt, layer and head, two curves over the thresholds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bsfa.calibration.curves import BlockCurves, block_curves, check_sharing, threshold_grid
from bsfa.calibration.forward import prefill
from bsfa.calibration.resume import PromptRecord, PromptStore, run_settings
from bsfa.errors import UnsupportedError
from bsfa.identity import ModelIdentity
from bsfa.policies import ScoredPolicy
from bsfa.prompts import Prompt, TokenizedPrompt, prompts_sha256, tokenize
from bsfa.thresholds import CALIBRATED

if TYPE_CHECKING:
    from bsfa.integrations.transformers import AttentionCall

#: Called with (work done, total work, what is being done); work is in no unit but proportional to time.
Progress = Callable[[float, float, str], None]


#: Share of a prompt's query tiles that the promise is about: a head that retrieves does so in few tiles, and its mean
#: over all of them would hide what is lost there.
TAIL = 0.1


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationCurves:
    """What one pass over the prompts measured; :func:`bsfa.calibration.choose` makes tables for any target from it.

    grid: float32 [G], thresholds from strict (keep-all) to loose.
    lost_mass, tail_lost, density: float32 [prompts, layers, heads, G]; see
        :class:`bsfa.calibration.curves.BlockCurves`. 0, 0 and 1 in layers that stay dense.
    tail: the share of a prompt's query tiles that ``tail_lost`` is about.
    group: query heads, next to each other, that share a threshold.
    tokens: length of each prompt. The rest goes into the threshold file as it is.
    """

    policy: ScoredPolicy
    grid: Tensor
    lost_mass: Tensor
    tail_lost: Tensor
    density: Tensor
    tail: float
    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    prompts_sha256: str
    model: ModelIdentity
    attention: dict[str, Any]
    group: int = 1


def prefill_work(tokens: int) -> float:
    """Relative cost of a prefill: a linear and a quadratic part."""
    return tokens + tokens * tokens / 8192


@contextlib.contextmanager
def dense_model(model: Any) -> Iterator[None]:
    """The model in eval mode, without gradients, running bsfa's dense attention; afterwards it has no policy."""
    from bsfa.integrations.transformers import clear_policy, set_policy

    training = model.training
    model.eval()
    set_policy(model, None)
    try:
        with torch.inference_mode():
            yield
    finally:
        clear_policy(model)
        model.train(training)


def text_config(model: Any) -> Any:
    """The language model's part of a Hugging Face config."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class _Collector:
    """Callback of ``observe``: reduces each attention call at once."""

    def __init__(self, policy: ScoredPolicy, num_layers: int, tail: float):
        self.policy = policy
        self.tail = tail
        self.grid = threshold_grid(policy)
        self.layers: list[str] = ["dense: not run through bsfa"] * num_layers
        self.scale: list[float | None] = [None] * num_layers
        self.softcap: list[float | None] = [None] * num_layers
        self.dtype = ""
        self.heads: int | None = None
        self.group = 1
        self.current: dict[int, BlockCurves] = {}
        self.listening = True
        self.restored: dict[str, Any] | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, calls are not measured."""
        self.listening = False
        try:
            yield
        finally:
            self.listening = True

    def facts(self, place: Path) -> dict[str, Any]:
        """What the calls so far told about the model; raises unless it is what the prompts in ``place`` told."""
        names = ("layers", "scale", "softcap", "dtype", "heads", "group")
        facts = {name: list(x) if isinstance(x := getattr(self, name), list) else x for name in names}
        if self.restored not in (None, facts):
            odd = ", ".join(name for name in facts if facts[name] != (self.restored or {}).get(name))
            raise ValueError(
                f"{place}: its prompts were measured under other conditions than this run's ({odd}): delete it"
            )
        return facts

    def restore(self, facts: Mapping[str, Any], place: Path) -> None:
        """Know what an earlier run knew after a prompt."""
        for name, value in facts.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
        self.restored = self.facts(place)

    def __call__(self, call: AttentionCall) -> None:
        if not self.listening:
            return
        if not 0 <= call.layer < len(self.layers):
            raise UnsupportedError(f"attention of layer {call.layer} in a model of {len(self.layers)} layers")
        if call.window_left is not None:
            self.layers[call.layer] = "dense: sliding-window attention"
            return
        if call.layer in self.current:
            raise UnsupportedError(f"layer {call.layer} ran twice for one prompt: calibration needs whole prompts")
        heads = call.q.shape[-2]
        if self.heads not in (None, heads):
            raise UnsupportedError(f"layers have different numbers of query heads ({self.heads} and {heads})")
        self.heads = heads
        if self.policy.scoring.sharing == "group":
            group = heads // call.k.shape[-2]
            if self.current and self.group != group:
                raise UnsupportedError(
                    f"layers have different numbers of KV heads, which share thresholds: {self.policy.name}"
                )
            self.group = group
        self.layers[call.layer] = CALIBRATED
        self.scale[call.layer], self.softcap[call.layer] = float(call.softmax_scale), float(call.softcap)
        self.dtype = str(call.q.dtype).removeprefix("torch.")
        self.current[call.layer] = block_curves(
            self.policy,
            self.grid,
            call.q,
            call.k,
            call.lse,
            causal=call.causal,
            softmax_scale=call.softmax_scale,
            softcap=call.softcap,
            tail=self.tail,
        )

    def take(self) -> BlockCurves:
        """Curves [layers, heads, G] of the prompt that just ran."""
        if self.heads is None:
            raise UnsupportedError("no full-attention layer of this model runs through bsfa: nothing to calibrate")
        shape = (len(self.layers), self.heads, self.grid.shape[0])
        prompt = BlockCurves(torch.zeros(shape), torch.zeros(shape), torch.ones(shape))
        for layer, curves in self.current.items():
            prompt.lost[layer] = curves.lost
            prompt.tail_lost[layer] = curves.tail_lost
            prompt.density[layer] = curves.density
        self.current.clear()
        return prompt


def _record(curves: BlockCurves, facts: Mapping[str, Any]) -> PromptRecord:
    return PromptRecord({f.name: getattr(curves, f.name) for f in fields(curves)}, facts)


def _curves(record: PromptRecord) -> BlockCurves:
    return BlockCurves(**record.tensors)


def collect(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policy: ScoredPolicy,
    *,
    tail: float = TAIL,
    max_length: int | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> CalibrationCurves:
    """Measure, in one dense pass per prompt, what ``policy`` loses and keeps at every threshold of a fixed grid.

    model: a Hugging Face causal LM that can run bsfa's attention; tokenizer: its fast tokenizer. prompts: at least two;
    they should look like what the model will serve. tail: the promise is about the worst of a prompt's query tiles,
    this share of them (1: about all of them alike). max_length: cut prompts to that many tokens. ``policy``'s own
    threshold does not matter. Memory: three floats per prompt, head and grid point, and the block scores of one layer.

    resume: a folder that keeps what each prompt gave as soon as it is measured. A later call with the same settings
    measures only what is missing and returns the same, bit for bit; what other settings left there does not count. See
    :mod:`bsfa.calibration.resume`.

    Afterwards the model has no policy. Raises ``ValueError`` for too few prompts or unfit ones,
    :class:`bsfa.UnsupportedError` for models that this cannot measure, ``OSError`` if ``resume`` cannot be written.
    """
    from bsfa.integrations.transformers import observe

    if not isinstance(policy, ScoredPolicy):
        raise TypeError(f"only policies with a score can be calibrated, got {type(policy).__name__}")
    check_sharing(policy)
    if not 0.0 < tail <= 1.0:
        raise ValueError(f"tail must be a share of the query tiles, above 0 and at most 1, got {tail}")
    if len(prompts) < 2:
        raise ValueError(f"calibration needs two prompts or more (one half chooses, one checks), got {len(prompts)}")
    tokenized: list[TokenizedPrompt] = [tokenize(p, tokenizer, max_length) for p in prompts]
    work = [prefill_work(len(t)) for t in tokenized]
    total, done = sum(work), 0.0
    collector = _Collector(policy, int(text_config(model).num_hidden_layers), tail)
    identity = ModelIdentity.of(model)
    measured: list[BlockCurves | None] = [None] * len(prompts)
    with dense_model(model), observe(model, collector):
        store = None
        if resume is not None:
            with collector.paused():
                extra = {"curves": [f.name for f in fields(BlockCurves)]}
                settings = run_settings(model, identity, policy, collector.grid, tail, extra)
                store = PromptStore(resume, settings)
            for i, t in enumerate(tokenized):
                record = store.load(t.ids)
                if record is not None:
                    collector.restore(record.facts, store.place)
                    measured[i] = _curves(record)
                    done += work[i]
        for i, t in enumerate(tokenized):
            if measured[i] is not None:
                continue
            if progress is not None:
                progress(done, total, f"{len(t)} tokens")
            prefill(model, t.ids)
            measured[i] = curves = collector.take()
            if store is not None:
                store.save(t.ids, _record(curves, collector.facts(store.place)))
            done += work[i]
    if progress is not None:
        progress(total, total, "done")
    found = [m for m in measured if m is not None]
    return CalibrationCurves(
        policy=policy,
        grid=collector.grid,
        lost_mass=torch.stack([m.lost for m in found]),
        tail_lost=torch.stack([m.tail_lost for m in found]),
        density=torch.stack([m.density for m in found]),
        tail=float(tail),
        layers=tuple(collector.layers),
        tokens=tuple(len(t) for t in tokenized),
        prompts_sha256=prompts_sha256([p.text for p in prompts]),
        model=identity,
        attention={"softmax_scale": collector.scale, "softcap": collector.softcap, "dtype": collector.dtype},
        group=collector.group,
    )
