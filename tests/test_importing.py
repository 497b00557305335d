"""Files of the original BSFA: what is carried over, what is said not to be, and what is refused."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import bsfa
from bsfa.cli import app
from bsfa.errors import ThresholdMismatchError
from bsfa.policies import ExactSkip
from tiny_model import make_mixed_model, make_model

BLOCKS = 20


def make_data(layers: int = 2, heads: int = 4, q_block: int = 128) -> dict[str, Any]:
    """As its calibration saves it: k of 4 and 8; 12 query blocks seen, then copies of the last."""
    rng = torch.Generator().manual_seed(6)
    t = torch.randn(2, layers, heads, BLOCKS, generator=rng) * 2 + 5
    for i, k in enumerate((4, 8)):
        t[i, :, :, : k // 2 + 1] = -torch.inf
    t[..., 12:] = t[..., 11:12]
    return {
        "thresholds": t,
        "k_values": [4, 8],
        "max_num_blocks": BLOCKS,
        "num_layers": layers,
        "num_heads": heads,
        "q_block_size": q_block,
        "k_block_size": 64,
        "aggregation_method": "mean",
        "shape_description": "[num_k, num_layers, num_heads, max_q_blocks]",
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "llama.inference.pt"
    torch.save(make_data(), path)
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    return path


@pytest.mark.parametrize("k", [4, 8])
def test_every_tile_has_the_files_threshold(k: int, path: Path, model_dir: Path, tmp_path: Path) -> None:
    table = bsfa.import_bsfa(path, k, model_dir)
    values = make_data()["thresholds"][k // 8]
    for layer in range(2):
        policy = table.layer(layer)
        assert isinstance(policy, ExactSkip) and policy.form == "absolute" and policy.sink_blocks == 1
        cuts = policy.cuts(4, BLOCKS + 10, torch.device("cpu"))
        cuts = torch.where(cuts.isnan(), -torch.inf, cuts)  # between two -inf; attention skips nothing for either
        assert torch.equal(cuts[:, :BLOCKS], values[layer])
        assert torch.equal(cuts[:, BLOCKS:], values[layer, :, -1:].expand(-1, 10))
    assert table.positions[:2] == (0, k // 2 * 128) and table.positions[-1] == 11 * 128  # no knot that says nothing new
    assert not table.measured and table.target_recall is None and table.calibration["k"] == k
    table.check_model(make_model())
    with pytest.raises(ThresholdMismatchError, match="vocab_size"):
        table.check_model(make_model(vocab_size=256))
    table.save(tmp_path / "t.safetensors")
    back = bsfa.ThresholdTable.load(tmp_path / "t.safetensors")
    assert back.metadata() == table.metadata() and torch.equal(back.reference, table.reference)  # type: ignore[arg-type]
    assert table.calibration["original"]["k_values"] == [4, 8] and len(table.calibration["file_sha256"]) == 64


def test_it_skips(path: Path, model_dir: Path) -> None:
    policy = bsfa.import_bsfa(path, 4, model_dir).layer(0)
    q, k = torch.randn(1, 1200, 4, 16), torch.randn(1, 1200, 2, 16)
    _, info = bsfa.attention(q, k, k, policy=policy, return_info=True)  # type: ignore[misc]
    assert info.skips is not None and 0 < int(info.skips[:, 1].sum()) < int(info.skips[:, 0].sum())


def test_what_cannot_be_mapped_is_said(path: Path, model_dir: Path, tmp_path: Path) -> None:
    text = " ".join(bsfa.import_bsfa(path, 4, model_dir).calibration["not_mapped"])
    for word in ("128 x 64", "sinks", "diagonal", "weights are not checked", "copies the last", "recall and density"):
        assert word in text
    without = bsfa.import_bsfa(path, 4, model_dir, sink_blocks=0)
    assert "sinks" not in " ".join(without.calibration["not_mapped"]) and without.policy.sink_blocks == 0
    torch.save(make_data(q_block=64), path)
    table = bsfa.import_bsfa(path, 4, model_dir)
    assert "interpolated" in " ".join(table.calibration["not_mapped"]) and table.positions[-1] == 11 * 64


def test_heads_and_layers_without_thresholds_are_dense(path: Path, tmp_path: Path) -> None:
    data = make_data()
    data["thresholds"][:, 0] = data["thresholds"][:, 1, 2] = -torch.inf
    torch.save(data, path)
    table = bsfa.import_bsfa(path, 4, make_model().config)
    assert table.layer(0) is None and table.dense_heads()[1].tolist() == [False, False, True, False]
    torch.save(make_data(), path)
    mixed = bsfa.import_bsfa(path, 4, make_mixed_model())
    assert mixed.layers == ("dense: sliding attention", "calibrated") and mixed.layer(0) is None
    assert mixed.model.weights is not None


class Evil:
    """Runs a command when it is unpickled by anything less careful."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


Change = Callable[[dict[str, Any]], Any]


def put(name: str, value: Any) -> Change:
    return lambda data: {**data, name: value}


def with_value(value: float) -> Change:
    def change(data: dict[str, Any]) -> Any:
        data["thresholds"][0, 1, 2, 3] = value
        return data

    return change


