"""Draws docs/images/attention_h200.png from benchmarks/results/h200.json. Needs matplotlib, no GPU.

python benchmarks/plot_attention.py [--report FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from report import ROOT

# Okabe and Ito's colours, and a marker each: told apart without colour as well.
STYLES: list[dict[str, Any]] = [
    {"color": color, "marker": marker, "linewidth": 2, "markersize": 6}
    for color, marker in (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
]
OURS, CUDNN, FA2, FLEX = STYLES


def matching(report: dict[str, Any], pattern: str) -> dict[int, dict[str, Any]]:
    """Measurements whose id fits, by the number in it, ascending."""
    found = [(re.fullmatch(pattern, m["id"]), m) for m in report["measurements"]]
    return dict(sorted((int(match[1]), m) for match, m in found if match))


def speed(axes: Axes, rows: dict[int, dict[str, Any]]) -> None:
    """TFLOP/s against tokens."""
    lengths = list(rows)
    axes.plot(lengths, [m["value"] for m in rows.values()], label="bsfa", **OURS)
    for key, label, style in (
        ("cudnn_tflops", "cuDNN (torch SDPA)", CUDNN),
        ("fa2_tflops", "FlashAttention-2 (torch SDPA)", FA2),
    ):
        axes.plot(lengths, [m["peers"][key] for m in rows.values()], label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n}K" for n in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("dense, causal", fontsize=11)


def efficiency(axes: Axes, rows: dict[int, dict[str, Any]]) -> None:
    """Density x our dense time / sparse time against density; flex_attention by the same yardstick."""
    axes.plot([m["peers"]["density"] for m in rows.values()], [m["value"] for m in rows.values()], label="bsfa", **OURS)
    peers = [m["peers"] for m in rows.values() if "flex_ms" in m["peers"]]
    if peers:
        axes.plot(
            [p["density"] for p in peers],
            [p["density"] * p["dense_ms"] / p["flex_ms"] for p in peers],
            label="flex_attention (compiled)",
            **FLEX,
        )
    axes.set_xscale("log")
    axes.set_xticks([percent / 100 for percent in rows], [str(percent) for percent in rows])
    axes.xaxis.set_tick_params(which="minor", bottom=False, labelbottom=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    axes.set_xlabel("% of the 128 x 128 blocks kept (random)")
    axes.set_ylabel("efficiency: density x bsfa dense time / time")
    axes.set_title("block-sparse, 64K tokens", fontsize=11)


def draw(report: dict[str, Any]) -> Figure:
    """Both panels."""
    dense = matching(report, r"attn\.sweep\.dense\.(\d+)k\.tflops")
    sparse = matching(report, r"attn\.sweep\.density\.64k\.d(\d+)\.efficiency")
    if not dense or not sparse:
        raise SystemExit("the report has no measurements of the suite 'attention'")
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel, rows in zip(figure.subplots(1, 2), (speed, efficiency), (dense, sparse), strict=True):
        panel(axes, rows)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=9, frameon=False)
    clocks = [m["clock_mhz"] for m in (*dense.values(), *sparse.values()) if m["clock_mhz"]]
    clock = f", SM clock {min(clocks)} to {max(clocks)} MHz" if clocks else ""
    device = report["device"]
    figure.supxlabel(
        f"{device['name']}, torch {device['torch']}{clock}; bfloat16, 32 query and 8 KV heads, head_dim 128",
        fontsize=8.5,
        color="#444444",
    )
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "results" / "h200.json")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "attention_h200.png")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(json.loads(arguments.report.read_text()))
    drawn.savefig(arguments.output, dpi=150, metadata={"Software": None})
    print(f"wrote {arguments.output}")
