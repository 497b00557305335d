"""Where a model's modules run, and where its weights are, if they are spread over devices or offloaded (accelerate).

accelerate hangs hooks on modules that bring inputs, and offloaded weights, to an execution device for the time of a
call; between calls an offloaded parameter is on the device "meta" and its values are in the hook's map. The hooks are
read by their attributes: this needs no accelerate, and models without hooks are the simple case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_META = torch.device("meta")


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks on ``module``; those in a row of several one by one."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", () if hook is None else (hook,))


def _as_device(value: Any) -> torch.device | None:
    """An execution device as accelerate writes it: a device, its name, or the index of an accelerator."""
    if value is None:
        return None
    if isinstance(value, int):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu" if accelerator is None else accelerator.type, value)
    return torch.device(value)


def _hook_devices(module: nn.Module) -> Iterator[torch.device]:
    """Execution devices of the hooks on ``module`` itself."""
    for hook in _hooks(module):
        device = _as_device(getattr(hook, "execution_device", None))
        if device is not None and device != _META:
            yield device


def module_device(module: nn.Module) -> torch.device | None:
    """Where ``module`` computes, by it or by the first of its parts that says so: a hook's execution device, else where
    its parameters are. None if nothing says so.
    """
    for part in module.modules():
        device = next(_hook_devices(part), None)
        if device is not None:
            return device
        for parameter in part.parameters(recurse=False):
            if parameter.device != _META:
                return parameter.device
    return None


def input_device(model: Any) -> torch.device:
    """Where token ids belong: with the embedding."""
    inner = getattr(model, "_orig_mod", model)
    try:
        embedding = inner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    device = module_device(embedding) if isinstance(embedding, nn.Module) else None
    return device or module_device(inner) or torch.device("cpu")


def model_devices(model: Any) -> list[torch.device]:
    """All devices that parts of the model compute on, in order of their names."""
    inner = getattr(model, "_orig_mod", model)
    found = {p.device for p in inner.parameters() if p.device != _META} | {input_device(model)}
    for module in inner.modules():
        found.update(_hook_devices(module))
    return sorted(found, key=str)


def is_spread(model: Any) -> bool:
    """Whether parts of the model are on different devices or offloaded, so that hooks move what passes between them."""
    inner = getattr(model, "_orig_mod", model)
    return any(True for module in inner.modules() for _ in _hooks(module))


def parameters(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Names and values of all parameters in order of the names, those that are offloaded read one at a time.

    None stands for one whose values cannot be read. A parameter that is tied to another appears once.
    """
    offloaded: dict[str, tuple[Any, str]] = {}
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            values = getattr(hook, "weights_map", None)
            if getattr(hook, "offload", False) and values is not None:
                for name, _ in module.named_parameters(recurse=bool(getattr(hook, "place_submodules", False))):
                    offloaded[f"{prefix}.{name}" if prefix else name] = (values, name)
    # Offloading replaces a tied parameter by two: only the model still knows.
    tied = getattr(model, "all_tied_weights_keys", None) if offloaded else None
    for name, parameter in sorted(model.named_parameters()):
        if isinstance(tied, dict) and name in tied:
            continue
        if parameter.device != _META:
            yield name, parameter
        elif name in offloaded:
            values, key = offloaded[name]
            try:
                yield name, values[key]
            except (KeyError, OSError):
                yield name, None
        else:
            yield name, None
