"""What a target recall gives on the shipped model: recall reached, blocks kept, text loss, needles, speed of attention.

    python examples/target_table.py [--device cuda] [--calibration N] [--prompts N] [--small]

For each of four policies, one pass over N calibration prompts of 16K tokens (the shipped ones and draws over their
texts) gives thresholds for all targets; the half that chose nothing says what recall was reached. Other prompts, over
texts that calibration never saw, run densely and with every table. The time of attention is that of selecting and
attending in all layers, on the queries, keys and values that the dense model makes of one of these prompts; bsfa's
dense attention takes turns with it. The model is small (6 layers, 6 query and 2 KV heads, head_dim 64), so at 16K a
selection costs a larger share than in large models, and the GPU has little to do.

About four minutes on one H200. --small: 2K tokens and few prompts, to see on a CPU that all of it runs; its targets are
lower, because few prompts promise little.

Writes benchmarks/results/targets_tiny_lm.csv (one row per policy and target) and targets_tiny_lm.json (the settings).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import bsfa
from bsfa import ThresholdTable
from bsfa.calibration import choose, choose_skip, collect, collect_skip
from bsfa.calibration.collect import dense_model
from bsfa.calibration.forward import prefill
from bsfa.doctor import cpu_name
from bsfa.evaluation import DENSE, EvaluationReport, evaluate
from bsfa.files import write_text
from bsfa.integrations.transformers import AttentionCall, observe
from bsfa.policies import Antidiagonal, CumulativeMass, ExactSkip, Policy, RelativeMax, ScoredPolicy
from bsfa.prompts import Prompt, length_name, tokenize
from bsfa.thresholds import CALIBRATED
from compare_policies import RESULTS, ROOT, TINY_LM, needles, prompts_of_length, write_csv

sys.path.append(str(ROOT / "benchmarks"))
from attention import repeated
from selection import capturable
from timing import Work, interleaved

TARGETS = (0.90, 0.95, 0.98, 0.99)
LENGTH, CALIBRATION, EVALUATION = 16384, 384, 24
SMALL_TARGETS = (0.6, 0.8)
SMALL_LENGTH, SMALL_CALIBRATION, SMALL_EVALUATION = 2048, 16, 2
PASSES = 10  # over all layers, in a turn of the clock

#: One layer's call: q, k, v and softmax_scale.
Call = tuple[Tensor, Tensor, Tensor, float]
#: By policy and target.
Tables = dict[tuple[str, float], ThresholdTable]
Log = Callable[[str], None]


def policies(block: int) -> dict[str, ScoredPolicy | ExactSkip]:
    """What is calibrated, by its name in the table."""
    sizes: dict[str, int] = {"block_m": block, "block_n": block}
    return {
        "relative-max": RelativeMax(**sizes),
        "cumulative-mass mean": CumulativeMass(**sizes),
        "antidiagonal stride 8": Antidiagonal(stride=8, **sizes),
        "exact-skip relative": ExactSkip(form="relative", **sizes),
    }


class RememberedTexts:
    """A fast tokenizer of known texts, encoded once and at the same time: every policy's pass asks for all of them."""

    is_fast = True

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        found = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)
        parts = ("input_ids", "offset_mapping")
        self.known = {text: {part: found[part][i] for part in parts} for i, text in enumerate(texts)}

    def __call__(self, text: str, **_: object) -> dict[str, Any]:
        """Ids and character offsets."""
        return self.known[text]


# ---- measuring ------------------------------------------------------------------------------------------------------


def calibrate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], targets: Sequence[float], block: int, log: Log
) -> Tables:
    """Threshold tables of every policy and target; one pass over the prompts for each policy."""
    tables: Tables = {}
    for name, policy in policies(block).items():
        started = time.perf_counter()
        if isinstance(policy, ExactSkip):
            skip = collect_skip(model, tokenizer, prompts, policy)
            tables |= {(name, target): choose_skip(skip, target) for target in targets}
        else:
            curves = collect(model, tokenizer, prompts, policy)
            tables |= {(name, target): choose(curves, target) for target in targets}
        log(f"calibrated {name} in {time.perf_counter() - started:.0f} s")
    return tables


def captured(model: Any, ids: Tensor) -> list[Call]:
    """The attention calls of a dense prefill of ``ids`` [S], first layer first."""
    found: dict[int, Call] = {}

    def keep(call: AttentionCall) -> None:
        found[call.layer] = (call.q.clone(), call.k.clone(), call.v.clone(), float(call.softmax_scale))

    with dense_model(model), observe(model, keep):
        prefill(model, ids)
    return [found[layer] for layer in sorted(found)]


