"""Draws docs/images/select_h200.png from benchmarks/results/h200.json. Needs matplotlib, no GPU.

python benchmarks/plot_selection.py [--report FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from plot_attention import CUDNN, FA2, OURS, matching
from report import ROOT


def lengths_axis(axes: Axes, rows: dict[int, dict[str, Any]]) -> None:
    """Tokens, with the density that was measured below."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), [f"{n}K\n{m['peers']['density']:.0%}" for n, m in rows.items()])
    axes.set_xlabel("tokens, and blocks kept")


def share(axes: Axes, rows: dict[int, dict[str, Any]]) -> None:
    """Time of pooling and selection as a share of dense attention."""
    for key, label, style in (
        ("dense_ms", "of bsfa dense", OURS),
        ("cudnn_ms", "of cuDNN (torch SDPA)", CUDNN),
        ("fa2_ms", "of FlashAttention-2 (torch SDPA)", FA2),
    ):
        axes.plot(list(rows), [m["value"] / m["peers"][key] for m in rows.values()], label=label, **style)
    for n, m in rows.items():
        axes.annotate(
            f"{m['value']:.2g} ms",
            (n, m["value"] / m["peers"]["dense_ms"]),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=8,
        )
    lengths_axis(axes, rows)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_ylabel("time / dense attention's")
    axes.set_title("pool + select (RelativeMax)", fontsize=11)


def speedup(axes: Axes, peers: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Pool, select and attend against dense attention."""
    for (label, rows), style in zip(peers.items(), (OURS, CUDNN, FA2), strict=True):
        axes.plot(list(rows), [m["value"] for m in rows.values()], label=label, **style)
    lengths_axis(axes, next(iter(peers.values())))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set_ylabel("speed-up")
    axes.set_title("pool + select + attend", fontsize=11)


def draw(report: dict[str, Any]) -> Figure:
    """Both panels."""
    rows = matching(report, r"select\.relmax\.(\d+)k\.ms")
    speedups = {
        label: matching(report, rf"e2e\.relmax\.(\d+)k\.x_{peer}")
        for peer, label in (
            ("dense", "against bsfa dense"),
            ("cudnn", "against cuDNN (torch SDPA)"),
            ("fa2", "against FlashAttention-2 (torch SDPA)"),
        )
    }
    if not rows or not all(speedups.values()):
        raise SystemExit("the report has no measurements of the suite 'select'")
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    share(left, rows)
    speedup(right, speedups)
    for axes, place in ((left, "upper right"), (right, "lower right")):
        axes.margins(y=0.12)  # room for the annotations
        axes.grid(alpha=0.3)
        axes.legend(loc=place, fontsize=9, frameon=False)
    clocks = [m["clock_mhz"] for m in rows.values() if m["clock_mhz"]]
    clock = f", SM clock {min(clocks)} to {max(clocks)} MHz" if clocks else ""
    device = report["device"]
    figure.supxlabel(
        f"{device['name']}, torch {device['torch']}{clock}; bfloat16, 32 query and 8 KV heads, head_dim 128, "
        "random data",
        fontsize=8.5,
        color="#444444",
    )
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "results" / "h200.json")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "select_h200.png")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(json.loads(arguments.report.read_text()))
    drawn.savefig(arguments.output, dpi=150, metadata={"Software": None})
    print(f"wrote {arguments.output}")
