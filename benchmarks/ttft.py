"""Time to the first token of a model of Llama 3.1 8B's shape in transformers, and where sparsity starts to pay.

The suite 'ttft'. Random weights, bfloat16, one prompt of random tokens; a run is the forward pass over the whole prompt
with a KV cache and the logits of its last token, wall clock. Variants take turns: transformers' "sdpa", bsfa dense, and
bsfa with one threshold of RelativeMax per layer and head. Random weights attend to nothing in particular, so that no
threshold is worth anything there: the thresholds are searched for a density, and only the cost is meant. Run by
gpu_check.py, or by hand: ``PYTHONPATH=python python benchmarks/ttft.py [--output FILE]``.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attention as base
import bsfa
import bsfa.integrations.transformers as bsfa_hf
import report
from bsfa.block_mask import BlockMask
from bsfa.integrations.min_seqlen import DEFAULT_MIN_SEQLEN
from bsfa.policies import PerLayer, Policy, RelativeMax
from bsfa.policies.base import Selection
from calibrating import LARGE
from report import measurement
from selection import Call, Row, free, ours, relmax_for, select, take_turns, verify_mask
from timing import ClockSampler

DEVICE = "cuda"
DTYPE = torch.bfloat16
SHAPE = LARGE
DENSITY = 0.05
SEARCH_STEPS = 20
ROUNDS = {16: 5, 64: 2, 128: 2}  # by length in units of K; a run takes seconds at 128K
TOLERANCE = 0.1  # |dense - sdpa| / |sdpa| of the logits: bfloat16 through all layers

CROSSOVER_KILO = (1, 2, 4, 8, 16)
CROSSOVER_DENSITY = 0.15

#: What the project asks of these measurements: at least, or at most.
DEMANDED: dict[str, tuple[str, float]] = {
    "ttft.8b.128k.calibrated.x_sdpa": (">=", 1.8),
    "ttft.8b.128k.dense.x_sdpa": (">=", 1.0),
    "crossover.relmax.tokens": ("<=", float(DEFAULT_MIN_SEQLEN)),
}


# --- the model --------------------------------------------------------------------------------------------------------


def make_model() -> Any:
    """The model with random weights, made on the device: initialising on the host would take minutes."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=DTYPE).eval()


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchDensity(Policy):
    """RelativeMax with the least alpha per head that keeps at most ``density`` of this very call's blocks.

    If even alpha = 1 keeps more (its sinks, window and last tiles), alpha is 1. No policy to serve with: it selects
    ``SEARCH_STEPS`` times, and leaves the alpha of each call in ``found``.
    """

    density: float
    found: list[Tensor] = field(default_factory=list)

    @property
    def needs_summary(self) -> bool:
        """As RelativeMax."""
        return True

    def select(self, selection: Selection) -> BlockMask:
        """Bisection of all heads at once."""
        low = torch.zeros(selection.q.shape[-2], device=selection.q.device)
        high = torch.ones_like(low)
        for _ in range(SEARCH_STEPS):
            middle = (low + high) / 2
            kept = self.at(middle).select(selection).density(per_head=True)
            low, high = torch.where(kept > self.density, middle, low), torch.where(kept > self.density, high, middle)
        self.found.append(high)
        return self.at(high).select(selection)

    def at(self, alpha: Tensor) -> RelativeMax:
        """The rule with these thresholds."""
        return RelativeMax(alpha=alpha, block_m=self.block_m, block_n=self.block_n)


@dataclass(frozen=True)
class Variant:
    """An attention implementation of transformers and bsfa's policy for it (None: dense)."""

    implementation: str
    policy: PerLayer | None = None


@dataclass
class Samples:
    """What the runs of one variant gave: seconds each, and the share of them that was spent in attention."""

    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    logits: Tensor | None = None
    density: float = 1.0

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def share(self) -> float:
        return statistics.median(self.shares)


# --- the clock --------------------------------------------------------------------------------------------------------


def stamp() -> Any:
    """A point in time: of the device's own clock where it has one, in the order of what was enqueued."""
    if DEVICE != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def watched(spans: list[tuple[Any, Any]]) -> Iterator[None]:
    """Within the context, "sdpa" and "bsfa" leave when each of their calls began and ended in ``spans``.

    A call is what transformers calls an attention function: all between the queries, keys and values after RoPE and
    the output before its projection, the choice of blocks included.
    """

    def watch(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = stamp()
        result = fn(*args, **kwargs)
        spans.append((start, stamp()))
        return result

    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "bsfa")}
    for name, fn in before.items():
        AttentionInterface.register(name, functools.partial(watch, fn))
    try:
        yield
    finally:
        for name, fn in before.items():
            AttentionInterface.register(name, fn)


def use(model: Any, variant: Variant) -> None:
    bsfa_hf.set_policy(model, variant.policy, min_seqlen=0, record=True)
    model.set_attn_implementation(variant.implementation)


def first_token(model: Any, ids: Tensor) -> Tensor:
    """The last token's logits, after a prefill that fills a KV cache."""
    past = DynamicCache(config=model.config)
    logits: Tensor = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits
    if past.get_seq_length() != ids.shape[1]:
        raise AssertionError(f"the cache holds {past.get_seq_length()} tokens of {ids.shape[1]}")
    return logits[0, -1].float()


