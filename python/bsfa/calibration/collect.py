"""Runs the model densely over the prompts and keeps, per prompt, layer and head, two curves over the thresholds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from bsfa.calibration.curves import BlockCurves, block_curves, check_calibratable, threshold_grid
from bsfa.calibration.forward import prefill
from bsfa.calibration.resume import PromptRecord, PromptStore, run_settings
from bsfa.errors import UnsupportedError
from bsfa.identity import ModelIdentity
from bsfa.policies import ScoredPolicy, ThresholdPolicy
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
    reference, positions: of ExactSkip, see :class:`bsfa.ThresholdTable`.
    cost, error: what was measured of the change of attention's output ("output", "loss" or None), float32 [prompts,
        layers, heads, G] or None; see :mod:`bsfa.calibration.output_error`.
    spent: prompts that chose the reference and therefore choose no thresholds; facts: what the file says about it.
    """

    policy: ThresholdPolicy
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
    reference: Tensor | None = None
    positions: tuple[int, ...] = ()
    spent: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    cost: str | None = None
    error: Tensor | None = None


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


T = TypeVar("T")


class Collector(Generic[T]):
    """Callback of ``observe``: reduces each attention call at once, to a dataclass of tensors that begin with heads."""

    kind: type[T]  #: what :meth:`reduce` makes
    dense: ClassVar[Mapping[str, float]]  #: what its fields hold for layers that stay dense

    def __init__(self, policy: ThresholdPolicy, num_layers: int):
        self.policy = policy
        self.layers: list[str] = ["dense: not run through bsfa"] * num_layers
        self.scale: list[float | None] = [None] * num_layers
        self.softcap: list[float | None] = [None] * num_layers
        self.dtype = ""
        self.heads: int | None = None
        self.group = 1
        self.current: dict[int, T] = {}
        self.listening = True
        self.restored: dict[str, Any] | None = None

    def reduce(self, call: AttentionCall) -> T:
        """What is kept of one attention call."""
        raise NotImplementedError

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """What is to be in place while prompts run."""
        return contextlib.nullcontext()

    def prepare(self, ids: Tensor) -> None:
        """Called with the tokens of a prompt that is about to run."""

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
        if self.policy.shares_thresholds:
            group = heads // call.k.shape[-2]
            if self.current and self.group != group:
                raise UnsupportedError(
                    f"layers have different numbers of KV heads, which share thresholds: {self.policy.name}"
                )
            self.group = group
        self.layers[call.layer] = CALIBRATED
        self.scale[call.layer], self.softcap[call.layer] = float(call.softmax_scale), float(call.softcap)
        self.dtype = str(call.q.dtype).removeprefix("torch.")
        self.current[call.layer] = self.reduce(call)

    def take(self) -> T:
        """What :meth:`reduce` made of the prompt that just ran, its tensors stacked: [layers, heads, ...]."""
        if not self.current:
            raise UnsupportedError("no full-attention layer of this model runs through bsfa: nothing to calibrate")
        stacked = {}
        for name, value in self.dense.items():
            found = {layer: getattr(one, name) for layer, one in self.current.items()}
            shape = next(iter(found.values())).shape
            stacked[name] = torch.full((len(self.layers), *shape), value)
            for layer, t in found.items():
                stacked[name][layer] = t
        self.current.clear()
        return self.kind(**stacked)

    @property
    def attention(self) -> dict[str, Any]:
        """For threshold files."""
        return {"softmax_scale": self.scale, "softcap": self.softcap, "dtype": self.dtype}


class CurveCollector(Collector[BlockCurves]):
    """Curves over ``grid`` of the policy of each layer."""

    kind: type[BlockCurves] = BlockCurves
    dense: ClassVar[Mapping[str, float]] = {"lost": 0.0, "tail_lost": 0.0, "density": 1.0}

    def __init__(self, policy: ThresholdPolicy, num_layers: int, grid: Tensor, tail: float):
        super().__init__(policy, num_layers)
        self.grid = grid
        self.tail = tail

    def layer_policy(self, layer: int) -> ThresholdPolicy:
        """The policy that is measured in a layer."""
        return self.policy

    def reduce(self, call: AttentionCall) -> BlockCurves:
        """The curves [heads, G] of one call."""
        return block_curves(
            self.layer_policy(call.layer),
            self.grid,
            call.q,
            call.k,
            call.lse,
            causal=call.causal,
            softmax_scale=call.softmax_scale,
            softcap=call.softcap,
            tail=self.tail,
        )


def num_layers(model: Any) -> int:
    """Layers of a Hugging Face model."""
    return int(text_config(model).num_hidden_layers)


def check_options(prompts: Sequence[Prompt], tail: float, least: int = 2) -> None:
    """Raise ``ValueError`` for too few prompts or a tail that is no share."""
    if not 0.0 < tail <= 1.0:
        raise ValueError(f"tail must be a share of the query tiles, above 0 and at most 1, got {tail}")
    if len(prompts) < least:
        count = {2: "two", 3: "three"}[least]
        raise ValueError(
            f"calibration needs {count} prompts or more (one half chooses, one checks), got {len(prompts)}"
        )


