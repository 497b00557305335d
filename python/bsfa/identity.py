"""Which model a threshold file belongs to: the config fields that determine attention, and a fingerprint of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bsfa.placement import parameters

#: Config fields that determine attention; those that a config lacks or leaves at None are left out.
FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "v_head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "kv_lora_rank",
    "q_lora_rank",
    "layer_types",
    "sliding_window",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "partial_rotary_factor",
)
SAMPLES = 64  # elements of each parameter that the fingerprint reads


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of a Hugging Face config (its text part) that determine attention, as JSON values."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    fields: dict[str, Any] = {name: getattr(config, name, None) for name in FIELDS}
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        rope = {"rope_theta": getattr(config, "rope_theta", None), **(getattr(config, "rope_scaling", None) or {})}
    fields["rope"] = {k: v for k, v in dict(rope).items() if v is not None}
    fields["rope"].setdefault("rope_type", "default")
    if fields["head_dim"] is None and fields["hidden_size"] and fields["num_attention_heads"]:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    present = {k: v for k, v in fields.items() if v is not None}
    result: dict[str, Any] = json.loads(json.dumps(present, sort_keys=True, default=str))
    return result


def weight_fingerprint(model: torch.nn.Module) -> str | None:
    """SHA-256 over a few elements of every parameter, rounded to bfloat16; None if some cannot be read.

    Rounding makes a model loaded in float32 and in bfloat16 the same. It tells another training run or a fine-tune of
    one architecture apart. Offloaded weights are read from where accelerate keeps them, so that an offloaded model has
    the fingerprint of the plain one.
    """
    digest = hashlib.sha256()
    for _, parameter in parameters(model):
        if parameter is None or type(parameter.data) is not Tensor or parameter.device.type == "meta":
            return None
        flat = parameter.detach().reshape(-1)
        count = min(SAMPLES, flat.shape[0])
        index = torch.arange(count, device=flat.device) * flat.shape[0] // max(count, 1)
        sample = flat[index]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(canonical_json(list(parameter.shape)).encode())
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelIdentity:
    """A model as threshold files know it.

    name: where it was loaded from; for people, never compared.
    fields: see :data:`FIELDS`, and ``rope``.
    dtype: of the weights, e.g. "bfloat16".
    weights: :func:`weight_fingerprint`, or None if unknown.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    weights: str | None = None

    @staticmethod
    def of(model: torch.nn.Module) -> ModelIdentity:
        """Identity of a Hugging Face model (anything with ``config`` and parameters)."""
        config: Any = model.config
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
        return ModelIdentity(name, config_fields(config), str(dtype).removeprefix("torch."), weight_fingerprint(model))

    @property
    def sha256(self) -> str:
        """Hash of ``fields``."""
        return hashlib.sha256(canonical_json(dict(self.fields)).encode()).hexdigest()

    def differences(self, fields: Mapping[str, Any]) -> list[str]:
        """One phrase per config field in which ``fields`` differs from this identity."""
        return [
            f"{key} is {self.fields.get(key)} in the file but {fields.get(key)} in the model"
            for key in sorted({*self.fields, *fields})
            if self.fields.get(key) != fields.get(key)
        ]

    def weights_comparable(self, other: ModelIdentity) -> bool:
        """Whether both fingerprints are known and of dtypes that round to the same bfloat16 values."""
        if self.weights is None or other.weights is None:
            return False
        return self.dtype == other.dtype or {self.dtype, other.dtype} <= {"float32", "bfloat16"}