def time_one(model: Any, ids: Tensor, variant: Variant, samples: Samples) -> None:
    use(model, variant)
    spans: list[tuple[Any, Any]] = []
    with watched(spans):
        wait()
        started = time.perf_counter()
        samples.logits = first_token(model, ids)
        wait()
        seconds = time.perf_counter() - started
    if len(spans) != model.config.num_hidden_layers:
        raise AssertionError(f"{len(spans)} attention calls were seen")
    samples.seconds.append(seconds)
    samples.shares.append(sum(seconds_between(*span) for span in spans) / seconds)
    if variant.policy is not None:
        samples.density = float(torch.stack(list(bsfa_hf.density(model).values())).mean())


# --- sections ---------------------------------------------------------------------------------------------------------


def searched(model: Any, ids: Tensor) -> PerLayer:
    """Thresholds per layer and head for ``DENSITY`` at this length, each layer after sparse ones."""
    found: list[Tensor] = []
    layers = model.config.num_hidden_layers
    search = SearchDensity(density=DENSITY, found=found, block_m=base.BLOCK, block_n=base.BLOCK)
    use(model, Variant("bsfa", PerLayer([search] * layers)))
    first_token(model, ids)
    return PerLayer([search.at(alpha) for alpha in found])


def check(samples: dict[str, Samples], kilo: int) -> None:
    """Raise unless all logits are finite and bsfa's dense ones are those of sdpa up to rounding."""
    logits = {name: s.logits for name, s in samples.items() if s.logits is not None}
    if set(logits) != set(samples) or not all(bool(x.isfinite().all()) for x in logits.values()):
        raise AssertionError(f"{kilo}k: logits are missing or not finite")
    error = float((logits["dense"] - logits["sdpa"]).norm() / logits["sdpa"].norm())
    if not error <= TOLERANCE:
        raise AssertionError(f"{kilo}k: dense logits are {error:.3f} off those of sdpa")


def ttft() -> list[Row]:
    """The three variants at every length."""
    model, rows = make_model(), []
    for kilo, rounds in ROUNDS.items():
        length = kilo * base.K
        ids = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)
        variants = {
            "sdpa": Variant("sdpa"),
            "dense": Variant("bsfa"),
            "calibrated": Variant("bsfa", searched(model, ids)),  # also warms up all but attention
        }
        if not rows:  # each attention once; longer prompts run the same kernels
            for variant in variants.values():
                time_one(model, ids, variant, Samples())
        samples = {name: Samples() for name in variants}
        with ClockSampler() as clock:
            for i in range(rounds):
                for name in list(variants)[:: 1 if i % 2 == 0 else -1]:
                    time_one(model, ids, variants[name], samples[name])
        check(samples, kilo)
        sdpa, layers = samples["sdpa"], int(model.config.num_hidden_layers)
        for name in ("dense", "calibrated"):
            own = samples[name]
            peers = {
                "ttft_ms": own.ms,
                "sdpa_ttft_ms": sdpa.ms,
                "attention_share": own.share,
                "sdpa_attention_share": sdpa.share,
                "density": own.density,
                "runs": float(rounds),
            }
            id_ = f"ttft.8b.{kilo}k.{name}.x_sdpa"
            rows.append(measurement(id_, sdpa.ms / own.ms, "speed-up", rounds * layers, clock.median, peers))
        free()
    return rows


def crossover() -> list[Row]:
    """Sparse attention with its selection against dense attention, both as a caller calls them and as CUDA graphs."""
    x_dense: dict[int, float] = {}
    peers: dict[str, float] = {}
    samples, clock = 0, None
    for kilo in CROSSOVER_KILO:
        length = kilo * base.K
        q, k, v = base.random_inputs(length)
        policy = relmax_for(CROSSOVER_DENSITY, q, k)
        mask = select(q, k, policy)
        density = verify_mask(f"{kilo}k", mask)
        base.verify(f"{kilo}k", bsfa.attention(q, k, v, policy=policy), q, k, v, mask)  # type: ignore[arg-type]
        calls: dict[str, Call] = {
            "sparse": functools.partial(bsfa.attention, q, k, v, policy=policy),
            "dense": functools.partial(bsfa.attention, q, k, v),
        }
        launches = min(max(64 * base.K // length, 4), 32)
        works = {name: ours([call], launches, eager=True) for name, call in calls.items()}
        works |= {f"{name}_graph": ours([call], launches) for name, call in calls.items()}
        turns = take_turns(works, rounds=15, warmup=2)
        ratios = {"": turns.ms["dense"] / turns.ms["sparse"]}
        ratios["graph_"] = turns.ms["dense_graph"] / turns.ms["sparse_graph"]
        x_dense[kilo] = min(ratios.values())
        peers |= {f"{kind}x_dense_{kilo}k": ratio for kind, ratio in ratios.items()}
        peers[f"density_{kilo}k"] = density
        samples, clock = turns.n["sparse"], turns.clock_mhz
    slower = [kilo for kilo in CROSSOVER_KILO if x_dense[kilo] <= 1.0]
    if slower and slower[-1] == CROSSOVER_KILO[-1]:
        raise AssertionError(f"sparse attention is not faster at any of these lengths: {x_dense}")
    first = CROSSOVER_KILO[0] if not slower else CROSSOVER_KILO[CROSSOVER_KILO.index(slower[-1]) + 1]
    return [measurement("crossover.relmax.tokens", float(first * 1024), "tokens", samples, clock, peers)]


@torch.inference_mode()
def run() -> list[Row]:
    """All measurements of this suite."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for section in (crossover, ttft):
        started = time.monotonic()
        rows += section()
        free()
        print(f"{section.__name__}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    report.suite_main(__doc__, run, DEMANDED)
