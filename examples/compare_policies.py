"""Every policy on the shipped model's real queries and keys: blocks kept, mass kept, text loss and needles.

    python examples/compare_policies.py [--device cuda] [--prompts N] [--tables DIR]

Runs the prompts of examples/tiny_lm densely and under every policy and parameter below, with calibrated thresholds
against one global alpha of the same density among them, budgets spent where they lower an error most against every
rule at the density that they keep, and an oracle that knows the true mass. Beyond the 10 shipped prompts of a length,
further ones put new needles into the same texts. A few minutes on one H200; on a CPU allow a minute a prompt, give
--prompts 1 or 2, and --budgets without a value, because measuring what they need takes hours there. Calibration runs
where attention does if its operations have kernels there, else on the CPU; --tables holds its files.

Writes benchmarks/results/policies_tiny_lm.csv (one row per run), policies_tiny_lm.json beside it (the settings, and the
comparisons at equal density) and docs/images/policies_tiny_lm.png. Same inputs on the same device, same files.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import bsfa
from bsfa import BlockMask, MaskGeometry, ThresholdTable
from bsfa._library import KERNELS
from bsfa.calibration import choose, collect, spend
from bsfa.calibration.collect import dense_model
from bsfa.calibration.forward import prefill
from bsfa.doctor import cpu_name
from bsfa.evaluation import DENSE, Entry, EvaluationReport, RunReport, attention_mass, evaluate
from bsfa.files import replacing, write_text
from bsfa.integrations.transformers import density, set_policy
from bsfa.policies import Antidiagonal, CumulativeMass, FlexPrefill, Policy, RelativeMax, Selection, StaticPattern
from bsfa.prompts import Prompt, length_bucket, load_prompts, parse_prompt, tokenize

ROOT = Path(__file__).resolve().parent.parent
TINY_LM = ROOT / "examples" / "tiny_lm"
RESULTS = ROOT / "benchmarks" / "results"
IMAGE = ROOT / "docs" / "images" / "policies_tiny_lm.png"

NEEDLES = ("single", "multi_key", "multi_value")
LENGTHS = (8192, 16384)
TARGETS = (0.90, 0.95, 0.98)
ALPHAS = (0.05, 0.12, 0.18, 0.5)
MASSES = (0.90, 0.95, 0.99)
BUDGETS = (0.20, 0.30)
COSTS = ("output", "loss")
STRIDE = 8  # of the antidiagonal scores that spend them
SAME_DENSITY = 5e-4  # densities this close are equal
BISECTIONS = 24
MASS_UNITS = 2.0**40

# Families of runs: their names in the table and the plot.
STATIC, GLOBAL, SHARED, MATCHED = "static", "relative-max", "relative-max shared", "relative-max, density matched"
CALIBRATED = "relative-max calibrated"
CORRECTED = "relative-max, mean correction"
CALIBRATED_CORRECTED = "relative-max calibrated, mean correction"
MEAN, FLAT64 = "cumulative-mass mean", "cumulative-mass flat64"
FLEX, ANTIDIAGONAL, ORACLE = "flex-prefill", "antidiagonal", "oracle"
BUDGET, RULE = "antidiagonal, budget", "rule, density matched"

#: Of a budget: (cost, target density).
Budget = tuple[str, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Oracle(Policy):
    """The fewest blocks that hold ``mass`` of a query tile's true attention, and its diagonal; for whole prompts.

    No policy: it makes all scores first. Ties go to the lower block.
    """

    mass: float = 0.95
    name = "oracle"

    @property
    def needs_keys(self) -> bool:
        """The keys tell the true mass."""
        return True

    def select(self, selection: Selection) -> BlockMask:
        """Dense attention for its LSE (of which the values are no part), then blocks by their mass."""
        q, k, layout = selection.q, selection.k, selection.layout
        assert k is not None
        options: dict[str, Any] = {
            "causal": layout.causal,
            "softmax_scale": selection.softmax_scale,
            "softcap": selection.softcap,
        }
        _, lse = bsfa.block_sparse_attention(q, k, k, None, **options)
        mass = attention_mass(q, k, lse, block_m=self.block_m, block_n=self.block_n, **options)
        geometry = MaskGeometry.of(layout, self.block_m, self.block_n, q.device)
        # Sums of integers: the same on a GPU whatever the order of its additions.
        ordered, order = (mass.double() * MASS_UNITS).to(torch.int64).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(mass, dtype=torch.bool)
        kept.scatter_(-1, order, before < self.mass * ordered.sum(-1, keepdim=True))
        own = geometry.visible_blocks()[:, None, None] - 1
        return BlockMask.from_rows(kept | (torch.arange(kept.shape[-1], device=q.device) == own), geometry)


@dataclass(frozen=True)
class Run:
    """One row of the comparison: an entry of :func:`bsfa.evaluation.evaluate` and what it is called."""

    family: str
    parameters: str
    entry: Entry
    mean_correction: bool = False

    @property
    def name(self) -> str:
        """Unique among the runs."""
        return f"{self.family} {self.parameters}"


def fixed_runs(block: int) -> list[Run]:
    """Everything that needs no calibration."""
    sizes: dict[str, int] = {"block_m": block, "block_n": block}
    runs = [Run(STATIC, f"sink 2 window {w}", StaticPattern(sink_blocks=2, window_blocks=w, **sizes)) for w in (4, 16)]
    for alpha in ALPHAS:
        policy = RelativeMax(alpha=alpha, **sizes)
        runs.append(Run(GLOBAL, f"alpha {alpha}", policy))
        runs.append(Run(SHARED, f"alpha {alpha}", replace(policy, shared=True)))
        runs.append(Run(CORRECTED, f"alpha {alpha}", policy, mean_correction=True))
    for mass in MASSES:
        runs.append(Run(MEAN, f"mass {mass}", CumulativeMass(mass=mass, **sizes)))
        runs.append(Run(FLAT64, f"mass {mass}", CumulativeMass(mass=mass, pooling="flat64", **sizes)))
    for gamma in (0.9, 0.95):
        for budget in (128, 1024):
            policy = FlexPrefill(gamma=gamma, tau=0.1, min_budget=budget, **sizes)
            runs.append(Run(FLEX, f"gamma {gamma} tau 0.1 min_budget {budget}", policy))
        for stride in (8, 16):
            policy = Antidiagonal(stride=stride, mass=gamma, **sizes)
            runs.append(Run(ANTIDIAGONAL, f"stride {stride} mass {gamma}", policy))
    return runs + [Run(ORACLE, f"mass {mass}", Oracle(mass=mass, **sizes)) for mass in (0.90, 0.95)]


def calibrated_runs(tables: Mapping[float, ThresholdTable], alphas: Mapping[float, float], block: int) -> list[Run]:
    """Per target: thresholds per layer and head, without and with correction, and one alpha of the same density."""
    runs: list[Run] = []
    for target, table in tables.items():
        runs.append(Run(CALIBRATED, f"target {target}", table))
        runs.append(Run(CALIBRATED_CORRECTED, f"target {target}", table, mean_correction=True))
        matched = RelativeMax(alpha=alphas[target], block_m=block, block_n=block)
        runs.append(Run(MATCHED, f"as target {target}: alpha {alphas[target]:.4g}", matched))
    return runs


def published_rules(block: int) -> dict[str, Callable[[float], Policy]]:
    """The published rules with one parameter for all heads, by name and that parameter, as functions of its distance
    from what keeps all.
    """
    sizes: dict[str, int] = {"block_m": block, "block_n": block}
    return {
        "relative-max alpha": lambda x: RelativeMax(alpha=x, **sizes),
        "relative-max shared alpha": lambda x: RelativeMax(alpha=x, shared=True, **sizes),
        "cumulative-mass mean mass": lambda x: CumulativeMass(mass=1 - x, **sizes),
        "cumulative-mass flat64 mass": lambda x: CumulativeMass(mass=1 - x, pooling="flat64", **sizes),
        "flex-prefill tau 0.1 min_budget 128 gamma": lambda x: FlexPrefill(
            gamma=1 - x, tau=0.1, min_budget=128, **sizes
        ),
        "antidiagonal stride 8 mass": lambda x: Antidiagonal(stride=8, mass=1 - x, **sizes),
        "antidiagonal stride 16 mass": lambda x: Antidiagonal(stride=16, mass=1 - x, **sizes),
    }


def budget_runs(budgets: Mapping[Budget, ThresholdTable], rules: Mapping[tuple[float, str], Policy]) -> list[Run]:
    """Tables of :func:`bsfa.calibration.spend`, and by (target, name) the rules of their density."""
    runs = [
        Run(BUDGET, f"stride {STRIDE} density {target:g} cost {cost}", table)
        for (cost, target), table in budgets.items()
    ]
    for (target, name), policy in rules.items():
        value = getattr(policy, name.split()[-1])
        runs.append(Run(RULE, f"as density {target:g}: {name} {value:.5g}", policy))
    return runs


# ---- prompts --------------------------------------------------------------------------------------------------------


def evaluation_prompts(tokenizer: Any, count: int) -> list[Prompt]:
    """``count`` prompts of every length: the shipped ones, then new needles in their texts."""
    return [p for length in LENGTHS for p in prompts_of_length("evaluation", tokenizer, length, count)]


def prompts_of_length(kind: str, tokenizer: Any, length: int, count: int, passed_over: int = 0) -> list[Prompt]:
    """``count`` "evaluation" or "calibration" prompts of a length: the shipped ones, then :func:`further_prompts`.

    passed_over: leave out so many draws, because draws over other texts, but of the same number, have the same needles.
    """
    shipped = load_prompts(TINY_LM / "prompts" / f"{kind}.jsonl.gz")
    have = [p for p in shipped if length_bucket(len(tokenize(p, tokenizer))) == length][:count]
    missing = count - len(have)
    return have + further_prompts(shipped, length, passed_over + missing)[passed_over:] if missing else have


def further_prompts(shipped: Sequence[Prompt], length: int, count: int) -> list[Prompt]:
    """New draws of the shipped prompts' distribution over their texts, which the model never saw either."""
    sys.path.insert(0, str(TINY_LM))
    try:
        import numpy
        from tokenizers import Tokenizer

        from check import draw
        from tasks import Stream
    finally:
        sys.path.remove(str(TINY_LM))
    raw = Tokenizer.from_file(str(TINY_LM / "model" / "tokenizer.json"))
    text = "".join(p.text[start:end] for p in shipped for start, end in p.prose or ())
    ids = numpy.array(raw.encode(text, add_special_tokens=False).ids, dtype=numpy.uint16)
    newline = raw.encode("\n", add_special_tokens=False).ids[0]
    return [parse_prompt(row) for row in draw(raw, Stream(ids, newline), length, count)]


