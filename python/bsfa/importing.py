"""Threshold files of the original BSFA (arXiv 2512.07011) as tables of :class:`bsfa.policies.ExactSkip`.

Its calibration writes ``<name>.inference.pt``: thresholds in nats for several k (the number of key tiles that a query
block is to keep off the diagonal), layers, query heads and query blocks, and no word about the model they belong to.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsfa.errors import ThresholdMismatchError
from bsfa.identity import ModelIdentity, config_fields
from bsfa.policies import ExactSkip
from bsfa.thresholds import CALIBRATED, ThresholdTable, not_measured

_SIZES = ("num_layers", "num_heads", "max_num_blocks", "q_block_size", "k_block_size")
#: Fields of the original; all but the last two are needed.
FIELDS = ("thresholds", "k_values", *_SIZES, "aggregation_method", "shape_description")
MAX_BYTES = 1 << 32


def import_bsfa(path: str | Path, k: int, model: Any, *, sink_blocks: int = 1) -> ThresholdTable:
    """The thresholds for ``k`` of an original BSFA file, as an absolute :class:`bsfa.policies.ExactSkip` (ratio 1).

    model: the model that the file was made for, which it does not say itself: a directory (or hub name) with a Hugging
    Face ``config.json``, a config, or the loaded model. sink_blocks: first KV blocks that are never skipped (0 as in
    the original; its diagonal blocks are kept anyway).

    Every query block's threshold becomes a knot at its first position, so that tiles of 128 rows at these positions
    have exactly the file's values; only knots that say the same as both neighbours are left out. What cannot be carried
    over is listed in ``table.calibration["not_mapped"]``, and recall and density are unknown (``table.measured`` is
    False): run ``bsfa eval`` before trusting it.

    No code in the file runs (``torch.load(weights_only=True)``). Raises ``ValueError`` for a file that is not of this
    kind or whose fields contradict each other, :class:`bsfa.ThresholdMismatchError` (a ``ValueError``) if layers or
    heads are not the model's, ``OSError`` if it cannot be read.
    """
    path = Path(path)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    policy = ExactSkip(form="absolute", ratio=1.0, sink_blocks=sink_blocks)
    try:
        data = _read(path)
        values, facts = _thresholds(data, k)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    identity = _identity(model)
    layers, heads, blocks = values.shape
    for name, have in (("num_hidden_layers", layers), ("num_attention_heads", heads)):
        want = identity.fields.get(name)
        if want != have:
            raise ThresholdMismatchError(f"{path}: {name} is {have} in the file but {want} in {identity.name}")
    keep = _needed(values)
    positions = tuple(int(i) * facts["q_block_size"] for i in keep)
    kinds = [_kind(identity, i) for i in range(layers)]
    sparse = (values > -torch.inf).any(-1) & torch.tensor([kind == CALIBRATED for kind in kinds])[:, None]
    return ThresholdTable(
        policy=policy.with_threshold(policy.keep_all_threshold()),
        thresholds=sparse.to(torch.float32),
        layers=tuple(kinds),
        reference=values[:, :, keep].contiguous(),
        positions=positions,
        lengths=(),
        length_prompts=(),
        model=identity,
        attention={"softmax_scale": [None] * layers, "softcap": [None] * layers, "dtype": ""},
        calibration={
            "method": "imported from BSFA",
            "goal": f"{k} off-diagonal key tiles a query block (BSFA's k)",
            "k": k,
            "file": path.name,
            "file_sha256": _sha256(path),
            "original": facts,
            "not_mapped": _not_mapped(facts, policy, blocks),
        },
        source=str(path),
        **not_measured(sparse),
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """The file's dict, with nothing in it run and no more memory taken than the file is large."""
    with open(path, "rb"):
        pass
    if not zipfile.is_zipfile(path):
        raise ValueError("not a file of torch.save (no zip archive)")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > MAX_BYTES:
        raise ValueError(f"not a file of torch.save: compressed, or more than {MAX_BYTES >> 30} GiB")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("holds more than tensors and plain values: refused, it could run code") from None
    except Exception as error:  # torch raises all kinds for a damaged archive
        raise ValueError(f"not a sound file of torch.save ({type(error).__name__})") from None
    if not isinstance(data, dict):
        raise ValueError(f"holds a {type(data).__name__}, a BSFA file holds a dict")
    missing = [name for name in FIELDS[:-2] if name not in data]
    if missing:
        raise ValueError(f"no BSFA threshold file: {', '.join(missing)} missing")
    return data


