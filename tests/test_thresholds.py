"""Threshold files: what is stored comes back, and everything else is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import bsfa
from bsfa.errors import ThresholdMismatchError
from bsfa.identity import ModelIdentity, canonical_json, config_fields, weight_fingerprint
from bsfa.policies import Antidiagonal, CumulativeMass, RelativeMax, ScoredPolicy
from bsfa.thresholds import METADATA_KEY, ThresholdTable, _checksum
from tiny_model import make_model

POLICIES: list[ScoredPolicy] = [
    RelativeMax(block_m=64, block_n=32, sink_blocks=1, last_tiles=3),
    CumulativeMass(min_blocks=2, window_blocks=5),
    CumulativeMass(
        pooling="flat64",
        original_scale=True,
        probability=0.01,
        keep_ratio=0.25,
        rescue_stride=9,
        rescue_probability=0.125,
        rescue_seed=4,
        shared=True,
    ),
    Antidiagonal(stride=32, block_n=64),
]


def make_table(policy: ScoredPolicy = POLICIES[0], model: Any = None) -> ThresholdTable:
    rng = torch.Generator().manual_seed(1)
    shape = (2, 4)
    values = {
        name: torch.rand(shape, generator=rng)
        for name in ("recall", "recall_spread", "recall_worst", "tail_recall", "density")
    }
    thresholds = torch.rand(shape, generator=rng) * 0.8 + 0.1
    thresholds[1, 2] = policy.keep_all_threshold()
    return ThresholdTable(
        policy=policy,
        thresholds=thresholds,
        layers=("calibrated", "calibrated"),
        lengths=(1024, 4096),
        length_prompts=(3, 2),
        length_recall=torch.rand((2, *shape), generator=rng),
        length_density=torch.rand((2, *shape), generator=rng),
        model=ModelIdentity("made up") if model is None else ModelIdentity.of(model),
        attention={"softmax_scale": [0.25, 0.25], "softcap": [0.0, 0.0], "dtype": "float32"},
        calibration={"target_recall": 0.95, "tail": 0.1, "method": "made up"},
        **values,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.safetensors"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_roundtrip(policy: ScoredPolicy, path: Path) -> None:
    table = make_table(policy)
    table.save(path)
    back = ThresholdTable.load(path)
    assert back.metadata() == table.metadata() and back.source == str(path)
    for name, t in table._tensors().items():
        assert torch.equal(getattr(back, name), t), name
    assert type(back.policy) is type(policy) and "made up" in repr(back)
    back.save(path.with_name("again"))
    assert path.read_bytes() == path.with_name("again").read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["again", path.name]


def test_layers(path: Path) -> None:
    table = make_table()
    policy = table.layer(1)
    assert isinstance(policy, RelativeMax) and isinstance(policy.alpha, torch.Tensor)
    assert policy.alpha.tolist() == table.thresholds[1].tolist() and policy.last_tiles == 3
    assert policy is table.layer(1) and policy is table.layer(1, "cpu")
    assert policy.thresholds_for(4, torch.device("cpu"))[2] == -1.0
    assert table.dense_heads().tolist() == [[False] * 4, [False, False, True, False]]
    for index in (-1, 2):
        with pytest.raises(IndexError, match=r"layers 0 \.\. 1"):
            table.layer(index)
    dense = replace(table, thresholds=torch.stack([torch.zeros(4), table.thresholds[1]]))
    assert dense.layer(0) is None and dense.layer(1) is not None
    q, k = torch.randn(1, 200, 4, 16), torch.randn(1, 200, 2, 16)
    assert bsfa.attention(q, k, k, policy=policy).shape == q.shape  # type: ignore[union-attr]


def test_save_is_atomic(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_table().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        make_table(POLICIES[1]).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ThresholdTable.load(path)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt") as f:
        return json.loads(f.metadata()[METADATA_KEY]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, torch.Tensor], sign: bool = True) -> None:
    """A file with a right checksum, so that the content itself is what gets refused."""
    metadata = {k: v for k, v in metadata.items() if k != "sha256"}
    if sign:
        metadata["sha256"] = _checksum(metadata, tensors)
    save_file(tensors, str(path), {METADATA_KEY: canonical_json(metadata)})


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def put(*keys: str, value: Any) -> Edit:
    def edit(metadata: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        for key in keys[:-1]:
            metadata = metadata[key]
        metadata[keys[-1]] = value

    return edit


def drop(*keys: str) -> Edit:
    def edit(metadata: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        for key in keys[:-1]:
            metadata = metadata[key]
        del metadata[keys[-1]]

    return edit


def tensor(name: str, value: torch.Tensor | None) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return edit


NAN = torch.full((2, 4), 0.5)
NAN[0, 1] = torch.nan
CONTENT: dict[str, tuple[Edit, str]] = {
    "format": (put("format", value="other"), "not a bsfa threshold file"),
    "newer version": (put("format_version", value=2), "format version 2 is newer.*update bsfa"),
    "version 0": (put("format_version", value=0), "does not exist"),
    "version type": (put("format_version", value="1"), "wrong type"),
    "no policy": (drop("policy"), "'policy' is missing"),
    "unknown policy": (put("policy", "name", value="magic"), "unknown policy 'magic'.*relative-max"),
    "policy version": (put("policy", "version", value=7), "version 7 in the file.*calibrate again"),
    "missing parameter": (drop("policy", "parameters", "sink_blocks"), "parameters: sink_blocks"),
    "unknown parameter": (put("policy", "parameters", "top_k", value=3), "parameters: top_k"),
    "bad parameter": (put("policy", "parameters", "block_m", value=0), "block_m must be 1"),
    "parameter type": (put("policy", "parameters", "last_tiles", value="2"), "last_tiles must be an int"),
    "no model": (drop("model"), "'model' is missing"),
    "model fields": (put("model", "fields", value={"hidden_size": 1}), "checksum"),
    "no target": (drop("calibration", "target_recall"), "'target_recall' is missing"),
    "layers": (put("layers", value=["calibrated"]), "1 layers are described"),
    "layer kind": (put("layers", value=["calibrated", "sparse"]), "layer 1 is 'sparse'"),
    "dense layer": (put("layers", value=["calibrated", "dense: because"]), "layer 1 is dense but has thresholds"),
    "lengths": (put("lengths", value=[1024]), "shape"),
    "no thresholds": (tensor("thresholds", None), "tensors are missing: thresholds"),
    "no density": (tensor("density", None), "tensors are missing: density"),
    "extra tensor": (tensor("weights", torch.zeros(2)), "unknown tensors: weights"),
    "shape": (tensor("recall", torch.rand(2, 3)), r"recall must have shape \(2, 4\)"),
    "rank": (tensor("thresholds", torch.rand(8)), r"thresholds must be \[layers, heads\]"),
    "dtype": (tensor("thresholds", torch.rand(2, 4).double()), "thresholds must be float32"),
    "nan": (tensor("thresholds", NAN), "thresholds holds NaN"),
    "range": (tensor("thresholds", torch.full((2, 4), 1.5)), "thresholds must be 0 .. 1"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_unsound_content_is_refused(case: str, path: Path) -> None:
    make_table().save(path)
    metadata, tensors = read(path)
    edit, message = CONTENT[case]
    edit(metadata, tensors)
    write(path, metadata, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        ThresholdTable.load(path)
    if case != "policy version":
        assert str(path) in str(caught.value)


def damage_middle(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a sound safetensors file"),
    "text": (lambda data: b"alpha: 0.1\n" * 9, "not a sound safetensors file"),
    "truncated header": (lambda data: data[:100], "not a sound safetensors file"),
    "truncated data": (lambda data: data[:-8], "not a sound safetensors file"),
    "trailing bytes": (lambda data: data + b"more", "not a sound safetensors file"),
    "flipped bit": (damage_middle, "checksum"),
    "edited seed": (lambda data: data.replace(b"made up", b"made UP", 1), "checksum"),
}


@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes_are_refused(case: str, path: Path) -> None:
    make_table().save(path)
    change, message = BYTES[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        ThresholdTable.load(path)
    assert str(path) in str(caught.value)


def test_other_safetensors_are_refused(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match="not a bsfa threshold file"):
        ThresholdTable.load(path)
    write(path, make_table().metadata(), make_table()._tensors(), sign=False)
    with pytest.raises(ValueError, match="'sha256' is missing"):
        ThresholdTable.load(path)


def test_other_block_sizes_are_refused(path: Path) -> None:
    make_table().save(path)
    ThresholdTable.load(path, block_m=64, block_n=32)
    with pytest.raises(ThresholdMismatchError, match=r"block_m is 64 in the file but 128.*block_n is 32.* but 128"):
        ThresholdTable.load(path, block_m=128, block_n=128)


def test_policy_parameters_must_be_storable(path: Path) -> None:
    table = make_table()
    object.__setattr__(table.policy, "sink_blocks", torch.ones(1))
    try:
        with pytest.raises(TypeError, match="sink_blocks is a Tensor"):
            table.save(path)
    finally:
        object.__setattr__(table.policy, "sink_blocks", 1)


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 1}, "num_hidden_layers is 2 in the file but 1 in the model"),
    "heads": ({"num_attention_heads": 8}, "num_attention_heads is 4 in the file but 8"),
    "kv heads": ({"num_key_value_heads": 4}, "num_key_value_heads is 2 in the file but 4"),
    "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope is .*500000"),
    "two": ({"head_dim": 32, "vocab_size": 256}, "head_dim is 16 .*; vocab_size is 320 in the file but 256"),
    "weights": ({"seed": 1}, "weights differ"),
}


@pytest.mark.parametrize("case", MODELS)
def test_another_model_is_refused(case: str) -> None:
    table = make_table(model=make_model())
    table.check_model(make_model())
    changes, message = MODELS[case]
    with pytest.raises(ThresholdMismatchError, match=message):
        table.check_model(make_model(**changes))


def test_fingerprint_and_dtype() -> None:
    model = make_model()
    table = make_table(model=model)
    table.check_model(make_model().to(torch.bfloat16))
    table.check_model(make_model().to(torch.float16))  # rounding differs: compared by config alone
    table.check_config(model.config)
    tuned = make_model()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    assert weight_fingerprint(model) != weight_fingerprint(tuned)
    with pytest.raises(ThresholdMismatchError, match="weights differ"):
        table.check_model(tuned)
    assert weight_fingerprint(torch.nn.Linear(4, 4, device="meta")) is None
    old_style = type("Config", (), {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4})()
    fields = config_fields(old_style)
    assert fields["head_dim"] == 16 and fields["num_key_value_heads"] == 4
    assert fields["rope"] == {"rope_theta": 1e4, "rope_type": "default"}