BAD: dict[str, tuple[Change, str]] = {
    "list": (lambda data: [data], "holds a list"),
    "no thresholds": (lambda data: {k: v for k, v in data.items() if k != "thresholds"}, "thresholds missing"),
    "no sizes": (lambda data: {k: v for k, v in data.items() if k != "q_block_size"}, "q_block_size missing"),
    "other k": (put("k_values", [3, 8]), "no thresholds for k = 4; it has k = 3, 8"),
    "k text": (put("k_values", "48"), "k_values must be a list"),
    "k twice": (put("k_values", [4, 4]), "list of different ints"),
    "k count": (put("k_values", [4]), r"thresholds must have shape \(1, 2, 4, 20\)"),
    "rank": (lambda data: {**data, "thresholds": data["thresholds"][0]}, "must have shape"),
    "heads": (put("num_heads", 8), "must have shape"),
    "blocks": (put("max_num_blocks", 19), "must have shape"),
    "size type": (put("q_block_size", 128.0), "q_block_size must be a positive int"),
    "size sign": (put("q_block_size", -128), "q_block_size must be a positive int"),
    "size bool": (put("num_layers", True), "num_layers must be a positive int"),
    "dtype": (lambda data: {**data, "thresholds": data["thresholds"].double()}, "must be a float32 tensor"),
    "no tensor": (put("thresholds", [[1.0]]), "must be a float32 tensor"),
    "sparse": (lambda data: {**data, "thresholds": data["thresholds"].to_sparse()}, "float32 tensor|run code"),
    "one number": (lambda data: {**data, "thresholds": torch.ones(1).expand(2, 2, 4, 20)}, "must have shape"),
    "nan": (with_value(torch.nan), "hold NaN"),
    "inf": (with_value(torch.inf), "hold NaN or infinity"),
    "method": (put("aggregation_method", 3), "aggregation_method must be text"),
}


@pytest.mark.parametrize("case", BAD)
def test_unsound_files_are_refused(case: str, path: Path, model_dir: Path) -> None:
    change, message = BAD[case]
    torch.save(change(make_data()), path)
    with pytest.raises(ValueError, match=message) as caught:
        bsfa.import_bsfa(path, 4, model_dir)
    assert str(path) in str(caught.value)


def test_code_in_a_file_does_not_run(path: Path, model_dir: Path, tmp_path: Path) -> None:
    torch.save({**make_data(), "shape_description": Evil(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="could run code"):
        bsfa.import_bsfa(path, 4, model_dir)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(path: Path, model_dir: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    for name, content in (("empty", b""), ("text", b"thresholds: 3\n" * 40), ("cut", data[: len(data) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"not a file of torch\.save"):
            bsfa.import_bsfa(tmp_path / name, 4, model_dir)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.namelist():
            packed.writestr(entry, stored.read(entry))
    with pytest.raises(ValueError, match="compressed"):
        bsfa.import_bsfa(tmp_path / "z", 4, model_dir)
    with zipfile.ZipFile(tmp_path / "other", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match="not a sound file"):
        bsfa.import_bsfa(tmp_path / "other", 4, model_dir)
    with pytest.raises(FileNotFoundError):
        bsfa.import_bsfa(tmp_path / "nowhere", 4, model_dir)
    make_bytes = bytearray(data)
    make_bytes[len(data) // 2] ^= 0xFF  # in the tensor: the archive's own checksum, or the values' checks, refuse it
    (tmp_path / "flipped").write_bytes(bytes(make_bytes))
    with pytest.raises(ValueError, match="flipped"):
        bsfa.import_bsfa(tmp_path / "flipped", 99, model_dir)


def test_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ThresholdMismatchError, match="num_hidden_layers is 2 in the file but 3"):
        bsfa.import_bsfa(path, 4, make_model(num_hidden_layers=3))
    with pytest.raises(ThresholdMismatchError, match="num_attention_heads is 4 in the file but 8"):
        bsfa.import_bsfa(path, 4, make_model(num_attention_heads=8).config)
    with pytest.raises(ValueError, match=r"no config.json"):
        bsfa.import_bsfa(path, 4, tmp_path)
    with pytest.raises(TypeError, match="model must be"):
        bsfa.import_bsfa(path, 4, 7)
    with pytest.raises(TypeError, match="k must be an int"):
        bsfa.import_bsfa(path, "4", make_model())  # type: ignore[arg-type]


def test_command_line(path: Path, model_dir: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    out = tmp_path / "out.safetensors"
    result = run("import-bsfa", path, "--k", 8, "--model", model_dir, "-o", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output and "not carried over: tiles" in result.output
    result = run("inspect", out, "--plot", tmp_path / "heat.png")
    assert result.exit_code == 0, result.output
    for text in ("BSFA's k", "not measured", "not carried over", "1408", "format 2"):
        assert text in result.output
    assert "nan" not in result.output and (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    result = run("import-bsfa", path, "--k", 5, "--model", model_dir, "-o", out)
    assert result.exit_code == 2 and "it has k = 4, 8" in result.output
    result = run("import-bsfa", path, "--k", 4, "--model", model_dir, "-o", tmp_path / "no" / "t")
    assert result.exit_code == 2 and "is not a directory" in result.output
