"""Heat maps of a threshold table, layers x heads. Needs matplotlib (``pip install "bsfa[plot]"``)."""

from __future__ import annotations

from pathlib import Path

import torch

from bsfa.files import replacing
from bsfa.thresholds import ThresholdTable


def plot_thresholds(table: ThresholdTable, path: str | Path) -> None:
    """Write threshold, density and recall of every layer and head as one image (format by suffix, e.g. ``.png``).

    Dense heads are left blank in the threshold map. Raises ``ImportError`` naming matplotlib if it is not installed,
    ``ValueError`` for a suffix that it cannot write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "bsfa[plot]"') from error

    policy = table.policy
    if policy.keeps_at_least:
        name, values = f"log2 {policy.threshold_name}", table.thresholds.log2()
    else:
        name, values = f"log2 (1 - {policy.threshold_name})", (1.0 - table.thresholds).log2()
    values = values.masked_fill(table.dense_heads(), torch.nan)
    panels = (
        (f"threshold: {name} (blank: dense)", values, None, None),
        (f"density, mean {float(table.density.mean()):.3f}", table.density, 0.0, 1.0),
        (f"recall, mean {float(table.recall.mean()):.4f}", table.recall, None, 1.0),
    )
    height = min(max(2.5, 0.22 * table.num_layers + 1.6), 14.0)
    width = min(max(4.0, 0.22 * table.num_heads + 1.8), 10.0)
    figure = Figure(figsize=(3 * width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, data, low, high) in zip(figure.subplots(1, 3), panels, strict=True):
        image = axes.imshow(data.numpy(), aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{policy.name}, target recall {table.target_recall}, {table.model.name}", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None} if temporary.suffix == ".png" else None)