def measure(
    model: Any,
    prompts: Sequence[TokenizedPrompt],
    collector: Collector[T],
    settings: Callable[[], Any],
    *,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> list[T]:
    """Run the model densely over the prompts; what the collector makes of each. Afterwards the model has no policy.

    resume: a folder for finished prompts, see :func:`collect`. settings: called if there is one; what determines the
    result besides the prompt (:func:`bsfa.calibration.resume.run_settings`).
    """
    from bsfa.integrations.transformers import observe

    work = [prefill_work(len(t)) for t in prompts]
    total, done = sum(work), 0.0
    measured: list[T | None] = [None] * len(prompts)
    with dense_model(model), observe(model, collector), collector.attached():
        store = None
        if resume is not None:
            with collector.paused():
                store = PromptStore(resume, settings())
            for i, t in enumerate(prompts):
                record = store.load(t.ids)
                if record is not None:
                    collector.restore(record.facts, store.place)
                    measured[i] = collector.kind(**record.tensors)
                    done += work[i]
        for i, t in enumerate(prompts):
            if measured[i] is not None:
                continue
            if progress is not None:
                progress(done, total, f"{len(t)} tokens")
            collector.prepare(t.ids)
            prefill(model, t.ids)
            measured[i] = one = collector.take()
            if store is not None:
                tensors = {name: getattr(one, name) for name in collector.dense}
                store.save(t.ids, PromptRecord(tensors, collector.facts(store.place)))
            done += work[i]
    if progress is not None:
        progress(total, total, "done")
    return [m for m in measured if m is not None]


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
    errors: str | None = None,
) -> CalibrationCurves:
    """Measure, in one dense pass per prompt, what ``policy`` loses and keeps at every threshold of a fixed grid.

    model: a Hugging Face causal LM that can run bsfa's attention; tokenizer: its fast tokenizer. prompts: at least two;
    they should look like what the model will serve. tail: the promise is about the worst of a prompt's query tiles,
    this share of them (1: about all of them alike). max_length: cut prompts to that many tokens. ``policy``'s own
    threshold does not matter. Memory: three floats per prompt, head and grid point, and the block scores of one layer.

    resume: a folder that keeps what each prompt gave as soon as it is measured. A later call with the same settings
    measures only what is missing and returns the same, bit for bit; what other settings left there does not count. See
    :mod:`bsfa.calibration.resume`.

    errors: what else to measure, for :func:`bsfa.calibration.spend`. "output": how far every threshold moves the
    layer's attention output; "loss": the same, weighted by the gradient of the model's predictions, which takes one
    backward pass per prompt, with all activations and the logits of all tokens in memory. Either costs a block-sparse
    attention per threshold of a thinned grid; see :mod:`bsfa.calibration.output_error`.

    Afterwards the model has no policy. Raises ``ValueError`` for too few prompts or unfit ones,
    :class:`bsfa.UnsupportedError` for models that this cannot measure, ``OSError`` if ``resume`` cannot be written.
    """
    if not isinstance(policy, ScoredPolicy):
        raise TypeError(f"only policies with a score can be calibrated so, got {type(policy).__name__}")
    check_calibratable(policy)
    check_options(prompts, tail)
    tokenized = [tokenize(p, tokenizer, max_length) for p in prompts]
    grid = threshold_grid(policy)
    collector: CurveCollector = CurveCollector(policy, num_layers(model), grid, tail)
    extra: dict[str, Any] = {}
    if errors is not None:
        from bsfa.calibration.output_error import COSTS, POINTS, ErrorCollector

        if errors not in COSTS:
            raise ValueError(f"errors must be None or one of {', '.join(COSTS)}, got {errors!r}")
        collector = ErrorCollector(model, policy, num_layers(model), grid, tail, errors)
        extra = {"errors": errors, "error_points": POINTS}
    identity = ModelIdentity.of(model)

    def settings() -> Any:
        extra["curves"] = [f.name for f in fields(collector.kind)]
        return run_settings(model, identity, policy, grid, tail, extra)

    found = measure(model, tokenized, collector, settings, progress=progress, resume=resume)
    curves = as_curves(identity, prompts, tokenized, collector, found)
    if errors is None:
        return curves
    return replace(curves, cost=errors, error=torch.stack([m.error for m in found]))  # type: ignore[attr-defined]


def as_curves(
    identity: ModelIdentity,
    prompts: Sequence[Prompt],
    tokenized: Sequence[TokenizedPrompt],
    collector: CurveCollector,
    found: Sequence[BlockCurves],
) -> CalibrationCurves:
    """What was measured on every prompt, with what threshold files say about model and prompts."""
    return CalibrationCurves(
        policy=collector.policy,
        grid=collector.grid,
        lost_mass=torch.stack([m.lost for m in found]),
        tail_lost=torch.stack([m.tail_lost for m in found]),
        density=torch.stack([m.density for m in found]),
        tail=float(collector.tail),
        layers=tuple(collector.layers),
        tokens=tuple(len(t) for t in tokenized),
        prompts_sha256=prompts_sha256([p.text for p in prompts]),
        model=identity,
        attention=collector.attention,
        group=collector.group,
    )
