"""One dense or sparse prefill of a Hugging Face causal LM, with logits at chosen positions only."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from bsfa.placement import input_device, is_spread


def _unwrapped(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(_unwrapped(model).forward).parameters


def prefill(model: Any, ids: Tensor) -> None:
    """Run the prompt ``ids`` [S] through the model for its attention calls; makes one row of logits at most."""
    arguments = {"input_ids": ids[None].to(input_device(model)), "use_cache": False}
    if _keeps_logits(model):
        model(**arguments, logits_to_keep=1)
    else:
        model.base_model(**arguments)


def logits_at(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits [n, vocab] of the prompt ``ids`` [S] at ``positions`` [n], in the model's dtype.

    Only these are computed where the model's forward takes ``logits_to_keep`` (all of transformers' usual models); else
    all of them are made and the rest is dropped.
    """
    arguments = {"input_ids": ids[None].to(input_device(model)), "use_cache": False}
    if _keeps_logits(model):
        # Hooks would move a tensor to the first device, and the hidden states that it indexes are on the last one.
        keep = positions.tolist() if is_spread(model) else positions.to(input_device(model))
        logits: Tensor = model(**arguments, logits_to_keep=keep).logits
        return logits[0]
    logits = model(**arguments).logits
    return logits[0, positions.to(logits.device)]


def synchronize(*devices: torch.device) -> None:
    """Wait for GPUs, so that a clock tells the truth; nothing on a CPU."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
