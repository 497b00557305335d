"""What calibration on the GPU costs; the suite 'calib'.

The embedded model (examples/tiny_lm) on prompts of 16K tokens, and a model of Llama 3.1 8B's shape with random weights
on prompts of 64K, both in bfloat16. Times are wall clock, from the texts to the threshold file or the curves; loading
or making the model and a first, shorter calibration are not part of them. Run by gpu_check.py, or by hand:
``PYTHONPATH=python python benchmarks/calibrating.py [--output FILE]``.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import report
from bsfa import ThresholdTable
from bsfa.calibration import choose, collect, collect_skip
from bsfa.calibration.collect import dense_model
from bsfa.calibration.forward import prefill, synchronize
from bsfa.policies import ExactSkip, RelativeMax
from bsfa.prompts import Prompt, tokenize
from report import measurement
from timing import ClockSampler

sys.path.append(str(report.ROOT / "examples"))
from compare_policies import TINY_LM, prompts_of_length

Row = dict[str, Any]

DEVICE = "cuda"
DTYPE = torch.bfloat16
TARGET = 0.95
TINY_LENGTH, TINY_PROMPTS, SKIP_PROMPTS = 16384, 64, 12
LARGE_LENGTH, LARGE_PROMPTS, WARM_UP_LENGTH = 65536, 2, 4096
LARGE: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

#: What the project asks of these measurements: at least, or at most.
DEMANDED: dict[str, tuple[str, float]] = {
    "calib.tiny.16k.s": ("<=", 120.0),
    "calib.8b.64k.s": ("<=", 180.0),
    "calib.8b.64k.gb": ("<=", 100.0),
}


class Stopwatch:
    """Seconds of the ``with`` block, with the device idle before and after."""

    seconds: float

    def __enter__(self) -> Stopwatch:
        synchronize(torch.device(DEVICE))
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(torch.device(DEVICE))
        self.seconds = time.perf_counter() - self.start


class IdTokenizer:
    """Of texts that are token ids in decimal, parted by spaces: for models that have no words."""

    is_fast = True

    def __call__(self, text: str, **_: object) -> dict[str, list[Any]]:
        """Ids and character offsets, as fast tokenizers give them."""
        words = text.split(" ")
        starts = itertools.accumulate((len(word) + 1 for word in words), initial=0)
        offsets = [(start, start + len(word)) for start, word in zip(starts, words, strict=False)]
        return {"input_ids": [int(word) for word in words], "offset_mapping": offsets}


def random_prompts(vocab: int, length: int, count: int) -> list[Prompt]:
    """Prompts of random ids for :class:`IdTokenizer`."""
    ids = torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0))
    return [Prompt(" ".join(map(str, row)), f"random-{i}") for i, row in enumerate(ids.tolist())]


def layers_measured(model: Any, prompts: Sequence[Prompt]) -> int:
    """The samples of a measurement: attention layers run and measured."""
    return len(prompts) * int(model.config.num_hidden_layers)


# --- sections ---------------------------------------------------------------------------------------------------------


def tiny() -> list[Row]:
    """Thresholds of RelativeMax for the embedded model, file included; and ExactSkip's curves, per prompt."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    model = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", dtype=DTYPE).to(DEVICE)
    prompts = prompts_of_length("calibration", tokenizer, TINY_LENGTH, TINY_PROMPTS)
    policy, skip = RelativeMax(), ExactSkip(form="relative")
    collect(model, tokenizer, prompts[:2], policy)  # at least two
    with tempfile.TemporaryDirectory() as folder, ClockSampler() as clock:
        path = Path(folder) / "thresholds.safetensors"
        with Stopwatch() as collecting:
            curves = collect(model, tokenizer, prompts, policy)
        with Stopwatch() as choosing:
            table = choose(curves, TARGET)
        with Stopwatch() as saving:
            table.save(path)
        loaded = ThresholdTable.load(path)
    loaded.check_model(model)
    kept = float(loaded.recall.mean())
    if not kept >= TARGET or bool(loaded.dense_heads().all()):
        raise AssertionError(f"target {TARGET}: held-out prompts keep {kept:.4f}; all dense: {loaded.dense_heads()}")
    peers = {
        "collect_s": collecting.seconds,
        "choose_s": choosing.seconds,
        "save_s": saving.seconds,
        "prompts": len(prompts),
        "tokens": sum(curves.tokens),
        "recall": kept,
        "density": float(loaded.density.mean()),
    }
    total = collecting.seconds + choosing.seconds + saving.seconds
    rows = [measurement("calib.tiny.16k.s", total, "s", layers_measured(model, prompts), clock.median, peers)]

    some = prompts[:SKIP_PROMPTS]
    collect_skip(model, tokenizer, some[:3], skip)  # at least three
    with ClockSampler() as clock, Stopwatch() as skipping:
        found = collect_skip(model, tokenizer, some, skip)
    per_prompt, n = skipping.seconds / len(some), layers_measured(model, some)
    if not all(bool(c.lost_mass.isfinite().all()) for c in found.candidates):
        raise AssertionError("ExactSkip's curves are not finite")
    peers = {"prompts": len(some), "relative_max_s": collecting.seconds / len(prompts)}
    return [*rows, measurement("calib.skip.tiny.16k.s_per_prompt", per_prompt, "s", n, clock.median, peers)]


def large() -> list[Row]:
    """Curves of RelativeMax for a large model with random weights: seconds, and the most memory that torch held."""
    torch.manual_seed(0)
    with torch.device(DEVICE):  # made there in bfloat16: initialising on the host would take minutes
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LARGE), dtype=DTYPE).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokenizer, policy = IdTokenizer(), RelativeMax()
    prompts = random_prompts(model.config.vocab_size, LARGE_LENGTH, LARGE_PROMPTS)
    collect(model, tokenizer, random_prompts(model.config.vocab_size, WARM_UP_LENGTH, 2), policy)
    ids = tokenize(prompts[0], tokenizer).ids
    with dense_model(model):
        prefill(model, ids)
        with Stopwatch() as dense:
            prefill(model, ids)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ClockSampler() as clock, Stopwatch() as collecting:
        curves = collect(model, tokenizer, prompts, policy)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else weights
    lost = curves.lost_mass
    if not bool(lost.isfinite().all()) or bool((lost[..., 0] > 1e-3).any()) or bool((lost.diff(dim=-1) < -1e-6).any()):
        raise AssertionError("a curve of lost mass does not rise from 0")
    n = layers_measured(model, prompts)
    peers = {"prompts": len(prompts), "prefill_s_per_prompt": dense.seconds}
    return [
        measurement("calib.8b.64k.s", collecting.seconds, "s", n, clock.median, peers),
        measurement("calib.8b.64k.gb", peak / 1e9, "GB", n, None, {"weights_gb": weights / 1e9}),
    ]


def run() -> list[Row]:
    """All measurements of this suite."""
    rows: list[Row] = []
    for section in (tiny, large):
        started = time.monotonic()
        rows += section()
        print(f"{section.__name__}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    report.suite_main(__doc__, run, DEMANDED)
