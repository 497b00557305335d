"""The ``bsfa`` command: calibrate, import-bsfa, inspect, eval, doctor.

Thin: the work is in bsfa.calibration, bsfa.importing and bsfa.evaluation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bsfa
from bsfa.calibration import Progress, Promise, calibrate_kth, choose, choose_skip, collect, collect_skip, spend
from bsfa.calibration.budget import check_density, check_output_error
from bsfa.calibration.collect import TAIL
from bsfa.calibration.curves import check_calibratable
from bsfa.calibration.output_error import COSTS
from bsfa.calibration.resume import discard
from bsfa.calibration.statement import doubts, statement
from bsfa.doctor import default_device
from bsfa.evaluation import Accuracy, EvaluationReport, evaluate
from bsfa.files import write_text
from bsfa.policies import CALIBRATED as POLICIES
from bsfa.policies import Antidiagonal, ExactSkip, ThresholdPolicy
from bsfa.policies.exact_skip import FORMS
from bsfa.prompts import length_name, load_prompts
from bsfa.thresholds import CALIBRATED, ThresholdTable

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Training-free block-sparse attention: calibrate thresholds for a model, inspect and evaluate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_options = {"traceback": False}
TARGET_FIELD = "{target}"  # in --output, stands for the target recall

DTYPES = ("auto", "float32", "bfloat16", "float16")

ModelOption = Annotated[str, typer.Option("--model", help="Directory of a Hugging Face causal LM.")]
DataOption = Annotated[
    Path, typer.Option("--data", help="Prompts: .jsonl or .jsonl.gz, one object with 'text' a line.")
]
MaxPrompts = Annotated[int | None, typer.Option(min=1, help="Use the first N prompts only.")]
MaxLength = Annotated[int | None, typer.Option(min=2, help="Cut prompts to N tokens.")]
DtypeOption = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)} (as stored).")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, ...; auto: spread over all GPUs, the CPU and the disk as they have room (accelerate); "
        "default: a GPU that bsfa can use, or cpu."
    ),
]
AUTO = "auto"


# ---- what all commands share ----------------------------------------------------------------------------------------


def _print_line(kind: str, message: object) -> None:
    typer.echo(f"{kind}: {' '.join(str(message).split())}", err=True)


def _one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Errors as one line on stderr: exit code 2 for what the user can mend, 1 for the rest. Warnings likewise."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _print_line("warning", message)
            try:
                return command(*args, **kwargs)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                if _options["traceback"]:
                    raise
                mendable = isinstance(error, ValueError | OSError | ImportError | bsfa.UnsupportedError)
                text = str(error) or type(error).__name__
                if isinstance(error, OSError) and error.filename is not None:
                    text = f"{error.filename}: {error.strerror}"
                elif not mendable:
                    text = f"{type(error).__name__}: {text} (bsfa --traceback ... shows where)"
                _print_line("error", text)
                raise typer.Exit(2 if mendable else 1) from None

    return run


@app.callback()
def _global_options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")] = False,
) -> None:
    _options["traceback"] = traceback


def _pick_device(name: str | None) -> torch.device | None:
    """The device, or None to spread the model over what there is."""
    if name == AUTO:
        return None
    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device {name}: {error}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch finds no CUDA device")
        return device
    return default_device()


def _load_model(name: str, dtype: str, device: torch.device | None) -> tuple[Any, Any]:
    """The causal LM on ``device`` (None: spread over what there is) and its tokenizer."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    try:
        import transformers
    except ImportError:
        raise ImportError('this command needs transformers: pip install "bsfa[transformers]"') from None
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.exists():
        raise ValueError(f"--model {name}: no such directory")
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"--model {name}: no config.json in this directory")
    source = str(path) if path.exists() else name
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, source, dtype=dtype)
    if device is not None:
        model: Any = load()
        return model.to(device).eval(), tokenizer
    if not transformers.utils.is_accelerate_available():
        raise ImportError(f"--device {AUTO} needs accelerate: pip install accelerate")
    return load(device_map="auto").eval(), tokenizer


class TimeLeft:
    """Seconds left of work that is reported in steps of any length.

    The rate is that of all work since the first report: what was done before that (by an earlier run) says nothing
    about it. Between reports the estimate counts down.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)
        self._total = 0.0

    @property
    def started(self) -> bool:
        """Whether anything was reported."""
        return self._first is not None

    def report(self, done: float, total: float) -> None:
        """``done`` of ``total`` is done now."""
        self._last, self._total = (self._clock(), done), total
        if self._first is None:
            self._first = self._last

    def seconds(self) -> float | None:
        """The estimate; None before anything was done."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        rate = (self._last[1] - self._first[1]) / max(self._last[0] - self._first[0], 1e-9)
        return max((self._total - self._last[1]) / rate - (self._clock() - self._last[0]), 0.0)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.text import Text

    left = TimeLeft()

    class LeftColumn(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text(_duration(left.seconds()), style="progress.remaining")

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), LeftColumn())
    now = TextColumn("left  {task.fields[now]}")
    with Progress(*columns, now, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, now="")

        def report(done: float, total: float, now: str) -> None:
            if not left.started and done > 0:
                _print_line(title, f"{done / total:.0%} of the work was done by an earlier run")
            left.report(done, total)
            bar.update(task, completed=done, total=total, now=now)

        yield report


