"""The whole of bsfa on the shipped model: calibrate, prefill with block-sparse attention, compare with dense.

    python examples/demo.py [--output DIR] [--targets 0.90 0.95 0.98]

Runs on a GPU that bsfa can use, else in a few minutes on the CPU. Calibrates RelativeMax on
examples/tiny_lm/prompts/calibration.jsonl.gz, once for all targets, then evaluates on prompts that calibration never
saw. Writes to DIR: one threshold file per target, a heat map of the default target's table (PNG), the comparison as
text, and everything measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoTokenizer, LlamaForCausalLM

import bsfa
from bsfa.calibration import choose, collect
from bsfa.doctor import default_device
from bsfa.evaluation import EvaluationReport, RunReport, evaluate
from bsfa.files import write_text
from bsfa.plotting import plot_thresholds
from bsfa.prompts import Prompt, length_bucket, load_prompts, tokenize

HERE = Path(__file__).resolve().parent
TINY_LM = HERE / "tiny_lm"
DEFAULT_TARGET = 0.95
NEEDLES = ("single", "multi_key", "multi_value")  # the rest, variable tracking and common words, is harder


def some_of_each_length(prompts: list[Prompt], tokenizer: object, count: int) -> list[Prompt]:
    """The first ``count`` prompts of every length bucket."""
    seen: dict[int, int] = defaultdict(int)
    chosen = []
    for prompt in prompts:
        bucket = length_bucket(len(tokenize(prompt, tokenizer)))
        if seen[bucket] < count:
            seen[bucket] += 1
            chosen.append(prompt)
    return chosen


def share(run: RunReport, tasks: Sequence[str], length: str) -> str:
    """Answers of these tasks that are right at one length."""
    cells = [run.accuracy_by_task_and_length[task][length] for task in tasks if task in run.accuracy_by_task_and_length]
    right, asked = sum(c.right for c in cells), sum(c.asked for c in cells)
    return f"{right / asked:.1%} ({right}/{asked})" if asked else "-"


def comparison(report: EvaluationReport) -> Table:
    """One column per run, dense first."""
    runs = list(report.runs.values())
    dense = runs[0]
    table = Table(title=f"{report.prompts} unseen prompts, {report.tokens} tokens", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    table.add_row("loss, nats/token", *(f"{r.prose_loss:.4f}" for r in runs))
    table.add_row("  against dense", *(f"{r.prose_loss / dense.prose_loss - 1:+.2%}" for r in runs))
    for kind, tasks in (("needles", NEEDLES), ("other answers", sorted(set(dense.accuracy_by_task) - set(NEEDLES)))):
        for length in report.prompts_by_length:
            table.add_row(f"{kind}, {length}", *(share(r, tasks, length) for r in runs))
    for length in report.prompts_by_length:
        table.add_row(f"density, {length}", *(f"{r.density_by_length[length]:.3f}" for r in runs))
    table.add_row("recall (mass kept)", *(f"{r.recall:.4f}" for r in runs))
    for length, count in report.prompts_by_length.items():
        table.add_row(f"prefill, {length}, s", *(f"{r.seconds_by_length[length] / count:.2f}" for r in runs))
    return table


def main() -> None:
    """Calibrate, evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--targets", type=float, nargs="+", default=[0.90, DEFAULT_TARGET, 0.98])
    parser.add_argument("--prompts-per-length", type=int, default=4, help="evaluation prompts of each length")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    console = Console(width=100)
    device = default_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = LlamaForCausalLM.from_pretrained(TINY_LM / "model", dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    facts = bsfa.doctor()
    machine = f"{facts['machine']['cpu']}, {torch.get_num_threads()} threads, {facts['build']['cpu_instruction_set']}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    console.print(f"bsfa {bsfa.__version__} on {machine}", highlight=False)
    calibration = load_prompts(TINY_LM / "prompts" / "calibration.jsonl.gz")
    evaluation = some_of_each_length(
        load_prompts(TINY_LM / "prompts" / "evaluation.jsonl.gz"), tokenizer, arguments.prompts_per_length
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        calibrating = bar.add_task("calibrating", total=None)
        curves = collect(
            model,
            tokenizer,
            calibration,
            bsfa.policies.RelativeMax(),
            progress=lambda done, total, now: bar.update(calibrating, completed=done, total=total),
        )
        calibrated = time.perf_counter()
        tables = {}
        for target in arguments.targets:
            tables[f"target {target:.2f}"] = table = choose(curves, target)
            table.save(output / f"thresholds-{target:.2f}.safetensors")
            if target == DEFAULT_TARGET or len(arguments.targets) == 1:
                plot_thresholds(table, output / "thresholds.png")
        evaluating = bar.add_task("evaluating", total=None)
        report = evaluate(
            model,
            tokenizer,
            evaluation,
            tables,
            progress=lambda done, total, now: bar.update(evaluating, completed=done, total=total),
        )
    finished = time.perf_counter()

    held_out = Table(title="calibration: what each target achieves on held-out prompts", title_justify="left")
    for name in ("", "recall", "worst tiles", "worst head", "density", "dense heads"):
        held_out.add_column(name, justify="right" if name else "left")
    for name, table in tables.items():
        dense_heads = table.dense_heads()
        held_out.add_row(
            name,
            f"{float(table.recall.mean()):.4f}",
            f"{float(table.tail_recall.mean()):.4f}",
            f"{float(table.recall.min()):.4f}",
            f"{float(table.density.mean()):.3f}",
            f"{int(dense_heads.sum())} of {dense_heads.numel()}",
        )
    with console.capture() as capture:
        console.print(held_out)
        console.print(comparison(report))
    text = "\n".join(line.rstrip() for line in capture.get().splitlines())
    seconds = {"calibrate": calibrated - started, "evaluate": finished - calibrated}
    text += (
        f"\n{len(calibration)} prompts calibrated in {seconds['calibrate']:.0f} s, evaluated in "
        f"{seconds['evaluate']:.0f} s ({machine})\n"
    )
    print(text)
    write_text(output / "demo.txt", text)
    results = {
        "machine": machine,
        "seconds": seconds,
        "calibration": {
            name: {
                "recall": float(t.recall.mean()),
                "tail_recall": float(t.tail_recall.mean()),
                "worst_head_recall": float(t.recall.min()),
                "density": float(t.density.mean()),
            }
            for name, t in tables.items()
        },
        "evaluation": report.to_dict(),
    }
    write_text(output / "demo.json", json.dumps(results, indent=1) + "\n")
    print(f"wrote {', '.join(sorted(p.name for p in output.iterdir()))} to {output}")


if __name__ == "__main__":
    main()
