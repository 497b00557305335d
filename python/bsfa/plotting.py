"""Pictures of threshold tables and block masks. They need matplotlib (``pip install "bsfa[plot]"``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bsfa.block_mask import BlockMask
from bsfa.files import replacing
from bsfa.prompts import length_name
from bsfa.thresholds import CALIBRATED, ThresholdTable


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "bsfa[plot]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Any, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None} if temporary.suffix == ".png" else None)


def plot_thresholds(table: ThresholdTable, path: str | Path) -> None:
    """Write threshold, density and recall of every layer and head as one image (format by suffix, e.g. ``.png``).

    A fourth panel shows density against prompt length: the mean over the heads of calibrated layers, and how the heads
    spread (between the 10th and 90th percentile, and lowest to highest). Dense heads are left blank in the threshold
    map. Raises ``ImportError`` naming matplotlib if it is not installed,
    ``ValueError`` for a suffix that it cannot write.
    """
    policy = table.policy
    if policy.keeps_at_least:
        name, values = f"log2 {policy.threshold_name}", table.thresholds.log2()
    else:
        name, values = f"log2 (1 - {policy.threshold_name})", (1.0 - table.thresholds).log2()
    if table.reference is not None:
        name = f"nats at position {table.positions[table.longest_knot]}"
        values = table.thresholds.log() + table.reference[..., table.longest_knot]
    values = values.masked_fill(table.dense_heads() | values.isinf(), torch.nan)
    density, recall = (
        f"mean {float(t.mean()):.4f}" if table.measured else "not measured" for t in (table.density, table.recall)
    )
    panels = (
        (f"threshold: {name} (blank: dense)", values, None, None),
        (f"density, {density}", table.density, 0.0, 1.0),
        (f"recall, {recall}", table.recall, None, 1.0),
    )
    height = min(max(2.5, 0.22 * table.num_layers + 1.6), 14.0)
    width = min(max(4.0, 0.22 * table.num_heads + 1.8), 10.0)
    figure = _figure(2 * width, 2 * height)
    *maps, last = figure.subplots(2, 2).flatten()
    for axes, (title, data, low, high) in zip(maps, panels, strict=True):
        image = axes.imshow(data.numpy(), aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes)
    _draw_lengths(last, table)
    figure.suptitle(f"{policy.name}, {table.goal}, {table.model.name}", fontsize=11)
    _write(figure, path)


def _draw_lengths(axes: Any, table: ThresholdTable) -> None:
    """Density against prompt length: mean, middle 80 % and range of the heads."""
    axes.set_title("density against length (band: 80 % of heads)", fontsize=10)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("density")
    axes.set_ylim(0.0, 1.02)
    heads = table.length_density[:, [kind == CALIBRATED for kind in table.layers]].flatten(1)
    if heads.numel() == 0:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    mean, low, high = heads.mean(1), heads.amin(1), heads.amax(1)
    middle = [heads.quantile(q, dim=1).numpy() for q in (0.1, 0.9)]
    x = list(table.lengths)
    axes.set_xscale("log", base=2)
    axes.fill_between(x, *middle, color="C0", alpha=0.3, linewidth=0)
    whiskers = [(mean - low).clamp(min=0.0).numpy(), (high - mean).clamp(min=0.0).numpy()]
    axes.errorbar(x, mean.numpy(), whiskers, color="C0", fmt="o-", capsize=3, elinewidth=0.8)
    axes.set_xticks(x, [length_name(n) for n in x])
    axes.minorticks_off()


def plot_mask(mask: BlockMask, *, head: int = 0, sequence: int = 0, path: str | Path) -> None:
    """Write the blocks that one head of one sequence keeps as an image, query tiles x KV blocks (format by suffix).

    head: of the mask: query head, KV head or 0. Kept blocks are filled; the line is the edge of what a tile may see.
    Copies the mask to the CPU. Raises ``IndexError`` for a head or sequence that is not there, ``ImportError`` naming
    matplotlib if it is not installed, ``ValueError`` for a suffix that it cannot write.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a bsfa.BlockMask, got {type(mask).__name__}")
    sequences = mask.geometry.batch
    for name, value, count in (("head", head, mask.num_heads), ("sequence", sequence, sequences)):
        if not 0 <= value < count:
            raise IndexError(f"{name} {value} is not there: the mask has {count}")
    mask = mask.to("cpu")
    g = mask.geometry
    begin, end = (int(x) for x in g.cu_tiles()[sequence : sequence + 2])
    visible = g.visible_blocks()[begin:end]
    blocks = -(-int(g.seqlens_k[sequence]) // g.block_n)
    kept = mask.to_rows()[begin:end, head, :blocks] & (torch.arange(blocks) < visible[:, None])
    density = int(kept.sum()) / max(int(visible.sum()), 1)

    figure = _figure(6.4, 6.4 * min(max(len(visible) * g.block_m / max(blocks * g.block_n, 1), 0.2), 1.5) + 0.8)
    axes = figure.subplots()
    first = int(g.first_tiles()[sequence])
    if kept.numel():
        # Axes count absolute blocks and tiles: chunks of a prompt make one picture side by side.
        extent = (-0.5, blocks - 0.5, first + len(visible) - 0.5, first - 0.5)
        axes.imshow(
            kept.numpy(), extent=extent, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.3, interpolation="nearest"
        )
        edge = [(float(v) - 0.5, first + t - 0.5 + side) for t, v in enumerate(visible) for side in (0, 1)]
        axes.plot(*zip(*edge, strict=True), color="0.3", linewidth=0.8)
        axes.set_xlim(-0.5, blocks - 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"KV block of {g.block_n} tokens")
    axes.set_ylabel(f"query tile of {g.block_m} tokens")
    axes.set_title(f"head {head}, sequence {sequence}: density {density:.3f}", fontsize=10)
    _write(figure, path)