def _number(value: float, digits: int = 4) -> str:
    return "-" if not math.isfinite(value) else f"{value:.{digits}f}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    typer.echo(f"\n{title}")
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


# ---- commands -------------------------------------------------------------------------------------------------------


def _output_paths(output: str, targets: Sequence[float]) -> list[Path]:
    if len(targets) > 1 and TARGET_FIELD not in output:
        raise ValueError(f"several targets need {TARGET_FIELD} in --output, e.g. thresholds-{TARGET_FIELD}.safetensors")
    paths = [Path(output.replace(TARGET_FIELD, f"{t:g}")) for t in targets]
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"--output {path}: {path.parent} is not a directory")
        if path.is_dir():
            raise ValueError(f"--output {path}: is a directory")
    return paths


def _targets(
    recall: list[float] | None,
    density: list[float] | None,
    output_error: list[float] | None,
    cost: str | None,
    confidence: float | None,
) -> tuple[str, list[float], str | None]:
    """The kind of target that was asked for, the targets, and the errors to measure for them; checked."""
    given = {"target_recall": recall, "target_density": density, "target_output_error": output_error}
    found = {kind: values for kind, values in given.items() if values} or {"target_recall": [0.95]}
    if len(found) > 1:
        names = " and ".join(f"--{kind.replace('_', '-')}" for kind in found)
        raise ValueError(f"{names}: one kind of target at a time")
    kind, targets = next(iter(found.items()))
    if kind == "target_recall":
        if cost is not None:
            raise ValueError("--cost belongs to --target-density and --target-output-error")
        for target in targets:
            Promise(target, confidence)
        return kind, targets, None
    if confidence is not None:
        raise ValueError("--confidence belongs to --target-recall: a budget promises nothing")
    errors = cost or "output"
    if errors not in COSTS:
        raise ValueError(f"--cost {errors}: choose one of {', '.join(COSTS)}")
    for target in targets:
        if kind == "target_density":
            check_density(target)
        else:
            check_output_error(target, errors)
    return kind, targets, errors


def _partial_folder(output: str) -> Path:
    """Where finished prompts are kept until ``output`` is written: beside it, one for all targets."""
    path = Path(output.replace(TARGET_FIELD, "all-targets"))
    return path.with_name(f"{path.name}.partial")


RULES = ("target", "kth")


def _policy_to_calibrate(
    name: str, form: str | None, rule: str | None, k: int | None, fields: dict[str, int]
) -> ThresholdPolicy:
    """The policy that the options describe."""
    if name not in POLICIES:
        raise ValueError(f"--policy {name}: choose one of {', '.join(POLICIES)}")
    if name != ExactSkip.name:
        if (form, rule, k) != (None, None, None):
            raise ValueError(f"--form, --rule and --k belong to --policy {ExactSkip.name}")
        return POLICIES[name](**fields)
    for option, value, known in (("form", form, FORMS), ("rule", rule, RULES)):
        if value is not None and value not in known:
            raise ValueError(f"--{option} {value}: choose one of {', '.join(known)}")
    for option in ("last_tiles", "min_blocks"):
        if option in fields:
            raise ValueError(f"--{option.replace('_', '-')}: {ExactSkip.name} has no such parameter")
    kth = rule == "kth"
    if kth != (k is not None):
        raise ValueError("--rule kth needs --k, the blocks to leave a query tile" if kth else "--k needs --rule kth")
    if kth and form == "relative":
        raise ValueError("--rule kth gives absolute thresholds: leave --form out, or say absolute")
    policy = ExactSkip(form="absolute" if kth else form or "relative", **fields)  # type: ignore[arg-type]
    check_calibratable(policy)
    return policy