def attention_ms(calls: Sequence[Call], tables: Tables) -> tuple[dict[Any, float], dict[Any, bool], int | None]:
    """Median ms of selecting and attending in all layers, by table, and of dense attention (:data:`DENSE`); which were
    timed as CUDA graphs; the SM clock in MHz, where there is one. On a CPU: wall clock, one pass a turn.
    """
    device = calls[0][0].device

    def all_layers(table: ThresholdTable | None) -> Callable[[], None]:
        layers: list[Policy | None] = [None if table is None else table.layer(i, device) for i in range(len(calls))]

        def call() -> None:
            for (q, k, v, scale), policy in zip(calls, layers, strict=True):
                bsfa.attention(q, k, v, policy=policy, softmax_scale=scale)

        return call

    peers: dict[Any, Callable[[], None]] = {DENSE: all_layers(None)}
    peers |= {key: all_layers(table) for key, table in tables.items()}
    if device.type == "cuda":
        graphs = {key: capturable(call) for key, call in peers.items()}

        works = {key: Work(repeated([call], PASSES).body, PASSES, eager=not graphs[key]) for key, call in peers.items()}
        timings, clock = interleaved(works)
        return {key: t.us / 1e3 for key, t in timings.items()}, graphs, clock
    samples: dict[Any, list[float]] = {key: [] for key in peers}
    for _ in range(3):
        for key, call in peers.items():
            started = time.perf_counter()
            call()
            samples[key].append((time.perf_counter() - started) * 1e3)
    return {key: statistics.median(s) for key, s in samples.items()}, dict.fromkeys(peers, False), None


# ---- results --------------------------------------------------------------------------------------------------------


def rows_of(
    tables: Tables, report: EvaluationReport, ms: Mapping[Any, float], graphs: Mapping[Any, bool]
) -> list[dict[str, Any]]:
    """One row per policy and target.

    ``held_out_*``: on the calibration prompts that chose nothing; recall of all query tiles, and ``tail_recall`` of a
    prompt's worst tenth, which is what the target promises; pairs: of layers and heads, by their mean over prompts.
    ``recall``, ``pairs_on_target``, ``density``, ``loss_change`` and needles: on the evaluation prompts.
    """
    dense = report.runs[DENSE]
    (length,) = report.prompts_by_length
    rows = []
    for (policy, target), table in tables.items():
        run = report.runs[f"{policy} {target:g}"]
        held_out = table.calibration["held_out"]
        met, pairs = held_out["pairs_that_meet_target"], held_out["pairs"]
        reached = torch.tensor(run.layer_recall)[[kind == CALIBRATED for kind in table.layers]]
        right, asked = needles(run, length)
        dense_right = needles(dense, length)[0]
        rows.append(
            {
                "policy": policy,
                "target": target,
                "prompts_chose": table.calibration["calibration_prompts"],
                "prompts_held_out": table.calibration["held_out_prompts"],
                "dense_pairs": pairs - held_out["sparse_pairs"],
                "pairs": pairs,
                "held_out_recall": round(held_out["recall"]["mean"], 5),
                "held_out_pairs_on_target": round(met["recall"] / pairs, 4),
                "held_out_tail_recall": round(held_out["tail_recall"]["mean"], 5),
                "held_out_tail_pairs_on_target": round(met["tail_recall"] / pairs, 4),
                "held_out_density": round(float(table.density.mean()), 4),
                "recall": round(run.recall, 5),
                "pairs_on_target": round(float((reached >= target).float().mean()), 4),
                "density": round(run.density, 4),
                "loss": round(run.prose_loss, 5),
                "loss_change": round(run.prose_loss / dense.prose_loss - 1, 5),
                "needles_right": right,
                "needles_asked": asked,
                "needles_of_dense": round(right / dense_right, 4) if dense_right else None,
                "attention_ms": round(ms[policy, target], 4),
                "attention_speedup": round(ms[DENSE] / ms[policy, target], 3),
                "cuda_graph": int(graphs[policy, target]),
                "prefill_speedup": round(run.speedup, 3),
            }
        )
    return rows


