"""ThresholdTable: per-layer, per-head thresholds of a calibrated policy, and the file that holds them.

docs/threshold_format.md describes the file. Loading validates all of it and refuses what does not fit.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from bsfa._library import __version__
from bsfa.errors import ThresholdMismatchError
from bsfa.files import replacing
from bsfa.identity import ModelIdentity, canonical_json, config_fields
from bsfa.policies import CALIBRATED as POLICIES
from bsfa.policies import SCORED, ExactSkip, ThresholdPolicy

FORMAT = "bsfa-thresholds"
FORMAT_VERSION = 2  # the newest; what version 1 can say is written as version 1
METADATA_KEY = "bsfa"  # one key only: safetensors writes several in no fixed order
CALIBRATED = "calibrated"

_PER_HEAD = ("thresholds", "recall", "recall_spread", "recall_worst", "tail_recall", "density")
_PER_LENGTH = ("length_recall", "length_density")
_MEASURED = (*_PER_HEAD[1:], *_PER_LENGTH)
# Fields of ExactSkip that are no parameters in a file: the table's reference and positions stand for the first two.
_NO_PARAMETERS = frozenset({"reference", "positions", "within"})


@dataclass(frozen=True, eq=False, kw_only=True)
class ThresholdTable:
    """Thresholds of a policy for every layer and query head of one model, with what they achieve.

    All float32 on the CPU; recall and density are measured on prompts that did not choose the thresholds.

    policy: the policy with its fixed parameters; its own threshold is replaced per head.
    thresholds: [layers, heads], in the policy's units. A dense head has ``policy.keep_all_threshold()``. Query heads
        that share one (relative-max, shared) have the same value.
    layers: per layer, "calibrated" or "dense: <reason>" (sliding window, or not run through bsfa).
    recall, recall_spread, recall_worst: [layers, heads], attention mass kept: mean, standard deviation and minimum over
        the held-out prompts.
    tail_recall: [layers, heads], the same mean over the worst query tiles of each prompt, which the target is about.
    density: [layers, heads], kept / visible blocks, mean over the held-out prompts.
    lengths, length_prompts: [lengths], prompt length (tokens, to a power of two) and held-out prompts of it.
    length_recall, length_density: [lengths, layers, heads], means over the prompts of that length.
    model: which model this is for.
    attention: ``softmax_scale`` and ``softcap`` per layer (None where dense) and the ``dtype`` of the queries.
    calibration: target, method, prompts, seed; see docs/threshold_format.md.
    reference: of ExactSkip, [layers, heads, knots] in nats at the query positions ``positions`` (tokens); finite, or
        -inf where nothing is skipped. None: 0 everywhere. ``policy`` itself has no reference and no ``within``.

    Thresholds that come from elsewhere (:func:`bsfa.import_bsfa`) are not :attr:`measured`: what they achieve is NaN
    here and absent from the file, and ``lengths`` is empty.
    """

    policy: ThresholdPolicy
    thresholds: Tensor
    layers: tuple[str, ...]
    recall: Tensor
    recall_spread: Tensor
    recall_worst: Tensor
    tail_recall: Tensor
    density: Tensor
    lengths: tuple[int, ...]
    length_prompts: tuple[int, ...]
    length_recall: Tensor
    length_density: Tensor
    model: ModelIdentity
    attention: Mapping[str, Any]
    calibration: Mapping[str, Any]
    reference: Tensor | None = None
    positions: tuple[int, ...] = ()
    source: str = "thresholds"  #: file name, for messages
    _cache: dict[tuple[int, str], ThresholdPolicy] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._validate()

    def _validate(self) -> None:
        if self.thresholds.dim() != 2 or 0 in self.thresholds.shape:
            raise ValueError(f"thresholds must be [layers, heads], got shape {tuple(self.thresholds.shape)}")
        shape = tuple(self.thresholds.shape)
        for name in (*_PER_HEAD, *_PER_LENGTH):
            t = getattr(self, name)
            want = shape if name in _PER_HEAD else (len(self.lengths), *shape)
            if t.dtype != torch.float32 or t.device.type != "cpu":
                raise ValueError(f"{name} must be float32 on the CPU, got {t.dtype} on {t.device}")
            if tuple(t.shape) != want:
                raise ValueError(f"{name} must have shape {want}, got {tuple(t.shape)}")
            if name in _MEASURED and not self.measured:
                if not bool(t.isnan().all()):
                    raise ValueError(f"recall is not measured (NaN), but {name} is")
                continue
            if not bool(t.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity")
            if bool(((t < 0) | (t > 1)).any()):
                raise ValueError(f"{name} must be 0 .. 1")
        if self.lengths and not self.measured:
            raise ValueError("recall is not measured (NaN), but there are lengths")
        self._validate_reference(shape)
        if len(self.layers) != shape[0]:
            raise ValueError(f"{len(self.layers)} layers are described, thresholds have {shape[0]}")
        if len(self.length_prompts) != len(self.lengths):
            raise ValueError("lengths and length_prompts differ in length")
        for i, kind in enumerate(self.layers):
            if kind != CALIBRATED and not kind.startswith("dense: "):
                raise ValueError(f"layer {i} is '{kind}', expected 'calibrated' or 'dense: <reason>'")
            if kind != CALIBRATED and bool((self.thresholds[i] != self.policy.keep_all_threshold()).any()):
                raise ValueError(f"layer {i} is dense but has thresholds")
        if self._group > 1:
            groups = self.thresholds.unflatten(-1, (-1, self._group))
            if bool((groups != groups[..., :1]).any()):
                raise ValueError("query heads of one KV head share a threshold but have different values")

    def _validate_reference(self, shape: tuple[int, ...]) -> None:
        if not isinstance(self.policy, ExactSkip):
            if self.reference is not None or self.positions:
                raise ValueError(f"reference and positions belong to {ExactSkip.name}, not to {self.policy.name}")
            return
        if self.policy.within is not None:
            raise ValueError(
                "a threshold table cannot hold ExactSkip.within (another policy): set it on what layer(i) gives, "
                "dataclasses.replace(table.layer(i), within=...)"
            )
        if self.policy.reference is not None:
            raise ValueError("a threshold table has a reference for every layer, its policy none")
        if self.reference is None:
            if self.positions:
                raise ValueError("positions belong to a reference")
            return
        r = self.reference
        if r.dtype != torch.float32 or r.device.type != "cpu":
            raise ValueError(f"reference must be float32 on the CPU, got {r.dtype} on {r.device}")
        want = (*shape, len(self.positions))
        if tuple(r.shape) != want:
            raise ValueError(f"reference must have shape {want}, a knot for each position, got {tuple(r.shape)}")
        if bool((r.isnan() | (r == torch.inf)).any()):
            raise ValueError("reference holds NaN or infinity (only -inf is allowed: nothing is skipped)")
        self._with_reference(0, torch.device("cpu"))  # checks the positions

    def _with_reference(self, index: int, device: torch.device | str) -> ThresholdPolicy:
        """The policy with the reference of layer ``index``."""
        if self.reference is None:
            return self.policy
        assert isinstance(self.policy, ExactSkip)
        return replace(self.policy, reference=self.reference[index].to(device), positions=self.positions)

    @property
    def _group(self) -> int:
        """Query heads that share a threshold."""
        if not self.policy.shares_thresholds:
            return 1
        kv_heads = self.model.fields.get("num_key_value_heads")
        if not isinstance(kv_heads, int) or kv_heads < 1 or self.num_heads % kv_heads:
            raise ValueError(f"shared thresholds of {self.num_heads} query heads do not fit {kv_heads} KV heads")
        return self.num_heads // kv_heads

    # ---- use --------------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.thresholds.shape[0]

    @property
    def num_heads(self) -> int:
        """Query heads of each layer."""
        return self.thresholds.shape[1]

    @property
    def measured(self) -> bool:
        """Whether recall and density are known."""
        return not bool(self.recall.isnan().all())

    @property
    def target_recall(self) -> float | None:
        """The share of attention mass that the calibration was asked to keep; None if it was asked something else."""
        target = self.calibration.get("target_recall")
        return None if target is None else float(target)

    @property
    def goal(self) -> str:
        """What the calibration was asked for, in words."""
        if self.target_recall is not None:
            return f"target recall {self.target_recall:g}"
        return str(self.calibration.get("goal", "no target"))

    @property
    def longest_knot(self) -> int:
        """The reference's last knot that a calibration prompt reached (if their lengths are known)."""
        tokens = self.calibration.get("tokens")
        return max(bisect.bisect(self.positions, max(tokens)) - 1, 0) if tokens else len(self.positions) - 1

    def dense_heads(self) -> Tensor:
        """bool [layers, heads]: heads that keep every block."""
        return self.thresholds == self.policy.keep_all_threshold()

    def layer(self, index: int, device: torch.device | str = "cpu") -> ThresholdPolicy | None:
        """The policy of layer ``index`` with its thresholds on ``device``; None if all its heads are dense."""
        if not 0 <= index < self.num_layers:
            raise IndexError(f"{self.source} has layers 0 .. {self.num_layers - 1}, not {index}")
        if bool(self.dense_heads()[index].all()):
            return None
        key = (index, str(device))
        if key not in self._cache:
            threshold = self.thresholds[index, :: self._group].to(device)
            self._cache[key] = self._with_reference(index, device).with_threshold(threshold)
        return self._cache[key]

    def check_config(self, config: Any) -> None:
        """Raise :class:`ThresholdMismatchError` unless a Hugging Face config is that of the calibrated model."""
        self._raise(self.model.differences(config_fields(config)))

    def check_model(self, model: torch.nn.Module) -> None:
        """Raise :class:`ThresholdMismatchError` naming each difference unless ``model`` is the calibrated one.

        Compares the config fields that determine attention, and a fingerprint of the weights where both are known.
        """
        here = ModelIdentity.of(model)
        problems = self.model.differences(here.fields)
        if self.model.weights_comparable(here) and self.model.weights != here.weights:
            problems.append("the weights differ (another training run, a fine-tune or a quantised copy)")
        self._raise(problems)

    def check_blocks(self, block_m: int | None = None, block_n: int | None = None) -> None:
        """Raise :class:`ThresholdMismatchError` unless the block sizes (tokens) are those of the calibration."""
        wanted = (("block_m", block_m, self.policy.block_m), ("block_n", block_n, self.policy.block_n))
        odd = [f"{k} is {have} in the file but {w} is asked for" for k, w, have in wanted if w not in (None, have)]
        self._raise(odd)

    def _raise(self, problems: list[str]) -> None:
        if problems:
            raise ThresholdMismatchError(f"{self.source} (calibrated on {self.model.name}): {'; '.join(problems)}")

    def __repr__(self) -> str:
        quality = f"recall={float(self.recall.mean()):.4f}, density={float(self.density.mean()):.4f}"
        return (
            f"ThresholdTable({self.policy.name}, layers={self.num_layers}, heads={self.num_heads}, "
            f"{self.goal}, {quality if self.measured else 'not measured'}, "
            f"model={self.model.name!r})"
        )

    # ---- file -------------------------------------------------------------------------------------------------------

    @property
    def format_version(self) -> int:
        """The oldest format version that can hold this table; files are written in it."""
        plain = self.policy.name in SCORED and self.measured and self.target_recall is not None
        return 1 if plain else 2

    def _tensors(self) -> dict[str, Tensor]:
        names = (*_PER_HEAD, *_PER_LENGTH) if self.measured else _PER_HEAD[:1]
        tensors = {name: getattr(self, name).contiguous() for name in names}
        if self.reference is not None:
            tensors["reference"] = self.reference.contiguous()
        return tensors

    def metadata(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values: what the file's metadata says (without its checksum)."""
        version = self.format_version
        parameters = policy_parameters(self.policy)
        if isinstance(self.policy, ExactSkip):
            parameters["positions"] = list(self.positions)
        return {
            "format": FORMAT,
            "format_version": version,
            "library_version": __version__,
            "policy": {
                "name": self.policy.name,
                "version": self.policy.version,
                "parameters": parameters,
            },
            "model": {
                "name": self.model.name,
                "fields": dict(self.model.fields),
                "sha256": self.model.sha256,
                "dtype": self.model.dtype,
                "weights": self.model.weights,
            },
            "layers": list(self.layers),
            "attention": dict(self.attention),
            "calibration": dict(self.calibration),
            "lengths": list(self.lengths),
            "length_prompts": list(self.length_prompts),
            **({"measured": self.measured} if version > 1 else {}),
        }

    def save(self, path: str | Path) -> None:
        """Write the file in one step: readers see the old or the new one, never a part. Same table, same bytes."""
        tensors, metadata = self._tensors(), self.metadata()
        metadata["sha256"] = _checksum(metadata, tensors)
        data = safetensors_bytes(tensors, {METADATA_KEY: canonical_json(metadata)})
        with replacing(path) as temporary:
            temporary.write_bytes(data)

    @staticmethod
    def load(path: str | Path, *, block_m: int | None = None, block_n: int | None = None) -> ThresholdTable:
        """Read and validate a file. ``block_m``, ``block_n``: refuse the file if it was made for other block sizes.

        Raises ``ValueError`` with file and reason for anything that is no sound threshold file of this version,
        :class:`ThresholdMismatchError` (a ``ValueError``) for another policy version or block size, and ``OSError`` if
        it cannot be opened. Call :meth:`check_model` before use with a model.
        """
        path = Path(path)
        with open(path, "rb"):
            pass
        try:
            with safe_open(str(path), framework="pt", device="cpu") as f:
                text = (f.metadata() or {}).get(METADATA_KEY)
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError, RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a sound safetensors file: {error}") from None
        try:
            table = _parse(text, tensors, str(path))
            table.check_blocks(block_m, block_n)
        except ThresholdMismatchError:
            raise
        except KeyError as error:
            raise ValueError(f"{path}: {error} is missing") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None
        return table


def _parameter_names(kind: type[ThresholdPolicy]) -> list[str]:
    elsewhere = {kind.threshold_name, *(_NO_PARAMETERS if issubclass(kind, ExactSkip) else ())}
    return [f.name for f in fields(kind) if f.name not in elsewhere]


def policy_parameters(policy: ThresholdPolicy) -> dict[str, Any]:
    """The fixed parameters of a policy as JSON values: all fields but the threshold, and what ExactSkip has as tensors
    or as another policy.
    """
    values = {name: getattr(policy, name) for name in _parameter_names(type(policy))}
    for name, value in values.items():
        if not isinstance(value, int | float | str | bool | None):
            raise TypeError(f"{type(policy).__name__}.{name} is a {type(value).__name__}: no file can hold it")
    return values


def _checksum(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(canonical_json(dict(metadata)).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name}{t.dtype}{list(t.shape)}".encode())
        digest.update(t.view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()


def _get(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"metadata '{key}' has the wrong type ({type(value).__name__})")
    return value


def _parse(text: str | None, tensors: dict[str, Tensor], source: str) -> ThresholdTable:
    if text is None:
        raise ValueError("not a bsfa threshold file (no 'bsfa' metadata)")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"damaged metadata: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a bsfa threshold file (format is not '{FORMAT}')")
    version = _get(data, "format_version", int)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format version {version} is newer than {FORMAT_VERSION}, the newest that bsfa {__version__} reads: "
            "update bsfa"
        )
    if version < 1:
        raise ValueError(f"format version {version} does not exist")
    claimed = data.pop("sha256")
    policy, positions = _parse_policy(_get(data, "policy", dict), version)
    measured = version == 1 or data["measured"]
    if not isinstance(measured, bool):
        raise ValueError(f"metadata 'measured' has the wrong type ({type(measured).__name__})")
    names = [*((*_PER_HEAD, *_PER_LENGTH) if measured else _PER_HEAD[:1]), *(["reference"] if positions else [])]
    missing = [n for n in names if n not in tensors]
    if missing:
        raise ValueError(f"tensors are missing: {', '.join(missing)}")
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise ValueError(f"unknown tensors: {', '.join(unknown)}")
    model = _get(data, "model", dict)
    identity = ModelIdentity(
        _get(model, "name", str), _get(model, "fields", dict), _get(model, "dtype", str), model["weights"]
    )
    calibration = _get(data, "calibration", dict)
    for name in ("target_recall", "tail"):
        if version == 1 or calibration.get(name) is not None:
            _get(calibration, name, (int, float))
    values = tensors if measured else {**not_measured(tensors["thresholds"]), **tensors}
    table = ThresholdTable(
        policy=policy,
        layers=tuple(_get(data, "layers", list)),
        lengths=tuple(_get(data, "lengths", list)),
        length_prompts=tuple(_get(data, "length_prompts", list)),
        model=identity,
        attention=_get(data, "attention", dict),
        calibration=calibration,
        positions=positions,
        source=source,
        **values,
    )
    if table.measured != measured:
        raise ValueError("recall holds NaN")
    if table.format_version > version:
        raise ValueError(f"format version {version} cannot hold this")
    if model["sha256"] != identity.sha256 or claimed != _checksum(data, tensors):
        raise ValueError("the checksum does not match: the file was damaged or edited")
    return table


def not_measured(thresholds: Tensor) -> dict[str, Tensor]:
    """What stands for measurements that there are not: NaN, and no lengths."""
    if thresholds.dim() != 2:
        raise ValueError(f"thresholds must be [layers, heads], got shape {tuple(thresholds.shape)}")
    shapes = {name: tuple(thresholds.shape) if name in _PER_HEAD else (0, *thresholds.shape) for name in _MEASURED}
    return {name: torch.full(shape, math.nan) for name, shape in shapes.items()}


def _parse_policy(row: Mapping[str, Any], format_version: int) -> tuple[ThresholdPolicy, tuple[int, ...]]:
    """The policy, and the positions of the reference's knots."""
    name = _get(row, "name", str)
    kind = POLICIES.get(name)
    if kind is None:
        raise ValueError(f"unknown policy '{name}' (bsfa {__version__} knows {', '.join(sorted(POLICIES))})")
    if format_version == 1 and name not in SCORED:
        raise ValueError(f"policy '{name}' needs format version 2, not 1")
    version = _get(row, "version", int)
    if version != kind.version:
        raise ThresholdMismatchError(
            f"policy '{name}' has version {version} in the file but {kind.version} in bsfa {__version__}: its scores "
            "mean something else now; calibrate again"
        )
    parameters = dict(_get(row, "parameters", dict))
    positions: tuple[int, ...] = ()
    if issubclass(kind, ExactSkip):
        if parameters.pop("within", None) is not None:
            raise ValueError("ExactSkip.within (another policy) cannot come from a file: set it on what layer(i) gives")
        positions = tuple(_get(parameters, "positions", list))
        del parameters["positions"]
    known = set(_parameter_names(kind))
    odd = ", ".join(sorted((set(parameters) ^ known) - (kind.added_parameters - set(parameters))))
    if odd:
        raise ValueError(f"policy '{name}' has unknown or missing parameters: {odd}")
    return kind(**parameters), positions
