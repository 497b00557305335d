"""What a killed calibration had finished: one file per prompt, kept until the run is complete.

    <folder>/<16 digits of the settings' hash>/settings.json            what was measured, for people
    <folder>/<16 digits of the settings' hash>/<32 digits of the prompt's hash>.safetensors

The settings are everything besides the prompt that determines its curves: policy and parameters, grid, tail, model and
weights, the libraries and the kind of device. So a folder may hold several runs, and none of them mixes with another. A
file is written to a temporary name and renamed; it holds a checksum, and what does not match is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from bsfa._library import _C, __version__, cuda_library_path
from bsfa.calibration.forward import logits_at
from bsfa.calibration.risk import CalibrationWarning
from bsfa.files import replacing, write_text
from bsfa.identity import ModelIdentity, canonical_json
from bsfa.placement import input_device, model_devices
from bsfa.policies import ThresholdPolicy
from bsfa.thresholds import policy_parameters

FORMAT = "bsfa-calibration-prompt"
FORMAT_VERSION = 1
METADATA_KEY = "bsfa"
PROBE = 32  # tokens
_NOT_SETTINGS = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(t.dtype), list(t.shape)]).encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _build() -> dict[str, str]:
    """Hash of each compiled library in use: between two builds of one version, kernels may round differently."""
    files = {"cpu": Path(_C.__file__), "cuda": cuda_library_path()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path is not None}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {_C.build_info().get('cpu_instruction_set', '')}" if device.type == "cpu" else device.type


def _probe(model: Any) -> str:
    """Hash of the logits after a fixed short prompt: tells models apart whose weights cannot be read."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    logits = logits_at(model, torch.arange(PROBE) * 7 % max(vocabulary, 1), torch.arange(PROBE))
    return tensors_sha256({"logits": logits.float()})


def run_settings(
    model: Any, identity: ModelIdentity, policy: ThresholdPolicy, grid: Tensor, tail: float, extra: Mapping[str, Any]
) -> Any:
    """All that determines a prompt's curves, besides the prompt, as JSON values. Call it within ``dense_model``.

    extra: further options of the measurement.
    """
    import transformers

    config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
    config = {k: v for k, v in config.items() if k not in _NOT_SETTINGS}
    devices = model_devices(model)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "policy": {"name": policy.name, "version": policy.version, "parameters": policy_parameters(policy)},
        "grid": tensors_sha256({"grid": grid}),
        "tail": float(tail),
        "extra": dict(extra),
        "model": {
            "fields": dict(identity.fields),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "dtype": identity.dtype,
            "weights": identity.weights or _probe(model),
            "attention_scale": [
                [m.layer_idx, str(getattr(m, "scaling", None))] for m in model.modules() if hasattr(m, "layer_idx")
            ],
        },
        "autocast": bool(torch.is_autocast_enabled(input_device(model).type)),
        "devices": sorted({_device_name(d) for d in devices}),
        "libraries": {
            "bsfa": __version__,
            "build": _build(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


@dataclass(frozen=True, eq=False)
class PromptRecord:
    """What measuring one prompt gave: tensors (float32, on the CPU) and facts as JSON values."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class PromptStore:
    """The finished prompts of one calibration run in ``folder``, which is made. Raises ``OSError`` if it cannot be."""

    def __init__(self, folder: str | Path, settings: Any):
        self.folder = Path(folder)
        self.settings = settings
        self.key = _sha256(settings)
        self.place = self.folder / self.key[:16]
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: is not a directory, so finished prompts cannot be kept there")
        others = [p.parent for p in self.folder.glob("*/settings.json") if p.parent != self.place]
        count = sum(1 for place in others for _ in place.glob("*.safetensors"))
        if count:
            warnings.warn(
                f"{self.folder} also holds {count} finished prompts of other settings (model, policy, library or "
                "device), which do not count here; delete it if they are not needed",
                CalibrationWarning,
                stacklevel=3,
            )
        # Before anything is measured: a folder that cannot be written should not cost the first prompt.
        self.place.mkdir(parents=True, exist_ok=True)
        write_text(self.place / "settings.json", json.dumps(settings, indent=1, sort_keys=True) + "\n")

    def path(self, ids: Tensor) -> Path:
        """The file of a prompt."""
        return self.place / f"{_ids_sha256(ids)[:32]}.safetensors"

    def save(self, ids: Tensor, record: PromptRecord) -> None:
        """Keep the record of a finished prompt, whole or not at all. Raises ``OSError``, e.g. of a full disk."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in record.tensors.items()}
        metadata = {"settings": self.key, "prompt": _ids_sha256(ids), "facts": dict(record.facts)}
        metadata["sha256"] = _sha256([metadata, tensors_sha256(tensors)])
        data = safetensors_bytes(tensors, {METADATA_KEY: canonical_json(metadata)})
        with replacing(self.path(ids)) as temporary:
            temporary.write_bytes(data)

    def load(self, ids: Tensor) -> PromptRecord | None:
        """The record of a prompt; None if there is none, or (with a warning) none that is sound."""
        path = self.path(ids)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt", device="cpu") as f:
                metadata = json.loads((f.metadata() or {})[METADATA_KEY])
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  not a dict
            claimed = metadata.pop("sha256")
            if claimed != _sha256([metadata, tensors_sha256(tensors)]):
                raise ValueError("the checksum does not match")
            if metadata["settings"] != self.key or metadata["prompt"] != _ids_sha256(ids):
                raise ValueError("it is of another run or prompt")
            return PromptRecord(tensors, metadata["facts"])
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{path}: damaged, the prompt is measured again ({error})", CalibrationWarning, stacklevel=3)
            return None


def _ids_sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()


def _is_store(settings: Path) -> bool:
    """Whether a store wrote this file of settings: its folder is called by their hash."""
    try:
        value = json.loads(settings.read_text(encoding="utf-8"))
        return settings.parent.name == _sha256(value)[:16]
    except (OSError, ValueError):
        return False


def discard(folder: str | Path) -> None:
    """Delete what stores keep in ``folder`` and in folders in it, of all settings, and what is empty then.

    Files that are not a store's stay.
    """
    folder = Path(folder)
    for settings in sorted(folder.rglob("settings.json")):
        place = settings.parent
        if not _is_store(settings):
            continue
        for pattern in ("*.safetensors", ".*.tmp.safetensors", ".*.tmp.json"):
            for path in place.glob(pattern):
                path.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)
        while True:
            try:
                place.rmdir()
            except OSError:  # not empty
                break
            if place == folder:
                break
            place = place.parent
    with contextlib.suppress(OSError):
        folder.rmdir()