# ---- thresholds -----------------------------------------------------------------------------------------------------


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    targets: Sequence[float],
    block: int,
    progress: Callable[[float, float, str], None],
) -> dict[float, ThresholdTable]:
    """Threshold tables from one pass over the calibration prompts."""
    curves = collect(model, tokenizer, prompts, RelativeMax(block_m=block, block_n=block), progress=progress)
    return {target: choose(curves, target) for target in targets}


def calibrate_budgets(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    targets: Sequence[float],
    block: int,
    progress: Callable[[float, float, str], None],
) -> dict[Budget, ThresholdTable]:
    """Tables of every cost and target density: one pass over the calibration prompts per cost."""
    policy = Antidiagonal(stride=STRIDE, sink_blocks=1, window_blocks=1, block_m=block, block_n=block)
    found: dict[Budget, ThresholdTable] = {}
    for i, cost in enumerate(COSTS):

        def part(done: float, total: float, now: str, i: int = i, cost: str = cost) -> None:
            progress(i * total + done, len(COSTS) * total, f"{cost}, {now}")

        curves = collect(model, tokenizer, prompts, policy, progress=part, errors=cost)
        found |= {(cost, target): spend(curves, target_density=target) for target in targets}
    return found


def matching_rule(model: Any, prompts: Sequence[Tensor], target: float, rule: Callable[[float], Policy]) -> Policy:
    """The rule whose density is ``target``, by bisection of its distance from what keeps all; density falls with it."""
    low, high, middle = 0.0, 1.0, 0.1
    best = (float("inf"), rule(middle))
    for _ in range(BISECTIONS):
        reached = mean_density(model, prompts, rule(middle))
        best = min(best, (abs(reached - target), rule(middle)), key=lambda found: found[0])
        if best[0] <= SAME_DENSITY:
            break
        low, high = (middle, high) if reached > target else (low, middle)
        # Small distances differ by factors, not by differences.
        middle = (low + high) / 2 if low >= 0.05 else (max(low, 1e-7) * high) ** 0.5
    return best[1]


