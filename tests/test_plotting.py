"""Pictures of masks and thresholds: written whole, of what they show, and refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bsfa
from bsfa import plotting
from cases import PACKED, Case

SIZES = {"block_m": 32, "block_n": 16}


def mask_of(case: Case) -> tuple[bsfa.BlockMask, list[np.ndarray]]:
    inputs = case.make()
    masks = [inputs.draw_mask(b) for b in range(len(inputs))]
    return inputs.block_mask(masks), masks


def test_it_draws_the_kept_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sequence starts at position 113, in tile 3; its tiles see up to 10 blocks."""
    mask, masks = mask_of(Case(lengths=((65, 65), (37, 150)), hq=4, hkv=2, layout=PACKED, mask="random", **SIZES))
    figures: list[Any] = []
    write = plotting._write
    monkeypatch.setattr(plotting, "_write", lambda figure, path: (figures.append(figure), write(figure, path)))
    for name in ("a.png", "b.svg", "c.pdf"):
        bsfa.plot_mask(mask, head=2, sequence=1, path=tmp_path / name)
    axes = figures[0].axes[0]
    image = axes.images[0]
    want = masks[1][:, 2]
    assert np.array_equal(np.asarray(image.get_array()).astype(bool), want) and want.shape == (2, 10)
    assert list(image.get_extent()) == [-0.5, 9.5, 4.5, 2.5]
    line = axes.lines[0].get_xydata().tolist()  # tile 3 (to position 127) sees 8 blocks, tile 4 all 10
    assert line == [[7.5, 2.5], [7.5, 3.5], [9.5, 3.5], [9.5, 4.5]]
    assert f"head 2, sequence 1: density {want.sum() / 18:.3f}" == axes.get_title()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.svg", "c.pdf"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    bsfa.plot_mask(mask, head=2, sequence=1, path=tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("lengths", [((1, 1),), ((0, 40),), ((70, 0),), ((0, 0),), ((100, 37),), ((20, 4000),)])
def test_any_lengths(lengths: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    for causal in (True, False):
        mask, _ = mask_of(Case(lengths=lengths, mask="random", mask_heads="one", causal=causal, **SIZES))
        bsfa.plot_mask(mask, path=tmp_path / "mask.png")
        assert (tmp_path / "mask.png").stat().st_size > 1000


def table_of(lengths: tuple[int, ...], layers: tuple[str, ...] = ("calibrated", "dense: none", "calibrated")) -> Any:
    """A table of made-up numbers, by length and head."""
    shape = (len(layers), 4)
    sparse = torch.tensor([kind == "calibrated" for kind in layers])
    heads = torch.rand(len(lengths), *shape).masked_fill(~sparse[:, None], 1.0)
    rest = {name: torch.rand(shape) for name in ("recall", "recall_spread", "recall_worst", "tail_recall", "density")}
    return bsfa.ThresholdTable(
        policy=bsfa.policies.RelativeMax(),
        thresholds=torch.where(sparse[:, None], 2.0 ** -torch.arange(1.0, 5.0), 0.0),
        layers=layers,
        lengths=lengths,
        length_prompts=(3,) * len(lengths),
        length_recall=heads,
        length_density=heads,
        model=bsfa.identity.ModelIdentity("made up"),
        attention={},
        calibration={"target_recall": 0.9, "tail": 0.1},
        **rest,
    )


@pytest.mark.parametrize("lengths", [(8192,), (1024, 4096, 16384)])
def test_thresholds_and_density_against_length(
    lengths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three maps of layers x heads, and how density goes with length: mean, spread and range of calibrated heads."""
    table = table_of(lengths)
    figures: list[Any] = []
    write = plotting._write
    monkeypatch.setattr(plotting, "_write", lambda figure, path: (figures.append(figure), write(figure, path)))
    plotting.plot_thresholds(table, tmp_path / "a.png")
    plotting.plot_thresholds(table, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (last,) = (axes for axes in figures[0].axes if axes.get_xlabel() == "prompt length, tokens")
    maps = [axes.images[0].get_array() for axes in figures[0].axes if axes.get_xlabel() == "query head"]
    assert len(maps) == 3
    assert maps[0][0].tolist() == [-1.0, -2.0, -3.0, -4.0] and bool(maps[0].mask[1].all())
    assert np.array_equal(maps[1], table.density.numpy()) and np.array_equal(maps[2], table.recall.numpy())
    heads = table.length_density[:, [0, 2]].flatten(1).numpy()
    (container,) = last.containers
    points = container.lines[0].get_xydata()
    assert points[:, 0].tolist() == list(lengths)
    np.testing.assert_allclose(points[:, 1], heads.mean(1), rtol=1e-6)
    ends = np.array([segment[:, 1] for segment in container.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, np.stack([heads.min(1), heads.max(1)], 1), rtol=1e-5)
    labels = {8192: "8K", 1024: "1K", 4096: "4K", 16384: "16K"}
    assert [t.get_text() for t in last.get_xticklabels()] == [labels[n] for n in lengths]


def test_nothing_calibrated(tmp_path: Path) -> None:
    plotting.plot_thresholds(table_of((1024,), ("dense: none", "dense: none")), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, _ = mask_of(Case(lengths=((65, 65),), hq=4, hkv=2, mask="random", **SIZES))
    path = tmp_path / "x.png"
    for wrong in ({"head": 4}, {"head": -1}, {"sequence": 1}):
        with pytest.raises(IndexError, match="is not there"):
            bsfa.plot_mask(mask, path=path, **wrong)
    with pytest.raises(TypeError, match="BlockMask"):
        bsfa.plot_mask(torch.ones(3), path=path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nope"):
        bsfa.plot_mask(mask, path=tmp_path / "x.nope")
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"bsfa\[plot\]"):
        bsfa.plot_mask(mask, path=path)
    assert not list(tmp_path.iterdir())