def _thresholds(data: dict[str, Any], k: int) -> tuple[Tensor, dict[str, Any]]:
    """float32 [layers, heads, query blocks] for k, and the file's other fields, checked against each other."""
    facts: dict[str, Any] = {}
    for name in _SIZES:
        value = data[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r:.60}")
        facts[name] = value
    for name in FIELDS[-2:]:
        value = data.get(name, "")
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {type(value).__name__}")
        facts[name] = value[:200]
    ks = data["k_values"]
    if not isinstance(ks, list) or not ks or any(type(x) is not int or x < 0 for x in ks) or len(set(ks)) != len(ks):
        raise ValueError("k_values must be a list of different ints")
    facts["k_values"] = list(ks)
    t = data["thresholds"]
    if type(t) is not Tensor or t.dtype != torch.float32 or t.layout != torch.strided or t.device.type != "cpu":
        raise ValueError("thresholds must be a float32 tensor")
    want = (len(ks), facts["num_layers"], facts["num_heads"], facts["max_num_blocks"])
    if tuple(t.shape) != want or not t.is_contiguous():
        raise ValueError(f"thresholds must have shape {want} (k, layers, heads, query blocks), got {tuple(t.shape)}")
    if k not in ks:
        raise ValueError(f"has no thresholds for k = {k}; it has k = {', '.join(map(str, ks))}")
    values = t[ks.index(k)].detach().clone()
    if bool((values.isnan() | (values == torch.inf)).any()):
        raise ValueError(f"thresholds of k = {k} hold NaN or infinity")
    return values, facts


def _needed(values: Tensor) -> list[int]:
    """Query blocks that need a knot: linear interpolation and the constant end give the others bit for bit."""
    flat = values.flatten(0, 1)
    same = (flat[:, 1:] == flat[:, :-1]).all(0).tolist()  # block i + 1 as block i
    last = flat.shape[1] - 1
    while last > 0 and same[last - 1]:
        last -= 1
    return [i for i in range(last + 1) if i in (0, last) or not (same[i - 1] and same[i])]


def _identity(model: Any) -> ModelIdentity:
    if isinstance(model, torch.nn.Module):
        return ModelIdentity.of(model)
    config, name = model, str(getattr(model, "_name_or_path", "") or type(model).__name__)
    if isinstance(model, str | Path):
        name = str(Path(model).expanduser()) if Path(model).expanduser().exists() else str(model)
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise ValueError(f"{name}: no config.json in this directory")
        try:
            from transformers import AutoConfig
        except ImportError:
            raise ImportError('reading a model needs transformers: pip install "bsfa[transformers]"') from None
        config = AutoConfig.from_pretrained(name)
    if not hasattr(config, "num_attention_heads") and not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a directory, a Hugging Face config or a model, got {type(model).__name__}")
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return ModelIdentity(name, config_fields(config), "" if dtype is None else str(dtype).removeprefix("torch."))


def _kind(identity: ModelIdentity, layer: int) -> str:
    types = identity.fields.get("layer_types") or []
    if layer < len(types) and types[layer] != "full_attention":
        return f"dense: {types[layer].replace('_', ' ')}"
    return CALIBRATED


def _not_mapped(facts: dict[str, Any], policy: ExactSkip, blocks: int) -> list[str]:
    """What the original means that this table does not, in words."""
    sinks = policy.sink_blocks
    found = [
        f"tiles: the thresholds are for maxima over {facts['q_block_size']} query rows x {facts['k_block_size']} keys, "
        f"and the original's kernel compares tiles of 128 x 64; here groups of 64 rows x {policy.block_n} keys are",
        f"k counts the original's key tiles off the diagonal; what is kept here are blocks of {policy.block_n} keys",
        "the diagonal: the original keeps the two or three key tiles of 64 there, here the query tile's own block",
        "model, weights, dtype, softmax scale, prompts and library version: the file names none of them; the model is "
        "the one that was given, and its weights are not checked",
        f"lengths: the original copies the last threshold it saw to all later positions up to "
        f"{blocks * facts['q_block_size']} tokens, and which those are is not in the file",
        "positions: the original indexes by query block within a call, here by absolute position, also for chunks",
        "recall and density: the file has none",
    ]
    if sinks:
        found.insert(3, f"sinks: the original keeps none, here the first blocks are (sink_blocks={sinks})")
    if facts["q_block_size"] != policy.block_m:
        found.insert(
            1,
            f"query blocks: the file has one threshold for {facts['q_block_size']} rows, tiles here have "
            f"{policy.block_m}: thresholds are interpolated",
        )
    return found
