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
from bsfa.policies import Antidiagonal, CumulativeMass, ExactSkip, RelativeMax, ThresholdPolicy
from bsfa.thresholds import METADATA_KEY, ThresholdTable, _checksum
from tiny_model import make_model

POLICIES: list[ThresholdPolicy] = [
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
    ExactSkip(form="absolute", counted=True, sink_blocks=2),
    ExactSkip(form="relative", window_blocks=3, passes=2, bounds=True),
]
POSITIONS = (0, 128, 1000)


def make_reference(form: str) -> torch.Tensor:
    reference = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2))
    if form == "absolute":
        reference[:, :, 0] = -torch.inf
    return reference if form == "absolute" else -reference.abs()


def make_table(policy: ThresholdPolicy = POLICIES[0], model: Any = None, plain: bool = False) -> ThresholdTable:
    """A table with a reference for every layer if the policy is ExactSkip, unless ``plain``."""
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
        reference=make_reference(policy.form) if isinstance(policy, ExactSkip) and not plain else None,
        positions=POSITIONS if isinstance(policy, ExactSkip) and not plain else (),
        **values,
    )


def not_measured(table: ThresholdTable) -> ThresholdTable:
    names = ("recall", "recall_spread", "recall_worst", "tail_recall", "density")
    nothing = dict.fromkeys(names, torch.full((2, 4), torch.nan))
    empty = dict.fromkeys(("length_recall", "length_density"), torch.zeros(0, 2, 4))
    return replace(
        table, **nothing, **empty, lengths=(), length_prompts=(), calibration={"method": "by hand", "goal": "k = 3"}
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.safetensors"


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_roundtrip(policy: ThresholdPolicy, plain: bool, path: Path) -> None:
    table = make_table(policy, plain=plain)
    table.save(path)
    assert table.metadata()["format_version"] == (2 if isinstance(policy, ExactSkip) else 1)
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


def test_exact_skip_layers() -> None:
    table = make_table(POLICIES[-2])
    policy = table.layer(1)
    assert isinstance(policy, ExactSkip) and isinstance(policy.ratio, torch.Tensor) and policy.reference is not None
    assert policy.form == "absolute" and policy.counted and policy.sink_blocks == 2 and policy.positions == POSITIONS
    assert table.reference is not None and torch.equal(policy.reference, table.reference[1])
    cuts = policy.cuts(4, 10, torch.device("cpu"))
    assert bool((cuts[2] == -torch.inf).all())  # a dense head
    torch.testing.assert_close(cuts[0, 1], policy.ratio[0].log() + policy.reference[0, 1])
    plain = make_table(POLICIES[-1], plain=True).layer(0)
    assert isinstance(plain, ExactSkip) and plain.reference is None and plain.positions == ()


def test_a_table_that_was_not_measured(path: Path) -> None:
    for policy in (POLICIES[0], POLICIES[-2]):
        table = not_measured(make_table(policy))
        assert not table.measured and table.target_recall is None and "not measured" in repr(table)
        assert table.goal == "k = 3" and make_table().goal == "target recall 0.95"
        table.save(path)
        metadata, tensors = read(path)
        assert metadata["format_version"] == 2 and metadata["measured"] is False
        assert set(tensors) == {"thresholds"} | ({"reference"} if isinstance(policy, ExactSkip) else set())
        back = ThresholdTable.load(path)
        assert not back.measured and bool(back.density.isnan().all()) and back.length_recall.shape == (0, 2, 4)
        assert back.metadata() == table.metadata()
    with pytest.raises(ValueError, match=r"recall is not measured \(NaN\), but density is"):
        replace(table, density=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="recall holds NaN"):
        replace(table, recall=NAN)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "within": ({"policy": ExactSkip(within=RelativeMax())}, "cannot hold ExactSkip.within"),
    "own reference": ({"policy": ExactSkip.absolute(1.0)}, "its policy none"),
    "other policy": ({"policy": RelativeMax()}, "belong to exact-skip, not to relative-max"),
    "no reference": ({"reference": None}, "positions belong to a reference"),
    "shape": ({"reference": torch.zeros(2, 4, 2)}, r"reference must have shape \(2, 4, 3\)"),
    "dtype": ({"reference": torch.zeros(2, 4, 3).double()}, "reference must be float32"),
    "nan": ({"reference": torch.full((2, 4, 3), torch.nan)}, "reference holds NaN"),
    "inf": ({"reference": torch.full((2, 4, 3), torch.inf)}, "reference holds NaN or infinity"),
    "falling": ({"positions": (0, 128, 128)}, "positions must rise"),
    "negative": ({"positions": (-1, 128, 256)}, "token positions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unsound_references_are_refused(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        replace(make_table(POLICIES[-2]), **changes)


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
    "newer version": (put("format_version", value=3), "format version 3 is newer.*update bsfa"),
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


KNOTS = ("policy", "parameters", "positions")
SKIP_CONTENT: dict[str, tuple[Edit, str]] = {
    "version 1": (put("format_version", value=1), "exact-skip' needs format version 2"),
    "within": (put("policy", "parameters", "within", value={"name": "relative-max"}), "within .* cannot come from"),
    "form": (put("policy", "parameters", "form", value="both"), "form must be one of absolute, relative"),
    "form type": (put("policy", "parameters", "form", value=3), "form must be one of"),
    "no counted": (drop("policy", "parameters", "counted"), "parameters: counted"),
    "counted": (put("policy", "parameters", "counted", value=1), "counted must be a bool"),
    "no positions": (drop(*KNOTS), "'positions' is missing"),
    "positions type": (put(*KNOTS, value="0, 1"), "'positions' has the wrong type"),
    "positions float": (put(*KNOTS, value=[0, 1.5, 2]), "token positions"),
    "positions fall": (put(*KNOTS, value=[0, 9, 5]), "positions must rise"),
    "positions count": (put(*KNOTS, value=[0, 9]), "reference must have shape"),
    "positions gone": (put(*KNOTS, value=[]), "unknown tensors: reference"),
    "no reference": (tensor("reference", None), "tensors are missing: reference"),
    "reference nan": (tensor("reference", torch.full((2, 4, 3), torch.nan)), "reference holds NaN"),
    "reference shape": (tensor("reference", torch.zeros(2, 3, 3)), "reference must have shape"),
    "reference rank": (tensor("reference", torch.zeros(2)), "reference must have shape"),
    "no measured": (drop("measured"), "'measured' is missing"),
    "measured type": (put("measured", value=1), "'measured' has the wrong type"),
    "not measured": (put("measured", value=False), "unknown tensors: density"),
    "all NaN": (tensor("recall", torch.full((2, 4), torch.nan)), "recall is not measured"),
    "tail type": (put("calibration", "tail", value="0.1"), "'tail' has the wrong type"),
}


@pytest.mark.parametrize("case", SKIP_CONTENT)
def test_unsound_exact_skip_content_is_refused(case: str, path: Path) -> None:
    make_table(POLICIES[-2]).save(path)
    metadata, tensors = read(path)
    edit, message = SKIP_CONTENT[case]
    edit(metadata, tensors)
    write(path, metadata, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        ThresholdTable.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "before", "odd", "message"),
    [("passes", 2, 1, 3, "passes must be 1 or 2"), ("bounds", True, False, 1, "bounds must be a bool")],
)
def test_files_from_before_a_parameter(name: str, value: Any, before: Any, odd: Any, message: str, path: Path) -> None:
    make_table(POLICIES[-1]).save(path)
    assert getattr(ThresholdTable.load(path).policy, name) is value
    assert getattr(ThresholdTable.load(path).layer(1), name) is value
    metadata, tensors = read(path)
    del metadata["policy"]["parameters"][name]
    write(path, metadata, tensors)
    assert getattr(ThresholdTable.load(path).policy, name) is before
    metadata["policy"]["parameters"][name] = odd
    write(path, metadata, tensors)
    with pytest.raises(ValueError, match=message):
        ThresholdTable.load(path)


def test_version_1_cannot_hold_what_version_2_says(path: Path) -> None:
    make_table().save(path)
    metadata, tensors = read(path)
    metadata["calibration"]["target_recall"] = None
    write(path, metadata, tensors)
    with pytest.raises(ValueError, match="target_recall"):
        ThresholdTable.load(path)
    write(path, {**metadata, "format_version": 2, "measured": True}, tensors)
    assert ThresholdTable.load(path).target_recall is None


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
