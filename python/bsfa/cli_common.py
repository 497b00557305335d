"""What all commands of ``bsfa`` share: the app itself, common options, errors, devices and models, progress, tables."""

from __future__ import annotations

import contextlib
import functools
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
from bsfa.calibration import Progress
from bsfa.doctor import default_device

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


def print_line(kind: str, message: object) -> None:
    """One line on stderr."""
    typer.echo(f"{kind}: {' '.join(str(message).split())}", err=True)


def one_line_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Errors as one line on stderr: exit code 2 for what the user can mend, 1 for the rest. Warnings likewise."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print_line("warning", message)
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
                print_line("error", text)
                raise typer.Exit(2 if mendable else 1) from None

    return run


@app.callback()
def _global_options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show Python's traceback of an error.")] = False,
) -> None:
    _options["traceback"] = traceback


def pick_device(name: str | None) -> torch.device | None:
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


def load_model(name: str, dtype: str, device: torch.device | None) -> tuple[Any, Any]:
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
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on stderr for as long as the context; it gives the function to report to."""
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
                print_line(title, f"{done / total:.0%} of the work was done by an earlier run")
            left.report(done, total)
            bar.update(task, completed=done, total=total, now=now)

        yield report


def number(value: float, digits: int = 4) -> str:
    """As it stands in a table."""
    return "-" if not math.isfinite(value) else f"{value:.{digits}f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    typer.echo(f"\n{title}")
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def output_paths(output: str, targets: Sequence[float]) -> list[Path]:
    """The file of each target, where they can be written."""
    if len(targets) > 1 and TARGET_FIELD not in output:
        raise ValueError(f"several targets need {TARGET_FIELD} in --output, e.g. thresholds-{TARGET_FIELD}.safetensors")
    paths = [Path(output.replace(TARGET_FIELD, f"{t:g}")) for t in targets]
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"--output {path}: {path.parent} is not a directory")
        if path.is_dir():
            raise ValueError(f"--output {path}: is a directory")
    return paths