def matching_alpha(model: Any, prompts: Sequence[Tensor], target: float, block: int) -> float:
    """The one alpha of RelativeMax whose density is ``target``."""
    found = matching_rule(model, prompts, target, lambda x: RelativeMax(alpha=x, block_m=block, block_n=block))
    assert isinstance(found, RelativeMax) and isinstance(found.alpha, float)
    return found.alpha


def matching_rules(
    model: Any,
    prompts: Sequence[Tensor],
    budgets: Mapping[Budget, ThresholdTable],
    block: int,
    progress: Callable[[float, float, str], None],
) -> dict[tuple[float, str], Policy]:
    """Every published rule at the density of each budget: the highest that its tables keep of ``prompts`` (ids)."""
    rules, found = published_rules(block), {}
    targets = dict.fromkeys(target for _, target in budgets)
    for i, target in enumerate(targets):
        kept = max(mean_density(model, prompts, table) for (_, t), table in budgets.items() if t == target)
        for j, (name, rule) in enumerate(rules.items()):
            progress(i * len(rules) + j, len(targets) * len(rules), f"density {target:g}, {name}")
            found[target, name] = matching_rule(model, prompts, kept, rule)
    return found


def mean_density(model: Any, prompts: Sequence[Tensor], entry: Entry) -> float:
    """Density over layers, heads and prompts (token ids), as the runs of evaluate report it."""
    total = 0.0
    with dense_model(model):
        set_policy(model, entry, min_seqlen=0, record=True)
        for ids in prompts:
            prefill(model, ids)
            total += float(torch.stack(list(density(model).values())).mean())
    return total / len(prompts)