def show(console: Console, rows: Sequence[dict[str, Any]], title: str) -> None:
    """The results as a table."""
    table = Table(title=title, title_justify="left")
    columns = ("policy", "target", "held-out recall", "pairs", "worst tiles", "pairs", "recall", "pairs", "density")
    for i, column in enumerate((*columns, "loss", "needles", "ms", "speed-up", "prefill")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for r in rows:
        table.add_row(
            r["policy"],
            f"{r['target']:g}",
            f"{r['held_out_recall']:.4f}",
            f"{r['held_out_pairs_on_target']:.1%}",
            f"{r['held_out_tail_recall']:.4f}",
            f"{r['held_out_tail_pairs_on_target']:.1%}",
            f"{r['recall']:.4f}",
            f"{r['pairs_on_target']:.1%}",
            f"{r['density']:.3f}",
            f"{r['loss_change']:+.2%}",
            f"{r['needles_right']}/{r['needles_asked']}",
            f"{r['attention_ms']:.3f}",
            f"{r['attention_speedup']:.2f}x",
            f"{r['prefill_speedup']:.2f}x",
        )
    console.print(table)


# ---- all of it ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Calibrate, evaluate, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration", type=int, metavar="N", help=f"prompts, default {CALIBRATION}")
    parser.add_argument("--prompts", type=int, metavar="N", help=f"to evaluate, default {EVALUATION}")
    parser.add_argument("--small", action="store_true", help="2K tokens and few prompts; not for the record")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: benchmarks/results; needed with --small")
    arguments = parser.parse_args()
    small = arguments.small
    if small and arguments.results is None:
        parser.error("--small needs --results: it would overwrite the real table")
    length, targets = (SMALL_LENGTH, SMALL_TARGETS) if small else (LENGTH, TARGETS)
    many = arguments.calibration or (SMALL_CALIBRATION if small else CALIBRATION)
    count = arguments.prompts or (SMALL_EVALUATION if small else EVALUATION)
    if many < 3 or count < 1:
        parser.error("--calibration takes 3 or more, --prompts 1 or more")

    started = time.perf_counter()
    console = Console(width=170)

    def log(what: str) -> None:
        console.print(f"[{time.perf_counter() - started:4.0f} s] {what}", highlight=False, markup=False)

    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlamaForCausalLM.from_pretrained(TINY_LM / "model", dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    prompts = prompts_of_length("evaluation", tokenizer, length, count)
    calibration = prompts_of_length("calibration", tokenizer, length, many, passed_over=count)
    known = RememberedTexts(tokenizer, [p.text for p in (*prompts, *calibration)])
    log(f"{len(calibration)} prompts to calibrate with, {len(prompts)} to evaluate, of {length_name(length)} tokens")

    tables = calibrate(model, known, calibration, targets, RelativeMax().block_m, log)
    with torch.inference_mode():
        calls = captured(model, tokenize(prompts[0], known).ids)
        ms, graphs, clock = attention_ms(calls, tables)
    log(f"timed attention: dense {ms[DENSE]:.3f} ms for {len(calls)} layers")
    report = evaluate(model, known, prompts, {f"{policy} {target:g}": t for (policy, target), t in tables.items()})
    log(f"evaluated {len(report.runs)} runs")

    rows = rows_of(tables, report, ms, graphs)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    dense, (name,) = report.runs[DENSE], report.prompts_by_length
    q, k = calls[0][:2]
    right, asked = needles(dense, name)
    settings = {
        "machine": machine,
        "torch": torch.__version__,
        "bsfa": bsfa.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "length": name,
        "calibration_prompts": len(calibration),
        "prompts": report.prompts,
        "tokens": report.tokens,
        "layers": len(calls),
        "heads": [q.shape[2], k.shape[2]],
        "head_dim": q.shape[3],
        "block": RelativeMax().block_m,
        "clock_mhz": clock,
        "dense": {
            "loss": round(dense.prose_loss, 5),
            "needles_right": right,
            "needles_asked": asked,
            "attention_ms": round(ms[DENSE], 4),
        },
    }
    show(console, rows, f"{report.prompts} prompts of {name}, {machine}, {settings['dtype']}; dense: {right}/{asked}")
    results = arguments.results or RESULTS
    results.mkdir(parents=True, exist_ok=True)
    write_csv(results / "targets_tiny_lm.csv", rows)
    write_text(results / "targets_tiny_lm.json", json.dumps({"settings": settings}, indent=1) + "\n")
    log(f"wrote {results}/targets_tiny_lm.{{csv,json}}")


if __name__ == "__main__":
    main()