@app.command()
@_one_line_errors
def calibrate(
    model: ModelOption,
    data: DataOption,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; {target} stands for the target or k.")],
    policy: Annotated[str, typer.Option(help=f"What to calibrate: {', '.join(POLICIES)}.")] = "relative-max",
    target_recall: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of attention mass to keep; repeat it for several files from one pass.", show_default="0.95"
        ),
    ] = None,
    target_density: Annotated[
        list[float] | None,
        typer.Option(
            help="Instead: share of blocks to keep, spent where it lowers the error most; may be repeated.",
            show_default=False,
        ),
    ] = None,
    target_output_error: Annotated[
        list[float] | None,
        typer.Option(
            help="Instead: relative error of the attention outputs to allow, at the least density; may be repeated.",
            show_default=False,
        ),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help="Of --target-density: the error that is to be least. 'output', of the attention outputs (default); or "
            "'loss', of the predictions, which takes a backward pass per prompt and its memory.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of exact-skip: relative to a row's running maximum (default), or absolute logits in nats.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="Of exact-skip: target (default), or kth, BSFA's own: the k-th largest tile maximum, no target.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Of --rule kth: blocks to leave a query tile.")] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Query tile and KV block, tokens.")] = 128,
    sink_blocks: Annotated[int | None, typer.Option(min=0, help="First blocks, always kept.")] = None,
    window_blocks: Annotated[int | None, typer.Option(min=1, help="Blocks up to the tile's own, always kept.")] = None,
    last_tiles: Annotated[int | None, typer.Option(min=0, help="Query tiles at the end that keep everything.")] = None,
    min_blocks: Annotated[int | None, typer.Option(min=0, help="Best blocks that are always kept.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Of antidiagonal: tokens between sampled ones.", show_default=False)
    ] = None,
    max_prompts: MaxPrompts = None,
    max_length: MaxLength = None,
    tail: Annotated[
        float, typer.Option(help="The target is about the worst query tiles of a prompt, this share; 1: about all.")
    ] = TAIL,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="Keep each head's target in this share of all draws of the calibration prompts, e.g. 0.9, which takes "
            "more of them; default: in expectation."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split into calibration and held-out prompts.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            help="Keep finished prompts in OUTPUT.partial until the file is written, and take up those of a run that "
            "was killed."
        ),
    ] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
) -> None:
    """Measure a model on prompts and write the thresholds that keep a target share of the attention mass, or those
    that spend a share of the blocks where it lowers the error most.

    A run that is killed continues where it was when it is started again with the same options.
    """
    if k is not None and (target_recall or target_density or target_output_error or confidence is not None):
        raise ValueError("--k has no target: leave --target-... and --confidence out")
    kind, targets, errors = _targets(target_recall, target_density, target_output_error, cost, confidence)
    paths = _output_paths(output, targets if k is None else [k])
    fixed = {
        "sink_blocks": sink_blocks,
        "window_blocks": window_blocks,
        "last_tiles": last_tiles,
        "min_blocks": min_blocks,
        "stride": stride,
    }
    given = {name: value for name, value in fixed.items() if value is not None}
    if stride is not None and policy != Antidiagonal.name:
        raise ValueError(f"--stride: {policy} has none")
    if errors is not None and policy == ExactSkip.name:
        raise ValueError(f"--{kind.replace('_', '-')}: {ExactSkip.name} is calibrated for a target recall only")
    chosen = _policy_to_calibrate(policy, form, rule, k, {"block_m": block_size, "block_n": block_size, **given})
    prompts = load_prompts(data, max_prompts)
    lm, tokenizer = _load_model(model, dtype, _pick_device(device))
    partial = _partial_folder(output) if resume else None
    with _progress_bar("calibrating") as progress:
        options: dict[str, Any] = {"tail": tail, "max_length": max_length, "progress": progress, "resume": partial}
        tables: Iterator[ThresholdTable]
        if k is not None:
            assert isinstance(chosen, ExactSkip)
            tables = iter([calibrate_kth(lm, tokenizer, prompts, chosen, k, seed=seed, **options)])
        elif isinstance(chosen, ExactSkip):
            skipping = collect_skip(lm, tokenizer, prompts, chosen, seed=seed, **options)
            tables = (choose_skip(skipping, target, confidence=confidence) for target in targets)
        else:
            curves = collect(lm, tokenizer, prompts, chosen, errors=errors, **options)  # type: ignore[arg-type]
            if errors is None:
                tables = (choose(curves, target, confidence=confidence, seed=seed) for target in targets)
            else:
                tables = (spend(curves, **{kind: target}, seed=seed) for target in targets)
    rows = []
    for label, path, table in zip(targets if k is None else [k], paths, tables, strict=True):
        table.save(path)
        error = [] if errors is None else [f"{table.calibration['held_out']['error']:.4g}"]
        rows.append([f"{label:g}", *_summary(table), *error])
        typer.echo(f"wrote {path}")
    if partial is not None:
        discard(partial)
    what = "recall and density" if errors is None else "recall, density and error"
    held_out = f"{what} on {len(prompts) // 2} of {len(prompts)} prompts, which chose nothing"
    columns = ["target" if k is None else "k", "recall", "worst tiles", "worst head", "density", "dense heads"]
    _table(held_out, columns if errors is None else [*columns, "error"], rows)