# ---- results --------------------------------------------------------------------------------------------------------


def needles(run: RunReport, length: str) -> tuple[int, int]:
    """Needle questions right and asked at one length."""
    tasks = set(NEEDLES) & set(run.accuracy_by_task_and_length) or set(run.accuracy_by_task_and_length)
    cells = [run.accuracy_by_task_and_length[task][length] for task in tasks]
    return sum(c.right for c in cells), sum(c.asked for c in cells)


def rows_of(report: EvaluationReport, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run, dense first: values rounded to what is meaningful. Loss changes are relative to dense."""
    dense = report.runs[DENSE]
    rows = []
    for run in (Run(DENSE, "", None), *runs):
        measured = report.runs[DENSE if run.family == DENSE else run.name]
        row: dict[str, Any] = {
            "policy": run.family,
            "parameters": run.parameters,
            "mean_correction": int(run.mean_correction),
            "density": round(measured.density, 4),
            "recall": round(measured.recall, 5),
            "loss": round(measured.prose_loss, 5),
            "loss_change": round(measured.prose_loss / dense.prose_loss - 1, 5),
        }
        for length in report.prompts_by_length:
            right, asked = needles(measured, length)
            loss, full = measured.prose_loss_by_length[length], dense.prose_loss_by_length[length]
            row |= {
                f"density_{length}": round(measured.density_by_length[length], 4),
                f"recall_{length}": round(measured.recall_by_length[length], 5),
                f"loss_change_{length}": round(loss / full - 1, 5),
                f"needles_right_{length}": right,
                f"needles_asked_{length}": asked,
                f"needle_accuracy_{length}": round(right / asked, 4) if asked else None,
            }
        rows.append(row)
    return rows


def dominance(rows: Sequence[dict[str, Any]], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Per target: calibrated thresholds against one global alpha at equal density, and whether they are no worse in
    recall, text loss and needles, and better in one of them.
    """
    found = []
    for target in targets:
        ours = next(r for r in rows if r["policy"] == CALIBRATED and r["parameters"] == f"target {target}")
        other = next(r for r in rows if r["policy"] == MATCHED and r["parameters"].startswith(f"as target {target}: "))
        right = [sum(v for key, v in row.items() if key.startswith("needles_right_")) for row in (ours, other)]
        gains = (ours["recall"] - other["recall"], other["loss"] - ours["loss"], right[0] - right[1])
        found.append(
            {
                "target": target,
                "density": [ours["density"], other["density"]],
                "recall": [ours["recall"], other["recall"]],
                "loss_change": [ours["loss_change"], other["loss_change"]],
                "needles_right": right,
                "dominates": min(gains) >= 0 and max(gains) > 0,
            }
        )
    return found


def budget_dominance(rows: Sequence[dict[str, Any]], length: str) -> list[dict[str, Any]]:
    """Per budget, cost and published rule of that density, at one prompt length: whether the budget has more needles
    and less text loss.
    """
    names = {"density": f"density_{length}", "loss": f"loss_change_{length}", "needles": f"needles_right_{length}"}
    found = []
    for ours in (r for r in rows if r["policy"] == BUDGET):
        density = ours["parameters"].split(" cost ")[0].removeprefix(f"stride {STRIDE} ")
        for other in (r for r in rows if r["policy"] == RULE and r["parameters"].startswith(f"as {density}: ")):
            pair = {name: [row[key] for row in (ours, other)] for name, key in names.items()}
            found.append(
                {
                    "budget": ours["parameters"],
                    "rule": other["parameters"].partition(": ")[2],
                    "density": pair["density"],
                    "loss_change": pair["loss"],
                    "needles_right": pair["needles"],
                    "better_on_both": pair["needles"][0] > pair["needles"][1] and pair["loss"][0] < pair["loss"][1],
                }
            )
    return found


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows, in one step."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(console: Console, rows: Sequence[dict[str, Any]], lengths: Sequence[str], title: str) -> None:
    """The comparison as a table."""
    table = Table(title=title, title_justify="left")
    columns = ["policy", "parameters", *(f"density {n}" for n in lengths), "recall", "loss"]
    columns += [f"needles {n}" for n in lengths]
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            row["parameters"],
            *(f"{row[f'density_{n}']:.3f}" for n in lengths),
            f"{row['recall']:.4f}",
            f"{row['loss_change']:+.2%}" if row["policy"] != DENSE else f"{row['loss']:.4f}",
            *(f"{row[f'needles_right_{n}']}/{row[f'needles_asked_{n}']}" for n in lengths),
        )
    console.print(table)


