"""The ``bsfa`` command: calibrate, import-bsfa, inspect, eval, doctor.

Thin: the work is in bsfa.calibration, bsfa.importing and bsfa.evaluation.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import torch
import typer

import bsfa
import bsfa.cli_calibrate
from bsfa.calibration.statement import doubts, statement
from bsfa.cli_common import (
    DataOption,
    DeviceOption,
    DtypeOption,
    MaxLength,
    MaxPrompts,
    ModelOption,
    app,
    load_model,
    number,
    one_line_errors,
    output_paths,
    pick_device,
    print_table,
    progress_bar,
)
from bsfa.evaluation import Accuracy, EvaluationReport, evaluate
from bsfa.files import write_text
from bsfa.prompts import length_name, load_prompts
from bsfa.thresholds import CALIBRATED, ThresholdTable


@app.command(name="import-bsfa")
@one_line_errors
def import_bsfa_command(
    file: Annotated[Path, typer.Argument(help="The original BSFA's NAME.inference.pt.")],
    k: Annotated[int, typer.Option(help="Which of its thresholds: off-diagonal key tiles a query block.")],
    model: Annotated[str, typer.Option(help="Directory of the model that it was made for: the file does not say.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Threshold file to write.")],
    sink_blocks: Annotated[int, typer.Option(min=0, help="First blocks, never skipped; the original has none.")] = 1,
) -> None:
    """Make a threshold file (exact-skip, absolute) of one of the original BSFA, and say what cannot be carried over."""
    output_paths(str(output), [0.0])
    table = bsfa.import_bsfa(file, k, model, sink_blocks=sink_blocks)
    table.save(output)
    typer.echo(f"wrote {output}")
    for line in table.calibration["not_mapped"]:
        typer.echo(f"not carried over: {line}")


@app.command()
@one_line_errors
def inspect(
    file: Annotated[Path, typer.Argument(help="Threshold file.")],
    plot: Annotated[
        Path | None, typer.Option(help="Also write heat maps and density against length to this image.")
    ] = None,
) -> None:
    """Show a threshold file: where it comes from, and what it achieves per length and layer."""
    table = ThresholdTable.load(file)
    if plot is not None:
        from bsfa.plotting import plot_thresholds

        plot_thresholds(table, plot)
    policy, head = table.policy, table.metadata()
    named = dict(head["policy"]["parameters"])
    if table.positions:
        named["positions"] = f"{len(table.positions)} from {table.positions[0]} to {table.positions[-1]}"
    parameters = ", ".join(f"{k}={v}" for k, v in named.items())
    for name, value in (
        ("file", f"{file}, format {head['format_version']}, written by bsfa {head['library_version']}"),
        ("policy", f"{policy.name} version {policy.version} ({parameters})"),
        ("model", f"{table.model.name} ({table.num_layers} layers, {table.num_heads} heads, {table.model.dtype})"),
        *statement(table),
    ):
        typer.echo(f"{name:24}{value}")
    for doubt in doubts(table):
        typer.echo(f"warning: {doubt}")
    by_length = [
        [length_name(n), str(count), number(float(r.mean())), number(float(r.min())), number(float(d.mean()))]
        for n, count, r, d in zip(
            table.lengths, table.length_prompts, table.length_recall, table.length_density, strict=True
        )
    ]
    if by_length:
        columns = ("length", "prompts", "recall", "worst head", "density")
        print_table("by prompt length (held-out prompts)", columns, by_length)
    dense = table.dense_heads()
    layers = []
    for i, kind in enumerate(table.layers):
        values = table.thresholds[i][~dense[i]]
        layers.append(
            [
                str(i),
                _range(values),
                *_reference_cells(table, i),
                number(float(table.recall[i].mean())),
                number(float(table.tail_recall[i].mean())),
                number(float(table.recall[i].min())),
                number(float(table.density[i].mean())),
                str(int(dense[i].sum())) if kind == CALIBRATED else kind.removeprefix("dense: "),
            ]
        )
    heading = ("recall", "worst tiles", "worst head", "density", "dense heads")
    print_table("by layer", ("layer", policy.threshold_name, *_reference_cells(table, None), *heading), layers)
    if plot is not None:
        typer.echo(f"wrote {plot}")


def _range(values: torch.Tensor) -> str:
    return "-" if values.numel() == 0 else f"{float(values.min()):.3g} .. {float(values.max()):.3g}"


def _reference_cells(table: ThresholdTable, layer: int | None) -> list[str]:
    """Of a layer (None: the headings), for its heads that are not dense: slopes, and the cut at the longest knot."""
    if table.reference is None:
        return []
    slopes = table.calibration.get("slopes")
    if layer is None:
        return [*(["slope"] if slopes else []), f"nats at {table.positions[table.longest_knot]}"]
    sparse = ~table.dense_heads()[layer]
    cut = (table.thresholds[layer].log() + table.reference[layer, :, table.longest_knot])[sparse]
    mine = torch.tensor(slopes[layer])[sparse] if slopes and slopes[layer] else torch.zeros(0)
    return [*([_range(mine)] if slopes else []), _range(cut)]


@app.command(name="eval")
@one_line_errors
def evaluate_command(
    model: ModelOption,
    data: DataOption,
    thresholds: Annotated[list[Path], typer.Option(help="Threshold file; may be repeated.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    per_head: Annotated[bool, typer.Option(help="Show every head of every layer.")] = False,
    max_prompts: MaxPrompts = None,
    max_length: MaxLength = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Compare dense prefill with prefill under threshold files: loss, answers, mass kept, blocks kept, time, speed-up.

    On a GPU every prompt runs twice with each file: once measured, once timed.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: {json_file.parent} is not a directory")
    loaded = [ThresholdTable.load(path) for path in thresholds]
    stems = [path.stem for path in thresholds]
    tables = {
        (s if stems.count(s) == 1 and s != "dense" else str(p)): t
        for s, p, t in zip(stems, thresholds, loaded, strict=True)
    }
    prompts = load_prompts(data, max_prompts)
    lm, tokenizer = load_model(model, dtype, pick_device(device))
    with progress_bar("evaluating") as progress:
        report = evaluate(lm, tokenizer, prompts, tables, max_length=max_length, progress=progress)
    _print_report(report)
    _print_layers(report, per_head)
    if json_file is not None:
        write_text(json_file, json.dumps(report.to_dict(), indent=1) + "\n")
        typer.echo(f"wrote {json_file}")


def _share(accuracy: Accuracy) -> str:
    return f"{accuracy.share:.1%} ({accuracy.right}/{accuracy.asked})" if accuracy.asked else "-"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if math.isfinite(ratio) else "-"


def _print_report(report: EvaluationReport) -> None:
    runs = list(report.runs.values())
    names = [run.name for run in runs]
    rows: list[list[str]] = [
        ["prose loss, nats/token", *(number(r.prose_loss) for r in runs)],
        ["answers right", *(_share(r.accuracy) for r in runs)],
    ]
    for task in runs[0].accuracy_by_task:
        rows.append([f"  {task}", *(_share(r.accuracy_by_task[task]) for r in runs)])
    for length in report.prompts_by_length:
        rows.append([f"  at {length}", *(_share(r.accuracy_by_length[length]) for r in runs)])
    for title, one, by_length in (
        ("density", lambda r: r.density, lambda r: r.density_by_length),
        ("recall (mass kept)", lambda r: r.recall, lambda r: r.recall_by_length),
    ):
        rows.append([title, *(number(one(r)) for r in runs)])
        for length in report.prompts_by_length:
            rows.append([f"  at {length}", *(number(by_length(r)[length]) for r in runs)])
    rows.append(["prefill, seconds", *(number(r.seconds, 2) for r in runs)])
    for length, count in report.prompts_by_length.items():
        rows.append([f"  at {length}, per prompt", *(number(r.seconds_by_length[length] / count, 3) for r in runs)])
    rows.append(["prefill speed-up", *(_times(r.speedup) for r in runs)])
    for length in report.prompts_by_length:
        rows.append([f"  at {length}", *(_times(r.speedup_by_length[length]) for r in runs)])
    print_table(f"{report.prompts} prompts, {report.tokens} tokens", ("", *names), rows)
    typer.echo("prefill: wall clock of the whole model without the measuring; speed-up: dense seconds / its seconds")
    for run in runs:
        for reason in run.dense_reasons:
            typer.echo(f"{run.name} ran dense in {reason}")


def _print_layers(report: EvaluationReport, per_head: bool) -> None:
    """Density and recall of every layer, or of every head."""
    for run in list(report.runs.values())[1:]:
        rows = []
        for layer, (density, recall) in enumerate(zip(run.layer_density, run.layer_recall, strict=True)):
            if not all(map(math.isfinite, density)):
                rows.append([str(layer), *["-"] * (len(density) if per_head else 5)])
            elif per_head:
                rows.append([str(layer), *(f"{d:.2f} {r:.3f}" for d, r in zip(density, recall, strict=True))])
            else:
                n = len(density)
                cells = (sum(density) / n, min(density), max(density), sum(recall) / n, min(recall))
                rows.append([str(layer), *map(number, cells)])
        if per_head:
            heads = [f"head {h}" for h in range(len(run.layer_density[0]))]
            print_table(f"{run.name}: density and recall of each head", ("layer", *heads), rows)
        else:
            columns = ("layer", "density", "lowest head", "highest head", "recall", "worst head")
            print_table(f"{run.name}: by layer", columns, rows)


@app.command()
@one_line_errors
def doctor() -> None:
    """What was built, what this machine can run, and why not the rest."""
    facts = bsfa.doctor()
    print_table("build", ("", "value"), [[k, str(v)] for k, v in facts["build"].items()])
    machine = {k: v for k, v in facts["machine"].items() if k != "gpus"}
    rows = [[k, str(v)] for k, v in machine.items()]
    rows += [
        [f"gpu {i}", f"{g['name']}, compute capability {g['capability']}, {g['memory_gib']:.0f} GiB"]
        for i, g in enumerate(facts["machine"]["gpus"])
    ]
    print_table("machine", ("", "value"), rows)
    columns = list(dict.fromkeys(key for row in facts["kernels"] for key in row))
    print_table("kernels", columns, [[str(row.get(c, "")) for c in columns] for row in facts["kernels"]])
    print_table(
        "operations", ("operation", "cpu", "cuda"), [[op, r["cpu"], r["cuda"]] for op, r in facts["operations"].items()]
    )


def main() -> None:
    """Entry point of the ``bsfa`` command."""
    app(prog_name="bsfa")