@app.command(name="import-bsfa")
@_one_line_errors
def import_bsfa_command(
    file: Annotated[Path, typer.Argument(help="The original BSFA's NAME.inference.pt.")],
    k: Annotated[int, typer.Option(help="Which of its thresholds: off-diagonal key tiles a query block.")],
    model: Annotated[str, typer.Option(help="Directory of the model that it was made for: the file does not say.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Threshold file to write.")],
    sink_blocks: Annotated[int, typer.Option(min=0, help="First blocks, never skipped; the original has none.")] = 1,
) -> None:
    """Make a threshold file (exact-skip, absolute) of one of the original BSFA, and say what cannot be carried over."""
    _output_paths(str(output), [0.0])
    table = bsfa.import_bsfa(file, k, model, sink_blocks=sink_blocks)
    table.save(output)
    typer.echo(f"wrote {output}")
    for line in table.calibration["not_mapped"]:
        typer.echo(f"not carried over: {line}")


def _summary(table: ThresholdTable) -> list[str]:
    dense = table.dense_heads()
    return [
        _number(float(table.recall.mean())),
        _number(float(table.tail_recall.mean())),
        _number(float(table.recall.min())),
        _number(float(table.density.mean())),
        f"{int(dense.sum())} of {dense.numel()}",
    ]


@app.command()
@_one_line_errors
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
        [length_name(n), str(count), _number(float(r.mean())), _number(float(r.min())), _number(float(d.mean()))]
        for n, count, r, d in zip(
            table.lengths, table.length_prompts, table.length_recall, table.length_density, strict=True
        )
    ]
    if by_length:
        columns = ("length", "prompts", "recall", "worst head", "density")
        _table("by prompt length (held-out prompts)", columns, by_length)
    dense = table.dense_heads()
    layers = []
    for i, kind in enumerate(table.layers):
        values = table.thresholds[i][~dense[i]]
        layers.append(
            [
                str(i),
                _range(values),
                *_reference_cells(table, i),
                _number(float(table.recall[i].mean())),
                _number(float(table.tail_recall[i].mean())),
                _number(float(table.recall[i].min())),
                _number(float(table.density[i].mean())),
                str(int(dense[i].sum())) if kind == CALIBRATED else kind.removeprefix("dense: "),
            ]
        )
    heading = ("recall", "worst tiles", "worst head", "density", "dense heads")
    _table("by layer", ("layer", policy.threshold_name, *_reference_cells(table, None), *heading), layers)
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
@_one_line_errors
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
    lm, tokenizer = _load_model(model, dtype, _pick_device(device))
    with _progress_bar("evaluating") as progress:
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
        ["prose loss, nats/token", *(_number(r.prose_loss) for r in runs)],
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
        rows.append([title, *(_number(one(r)) for r in runs)])
        for length in report.prompts_by_length:
            rows.append([f"  at {length}", *(_number(by_length(r)[length]) for r in runs)])
    rows.append(["prefill, seconds", *(_number(r.seconds, 2) for r in runs)])
    for length, count in report.prompts_by_length.items():
        rows.append([f"  at {length}, per prompt", *(_number(r.seconds_by_length[length] / count, 3) for r in runs)])
    rows.append(["prefill speed-up", *(_times(r.speedup) for r in runs)])
    for length in report.prompts_by_length:
        rows.append([f"  at {length}", *(_times(r.speedup_by_length[length]) for r in runs)])
    _table(f"{report.prompts} prompts, {report.tokens} tokens", ("", *names), rows)
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
                rows.append([str(layer), *map(_number, cells)])
        if per_head:
            heads = [f"head {h}" for h in range(len(run.layer_density[0]))]
            _table(f"{run.name}: density and recall of each head", ("layer", *heads), rows)
        else:
            columns = ("layer", "density", "lowest head", "highest head", "recall", "worst head")
            _table(f"{run.name}: by layer", columns, rows)


@app.command()
@_one_line_errors
def doctor() -> None:
    """What was built, what this machine can run, and why not the rest."""
    facts = bsfa.doctor()
    _table("build", ("", "value"), [[k, str(v)] for k, v in facts["build"].items()])
    machine = {k: v for k, v in facts["machine"].items() if k != "gpus"}
    rows = [[k, str(v)] for k, v in machine.items()]
    rows += [
        [f"gpu {i}", f"{g['name']}, compute capability {g['capability']}, {g['memory_gib']:.0f} GiB"]
        for i, g in enumerate(facts["machine"]["gpus"])
    ]
    _table("machine", ("", "value"), rows)
    columns = list(dict.fromkeys(key for row in facts["kernels"] for key in row))
    _table("kernels", columns, [[str(row.get(c, "")) for c in columns] for row in facts["kernels"]])
    _table(
        "operations", ("operation", "cpu", "cuda"), [[op, r["cpu"], r["cuda"]] for op, r in facts["operations"].items()]
    )


def main() -> None:
    """Entry point of the ``bsfa`` command."""
    app(prog_name="bsfa")
