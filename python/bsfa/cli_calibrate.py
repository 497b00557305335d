"""``bsfa calibrate``: from its options to threshold files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bsfa.calibration import Promise, calibrate_kth, choose, choose_skip, collect, collect_skip, spend
from bsfa.calibration.budget import check_density, check_output_error
from bsfa.calibration.collect import TAIL
from bsfa.calibration.curves import check_calibratable
from bsfa.calibration.output_error import COSTS
from bsfa.calibration.resume import discard
from bsfa.cli_common import (
    TARGET_FIELD,
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
from bsfa.policies import CALIBRATED as POLICIES
from bsfa.policies import Antidiagonal, ExactSkip, ThresholdPolicy
from bsfa.policies.exact_skip import FORMS
from bsfa.prompts import load_prompts
from bsfa.thresholds import ThresholdTable


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
@one_line_errors
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
    paths = output_paths(output, targets if k is None else [k])
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
    lm, tokenizer = load_model(model, dtype, pick_device(device))
    partial = _partial_folder(output) if resume else None
    with progress_bar("calibrating") as progress:
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
    print_table(held_out, columns if errors is None else [*columns, "error"], rows)


def _summary(table: ThresholdTable) -> list[str]:
    dense = table.dense_heads()
    return [
        number(float(table.recall.mean())),
        number(float(table.tail_recall.mean())),
        number(float(table.recall.min())),
        number(float(table.density.mean())),
        f"{int(dense.sum())} of {dense.numel()}",
    ]