def show_dominance(console: Console, found: Sequence[dict[str, Any]]) -> None:
    """Calibrated per head against one alpha."""
    table = Table(title="RelativeMax calibrated per layer and head / one global alpha", title_justify="left")
    for i, column in enumerate(("target", "density", "recall", "loss", "needles", "dominates")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in found:
        table.add_row(
            f"{row['target']:.2f}",
            " / ".join(f"{x:.4f}" for x in row["density"]),
            " / ".join(f"{x:.4f}" for x in row["recall"]),
            " / ".join(f"{x:+.2%}" for x in row["loss_change"]),
            " / ".join(map(str, row["needles_right"])),
            "yes" if row["dominates"] else "no",
        )
    console.print(table)


def show_budgets(console: Console, found: Sequence[dict[str, Any]], length: str) -> None:
    """Budgets against rules."""
    table = Table(title=f"Budget per layer and head / rule of its density, {length} tokens", title_justify="left")
    for i, column in enumerate(("budget", "rule", "density", "loss", "needles", "better on both")):
        table.add_column(column, justify="left" if i < 2 else "right")
    for row in found:
        table.add_row(
            row["budget"],
            row["rule"],
            " / ".join(f"{x:.4f}" for x in row["density"]),
            " / ".join(f"{x:+.2%}" for x in row["loss_change"]),
            " / ".join(map(str, row["needles_right"])),
            "yes" if row["better_on_both"] else "no",
        )
    console.print(table)


# Colour and marker of each family; corrected ones are dashed.
STYLES: dict[str, dict[str, Any]] = {
    STATIC: {"color": "#999999", "marker": "x"},
    GLOBAL: {"color": "#0072B2", "marker": "o"},
    CORRECTED: {"color": "#0072B2", "marker": "o", "linestyle": "--", "markerfacecolor": "white"},
    SHARED: {"color": "#56B4E9", "marker": "P"},
    CALIBRATED: {"color": "#D55E00", "marker": "s"},
    CALIBRATED_CORRECTED: {"color": "#D55E00", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    MEAN: {"color": "#009E73", "marker": "^"},
    FLAT64: {"color": "#009E73", "marker": "v", "linestyle": ":"},
    FLEX: {"color": "#CC79A7", "marker": "D"},
    ANTIDIAGONAL: {"color": "#E69F00", "marker": "h"},
    BUDGET: {"color": "#7F0000", "marker": "p"},
    RULE: {"color": "#666666", "marker": "+", "linestyle": ""},
    ORACLE: {"color": "#000000", "marker": "*"},
}


def plot(rows: Sequence[dict[str, Any]], length: str, path: Path, caption: str) -> None:
    """Mass lost, text loss and needles against density at one length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("attention mass lost", lambda row: 1 - row[f"recall_{length}"]),
        ("text loss against dense", lambda row: row[f"loss_change_{length}"]),
        ("needle questions right", lambda row: row[f"needle_accuracy_{length}"]),
    )
    for axes, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for family, style in STYLES.items():
            points = sorted((r[f"density_{length}"], value(r)) for r in rows if r["policy"] == family)
            if points:
                axes.plot(*zip(*points, strict=True), label=family, **{"linewidth": 1.3, "markersize": 6, **style})
        axes.set_title(f"{title}, {length} tokens", fontsize=11)
        axes.set_xlabel("blocks kept")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    figure.axes[1].set_yscale("symlog", linthresh=1e-3)
    figure.axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(caption, fontsize=9, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})


# ---- all of it ------------------------------------------------------------------------------------------------------


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    tables: Mapping[float, ThresholdTable],
    budgets: Mapping[Budget, ThresholdTable],
    block: int,
    progress: Callable[[str, float, float, str], None],
) -> tuple[EvaluationReport, list[Run]]:
    """Find the parameters that match the tables' densities (of budgets: at the greatest length), and evaluate all."""
    ids = [tokenize(p, tokenizer).ids for p in prompts]
    alphas = {}
    for done, (target, table) in enumerate(tables.items()):
        progress("matching densities", done, len(tables), f"target {target}")
        alphas[target] = matching_alpha(model, ids, mean_density(model, ids, table), block)
    lengths = [length_bucket(len(x)) for x in ids]
    longest = [x for x, n in zip(ids, lengths, strict=True) if n == max(lengths)]
    rules = matching_rules(model, longest, budgets, block, lambda *now: progress("matching densities", *now))
    progress("matching densities", 1, 1, "done")
    runs = fixed_runs(block) + calibrated_runs(tables, alphas, block) + budget_runs(budgets, rules)
    report = evaluate(
        model,
        tokenizer,
        prompts,
        {run.name: run.entry for run in runs},
        corrected=[run.name for run in runs if run.mean_correction],
        progress=lambda done, total, now: progress("evaluating", done, total, now),
    )
    return report, runs


def main() -> None:
    """Calibrate or load, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=10, metavar="N", help="of each length")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, metavar="D", help="target densities")
    parser.add_argument("--tables", type=Path, metavar="DIR", help="threshold files: read if there, else written")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--image", type=Path, default=IMAGE, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.prompts < 1:
        parser.error("--prompts takes 1 or more")
    if not all(0 < x <= 1 for x in arguments.budgets):
        parser.error("--budgets takes densities above 0 and at most 1")

    started = time.perf_counter()
    console = Console(width=140)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    block = RelativeMax().block_m
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    prompts = evaluation_prompts(tokenizer, arguments.prompts)
    files = {t: arguments.tables / f"thresholds-{t:.2f}.safetensors" for t in TARGETS} if arguments.tables else {}
    budget_files: dict[Budget, Path] = {}
    if arguments.tables:
        for cost, target in itertools.product(COSTS, arguments.budgets):
            budget_files[cost, target] = arguments.tables / f"thresholds-budget-{cost}-{target:.2f}.safetensors"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    bar_columns = (*columns, TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*bar_columns, console=Console(stderr=True), transient=True) as bar:
        stages = ("calibrating", "matching densities", "evaluating")
        tasks = {name: bar.add_task(name, total=None, now="") for name in stages}

        def progress(name: str, done: float, total: float, now: str) -> None:
            bar.update(tasks[name], completed=done, total=total, now=now)

        def calibrated(
            make: Callable[..., dict[Any, ThresholdTable]], what: Sequence[float], files: Mapping[Any, Path]
        ) -> Any:
            if files and all(path.exists() for path in files.values()):
                progress("calibrating", 1, 1, f"read from {arguments.tables}")
                return {key: ThresholdTable.load(path) for key, path in files.items()}
            here = "block_mass" in KERNELS.get(device.type, frozenset())
            bar.console.print(f"calibrating on {device if here else 'the CPU, in float32'}", highlight=False)
            source = load_prompts(TINY_LM / "prompts" / "calibration.jsonl.gz")
            lm = model if here else LlamaForCausalLM.from_pretrained(TINY_LM / "model", dtype=torch.float32)
            found = make(lm, tokenizer, source, what, block, lambda *now: progress("calibrating", *now))
            for key, path in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                found[key].save(path)
            return found

        model = LlamaForCausalLM.from_pretrained(TINY_LM / "model", dtype=dtype).to(device)
        tables = calibrated(calibrate, TARGETS, files)
        budgets = calibrated(calibrate_budgets, arguments.budgets, budget_files) if arguments.budgets else {}
        report, runs = compare(model, tokenizer, prompts, tables, budgets, block, progress)

    rows = rows_of(report, runs)
    found, spent = dominance(rows, TARGETS), budget_dominance(rows, list(report.prompts_by_length)[-1])
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    settings = {
        "machine": machine,
        "torch": torch.__version__,
        "bsfa": bsfa.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "prompts_by_length": report.prompts_by_length,
        "tokens": report.tokens,
        "block": block,
        "same_density": SAME_DENSITY,
    }
    lengths = list(report.prompts_by_length)
    caption = f"{report.prompts} prompts, {report.tokens} tokens, {machine}, {settings['dtype']}"
    show(console, rows, lengths, caption)
    show_dominance(console, found)
    show_budgets(console, spent, lengths[-1])
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.results / "policies_tiny_lm.csv", rows)
    content = json.dumps({"settings": settings, "equal_density": found, "budgets": spent}, indent=1) + "\n"
    write_text(arguments.results / "policies_tiny_lm.json", content)
    plot(rows, lengths[-1], arguments.image, f"examples/tiny_lm: {caption}")
    console.print(f"wrote {arguments.results}/policies_tiny_lm.{{csv,json}} and {arguments.image}", highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
